"""Equalities: settings under which two methods, or two computations of one, must agree."""

import pytest
import torch
from conftest import SCRIPTS, read_jsonl, same_metrics, same_weights

import common.tokenization as tok
import grpo
import sft
from common.plumbing import models


@pytest.fixture
def float64(monkeypatch):
    """Everything in double precision: rounding errors are near 1e-12, and Adam cannot amplify them."""
    load = models.load_model

    def double(*args):
        model, tokenizer = load(*args)
        return model.double(), tokenizer

    monkeypatch.setattr(models, "load_model", double)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


QUICK = ["--eval-questions", 1, "--eval-samples", 0, "--save-every", 0]
DENSE = ["--overlong-tokens", 40]  # rewards differ by length too: few groups have zero variance


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- one method is another -------------------------------------------------------------------------------

GRPO_FLAGS = {
    "default": "--steps 2".split(),
    "several updates, KL, resampling": (
        "--epochs-per-batch 2 --minibatches 2 --kl-coef 0.1 --dynamic-sampling 2 --overlong-tokens 10 "
        "--advantage grpo --loss-norm token --steps 2 --eval-samples 0"
    ).split(),
}


@pytest.mark.parametrize("flags", GRPO_FLAGS.values(), ids=GRPO_FLAGS)
def test_prefix_rft_without_prefixes_is_grpo_bit_for_bit(run, tmp_path, flags):
    a = run("grpo", tmp_path / "grpo", *flags)
    b = run("prefix_rft", tmp_path / "prefix_rft", "--prefix-schedule", "none", *flags)
    same_weights(a / "final", b / "final")
    only_prefix_rft = {"reward_hybrid", "prefix_frac"}
    same_metrics(a, b, but=only_prefix_rft)
    assert all(x["prefix_frac"] == 0 for x in read_jsonl(b / "metrics.jsonl")[1:])
    assert any(x["grad_norm"] > 0 for x in read_jsonl(a / "metrics.jsonl")[1:])  # not 0 = 0


def test_prefix_rft_without_demonstrations_is_grpo(run, tmp_path):
    """A question without a demonstration has G ordinary completions."""
    a = run("grpo", tmp_path / "grpo", "--steps", 2, *DENSE, *QUICK)
    b = run("prefix_rft", tmp_path / "prefix_rft", "--steps", 2, "--demo-fraction", 0, *DENSE, *QUICK)
    same_weights(a / "final", b / "final")


def test_prefix_rft_with_prefixes_is_not_grpo(run, tmp_path):
    """The equality above is not trivial: with the defaults the runs differ."""
    a = run("grpo", tmp_path / "grpo", "--steps", 1, *QUICK)
    b = run("prefix_rft", tmp_path / "prefix_rft", "--steps", 1, *QUICK)
    assert read_jsonl(b / "metrics.jsonl")[1]["prefix_frac"] > 0.2
    with pytest.raises(AssertionError):
        same_weights(a / "final", b / "final")


@pytest.fixture
def demonstrations(data, tiny):
    """(tokens, mask) of eight demonstrations of different lengths."""
    rows, tokenizer = read_jsonl(f"{data}/train.jsonl")[:8], tiny[1]
    prompts = tok.encode_prompts(tokenizer, [row["question"] for row in rows])
    return tok.join(prompts, [tok.encode_response(tokenizer, row["solution"]) for row in rows])


def test_grpo_on_demonstrations_with_ratio_and_advantage_one_is_sft(tiny, demonstrations):
    """Every gradient is the same: a demonstration is a completion with advantage 1, Z counts all tokens."""
    (model, _), (tokens, mask), args = tiny, demonstrations, grpo.parse_args([])
    model.zero_grad()
    sft.sft_loss(sft.logprobs(model, tokens, mask, 1.0)[0], mask, mask.sum()).backward()
    ours = gradients(model)
    model.zero_grad()
    logp, _ = grpo.logprobs(model, tokens, mask, 1.0)
    A, inv_z = mask.float(), grpo.inverse_z(mask, "token", 100)
    grpo.policy_loss(logp, logp.detach(), logp.detach(), A, mask, inv_z, args)[0].backward()
    for name, gradient in gradients(model).items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, ours[name], rtol=1e-4, atol=1e-7)
    model.zero_grad()


