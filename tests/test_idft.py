"""IDFT and hinted decoding: worked examples, float64 gradients, decoding against a plain loop, SFT."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, killed_after, read_jsonl, same_metrics, same_weights, weights, write_jsonl
from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma3Config

import common.tokenization as tok
import idft_hinted as idft
import sft
from tiny.world import HINT


def settings(weight):
    return SimpleNamespace(weight=weight)


# -- the loss ---------------------------------------------------------------------------------------------

VECTORS = [  # logits, y; then phi, and weight and loss of SFT, DFT, IDFT, EAFT
    ([2, 0, 0, 0], 0, 0.577531, (1, 0.340753), (0.711235, 0.242355), (0.825919, 0.281434), 0.662402),
    ([0, 0, 0, 0], 2, 0.0, (1, 1.386294), (0.25, 0.346574), (0.25, 0.346574), 1.0),
    ([3, 1, 0, -1], 3, -3.590096, (1, 4.185182), (0.015219, 0.063696), (0.000232, 0.000969), 0.429264),
]


@pytest.mark.parametrize("logits, y, phi, as_sft, as_dft, as_idft, as_eaft", VECTORS)
def test_values_of_worked_examples(logits, y, phi, as_sft, as_dft, as_idft, as_eaft):
    all_logp = torch.tensor(logits).double().log_softmax(-1)
    entropy = -(all_logp.exp() * all_logp).sum().view(1, 1)
    assert (all_logp[y] + entropy).item() == pytest.approx(phi, abs=1e-5)
    eaft = (as_eaft, -as_eaft * all_logp[y].item())
    for kind, (weight, value) in {"sft": as_sft, "dft": as_dft, "idft": as_idft, "eaft": eaft}.items():
        logp = all_logp[y].view(1, 1).clone().requires_grad_()
        loss = idft.idft_loss(logp, entropy, torch.ones(1, 1), 1, 4, settings(kind))
        loss.backward()
        assert loss.item() == pytest.approx(value, abs=1e-5)
        assert -logp.grad.item() == pytest.approx(weight, abs=1e-5)


def plain(logits, y, mask, z, kind):
    """Loss and gradient by the logits in float64, from the definition: the weight is a constant."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    loss, gradient = 0.0, np.zeros_like(logits)
    for i, t in np.ndindex(y.shape):
        if not mask[i, t]:
            continue
        q = p[i, t]
        logp, entropy = np.log(q[y[i, t]]), -(q * np.log(q)).sum()
        gamma = min(max(np.exp(-(logp + entropy)), 0.1), 2.0)
        power = {"sft": 0.0, "dft": 1.0, "idft": gamma, "eaft": None}[kind]
        weight = entropy / np.log(len(q)) if power is None else q[y[i, t]] ** power
        loss -= weight * logp / z
        gradient[i, t] = weight * (q - np.eye(len(q))[y[i, t]]) / z
    return loss, gradient


@pytest.mark.parametrize("kind", ["sft", "dft", "eaft", "idft"])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_against_float64(kind, seed):
    """The gradient goes through log p alone: neither through p^gamma nor through H."""
    rng = np.random.default_rng(seed)
    logits, y, mask = rng.normal(0, 2, (3, 5, 7)), rng.integers(0, 7, (3, 5)), rng.random((3, 5)) < 0.7
    want, gradient = plain(logits, y, mask, 11, kind)
    x = torch.tensor(logits, requires_grad=True)
    all_logp = x.log_softmax(-1)
    logp = all_logp.gather(-1, torch.tensor(y)[..., None])[..., 0]
    entropy = -(all_logp.exp() * all_logp).sum(-1)
    loss = idft.idft_loss(logp, entropy, torch.tensor(mask), 11, 7, settings(kind))
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), gradient, atol=1e-7)  # log V is fp32


