"""DPO and SimPO: worked examples, float64 gradients, pairs, log-probabilities of pi_0, resuming."""

import re
from math import exp, log
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, Killed, read_jsonl, same_metrics, same_weights, write_jsonl

import common.tokenization as tok
import dpo
from common.plumbing import models, runs
from common.plumbing.flags import BadInput

KEYS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


def settings(**changed):
    return SimpleNamespace(**dict(loss="dpo", beta=0.1, simpo_beta=2.0, simpo_margin=1.0) | changed)


def pair(chosen, rejected, lengths):
    """logp [2, T] with the given sums, spread unevenly over responses of the given lengths; the mask."""
    logp = torch.full((2, max(lengths) + 3), -7.0, dtype=torch.float64)
    mask = torch.zeros(2, max(lengths) + 3)
    for i, (total, n) in enumerate(zip((chosen, rejected), lengths)):
        share = torch.arange(1, n + 1, dtype=torch.float64)
        logp[i, 2 : 2 + n], mask[i, 2 : 2 + n] = total * share / share.sum(), 1
    return logp.requires_grad_(), mask


# -- the loss ---------------------------------------------------------------------------------------------


def test_dpo_values_of_worked_examples():
    logp, mask = pair(-20.0, -30.0, (10, 20))
    loss, reward = dpo.dpo_loss(logp, torch.tensor([-22.0, -28.0]), mask, 1, settings())
    assert loss.item() == pytest.approx(0.513015, abs=1e-5)
    assert (reward[0] - reward[1]).item() == pytest.approx(0.4, abs=1e-6)
    loss.backward()
    weight = -logp.grad  # gradient of - sum weight log pi
    assert weight[0][mask[0] == 1].tolist() == pytest.approx([0.040131] * 10, abs=1e-5)
    assert weight[1][mask[1] == 1].tolist() == pytest.approx([-0.040131] * 20, abs=1e-5)
    assert weight[mask == 0].abs().max() == 0


def test_simpo_values_of_worked_examples():
    logp, mask = pair(-20.0, -30.0, (10, 20))
    loss, reward = dpo.dpo_loss(logp, torch.tensor([5.0, 9.0]), mask, 1, settings(loss="simpo"))
    assert loss.item() == pytest.approx(2.126928, abs=1e-5)
    assert reward.tolist() == pytest.approx([-4.0, -3.0], abs=1e-6)
    loss.backward()
    assert -logp.grad[0, 2].item() == pytest.approx(0.176159, abs=1e-5)
    assert -logp.grad[1, 2].item() == pytest.approx(-0.088080, abs=1e-5)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_at_the_start_the_weight_is_half_beta(beta):
    logp, mask = pair(-3.0, -9.0, (4, 6))
    loss, reward = dpo.dpo_loss(logp, torch.tensor([-3.0, -9.0]), mask, 1, settings(beta=beta))
    loss.backward()
    assert reward.abs().max() < 1e-6 and loss.item() == pytest.approx(log(2))
    assert -logp.grad[0, 2].item() == pytest.approx(beta / 2)
    assert -logp.grad[1, 2].item() == pytest.approx(-beta / 2)


def plain_loss(logp, initial, mask, z, args):
    """Loss and token weights by the definition, in float64 and with loops."""
    loss, weight = 0.0, np.zeros_like(logp)
    for w in range(0, len(logp), 2):
        rewards, slopes = [], []
        for i in (w, w + 1):
            tokens = [t for t in range(logp.shape[1]) if mask[i, t]]
            total, n = sum(logp[i, t] for t in tokens), len(tokens)
            slope = args.beta if args.loss == "dpo" else args.simpo_beta / n
            rewards.append(args.beta * (total - initial[i]) if args.loss == "dpo" else slope * total)
            slopes.append(slope)
        h = rewards[0] - rewards[1] - (0 if args.loss == "dpo" else args.simpo_margin)
        loss += log(1 + exp(-h)) / z
        s = 1 / (1 + exp(h))
        weight[w], weight[w + 1] = mask[w] * slopes[0] * s / z, mask[w + 1] * -slopes[1] * s / z
    return loss, weight


