"""The scripts as users run them: files, seeds, kill and resume, other data, every flag."""

import json
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import (
    QUICK,
    ROOT,
    SCRIPTS,
    finite,
    killed_after,
    read_jsonl,
    same_metrics,
    same_weights,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import common.tokenization as tok
import grpo
import sft
from common.plumbing import data as plumbing_data
from common.plumbing import models
from common.plumbing import runs as runs_of_plumbing
from common.plumbing.flags import BadInput

GROUPS = ["grpo", "prefix_rft", "luffy"]


# ---- what a run leaves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_its_files(name, runs):
    out, stdout = runs[name]
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "args.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoint-000004",
        "final",
    }
    lines = read_jsonl(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert "accuracy" in lines[0] and "accuracy" in lines[-1] and "pass@2" in lines[-1]
    assert "accuracy" not in lines[1]
    for line in lines:
        assert finite(line), line
    saved = json.loads((out / "args.json").read_text())
    assert saved["seed"] == 0 and saved["versions"]["torch"] == torch.__version__ and "commit" in saved
    assert "self-check: max |ratio - 1|" in stdout and "<|endoftext|>]" in stdout
    assert "one step: 4 " in stdout
    assert f"model         {out / 'final'}" in stdout  # the summary at the end


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_final_folder_is_an_ordinary_model(name, runs):
    """It loads without this project, differs from the initial model, and has the weights of the last step."""
    final = runs[name][0] / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert tokenizer.encode("Compute 1 + 1.") == AutoTokenizer.from_pretrained(ROOT / "tiny/model").encode(
        "Compute 1 + 1."
    )
    assert model.dtype == torch.float32
    same_weights(final, final.parent / "checkpoint-000004")
    with pytest.raises(AssertionError):
        same_weights(final, ROOT / "tiny/model")


@pytest.mark.parametrize("name", GROUPS)
def test_samples_are_texts_with_their_verdicts(name, runs):
    every = read_jsonl(runs[name][0] / "samples.jsonl")
    lines = [line for line in every if line.get("kind") != "evaluation"]
    assert {line["step"] for line in every if line not in lines} == {0, 4}
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]
    for line in lines:
        assert isinstance(line["text"], str) and line["gold"] and line["question"]
        assert line["reward"] in (0, 1) and isinstance(line["truncated"], bool)
        assert line["correct"] == line["reward"]
        assert "<|endoftext|>" not in line["text"]


@pytest.mark.parametrize("name", GROUPS)
def test_one_update_per_step_has_ratio_1_and_clips_nothing(name, runs):
    for line in read_jsonl(runs[name][0] / "metrics.jsonl")[1:]:
        assert line["ratio_max"] == line["clip_frac"] == line["kl"] == 0


def test_prefixes_are_beginnings_of_demonstrations(runs, data):
    """The first completion of a group starts with its demonstration; the second is on-policy."""
    rows = {row["question"]: row["solution"] for row in read_jsonl(f"{data}/train.jsonl")}
    lines = read_jsonl(runs["prefix_rft"][0] / "samples.jsonl")
    lines = [line for line in lines if line.get("kind") != "evaluation"]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    for hybrid, other in zip(lines[::2], lines[1::2]):
        assert hybrid["question"] == other["question"]
        assert other["prefix_len"] == 0 < hybrid["prefix_len"]
        ids = tok.encode_response(tokenizer, rows[hybrid["question"]])[: hybrid["prefix_len"]]
        assert hybrid["text"].startswith(tokenizer.decode(ids))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_logged_learning_rate_is_the_one_that_was_used(name, run, tmp_path, monkeypatch):
    """Warm-up starts at the first step, whose learning rate is not 0; the log has what AdamW used."""
    used, step = [], torch.optim.AdamW.step

    def spy(self, *args):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    out = run(name, tmp_path / "run", "--warmup-steps", 2, "--max-new-tokens", 4, *QUICK)
    assert [line["lr"] for line in read_jsonl(out / "metrics.jsonl")[1:]] == used
    assert used == pytest.approx([5e-4 * w * d for w, d in ((0.5, 1), (1, 0.75), (1, 0.5), (1, 0.25))])