def test_eaft_has_two_published_forms_which_the_tiny_world_cannot_tell_apart(tiny):
    """Ours is the IDFT authors' H / log V; EAFT's authors take the 20 most likely tokens over log 20.

    Up to a factor, which Adam removes, they are the same on demonstrations of the tiny world.
    """
    model, tokenizer = tiny
    rows = read_jsonl(ROOT / "tiny/data/train.jsonl")[:64]
    prompts = tok.encode_prompts(tokenizer, [row["question"] for row in rows])
    responses = [tok.encode_response(tokenizer, row["solution"]) for row in rows]
    tokens, mask = tok.join(prompts, responses, model.device)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1][mask[:, 1:].bool()].double()  # [tokens, V]
    all_logp = logits.log_softmax(-1)
    entropy = -(all_logp.exp() * all_logp).sum(-1)
    logp = torch.zeros_like(entropy).requires_grad_()
    idft.idft_loss(logp, entropy, torch.ones_like(entropy), 1, 479, settings("eaft")).backward()
    top = logits.topk(20).values.log_softmax(-1)
    theirs = -(top.exp() * top).sum(-1) / 3.0
    assert torch.corrcoef(torch.stack([-logp.grad, theirs]))[0, 1] > 0.9998
    ratio = -logp.grad.sum() / theirs.sum()
    assert ratio.item() == pytest.approx(3.0 / np.log(479), rel=0.05)  # half as large


def test_gamma_0_is_sft_and_gamma_1_is_dft():
    torch.manual_seed(0)
    logp, entropy = -torch.rand(4, 6).double() * 5, torch.rand(4, 6).double()
    mask = torch.ones(4, 6)
    mask[:, 3:] = 0
    loss = {k: idft.idft_loss(logp, entropy, mask, 8, 9, settings(k)) for k in ("sft", "dft")}
    assert torch.equal(loss["sft"], sft.sft_loss(logp, mask, 8))
    assert torch.equal(loss["dft"], -(logp.exp() * logp * mask).sum() / 8)


def test_phi_has_mean_zero_on_on_policy_samples_only(tiny):
    """Samples of a lower temperature have a mean above 0, those of a higher one below."""
    args = idft.parse_args(["--max-new-tokens", "60"])
    questions = ["Compute 3 + 4.", "Ann has 3 coins, gets 4. How many coins?"] * 200
    prompts = tok.encode_prompts(tiny[1], questions)
    torch.manual_seed(0)
    z = {}
    for temperature in (0.3, 1.0, 1.6):
        own, _ = idft.sample(*tiny, prompts, temperature, args)
        phi = idft.centered(tiny[0], prompts, own, args)
        z[temperature] = (phi.mean() / phi.std() * len(phi) ** 0.5).item()
    assert abs(z[1.0]) < 3 and z[0.3] > 5 and z[1.6] < -5, z


# -- hinted decoding --------------------------------------------------------------------------------------


def test_mixture_of_a_worked_example():
    log_p, log_q = (torch.tensor([x]).float().log_softmax(-1) for x in ([4, 0, 0, 0], [0, 2, 0, 0]))
    m = idft.mixture(log_p, log_q, 3.0).softmax(-1)[0]
    assert m.tolist() == pytest.approx([0.5258, 0.2885, 0.0929, 0.0929], abs=5e-5)
    assert torch.equal(idft.mixture(log_p, log_q, 0.0), log_p)  # beta = 0: the hinted stream alone
    assert idft.mixture(log_p, log_q, 0.0).exp()[0].tolist() == pytest.approx(
        [0.9479] + [0.0174] * 3, abs=5e-5
    )
    lam = 0.56660  # exactly beta H(p) / log V, also with a row beside it
    rows = idft.mixture(log_p.repeat(2, 1), log_q.repeat(2, 1), 3.0)
    torch.testing.assert_close(rows[1], ((1 - lam) * log_p + lam * log_q)[0], atol=1e-4, rtol=0)


def test_with_an_uncertain_hinted_stream_the_student_decides_alone():
    log_p, log_q = torch.zeros(1, 4).log_softmax(-1), torch.tensor([[3.0, 1, 0, 0]]).log_softmax(-1)
    for beta in (1.0, 50.0):  # lam is at most 1
        torch.testing.assert_close(idft.mixture(log_p, log_q, beta), log_q)


