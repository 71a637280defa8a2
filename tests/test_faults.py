"""What can go wrong around a run: kill -9, signals, NaN, full disks, bad input, hostile files.

Runs are forked children of this process: no imports, exact moments, and a real death.
KILLS=30 pytest tests/test_faults.py kills every script at thirty random moments instead of one.
"""

import ast
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_jsonl, same_metrics, same_weights, write_jsonl
from tqdm import tqdm
from transformers import MambaConfig, MambaForCausalLM

import common.tokenization as tok
from common.plumbing import data as plumbing_data
from common.plumbing import flags, folders, models, runs, storage

MORE = {  # beside BASE: a run of about a second with every stage in it
    "sft": "",
    "rft_rejection": "--k 3 --questions 6 --rounds 2 --steps 2",
    "idft_hinted": "--max-new-tokens 40",
    "dpo": "--k 4 --pair-questions 6",
    "grpo": "--group-size 3 --kl-coef 0.1",
    "prefix_rft": "--group-size 3 --kl-coef 0.1 --minibatches 2",
    "luffy": "--group-size 3 --kl-coef 0.1 --minibatches 2",
    "opsd": "--group-size 3 --kl-coef 0.1 --minibatches 2",
    "rlhf_ppo": "--group-size 3 --preference-questions 8",
}
BASE = "--steps 3 --save-every 1 --batch-size 2 --max-new-tokens 20 --eval-questions 2 --eval-samples 0"
SCRIPTS = {name: importlib.import_module(name) for name in MORE if (ROOT / f"{name}.py").exists()}
KILLS = int(os.environ.get("KILLS", 1))


@pytest.fixture(scope="module")
def arguments(data):
    """arguments(name, out, *more): the arguments of a run of about a second; later ones win."""
    model, tokenizer = models.load_model(ROOT / "tiny/model")  # imported and cached here, for all children
    tok.encode_prompts(tokenizer, ["?"])
    for split in ("train", "test"):
        plumbing_data.load_split(data, split, {})

    def make(name, out, *more):
        base = f"--output-dir {out} --data {data} --model {ROOT}/tiny/model --warmup-steps 0 {BASE}"
        return [*base.split(), *MORE[name].split(), *map(str, more)]

    return make


def fork(log, script, arguments, before=lambda: None):
    """Run main() of a script in a child process and return its pid; its output is in the file `log`."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        # tqdm's own lock is in shared memory: a killed child would hold it forever
        tqdm.set_lock(threading.RLock())
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        before()
        script.main(script.parse_args(arguments))
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status(pid):
    """Exit status of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def child(arguments, tmp_path_factory):
    """child(name, out, *more, before=...): exit status and output."""
    folder = tmp_path_factory.mktemp("said")

    def go(name, out, *more, before=lambda: None):
        end = status(fork(folder / name, SCRIPTS[name], arguments(name, out, *more), before))
        return end, (folder / name).read_text()

    return go


CALLS = 0  # of functions so far, counted by sys.setprofile: a clock that does not depend on the machine


def count(until=None, total=None):
    """Count calls as soon as the run folder exists, and kill this process at call number `until`.

    `total`: a file for their number at the end.
    """
    open_folder, exit_ = folders.open_folder, os._exit

    def watch(frame, event, arg):
        global CALLS
        CALLS += 1
        if CALLS == until:
            os.kill(os.getpid(), signal.SIGKILL)

    def opened(*args):
        open_folder(*args)
        sys.setprofile(watch)

    folders.open_folder = opened
    if total:
        os._exit = lambda code: (Path(total).write_text(str(CALLS)), exit_(code))


@pytest.fixture(scope="module")
def whole(child, tmp_path_factory):
    """whole(name): the folder of an uninterrupted run, and the calls that it made."""
    done, folder = {}, tmp_path_factory.mktemp("whole")

    def get(name):
        if name not in done:
            total = folder / f"{name}-calls"
            end, said = child(name, folder / name, before=lambda: count(total=total))
            assert end == 0, said
            done[name] = folder / name, int(total.read_text())
        return done[name]

    return get


def same_run(a, b):
    """Every number, text and weight of two finished runs."""
    same_metrics(a, b)
    assert read_jsonl(a / "samples.jsonl") == read_jsonl(b / "samples.jsonl")
    same_weights(a / "final", b / "final")
    assert not list(a.glob("*.half")) and not list(a.glob("*.old"))


