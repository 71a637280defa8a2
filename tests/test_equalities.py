"""Equalities: settings under which two methods, or two computations of one, must agree."""

import pytest
import torch
from conftest import QUICK, SCRIPTS, read_jsonl, same_metrics, same_weights

import common.tokenization as tok
import grpo
import sft
from common.plumbing import models

DENSE = ["--overlong-tokens", 40]  # rewards differ by length too: few groups have zero variance


HPT = ["--demo-weight", "sft", "--sft-coef", 1]  # RL with an SFT loss; with --hpt-gate HPT


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- one method is another -------------------------------------------------------------------------------

GRPO_FLAGS = {
    "default": "--steps 2".split(),
    "several updates, KL, resampling": (
        "--epochs-per-batch 2 --minibatches 2 --kl-coef 0.1 --dynamic-sampling 2 --overlong-tokens 10 "
        "--advantage grpo --loss-norm token --steps 2 --eval-samples 0"
    ).split(),
    "relatives": (
        "--advantage maxrl --ratio sequence --loss-norm sequence --clip cispo --clip-low 1 --clip-high 4 "
        "--minibatches 2 --tis-cap 2 --steps 2 --eval-samples 0"
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


def test_hybrids_without_demonstrations_are_grpo(run, tmp_path):
    """A question without a demonstration has G ordinary completions."""
    a = run("grpo", tmp_path / "grpo", "--steps", 2, *DENSE, *QUICK)
    for name in ("prefix_rft", "luffy"):
        b = run(name, tmp_path / name, "--steps", 2, "--demo-fraction", 0, *DENSE, *QUICK)
        same_weights(a / "final", b / "final")


def test_hpt_without_demonstrations_is_grpo(run, tmp_path):
    """A gate of 1 imitates every question that has a demonstration; here none has one."""
    a = run("grpo", tmp_path / "grpo", "--steps", 1, *DENSE, *QUICK)
    flags = [*HPT, "--hpt-gate", 1, "--demo-fraction", 0]
    b = run("luffy", tmp_path / "hpt", "--steps", 1, *flags, *DENSE, *QUICK)
    same_weights(a / "final", b / "final")


def test_hpt_that_imitates_every_question_is_sft(run, tmp_path, float64):
    """The same questions in the same order, one update on their demonstrations, the same weights."""
    a = run("sft", tmp_path / "sft", "--steps", 1, *QUICK)
    b = run("luffy", tmp_path / "hpt", "--steps", 1, *HPT, "--hpt-gate", 1, *QUICK)
    same_weights(a / "final", b / "final", 1e-9)
    c = run("luffy", tmp_path / "gate", "--steps", 1, *HPT, "--hpt-gate", 0, *QUICK)
    d = run("luffy", tmp_path / "none", "--steps", 1, *HPT, *QUICK)
    for other in (a, d):  # some question is solved, which is reinforced, and not imitated
        with pytest.raises(AssertionError):
            same_weights(other / "final", c / "final", 1e-9)


@pytest.fixture
def same_prefixes(monkeypatch):
    """prefix_rft.py continues half of a demonstration, and so does luffy.py."""

    def half(tokenizer, row, *_):
        ids = tok.encode_response(tokenizer, row["solution"])
        return ids[: len(ids) // 2]

    monkeypatch.setattr(SCRIPTS["prefix_rft"], "draw_prefix", half)
    monkeypatch.setattr(SCRIPTS["luffy"], "draw_demonstration", half)


@pytest.mark.parametrize("updates", [1, 2])
def test_chord_with_coefficient_0_is_prefix_rft_without_a_prefix_loss(
    run, tmp_path, float64, same_prefixes, updates
):
    """Both train no token of a demonstration."""
    more = ["--steps", 1, "--minibatches", updates, *DENSE, *QUICK]
    a = run("prefix_rft", tmp_path / "a", "--prefix-loss", "none", *more)
    b = run("luffy", tmp_path / "b", "--demo-weight", "chord", "--sft-coef", 0, *more)
    same_weights(a / "final", b / "final", 1e-9)


def test_srft_with_coefficient_0_is_luffy(run, tmp_path, float64):
    more = ["--steps", 1, "--minibatches", 2, *DENSE, *QUICK]
    a = run("luffy", tmp_path / "a", *more)
    b = run("luffy", tmp_path / "b", "--demo-weight", "srft", "--sft-coef", 0, *more)
    c = run("luffy", tmp_path / "c", "--demo-weight", "srft", *more)
    same_weights(a / "final", b / "final", 1e-9)
    with pytest.raises(AssertionError):
        same_weights(b / "final", c / "final", 1e-9)


def test_hybrids_of_whole_demonstrations_are_one_demonstration(run, tmp_path, float64):
    """G copies of a demonstration have A = 0. Their SFT loss is the mean over G times the same tokens."""
    a = run("sft", tmp_path / "sft", "--steps", 1, *QUICK)
    b = run("luffy", tmp_path / "hybrids", "--steps", 1, *HPT, "--hybrids", 4, *QUICK)
    same_weights(a / "final", b / "final", 1e-9)


@pytest.mark.parametrize("how, batches", [("sft", 2), ("chord", 1)])
def test_a_demonstration_has_the_weight_of_the_current_policy_in_every_update(
    run, tmp_path, float64, monkeypatch, how, batches
):
    """Two updates. On demonstrations r = 1, and c / n times 1 or p (1 - p), with n and p of this update."""
    script, seen = SCRIPTS["luffy"], []
    loss = script.policy_loss

    def watched(logp, old_logp, ref_logp, advantage, mask, inv_z, args):
        # in the second update r = 1 on demonstrations alone
        own = (mask == 1) & (advantage * inv_z != 0) & (logp == old_logp)
        p, weight = logp.detach().exp()[own], (advantage * inv_z)[own]
        seen.append((own.sum().item(), weight / (p * (1 - p)) if how == "chord" else weight))
        return loss(logp, old_logp, ref_logp, advantage, mask, inv_z, args)

    monkeypatch.setattr(script, "policy_loss", watched)
    more = ["--minibatches", batches, "--epochs-per-batch", 2 // batches, "--micro-batch-tokens", 10**6]
    more += ["--demo-weight", how, "--sft-coef", 300, "--lr", 1e-2, "--warmup-steps", 0]
    run("luffy", tmp_path / "run", "--steps", 1, *more, *QUICK)
    assert len(seen) == 2
    n, weight = seen[1]  # of the second update
    assert n > 20
    torch.testing.assert_close(weight, torch.full_like(weight, 300 / n), rtol=1e-9, atol=0)


def test_hpt_judges_a_question_by_correctness_and_averages_over_what_it_imitates(run, tmp_path, monkeypatch):
    """Not by rewards, which overlong penalties lower; and n leaves the reinforced demonstrations out."""
    script, judged, seen = SCRIPTS["luffy"], [], []
    gate, weight = script.hpt_gate, script.demonstration_weight

    def watched_gate(advantage, prefix, correct, args):
        A, imitated = gate(advantage, prefix, correct, args)
        judged.append((correct, prefix.sum().item(), imitated.sum().item()))
        return A, imitated

    def watched_weight(*arguments):
        seen.append(arguments[5].item())  # n
        return weight(*arguments)

    monkeypatch.setattr(script, "hpt_gate", watched_gate)
    monkeypatch.setattr(script, "demonstration_weight", watched_weight)
    more = [*HPT, "--hpt-gate", 0.5, "--micro-batch-tokens", 10**6]
    out = run("luffy", tmp_path / "run", "--steps", 1, *more, *DENSE, *QUICK)
    correct, demonstrated, imitated = judged[0]
    assert set(correct.unique().tolist()) == {0, 1}
    assert read_jsonl(out / "metrics.jsonl")[1]["reward"] < correct.mean().item()  # some are penalised
    assert seen == [imitated] and 0 < imitated < demonstrated


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


def loss_and_gradient(logp, old, A, mask, norm, *flags):
    """Of policy_loss with these flags; old None is the policy itself."""
    logp = logp.clone().requires_grad_()
    inv_z = grpo.inverse_z(mask, norm, 100)
    old = logp.detach() if old is None else old
    args = grpo.parse_args([*flags])
    loss, _, _ = grpo.policy_loss(logp, old, logp.detach(), A, mask, inv_z, args)
    loss.backward()
    return loss.item(), logp.grad


def few_tokens(width):
    g = torch.Generator().manual_seed(0)
    logp, old = -torch.rand(2, 40, width, generator=g)
    return logp, old, torch.randn(40, 1, generator=g).expand(40, width), torch.ones(40, width)


def test_gspo_of_one_token_is_grpo_bit_for_bit():
    logp, old, A, mask = few_tokens(1)
    a = loss_and_gradient(logp, old, A, mask, "sequence")
    b = loss_and_gradient(logp, old, A, mask, "sequence", "--ratio", "sequence")
    assert a[0] == b[0] and torch.equal(a[1], b[1])
    zero = (a[1] == 0).sum()  # tokens outside the trust region
    assert 0 < zero < 40


def test_at_the_first_update_gspo_and_cispo_have_the_gradient_of_grpo_bit_for_bit():
    """The ratio is 1: their factors differ only once the policy has moved."""
    logp, old, A, mask = few_tokens(5)
    _, want = loss_and_gradient(logp, None, A, mask, "token")
    for flags in (["--ratio", "sequence"], ["--clip", "cispo"]):
        assert torch.equal(loss_and_gradient(logp, None, A, mask, "token", *flags)[1], want)
        assert not torch.allclose(loss_and_gradient(logp, old, A, mask, "token", *flags)[1], want)


def test_cispo_and_grpo_differ_only_outside_the_trust_region():
    logp, old, A, mask = few_tokens(5)
    _, a = loss_and_gradient(logp, old, A, mask, "token")
    _, b = loss_and_gradient(logp, old, A, mask, "token", "--clip", "cispo")
    r = (logp - old).exp()
    inside = (r >= 0.8) & (r <= 1.2)
    assert 0 < inside.sum() < 200
    torch.testing.assert_close(a[inside], b[inside])
    assert not torch.isclose(a[~inside], b[~inside]).any() and (b != 0).all()


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


# ---- a sampler that differs ------------------------------------------------------------------------------


def enumerated(monkeypatch, prompt, sampled_logp, A):
    """Rollouts become one group with every token of the vocabulary as a response, with these advantages."""

    def rollout(model, tokenizer, rows, args):
        group = []
        for v in range(len(A)):
            completion = {"prompt": prompt, "response": [v], "sampled_logp": [sampled_logp[v].item()]}
            completion |= {"question": "", "text": "", "gold": "", "reward": A[v].item()}
            group.append(completion | {"correct": 0.0, "truncated": False})
        return [group]

    monkeypatch.setattr(grpo, "rollout", rollout)
    monkeypatch.setattr(grpo, "advantages", lambda rewards, how: rewards)


@pytest.mark.parametrize("cap", [1e6, 1.5])
def test_importance_weights_make_the_gradient_on_policy(run, tmp_path, float64, monkeypatch, cap):
    """Exact: the sum over the vocabulary of q min(pi / q, C) R grad log pi; q cancels if C is large.

    One run of main has samples of q and --tis-cap C, the other has the factors of the sum as advantages.
    """
    model, tokenizer = models.load_model("tiny/model")
    [prompt] = tok.encode_prompts(tokenizer, ["Compute 1 + 1."])
    with torch.no_grad():
        log_pi = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    g = torch.Generator().manual_seed(0)
    V = len(log_pi)
    log_q = (log_pi + torch.randn(V, generator=g)).log_softmax(-1)
    R = torch.randn(V, generator=g)
    pi, q = log_pi.exp(), log_q.exp()
    assert (pi / q > 1.5).float().mean() > 0.1  # the smaller cap acts

    more = ["--steps", 1, "--batch-size", 1, "--group-size", V, *QUICK]
    enumerated(monkeypatch, prompt, log_q, q * R)
    a = run("grpo", tmp_path / "sampler", "--tis-cap", cap, *more)
    enumerated(monkeypatch, prompt, log_pi, torch.minimum(pi, cap * q) * R)
    b = run("grpo", tmp_path / "policy", *more)
    same_weights(a / "final", b / "final", 1e-9)
    x, y = (read_jsonl(folder / "metrics.jsonl")[1] for folder in (a, b))
    assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-9) and y["grad_norm"] > 0
    assert x["sampler_gap"] == pytest.approx((log_pi - log_q).abs().mean().item(), rel=1e-9)
    assert y["sampler_gap"] < 1e-9


@pytest.mark.parametrize("name", ["grpo", "prefix_rft", "luffy"])
def test_a_sampler_that_is_the_policy_needs_no_weights_bit_for_bit(run, tmp_path, monkeypatch, name):
    """Where log pi_sampler is what the scoring pass gives, --tis-cap changes no bit."""
    script = SCRIPTS[name]
    rollout = script.rollout

    def exact(model, tokenizer, rows, *more):
        groups = rollout(model, tokenizer, rows, *more)
        batch = [completion for group in groups for completion in group]
        tokens, mask = tok.join([c["prompt"] for c in batch], [c["response"] for c in batch])
        scored, _ = script.score(model, tokens, mask, more[-1])
        for completion, logp, on in zip(batch, scored, mask):
            completion["sampled_logp"] = logp[on == 1].tolist()
        return groups

    monkeypatch.setattr(script, "rollout", exact)
    more = ["--steps", 2, "--minibatches", 2, *DENSE, *QUICK]  # pi_old is scored where there are two updates
    a = run(name, tmp_path / "off", *more)
    b = run(name, tmp_path / "on", "--tis-cap", 2, *more)
    same_weights(a / "final", b / "final")
    same_metrics(a, b)
    lines = read_jsonl(b / "metrics.jsonl")[1:]
    assert [line["sampler_gap"] for line in lines] == [0, 0] and lines[0]["grad_norm"] > 0


# ---- how a batch is split changes nothing ----------------------------------------------------------------

SPLITS = {
    "sft": ["sft"],
    "grpo, sequence": ["grpo", "--loss-norm", "sequence"],
    "grpo, token": ["grpo", "--loss-norm", "token"],
    "grpo, constant": ["grpo", "--loss-norm", "constant"],
    "grpo, two updates": ["grpo", "--minibatches", "2", "--kl-coef", "0.1"],
    "prefix_rft": ["prefix_rft"],
    "luffy": ["luffy"],
    "luffy, an SFT loss, two updates": ["luffy", "--demo-weight", "srft", "--minibatches", "2"],
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
