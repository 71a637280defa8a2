"""Losses and weights against independent float64 loops, worked examples and values printed by TRL."""

from math import comb, cos, exp, log, pi
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, read_jsonl

import common.tokenization as tok
import grpo
import luffy
import prefix_rft
import sft
from experiments import trl_values


def settings(**changed):
    """The defaults of prefix_rft.py and luffy.py, which have all of them; some changed."""
    return SimpleNamespace(**vars(luffy.parse_args([])) | vars(prefix_rft.parse_args([])) | changed)


def close(got, want, tolerance=1e-6):
    np.testing.assert_allclose(
        np.asarray(got, float), np.asarray(want, float), rtol=tolerance, atol=tolerance
    )


# ---- advantages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, correct, values",
    [
        ("grpo", 2, (-0.54006, 1.62018)),
        ("dr_grpo", 2, (-0.25, 0.75)),
        ("grpo", 1, (-0.35355, 2.47487)),
        ("dr_grpo", 1, (-0.125, 0.875)),
        ("maxrl", 2, (-1.0, 3.0)),
        ("maxrl", 1, (-1.0, 7.0)),
    ],
)
def test_advantages_of_a_group_of_eight(how, correct, values):
    """The mean is that of the group, its standard deviation divides by n - 1, groups do not mix."""
    rewards = torch.tensor([[1.0] * correct + [0.0] * (8 - correct), [1.0] * 8, [0.0] * 8])
    A = grpo.advantages(rewards, how)
    close(A[0], [values[1]] * correct + [values[0]] * (8 - correct), 1e-5)
    assert (A[1:] == 0).all()  # all correct, all incorrect: exactly 0


def test_maxrl_estimates_the_gradient_of_log_p():
    """Exact, over all outcomes of G = 6 completions of which each is correct with probability p.

    The mean of A_i grad log pi(y_i) is that of - sum over k < G of (1 - p)^k / k, the first terms of log p.
    Only with G = 2 is it the gradient of p itself.
    """
    for G, p in ((6, 0.3), (6, 0.05), (2, 0.3)):
        outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * G)  # [2^G, G]
        likelihood = torch.where(outcomes == 1, p, 1 - p).prod(1)
        score = torch.where(outcomes == 1, 1 - p, -p)  # d log pi(y) / d logit of p
        A = grpo.advantages(outcomes, "maxrl")
        slope = p * (1 - p)  # d p / d logit
        series = sum((1 - p) ** (k - 1) for k in range(1, G))  # d/dp of the terms above
        close((likelihood * (A * score).mean(1)).sum(), slope * series, 1e-5)


# ---- 1/Z -------------------------------------------------------------------------------------------------

MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]])  # 3, 4 and 1 tokens


@pytest.mark.parametrize(
    "how, each",
    [
        ("sequence", [1 / (3 * 3), 1 / (3 * 4), 1 / (3 * 1)]),  # a mean over sequences of means over tokens
        ("token", [1 / 8, 1 / 8, 1 / 8]),  # a mean over the tokens of the batch
        ("constant", [1 / 30, 1 / 30, 1 / 30]),  # 3 sequences x a budget of 10
    ],
)
def test_inverse_z(how, each):
    close(grpo.inverse_z(MASK, how, 10), [[z] for z in each])


def test_inverse_z_makes_a_mean():
    """A loss of 1 on each token is 1 under both means and |y| / budget under the constant."""
    total = {how: (MASK * grpo.inverse_z(MASK, how, 10)).sum() for how in ("sequence", "token", "constant")}
    close([total["sequence"], total["token"], total["constant"]], [1, 1, 8 / 30])


# ---- the clipped surrogate -------------------------------------------------------------------------------


def surrogate(ratio, A, **changed):
    """The surrogate of one token and its weight I_clip r A, from autograd."""
    logp = torch.tensor([[log(ratio)]], dtype=torch.float64, requires_grad=True)
    one, zero = torch.ones_like(logp), torch.zeros_like(logp)
    loss, r, _ = grpo.policy_loss(logp, zero, logp.detach(), A * one, one, one, settings(**changed))
    loss.backward()
    close(r, ratio)
    return -loss.item(), -logp.grad.item()