# ---- kill -9 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_random_moments_a_run_resumes_to_the_same_bits(name, whole, child, tmp_path):
    """While it samples, while it trains, between two files of a checkpoint; once or twice."""
    finished, total = whole(name)
    generator, reached = random.Random(name), []
    for i in range(KILLS):
        out, left = tmp_path / f"run{i}", KILLS > 2 and generator.random() < 0.3  # some die twice
        moment = generator.randint(1, total)
        end, said = child(name, out, before=lambda m=moment: count(m))
        assert end == -signal.SIGKILL or (end == 0 and moment > 0.95 * total), said  # a bar counts time, too
        reached.append(len(folders.checkpoints(out)))
        if left:
            child(name, out, "--resume", before=lambda m=moment: count(generator.randint(m // 2, m)))
        end, said = child(name, out, "--resume")
        assert end == 0, f"killed at call {moment} of {total}: {said}"
        same_run(out, finished)
        shutil.rmtree(out)
    assert KILLS < 30 or {0, 1} <= set(reached)  # before the first checkpoint, and after


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_in_the_middle_of_a_checkpoint(name, whole, child, tmp_path):
    """Half a file is on the disk; for rft_rejection.py in the checkpoint after the second round's samples."""
    out, left = tmp_path / "run", [{"rft_rejection": 4}.get(name, 2)]

    def before():
        write = storage.write_tensors

        def half(path, tensors):
            left[0] -= 1
            if left[0] == 0:
                path.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, tensors)

        storage.write_tensors = half

    end, said = child(name, out, before=before)
    assert end == -signal.SIGKILL and list(out.glob("*.half")), said
    lines = (out / "metrics.jsonl").read_text()
    end, said = child(name, out, "--resume")
    assert end == 0 and "starts again" not in said, said
    # a step that was logged but not saved is repeated
    assert (out / "metrics.jsonl").read_text() != lines
    same_run(out, whole(name)[0])


# ---- signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, number", [*((n, signal.SIGTERM) for n in SCRIPTS), ("sft", signal.SIGINT)])
def test_a_signal_ends_a_run_after_its_step(name, number, whole, child, tmp_path):
    """In the middle of step 1: the step is finished and saved, and --resume continues."""
    out, logged = tmp_path / "run", []

    def hit():
        log = runs.log

        def once(folder, metrics, *samples):
            if metrics["step"] == 1 and "lr" in metrics and not logged:
                logged.append(os.kill(os.getpid(), number))
            log(folder, metrics, *samples)

        runs.log = once

    end, said = child(name, out, before=hit)  # SIGTERM: 143, SIGINT: 130
    assert end == 128 + number and "Traceback" not in said and "stopped after step 1" in said, said
    assert [path.name for path in folders.checkpoints(out)] == ["checkpoint-000001"]
    assert read_jsonl(out / "metrics.jsonl")[-1]["step"] == 1 and not (out / "final").exists()
    end, said = child(name, out, "--resume")
    assert end == 0, said
    same_run(out, whole(name)[0])


def test_a_signal_after_the_decision_to_save_ends_the_next_step():
    """Otherwise a run would end without a checkpoint, and under torchrun one rank without the others."""
    state, saved = {"step": 0, "stop": 0, "leave": 0, "faults": 0}, []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        for step in runs.steps(state, 5):
            if runs.due(state, 0):
                saved.append(step)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert saved == [3] and stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is before


def test_signals_to_a_process(spawn, tmp_path):
    """Ctrl-C and kill while it trains; neither prints a traceback."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = tmp_path / str(code)
        process = spawn("sft", out, "--steps", 5000, "--save-every", 1)
        deadline = time.time() + 240
        while not folders.checkpoints(out) and process.poll() is None and time.time() < deadline:
            time.sleep(0.001)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == code and "Traceback" not in stderr, stderr
        assert "stopped after step" in stderr
        step = read_jsonl(out / "metrics.jsonl")[-1]["step"]
        assert [path.name for path in folders.checkpoints(out)] == [f"checkpoint-{step:06}"]


# ---- what is not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_update_that_is_not_finite_is_skipped_and_the_third_ends_the_run(
    name, arguments, tmp_path, monkeypatch, capsys
):
    """NaN in the loss of steps 2, 4, 5 and 6: counted, no weight changes, and the run can be continued."""
    script, out, now, model, seen = SCRIPTS[name], tmp_path / "run", [0], [], []
    open_run, steps, logprobs = runs.open_run, runs.steps, script.logprobs

    def watched(state, last):
        seen.clear()  # rlhf_ppo.py also counts the steps of its reward model
        for now[0] in steps(state, last):
            yield now[0]
            seen.append(torch.cat([p.detach().view(-1).clone() for p in model[0].parameters()]))

    def faulty(*args):
        bad = torch.is_grad_enabled() and now[0] in (2, 4, 5, 6)
        return tuple(x * float("nan") if bad else x for x in logprobs(*args))

    def opened(args):
        run = open_run(args)
        model.append(run[2])
        return run

    monkeypatch.setattr(runs, "open_run", opened)
    monkeypatch.setattr(runs, "steps", watched)
    monkeypatch.setattr(script, "logprobs", faulty)
    more = ("--steps", 7, "--rounds", 1) if name == "rft_rejection" else ("--steps", 7, "--save-every", 0)
    # groups of 8: some group of each step has to have a gradient
    more += {
        "prefix_rft": ("--minibatches", 1, "--group-size", 8),
        "luffy": ("--minibatches", 1, "--group-size", 8),
        "opsd": ("--minibatches", 1),
        "rlhf_ppo": ("--epochs-per-batch", 1),
    }.get(name, ())
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args(arguments(name, out, *more)))
    [said] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and "error: step 6: the gradient is not finite in three" in said
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if "skipped" in line]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 3, 4]
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[4])
    assert not torch.equal(seen[1], seen[2])  # step 3 trains as usual
    [checkpoint] = folders.checkpoints(out)
    assert checkpoint.name == "checkpoint-000006"
    saved = models.load_model(checkpoint)[0].parameters()
    assert torch.equal(torch.cat([p.detach().view(-1) for p in saved]), seen[2])
    now[0] = 0
    monkeypatch.setattr(runs, "steps", steps)
    script.main(script.parse_args(arguments(name, out, *more, "--resume")))
    last = read_jsonl(out / "metrics.jsonl")[-1]
    assert last["step"] == 7 and last["skipped"] == 4 and last["loss"] is not None


# ---- full disks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("megabytes", [2, 5])  # the weights have 3.7, the state with Adam's moments has 7.3
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_full_disk_leaves_the_last_checkpoint_complete(name, megabytes, whole, child, tmp_path):
    """A run is resumed at step 1, and no file may exceed a limit: one sentence, and nothing incomplete."""
    out = tmp_path / "run"

    def stop():
        runs.due = lambda state, every: state.update(leave=15) or True

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 10**6, resource.RLIM_INFINITY))

    assert child(name, out, before=stop)[0] == 143
    before = {path: path.read_bytes() for path in (out / "checkpoint-000001").iterdir()}
    end, said = child(name, out, "--resume", before=full)
    assert end == 2 and "Traceback" not in said, said
    [line] = [line for line in said.splitlines() if "error: " in line]
    assert "checkpoint-00000" in line and f"last complete checkpoint: {out}/checkpoint-000001" in line, line
    assert {path: path.read_bytes() for path in (out / "checkpoint-000001").iterdir()} == before
    assert not list(out.glob("*.half")) and folders.checkpoints(out) == [out / "checkpoint-000001"]
    end, said = child(name, out, "--resume")
    assert end == 0, said
    same_run(out, whole(name)[0])


def test_a_log_that_cannot_be_written_is_one_sentence(child, tmp_path):
    """/dev/full has no space left."""
    out, mkdir = tmp_path / "run", Path.mkdir

    def full():
        def then_full(path, *args, **more):
            mkdir(path, *args, **more)
            if path == out:
                (out / "metrics.jsonl").symlink_to("/dev/full")

        Path.mkdir = then_full

    end, said = child("sft", out, before=full)
    assert end == 2 and "Traceback" not in said and "metrics.jsonl cannot be written ([Errno 28]" in said


def test_too_little_space_is_reported_before_anything_is_moved(arguments, tmp_path, monkeypatch, capsys):
    out, sft = tmp_path / "run", SCRIPTS["sft"]
    out.mkdir()
    (out / "metrics.jsonl").write_text("mine")
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10**7)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match="0.0 GiB free, two checkpoints take 0.0 GiB") as stop:
        sft.main(sft.parse_args(arguments("sft", out)))
    assert stop.value.code == 2 and [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (out / "metrics.jsonl").read_text() == "mine"
    model, _ = models.load_model(ROOT / "tiny/model")
    enough = 8 * sum(p.nbytes for p in model.parameters())  # two checkpoints take 6, with a critic 12
    usage = shutil._ntuple_diskusage(10**9, 10**9, enough)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    ppo = SCRIPTS["rlhf_ppo"]
    sft.main(sft.parse_args(arguments("sft", out)))
    with pytest.raises(SystemExit, match="two checkpoints take 0.0 GiB"):
        ppo.main(ppo.parse_args(arguments("rlhf_ppo", tmp_path / "ppo")))
    usage = shutil._ntuple_diskusage(10**9, 10**9, enough // 4)  # two models
    dpo = SCRIPTS["dpo"]
    more = ["--steps", "0", "--pairs", "nowhere"]  # they are not read
    dpo.main(dpo.parse_args([*arguments("dpo", tmp_path / "evaluated"), *more]))
    assert (tmp_path / "evaluated/final").exists()
    assert not [*(tmp_path / "evaluated").glob("checkpoint-*")]


# ---- bad input -------------------------------------------------------------------------------------------

GROUPS = ("grpo", "prefix_rft", "luffy")  # they compare completions of one question
DEMONSTRATIONS = ("sft", "idft_hinted", "prefix_rft", "luffy", "opsd")
NO_COLUMN = "the data has no such column, only question, answer"
NO_TEXT = "--question-key question is empty or not a string"
BAD = {  # flags: what the sentence says, and in which scripts
    "--model nowhere/at-all": "--model nowhere/at-all cannot be loaded",
    "--model {data}": "it must be a folder or hub name with config.json",
    "--data nowhere/at-all": "--data nowhere/at-all: no data file, folder or hub name",
    "--data {empty_folder}": "empty_folder: no data file, folder or hub name",
    "--eval-data nowhere/at-all": "--eval-data nowhere/at-all",
    "--data {words}": "the name of a data file must end in",
    "--data {empty}": "empty.jsonl: the file is empty",
    "--data {no_rows}": "no_rows.csv: train ",
    "--data {broken}": "broken.jsonl: train cannot be read",
    "--data {uneven}": "uneven.csv: train cannot be read (uneven.csv, row 1: 4 cells, but the header has 3",
    "--data {binary}": "binary.parquet",
    "--data {one} ": "one question cannot be both trained on and held out",
    "--question-key questoin": f"--question-key questoin: {NO_COLUMN}",
    "--solution-key solutoin": (f"--solution-key solutoin: {NO_COLUMN}", DEMONSTRATIONS),
    "--answer-key {nothing} --solution-key {nothing}": (
        "--answer-key x, --solution-key x: no such column",
        ("grpo", "dpo"),
    ),
    "--split trian": "no split trian, only",
    "--eval-split tset": "no split tset, only",
    "--data {blank} --eval-data {data}": f"blank.jsonl, train, row 1: {NO_TEXT}",
    "--data {null} --eval-data {data}": f"null.jsonl, train, row 1: {NO_TEXT}",
    "--data {number} --eval-data {data}": "number.jsonl, train: --question-key question holds numbers only",
    "--eval-data {number}": "number.jsonl, train: --question-key question holds numbers only",
    "--data {no_demo} --eval-data {data}": (
        "--solution-key solution: not one training row has a demonstration",
        DEMONSTRATIONS,
    ),
    "--data {number_demo} --eval-data {data}": ("--solution-key solution holds numbers only", DEMONSTRATIONS),
    "--data {golds}": ("not one gold answer parses", ("rft_rejection", "dpo", *GROUPS, "opsd")),
    "--eval-data {golds}": ("not one gold answer parses", [name for name in MORE if name != "rlhf_ppo"]),
    "--data {long} --eval-data {data}": "long.jsonl, train, row 1: ",
    "--eval-data {long}": "exceed the model's 2048 positions; lower --max-new-tokens",
    "--max-new-tokens 2040": ("train, row 0: ", ("sft", *GROUPS, "opsd", "rlhf_ppo")),
    "--data {long_demo} --eval-data {data} --max-demo-tokens 2048": ("row 1: ", ("sft", "idft_hinted")),
    "--prompt-template Solve": "--prompt-template: the model would not see the question",
    "--temperature 0": "--temperature 0: must be at least 0.001",
    "--max-grad-norm 0": "--max-grad-norm 0: must be above 0",
    "--lr inf": "--lr inf: must be a finite number",
    "--minibatches 7": (
        "--minibatches 7: a step has only 6 completions",
        (*GROUPS, "opsd", "rlhf_ppo"),
    ),
    "--overlong-tokens 21": ("--overlong-tokens 21: must be at most", GROUPS),
    "--advantage maxrl --overlong-tokens 5": (
        "--advantage maxrl: it divides by the mean reward, which --overlong-tokens can make 0",
        GROUPS,
    ),
    "--hybrids 4": ("--hybrids 4: must be at most 3: a group has 3 completions.", ("luffy",)),
    "--hybrids 3 --hpt-gate 0": (
        "--hybrids 3: must be at most 2: a group has 3 completions, and --hpt-gate judges one",
        ("luffy",),
    ),
    "--hpt-gate -0.5": ("--hpt-gate -0.5: must be from 0 to 1", ("luffy",)),
    "--uft-steps 4 --ratio sequence --minibatches 2": (
        "--ratio sequence: the ratio of a response would include its hint",
        ("luffy",),
    ),
    "--ratio response": ("--ratio response: must be one of token, sequence", GROUPS),
    "--tis-cap -1": ("--tis-cap -1: must be at least 0", GROUPS),
    "--max-demo-tokens 19": (
        "--max-demo-tokens 19: less than --max-new-tokens",
        ("rft_rejection", "dpo"),
    ),
    "--max-demo-tokens 39": ("--max-demo-tokens 39: less than --max-new-tokens", ("idft_hinted",)),
    "--kl-target 5 --kl-coef 0": ("--kl-target 5.0: it adapts --kl-coef multiplicatively", ("rlhf_ppo",)),
    "--base nowhere/at-all": ("--base nowhere/at-all cannot be loaded", ("rft_rejection",)),
    "--base {wide}": ("its weights have other shapes than those of --model", ("rft_rejection",)),
    "--pairs nowhere/at-all": ("--pairs nowhere/at-all: no data file", ("dpo",)),
    "--pairs {one}": (f"column chosen: {NO_COLUMN}", ("dpo",)),
    "--preferences nowhere/at-all": ("--preferences nowhere/at-all: no data file", ("rlhf_ppo",)),
    "--reward-model nowhere/at-all": ("--reward-model nowhere/at-all cannot be loaded", ("rlhf_ppo",)),
    "--pairs {long_pairs}": ("row 1: 6006 tokens of prompt and 3 of response exceed", ("dpo",)),
    "--preferences {long_pairs}": ("row 1: 6006 tokens of prompt and 3 of response exceed", ("rlhf_ppo",)),
    "--k 1": ("--k 1: a pair is a correct and an incorrect sample; must be at least 2", ("dpo",)),
    "--restart continue --base tiny/model": (
        "--base tiny/model: only --restart base begins a round with it",
        ("rft_rejection",),
    ),
    "--reward-model tiny/model --preferences x": (
        "--preferences x: a reward model is given, so none is fitted",
        ("rlhf_ppo",),
    ),
    "--reward-model tiny/model --stop-after reward": (
        "--stop-after reward: a reward model is given, so none is fitted",
        ("rlhf_ppo",),
    ),
    "--add-gold --data {no_gold} --eval-data {data}/test.jsonl": (
        "--solution-key solution: not one gold answer parses",
        ("rft_rejection",),
    ),
    "--data {no_gold} --eval-data {data}/test.jsonl": (
        "--solution-key solution: not one gold answer parses",
        ("idft_hinted",),
    ),
    "--resume": "--resume: there is no checkpoint in ",
    "--output-dir {file}/run": "cannot be written",
    "--output-dir {file}": "cannot be written",
    "--output-dir /proc/run": "--output-dir /proc/run: ",
}  # fmt: skip
BAD_MODELS = {
    "no_eos": "its tokenizer has no EOS; set eos_token",
    "truncated": "cannot be loaded",
    "lacks": "lacks weights (model.layers.",
    "nan": "model.norm.weight contains NaN or inf",
    "template": "its chat template does not accept a question",
    "no_tokenizer": "cannot be loaded",
    "recurrent": "sampling needs attention in all its layers",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, data):
    """The names in braces in BAD: files and folders with something wrong."""
    folder = tmp_path_factory.mktemp("bad")
    good = {"question": "a?", "answer": "1", "solution": "1"}
    pair = {"prompt": "a?", "chosen": "yes", "rejected": "no"}
    rows = {
        "one": [good],
        "blank": [good, good | {"question": " "}],
        "null": [good, good | {"question": None}],
        "number": [good | {"question": 7}] * 12,
        "no_demo": [good | {"solution": ""}, good | {"solution": None}],
        "number_demo": [good | {"solution": 7}] * 12,
        "golds": [good | {"question": f"{i}?", "answer": ""} for i in range(12)],
        "long": [good, good | {"question": "word " * 3000}] * 6,
        "long_demo": [good, good | {"solution": "word " * 3000}] * 6,
        "no_gold": [{"question": f"{i}?", "solution": "so be it"} for i in range(12)],
        "long_pairs": [pair, pair | {"prompt": "word " * 3000}] * 6,
    }
    for name, lines in rows.items():
        write_jsonl(folder / f"{name}.jsonl", lines)
    (folder / "empty.jsonl").write_text("")
    (folder / "no_rows.csv").write_text("question,answer,solution\n")
    (folder / "broken.jsonl").write_text('{"question": "a"\nnonsense\n')
    (folder / "binary.parquet").write_bytes(bytes(range(256)))
    (folder / "uneven.csv").write_text("question,answer,solution\na?,1,1\na?,1,1,1\n")
    (folder / "empty_folder").mkdir()
    config = json.loads((ROOT / "tiny/model/config.json").read_text())
    (folder / "wide").mkdir()
    (folder / "wide/config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    (folder / "file").write_text("")
    (folder / "words.txt").write_text("a?")
    return {path.stem: str(path) for path in folder.iterdir()} | {"data": data, "nothing": "x"}


def refused(script, argv, capsys):
    """The one line that a run prints on bad input."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(script.parse_args(argv))
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said.startswith("error: ") and said.endswith("."), said
    assert len(said.splitlines()) == 1, said
    return said


def tree(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def earlier(tmp_path):
    """A folder with a run that nothing may touch."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("mine")
    return out


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_input_gets_one_sentence(name, arguments, files, earlier, capsys):
    """Exit status 2, one line on stderr that names flag, file or row; an earlier run stays as it is."""
    before = tree(earlier.parent)
    for given, expected in BAD.items():
        words, which = expected if isinstance(expected, tuple) else (expected, SCRIPTS)
        if name in which:
            said = refused(SCRIPTS[name], arguments(name, earlier, *given.format(**files).split()), capsys)
            assert words.replace("{data}", files["data"]) in said, (given, said)
            assert tree(earlier.parent) == before, given


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "rlhf_ppo"])
def test_0_steps_need_no_demonstrations(name, arguments, tmp_path):
    """They only evaluate: questions and answers will do, and dpo.py makes no pairs."""
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    out, script = tmp_path / "run", SCRIPTS[name]
    script.main(script.parse_args(arguments(name, out, "--data", path, "--steps", 0)))
    first, *others = read_jsonl(out / "metrics.jsonl")
    assert 0 <= first["accuracy"] <= 1 and not any("tokens_trained" in line for line in others)
    assert all(line["kind"] == "evaluation" for line in read_jsonl(out / "samples.jsonl"))


@pytest.mark.parametrize("name", GROUPS)
def test_gspo_with_another_normaliser_is_reported(name, capsys):
    """It runs, but is not GSPO: long responses weigh more. Said once, and only then."""
    for norm, said in (("sequence", 0), ("token", 1), ("constant", 1)):
        flags.check(SCRIPTS[name].parse_args(["--ratio", "sequence", "--loss-norm", norm]))
        printed = capsys.readouterr().out
        assert printed.count("--ratio sequence: GSPO is a mean over responses; without --loss-norm") == said
    flags.check(SCRIPTS[name].parse_args([]))
    assert not capsys.readouterr().out


def test_bad_input_of_a_process(spawn, files, tmp_path):
    """The libraries underneath print nothing of their own."""
    process = spawn("sft", tmp_path / "run", "--data", files["broken"])
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 2 and stderr.startswith("error: --data ") and not stdout
    assert len(stderr.splitlines()) == 1, stderr


BOUNDS = {  # flag: the last values that are accepted, as text; None: none that matters
    "seed": ("0", None),
    "steps": ("0", "999999"),
    "lr": ("0", "1"),
    "batch_size": ("1", None),
    "micro_batch_tokens": ("1", None),
    "max_new_tokens": ("1", None),
    "sample_rows": ("1", None),
    "temperature": ("0.001", None),
    "eval_temperature": ("0.001", None),
    "eval_questions": ("1", None),
    "eval_samples": ("0", None),
    "max_demo_tokens": ("1", None),
    "rounds": ("1", None),
    "pair_questions": ("1", None),
    "preference_questions": ("1", None),
    "reward_epochs": ("1", None),
    "reward_lr": ("0", "1"),
    "group_size": ("2", None),
    "clip_low": ("0", "1"),
    "epochs_per_batch": ("1", None),
    "minibatches": ("1", None),
    "prefix_decay_steps": ("1", None),
    "prefix_entropy_keep": ("0", "1"),
    "demo_fraction": ("0", "1"),
    "hybrids": ("1", None),
    "hpt_gate": ("-1", "1"),
    "uft_steps": ("0", None),
    "lam": ("0", "1"),
    "no_eos_score": ("-1e9", None),
    ("opsd", "group_size"): ("1", None),  # no group is compared
    ("dpo", "k"): ("1", None),  # in rft_rejection.py 0 with --add-gold
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_number_out_of_range_is_named(name, arguments, earlier, capsys):
    """Every flag that is a number: nothing is below its bound or above it, NaN and infinity included."""
    script = SCRIPTS[name]
    numbers = {
        k: v
        for k, v in vars(script.parse_args([])).items()
        if isinstance(v, (int, float)) and type(v) is not bool
    }
    assert {"lr", "batch_size", "max_new_tokens", "seed", "eval_samples"} <= numbers.keys()
    for key, default in numbers.items():
        flag = "--" + key.replace("_", "-")
        least, most = BOUNDS.get((name, key)) or BOUNDS.get(key, ("0", None))
        step = 1 if isinstance(default, int) else 1e-4
        bad = ["nan", "inf"] if isinstance(default, float) else ["1.5", "1" + 400 * "0"]
        if key != "no_eos_score":
            bad.append(f"{(int if step == 1 else float)(least) - step}")
        if most:
            bad.append(f"{(int if step == 1 else float)(most) + step}")
        for value in [*bad, "-1e31", "many"]:
            said = refused(script, arguments(name, earlier, f"{flag}={value}"), capsys)
            assert said.startswith(f"error: {flag} {value}: must be "), said
        for value in filter(None, (least, most)):
            if (key, value) != ("max_grad_norm", "0"):  # must be above it
                given = getattr(script.parse_args([f"{flag}={value}"]), key)
                assert given == float(value), f"{flag} {value} is refused"


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_flag_or_word_is_named(name, arguments, tmp_path, capsys):
    for more in ("--learning-rate 1", "--step 1", "--batch-size many", "--dtype fp16", "--schedule"):
        with pytest.raises(SystemExit) as stop:
            SCRIPTS[name].parse_args(arguments(name, tmp_path, *more.split()))
        assert stop.value.code == 2 and more.split()[0] in capsys.readouterr().err


@pytest.fixture(scope="module")
def broken_models(tmp_path_factory):
    """The names in BAD_MODELS: copies of the embedded model with one thing broken."""
    root = tmp_path_factory.mktemp("models")
    made = {name: shutil.copytree(ROOT / "tiny/model", root / name) for name in BAD_MODELS}
    (made["no_tokenizer"] / "tokenizer.json").unlink()
    layers = MambaConfig(vocab_size=479, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(layers).save_pretrained(made["recurrent"])
    settings = json.loads((made["no_eos"] / "tokenizer_config.json").read_text())
    (made["no_eos"] / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    (made["template"] / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    file = made["truncated"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 10**6])
    for name, change in (("nan", "model.norm.weight"), ("lacks", None)):
        weights, _ = models.load_model(ROOT / "tiny/model")
        state = weights.state_dict()
        state.pop("lm_head.weight")
        if change:
            state[change][3] = float("nan")
        weights.save_pretrained(made[name], state_dict=state if change else dict(list(state.items())[:20]))
    return made


@pytest.mark.parametrize("name", ["sft", "grpo"])
@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_broken_model_folder_is_refused(name, kind, broken_models, arguments, earlier, capsys):
    said = refused(SCRIPTS[name], arguments(name, earlier, "--model", broken_models[kind]), capsys)
    assert said.startswith(f"error: --model {broken_models[kind]}") and BAD_MODELS[kind] in said
    assert (earlier / "metrics.jsonl").read_text() == "mine"


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Trap:
    """Pickled, it is a command that makes a file when it is read."""

    def __init__(self, mark):
        self.command = f"touch {mark}"

    def __reduce__(self):
        return os.system, (self.command,)


DAMAGED = "state.json or a state*.safetensors in {c} is damaged or missing"
BAD_RESUMES = {  # damage to a finished run: what the sentence says
    "state truncated": (lambda c: halve(c / "state.safetensors"), DAMAGED),
    "index truncated": (lambda c: halve(c / "state.json"), DAMAGED),
    "state gone": (lambda c: (c / "state.safetensors").unlink(), DAMAGED),
    "index gone": (lambda c: (c / "state.json").unlink(), DAMAGED),
    "state is a trap": (
        lambda c: (c / "state.safetensors").write_bytes(pickle.dumps(Trap(c.parent / "sprung"))),
        DAMAGED,
    ),
    "weights truncated": (lambda c: halve(c / "model.safetensors"), "--resume {c} cannot be loaded"),
    "weights gone": (lambda c: (c / "model.safetensors").unlink(), "--resume {c} cannot be loaded"),
    "config gone": (lambda c: (c / "config.json").unlink(), "--resume {c} cannot be loaded"),
    "log shorter": (lambda c: halve(c.parent / "metrics.jsonl"), "metrics.jsonl has lost lines"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_damaged_checkpoint_or_other_arguments_do_not_resume(name, whole, arguments, tmp_path, capsys):
    """The damaged folder stays as it is, so that it can be repaired."""
    for kind, (damage, words) in BAD_RESUMES.items():
        out = shutil.copytree(whole(name)[0], tmp_path / kind.replace(" ", "_"))
        [checkpoint] = folders.checkpoints(out)
        damage(checkpoint)
        before = tree(out)
        said = refused(SCRIPTS[name], arguments(name, out, "--resume"), capsys)
        assert words.format(c=checkpoint) in said, (kind, said)
        assert tree(out) == before and not (out / "sprung").exists()
        shutil.rmtree(out)
    out = whole(name)[0]
    for more in ("--lr 1e-5", "--seed 1", "--batch-size 1 --eval-samples 1", "--model elsewhere"):
        changed = ", ".join(word[2:].replace("-", "_") for word in more.split() if word.startswith("--"))
        said = refused(SCRIPTS[name], arguments(name, out, "--resume", *more.split()), capsys)
        assert set(changed.split(", ")) == set(said.split(": ")[2].split(" differ")[0].split(", ")), said


@pytest.mark.parametrize("name, more", [("rft_rejection", "--add-gold"), ("idft_hinted", ""), ("grpo", "")])
def test_a_gold_that_does_not_parse_is_not_another_argument(name, more, arguments, data, tmp_path):
    """Such golds are counted while rows are loaded, in some scripts after a run has started."""
    rows = read_jsonl(f"{data}/train.jsonl")[:12]
    write_jsonl(tmp_path / "x.jsonl", [rows[0] | {"answer": "\\frac{"}, *rows[1:]])
    script, out = SCRIPTS[name], tmp_path / "run"
    argv = arguments(name, out, "--data", tmp_path / "x.jsonl", "--eval-data", data, *more.split())
    script.main(script.parse_args(argv))
    shutil.rmtree(out / "final")
    script.main(script.parse_args([*argv, "--resume"]))
    assert (out / "final").is_dir()


def test_every_line_of_the_log_is_strict_json(tmp_path):
    """JSON has no NaN and no infinity: they become null."""
    runs.log(tmp_path, {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "phi": torch.tensor(1.5)})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert line["loss"] is line["grad_norm"] is None and line["phi"] == 1.5


def test_a_run_without_checkpoint_starts_again_only_with_the_same_arguments(arguments, tmp_path, capsys):
    out = tmp_path / "run"
    sft = SCRIPTS["sft"]
    sft.main(sft.parse_args(arguments("sft", out, "--steps", 1, "--save-every", 0)))
    said = refused(sft, arguments("sft", out, "--steps", 1, "--save-every", 0, "--resume"), capsys)
    assert "there is no checkpoint" in said  # a finished one
    shutil.rmtree(out / "final")
    said = refused(sft, arguments("sft", out, "--steps", 2, "--save-every", 0, "--resume"), capsys)
    assert "--resume: steps differ" in said
    sft.main(sft.parse_args(arguments("sft", out, "--steps", 1, "--save-every", 0, "--resume")))
    assert "starts again" in capsys.readouterr().out and (out / "final").exists()
    same_metrics(out, tmp_path / "run.1")


# ---- what others have written ----------------------------------------------------------------------------


def test_nothing_in_a_data_folder_is_executed(arguments, earlier, data, tmp_path, capsys):
    """A loading script is refused; Python files beside the data are ignored; text is not a template."""
    mark, sft = tmp_path / "sprung", SCRIPTS["sft"]
    code = f"import os\nos.system('touch {mark}')\n"
    with_script, beside = tmp_path / "harmless", tmp_path / "beside"
    for folder in (with_script, beside):
        shutil.copytree(data, folder)
    (with_script / "harmless.py").write_text(code)
    (beside / "conftest.py").write_text(code)
    (beside / "__init__.py").write_text(code)
    said = refused(sft, arguments("sft", earlier, "--data", with_script), capsys)
    assert "scripts are no longer supported" in said
    trap = (
        "{{ ''.__class__ }} {0.__class__} ${HOME} __import__('os').system('touch " + f"{mark}') \\boxed{{1}}"
    )
    rows = read_jsonl(beside / "train.jsonl")
    write_jsonl(beside / "train.jsonl", [row | {"question": trap, "solution": trap} for row in rows])
    sft.main(sft.parse_args(arguments("sft", tmp_path / "out", "--data", beside, "--steps", 1)))
    tokenizer = models.load_model(ROOT / "tiny/model")[1]
    assert trap in tokenizer.decode(tok.encode_prompts(tokenizer, [trap])[0])
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/train.pkl").write_bytes(pickle.dumps(Trap(mark)))
    refused(sft, arguments("sft", earlier, "--data", tmp_path / "pickled"), capsys)
    assert not mark.exists()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("kind", ["remote code", "remote code of a known type", "remote tokenizer", "pickle"])
def test_nothing_in_a_model_folder_is_executed(name, kind, arguments, earlier, tmp_path, capsys, monkeypatch):
    """auto_map is refused or ignored, pickled weights are not read, and nobody is asked y/N."""
    mark, folder = tmp_path / "sprung", shutil.copytree(ROOT / "tiny/model", tmp_path / "model")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    (folder / "evil.py").write_text(f"import os\nos.system('touch {mark}')\nclass Model: ...\n")
    config, settings = (
        json.loads((folder / f).read_text()) for f in ("config.json", "tokenizer_config.json")
    )
    if "code" in kind:
        config["auto_map"] = {"AutoConfig": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
        config |= {} if "known" in kind else {"model_type": "evil"}
    if "tokenizer" in kind:
        settings |= {"auto_map": {"AutoTokenizer": ["evil.Model", "evil.Model"]}, "tokenizer_class": "Model"}
    if kind == "pickle":
        torch.save({"model.norm.weight": Trap(mark)}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if "known" not in kind:
        said = refused(SCRIPTS[name], arguments(name, earlier, "--model", folder), capsys)
        assert f"--model {folder} cannot be loaded" in said and "weights in .safetensors" in said
    else:
        argv = arguments(name, tmp_path / "other", "--model", folder, "--steps", 0)
        SCRIPTS[name].main(SCRIPTS[name].parse_args(argv))
        assert (tmp_path / "other/final").is_dir()
    assert not mark.exists()


def test_the_trap_works(tmp_path):
    """The code that the tests above plant would be executed."""
    torch.save({"x": Trap(tmp_path / "sprung")}, tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_sources_load_nothing_that_could_run():
    """No trust_remote_code, no pickle, no eval in scripts and in common/."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")]:
        text = path.read_text()
        calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        names = {f.id for f in calls if isinstance(f, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__"}, path.name
        for word in ("trust_remote_code=True", "torch.load(", "import pickle"):
            assert word not in text, f"{path.name}: {word}"
        reads = text.count(".from_pretrained(") + text.count(".from_config(")
        assert reads == text.count("trust_remote_code=False"), path.name
