"""Evaluation: accuracy, unbiased pass@k, counts of verdicts, and the check before training."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from datasets import Dataset

import common.tokenization as tok
from common.plumbing.evaluation import check_ratio, pass_at_k, report, verdict_counts
from common.plumbing.flags import BadInput
from common.verifier import math_reward

SCRIPTS = [path.stem for path in ROOT.glob("*.py")]


@pytest.mark.parametrize("k, solved", [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)])
def test_pass_at_k_of_one_correct_sample_in_four(k, solved):
    """1 - C(n - c, k) / C(n, k): the share of all subsets of k samples that have a correct one."""
    assert pass_at_k([1], 4, k) == pytest.approx(solved)
    assert pass_at_k([1, 0, 4], 4, k) == pytest.approx((solved + 0 + 1) / 3)


def test_verdict_counts():
    """Two questions: the greedy responses first, which are no samples, then four rounds of samples."""
    verdicts = [1.0, 0.0] + [1.0, 0.0] + [0.0] * 4 + [0.0, 1.0]
    texts = ["\\boxed{1}"] * 8 + ["\\boxed{", "\\boxed{1}"]  # the last but one has no answer
    scores = verdict_counts(texts, verdicts, ["easy", "hard"])
    assert scores["accuracy"] == 0.5 and scores["levels"]["easy"]["accuracy"] == 1
    for part in (scores, scores["levels"]["easy"], scores["levels"]["hard"]):
        assert (part["pass@1"], part["pass@2"], part["pass@4"]) == pytest.approx((0.25, 0.5, 1.0))
    assert (scores["correct"], scores["incorrect"], scores["no_answer"]) == (3, 6, 1)


def test_verdict_counts_without_samples_and_levels():
    scores = verdict_counts(["\\boxed{1}"] * 3, [1.0, 0.0, 0.0], [None] * 3)
    want = {"accuracy": 1 / 3, "correct": 1, "incorrect": 2, "no_answer": 0, "levels": {}}
    assert scores == want


SAID = {  # question: gold, level, greedy response, sampled ones
    "Compute 1 + 1.": ("2", "1", "2", ["3", "4"]),
    "Compute 2 + 2.": ("4", "2", "2", ["4", "4"]),
    "Compute 3 + 3.": ("6", "2", "5", ["4", "6"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_response_is_judged_by_the_gold_of_its_own_question(name, tiny, monkeypatch):
    """Greedy responses count for the accuracy alone, samples for pass@k alone."""
    script, left = importlib.import_module(name), {}
    for question, (_, _, greedy, samples) in SAID.items():
        [prompt] = tok.encode_prompts(tiny[1], [question])
        left[tuple(prompt), 0.0] = [greedy]
        left[tuple(prompt), 0.7] = [*samples]

    def sample(model, tokenizer, prompts, temperature, args):
        texts = [left[tuple(prompt), temperature].pop(0) for prompt in prompts]
        return [tok.encode_response(tokenizer, f"\\boxed{{{text}}}") for text in texts], None

    monkeypatch.setattr(script, "sample", sample)
    golds, levels, *_ = zip(*SAID.values())
    rows = Dataset.from_dict({"question": [*SAID], "gold": golds, "level": levels})
    args = script.parse_args(["--eval-samples", "2", "--eval-temperature", "0.7"])
    found = script.evaluate(*tiny, rows, args)
    assert not any(left.values())
    overall, easy, hard = found, found["levels"]["1"], found["levels"]["2"]
    assert [x["accuracy"] for x in (overall, easy, hard)] == pytest.approx([1 / 3, 1, 0])
    assert [x["pass@1"] for x in (overall, easy, hard)] == pytest.approx([1 / 2, 0, 3 / 4])
    assert [x["pass@2"] for x in (overall, easy, hard)] == pytest.approx([2 / 3, 0, 1])
    assert (found["correct"], found["incorrect"], found["no_answer"]) == (4, 5, 0)
    expected = []
    for question, (gold, _, greedy, samples) in SAID.items():
        for text, temperature in [(greedy, 0.0), *((text, 0.7) for text in samples)]:
            expected.append((question, gold, f"\\boxed{{{text}}}", text == gold, temperature))
    keys = ("question", "gold", "text", "correct", "temperature")
    assert sorted(tuple(c[key] for key in keys) for c in found["completions"]) == sorted(expected)


def test_a_response_that_ends_in_any_stop_id_is_not_truncated(tiny, monkeypatch):
    """Also at the last token of the budget, and with an EOS that only the model's config knows."""
    model, tokenizer = tiny
    other = next(i for i in range(10, 100) if i != tokenizer.eos_token_id)
    monkeypatch.setattr(model.config, "eos_token_id", [tokenizer.eos_token_id, other])
    rows = Dataset.from_dict({"question": ["a", "b", "c"], "gold": ["1", "2", "3"]})
    responses = [[5, tokenizer.eos_token_id], [5, other], [5, 6]]
    args = SimpleNamespace(max_new_tokens=2, eval_temperature=1.0)
    found = report(model, tokenizer, rows, responses, math_reward, args)
    assert [c["truncated"] for c in found["completions"]] == [False, False, True]


@pytest.mark.parametrize("dtype, gap, refused", [("fp32", 1e-3, True), ("bf16", 1e-3, False)])
def test_a_ratio_that_is_not_1_ends_the_run(dtype, gap, refused):
    """The mean over sampled tokens counts; bf16 may differ more than fp32."""
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    ratio = 1 + gap * mask
    args = SimpleNamespace(dtype=dtype, model="it")
    check_ratio(1 + 0 * ratio, mask, args)
    if refused:
        with pytest.raises(BadInput, match="in sampling and in scoring disagree"):
            check_ratio(ratio, mask, args)
    else:
        check_ratio(ratio, mask, args)