@pytest.mark.parametrize("kind", ["dpo", "simpo"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_against_float64(kind, seed):
    rng = np.random.default_rng(seed)
    logp, initial = -rng.exponential(1.0, (6, 9)), -rng.exponential(8.0, 6)
    mask = (np.arange(9) >= 2) & (np.arange(9) < rng.integers(4, 10, (6, 1)))
    args = settings(loss=kind, beta=0.3, simpo_margin=0.7)
    want, weight = plain_loss(logp, initial, mask, 5, args)
    x = torch.tensor(logp, requires_grad=True)
    loss, _ = dpo.dpo_loss(x, torch.tensor(initial), torch.tensor(mask).long(), 5, args)
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=1e-9)
    np.testing.assert_allclose(-x.grad.numpy(), weight, atol=1e-9)


def test_the_weight_of_extreme_pairs_is_0_or_beta_and_the_loss_is_finite():
    for chosen, rejected, weight in ((-1.0, -5000.0, 0.0), (-5000.0, -1.0, 1.0)):
        logp, mask = pair(chosen, rejected, (3, 3))
        loss, _ = dpo.dpo_loss(logp, torch.tensor([-1.0, -1.0]), mask, 1, settings(beta=1.0))
        loss.backward()
        assert torch.isfinite(loss) and -logp.grad[0, 2].item() == pytest.approx(weight, abs=1e-6)


# -- pairs and the initial policy -------------------------------------------------------------------------


def fixed_samples(tokenizer, texts):
    """A stand-in for `sample`: texts[j] is the response to prompt j. One that ends in ... has no EOS."""
    ids = [tok.encode_response(tokenizer, t.removesuffix("...")) for t in texts]
    ids = [x[:-1] if t.endswith("...") else x for x, t in zip(ids, texts)]
    return lambda *_: (ids, [[0.0] * len(x) for x in ids])


def test_a_pair_is_a_correct_and_an_incorrect_sample_of_one_question(tiny, monkeypatch):
    model, tokenizer = tiny
    rows = datasets.Dataset.from_dict({"question": ["a", "b", "c"], "gold": ["1", "2", "3"]})
    texts = [  # k = 4 rounds of the three questions
        *("\\boxed{1}", "\\boxed{2}", "\\boxed{9}"),
        *("x \\boxed{5}", "so \\boxed{2}", "\\boxed{8}"),
        *("\\boxed{1}", "x \\boxed{7}", "\\boxed{9}"),
        *("y \\boxed{6}", "x \\boxed{7}...", "7 \\boxed{3}..."),  # truncated: neither chosen nor rejected
    ]
    monkeypatch.setattr(dpo, "sample", fixed_samples(tokenizer, texts))
    args = dpo.parse_args("--k 4".split())
    pairs, cost = dpo.sample_pairs(model, tokenizer, rows, args)
    assert pairs == [("a", "\\boxed{1}", "x \\boxed{5}"), ("b", "\\boxed{2}", "x \\boxed{7}")]
    assert cost == sum(map(len, dpo.sample()[0]))
    correct = ["\\boxed{1}", "\\boxed{2}", "\\boxed{3}"] * 4
    monkeypatch.setattr(dpo, "sample", fixed_samples(tokenizer, correct))
    with pytest.raises(BadInput, match="--k"):
        dpo.sample_pairs(model, tokenizer, rows, args)


def test_a_preference_set_is_used_as_it_is(tmp_path):
    lines = [{"prompt": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(3)]
    args = dpo.parse_args(["--pairs", write_jsonl(tmp_path / "p.jsonl", lines)])
    assert dpo.load_pairs(args) == [(f"q{i}", f"c{i}", f"r{i}") for i in range(3)]
    args = dpo.parse_args(["--pairs", write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "q", "chosen": "c"}])])
    with pytest.raises(BadInput, match="rejected"):
        dpo.load_pairs(args)


def sequence_logp(model, tokenizer, question, text, most=None):
    """log pi(y | x) of one response from a plain forward pass, EOS included; of its first tokens only."""
    prompt = tok.encode_prompts(tokenizer, [question])[0]
    response = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    ids = torch.tensor([prompt + response[:most]])
    with torch.no_grad():
        logp = model(ids).logits[0, :-1].double().log_softmax(-1)
    return logp.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()


@pytest.mark.parametrize("most", [3, 512])
def test_initial_log_probabilities_for_any_batch_size(most, tiny):
    """Of a response that is longer than --max-demo-tokens, as it is trained: truncated."""
    pairs = [
        ("What is 2?", "2 \\boxed{2}", "The answer is 3."),
        ("Compute 1 + 1.", "\\boxed{2}", "1 2 3 4 5"),
    ]
    for rows_at_once in (1, 3, 512):
        args = dpo.parse_args(f"--sample-rows {rows_at_once} --max-demo-tokens {most}".split())
        rows = dpo.with_initial_logp(*tiny, pairs, args)
        assert [r["solution"] for r in rows] == [text for p in pairs for text in p[1:]]
        for row in rows:
            want = sequence_logp(*tiny, row["question"], row["solution"], most)
            assert row["initial_logp"] == pytest.approx(want, abs=1e-3)


