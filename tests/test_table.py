"""The table of the README: weight, mask and Z of each script, read back from autograd."""

import re
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import dpo
import grpo
import idft_hinted
import luffy
import opsd
import prefix_rft
import rft_rejection
import rlhf_ppo
import sft
from experiments.weights import curves, read

# what the tests below check; a new wording of a cell needs a new look at its test
TABLE = {
    "sft.py": ("1", "response", "tokens of the global batch", "test_weight_of_sft"),
    "rft_rejection.py": ("1", "response", "tokens", "test_weight_of_sft"),
    "idft_hinted.py": (
        "p^γ, γ = clamp(e^−φ, .1, 2), φ = log p + H",
        "response",
        "tokens",
        "test_weight_of_idft",
    ),
    "dpo.py": ("± β σ(−h) (SimPO: divided by the length)", "response", "pairs", "test_weight_of_dpo"),
    "grpo.py": (
        "I_clip · r · A + β(π_ref/π − 1)",
        "response",
        "sequences × budget, or tokens, or sequences × length",
        "test_weight_of_grpo",
    ),
    "prefix_rft.py": (
        "I_clip · r · A on both parts",
        "on-policy tokens, and of the prefix the 20 % of highest entropy",
        "as in GRPO",
        "test_weight_of_prefix_rft",
    ),
    "luffy.py": (
        "I_clip · r · A, on the demonstration A · 0.1 p/(p + 0.1)²",
        "response, demonstration",
        "as in GRPO",
        "test_weight_of_a_relative_of_luffy",
    ),
    "opsd.py": (
        "I_clip · r · A_t, A_t = log π_T/π_old, where π_T = π_ref with the solution in its prompt",
        "response",
        "sequences × length",
        "test_weight_of_opsd",
    ),
    "rlhf_ppo.py": (
        "I_clip · r · A_t, whitened, of a critic: GAE of a reward model's score − β log π_old/π_ref",
        "response",
        "tokens",
        "test_weight_of_rlhf",
    ),
}


# the tables of relatives in docs/methods; each row has its check in a test with the script's name
RELATIVES = {
    "grpo": {
        "--advantage maxrl": "I_clip · r · A / mean(R)",
        "--ratio sequence": "I_clip · s · A, where s = exp(mean log r) of the response",
        "--clip cispo": "clip(r) · A",
        "--tis-cap C": "min(π_old/π_sampler, C) · I_clip · r · A",
    },
    "luffy": {
        "--demo-weight luffy": "A · 0.1 p/(p + 0.1)²",
        "--demo-weight sft": "c · Z/n",
        "--demo-weight chord": "c · Z/n · p(1 − p)",
        "--demo-weight srft": "A · 0.1 p/(p + 0.1)² + c · Z/n · 0.5 e^(−H)",
        "--demo-weight sft --hpt-gate 0": "c · Z/n where no on-policy completion is correct, else 0",
        "--demo-weight sft --uft-steps 300 --hybrids 4": "c · Z/n in each of four completions",
    },
}


@pytest.mark.parametrize("name", RELATIVES)
def test_the_tables_of_relatives_say_what_is_checked_here(name):
    page = (ROOT / f"docs/methods/{name}.md").read_text()
    section = re.search(r"^### Relatives$(.*?)^#", page, re.M | re.S)[1]
    rows = re.findall(r"^\| `(--[^`]+)` \| [^|]+ \| ([^|]+) \|$", section, re.M)
    assert dict(rows) == RELATIVES[name]


