"""Rejection sampling: distinct paths, what is kept, SFT as a special case, rounds, resuming."""

import re

import pytest
import torch
from conftest import ROOT, Killed, read_jsonl, same_metrics, same_weights, weights
from datasets import Dataset

import common.tokenization as tok
import rft_rejection as rft
import sft
from common.plumbing import models, runs
from common.plumbing.flags import BadInput
from common.plumbing.storage import read_state

FOUND = {"reward", "kept", "paths", "unsolved", "tokens_generated"}


# -- paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("Step 1: 7 + 4 = 11. So \\boxed{11}", "First 7+4 = 11, which is it: \\boxed{11}", True),
        ("7 + 4 = 11. 11 * 2 = 22.", "11 * 2 = 22. 7 + 4 = 11.", False),  # the order matters
        ("7 + 4 = 11. \\boxed{11}", "4 + 7 = 11. \\boxed{11}", False),
        ("We get 3.5 = 7 / 2.", "Then 3.5 = 7/2", True),
        ("so 3.5 = x", "so 2.5 = x", False),  # a decimal point does not end a sentence
        ("$\\frac{1}{2} = x$", "Hence \\frac{1}{2}=x", True),
        ("$\\frac{1}{2} = x$", "$\\sqrt{1}{2} = x$", False),  # LaTeX is not prose
        ("7  11 \\boxed{11}\n", "7 11 \\boxed{11}", True),  # without equations: the text but for spaces
        ("7 11 \\boxed{11}", "7 12 11 \\boxed{11}", False),
        ("\\boxed{11}", "The answer is 11.", False),
    ],
)
def test_path(a, b, same):
    assert (rft.path(a) == rft.path(b)) is same


# -- what is kept -----------------------------------------------------------------------------------------

QUESTIONS = Dataset.from_dict(
    {
        "question": ["a", "b", "c"],
        "gold": ["11", "5", "7"],
        "solution": ["7 + 4 = 11", "2 + 3 = 5", "9 - 2 = 7"],
    }
)
ROUNDS = [  # one response to each of the three questions, four times
    ("So 7 + 4 = 11. \\boxed{11}", "5 \\boxed{5}", "\\boxed{9}"),
    ("Here 7+4=11: \\boxed{11}", "5 \\boxed{6}", "\\boxed{8}"),
    ("5 + 6 = 11. \\boxed{11}", "5 \\boxed{5}", "x \\boxed{8}"),
    ("\\boxed{11}...", "\\boxed{5}", "y \\boxed{8}"),  # the first one has no EOS
]


def fixed(tokenizer, rounds, seen=None):
    """A stand-in for `sample` that returns given texts, round by round."""
    texts = [text for one in rounds for text in one]

    def sample(model, tokenizer, prompts, *_):
        if seen is not None:
            seen.append(tok.decode_responses(tokenizer, prompts))
        mine, texts[:] = texts[: len(prompts)], texts[len(prompts) :]
        ids = [tok.encode_response(tokenizer, text.removesuffix("...")) for text in mine]
        return [x[:-1] if t.endswith("...") else x for x, t in zip(ids, mine)], None

    return sample


def kept(found):
    return [(s["question"], s["solution"]) for s in found if s["kept"]]


def sample_and_filter(tiny, monkeypatch, *flags, rounds=ROUNDS, seen=None):
    monkeypatch.setattr(rft, "sample", fixed(tiny[1], rounds, seen))
    torch.manual_seed(0)
    return rft.sample_and_filter(*tiny, QUESTIONS, rft.parse_args(["--k", "4", *flags]))


def test_correct_ended_and_distinct_samples_are_kept(tiny, monkeypatch):
    metrics, found = sample_and_filter(tiny, monkeypatch)
    assert FOUND == set(metrics)
    texts = [(s["question"], s["solution"]) for s in found]
    assert sorted(texts) == sorted((q, t.removesuffix("...")) for one in ROUNDS for q, t in zip("abc", one))
    mine = kept(found)
    assert len(mine) == metrics["kept"] == 4 and metrics["reward"] == 7 / 12
    assert metrics["unsolved"] == pytest.approx(1 / 3) and metrics["paths"] == pytest.approx(4 / 3)
    assert {rft.path(text) for q, text in mine if q == "a"} == {("7+4=11",), ("5+6=11",)}
    assert sorted(text for q, text in mine if q == "b") == ["5 \\boxed{5}", "\\boxed{5}"]
    assert metrics["tokens_generated"] == sum(s["tokens"] for s in found) > 12


def test_keep_per_question_is_a_random_choice(tiny, monkeypatch):
    seen = set()
    args = rft.parse_args("--k 4 --keep-per-question 1".split())
    for seed in range(12):
        monkeypatch.setattr(rft, "sample", fixed(tiny[1], ROUNDS))
        torch.manual_seed(seed)
        _, found = rft.sample_and_filter(*tiny, QUESTIONS, args)
        assert [q for q, _ in kept(found)] == ["a", "b"]
        seen |= set(kept(found))
    assert len(seen) == 5  # every correct and ended text may be kept