def plain_decoding(model, tokenizer, hinted, student, beta, budget):
    """One pair of prompts without cache and batch: the most likely token of m at every step."""
    out, stops = [], tok.stop_ids(tokenizer, model.config)
    with torch.no_grad():
        for t in range(budget):
            p, q = (
                model(torch.tensor([x + out])).logits[0, -1].float().log_softmax(-1)
                for x in (hinted, student)
            )
            entropy = -(p.exp() * p).sum()
            lam = min(1.0, (beta * entropy / np.log(len(p))).item()) if t else 0.0
            lam = 1.0 if "\\boxed{" in tokenizer.decode(out) else lam
            out.append(int(((1 - lam) * p + lam * q).argmax()))
            if out[-1] in stops:
                break
    return out


@pytest.fixture(scope="module")
def contexts(tiny):
    """Prompts of both contexts. The demonstrations belong to other questions, so the streams disagree."""
    rows = read_jsonl(ROOT / "tiny/data/test.jsonl")[:4]
    hints = [
        HINT.format(question=row["question"], solution=other["solution"])
        for row, other in zip(rows, rows[1:] + rows[:1])
    ]
    return [tok.encode_prompts(tiny[1], texts) for texts in (hints, [row["question"] for row in rows])]


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_rewrite_against_a_plain_loop(tiny, contexts, beta, monkeypatch):
    """Caches, left padding, finished rows and batches change nothing."""
    args = idft.parse_args(f"--beta {beta} --max-new-tokens 20 --sample-rows 3".split())
    # without noise the most likely token is drawn
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, generator: x.fill_(1.0))
    got = idft.rewrite(*tiny, *contexts, args)
    want = [plain_decoding(*tiny, h, s, beta, 20) for h, s in zip(*contexts)]
    assert got == want
    assert len({len(x) for x in want}) > 1  # rows finish at different steps
    if beta == 3:  # the mixture differs from the hinted stream
        assert want != [plain_decoding(*tiny, h, s, 0.0, 20) for h, s in zip(*contexts)]


HINTED, STUDENT = 301, 302  # the only token of a prompt in either context


class Fixed(torch.nn.Module):
    """A model whose logits depend on the context and on the number of tokens written.

    Its keys are the token ids, so it finds its context in the cache, as attention would.
    """

    device = torch.device("cpu")

    def __init__(self, config, hinted, student):
        super().__init__()
        self.config, self.hinted, self.student = config, hinted, student

    def forward(self, ids, position_ids, past_key_values, **_):
        keys = ids[:, None, :, None].float()  # [B, heads, T, D]
        for layer in range(self.config.num_hidden_layers):
            seen, _ = past_key_values.update(keys, keys, layer)
        is_hinted = (seen == HINTED).flatten(1).any(1)
        logits = []
        for hinted, written in zip(is_hinted, position_ids[:, -1].tolist()):
            table = self.hinted if hinted else self.student
            logits.append(table[min(written, len(table) - 1)])
        return SimpleNamespace(logits=torch.stack(logits)[:, None])


def drawn(tiny, hinted, student, n, beta=0.0, budget=2):
    """The tokens of n rows, [n, budget], -1 after the end; the logits never change."""
    config = tiny[0].config
    args = idft.parse_args(f"--beta {beta} --max-new-tokens {budget} --sample-rows {n}".split())
    torch.manual_seed(0)
    model = Fixed(config, [hinted], [student])
    rows = idft.rewrite(model, tiny[1], [[HINTED]] * n, [[STUDENT]] * n, args)
    return torch.tensor([x + [-1] * (budget - len(x)) for x in rows])


def table(tiny, p):
    """Logits with these probabilities; all other tokens have nearly none."""
    logits = torch.full((tiny[0].config.vocab_size,), -30.0)
    for token, probability in p.items():
        logits[token] = np.log(probability)
    return logits


def test_nucleus_then_temperature(tiny):
    """Of .6, .3, .06 and .04 the first three make up .95; they are drawn in proportion to p^(1/0.3)."""
    logits = table(tiny, {400: 0.6, 401: 0.3, 402: 0.06, 403: 0.04})
    got = drawn(tiny, logits, logits, 6000, budget=1)[:, 0]
    power = np.array([0.6, 0.3, 0.06]) ** (1 / 0.3)
    shares = [(got == token).float().mean().item() for token in (400, 401, 402, 403)]
    assert shares[:3] == pytest.approx(power / power.sum(), abs=0.02) and shares[3] == 0
    assert sum(shares) == pytest.approx(1)


