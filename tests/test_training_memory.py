"""No script holds the logits of what it trains on: a step of each, with every tensor's shape on record."""

import importlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import logprob

GROUP = "--batch-size 8 --group-size 4 --kl-coef 0.1 --epochs-per-batch 2"  # all three log-probs
METHODS = {  # flags that bring in every log-probability there is
    "sft": "",
    "rft_rejection": "--questions 16 --k 2 --add-gold",
    "idft_hinted": "",
    "dpo": "--k 4 --pair-questions 24",
    "grpo": GROUP,
    "prefix_rft": GROUP,
    "rlhf_ppo": "--batch-size 28 --preference-questions 6 --reward-epochs 1",
}
V, CHUNK = 479, 239  # the words of tiny/model, and a width that nothing but the kernel's chunks has


class Rows(TorchDispatchMode):
    """For each width, the most rows that a tensor of it had, whoever made it, forward or backward.

    A width is the last dimension or the first, of whatever arrangement: [B, T, V], [V, tokens].
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
    """step(script): everything from loading to saving with one training step of one micro-batch."""

    def go(script):
        name = script.__name__
        monkeypatch.setattr(logprob, "_chunk", lambda h, v: CHUNK)  # its own limit of 512 words is above V
        flags = "--steps 1 --batch-size 16 --micro-batch-tokens 99999 --max-new-tokens 24 --sample-rows 64"
        flags += f" --eval-questions 2 --eval-samples 0 --save-every 0 {METHODS[name]}"
        with Rows() as rows:
            script.main(script.parse_args(small(name, tmp_path / name, *flags.split())))
        return rows.most

    return go


@pytest.mark.parametrize("name", METHODS)
def test_a_training_step_makes_no_tokens_by_vocabulary_tensor(name, step):
    """What is V wide: the head and its gradient, D = 128 rows, and a sampled token of 64 or 2 x 64 rows."""
    most = step(importlib.import_module(name))
    assert most[V] == 128, f"{most[V]} rows of {V} words"
    assert most[CHUNK] > 2 * 128  # the tokens that went through the kernel at once


@pytest.mark.parametrize("name", ["sft"])
def test_a_script_that_makes_its_logits_is_seen(name, step, monkeypatch):
    """The same step with the plain form instead of the kernel: the record has them."""
    script = importlib.import_module(name)

    def plain(hidden, weight, targets, temperature=1.0):
        logp = (hidden @ weight.T / temperature).log_softmax(-1)
        entropy, keep = -(logp.exp() * logp).sum(-1), targets != -100
        return logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * keep, entropy * keep

    monkeypatch.setattr(script, "token_logprobs", plain)
    most = step(script)
    assert most[V] > 2 * 128
