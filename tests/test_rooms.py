"""The rooms of common/: which module imports which, how long each is, and what plumbing prints."""

import argparse
import ast
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMMON = ROOT / "common"
BUDGET = {"tokenization": 220, "plumbing": 260}  # lines
ARROWS = {  # module -> the modules that it imports, all of which stand above it
    "tokenization": "",  # these three a reader of methods follows: they need nothing of plumbing
    "verifier": "",
    "logprob": "",
    "plumbing.flags": "",
    "plumbing.ranks": "",
    "plumbing.screen": "",
    "plumbing.columns": "plumbing.flags",
    "plumbing.heads": "plumbing.flags",
    "plumbing.configs": "tokenization plumbing.flags",
    "plumbing.memory": "plumbing.flags plumbing.ranks plumbing.configs",
    "plumbing.models": "plumbing.flags plumbing.ranks plumbing.configs plumbing.heads",
    "plumbing.examples": "tokenization plumbing.flags plumbing.configs",
    "plumbing.lengths": "tokenization plumbing.flags plumbing.configs plumbing.examples",
    "plumbing.tables": "plumbing.flags plumbing.columns plumbing.examples plumbing.lengths",
    "plumbing.data": "verifier plumbing.flags plumbing.ranks plumbing.columns"
    " plumbing.configs plumbing.examples plumbing.lengths plumbing.tables",
    "plumbing.cuda_graph": "",
    "plumbing.fused_ops": "",
    "plumbing.draws": "plumbing.fused_ops",
    "plumbing.fused_step": "plumbing.models plumbing.fused_ops",
    "plumbing.decoding": "tokenization plumbing.ranks plumbing.models plumbing.cuda_graph"
    " plumbing.fused_step",
    "plumbing.storage": "plumbing.ranks",
    "plumbing.folders": "plumbing.flags plumbing.storage",
    "plumbing.runs": "plumbing.flags plumbing.ranks plumbing.screen plumbing.configs plumbing.memory"
    " plumbing.models plumbing.decoding plumbing.storage plumbing.folders",
    "plumbing.evaluation": "tokenization verifier plumbing.flags",
    "plumbing.annotator": "",
}


