"""No script holds the logits of a whole batch: one step of each, with the shape of every tensor recorded."""

import importlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import logprob

GROUP = "--batch-size 8 --group-size 4 --kl-coef 0.1 --epochs-per-batch 2"  # all three log-probabilities
METHODS = {  # flags with which every log-probability is computed
    "sft": "",
    "rft_rejection": "--questions 16 --k 2 --add-gold",
    "idft_hinted": "",
    "dpo": "--k 4 --pair-questions 24",
    "grpo": GROUP,
    "prefix_rft": GROUP,
    "luffy": GROUP,
    "opsd": GROUP,
    "rlhf_ppo": "--batch-size 28 --preference-questions 6 --reward-epochs 1",
}
V, CHUNK = 479, 239  # the vocabulary of tiny/model, and a width that only the kernel's chunks have


class Rows(TorchDispatchMode):
    """For each width, the most rows that a tensor of this width had, in forward and backward passes.

    A width is the last dimension or the first, as in [B, T, V] and [V, tokens].
    """

    def __init__(self):
        super().__init__()
        self.most = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel():
                for width in {*x.shape[:1], *x.shape[-1:]}:
                    self.most[width] = max(self.most[width], x.numel() // width)
        return out


@pytest.fixture
def step(small, tmp_path, monkeypatch):
    """step(script): from loading to saving, with one training step of one micro-batch."""

    def go(script):
        name = script.__name__
        monkeypatch.setattr(logprob, "_chunk", lambda h, v: CHUNK)  # its own limit, 512, is above V
        flags = "--steps 1 --batch-size 16 --micro-batch-tokens 99999 --max-new-tokens 24 --sample-rows 64"
        flags += f" --eval-questions 2 --eval-samples 0 --save-every 0 {METHODS[name]}"
        with Rows() as rows:
            script.main(script.parse_args(small(name, tmp_path / name, *flags.split())))
        return rows.most

    return go


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_makes_no_tokens_by_vocabulary_tensor(name, step):
    """V wide are the head and its gradient, D = 128 rows, and a sampling step of 64 or 2 x 64 rows."""
    most = step(importlib.import_module(name))
    assert most[V] == 128, f"{most[V]} rows of {V} logits"
    assert most[CHUNK] > 2 * 128  # the tokens that went through the kernel at once


@pytest.mark.parametrize("name", ["sft"])
def test_a_script_that_makes_its_logits_is_seen(name, step, monkeypatch):
    """The same step with the plain formula instead of the kernel: its logits are recorded."""
    script = importlib.import_module(name)

    def plain(hidden, weight, targets, temperature=1.0):
        logp = (hidden @ weight.T / temperature).log_softmax(-1)
        entropy, keep = -(logp.exp() * logp).sum(-1), targets != -100
        return logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * keep, entropy * keep

    monkeypatch.setattr(script, "token_logprobs", plain)
    most = step(script)
    assert most[V] > 2 * 128