def test_kl_from_the_initial_policy(tiny):
    """It is 0 for the initial policy, and exact for another model and responses of one token."""
    model, tokenizer = tiny
    args = dpo.parse_args([])
    prompts = tok.encode_prompts(tokenizer, ["Compute 1 + 1."])
    other = models.load_model(f"{ROOT}/tiny/model")[0]
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
        first = [m(torch.tensor(prompts)).logits[0, -1].double().log_softmax(-1) for m in (model, other)]
    words = range(len(first[0]))

    def kl(m, some):
        """Of responses of one token each, weighted equally."""
        _, mask = tok.join(prompts * len(some), [[i] for i in some])
        initial = tok.align([[first[0][i].item()] for i in some], mask).tolist()  # as state.json has it
        return dpo.kl_from_initial(m, prompts * len(some), [[i] for i in some], initial, args).item()

    assert abs(kl(model, words)) < 1e-6
    # by enumeration: the mean of k3 under pi_0 is the KL
    each = [kl(other, [i]) for i in words]
    exact = (first[0].exp() * (first[0] - first[1])).sum().item()
    assert exact > 1e-3
    assert (first[0].exp() * torch.tensor(each)).sum().item() == pytest.approx(exact, rel=1e-3)


# -- the script -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(small):
    def go(out, *more):
        base = ("--k", 8, "--pair-questions", 30, "--max-new-tokens", 40, "--steps", 6)
        dpo.main(dpo.parse_args(small("dpo", out, *base, *more)))
        return out

    return go


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("dpo") / "run")


def test_a_run(whole):
    evaluated, made, *lines = read_jsonl(whole / "metrics.jsonl")
    samples = read_jsonl(whole / "samples.jsonl")
    assert evaluated["step"] == made["step"] == 0 and [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6]
    assert len(samples) > 16 and made["tokens_generated"] > 1000
    first = lines[0]
    assert first["loss"] == pytest.approx(log(2), abs=1e-4)  # before any update: h = 0
    assert all(abs(first[key]) < 1e-3 for key in KEYS[:3])
    late = lines[3:]
    assert sum(x["reward_margin"] for x in late) > 0.1 and lines[-1]["kl"] > 0  # margins and KL grow
    assert sum(x["loss"] for x in late) / len(late) < first["loss"]


@pytest.mark.parametrize("stop", [0, 2])
def test_an_interrupted_run_resumes_with_the_same_bits_and_samples_nothing(
    whole, train, tmp_path, stop, monkeypatch
):
    log = runs.log

    def dies(out, metrics, samples=()):
        if metrics["step"] == stop + 1:
            raise Killed
        log(out, metrics, samples)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(runs, "log", dies)
        train(tmp_path / "run")
    with monkeypatch.context() as m:
        m.setattr(dpo, "sample_pairs", None)  # would be a TypeError
        train(tmp_path / "run", "--resume")
    same_metrics(whole, tmp_path / "run")
    same_weights(whole / "final", tmp_path / "run" / "final")
    assert (whole / "samples.jsonl").read_text() == (tmp_path / "run" / "samples.jsonl").read_text()


@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_micro_batches_change_no_gradient(train, tmp_path, kind):
    more = ("--steps", 2, "--save-every", 0, "--loss", kind, "--lr", 1e-4)
    a = train(tmp_path / "a", *more)
    b = train(tmp_path / "b", *more, "--micro-batch-tokens", 1)
    a, b = (read_jsonl(x / "metrics.jsonl")[-1] for x in (a, b))
    for key in ("loss", "grad_norm", "tokens_trained", *KEYS):
        assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5)


def test_a_preference_set_end_to_end(train, tmp_path):
    pairs = read_jsonl(ROOT / "tiny/preferences/train.jsonl")[:10]
    file = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    out = train(tmp_path / "run", "--pairs", file, "--loss", "simpo", "--steps", 2)
    lines = read_jsonl(out / "samples.jsonl")
    stored = [row["solution"] for row in lines if row.get("kind") != "evaluation"]
    assert stored == [text for p in pairs for text in (p["chosen"], p["rejected"])]
    assert read_jsonl(out / "metrics.jsonl")[-1]["step"] == 2


# -- the recipes of the page ------------------------------------------------------------------------------

SIMPO = {  # beta, margin / beta, learning rate: the table of the authors' README
    "Mistral-Base": (2.0, 0.8, 3e-7),
    "Mistral-Instruct": (2.5, 0.1, 5e-7),
    "Llama3-Base": (2.0, 0.5, 6e-7),
    "Llama3-Instruct": (2.5, 0.55, 1e-6),
}


def test_the_recipe_of_simpo_is_a_row_of_its_table():
    page = (ROOT / "docs/methods/dpo.md").read_text().replace("\\\n", " ")
    [recipe] = re.findall(r"^python dpo.py (.* --simpo-beta .*)$", page, re.M)
    args = dpo.parse_args(recipe.split())
    assert (args.loss, args.schedule, args.batch_size) == ("simpo", "cosine", 128)
    row = (args.simpo_beta, args.simpo_margin / args.simpo_beta, args.lr)
    assert row == pytest.approx(SIMPO["Llama3-Instruct"])