def test_gradient_is_that_of_the_plain_cross_entropy(tiny, demonstrations):
    """The usual code: logits of the whole model, shifted labels, -100 outside the response."""
    (model, _), (tokens, mask) = tiny, demonstrations
    model.zero_grad()
    sft.sft_loss(sft.logprobs(model, tokens, mask, 1.0)[0], mask, mask.sum()).backward()
    ours = gradients(model)
    model.zero_grad()
    labels = tokens.masked_fill(mask == 0, -100)
    torch.nn.functional.cross_entropy(
        model(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, ours[name], rtol=1e-4, atol=1e-6)
    model.zero_grad()


# ---- how a batch is split changes nothing ----------------------------------------------------------------

SPLITS = {
    "sft": ["sft"],
    "grpo, sequence": ["grpo", "--loss-norm", "sequence"],
    "grpo, token": ["grpo", "--loss-norm", "token"],
    "grpo, constant": ["grpo", "--loss-norm", "constant"],
    "grpo, two updates": ["grpo", "--minibatches", "2", "--kl-coef", "0.1"],
    "prefix_rft": ["prefix_rft", "--prefix-weight", "luffy"],
}


@pytest.mark.parametrize("flags", SPLITS.values(), ids=SPLITS)
def test_micro_batches_of_one_row_are_one_batch(run, tmp_path, float64, flags):
    """A mean of the micro-batches' means, or a Z of the micro-batch, would give other weights."""
    name, *more = flags
    more += DENSE * (name != "sft") + ["--steps", 1, *QUICK]
    a = run(name, tmp_path / "whole", "--micro-batch-tokens", 10**6, *more)
    b = run(name, tmp_path / "rows", "--micro-batch-tokens", 1, *more)
    same_weights(a / "final", b / "final", 1e-9)
    for x, y in zip(read_jsonl(a / "metrics.jsonl")[1:], read_jsonl(b / "metrics.jsonl")[1:]):
        assert x["grad_norm"] > 0
        for key in ("loss", "grad_norm", "entropy", "tokens_trained"):
            assert x[key] == pytest.approx(y[key], rel=1e-9), key


def test_rows_without_advantage_skipped_or_not(run, tmp_path, float64, monkeypatch):
    """Rows without advantage skip the forward pass but count in Z: the weights are the same."""
    more = [*DENSE, "--steps", 3, "--loss-norm", "token", *QUICK]
    a = run("grpo", tmp_path / "skipped", *more)
    micro_batches, join, inverse_z = tok.micro_batches, tok.join, grpo.inverse_z
    whole = []  # tokens and mask of the latest batch

    def remember(*args):
        whole[:] = [join(*args)]
        return whole[0]

    monkeypatch.setattr(tok, "join", remember)
    monkeypatch.setattr(tok, "micro_batches", lambda mask, *more: micro_batches(whole[0][1], *more))
    monkeypatch.setattr(grpo, "inverse_z", lambda mask, *how: inverse_z(whole[0][1], *how))
    b = run("grpo", tmp_path / "all", *more)
    same_weights(a / "final", b / "final", 1e-9)
    a, b = (read_jsonl(folder / "metrics.jsonl")[1:] for folder in (a, b))
    assert sum(x["tokens_trained"] for x in a) < sum(x["tokens_trained"] for x in b)
    assert any(x["grad_norm"] > 0 for x in a)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_weight_learns(name, run, tmp_path):
    """After two steps every tensor of the model has changed: nothing is detached or frozen by mistake."""
    more = DENSE * (name != "sft")
    out = run(name, tmp_path / name, *more, "--steps", 2, *QUICK)
    before, after = (models.load_model(str(f))[0].state_dict() for f in ("tiny/model", out / "final"))
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert not unchanged