def test_a_token_of_probability_0_99_is_the_nucleus(tiny):
    logits = table(tiny, {400: 0.99, 401: 0.01})
    assert (drawn(tiny, logits, logits, 50, budget=1) == 400).all()


def test_the_first_token_comes_from_the_hinted_stream(tiny):
    """The hinted stream is uncertain and beta is 30: from the second token on the student decides."""
    hinted = table(tiny, {400: 0.5, 401: 0.5})
    got = drawn(tiny, hinted, table(tiny, {410: 1.0}), 60, beta=30)
    assert set(got[:, 0].tolist()) == {400, 401} and (got[:, 1] == 410).all()


def test_the_student_alone_writes_the_answer(tiny):
    """With beta 0 the hinted stream writes \\boxed{; after the brace only the student counts."""
    model, tokenizer = tiny
    box = tokenizer.encode("\\boxed{", add_special_tokens=False)
    hinted = [table(tiny, {token: 1.0}) for token in [*box, 400]]
    student = [table(tiny, {410: 1.0})]
    args = idft.parse_args("--beta 0 --max-new-tokens 6".split())
    fixed = Fixed(model.config, hinted, student)
    rewrites = idft.rewrite(fixed, tokenizer, [[HINTED]] * 2, [[STUDENT]] * 2, args)
    assert rewrites == [box + [410] * (6 - len(box))] * 2


def test_the_distribution_of_rewrites_after_rows_have_left(tiny):
    """Rows end at random and leave the batch. Each later token still follows m of its own row's contexts."""
    eos = tiny[1].eos_token_id
    hinted = table(tiny, {400: 0.5, 401: 0.3, eos: 0.2})
    student = table(tiny, {400: 0.2, 401: 0.2, 402: 0.3, eos: 0.3})
    tokens = drawn(tiny, hinted, student, 3000, beta=2.0, budget=6)
    log_p, log_q = (x.log_softmax(-1)[None] for x in (hinted, student))
    for t in range(6):
        m = (log_p if t == 0 else idft.mixture(log_p, log_q, 2.0)).softmax(-1)[0]
        likely, order = m.sort(descending=True)
        power = torch.where(likely.cumsum(0) - likely < 0.95, likely, 0) ** (1 / 0.3)
        want = torch.zeros_like(m).index_add(0, order, power / power.sum())
        here = tokens[:, t][tokens[:, t] >= 0]
        assert len(here) > 200
        for token in (400, 401, 402, eos):
            share, p = (here == token).float().mean().item(), want[token].item()
            assert abs(share - p) < 4 * (p * (1 - p) / len(here)) ** 0.5 + 1e-4
    ends = (tokens == eos).sum(1)
    assert set(ends.tolist()) == {0, 1}


# -- the training set -------------------------------------------------------------------------------------