@pytest.mark.parametrize(
    "schedule, decay",
    {
        "constant": [1, 1, 1, 1],
        "linear": [1, 3 / 4, 2 / 4, 1 / 4],
        "cosine": [1, (1 + 2**-0.5) / 2, 1 / 2, (1 - 2**-0.5) / 2],
    }.items(),
)
@pytest.mark.parametrize(
    "warmup_steps, begun", [(0, [1, 1, 1, 1]), (1, [1, 1, 1, 1]), (3, [1 / 3, 2 / 3, 1, 1])]
)
def test_learning_rates(schedule, decay, warmup_steps, begun):
    """From the first step to the last of four: warm-up times decay, never above --lr."""
    args = SimpleNamespace(lr=0.5, steps=4, schedule=schedule, warmup_steps=warmup_steps)
    rates = [runs_of_plumbing.learning_rate(step, args) for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.5 * x * y for x, y in zip(begun, decay)])


# ---- seeds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_same_seed_same_bits(name, runs, run, tmp_path):
    """A second run, in another process, has the same numbers and the same weights."""
    again = run(name, tmp_path / "again")
    same_metrics(again, runs[name][0])
    same_weights(again / "final", runs[name][0] / "final")
    assert read_jsonl(again / "samples.jsonl") == read_jsonl(runs[name][0] / "samples.jsonl")


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_seed_is_another_run(name, runs, run, tmp_path):
    other = run(name, tmp_path / "other", "--seed", 1, "--steps", 1, *QUICK)
    losses = [read_jsonl(out / "metrics.jsonl")[1]["entropy"] for out in (other, runs[name][0])]
    assert losses[0] != losses[1]


def test_every_epoch_has_a_permutation_of_its_own():
    """All rows once in each epoch, also where an epoch ends within a batch; the seed decides."""
    torch.manual_seed(0)
    batches = plumbing_data.shuffled_batches(10, steps=8, batch_size=4)
    assert [len(batch) for batch in batches[:8]] == [4] * 8
    order = torch.cat(batches)[:30].view(3, 10)
    assert order.sort().values.tolist() == [[*range(10)]] * 3
    assert len({*map(tuple, [[*range(10)], *order.tolist()])}) == 4
    torch.manual_seed(0)
    again = plumbing_data.shuffled_batches(10, steps=8, batch_size=4)
    assert torch.equal(torch.cat(again), torch.cat(batches))