def modules():
    """name -> path of every module in common/, such as plumbing.data."""
    found = {}
    for path in COMMON.rglob("*.py"):
        name = ".".join(path.relative_to(COMMON).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


def project_imports(path):
    """The modules of the project that a module imports, anywhere in it; scripts have their own names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    scripts = {script.stem for script in ROOT.glob("*.py")}
    assert not scripts & set(names), f"{path} imports a script"
    known = modules()
    return {name.removeprefix("common.") for name in names if name.removeprefix("common.") in known}


def test_every_module_is_drawn():
    assert set(modules()) == set(ARROWS)
    for path in COMMON.rglob("__init__.py"):
        assert path.read_text() == "", f"{path} is not empty"


@pytest.mark.parametrize("name", ARROWS)
def test_imports_are_the_arrows(name):
    assert project_imports(modules()[name]) == set(ARROWS[name].split())


def test_arrows_go_one_way():
    """Only to modules that stand above, so there is no circle."""
    above = set()
    for name, imported in ARROWS.items():
        assert set(imported.split()) <= above, name
        above.add(name)


@pytest.mark.parametrize("name", ARROWS)
def test_line_budgets(name):
    most = BUDGET.get(name.split(".")[0])
    lines = len(modules()[name].read_text().splitlines())
    assert most is None or lines <= most, f"common.{name}: {lines} lines, at most {most}"


# ---- flags -----------------------------------------------------------------------------------------------


@pytest.fixture
def parser():
    from common.plumbing import flags

    parser = flags.Parser("A method.\n\nMore.")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=flags.integer(0, 10**6 - 1), default=100, help="batches")
    group.add_argument("--lr", type=flags.number(0, 1), default=1e-3, help="learning rate")
    group.add_argument("--norm", type=flags.positive, default=1.0, help="of a gradient")
    group.add_argument("--score", type=flags.finite(-1e9), default=-2.0, help="of a response")
    group.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of activations")
    group.add_argument("--data", help="a folder")
    return parser


@pytest.mark.parametrize(
    "given, sentence",
    {
        "--steps x": "--steps x: must be an integer.",
        "--steps 1000000": "--steps 1000000: must be at most 999999.",
        "--steps -1": "--steps -1: must be at least 0.",
        "--lr nan": "--lr nan: must be a finite number.",
        "--lr inf": "--lr inf: must be a finite number.",
        "--lr fast": "--lr fast: must be a number.",
        "--lr 1.5": "--lr 1.5: must be at most 1.",
        "--norm 0": "--norm 0: must be above 0.",
        "--score=-1e10": "--score -1e10: must be at least -1000000000.0.",
        "--dtype fp16": "--dtype fp16: must be one of fp32, bf16.",
        "--steps": "--steps: expected one argument.",
        "--rate 1": "--rate 1: there is no such flag; --help lists them all.",
    }.items(),
)
def test_a_bad_flag_is_one_sentence(given, sentence, parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(given.split())
    assert stop.value.code == 2 and str(stop.value) == sentence
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_help_has_groups_and_defaults(parser):
    text = parser.format_help()
    assert "A method." in text and "More." not in text and "optimisation:" in text
    assert "(default: 100)" in text and "None" not in text


# ---- the end of a run ------------------------------------------------------------------------------------


def test_summary_of_a_run(tmp_path, capsys, monkeypatch):
    """First and last value of each main metric, and two commands; whatever is missing is left out."""
    from common.plumbing import runs

    args = argparse.Namespace(reward_model=None, steps=9)
    runs.finish(tmp_path / "nothing", args)
    assert "plot.py" in capsys.readouterr().out
    (tmp_path / "final").mkdir()
    lines = [{"step": 0, "accuracy": 0.25, "pass@1": 0.5}, {"step": 1}, {"step": 2, "accuracy": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", "sft.py --lr 1e-3 --steps 9 --model=x --resume --eval-first off".split())
    runs.finish(tmp_path, args)
    said = [line.split(maxsplit=1) for line in capsys.readouterr().out.strip().splitlines()]
    assert said[:2] == [["accuracy", "0.250 -> 0.750"], ["pass@1", "0.500"]]
    assert [word for word, _ in said[2:]] == ["metrics", "model", "evaluate", "plot"]
    command = f"python sft.py --model {tmp_path}/final --steps 0 --output-dir {tmp_path}-eval --lr 1e-3"
    assert said[4][1] == f"it   {command}"


def test_peak_memory_asks_the_gpu_only_if_there_is_one(monkeypatch):
    """Asked without CUDA, torch raises."""
    from common.plumbing import runs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: pytest.fail("asked"))
    assert 10**7 < runs.peak_memory() < 10**12
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert runs.peak_memory() == 7


@pytest.mark.parametrize("first", [True, False])
def test_the_bar_says_evaluating(first, capsys, monkeypatch):
    """Before the first step and in it; not on the other ranks."""
    from common.plumbing import ranks, runs

    monkeypatch.setattr(ranks, "is_first", lambda: first)
    with runs.evaluating():
        pass
    assert ("evaluating" in capsys.readouterr().err) == first
    state = {"step": 0, "faults": 0, "stop": 0, "leave": 0}
    for _ in runs.steps(state, 1):
        with runs.evaluating():
            pass
    assert ("evaluating" in capsys.readouterr().err) == first
    assert runs.bar is None


def test_columns_of_the_log_are_aligned(tmp_path, capsys):
    from common.plumbing import runs

    for step, reward in ((9, 0.5), (10, -0.00012345), (123456, 1e-12)):
        runs.log(tmp_path, {"step": step, "reward": reward, "loss": 1.0, "levels": {}})
    lines = capsys.readouterr().out.splitlines()
    for name in ("reward", "loss"):
        assert len({line.index(name) for line in lines}) == 1
    assert lines[2].startswith("step 123456  reward 1e-12      loss 1")
