"""What a line of metrics.jsonl says: known ratios, rewards and values go in, and their means come out."""

import importlib

import numpy as np
import pytest
import torch
from conftest import QUICK, finite, read_jsonl

RATIOS = [0.75, 1.25, 0.85, 1.35, 1.0, 1.25, 0.75]  # with --clip-low 0.2 --clip-high 0.3: three are clipped
CLIPPED = [1, 0, 0, 1, 0, 0, 1]
VERDICTS = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]  # three groups of four


@pytest.fixture
def logged(small, tmp_path):
    """logged(name, *more): the last line of a run of one step."""

    def go(name, *more):
        script = importlib.import_module(name)
        flags = [
            "--steps",
            1,
            "--batch-size",
            3,
            "--max-new-tokens",
            20,
            *QUICK,
            "--eval-first",
            "off",
            *more,
        ]
        script.main(script.parse_args(small(name, tmp_path / "run", *flags)))
        line = read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
        assert line["step"] == 1 and finite(line)
        return line

    return go


@pytest.mark.parametrize("name", ["grpo", "prefix_rft", "luffy", "opsd", "rlhf_ppo"])
def test_ratios(name, logged, monkeypatch):
    """Tokens of both epochs count; the loss is a sum over micro-batches and a mean over updates."""
    script, counts = importlib.import_module(name), []

    def policy_loss(logp, old_logp, ref_logp, advantage, response_mask, inv_z, args):
        which = torch.arange(logp.numel()).view(logp.shape) % len(RATIOS)
        counts.append(which[response_mask.bool()].bincount(minlength=len(RATIOS)))
        return 0.25 + 0 * logp.sum(), torch.tensor(RATIOS)[which], 0.5 * which

    monkeypatch.setattr(script, "policy_loss", policy_loss)
    if name in ("grpo", "prefix_rft", "luffy"):
        # each group has both, so all rows have a gradient
        monkeypatch.setattr(script, "math_reward", lambda texts, golds: [i % 2.0 for i in range(len(texts))])
    if name == "rlhf_ppo":
        monkeypatch.setattr(script, "value_loss", lambda value, *rest: 0 * value.sum())
    more = ["--group-size", 2, "--clip-low", 0.2, "--clip-high", 0.3, "--micro-batch-tokens", 200]
    more += ["--epochs-per-batch", 2]
    more += ["--preference-questions", 8, "--reward-epochs", 1] if name == "rlhf_ppo" else []
    line = logged(name, *more)
    total = torch.stack(counts).sum(0).numpy()
    assert len(counts) > 2 and total.min() > 0
    assert line["loss"] == pytest.approx(0.25 * len(counts) / 2)
    assert line["clip_frac"] == pytest.approx(np.average(CLIPPED, weights=total))
    assert line["kl"] == pytest.approx(np.average(0.5 * np.arange(len(RATIOS)), weights=total))
    assert line["ratio_max"] == pytest.approx(0.35)
    assert line["tokens_trained"] == total.sum()


@pytest.mark.parametrize("name", ["grpo", "prefix_rft", "luffy"])
def test_rewards_of_groups(name, logged, monkeypatch):
    """One group is all correct, one all incorrect; the first completions of a group are its hybrids."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "math_reward", lambda texts, golds: (VERDICTS * 9)[: len(texts)])
    line = logged(name, *(["--hybrids", 2] if name == "luffy" else []))
    assert line["reward"] == pytest.approx(5 / 12)
    assert line["zero_variance_frac"] == pytest.approx(2 / 3)
    if name != "grpo":
        assert line["reward_hybrid"] == pytest.approx({"prefix_rft": 2 / 3, "luffy": 3 / 6}[name])


def test_rewards_of_pairs(logged, monkeypatch):
    """A pair is ranked correctly where the chosen response has the higher reward, whatever its sign."""
    dpo = importlib.import_module("dpo")

    def dpo_loss(logp, initial_logp, response_mask, z, args):
        return 0 * logp.sum(), torch.tensor([1.0, 2.0, -4.0, -5.0, 2.0, 4.5])

    monkeypatch.setattr(dpo, "dpo_loss", dpo_loss)
    line = logged("dpo", "--k", 8, "--max-new-tokens", 40, "--micro-batch-tokens", 10**6)
    assert line["reward_chosen"] == pytest.approx(-1 / 3)
    assert line["reward_rejected"] == pytest.approx(1.5 / 3)
    assert line["reward_margin"] == pytest.approx(-2.5 / 3)
    assert line["reward_accuracy"] == pytest.approx(1 / 3)


def test_values(logged, monkeypatch):
    """The error of the critic as it was when the step began, over the tokens of responses."""
    ppo, seen = importlib.import_module("rlhf_ppo"), []
    gae = ppo.gae

    def known(rewards, value, response_mask, lam):
        advantage, _ = gae(rewards, value, response_mask, lam)
        returns = torch.arange(value.numel()).view(value.shape) % 7 - 3.0  # outside responses, too
        seen.append((value, returns, response_mask.bool()))
        return advantage, returns

    monkeypatch.setattr(ppo, "gae", known)
    line = logged("rlhf_ppo", "--group-size", 2, "--preference-questions", 8, "--reward-epochs", 1)
    [(value, returns, on)] = seen
    value, returns = (x[on].double().numpy() for x in (value, returns))
    error = returns - value
    assert value.std() > 0.01 and not on.all()
    assert line["value_loss"] == pytest.approx(0.5 * np.mean(error**2), rel=1e-5)
    assert line["explained_variance"] == pytest.approx(1 - np.var(error) / np.var(returns), rel=1e-4)