# ---- kill and resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_interrupted_run_resumes_to_the_same_bits(name, runs, run, tmp_path):
    """Stopped after the metrics of step 3, one step after the checkpoint: that step is repeated, once."""
    out = tmp_path / "run"
    with killed_after(3):
        run(name, out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a killed run may have been in the middle of a line
    run(name, out, "--resume")
    same_metrics(out, runs[name][0])
    same_weights(out / "final", runs[name][0] / "final")
    assert read_jsonl(out / "samples.jsonl") == read_jsonl(runs[name][0] / "samples.jsonl")


def test_a_finished_run_that_was_moved_resumes_and_nothing_changes(runs, run, tmp_path):
    out = shutil.copytree(runs["sft"][0], tmp_path / "elsewhere")
    run("sft", out, "--resume")
    assert (out / "metrics.jsonl").read_text() == (runs["sft"][0] / "metrics.jsonl").read_text()
    same_weights(out / "final", runs["sft"][0] / "final")


def test_what_a_run_reads_is_not_moved_aside_by_it(run, tmp_path, capsys):
    """With its own final/ as the model, the folder would be renamed before all of it has been read."""
    out = run("sft", tmp_path / "run", "--steps", 1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run("grpo", out, "--model", out / "final", "--steps", 0)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"--model {out / 'final'} is in this folder" in said
    assert sorted(tmp_path.rglob("*")) == before
    run("grpo", tmp_path / "other", "--model", out / "final", "--steps", 0)


def test_an_earlier_run_is_moved_aside(run, tmp_path):
    """Two runs with one name: nothing is overwritten, and nothing of the first is in the second."""
    out = run("sft", tmp_path / "run", "--steps", 1, *QUICK)
    (out / "note").write_text("mine")
    run("sft", out, "--steps", 1, *QUICK)
    assert (tmp_path / "run.1/note").read_text() == "mine" and (tmp_path / "run.1/final").is_dir()
    assert not (out / "note").exists() and len(read_jsonl(out / "metrics.jsonl")) == 2


# ---- flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_zero_steps_only_evaluate(name, run, tmp_path):
    out = run(name, tmp_path / "run", "--steps", 0)
    [line] = read_jsonl(out / "metrics.jsonl")
    assert line["step"] == 0 and 0 <= line["accuracy"] <= 1 and line["levels"]
    same_weights(out / "final", ROOT / "tiny/model")


FLAGS = {
    "kl and several updates": "--kl-coef 0.1 --epochs-per-batch 2 --minibatches 2 --overlong-tokens 40",
    "dynamic sampling, overlong": "--dynamic-sampling 2 --overlong-tokens 20 --advantage grpo",
    "sequence": "--loss-norm sequence --advantage grpo --schedule constant",
    "token": "--loss-norm token --schedule cosine",
    "bf16": "--dtype bf16 --temperature 0.8 --steps 1 --max-new-tokens 8",
    "maxrl, gspo": "--advantage maxrl --ratio sequence --loss-norm sequence --minibatches 2 --clip-high 4e-4",
    "cispo, tis": "--clip cispo --clip-low 1 --loss-norm token --epochs-per-batch 2 --tis-cap 2",
    "groups of 3": "--group-size 3 --batch-size 2 --minibatches 4 --sample-rows 4 --micro-batch-tokens 50",
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_flags_of_grpo(flags, run, tmp_path):
    """They run, and nothing is NaN. That prefix_rft.py does the same is in test_equalities.py."""
    out = run("grpo", tmp_path / "run", "--steps", 2, *flags.split(), *QUICK)
    lines = read_jsonl(out / "metrics.jsonl")[1:]
    for line in lines:
        assert finite(line), line
        assert line["tokens_generated"] > 0 and line["tokens_trained"] >= 0 and line["kl"] >= 0
        if "--kl-coef" in flags:
            assert line["ratio_max"] > 0 and line["kl"] > 0
    assert all(p.isfinite().all() for p in AutoModelForCausalLM.from_pretrained(out / "final").parameters())


@pytest.mark.parametrize(
    "flags",
    [
        "--prefix-schedule uniform --prefix-loss random --ratio sequence --loss-norm sequence",
        "--prefix-loss none --demo-fraction 0.5 --dynamic-sampling 1 --kl-coef 0.1",
        "--prefix-loss bottom --prefix-entropy-keep 0.5 --epochs-per-batch 2 --max-new-tokens 48",
    ],
)
def test_flags_of_prefix_rft(flags, run, tmp_path):
    """Variants of the method; questions without a demonstration."""
    check_hybrids(run("prefix_rft", tmp_path / "run", "--steps", 2, *flags.split(), *QUICK))


@pytest.mark.parametrize(
    "flags",
    [
        "--clip-high 0.3 --epochs-per-batch 2 --minibatches 2",
        "--hybrids 4 --demo-weight sft --sft-coef 0.001 --uft-steps 4",
        "--demo-weight sft --hpt-gate 0 --advantage maxrl --minibatches 2",
        "--demo-weight srft --clip cispo --tis-cap 2 --kl-coef 1 --dynamic-sampling 1",
        "--demo-weight chord --ratio sequence --loss-norm sequence --hybrids 2 --demo-fraction 0.5",
    ],
)
def test_flags_of_luffy(flags, run, tmp_path):
    """Its relatives, with and without several updates."""
    out = run("luffy", tmp_path / "run", "--steps", 2, *flags.split(), *QUICK)
    check_hybrids(out)
    if "--hybrids 4" in flags:  # of groups of 4
        assert all(line["reward_hybrid"] == line["reward"] for line in read_jsonl(out / "metrics.jsonl")[1:])


def check_hybrids(out):
    """Some completions begin with a demonstration, and nothing is NaN."""
    lines = read_jsonl(out / "metrics.jsonl")[1:]
    for line in lines:
        assert finite(line), line
        assert line["tokens_generated"] >= 0 and 0 <= line["prefix_frac"] <= 1
        assert 0 <= line["sampler_gap"] < 1e-4
    assert any(line["prefix_frac"] > 0 for line in lines)


def test_a_run_on_rows_of_which_some_have_no_demonstration(run, data, tmp_path):
    """prefix_rft.py asks all of them and sft.py trains on the others, which here are one row."""
    rows = read_jsonl(f"{data}/train.jsonl")[:2]
    rows[0]["solution"] = ""
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    more = ["--data", path, "--eval-data", data, *QUICK]
    out = run("prefix_rft", tmp_path / "prefix_rft", *more, "--batch-size", 1, "--max-new-tokens", 60)
    lines = [line for line in read_jsonl(out / "samples.jsonl") if line.get("kind") != "evaluation"]
    begins = {}  # question -> prefix lengths of its hybrids
    for line in lines[::2]:  # two of each step, of which the first continues the demonstration
        begins.setdefault(line["question"], []).append(line["prefix_len"])
    assert begins.keys() == {row["question"] for row in rows}
    assert not any(begins[rows[0]["question"]]) and all(begins[rows[1]["question"]])

    out = run("sft", tmp_path / "sft", *more)
    alone = write_jsonl(tmp_path / "row.jsonl", rows[1:])
    other = run("sft", tmp_path / "other", *more, "--data", alone)
    keys = ("loss", "response_len", "grad_norm")
    lines = [read_jsonl(folder / "metrics.jsonl")[1:] for folder in (out, other)]
    assert [[line[k] for k in keys] for line in lines[0]] == [[line[k] for k in keys] for line in lines[1]]


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_evaluation_during_training_does_not_change_it(name, run, tmp_path):
    out = run(name, tmp_path / "run", "--eval-every", 2, *QUICK)
    without = run(name, tmp_path / "without", *QUICK)
    lines, others = (read_jsonl(folder / "metrics.jsonl") for folder in (out, without))
    assert [line["step"] for line in lines if "accuracy" in line] == [0, 2, 4]
    for line, other in zip(lines, others):
        assert all(line[k] == v for k, v in other.items() if not k.startswith(("seconds", "peak")))
    same_weights(out / "final", without / "final")


# ---- other data, other models ----------------------------------------------------------------------------

SUMS = [(i, i + 3) for i in range(2, 22)]
GSM8K = [{"question": f"{a} plus {b}?", "answer": f"{a} and {b} are {a + b}.\n#### {a + b}"} for a, b in SUMS]
MATH = [{"problem": f"${a}+{b}$?", "solution": f"It is $\\boxed{{{a + b}}}$.", "level": "1"} for a, b in SUMS]
FORMATS = {
    "gsm8k": (GSM8K, "--question-key question --solution-key answer"),
    "math": (MATH, "--question-key problem --solution-key solution --answer-key answer"),
}


@pytest.mark.parametrize("name, kind", [("sft", "math"), ("grpo", "gsm8k"), ("prefix_rft", "math")])
def test_a_jsonl_file_of_your_own(name, kind, run, tmp_path, capsys):
    """GSM8K's ####; MATH's boxed solutions without an answer column; a tenth is held out."""
    rows, keys = FORMATS[kind]
    path = write_jsonl(tmp_path / "own [1].jsonl", rows)  # a name, not a pattern
    out = run(
        name, tmp_path / "run", "--data", path, *keys.split(), "--steps", 2, *QUICK, "--eval-questions", 9
    )
    printed = capsys.readouterr().out
    assert (
        "a tenth of the questions" in printed and "2 questions, 2 with a gold answer that parses" in printed
    )
    assert name == "sft" or "18 questions, 18 with a gold answer that parses" in printed
    lines = read_jsonl(out / "samples.jsonl")
    held_out = {line["question"] for line in lines if line.get("kind") == "evaluation"}
    assert len(held_out) == 2
    for line in lines:
        trained = line.get("kind") != "evaluation"
        assert (line["question"] not in held_out) == trained and line["gold"].isdigit()


def test_a_split_that_is_trained_on_is_not_held_out(data, capsys):
    """If `test` is the only split and is trained on, a tenth of it is held out."""
    args = sft.parse_args(["--data", str(data), "--split", "test", "--max-new-tokens", "20"])
    train, test = plumbing_data.load_splits(args, demonstrations=True)
    assert "a tenth of the questions of test" in capsys.readouterr().out
    assert len(train) and len(test) and not {*train["question"]} & {*test["question"]}


def test_columns_of_data_that_have_our_names(run, tmp_path):
    """Scripts add `gold` and `demonstrated`; columns of these names in the data are not read."""
    rows = [row | {"gold": "none", "demonstrated": "no"} for row in MATH]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    keys = ["--question-key", "problem", "--data", path, "--steps", 1, *QUICK]
    out = run("prefix_rft", tmp_path / "run", *keys)
    assert all(line["gold"].isdecimal() for line in read_jsonl(out / "samples.jsonl"))
    no_answers = datasets.Dataset.from_list([{"question": "a?", "gold": "none"}])
    args = grpo.parse_args([])
    assert plumbing_data.with_gold(no_answers, args, no_gold=True)["gold"] == [""]


def test_golds_that_do_not_parse_are_dropped_and_counted(run, tmp_path, capsys):
    """Without an answer that parses a question cannot be verified, so it is not trained on."""
    bad = [{"question": "a?", "answer": None}, {"question": "b?", "answer": "\\boxed{"}]
    path = write_jsonl(tmp_path / "own.jsonl", [*GSM8K[:5], *bad, *GSM8K[5:8]])
    run("grpo", tmp_path / "run", "--data", path, "--steps", 1, *QUICK)
    assert "9 questions, 7 with a gold answer that parses" in capsys.readouterr().out


@pytest.mark.parametrize(
    "column, text",
    [("answer", "7"), ("answer", "Answer: 7"), ("answer", "So the answer is 7."), ("solution", "It is 7")],
)
def test_a_gold_may_end_a_text_in_the_ways_an_answer_may(column, text):
    """An answer column may have a bare answer; in a solution the gold is always at the end."""
    rows = datasets.Dataset.from_list([{"question": "a?", column: text}])
    args = grpo.parse_args([])
    args.unparseable_gold = 0
    assert plumbing_data.with_gold(rows, args)["gold"] == ["7"]
    named = datasets.Dataset.from_list([{"question": "a?", "answer": "Monday"}])  # words are an answer, too
    assert plumbing_data.with_gold(named, args)["gold"] == ["Monday"]


def test_a_model_whose_pad_is_eos(run, pad_is_eos, tmp_path):
    """As in GPT-2: no chat template, absolute positions, one token for pad and EOS."""
    for name in SCRIPTS:
        out = run(name, tmp_path / name, "--model", pad_is_eos, "--steps", 1, "--max-new-tokens", 8, *QUICK)
        assert read_jsonl(out / "metrics.jsonl")[1]["response_len"] > 1


def test_a_checkpoint_is_a_model_for_the_next_script(runs, run, tmp_path):
    """SFT, then GRPO, then Prefix-RFT are three commands."""
    first = run("grpo", tmp_path / "grpo", "--model", runs["sft"][0] / "final", "--steps", 1, *QUICK)
    run("prefix_rft", tmp_path / "prefix_rft", "--model", first / "final", "--steps", 1, *QUICK)


# ---- what a killed or broken write leaves ----------------------------------------------------------------


def test_a_folder_is_saved_again_beside_what_a_killed_save_has_left(tiny, tmp_path):
    """Killed between two renames and the removal: then the folder and its .old are both there."""
    for name in ("final", "final.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    runs_of_plumbing.save_model(tmp_path / "final", *tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final/model.safetensors").exists() and not (tmp_path / "final/file").exists()


def test_rows_are_read_without_being_written(tmp_path):
    """Only half a row at the end is removed, in place: a person's rankings are never written again."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"row": 1}\n{"row": 2}\n')
    path.chmod(0o444)
    before = path.stat().st_mtime_ns
    assert [line["row"] for line in runs_of_plumbing.read_jsonl(path)] == [1, 2]
    assert path.stat().st_mtime_ns == before
    path.chmod(0o644)
    path.write_text('{"row": 1}\n{"row": "\u00e9')
    assert [line["row"] for line in runs_of_plumbing.read_jsonl(path)] == [1]
    assert path.read_text() == '{"row": 1}\n'
    assert runs_of_plumbing.read_jsonl(tmp_path / "none.jsonl") == []


def test_rows_that_cannot_be_written_are_one_sentence(tmp_path):
    with pytest.raises(BadInput, match="rows.jsonl cannot be written"):
        runs_of_plumbing.append(tmp_path / "none/rows.jsonl", [{}])


def test_a_generation_configuration_with_values_that_it_ignores_is_saved(tiny, tmp_path):
    """transformers saves it as it is, but not with another EOS; a run would end at its first checkpoint."""
    folder = shutil.copytree(ROOT / "tiny/model", tmp_path / "model")
    settings = {"eos_token_id": 5, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = models.load_model(folder)
    runs_of_plumbing.save_model(tmp_path / "final", model, tokenizer)
    saved = json.loads((tmp_path / "final/generation_config.json").read_text())
    assert 5 in saved["eos_token_id"] and "temperature" not in saved