@pytest.mark.parametrize(
    "ratio, A, high, value, weight",
    [
        (0.5, 1, 0.2, 0.5, 0.5),
        (1.0, 1, 0.2, 1.0, 1.0),
        (1.1, 1, 0.2, 1.1, 1.1),
        (1.25, 1, 0.2, 1.2, 0),  # outside the trust region the gradient is 0
        (1.5, 1, 0.2, 1.2, 0),
        (1.25, 1, 0.28, 1.25, 1.25),  # clip-higher moves only the upper bound
        (1.5, 1, 0.28, 1.28, 0),
        (0.5, -1, 0.2, -0.8, 0),
        (0.5, -1, 0.28, -0.8, 0),
        (0.9, -1, 0.2, -0.9, -0.9),
        (1.5, -1, 0.2, -1.5, -1.5),  # A < 0 and more likely than before: the gradient remains
        (4.0, -1, 0.28, -4.0, -4.0),
        (1.5, 0, 0.2, 0, 0),
    ],
)
def test_clip_table(ratio, A, high, value, weight):
    close(surrogate(ratio, A, clip_high=high), (value, weight))


def test_the_first_update_has_ratio_one_and_a_gradient():
    """With old_logp = logp the surrogate sums to 0 over a group, but its gradient is A."""
    A = torch.tensor([[0.75], [-0.25], [-0.25], [-0.25]])
    logp = torch.tensor([[-1.0], [-2.0], [-0.1], [-3.0]], requires_grad=True)
    one = torch.ones_like(A)
    loss, ratio, k3 = grpo.policy_loss(logp, logp.detach(), logp.detach(), A, one, one, settings(kl_coef=0.5))
    loss.backward()
    assert loss.item() == 0 and (ratio == 1).all() and (k3 == 0).all()
    close(logp.grad, -A)


@pytest.mark.parametrize(
    "ratio, A, low, high, weight",
    [
        (1.1, 1, 0.2, 0.2, 1.1),
        (1.5, 1, 0.2, 0.2, 1.2),  # PPO's clip gives 0: here the weight is clipped
        (0.5, -1, 0.2, 0.2, -0.8),
        (0.5, 1, 0.2, 0.2, 0.8),
        (1.5, -1, 0.2, 0.2, -1.2),
        (0.01, -1, 1, 4, -0.01),  # as published: no lower bound
        (7.0, 1, 1, 4, 5.0),
    ],
)
def test_cispo_table(ratio, A, low, high, weight):
    """clip(r) A, whatever the sign of A; the value is that times log pi."""
    changed = {"clip": "cispo", "clip_low": low, "clip_high": high}
    close(surrogate(ratio, A, **changed), (weight * log(ratio), weight))


def random_batch(seed=0, shape=(5, 9)):
    """Log-probabilities of three policies, advantages, a ragged mask; every case of the clip occurs."""
    g = torch.Generator().manual_seed(seed)
    logp, old, ref = -torch.rand(3, *shape, generator=g, dtype=torch.float64) * 2
    A = torch.randn(shape[0], 1, generator=g, dtype=torch.float64).expand(shape).clone()
    ends = torch.randint(2, shape[1] + 1, (shape[0], 1), generator=g)
    mask = (torch.arange(shape[1])[None] < ends) & (torch.arange(shape[1])[None] > 0)
    return logp, old, ref, A, mask.long()


def plain_policy_loss(logp, old, ref, A, mask, how, budget, low, high, beta):
    """DeepSeekMath eq. 3 token by token with three normalisers: the loss and d loss / d logp."""
    logp, old, ref, A = (x.numpy().astype(np.float64) for x in (logp, old, ref, A))
    mask, loss, gradient = mask.numpy(), 0.0, np.zeros(logp.shape)
    for i in range(len(logp)):
        z = {"sequence": len(logp) * mask[i].sum(), "token": mask.sum(), "constant": len(logp) * budget}[how]
        for t in range(logp.shape[1]):
            if mask[i, t]:
                r, a, d = exp(logp[i, t] - old[i, t]), A[i, t], ref[i, t] - logp[i, t]
                clipped = 1 - low if r < 1 - low else 1 + high if r > 1 + high else r
                inside = r <= 1 + high if a > 0 else r >= 1 - low
                loss -= (min(r * a, clipped * a) - beta * (exp(d) - d - 1)) / z
                gradient[i, t] = -(inside * r * a + beta * (exp(d) - 1)) / z
    return loss, gradient


