"""The tools beside the scripts, and what is declared about the project as a package."""

import importlib
import io
import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from conftest import ROOT
from packaging.requirements import Requirement

matplotlib.use("agg")
from common.plumbing import flags  # noqa: E402
from tools import plot, sample  # noqa: E402

QUESTION = "Leo has 18 shells, gets 7. How many shells does Leo have?"
BUDGETS = {"plot": 90, "sample": 64}  # sample.py: errors that say the fix


@pytest.mark.parametrize("name", BUDGETS)
def test_a_tool_fits_on_two_screens(name):
    lines = (ROOT / f"tools/{name}.py").read_text().splitlines()
    assert len(lines) <= BUDGETS[name]
    assert max(map(len, lines)) <= 110
    assert sum(len(line) > 96 for line in lines) <= 0.1 * len(lines)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_tool_starts_from_any_folder(name, tmp_path):
    command = [sys.executable, str(ROOT / f"tools/{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"tools/{name}.py" in done.stdout  # an example
    assert "(default: 1)" in done.stdout


# ---- curves ----------------------------------------------------------------------------------------------


def write_run(folder, rows):
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def supervised(steps=12):
    rows = [{"step": 0, "pass@1": 0.2}]
    rows += [{"step": n, "loss": 1 / n, "entropy": 0.5, "response_len": 40} for n in range(1, steps)]
    return [*rows, {"step": steps, "loss": 0.1, "entropy": 0.4, "response_len": 41, "pass@1": 0.8}]


def reinforced(steps=12, kl=0.01):
    rows = [{"step": 0, "pass@1": 0.2}]
    for n in range(1, steps + 1):
        row = {"step": n, "reward": n / steps, "loss": -0.001, "entropy": 1 / n, "response_len": n}
        rows.append(row | {"kl": kl * n})
    return [*rows[:-1], rows[-1] | {"pass@1": 0.6}]


def curves(figure):
    """{title: {label: (steps, values)}}, of the lines with points and the legend's labels for colours."""
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    looks = [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    assert len(set(looks)) == len(labels)
    name = dict(zip(looks, labels))
    panels = {}
    for axis in figure.axes:
        drawn = [line for line in axis.lines if len(line.get_xdata())]
        panels[axis.get_title()] = {
            name[line.get_color(), line.get_linestyle()]: (
                list(line.get_xdata()),
                list(line.get_ydata()),
            )
            for line in drawn
        }
    return panels


def test_two_runs_share_panels_and_one_legend():
    figure = plot.draw({"sft": supervised(), "grpo": reinforced()})
    panels = curves(figure)
    both = {"sft", "grpo"}
    assert {title: set(lines) for title, lines in panels.items()} == {
        plot.TITLES["reward"]: {"grpo"},
        plot.TITLES["loss"]: {"sft"},  # a policy gradient's is not drawn
        plot.TITLES["pass@1"]: both,
        plot.TITLES["entropy"]: both,
        plot.TITLES["response_len"]: both,
        plot.TITLES["kl"]: {"grpo"},
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sft", "grpo"]
    assert panels[plot.TITLES["pass@1"]]["grpo"] == ([0, 12], [0.2, 0.6])
    assert panels[plot.TITLES["loss"]]["sft"][1] == [*(1 / n for n in range(1, 12)), 0.1]
    assert {axis.get_xlabel() for axis in figure.axes} == {"step"}


def test_panels_that_no_run_has_are_left_out():
    axes = plot.draw({"sft": supervised(3)}).axes
    assert all(tick == int(tick) for axis in axes for tick in axis.get_xticks())
    titles = [axis.get_title() for axis in axes]
    assert titles == [plot.TITLES[m] for m in ("loss", "pass@1", "entropy", "response_len")]


def test_a_kl_of_zero_throughout_is_not_drawn():
    """Without a reference the scripts log 0, which does not say that the policy stayed where it was."""
    assert plot.TITLES["kl"] not in curves(plot.draw({"grpo": reinforced(kl=0.0)}))
    assert plot.TITLES["kl"] in curves(plot.draw({"grpo": reinforced(kl=1e-9)}))


def test_smoothing_is_over_steps_and_only_where_it_is_asked_for():
    rows = [{"step": n, "loss": float(n)} for n in (1, 2, 3, 10)]
    assert plot.series(rows, "loss")[1] == [1, 2, 3, 10]
    assert plot.series(rows, "loss", 3)[1] == [1, 1.5, 2, 10]  # nothing else in steps 8 to 10
    [axis] = plot.draw({"sft": rows}, smooth=3).axes
    assert axis.get_xlabel() == "step (mean of the last 3)"


def test_a_value_that_was_not_finite_leaves_a_gap():
    values = plot.series([{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}], "loss")[1]
    assert values[0] == 2 and math.isnan(values[1])


def test_nine_runs_and_runs_of_one_name_stay_distinct(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / f"{n}/grpo", reinforced()) for n in range(9)]
    drawn = []
    draw = plot.draw
    monkeypatch.setattr(plot, "draw", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    plot.main([*runs, "--out", str(tmp_path / "curves.png")])
    assert set(curves(drawn[0])[plot.TITLES["reward"]]) == set(runs)


def contrast(a, b):
    """WCAG's ratio of two colours."""

    def luminance(color):
        parts = matplotlib.colors.to_rgb(color)
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_the_png_is_transparent_and_readable_on_both_pages(page, tmp_path):
    out = tmp_path / "curves.png"
    importlib.reload(plot)  # figures of other tests in this process have other colours
    plot.main([write_run(tmp_path / "sft", supervised()), "--out", str(out)])
    picture = matplotlib.image.imread(out)  # RGBA
    assert (picture[..., 3] == 0).mean() > 0.8
    figure = plot.draw({"sft": supervised()})
    texts = [axis.title for axis in figure.axes] + figure.legends[0].get_texts()
    texts += [tick for axis in figure.axes for tick in axis.get_xticklabels()]
    assert all(contrast(text.get_color(), page) > 4 for text in texts)  # 4.5 on both is impossible
    assert all(contrast(color, page) > 2.4 for color in plot.COLORS)


def test_bad_input_is_one_sentence_that_names_the_path(tmp_path, capsys):
    good = write_run(tmp_path / "good", supervised())
    empty = write_run(tmp_path / "empty", [])
    bare = write_run(tmp_path / "bare", [{"step": 0, "seconds": 1.0}])
    (tmp_path / "folder").mkdir()
    cases = [
        ([f"{tmp_path}/nowhere"], f"{tmp_path}/nowhere/metrics.jsonl"),
        ([good, f"{tmp_path}/folder"], f"{tmp_path}/folder/metrics.jsonl"),
        ([empty], f"{empty}/metrics.jsonl"),
        ([bare], bare),
        ([good, "--out", f"{tmp_path}/no/curves.png"], f"{tmp_path}/no/curves.png"),
        ([good, "--out", f"{tmp_path}/curves.docx"], f"{tmp_path}/curves.docx"),
        ([good, "--smooth", "0"], "--smooth 0"),
        ([good], "--out"),  # no window without a screen
    ]
    for i, line in enumerate(['{"step": 1, "lo', "[1]", "3", '{"loss": 1}', '{"step": "x"}', ""]):
        broken = Path(write_run(tmp_path / f"broken{i}", supervised()), "metrics.jsonl")
        broken.write_text(broken.read_text() + line + "\n")
        cases.append(([str(broken.parent)], f"{broken}, line 14"))
    for argv, named in cases:
        with pytest.raises(flags.BadInput) as stop:
            plot.main(argv)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1, (argv, error)


def test_matplotlib_is_asked_for_where_it_is_missing():
    hidden = "import sys; sys.modules['matplotlib'] = None; import tools.plot"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: plots need matplotlib; run pip install matplotlib.\n"


# ---- samples ---------------------------------------------------------------------------------------------


@pytest.fixture
def ask(capsys):
    """ask(*argv): what sample.py prints, a list of lines."""

    def go(*argv):
        sample.main([*map(str, argv), "--model", str(ROOT / "tiny/model")])
        return capsys.readouterr().out.splitlines()

    return go


def settings(**more):
    """What sample.py's flags say, and `more`."""
    args = dict(temperature=1.0, samples=1, max_new_tokens=20, seed=0, prompt_template="{question}")
    return SimpleNamespace(**args | more)


@pytest.mark.parametrize(
    ("question", "budget", "answer", "verdict"),
    [
        (QUESTION, 48, "25", "correct"),
        (QUESTION, 48, "24", "incorrect"),
        ("What is the median of 75, 60, 21?", 1, "60", "no answer found"),  # it writes: sorted
    ],
)
def test_the_verdict_on_a_greedy_response(ask, question, budget, answer, verdict):
    flags = f"--temperature 0 --max-new-tokens {budget} --answer {answer}".split()
    text, last = ask(question, *flags)
    assert last == verdict
    assert text.endswith("[truncated: raise --max-new-tokens]") == (budget == 1)


def test_without_an_answer_there_is_no_verdict(ask):
    [text] = ask(QUESTION, "--temperature", 0)
    assert "25" in text


def test_samples_come_from_the_seed_and_the_temperature(ask):
    several = [QUESTION, "--samples", 6, "--max-new-tokens", 40]
    first = ask(*several)
    assert len(first) == 6 and len(set(first)) > 1
    assert ask(*several) == first
    assert ask(*several, "--seed", 1) != first
    assert set(ask(*several, "--temperature", 1e-3)) == set(ask(QUESTION, "--temperature", 0))


def test_questions_from_the_terminal_are_answered_one_by_one(ask, monkeypatch):
    other = "Ann has 3 stamps, doubles. How many stamps does Ann have?"
    asked = []
    draw = sample.sample
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\n{other}\n{QUESTION}"))
    monkeypatch.setattr(sample, "sample", lambda *x: asked.append(x[2]) or draw(*x))
    first, second, third = ask()
    assert asked == [QUESTION, other, QUESTION]
    assert [first] == ask(QUESTION) and [second] == ask(other)
    assert third == first  # the seed is set for each question


def test_the_model_folder_does_not_change_how_it_is_sampled(tiny, monkeypatch):
    """A folder may recommend top-k or penalties; the scripts sample from the model itself."""
    model, tokenizer = tiny
    args = settings(temperature=2.0, samples=20, max_new_tokens=20)
    monkeypatch.setattr(model, "generation_config", model.generation_config)
    plain = sample.sample(model, tokenizer, QUESTION, args)
    model.generation_config.update(repetition_penalty=9.0, top_p=0.01, min_new_tokens=15)
    assert sample.sample(model, tokenizer, QUESTION, args) == plain
    assert len(set(plain)) > 10  # at this temperature hardly any two are equal


def test_the_prompt_is_the_scripts_prompt(tiny, monkeypatch):
    model, tokenizer = tiny
    seen = []
    monkeypatch.setattr(model, "generation_config", model.generation_config)
    monkeypatch.setattr(
        model, "generate", lambda tokens, **more: seen.append(tokens) or torch.cat([tokens, tokens], 1)
    )
    args = settings(prompt_template="Well, {question}")
    sample.sample(model, tokenizer, QUESTION, args)
    [prompt] = sample.tok.encode_prompts(tokenizer, [QUESTION], "Well, {question}")
    assert seen[0].tolist() == [prompt]
    # generate() stops there by itself: what it writes beyond would be truncated, but costs time
    assert model.generation_config.eos_token_id == sample.tok.stop_ids(tokenizer, model.config)
    assert model.generation_config.max_new_tokens == args.max_new_tokens


def test_a_response_ends_with_its_first_stop_id(tiny, monkeypatch):
    """generate() fills up rows that ended before the longest one."""
    model, tokenizer = tiny
    row = tokenizer.encode("25", add_special_tokens=False) + [tokenizer.eos_token_id]
    row += tokenizer.encode("7", add_special_tokens=False)
    monkeypatch.setattr(model, "generation_config", model.generation_config)
    monkeypatch.setattr(model, "generate", lambda tokens, **more: torch.cat([tokens, torch.tensor([row])], 1))
    assert sample.sample(model, tokenizer, QUESTION, settings()) == [("25", True)]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([QUESTION, "--answer", "???"], "--answer ???"),
        (["--answer", ""], "--answer"),
        ([QUESTION, "--samples", "2", "--temperature", "0"], "--samples"),
        ([QUESTION, "--temperature", "-1"], "--temperature -1"),
        ([QUESTION, "--seed", str(2**32)], "--seed"),
        ([QUESTION, "--model", "/no/model"], "--model /no/model"),
    ],
)
def test_a_question_that_cannot_be_asked(argv, named, capsys):
    with pytest.raises(flags.BadInput) as stop:
        sample.main(argv)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


# ---- the project as a package ----------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if re.match(r"\w", line)]


@pytest.mark.parametrize(
    ("bounds", "file"),
    [
        (PROJECT["project"]["dependencies"], "requirements.txt"),
        (PROJECT["project"]["optional-dependencies"]["dev"], "requirements-dev.txt"),
        (PROJECT["project"]["optional-dependencies"]["docs"], "docs/requirements.txt"),
        (PROJECT["project"]["optional-dependencies"]["docs-check"], "docs/requirements-check.txt"),
    ],
)
def test_pyproject_and_requirements_name_the_same_packages(bounds, file):
    bounds = {bound.name: bound for bound in map(Requirement, bounds)}
    pinned = {pin.name: pin for pin in pins(file)}
    assert bounds.keys() == pinned.keys()
    for name, pin in pinned.items():
        [version] = pin.specifier  # ==
        assert version.operator == "==" and bounds[name].specifier.contains(version.version)
        assert str(bounds[name].marker) == str(pin.marker)


def test_the_lower_bounds_are_those_of_requirements():
    said = (ROOT / "requirements.txt").read_text()
    for name, least in re.findall(r"(\w+) >= ([\d.]+\d|\d)", said):
        assert f"{name}>={least}" in PROJECT["project"]["dependencies"]


def test_an_install_has_every_script_and_package():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert set(PROJECT["tool"]["setuptools"]["py-modules"]) == scripts
    from setuptools import find_packages

    where = PROJECT["tool"]["setuptools"]["packages"]["find"]
    found = find_packages(ROOT, include=where["include"])
    assert {"common", "common.plumbing", "tiny"} == set(found)
    assert where["namespaces"] is False


@pytest.mark.parametrize(
    "file, pattern",
    [
        ("CITATION.cff", r"^version: (\S+)$"),
        ("README.md", r"version = \{(.+?)\}"),
        ("CHANGELOG.md", r"\A.*?^## (\S+)"),  # the newest part
    ],
)
def test_the_version_is_the_same_everywhere(file, pattern):
    found = re.search(pattern, (ROOT / file).read_text(), re.M | re.S)
    assert found and found[1] == PROJECT["project"]["version"]


def test_the_workflow_runs_what_contributors_run():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "- run: .ci/run\n" in workflow
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f'python-version: "{least}"' in workflow