def test_on_policy_demonstrations(tiny, monkeypatch):
    """Correct solutions stay, incorrect ones are rewritten; incorrect or truncated rewrites are left out."""
    model, tokenizer = tiny
    encode = tok.encode_response
    rows = Dataset.from_dict(
        {"question": list("abcd"), "solution": ["so x", "so y", "so z", "\\boxed{4}"], "gold": list("1234")}
    )
    asked = []

    def sample(model, tokenizer, prompts, temperature, args):
        return [encode(tokenizer, f"\\boxed{{{x}}}") for x in (1, 9, 9, 9)], None

    def rewrite(model, tokenizer, hinted, student, args):
        asked.append([tok.decode_responses(tokenizer, x) for x in (hinted, student)])
        truncated = (encode(tokenizer, "3 \\boxed{3}")[:-1] * 9)[: args.max_new_tokens]
        return [encode(tokenizer, "2 \\boxed{2}"), truncated, encode(tokenizer, "\\boxed{5}")]

    monkeypatch.setattr(idft, "sample", sample)
    monkeypatch.setattr(idft, "rewrite", rewrite)
    args = idft.parse_args("--max-new-tokens 24 --hint-template".split() + ["{question} by {solution}"])
    metrics, found = idft.on_policy_demonstrations(model, tokenizer, rows, args)
    (hinted, student) = asked[0]
    assert [x.removeprefix("Question: ").removesuffix("\nAnswer:") for x in student] == ["b", "c", "d"]
    assert "b by so y" in hinted[0] and "d by \\boxed{4}" in hinted[2]
    kept = [(s["kind"], s["question"], s["solution"]) for s in found if s["kept"]]
    assert kept == [("own", "a", "\\boxed{1}"), ("hinted", "b", "2 \\boxed{2}")]
    assert len(found) == 4 + 4 + 3
    assert metrics["verified_own"] == 0.25 and metrics["verified_hinted"] == pytest.approx(2 / 3)
    assert metrics["verified_demo"] == 0.25  # only \boxed{4} has an answer
    phi = idft.centered(model, tok.encode_prompts(tokenizer, ["a"]), [encode(tokenizer, "\\boxed{1}")], args)
    assert metrics["phi_own"].item() == pytest.approx(
        phi.item() / len(encode(tokenizer, "\\boxed{1}")), abs=1e-5
    )
    assert metrics["tokens_generated"] == sum(
        map(len, sample(*tiny, 0, 0, args)[0] + rewrite(*tiny, [], [], args))
    )


def test_on_policy_demonstrations_that_are_all_correct(tiny, monkeypatch):
    """Nothing is rewritten and no metric mentions rewrites."""
    responses = [tok.encode_response(tiny[1], f"\\boxed{{{x}}}") for x in "12"]
    monkeypatch.setattr(idft, "sample", lambda *_: (responses, None))
    rows = {"question": list("ab"), "solution": ["\\boxed{1}"] * 2, "gold": list("12")}
    metrics, found = idft.on_policy_demonstrations(*tiny, rows, idft.parse_args(["--max-new-tokens", "24"]))
    assert metrics["verified_own"] == 1 and "verified_hinted" not in metrics
    assert [s["kind"] for s in found if s["kept"]] == ["own", "own"]


def test_an_own_solution_counts_if_eos_ends_it(tiny, monkeypatch):
    """Also with the last token of the budget. A correct one that is truncated is rewritten, too."""
    whole = tok.encode_response(tiny[1], "\\boxed{1}")
    monkeypatch.setattr(idft, "sample", lambda *_: ([whole, whole[:-1]], None))
    monkeypatch.setattr(idft, "rewrite", lambda *_: [whole])
    rows = {"question": list("ab"), "solution": ["\\boxed{1}"] * 2, "gold": list("11")}
    args = idft.parse_args(["--max-new-tokens", str(len(whole))])
    metrics, found = idft.on_policy_demonstrations(*tiny, rows, args)
    assert metrics["verified_own"] == 1
    assert [(s["kind"], s["question"]) for s in found if s["kept"]] == [("own", "a"), ("hinted", "b")]


def test_the_hint_template_is_that_of_the_tiny_models_training():
    assert idft.parse_args([]).hint_template == HINT


# -- the script -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(small):
    def go(out, *more):
        idft.main(idft.parse_args(small("idft_hinted", out, *more)))
        return out

    return go


def test_a_language_model_within_a_model_of_images_is_trained(train, tmp_path):
    """Its vocabulary size is in the text part of its configuration."""
    folder = shutil.copytree(ROOT / "tiny/model", tmp_path / "model")
    torch.manual_seed(0)
    image = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = image | dict(vocab_size=479, head_dim=16, num_key_value_heads=2, sliding_window=64)
    config = Gemma3Config(text_config=text, vision_config=image | dict(image_size=28, patch_size=14))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    out = train(tmp_path / "run", "--model", folder, "--hinted", "off", "--steps", 1, "--max-new-tokens", 8)
    assert read_jsonl(out / "metrics.jsonl")[1]["grad_norm"] > 0