def test_add_gold_replaces_samples_with_the_path_of_the_demonstration(tiny, monkeypatch):
    metrics, found = sample_and_filter(tiny, monkeypatch, "--add-gold")
    assert [x for x in kept(found) if x[0] == "c"] == [("c", "9 - 2 = 7")]
    assert [text for q, text in kept(found) if q == "a"] == ["7 + 4 = 11", "5 + 6 = 11. \\boxed{11}"]
    assert metrics["kept"] == 6 and metrics["paths"] == pytest.approx(4 / 3)


def test_rationalisation_shows_the_gold_in_sampling_but_not_in_training(tiny, monkeypatch):
    again = [("7 \\boxed{7}",), ("\\boxed{8}",), ("7 \\boxed{7}",), ("9 7 \\boxed{7}",)]
    seen = []
    metrics, found = sample_and_filter(tiny, monkeypatch, "--rationalize", rounds=ROUNDS + again, seen=seen)
    assert [len(x) for x in seen] == [12, 4]
    assert all("7" not in x for x in seen[0]) and all("c\nAnswer: 7\n" in x for x in seen[1])
    assert sorted(x for x in kept(found) if x[0] == "c") == [("c", "7 \\boxed{7}"), ("c", "9 7 \\boxed{7}")]
    assert metrics["reward"] == 7 / 12 and metrics["unsolved"] == pytest.approx(1 / 3)  # of the first attempt


def variant(name):
    """The flags of a row of the page's table of variants."""
    page = (ROOT / "docs/methods/rft_rejection.md").read_text()
    [command] = re.findall(rf"^\| {name}.* \| `python rft_rejection.py (.*)` \|$", page, re.M)
    return command.split()


def test_star_trains_on_one_rationale_of_a_question(tiny, monkeypatch):
    """One try; a second one, shown the gold, where the first failed. A solved question has no second one."""
    seen = []
    rounds = [ROUNDS[0], ("x \\boxed{7}",)]  # a and b are solved, c is not
    monkeypatch.setattr(rft, "sample", fixed(tiny[1], rounds, seen))
    _, found = rft.sample_and_filter(*tiny, QUESTIONS, rft.parse_args(variant("STaR")))
    assert [len(prompts) for prompts in seen] == [3, 1]
    assert [question for question, _ in kept(found)] == ["a", "b", "c"]
    assert kept(found)[2] == ("c", "x \\boxed{7}")


def test_rest_em_and_raft_differ_in_the_cap_and_in_where_a_round_starts():
    rest, raft = (rft.parse_args(variant(name)) for name in ("ReST-EM", "RAFT"))
    assert (rest.k, rest.keep_per_question, rest.restart) == (32, 10, "base")
    assert (raft.keep_per_question, raft.restart) == (1, "continue")
    assert min(rest.rounds, raft.rounds) > 1


def test_no_correct_sample_is_an_error(tiny, monkeypatch):
    with pytest.raises(BadInput, match="--k"):
        sample_and_filter(tiny, monkeypatch, rounds=[("x", "y", "z")] * 4)


# -- the script -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(small):
    def go(out, *more):
        base = ("--k", 4, "--questions", 16, "--steps", 3, "--rounds", 2, "--warmup-steps", 2)
        rft.main(rft.parse_args(small("rft_rejection", out, *base, *more)))
        return out

    return go


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("rft") / "run")


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "run"
    flags = ("--steps", 11, "--save-every", 0, "--warmup-steps", 2)  # more than an epoch of 40
    sft.main(sft.parse_args(small("sft", out, *flags)))
    return out


def training_metrics(run):
    """metrics.jsonl without the lines of sampled rounds and without clocks."""
    lines = [x for x in read_jsonl(run / "metrics.jsonl") if "kept" not in x]
    clocks = ("seconds_sample", "seconds_train", "peak_memory")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def test_demonstrations_without_samples_are_sft(train, plain, tmp_path):
    more = ("--k", 0, "--add-gold", "--questions", 0, "--steps", 11, "--rounds", 1, "--save-every", 0)
    run = train(tmp_path / "run", *more)
    same_weights(run / "final", plain / "final")
    assert training_metrics(run) == training_metrics(plain)


def test_samples_that_equal_the_demonstrations_are_sft(train, plain, tmp_path, monkeypatch):
    def demonstrations(model, tokenizer, rows, template, args):
        torch.rand(7)  # draws of sampling do not change later draws
        more = {"reward": 1.0, "kept": False, "tokens": 5, "ended": True}
        return [[{k: row[k] for k in ("question", "solution", "gold")} | more] for row in rows]

    monkeypatch.setattr(rft, "attempt", demonstrations)
    more = ("--k", 1, "--questions", 0, "--steps", 11, "--rounds", 1, "--temperature", 0.5)
    run = train(tmp_path / "run", *more)
    same_weights(run / "final", plain / "final")