@pytest.mark.parametrize("how", ["sequence", "token", "constant"])
@pytest.mark.parametrize("beta, high", [(0.0, 0.2), (0.0, 0.28), (0.3, 0.2)])
@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_and_gradient(how, beta, high, seed):
    logp, old, ref, A, mask = random_batch(seed)
    logp.requires_grad_()
    args, inv_z = settings(clip_high=high, kl_coef=beta), grpo.inverse_z(mask, how, 20).double()
    loss, _, _ = grpo.policy_loss(logp, old, ref, A, mask, inv_z, args)
    loss.backward()
    want, gradient = plain_policy_loss(logp.detach(), old, ref, A, mask, how, 20, 0.2, high, beta)
    close(loss.item(), want)
    close(logp.grad, gradient)
    assert (logp.grad[mask == 0] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_cispo_loss_and_gradient(seed):
    """Token by token; the mean is over all tokens."""
    logp, old, ref, A, mask = random_batch(seed)
    logp.requires_grad_()
    args = settings(clip="cispo", clip_low=0.3, clip_high=0.5)
    inv_z = grpo.inverse_z(mask, "token", 20).double()
    loss, _, _ = grpo.policy_loss(logp, old, ref, A, mask, inv_z, args)
    loss.backward()
    want, gradient, clipped = 0.0, np.zeros(logp.shape), set()
    for i, t in mask.nonzero().tolist():
        r = exp(logp[i, t].item() - old[i, t].item())
        weight = min(max(r, 0.7), 1.5) * A[i, t].item() / mask.sum().item()
        want -= weight * logp[i, t].item()
        gradient[i, t] = -weight
        clipped.add((r < 0.7) - (r > 1.5))
    assert clipped == {-1, 0, 1}
    close(loss.item(), want)
    close(logp.grad, gradient)


def sequence_form(logp, old, A, mask, low, high):
    """GSPO, 2507.18071, eq. 5: the mean over responses of min(s A, clip(s) A), for autograd."""
    terms = []
    for i in range(len(logp)):
        on = mask[i].bool()
        s = (logp[i, on] - old[i, on]).mean().exp()  # (pi(y) / pi_old(y))^(1 / |y|)
        terms.append(torch.min(s * A[i, 0], s.clamp(1 - low, 1 + high) * A[i, 0]))
    return -torch.stack(terms).mean()


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.05, 0.3), (3e-4, 4e-4)])
@pytest.mark.parametrize("seed", range(3))
def test_gspo_has_the_gradient_of_its_sequence_form(low, high, seed):
    """Every token has the weight s A / |y|; a response outside the trust region has none."""
    logp, old, ref, A, mask = random_batch(seed)
    old = logp + (old - logp) / 3  # ratios of responses are nearer to 1 than those of tokens
    logp.requires_grad_()
    args = settings(ratio="sequence", clip_low=low, clip_high=high)
    inv_z = grpo.inverse_z(mask, "sequence", 20).double()
    loss, ratio, _ = grpo.policy_loss(logp, old, ref, A, mask, inv_z, args)
    [gradient] = torch.autograd.grad(loss, logp)
    want = sequence_form(logp, old, A, mask, low, high)
    close(loss.item(), want.item())
    close(gradient, torch.autograd.grad(want, logp)[0])
    for i, row in enumerate(ratio):  # one ratio a response, the geometric mean
        ratios = [exp(logp[i, t].item() - old[i, t].item()) for t in range(9) if mask[i, t]]
        close(row, [np.prod(ratios) ** (1 / len(ratios))] * 9)