def test_the_table_says_what_is_checked_here():
    rows = re.findall(
        r"^\| `(\w+\.py)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    assert {name: tuple(cells) for name, *cells in rows} == {name: row[:3] for name, row in TABLE.items()}
    assert all(row[3] in globals() for row in TABLE.values())


def on_two_tokens(loss_of):
    """- mask weight / Z and logp of four rows of six tokens, for a vocabulary of two."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 6, 2, generator=g, dtype=torch.float64)
    return read(loss_of, logits, torch.randint(2, (4, 6), generator=g))


def settings(**changed):
    """The defaults of prefix_rft.py, which has all of them; some changed."""
    return SimpleNamespace(**vars(prefix_rft.parse_args([])) | changed)


def close(got, want):
    torch.testing.assert_close(got, torch.as_tensor(want).double().expand_as(got), rtol=1e-6, atol=1e-7)


TWO_MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
TWO_A = torch.tensor([[0.75], [-0.25], [-0.25], [-0.25]], dtype=torch.float64) * TWO_MASK


@pytest.mark.parametrize("script", [sft, rft_rejection])
def test_weight_of_sft(script):
    factor, _ = on_two_tokens(lambda logp, _: script.sft_loss(logp, TWO_MASK, TWO_MASK.sum()))
    close(factor, -TWO_MASK * 1 / 13)


@pytest.mark.parametrize(
    "how, z", [("sequence", [12, 16, 4, 20]), ("token", [13] * 4), ("constant", [400] * 4)]
)
def test_weight_of_grpo(how, z):
    """I_clip r A + beta (pi_ref / pi - 1)."""
    shift = torch.linspace(0.5, -0.5, 24, dtype=torch.float64).view(6, 4).T  # log r

    def loss(logp, _):
        old, ref = logp.detach() - shift, logp.detach() + 0.3
        inv_z = grpo.inverse_z(TWO_MASK, how, 100).double()
        return grpo.policy_loss(logp, old, ref, TWO_A, TWO_MASK, inv_z, settings(kl_coef=0.1))[0]

    factor, _ = on_two_tokens(loss)
    r = shift.exp()
    inside = torch.where(TWO_A > 0, r <= 1.2, r >= 0.8)
    assert {0, 1} == set(inside[TWO_A > 0].int().tolist()) == set(inside[TWO_A < 0].int().tolist())
    close(factor, -TWO_MASK * (inside * r * TWO_A + 0.1 * (exp(0.3) - 1)) / torch.tensor(z)[:, None])


@pytest.mark.parametrize("flag", [flag for flag in RELATIVES["grpo"] if "tis" not in flag])
def test_weight_of_a_relative_of_grpo(flag):
    """Beside the factor that the flag changes, everything is as in the row of grpo.py."""
    args = grpo.parse_args(flag.split())
    shift = torch.linspace(1, -1, 24, dtype=torch.float64).view(6, 4).T  # log r
    rewards = torch.tensor([[1.0, 0, 0, 0]])
    A = grpo.advantages(rewards, args.advantage).double().view(4, 1) * TWO_MASK

    def loss(logp, _):
        inv_z = grpo.inverse_z(TWO_MASK, "sequence", 100).double()
        return grpo.policy_loss(logp, logp.detach() - shift, logp.detach(), A, TWO_MASK, inv_z, args)[0]

    factor, _ = on_two_tokens(loss)
    want = torch.zeros(4, 6, dtype=torch.float64)
    cases = set()
    for i in range(4):
        on = [t for t in range(6) if TWO_MASK[i, t]]
        for t in on:
            r, a = exp(shift[i, t]), (0.75 if i == 0 else -0.25)
            if flag == "--advantage maxrl":
                a /= 0.25 + 1e-6  # the mean reward
            if flag == "--ratio sequence":
                r = exp(sum(shift[i, u].item() for u in on) / len(on))
            inside = r <= 1.2 if a > 0 else r >= 0.8
            want[i, t] = min(max(r, 0.8), 1.2) * a if flag == "--clip cispo" else inside * r * a
            cases.add((a > 0, inside))
    assert len(cases) >= 3  # of A > 0 and A < 0, inside and outside the trust region
    close(factor, -want / torch.tensor([12, 16, 4, 20])[:, None])


def test_weight_of_tis(run, tmp_path, monkeypatch):
    """What main multiplies A with, where the sampler had e^-d times the probability: min(e^d, C)."""
    rollout, policy_loss, seen = grpo.rollout, grpo.policy_loss, []
    shifts = [0.4, -0.4, 0.1, 2.0]

    def shifted(*args):
        groups = rollout(*args)
        for i, completion in enumerate(c for group in groups for c in group):
            completion["sampled_logp"] = [x - shifts[i] for x in completion["sampled_logp"]]
        return groups

    def remember(logp, old, ref, A, mask, *more):
        assert not A.requires_grad
        seen.extend(row[on.bool()] for row, on in zip(A, mask))
        return policy_loss(logp, old, ref, A, mask, *more)

    monkeypatch.setattr(grpo, "rollout", shifted)
    monkeypatch.setattr(grpo, "policy_loss", remember)
    monkeypatch.setattr(grpo, "advantages", lambda rewards, how: torch.ones_like(rewards))
    few = "--steps 1 --batch-size 1 --group-size 4 --eval-questions 1 --eval-samples 0 --tis-cap 1.5"
    run("grpo", tmp_path / "run", *few.split())
    assert len(seen) == 4 and all(row.max() - row.min() < 1e-4 for row in seen)
    weights = sorted(row.mean().item() for row in seen)
    assert weights == pytest.approx([exp(-0.4), exp(0.1), exp(0.4), 1.5], rel=1e-4)


@pytest.mark.parametrize("flags", RELATIVES["luffy"])
def test_weight_of_a_relative_of_luffy(flags):
    """Two groups of two. Demonstrations have 2 and 1 of 13 tokens; with --hybrids 4 all of one group, 7."""
    args = luffy.parse_args(f"{flags} --sft-coef 0.3 --loss-norm token".split())
    args.group_size = 4 if args.hybrids == 4 else 2
    hybrid = torch.tensor([[1], [0], [1], [0]]) if args.hybrids == 1 else torch.ones(4, 1, dtype=torch.long)
    prefix = TWO_MASK * (TWO_MASK.cumsum(1) <= 2) * hybrid
    correct = torch.tensor([[1.0, 0], [1, 1]]).view(-1, args.group_size)
    seen = []

    def loss(logp, entropy):
        seen.append(entropy.detach())
        A, imitated = TWO_A, prefix
        if args.hpt_gate >= 0:
            A, imitated = luffy.hpt_gate(A, prefix, correct, args)
        inv_z, now = luffy.inverse_z(TWO_MASK, "token", 100), logp.detach()
        n = imitated.sum()
        A = luffy.demonstration_weight(A, now, entropy.detach(), imitated, inv_z, n, args)
        return luffy.policy_loss(logp, now, now, A, TWO_MASK, inv_z, args)[0]

    factor, logp = on_two_tokens(loss)
    n = 7 if args.hybrids == 4 else 2 if "hpt" in flags else 3  # HPT imitates one of the two questions
    sft, want = 0.3 * 13 / n, TWO_A.clone()
    for i, t in prefix.nonzero().tolist():
        p, A, on = exp(logp[i, t]), TWO_A[i, t].item(), prefix[i].bool()
        H = seen[0][i, on].mean().item()
        how = flags.split()[1]
        shaped = A * 0.1 * p / (p + 0.1) ** 2
        srft = shaped + sft * 0.5 * exp(-H)
        want[i, t] = {"luffy": shaped, "sft": sft, "chord": sft * p * (1 - p), "srft": srft}[how]
    if "hpt" in flags:  # the first question is imitated, the second is reinforced
        want[:2] *= prefix[:2]
        want[2:] *= 1 - prefix[2:]
    close(factor, -TWO_MASK * want / 13)


def test_weight_of_prefix_rft():
    """A on the kept prefix tokens and on on-policy tokens, 0 on other prefix tokens; Z does not change."""
    prefix = TWO_MASK * (TWO_MASK.cumsum(1) <= 2) * torch.tensor([[1], [0], [0], [1]])  # 2 + 2 tokens
    entropy = torch.arange(24, dtype=torch.float64).view(4, 6)  # of the four, row 3 has the two largest
    args = settings(prefix_entropy_keep=0.5, loss_norm="token")

    def loss(logp, _):
        A = prefix_rft.prefix_weight(TWO_A, entropy, prefix, args)
        inv_z = prefix_rft.inverse_z(TWO_MASK, "token", 100)
        return prefix_rft.policy_loss(logp, logp.detach(), logp.detach(), A, TWO_MASK, inv_z, args)[0]

    factor, _ = on_two_tokens(loss)
    kept = torch.zeros(4, 6)
    kept[3, 1:3] = 1
    close(factor, -TWO_MASK * torch.where(prefix == 1, TWO_A * kept, TWO_A) / 13)


def test_weight_of_opsd():
    """I_clip r A_t, a number of each token; the teacher's numbers are two positions further right."""
    shift = torch.linspace(0.5, -0.5, 24, dtype=torch.float64).view(6, 4).T  # log r
    g = torch.Generator().manual_seed(4)
    to_teacher = torch.randn(4, 6, generator=g, dtype=torch.float64)  # log pi_T - log pi_old
    to_hinted = lambda x: torch.nn.functional.pad(x, (2, 0))  # noqa: E731
    args = opsd.parse_args([])

    def loss(logp, _):
        old = logp.detach() - shift
        A = opsd.token_advantages(to_hinted(old + to_teacher), to_hinted(TWO_MASK), old, TWO_MASK)
        inv_z = opsd.inverse_z(TWO_MASK, args.loss_norm, 100).double()
        return opsd.policy_loss(logp, old, logp.detach(), A, TWO_MASK, inv_z, args)[0]

    factor, _ = on_two_tokens(loss)
    inside = torch.where(to_teacher > 0, shift.exp() <= 1.2, shift.exp() >= 0.8)
    for sign in (to_teacher > 0, to_teacher < 0):
        assert {0, 1} == set(inside[sign & TWO_MASK.bool()].int().tolist())
    length = torch.tensor([3, 4, 1, 5])[:, None]
    close(factor, -TWO_MASK * inside * shift.exp() * to_teacher / (4 * length))


@pytest.mark.parametrize("how", ["sft", "dft", "eaft", "idft"])
def test_weight_of_idft(how):
    """IDFT: p^gamma; SFT, DFT, EAFT: 1, p, H / log V."""
    args, seen = idft_hinted.parse_args(["--weight", how]), []

    def loss(logp, entropy):
        seen.append(entropy.detach())
        return idft_hinted.idft_loss(logp, entropy, TWO_MASK, TWO_MASK.sum(), 2, args)

    factor, logp = on_two_tokens(loss)
    p, H = logp.exp(), seen[0]
    gamma = torch.exp(-(logp + H)).clip(0.1, 2)
    want = {"sft": torch.ones_like(p), "dft": p, "eaft": H / log(2), "idft": p**gamma}[how]
    close(factor, -TWO_MASK * want / 13)


@pytest.mark.parametrize("how", ["dpo", "simpo"])
def test_weight_of_dpo(how):
    """beta sigmoid(-h), positive for the chosen and negative for the rejected response; SimPO: / |y|."""
    initial = torch.tensor([-2.0, -1.0, -0.5, -3.0], dtype=torch.float64)
    args = dpo.parse_args(["--loss", how, "--beta", "0.3"])
    factor, logp = on_two_tokens(lambda logp, _: dpo.dpo_loss(logp, initial, TWO_MASK, 2, args)[0])
    whole, length = (logp * TWO_MASK).sum(1), TWO_MASK.sum(1)
    scale = torch.full((4,), 0.3) if how == "dpo" else 2.0 / length
    reward = scale * (whole - initial if how == "dpo" else whole)
    for i in (0, 2):
        slope = torch.sigmoid(-(reward[i] - reward[i + 1] - (0.0 if how == "dpo" else 1.0)))
        for j, sign in ((i, 1), (i + 1, -1)):
            close(factor[j], -TWO_MASK[j] * sign * scale[j] * slope / 2)


def test_weight_of_rlhf():
    """I_clip r A_t: A_t is the sum of lambda^l delta_t+l over later tokens, whitened over the batch."""
    g = torch.Generator().manual_seed(2)
    score, on = torch.tensor([1.0, -0.5, 0.25, 2.0]), TWO_MASK.bool()
    value, log_ratio = torch.randn(2, 4, 6, generator=g) * TWO_MASK
    ends = [3, 5, 1, 5]
    reward = -0.2 * log_ratio
    reward[range(4), ends] += score
    want = torch.zeros(4, 6)
    for i in range(4):
        at = [t for t in range(6) if on[i, t]]
        for n, t in enumerate(at):
            for k, u in enumerate(at[n:]):
                after = value[i, u + 1] if u != at[-1] else 0.0
                want[i, t] += 0.95**k * (reward[i, u] + after - value[i, u])
    want[on] = (want[on] - want[on].mean()) / want[on].std()
    per_token = score[:, None] * rlhf_ppo.last_token(TWO_MASK) - 0.2 * log_ratio
    A, _ = rlhf_ppo.gae(per_token, value, TWO_MASK, 0.95)
    A[on] = rlhf_ppo.advantages(A[on].view(1, -1), "grpo")[0]
    shift = torch.linspace(0.5, -0.5, 24, dtype=torch.float64).view(6, 4).T  # log r
    args = rlhf_ppo.parse_args(["--kl-coef", "0"])

    def loss(logp, _):
        inv_z = rlhf_ppo.inverse_z(TWO_MASK, "token", 100)
        return rlhf_ppo.policy_loss(logp, logp.detach() - shift, logp.detach(), A, TWO_MASK, inv_z, args)[0]

    factor, _ = on_two_tokens(loss)
    inside = torch.where(want > 0, shift.exp() <= 1.2, shift.exp() >= 0.8)
    assert {0, 1} == set(inside[want > 0].int().tolist()) == set(inside[want < 0].int().tolist())
    torch.testing.assert_close(
        factor, (-TWO_MASK * inside * shift.exp() * want / 13).double(), rtol=1e-4, atol=1e-5
    )


def test_the_curves_of_the_figure():
    """Values computed by hand and from the papers."""
    at = {name: weight.tolist() for name, weight in curves(torch.tensor([0.1, 0.5, 0.9])).items()}
    assert at["SFT"] == [1, 1, 1] and at["DFT"] == pytest.approx([0.1, 0.5, 0.9])
    assert at["LUFFY"] == pytest.approx([0.25, 0.05 / 0.36, 0.09])  # its peak is at gamma = .1
    assert at["GRPO, clipped"] == pytest.approx([0.2, 1, 0])  # r = p / .5, and nothing beyond 1.2
    assert at["DPO, chosen"] == pytest.approx([0.5 / 0.6, 0.5, 0.5 / 1.4])  # 1 / (1 + p / .5)
    assert at["EAFT"][1] == pytest.approx(1) and at["IDFT"][1] == pytest.approx(0.5)