def test_a_run(whole):
    lines, samples = read_jsonl(whole / "metrics.jsonl"), read_jsonl(whole / "samples.jsonl")
    samples = [s for s in samples if s.get("kind") != "evaluation"]
    rounds = [x for x in lines if "kept" in x]
    assert [x["step"] for x in rounds] == [0, 3]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]
    assert [x["step"] for x in lines if "accuracy" in x] == [0, 3, 6]  # before, and after each round
    for line in rounds:
        mine = [s for s in samples if s["step"] == line["step"]]
        assert len(mine) == 4 * 16 and line["kept"] == sum(s["kept"] for s in mine) > 0
        assert all(s["reward"] and s["ended"] for s in mine if s["kept"])
        assert line["tokens_generated"] == sum(s["tokens"] for s in mine)
    lr = [x["lr"] for x in lines if "loss" in x]
    assert lr[:3] == lr[3:] and lr[0] < lr[1] > lr[2]  # each round has its own schedule


def interrupt(train, out, at, monkeypatch, *more, key="loss"):
    """A run that is killed before it logs step `at`, or with key="kept" the round that begins there."""
    log = runs.log

    def dies(out, metrics, samples=()):
        if metrics["step"] == at and key in metrics:
            raise Killed
        log(out, metrics, samples)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(runs, "log", dies)
        train(out, *more)


@pytest.mark.parametrize("at, rounds", [(1, 1), (3, 1), (4, 0), (6, 0)])
def test_an_interrupted_run_resumes_with_the_same_bits(whole, train, tmp_path, at, rounds, monkeypatch):
    interrupt(train, tmp_path / "run", at, monkeypatch)
    calls, attempt = [], rft.attempt
    monkeypatch.setattr(rft, "attempt", lambda *x: calls.append(1) or attempt(*x))
    train(tmp_path / "run", "--resume")
    assert len(calls) == rounds  # only those that had not begun
    same_metrics(whole, tmp_path / "run")
    same_weights(whole / "final", tmp_path / "run" / "final")
    assert (whole / "samples.jsonl").read_text() == (tmp_path / "run" / "samples.jsonl").read_text()


def test_a_run_killed_in_its_second_round_of_sampling_samples_it_again(train, tmp_path, monkeypatch):
    """The checkpoint of a new round is saved only when its samples have been written."""
    flags = ("--save-every", 1, "--restart", "continue")
    whole = train(tmp_path / "whole", *flags)
    interrupt(train, tmp_path / "run", 3, monkeypatch, *flags, key="kept")
    train(tmp_path / "run", *flags, "--resume")
    same_metrics(whole, tmp_path / "run")
    same_weights(whole / "final", tmp_path / "run" / "final")


def test_each_round_trains_on_its_own_kept_samples(train, tmp_path, monkeypatch):
    trained, encode = [], tok.encode_response
    monkeypatch.setattr(tok, "encode_response", lambda t, text: trained.append(text) or encode(t, text))
    run = train(tmp_path / "run", "--batch-size", 16, "--steps", 3)
    samples = [s for s in read_jsonl(run / "samples.jsonl") if s.get("kind") != "evaluation"]
    for begin in (0, 3):
        mine = [s["solution"] for s in samples if s["step"] == begin and s["kept"]]
        seen, trained = trained[: 3 * 16], trained[3 * 16 :]
        assert set(seen) <= set(mine) and len(mine) < 3 * 16  # more than an epoch, so all of them
        assert set(mine) <= set(seen)


@pytest.mark.parametrize("restart", ["base", "continue"])
def test_the_weights_that_the_second_round_starts_from(train, tmp_path, restart, monkeypatch):
    run = tmp_path / "run"
    interrupt(train, run, 4, monkeypatch, "--restart", restart)
    after, before = weights(run / "checkpoint-000003"), weights(ROOT / "tiny/model")
    assert all(torch.equal(after[k], before[k]) for k in before) is (restart == "base")
    state = read_state(run / "checkpoint-000003")
    assert bool(state["optimizer"]["state"]) is (restart == "continue")


def test_another_model_can_be_the_base(train, tmp_path, monkeypatch):
    """In the paper RFT samples from one model and trains another of the same shapes."""
    other, tokenizer = models.load_model(ROOT / "tiny/model")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.01)
    runs.save_model(tmp_path / "other", other, tokenizer)
    interrupt(train, tmp_path / "run", 4, monkeypatch, "--base", tmp_path / "other")
    same_weights(tmp_path / "run" / "checkpoint-000003", tmp_path / "other")