def test_gspo_leaves_each_token_its_own_advantage():
    """Where advantages differ within a response, there is one ratio, but as many weights as tokens."""
    logp, old, ref, _, mask = random_batch(1)
    A = torch.randn(logp.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logp.requires_grad_()
    args = settings(ratio="sequence", clip_low=1, clip_high=1000)
    loss, s, _ = grpo.policy_loss(logp, old, ref, A, mask, 1, args)
    [gradient] = torch.autograd.grad(loss, logp)
    close(gradient, -s * A * mask)


# ---- KL --------------------------------------------------------------------------------------------------


def test_k3_of_one_token():
    """For ref - logp = -0.5: k3 = exp(-.5) + .5 - 1 = .106531, d k3 / d logp = 1 - exp(-.5)."""
    logp = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    one = torch.ones_like(logp)
    old, ref = logp.detach(), logp.detach() - 0.5
    loss, _, k3 = grpo.policy_loss(logp, old, ref, 0 * one, one, one, settings(kl_coef=1))
    loss.backward()
    close(k3, [[0.106531]])
    close(loss.item(), 0.106531)  # a penalty is added to the loss
    close(logp.grad, [[1 - exp(-0.5)]])  # more likely than under the reference: pushed down


def test_the_mean_of_k3_under_the_policy_is_the_kl():
    """Exact, over a vocabulary of 50: E_pi[k3] = KL(pi || ref), not KL(ref || pi)."""
    g = torch.Generator().manual_seed(0)
    logp, ref = torch.randn(2, 50, generator=g, dtype=torch.float64).mul(2).log_softmax(-1)
    zero = torch.zeros(50, 1, dtype=torch.float64)
    _, _, k3 = grpo.policy_loss(
        logp[:, None], logp[:, None], ref[:, None], zero, zero + 1, zero + 1, settings()
    )
    kl = (logp.exp() * (logp - ref)).sum()
    close((logp.exp() * k3[:, 0]).sum(), kl, 1e-12)
    assert (k3 >= 0).all() and abs(kl - (ref.exp() * (ref - logp)).sum()) > 0.1


# ---- SFT -------------------------------------------------------------------------------------------------


def test_sft_loss_and_gradient():
    """The mean over all response tokens: gradient -1/Z on each, 0 on prompt and padding."""
    logp = random_batch()[0].requires_grad_()
    mask = random_batch()[4]
    loss = sft.sft_loss(logp, mask, mask.sum())
    loss.backward()
    tokens = [logp[i, t].item() for i in range(5) for t in range(9) if mask[i, t]]
    close(loss.item(), -sum(tokens) / len(tokens))
    close(logp.grad, -mask / len(tokens))


# ---- TRL -------------------------------------------------------------------------------------------------

# Loss and d loss / d logp of TRL 1.16.0 (22 November 2026), printed by experiments/trl_values.py
TRL = [
    # loss type, epsilon_high, beta, loss, gradient
    ("grpo", 0.2, 0.0, -0.0006347, [
        [0.0000000, -0.0463011, -0.0637626, 0.0000000, 0.0000000],
        [0.0000000, 0.1017836, 0.0000000, 0.0000000, 0.0000000],
        [0.0166667, 0.0274787, 0.0150806, 0.0000000, 0.0184195],
    ]),
    ("grpo", 0.28, 0.1, -0.0004316, [
        [-0.0763692, -0.0481462, -0.0646390, -0.0054060, 0.0000000],
        [0.0043197, 0.1033696, 0.0000000, 0.0000000, 0.0000000],
        [0.0133878, 0.0274787, 0.0168085, -0.0114552, 0.0190539],
    ]),
    ("dr_grpo", 0.2, 0.0, -0.0310575, [
        [0.0000000, -0.0231506, -0.0318813, 0.0000000, 0.0000000],
        [0.0000000, 0.0254459, 0.0000000, 0.0000000, 0.0000000],
        [0.0104167, 0.0171742, 0.0094254, 0.0000000, 0.0115122],
    ]),
    ("dr_grpo", 0.28, 0.1, -0.0304331, [
        [-0.0381846, -0.0240731, -0.0323195, -0.0027030, 0.0000000],
        [0.0010799, 0.0258424, 0.0000000, 0.0000000, 0.0000000],
        [0.0083674, 0.0171742, 0.0105053, -0.0071595, 0.0119087],
    ]),
    ("dapo", 0.2, 0.0, -0.0677619, [
        [0.0000000, -0.0505103, -0.0695592, 0.0000000, 0.0000000],
        [0.0000000, 0.0555183, 0.0000000, 0.0000000, 0.0000000],
        [0.0227273, 0.0374709, 0.0205645, 0.0000000, 0.0251175],
    ]),
    ("dapo", 0.28, 0.1, -0.0663995, [
        [-0.0833119, -0.0525231, -0.0705153, -0.0058975, 0.0000000],
        [0.0023562, 0.0563834, 0.0000000, 0.0000000, 0.0000000],
        [0.0182561, 0.0374709, 0.0229207, -0.0156207, 0.0259826],
    ]),
    ("gspo", 0.2, 0.0, -0.0519946, [
        [-0.0715335, -0.0715335, -0.0715335, -0.0715335, 0.0000000],
        [0.0754031, 0.0754031, 0.0000000, 0.0000000, 0.0000000],
        [0.0166667, 0.0166667, 0.0166667, 0.0166667, 0.0166667],
    ]),
    ("gspo", 0.1, 0.1, -0.0327776, [
        [0.0015106, -0.0018450, -0.0008764, -0.0054060, 0.0000000],
        [0.0797228, 0.0769892, 0.0000000, 0.0000000, 0.0000000],
        [0.0133878, 0.0166667, 0.0183945, 0.0052115, 0.0173011],
    ]),
    ("cispo", 1.2, 0.0, 0.1608924, [
        [-0.0818182, -0.0505103, -0.0695592, -0.0818182, 0.0000000],
        [0.0304691, 0.0545455, 0.0000000, 0.0000000, 0.0000000],
        [0.0227273, 0.0272727, 0.0205645, 0.0137848, 0.0251175],
    ]),
    ("cispo", 1.5, 0.1, 0.2098780, [
        [-0.0833119, -0.0525231, -0.0705153, -0.1081702, 0.0000000],
        [0.0328253, 0.0563834, 0.0000000, 0.0000000, 0.0000000],
        [0.0182561, 0.0340909, 0.0229207, -0.0018360, 0.0259826],
    ]),
]  # fmt: skip


@pytest.mark.parametrize("loss_type, high, beta, value, gradient", TRL)
def test_loss_and_gradient_equal_those_of_trl(loss_type, high, beta, value, gradient):
    """TRL calls the mean of means grpo, the mean over tokens dapo and the constant dr_grpo.

    Its epsilon_high is the largest ratio of CISPO; ours is the distance from 1.
    """
    logp, old, ref, A, mask = trl_values.tensors()
    logp.requires_grad_()
    norms = {"dapo": "token", "cispo": "token", "dr_grpo": "constant"}
    inv_z = grpo.inverse_z(mask, norms.get(loss_type, "sequence"), 8)
    args = settings(clip_high=high, kl_coef=beta)
    if loss_type == "gspo":
        args.ratio = "sequence"
    if loss_type == "cispo":
        args.clip, args.clip_low, args.clip_high = "cispo", 1, high - 1
    loss, _, _ = grpo.policy_loss(logp, old, ref, A[:, None], mask, inv_z, args)
    loss.backward()
    close([loss.item()], [value])
    close(logp.grad, gradient)


# ---- Prefix-RFT: the length of a prefix and which of its tokens are trained ------------------------------


class Letters:
    """A tokenizer with one token per letter; EOS is 0."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]


def prefix_lengths(step, n=400, letters=999, **changed):
    args, row = settings(**changed), {"solution": "x" * letters, "demonstrated": True}
    torch.manual_seed(0)
    return [len(prefix_rft.draw_prefix(Letters(), row, step, args)) for _ in range(n)]


@pytest.mark.parametrize(
    "step, low", [(0, 0.95), (125, 0.8182), (250, 0.5), (375, 0.1818), (500, 0.05), (900, 0.05)]
)
def test_the_lower_bound_of_the_prefix_length_follows_a_cosine(step, low):
    """l ~ U[low(step), .95] of 1,000 tokens: the lower bound falls, the upper bound stays."""
    drawn = prefix_lengths(step, prefix_decay_steps=500)
    assert abs(low - (0.05 + 0.45 * (1 + cos(pi * min(step, 500) / 500)))) < 1e-4  # the values above
    ends, width = (low * 1000, 950), (0.95 - low) * 1000
    assert ends[0] - 1 <= min(drawn) <= ends[0] + 0.02 * width + 1
    assert ends[1] - 0.02 * width - 1 <= max(drawn) <= ends[1]
    assert abs(np.mean(drawn) - (ends[0] + ends[1]) / 2) < 0.05 * width + 1


@pytest.mark.parametrize(
    "step, low", [(0, 0.95), (125, 0.8182), (250, 0.5), (375, 0.1818), (500, 0.05), (900, 0.05)]
)
def test_the_shortest_prefix_is_that_of_this_very_step(step, low, monkeypatch):
    monkeypatch.setattr(torch, "rand", torch.zeros)
    [shortest] = prefix_lengths(step, 1, letters=99999, prefix_decay_steps=500)
    assert abs(shortest - low * 100000) < 10


def test_other_prefix_schedules():
    assert min(prefix_lengths(1, prefix_schedule="uniform")) < 80 and max(prefix_lengths(1)) <= 950
    assert set(prefix_lengths(1, 3, prefix_schedule="none")) == {0}


def demonstration_lengths(step, n, letters=999, **changed):
    args, row = settings(**changed), {"solution": "x" * letters, "demonstrated": True}
    torch.manual_seed(0)
    return [len(luffy.draw_demonstration(Letters(), row, step, args)) for _ in range(n)]


def test_a_demonstration_is_whole():
    assert demonstration_lengths(1, 3) == [1000] * 3  # with EOS


@pytest.mark.parametrize(
    "step, p", [(1, 0.95), (125, 0.8182), (250, 0.5), (375, 0.1818), (500, 0.05), (501, 0)]
)
def test_uft_draws_how_many_fifths_from_a_binomial_distribution(step, p, monkeypatch):
    """k / 5 of y* without EOS, k ~ Binomial(5, p), p falls from .95 to .05 by a cosine; then nothing."""
    lengths = demonstration_lengths(step, 2000, letters=1000, uft_steps=500)  # and EOS
    fifths = np.bincount(np.array(lengths) // 200, minlength=6)
    assert set(lengths) <= {0, 200, 400, 600, 800, 1000} and fifths.sum() == 2000
    for k, seen in enumerate(fifths / 2000):
        expected = comb(5, k) * p**k * (1 - p) ** (5 - k)
        assert abs(seen - expected) < 0.045, (k, seen, expected)  # four standard deviations at most
    for drawn, length in ((p - 0.0005, 1000 * (p > 0)), (p + 0.0005, 0)):  # p of this very step
        monkeypatch.setattr(torch, "rand", lambda n, drawn=drawn: torch.full((n,), drawn))
        assert demonstration_lengths(step, 1, letters=1000, uft_steps=500) == [length]


@pytest.mark.parametrize("draw", [prefix_rft.draw_prefix, luffy.draw_demonstration])
def test_a_prefix_is_the_beginning_of_the_ids(draw):
    torch.manual_seed(0)
    row = {"solution": "abcdefghij", "demonstrated": True}
    ids = draw(Letters(), row, 1, settings(uft_steps=2))
    assert 0 < len(ids) < 11 and ids == [ord(c) for c in "abcdefghij"][: len(ids)]
    for missing in ({"solution": "abc", "demonstrated": False}, {"solution": "", "demonstrated": True}):
        assert draw(Letters(), missing, 1, settings()) == []


def kept_tokens(n, loss="keep", share=0.2, seed=0):
    """Which of n prefix tokens in two rows keep A = 2: a mask over them, and their entropies."""
    g = torch.Generator().manual_seed(seed)
    prefix = torch.zeros(2, 60)
    prefix.view(-1)[torch.randperm(120, generator=g)[:n]] = 1
    entropy, A = torch.rand(2, 60, generator=g), torch.full((2, 60), 2.0)
    entropy[prefix == 0] = 9  # on-policy tokens are never candidates
    args = settings(prefix_loss=loss, prefix_entropy_keep=share)
    out = prefix_rft.prefix_weight(A, entropy, prefix, args)
    assert (out[prefix == 0] == 2).all()  # on-policy tokens keep their A
    assert set(out[prefix == 1].tolist()) <= {0.0, 2.0}
    return out[prefix == 1] == 2, entropy[prefix == 1]


@pytest.mark.parametrize("n", [0, 1, 4, 5, 10, 11, 73])
def test_the_fifth_of_prefix_tokens_with_the_highest_entropy_is_trained(n):
    """n - int(.8 n) tokens, chosen over the whole batch and not row by row."""
    kept, entropy = kept_tokens(n)
    assert kept.sum() == n - int(0.8 * n)
    assert n < 2 or entropy[kept].min() > entropy[~kept].max()


def test_other_choices_of_prefix_tokens():
    assert kept_tokens(50, "all")[0].all() and not kept_tokens(50, "none")[0].any()
    kept, entropy = kept_tokens(50, "bottom")
    assert kept.sum() == 10 and entropy[kept].max() < entropy[~kept].min()
    torch.manual_seed(0)
    draws = [kept_tokens(50, "random")[0] for _ in range(200)]
    assert {int(kept.sum()) for kept in draws} == {10}
    often = torch.stack(draws).float().mean(0)  # 0.2 +- 0.028 for each token: none is preferred
    assert 0.1 < often.min() and often.max() < 0.31


# ---- LUFFY and its relatives: the weight of demonstration tokens -----------------------------------------


def test_weight_of_luffy_at_p_0_3():
    A, logp, prefix = torch.full((1, 2), 2.0), torch.full((1, 2), log(0.3)), torch.tensor([[1, 0]])
    weight = luffy.demonstration_weight(A, logp, -logp, prefix, torch.ones(1, 2), 1, settings())
    close(weight, [[2 * 0.1875, 2.0]])


# two questions of three completions; the first of each continues a demonstration
HYBRID_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]] * 2)
HYBRID_PREFIX = HYBRID_MASK * torch.tensor([[1, 1, 1, 0], [0] * 4, [0] * 4, [1, 1, 1, 1], [0] * 4, [0] * 4])


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("how", ["sft", "chord", "srft"])
def test_losses_of_relatives_on_the_demonstration(how, norm):
    """weight / Z of each demonstration token, in plain loops: a mean over those of the batch, times c.

    SFT: c / n. CHORD: c / n p (1 - p). SRFT: c / n 0.5 exp(-H), H the mean of one demonstration, and LUFFY's.
    """
    g = torch.Generator().manual_seed(3)
    logp = -3 * torch.rand(6, 4, generator=g)
    entropy = 2 * torch.rand(6, 4, generator=g)  # also outside the prefix, where it must not count
    A = torch.randn(6, 1, generator=g).expand(6, 4)
    args = settings(demo_weight=how, sft_coef=0.3, loss_norm=norm)
    inv_z = luffy.inverse_z(HYBRID_MASK, norm, args.max_new_tokens)
    n = 7
    weight = luffy.demonstration_weight(A, logp, entropy, HYBRID_PREFIX, inv_z, n, args)
    for i in range(6):
        on = [t for t in range(4) if HYBRID_PREFIX[i, t]]
        for t in range(4):
            if t not in on:
                assert weight[i, t] == A[i, t]
                continue
            p, H = exp(logp[i, t]), sum(entropy[i, u].item() for u in on) / len(on)
            own = {"sft": 1, "chord": p * (1 - p), "srft": 0.5 * exp(-H)}[how]
            rl = A[i, t].item() * 0.1 * p / (p + 0.1) ** 2 * inv_z[i].item() if how == "srft" else 0
            close(weight[i, t] * inv_z[i, 0], 0.3 / n * own + rl, 1e-5)


@pytest.mark.parametrize(
    "correct, gate, imitated",
    [
        ([[1, 0, 0], [1, 1, 0]], 0, [True, False]),  # a correct demonstration does not count
        ([[0, 0, 0], [0, 0, 1]], 0, [True, False]),
        ([[1, 0, 1], [1, 1, 1]], 0.5, [True, False]),  # half of them: not above the gate
        ([[0, 1, 1], [0, 1, 1]], 1, [True, True]),
    ],
)
def test_hpt_imitates_what_is_not_solved_and_reinforces_the_rest(correct, gate, imitated):
    A = torch.arange(1.0, 7)[:, None] * HYBRID_MASK
    args = settings(hpt_gate=gate, group_size=3)
    kept, prefix = luffy.hpt_gate(A, HYBRID_PREFIX, torch.tensor(correct).float(), args)
    for i in range(6):
        for t in range(4):
            demonstration = HYBRID_PREFIX[i, t] == 1
            assert prefix[i, t] == (demonstration and imitated[i // 3])
            assert kept[i, t] == (A[i, t] if demonstration == imitated[i // 3] else 0)


def test_hpt_reinforces_what_has_no_demonstration():
    """There is nothing to imitate, and the first completion is one of the policy like the others."""
    A, nothing = torch.ones(6, 4), torch.zeros_like(HYBRID_PREFIX)
    args = settings(hpt_gate=0.5, group_size=3)
    kept, prefix = luffy.hpt_gate(A, nothing, torch.tensor([[1.0, 0, 0]] * 2), args)
    assert (kept == 1).all() and (prefix == 0).all()


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_an_sft_loss_on_prefixes_is_a_mean_for_every_z(norm):
    """weight / Z is 1 / n on each of the n demonstration tokens, as in sft.py; others keep their A."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    prefix, args = mask * torch.tensor([[1], [1], [0]]), settings(demo_weight="sft", sft_coef=1)
    A, logp = torch.full((3, 4), 0.25), torch.full((3, 4), -0.5)
    inv_z = luffy.inverse_z(mask, norm, args.max_new_tokens)
    weight = luffy.demonstration_weight(A, logp, -logp, prefix, inv_z, 6, args)
    close((weight * inv_z)[prefix == 1], [1 / 6] * 6)
    assert (weight[prefix == 0] == 0.25).all()


def test_a_group_of_correct_answers_has_zero_variance_whatever_their_lengths(tiny, monkeypatch):
    """DAPO samples until 0 < correct < G. A length penalty alone does not keep a group."""
    texts = ["1 \\boxed{1}", "1 1 1 1 1 1 \\boxed{1}"]
    responses = [tok.encode_response(tiny[1], text) for text in texts]
    monkeypatch.setattr(grpo, "sample", lambda *_: (responses, responses))
    args = grpo.parse_args("--group-size 2 --overlong-tokens 20 --max-new-tokens 24".split())
    [group] = grpo.rollout(*tiny, [{"question": "a", "gold": "1"}], args)
    assert [c["correct"] for c in group] == [1, 1]
    assert group[0]["reward"] > group[1]["reward"]
    assert grpo.zero_variance_groups([group]) == [0]


@pytest.mark.parametrize("name", ["grpo", "prefix_rft", "luffy"])
def test_groups_all_correct_or_all_incorrect_are_replaced(name, run, tmp_path, monkeypatch):
    """Verdicts decide: the first group has equal rewards and stays, the others differ in reward."""
    script, asked, sampled, trained = SCRIPTS[name], [], [], []
    rollout, join = script.rollout, tok.join
    verdicts = [1, 0], [1, 1], [0, 0]
    rewards = [0, 0], [1, 0.5], [0, -0.5]

    def judged(model, tokenizer, rows, *more):
        groups = rollout(model, tokenizer, rows, *more)
        asked.append(len(rows))
        for group, correct, reward in zip(groups, verdicts, rewards):
            for i, completion in enumerate(group):
                completion |= {"correct": correct[i], "reward": reward[i]}
        sampled.extend(groups)
        return groups

    def remember(prompts, responses, device):
        trained[:] = responses
        return join(prompts, responses, device)

    monkeypatch.setattr(script, "rollout", judged)
    monkeypatch.setattr(tok, "join", remember)
    few = "--steps 1 --group-size 2 --batch-size 3 --eval-questions 1 --eval-samples 0 --dynamic-sampling 1"
    run(name, tmp_path / name, *few.split(), "--overlong-tokens", 20)
    assert asked == [3, 2]
    want = [completion["response"] for g in (0, 3, 4) for completion in sampled[g]]
    assert len(trained) == 6 and all(a is b for a, b in zip(trained, want))
    # the replaced groups were generated, too; copied tokens of a demonstration were not
    drawn = [len(c["response"]) - c.get("prefix_len", 0) for group in sampled for c in group]
    assert read_jsonl(tmp_path / name / "metrics.jsonl")[-1]["tokens_generated"] == sum(drawn)


# ---- the soft penalty on long responses ------------------------------------------------------------------


@pytest.mark.parametrize("script", [grpo, prefix_rft, luffy])
def test_soft_overlong_penalty(script, monkeypatch):
    """Budget 100, of which the last 20 are penalised: lengths 80, 90, 95, 100 cost 0, .25, .375, .5.

    DAPO's rewards are 1 and -1, twice as far apart as ours, and so is its penalty.
    """
    lengths, args = [80, 90, 95, 100], settings(max_new_tokens=100, overlong_tokens=20, group_size=4)
    responses = [[7] * n for n in lengths]
    monkeypatch.setattr(script, "sample", lambda *_: (responses, responses))
    monkeypatch.setattr(script, "math_reward", lambda texts, golds: [1.0, 1.0, 0.0, 1.0])
    known = {"stop_ids": [0], "encode_prompts": [[1]] * 4, "decode_responses": ["text"] * 4}
    for name, value in known.items():
        monkeypatch.setattr(script.tok, name, lambda *_, v=value: v)
    model, row = SimpleNamespace(config=None), {"question": "q", "gold": "1", "demonstrated": False}
    more = () if script is grpo else (1,)
    [group] = script.rollout(model, None, [row], *more, args)
    close([c["reward"] for c in group], [1, 0.75, -0.375, 0.5])


# ---- groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [grpo, prefix_rft, luffy])
def test_a_group_is_of_one_question(script, monkeypatch):
    """Three questions with four completions each: prompt, gold and question of a group belong together."""
    args = settings(group_size=4)
    rows = [{"question": f"{i}?", "gold": str(i), "demonstrated": False} for i in range(3)]
    monkeypatch.setattr(script, "sample", lambda model, tokenizer, prompts, *_: (prompts, prompts))
    monkeypatch.setattr(script.tok, "stop_ids", lambda *_: [99])
    monkeypatch.setattr(script.tok, "encode_prompts", lambda _, texts, *__: [[int(x[0])] for x in texts])
    monkeypatch.setattr(
        script.tok, "decode_responses", lambda _, responses: [f"#### {y[0]}" for y in responses]
    )
    groups = script.rollout(SimpleNamespace(config=None), None, rows, *([1] * (script is not grpo)), args)
    assert [[c["question"] for c in group] for group in groups] == [[f"{i}?"] * 4 for i in range(3)]
    assert [[c["response"] for c in group] for group in groups] == [[[i]] * 4 for i in range(3)]
    assert all(c["reward"] == 1 for group in groups for c in group)