@pytest.fixture(scope="module")
def plain_run(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "run"
    sft.main(sft.parse_args(small("sft", out, "--save-every", 0)))
    return out


def test_without_hints_and_weights_it_is_sft_bit_for_bit(train, plain_run, tmp_path):
    run = train(tmp_path / "run", "--hinted", "off", "--weight", "sft", "--save-every", 0)
    same_weights(run / "final", plain_run / "final")
    same_metrics(plain_run, run, but=("phi",))


@pytest.mark.parametrize("kind", ["dft", "eaft", "idft"])
def test_other_weights_are_not_sft(train, plain_run, tmp_path, kind):
    run = train(tmp_path / "run", "--hinted", "off", "--weight", kind, "--save-every", 0, "--steps", 1)
    a, b = (read_jsonl(x / "metrics.jsonl")[1] for x in (run, plain_run))
    assert a["step"] == 1 and a["loss"] < 0.9 * b["loss"] and a["entropy"] == b["entropy"]
    assert not torch.equal(
        weights(run / "final")["lm_head.weight"], weights(plain_run / "final")["lm_head.weight"]
    )


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("idft") / "run")


def test_a_run(whole):
    evaluated, made, *lines = read_jsonl(whole / "metrics.jsonl")
    samples = [s for s in read_jsonl(whole / "samples.jsonl") if s["kind"] != "evaluation"]
    kinds = [s["kind"] for s in samples]
    assert kinds.count("demo") == kinds.count("own") == 16  # 4 steps x 4 rows
    assert kinds.count("hinted") == round(16 * (1 - made["verified_own"]))
    assert made["verified_demo"] == 1 and made["verified_hinted"] > 0.5
    assert made["phi_hinted"] > made["phi_demo"]  # rewrites are closer to on-policy text
    assert not any(s["kept"] for s in samples if s["kind"] == "demo")
    assert [x["step"] for x in lines] == [1, 2, 3, 4] and all(abs(x["phi"]) < 3 for x in lines)


def test_nothing_is_rewritten_if_nothing_is_trained(train, tmp_path, monkeypatch):
    monkeypatch.setattr(idft, "on_policy_demonstrations", None)  # would be a TypeError
    out = train(tmp_path / "run", "--steps", 0)
    [line] = read_jsonl(out / "metrics.jsonl")
    assert line["step"] == 0 and "accuracy" in line


def test_a_run_without_a_correct_sample_ends_with_an_error(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(idft, "math_reward", lambda texts, golds: [0.0] * len(texts))
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run")
    assert stop.value.code == 2
    assert "no own solution or rewrite is correct and ended by EOS" in capsys.readouterr().err


def test_an_interrupted_run_resumes_with_the_same_bits(whole, train, tmp_path, monkeypatch):
    with killed_after(3):
        train(tmp_path / "run")
    monkeypatch.setattr(idft, "on_policy_demonstrations", None)  # would be a TypeError
    train(tmp_path / "run", "--resume")
    same_metrics(whole, tmp_path / "run")
    same_weights(whole / "final", tmp_path / "run" / "final")


@pytest.mark.parametrize("kind", ["eaft", "idft"])
def test_micro_batches_change_no_gradient(train, tmp_path, kind):
    more = ("--steps", 2, "--save-every", 0, "--hinted", "off", "--weight", kind, "--lr", 1e-4)
    a, b = train(tmp_path / "a", *more), train(tmp_path / "b", *more, "--micro-batch-tokens", 1)
    a, b = (read_jsonl(x / "metrics.jsonl")[-1] for x in (a, b))
    for key in ("loss", "grad_norm", "phi", "entropy"):
        assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5)


def test_a_demonstration_needs_no_answer_if_there_is_a_gold(train, tmp_path):
    rows = read_jsonl(ROOT / "tiny/data/train.jsonl")[:4]
    write_jsonl(tmp_path / "x.jsonl", [row | {"solution": "I do not know."} for row in rows])
    flags = ("--data", tmp_path / "x.jsonl", "--eval-data", ROOT / "tiny/data", "--steps", 1)
    run = train(tmp_path / "run", *flags)
    assert read_jsonl(run / "metrics.jsonl")[1]["verified_demo"] == 0
