"""Evaluation: accuracy, unbiased pass@k, counts of verdicts, and the check before training."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from common.plumbing.evaluation import check_ratio, pass_at_k, report, verdict_counts
from common.plumbing.flags import BadInput
from common.verifier import math_reward


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
