"""rlhf_ppo.py: preferences, reward model, advantages from a critic, and whole runs."""

from itertools import chain
from math import exp, log
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import (
    QUICK,
    ROOT,
    Killed,
    finite,
    gpt2,
    read_jsonl,
    same_metrics,
    same_weights,
    weights,
    write_jsonl,
)
from test_contract import ADDED, written_keys
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

import common.tokenization as tok
import grpo
import rlhf_ppo as ppo
from common.plumbing import annotator, data, models, ranks, runs
from common.plumbing.flags import BadInput
from common.plumbing.storage import read_state
from tiny import make_tiny

# ---- values of tokens ------------------------------------------------------------------------------------

MASK = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]])
GRID = torch.arange(18.0).view(3, 6)  # 0..5, 6..11, 12..17


def test_the_score_is_the_value_at_the_last_response_token():
    assert ppo.at_end(GRID, MASK).tolist() == [4, 11, 15]


def test_the_last_token_of_a_response():
    """EOS or not: the mask says where a response ends."""
    last = ppo.last_token(MASK)
    assert last.tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]]
    scores = torch.tensor([7.0, 8.0, 9.0])
    assert ppo.at_end(scores[:, None] * last, MASK).tolist() == [7, 8, 9]


def test_the_value_of_a_state_is_at_the_previous_token():
    want = [[0, 0, 1, 2, 3, 0], [0, 6, 7, 8, 9, 10], [0, 0, 0, 14, 0, 0]]
    assert ppo.before(GRID, MASK).tolist() == want


@pytest.fixture(scope="module")
def scorer(tiny, tmp_path_factory):
    """A reward model folder: the tiny model with a random head and a bias."""
    folder = tmp_path_factory.mktemp("scorer") / "model"
    torch.manual_seed(1)
    model = models.load_scorer(f"{ROOT}/tiny/model", tiny[1], SETTINGS, new_head=True)
    model.score.bias.data += 0.3
    runs.save_model(folder, model, tiny[1])
    return folder


SETTINGS = SimpleNamespace(gradient_checkpointing=False, model="it", micro_batch_tokens=60)
ROWS = [([5, 6, 7], [8, 9, 10, 0]), ([5] * 9, [8]), ([1, 2, 0, 0], [3, 0, 4, 5, 6, 7])]  # 0 is EOS, 1 is pad


def test_scores_of_a_padded_batch_are_those_of_each_response_alone(tiny, scorer):
    """Neither the padding nor EOS and pad ids within prompt and response change a score."""
    model = models.load_scorer(scorer, tiny[1], SETTINGS)
    plain = AutoModelForTokenClassification.from_pretrained(scorer, num_labels=1).eval()
    with torch.no_grad():
        want = [plain(torch.tensor([x + y])).logits[0, -1, 0].item() for x, y in ROWS]
    tokens, mask = tok.join(*zip(*ROWS))
    for pad in (0, 1, 200):
        position = torch.arange(tokens.shape[1])
        last = (mask * position).amax(1, keepdim=True)
        tokens[position > last] = pad
        got = ppo.at_end(ppo.all_values(model, tokens, mask, SETTINGS), mask)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_values_are_fp32_under_autocast(tiny, scorer):
    """In bf16 values between 2 and 4 are 1/64 apart, and GAE sums differences."""
    model = models.load_scorer(scorer, tiny[1], SETTINGS)
    tokens, _ = tok.join(*zip(*ROWS))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        value = ppo.values(model, tokens)
    assert value.dtype == torch.float32 and (value.bfloat16().float() != value).any()


def test_a_reward_model_learns_in_bf16(train, tmp_path, monkeypatch):
    """Its loss falls as in fp32: autocast must not reuse bf16 copies of the initial weights."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", read_jsonl(ROOT / "tiny/preferences/test.jsonl")[:12])
    more = ["--preferences", pairs, "--stop-after", "reward", "--reward-epochs", 8, "--batch-size", 12]
    losses, loss = [], ppo.pair_loss
    monkeypatch.setattr(ppo, "pair_loss", lambda *x: losses.append(loss(*x)) or losses[-1])
    train(tmp_path / "run", "--dtype", "bf16", *more, *QUICK)
    assert losses[-1] < losses[0] / 3  # with copies of the initial weights it ends at 0.6


def test_the_value_before_the_first_token_is_that_of_the_prompt(tiny, scorer):
    model = models.load_scorer(scorer, tiny[1], SETTINGS)
    tokens, mask = tok.join(*zip(*ROWS))
    value = ppo.before(ppo.all_values(model, tokens, mask, SETTINGS), mask)
    for i, (x, _) in enumerate(ROWS):
        with torch.no_grad():
            assert value[i, len(x)].item() == pytest.approx(
                model(torch.tensor([x])).logits[0, -1, 0].item(), abs=1e-5
            )
        assert (value[i][mask[i] == 0] == 0).all()


def test_a_sequence_classifier_can_be_a_reward_model(tiny, tmp_path):
    """Most published reward models are of that class: same scores, at the position that we choose."""
    torch.manual_seed(2)
    other = AutoModelForSequenceClassification.from_pretrained(ROOT / "tiny/model", num_labels=1).eval()
    other.save_pretrained(tmp_path / "model")
    tiny[1].save_pretrained(tmp_path / "model")
    model = models.load_scorer(tmp_path / "model", tiny[1], SETTINGS)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert model(ids).logits[0, -1, 0].item() == pytest.approx(other(ids).logits[0, 0].item(), abs=1e-5)


def test_folders_that_are_not_reward_models_are_refused(tiny, tmp_path):
    with pytest.raises(BadInput, match="no scalar head"):
        models.load_scorer(f"{ROOT}/tiny/model", tiny[1], SETTINGS)
    with pytest.raises(BadInput, match="nowhere"):
        models.load_scorer("nowhere/at-all", tiny[1], SETTINGS)
    foreign = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    foreign.add_tokens(["something else"])
    alone = models.load_scorer(f"{ROOT}/tiny/model", tiny[1], SETTINGS, new_head=True)
    alone.save_pretrained(tmp_path / "alone")
    with pytest.raises(BadInput, match="alone cannot be loaded"):
        models.load_scorer(tmp_path / "alone", tiny[1], SETTINGS)
    with pytest.raises(BadInput, match="tokenizer assigns other ids"):
        models.load_scorer(f"{ROOT}/tiny/model", foreign, SETTINGS, new_head=True)


# ---- pairs ---------------------------------------------------------------------------------------------


def test_no_pair_has_a_blank_answer(tmp_path):
    """A response of EOS alone has no text, and a data set must have text: the pair is left out."""
    texts = {"1": 2.0, " \n": 1.0, "2": 0.0}
    ranked = [{"question": "q", "text": t, "utility": u} for t, u in texts.items()]
    ppo.write_pairs(tmp_path / "pairs.jsonl", 0, ranked, human=False)
    [pair] = runs.read_jsonl(tmp_path / "pairs.jsonl")
    assert (pair["chosen"], pair["rejected"], pair["utility_chosen"]) == ("1", "2", 2.0)


def test_a_persons_pair_has_no_simulated_utility(tmp_path):
    """Else `pair_accuracy_max` would be another annotator's bound. Equal ones are a person's choice, too."""
    ranked = [{"question": "q", "text": t, "utility": 1.0} for t in "12"]
    ppo.write_pairs(tmp_path / "pairs.jsonl", 0, ranked, human=True)
    found = runs.read_jsonl(tmp_path / "pairs.jsonl")
    assert found == [{"row": 0, "prompt": "q", "chosen": "1", "rejected": "2"}]


# ---- the formulas ----------------------------------------------------------------------------------------


def test_pair_loss():
    scores = torch.tensor([[1.0, 0.2]], dtype=torch.float64, requires_grad=True)
    loss = ppo.pair_loss(scores, 1)
    loss.backward()
    assert loss.item() == pytest.approx(0.371101, abs=1e-6)
    s = 1 / (1 + exp(0.8))  # sigmoid of minus the margin
    np.testing.assert_allclose(scores.grad, [[-s, s]], atol=1e-9)
    many = torch.tensor([[3.0, 1.0], [0.0, 4.0], [-800.0, 800.0]])
    want = (log(1 + exp(-2)) + log(1 + exp(4)) + 1600) / 5
    assert ppo.pair_loss(many, 5).item() == pytest.approx(want, rel=1e-6)


def plain_gae(rewards, values, lam):
    """The definition for one response: A_t = sum_l lambda^l delta_t+l."""
    n, after = len(rewards), [*values[1:], 0.0]
    delta = [r + w - v for r, w, v in zip(rewards, after, values)]
    return [sum(lam ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]


def test_gae_of_the_three_token_example():
    rewards, values = torch.tensor([[-0.01, -0.02, 1.0]]), torch.tensor([[0.1, 0.2, 0.3]])
    advantage, returns = ppo.gae(rewards, values, torch.ones(1, 3), 0.95)
    np.testing.assert_allclose(advantage, [[0.79775, 0.745, 0.7]], atol=1e-6)
    np.testing.assert_allclose(returns, [[0.89775, 0.945, 1.0]], atol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_against_its_definition_whatever_the_lengths(lam):
    """Values on prompt and padding are random and must not count; nor must the lengths of other rows."""
    rng, mask = np.random.default_rng(0), MASK.numpy().astype(bool)
    rewards, values = rng.normal(size=(2, 3, 6))
    advantage, returns = ppo.gae(torch.tensor(rewards), torch.tensor(values), MASK, lam)
    assert (advantage[MASK == 0] == 0).all()
    for i in range(3):
        want = plain_gae(rewards[i][mask[i]], values[i][mask[i]], lam)
        np.testing.assert_allclose(advantage[i][mask[i]], want, atol=1e-12)
        np.testing.assert_allclose(returns[i][mask[i]], want + values[i][mask[i]], atol=1e-12)
        if lam == 1:  # the return is the sum of later rewards, for any critic
            left = rewards[i][mask[i]][::-1].cumsum()[::-1]
            np.testing.assert_allclose(returns[i][mask[i]], left, atol=1e-12)


@pytest.mark.parametrize(
    "value, loss, slope",
    [
        (0.1, 0.405, -0.9),  # within the clip: the squared error
        (1.0, 0.32, 0.0),  # beyond the clip, on the target: the clipped error counts, its slope is 0
        (-1.0, 2.0, -2.0),  # beyond the clip on the wrong side: the squared error
        (2.5, 1.125, 1.5),
    ],
)
def test_value_loss_of_a_token(value, loss, slope):
    """The old value is 0, the return 1, the clip 0.2."""
    v = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    one = torch.ones_like(v)
    found = ppo.value_loss(v, 0 * one, one, one, one, 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss) and v.grad.item() == pytest.approx(slope)


def test_value_loss_is_a_mean_over_the_tokens_of_the_batch():
    rng = np.random.default_rng(1)
    value, old, ret = (torch.tensor(x) for x in rng.normal(size=(3, 3, 6)))
    near = old + (value - old).clamp(-0.2, 0.2)
    worse = torch.maximum((value - ret) ** 2, (near - ret) ** 2)[MASK.bool()]
    inv_z = ppo.inverse_z(MASK, "token", 99)
    assert ppo.value_loss(value, old, ret, MASK, inv_z, 0.2).item() == pytest.approx(worse.mean().item() / 2)


def test_the_kl_by_enumeration(monkeypatch):
    """The mean of log pi / pi_ref under pi, over all responses of two tokens, is the KL."""
    model, reference = gpt2(6), gpt2(6)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1 * torch.randn_like(p))
    args = SimpleNamespace(seed=0, temperature=1.0, micro_batch_tokens=99)
    monkeypatch.setattr(ppo, "all_values", lambda s, tokens, *_: torch.zeros(tokens.shape))
    prompt, total, exact = [1, 2], 0.0, 0.0
    with torch.no_grad():
        p, q = (m(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for m in (model, reference))
        for a in range(6):
            after = [m(torch.tensor([[*prompt, a]])).logits[0, -1].double() for m in (model, reference)]
            p2, q2 = (x.log_softmax(-1) for x in after)
            exact += p[a].exp() * (p[a] - q[a] + (p2.exp() * (p2 - q2)).sum())
            for b in range(6):
                groups = [[{"prompt": prompt, "response": [a, b], "utility": 0.0}]]
                monkeypatch.setattr(ppo, "rollout", lambda *_, groups=groups: groups)
                found = ppo.evaluate_reward(model, reference, None, None, None, args)["eval_kl"]
                total += (p[a] + p2[b]).exp() * found
    assert exact > 0.01 and total.item() == pytest.approx(exact.item(), rel=1e-4)


# ---- the annotator ---------------------------------------------------------------------------------------


def test_the_simulated_annotator_is_that_of_the_tiny_world(tiny):
    golds = {row["question"]: row["answer"] for row in read_jsonl(ROOT / "tiny/data/train.jsonl")}
    pairs = read_jsonl(ROOT / "tiny/preferences/test.jsonl")
    for pair in pairs[:150]:
        for side in ("chosen", "rejected"):
            found = ppo.utility(tiny[1], pair[side], golds[pair["prompt"]])
            assert round(found, 2) == pair[f"utility_{side}"]
    odd = [
        "",
        "\\boxed{3}",
        "1 2 \\boxed{3}",
        "12 \\boxed{3}",
        "1.5 then 3",
        "x " * 60 + "\\boxed{3}",
        "a1b2\\boxed{3",
    ]
    for text in odd:
        assert ppo.utility(tiny[1], text, "3") == pytest.approx(make_tiny.utility(tiny[1], text, "3"))


def completions(*answers):
    """Completions (text, utility) of a question; a text that ends in ... is truncated."""
    return [dict(text=t, utility=float(u), truncated=t.endswith("...")) for t, u in answers]


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """judge(groups, flags, typed): preferences() on groups of completions; the lines of its file.

    `typed` are the lines that a person enters.
    """

    def go(groups, *flags, typed=()):
        rows = datasets.Dataset.from_dict({"question": ["q"] * len(groups)})
        groups = [[c | {"question": f"q{i}"} for c in group] for i, group in enumerate(groups)]
        answers = iter(typed)
        monkeypatch.setattr(ppo, "rollout", lambda *_: groups)
        monkeypatch.setattr("builtins.input", lambda *_: next(answers))
        size = max(map(len, groups))
        args = ppo.parse_args(["--preference-questions", "99999", "--group-size", str(size), *flags])
        try:
            ppo.preferences(None, None, rows, tmp_path, args)
        finally:
            assert next(answers, None) is None  # every line was read
        return read_jsonl(tmp_path / "preferences.jsonl")

    return go


def share(lines, better, worse):
    """How often `better` was preferred to `worse`, and in how many comparisons."""
    seen = [
        line["chosen"] == better for line in lines if {line["chosen"], line["rejected"]} == {better, worse}
    ]
    return sum(seen) / len(seen), len(seen)


@pytest.mark.parametrize("slope", [0.5, 2.0])
def test_preferences_are_bradley_terry(judge, slope):
    """Each pair of three ranked answers is in order with probability sigmoid(slope x gap)."""
    group = completions(("a", 1.0), ("b", 0.5), ("c", -0.5))
    lines = judge([group] * 2000, "--slope", str(slope))
    assert len(lines) == 3 * 2000
    for better, worse, gap in (("a", "b", 0.5), ("b", "c", 1.0), ("a", "c", 1.5)):
        p = 1 / (1 + exp(-slope * gap))
        found, n = share(lines, better, worse)
        assert n == 2000 and abs(found - p) < 4 * (p * (1 - p) / n) ** 0.5
    line = lines[0]
    assert line["utility_chosen"] == {"a": 1.0, "b": 0.5, "c": -0.5}[line["chosen"]]


def test_groups_without_a_choice_give_no_pair(judge):
    """Equal texts, equal utilities, one complete answer."""
    same, equal = completions(("a", 1), ("a", 1)), completions(("a", 1), ("b", 1))
    truncated, good = completions(("a", 1), ("b ...", 0)), completions(("a", 1), ("b", 0))
    three = completions(("c", 0), ("d", 1), ("e", 1))
    lines = judge([same, equal, truncated, good, three, good], "--slope", "99")
    assert [line["row"] for line in lines] == [3, 4, 4, 5]
    assert [(x["chosen"], x["rejected"]) for x in lines[:1]] == [("a", "b")]
    assert {(x["chosen"], x["rejected"]) for x in lines[1:3]} == {("d", "c"), ("e", "c")}


HUMAN = ["--annotator", "human"]


def test_a_person_chooses_skips_and_quits(judge, capsys, tmp_path):
    """Each ranking is saved at once; the next session begins with the first question without one."""
    groups = [completions((f"a{i}", 0), (f"b{i}", 1)) for i in range(6)]
    with pytest.raises(SystemExit) as stop:
        judge(groups, *HUMAN, typed=["1", "3", "", "nonsense 1", "2", "skip", "1 2", "quit"])
    assert not stop.value.code and "--resume" in capsys.readouterr().out
    chosen = [(line["row"], line["chosen"]) for line in read_jsonl(tmp_path / "preferences.jsonl")]
    assert chosen == [(0, "a0"), (1, "b1"), (3, "a3")]
    with open(tmp_path / "preferences.jsonl", "a") as file:
        file.write('{"row": 4, "pro')  # of a session that was killed
    lines = judge(groups, *HUMAN, typed=["2", "1"])
    assert [line["row"] for line in lines] == [0, 1, 3, 4, 5]


def test_a_ranking_is_what_a_person_types(monkeypatch, capsys):
    group = completions(("one", 0), ("two", 0), ("three", 0))
    group = [c | {"question": "which?"} for c in group]
    orders = {"3 1 2": "three one two", "2 3": "two three one", "1 2 3": "one two three"}
    for typed, order in orders.items():
        monkeypatch.setattr("builtins.input", lambda *_, typed=typed: typed)
        assert " ".join(c["text"] for c in annotator.ask(group)) == order
    assert "  1  one\n  2  two\n  3  three" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))
    with pytest.raises(SystemExit):  # Ctrl-D, or the end of a file
        annotator.ask(group)
    assert annotator.ask(group[:1]) == []


def test_a_person_may_rank_answers_of_equal_utility(judge):
    groups = [completions((f"a{i}", 1), (f"b{i}", 1)) for i in range(2)]
    assert len(judge(groups, *HUMAN, typed=["2", "1"])) == 2


# ---- the reward model ------------------------------------------------------------------------------------


def test_pairs_of_one_question_are_one_group(tmp_path):
    lines = [{"prompt": p, "chosen": c, "rejected": "z"} for p, c in (("p", "a"), ("q", "b"), ("p", "c"))]
    groups = ppo.load_pairs(write_jsonl(tmp_path / "pairs.jsonl", lines), "train", "--preferences")
    assert [[x["chosen"] for x in group] for group in groups] == [["a", "c"], ["b"]]
    with pytest.raises(BadInput, match="one prompt"):
        ppo.load_pairs(write_jsonl(tmp_path / "one.jsonl", lines[:1]), "train", "--preferences")
    with pytest.raises(BadInput, match="rejected"):
        ppo.load_pairs(write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "c"}]), "train", "--x")


def test_pairs_as_tensors(tiny):
    pairs = [{"prompt": "Compute 1 + 1.", "chosen": "\\boxed{2}", "rejected": "no idea at all"}]
    tokens, mask = ppo.join_pairs(tiny[1], pairs, ppo.parse_args([]), "cpu")
    assert tokens.shape == mask.shape == (1, 2, tokens.shape[2])
    for i, side in enumerate(("chosen", "rejected")):
        text = tiny[1].decode(tokens[0, i][mask[0, i].bool()])
        assert text == pairs[0][side] + tiny[1].eos_token


def test_agreement_accuracy_bound_and_confidence(capsys):
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.1, 0.0], [5.0, 0.0]])
    pairs = [{"utility_chosen": a, "utility_rejected": b} for a, b in ((1, 0), (0, 1), (2, 2), (0, 3))]
    found = ppo.agreement(scores, pairs, 2.0)
    assert found["pair_accuracy"] == 0.75
    bound = (2 / (1 + exp(-2)) + 0.5 + 1 / (1 + exp(-6))) / 4
    assert found["pair_accuracy_max"] == pytest.approx(bound)
    printed = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in printed] == [
        "1 pairs with confidence 0.5: accuracy 1.00",
        "2 pairs with confidence 0.8: accuracy 0.50",
        "1 pairs with confidence 0.9: accuracy 1.00",
    ]
    pairs[1]["utility_rejected"] = None  # not a number in the user's file
    for unknown in (pairs, [{}] * 4):
        assert "pair_accuracy_max" not in ppo.agreement(scores, unknown, 2.0)


@pytest.fixture(scope="module")
def groups():
    """Pairs of 24 questions of the tiny preferences, some with two pairs."""
    pairs = read_jsonl(ROOT / "tiny/preferences/train.jsonl")[:30]
    grouped = [[pair] for pair in pairs[:24]]
    for i, pair in enumerate(pairs[24:]):
        grouped[3 * i + 1].append(pair | {"prompt": grouped[3 * i + 1][0]["prompt"]})
    return grouped


@pytest.fixture
def fit(tiny, groups, tmp_path, small, monkeypatch):
    """fit(name, flags): a reward model folder, its line in metrics.jsonl, and what it was fitted to."""

    def go(name, *flags):
        out = tmp_path / name
        out.mkdir()
        args = ppo.parse_args(small("rlhf_ppo", out, "--reward-epochs", 1, "--reward-lr", 1e-3, *flags))
        rows = datasets.Dataset.from_list(read_jsonl(f"{args.data}/test.jsonl")[:6])
        test = rows.add_column("gold", rows["answer"])
        ppo.fit_reward_model(*tiny, groups, test, out, args)
        return out / "reward_model", read_jsonl(out / "metrics.jsonl")[0], (tiny, test, args)

    return go


def test_pairs_of_a_question_share_a_batch_and_a_tenth_of_the_questions_is_held_out(fit, groups, monkeypatch):
    seen, join_pairs = [], ppo.join_pairs

    def watched(tokenizer, pairs, *more):
        seen.append(pairs)
        return join_pairs(tokenizer, pairs, *more)

    monkeypatch.setattr(ppo, "join_pairs", watched)
    fit("run", "--reward-epochs", 2, "--batch-size", 5)
    *batches, last = seen
    held_out = list(chain(*groups[::10]))
    assert last == held_out and len(held_out) == 4
    trained = [pair["prompt"] for pairs in batches for pair in pairs]
    assert not {pair["prompt"] for pair in held_out} & set(trained)
    assert len(trained) == 2 * (30 - 4) and len(batches) == 2 * 5
    for group in groups:
        together = [sum(pair in pairs for pair in group) for pairs in batches]
        assert set(together) <= {0, len(group)}


def test_the_initial_policy_scores_0_on_average_and_the_folder_is_a_normal_one(fit):
    folder, line, ((model, tokenizer), test, args) = fit("run")
    again = models.load_scorer(folder, tokenizer, args)
    found = ppo.evaluate_reward(model, model, again, tokenizer, test, args)
    assert abs(found["eval_score"].item()) < 1e-5 < abs(line["eval_score"]) and line["eval_kl"] == 0
    plain = AutoModelForTokenClassification.from_pretrained(folder)
    assert plain.config.num_labels == 1 and plain.dtype == torch.float32
    before = AutoModelForTokenClassification.from_pretrained(ROOT / "tiny/model", num_labels=1).state_dict()
    after = plain.state_dict()
    assert not [k for k in after if torch.equal(after[k], before[k])]  # every weight has changed


def test_an_update_of_the_reward_model_that_is_not_finite_is_skipped(fit, monkeypatch):
    """NaN in one batch changes no weight; in three consecutive ones it ends the run."""
    loss, calls, bad = ppo.pair_loss, [], {2}

    def faulty(*args):
        calls.append(0)
        return loss(*args) * (float("nan") if len(calls) in bad else 1.0)

    monkeypatch.setattr(ppo, "pair_loss", faulty)
    flags = ("--batch-size", 5, "--micro-batch-tokens", 10**6)  # one pass for each of five updates
    folder, line, _ = fit("run", *flags)
    assert len(calls) == 5 and 0 <= line["pair_accuracy"] <= 1 and line["eval_score"] is not None
    scorer = AutoModelForTokenClassification.from_pretrained(folder)
    assert all(p.isfinite().all() for p in scorer.parameters())
    bad |= {8, 9, 10}
    with pytest.raises(BadInput, match="step 5: the gradient is not finite in three"):
        fit("other", *flags)


def test_micro_batches_change_no_reward_model(fit, float64):
    a, line, _ = fit("whole", "--micro-batch-tokens", 10**6)
    b, other, _ = fit("single", "--micro-batch-tokens", 1)
    a, b = (AutoModelForTokenClassification.from_pretrained(x).state_dict() for x in (a, b))
    assert all(a[k].dtype == torch.float64 and torch.allclose(a[k], b[k], atol=1e-9) for k in a)
    assert line["eval_score"] == pytest.approx(other["eval_score"], abs=1e-8)


# ---- PPO -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(small):
    """train(out, flags): a run of seconds with all three stages; its folder."""

    def go(out, *more):
        base = ("--preference-questions", 24, "--reward-epochs", 1, "--reward-lr", 1e-3)
        ppo.main(ppo.parse_args(small("rlhf_ppo", out, *base, *more)))
        return out

    return go


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("ppo") / "run")


def test_a_run_leaves_its_files_and_metrics(whole):
    names = ".lock args.json metrics.jsonl samples.jsonl checkpoint-000004 final preferences.jsonl"
    names += " reward_model"
    assert {path.name for path in whole.iterdir()} == set(names.split())
    lines = read_jsonl(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 1, 2, 3, 4]
    keys = {"pass@k" if key.startswith("pass@") else key for line in lines for key in line}
    written = written_keys((ROOT / "rlhf_ppo.py").read_text())
    assert keys == written | ADDED
    for line in lines:
        assert finite(line), line
    assert {"accuracy", "eval_utility", "eval_kl"} <= set(lines[-1]) and lines[1]["eval_kl"] == 0
    samples = [s for s in read_jsonl(whole / "samples.jsonl") if s.get("kind") != "evaluation"]
    for sample in samples:
        assert sample["text"] and sample["question"]
        assert isinstance(sample["reward"] + sample["utility"], float)


def test_the_policy_starts_as_the_reference_and_changes(whole):
    lines = read_jsonl(whole / "metrics.jsonl")
    assert abs(lines[2]["kl_response"]) < 1e-3 < lines[-1]["kl"]
    assert lines[-1]["ratio_max"] > 0 and 0 <= lines[-1]["clip_frac"] < 1
    same_weights(whole / "final", whole / "checkpoint-000004")
    with pytest.raises(AssertionError):
        same_weights(whole / "final", ROOT / "tiny/model")


def test_every_weight_of_the_critic_learns(whole):
    critic = read_state(whole / "checkpoint-000004")["critic"]
    initial = AutoModelForTokenClassification.from_pretrained(whole / "reward_model").state_dict()
    assert critic.keys() == initial.keys()
    assert not [k for k in initial if torch.equal(initial[k], critic[k])]


PLAIN = [*QUICK, "--eval-first", "off"]  # one line of metrics before the first step


@pytest.fixture
def spy(monkeypatch):
    """spy(name): a list that collects (arguments, result) of each call of a function of the script."""

    def go(name):
        calls, function = [], getattr(ppo, name)

        def record(*args):
            calls.append((args, function(*args)))
            return calls[-1][1]

        monkeypatch.setattr(ppo, name, record)
        return calls

    return go


def test_one_step_from_scores_to_losses(whole, train, tmp_path, spy):
    """What goes into GAE, and from GAE into the losses; beta is large, so that the KL matters."""
    names = "rollout score all_values gae policy_loss value_loss".split()
    rolls, logps, _, gaes, policies, errors = map(spy, names)
    flags = ["--kl-coef", 0.7, "--steps", 2, "--lr", 1e-3, "--max-new-tokens", 8, "--no-eos-score", -9]
    flags += ["--value-clip", 0.3]
    train(tmp_path / "run", "--reward-model", whole / "reward_model", *flags, *PLAIN)
    scorer = AutoModelForTokenClassification.from_pretrained(whole / "reward_model", num_labels=1).eval()
    for step in (0, 1):
        (rewards, value, mask, lam), (_, returns) = gaes[step]
        ((_, tokens, _, _), (old, _)), (_, (ref, _)) = logps[1 + 2 * step : 3 + 2 * step]
        for i, c in enumerate(chain(*rolls[step][1])):
            at, ids = mask[i].nonzero()[:, 0], c["prompt"] + c["response"]
            assert at.tolist() == list(range(len(c["prompt"]), len(ids)))
            assert tokens[i, : len(ids)].tolist() == ids
            with torch.no_grad():
                plain = scorer(torch.tensor([ids])).logits[0, :, 0]
            score = -9.0 if c["truncated"] else plain[-1].item()
            if step == 0:  # the critic is still the reward model
                torch.testing.assert_close(value[i, at], plain[at - 1], atol=1e-4, rtol=0)
            want = -0.7 * (old - ref)[i, at]
            want[-1] += score
            torch.testing.assert_close(rewards[i, at], want, atol=1e-4, rtol=0)
            assert (rewards[i][mask[i] == 0] == 0).all()
    assert (old - ref).abs().max() > 1e-3 and lam == 0.95  # at the second step the policy has changed
    assert {c["truncated"] for groups in rolls[:2] for c in chain(*groups[1])} == {True, False}
    # advantages are whitened over all response tokens, but not within the returns, the critic's targets
    on, each = mask.bool(), zip(rewards, value, mask.bool())
    raw = [plain_gae(r[m].tolist(), v[m].tolist(), 0.95) for r, v, m in each]
    raw = torch.tensor(list(chain(*raw)))
    torch.testing.assert_close(returns[on], raw + value[on], atol=1e-4, rtol=0)
    white, used = (raw - raw.mean()) / raw.std(), []
    for ((_, _, _, A, m, z, own), _), ((_, V, ret, _, _, clip), _) in zip(policies[-2:], errors[-2:]):
        used += zip(*(x[m.bool()].tolist() for x in (ret, A, V)))
        assert z.unique().tolist() == pytest.approx([1 / mask.sum().item()])
        assert own.kl_coef == 0 and clip == 0.3  # the KL is in the reward, and not once more in the loss
    want = 2 * [*zip(returns[on].tolist(), white.tolist(), value[on].tolist())]  # in each of two epochs
    np.testing.assert_allclose(sorted(used), sorted(want), atol=2e-3)
    for (now, V, _, m, _, _), _ in errors[::2]:  # in its first epoch a step starts from the values it has
        torch.testing.assert_close(now[m.bool()], V[m.bool()], atol=1e-4, rtol=0)


def test_the_critic_starts_as_the_reward_model_and_the_ratio_at_1(whole, train, tmp_path, spy):
    values, policies = spy("all_values"), spy("policy_loss")
    train(tmp_path / "run", "--steps", 1, "--reward-model", whole / "reward_model", *PLAIN)
    (_, scores), (_, first) = values[:2]
    assert torch.equal(scores, first) and scores.abs().max() > 0
    ratio, k3 = policies[0][1][1:]
    assert (ratio - 1).abs().max() < 1e-4 and k3.abs().max() < 1e-6
    assert (policies[-1][1][1] - 1).abs().max() > 1e-4  # not at the second update


def test_a_single_update_has_ratio_1_exactly(whole, train, tmp_path):
    more = ["--steps", 2, "--epochs-per-batch", 1, "--reward-model", whole / "reward_model", *PLAIN]
    for line in read_jsonl(train(tmp_path / "run", *more) / "metrics.jsonl")[1:]:
        assert line["ratio_max"] == line["clip_frac"] == 0 and line["grad_norm"] > 0


def test_a_truncated_response_has_the_constant_score(whole, train, tmp_path):
    more = ["--steps", 1, "--max-new-tokens", 3, "--no-eos-score", -5, *QUICK]
    out = train(tmp_path / "run", "--reward-model", whole / "reward_model", *more)
    line = read_jsonl(out / "metrics.jsonl")[-1]
    assert line["truncated_frac"] == 1 and line["reward"] == -5


def test_a_critic_gradient_that_is_not_finite_changes_no_weight(whole, train, tmp_path, monkeypatch):
    """The policy's gradient is finite, but the critic would become NaN, and later steps with it."""
    monkeypatch.setattr(ppo, "value_loss", lambda value, *rest: (value * float("nan")).sum())
    out = tmp_path / "run"
    train(out, "--reward-model", whole / "reward_model", "--steps", 1)
    assert read_jsonl(out / "metrics.jsonl")[-1]["skipped"] == 2  # both updates of the step
    same_weights(out / "final", f"{ROOT}/tiny/model")


def test_the_kl_coefficient_follows_its_target(whole, train, tmp_path):
    """Ziegler et al.: at most 2 % per step, up if the KL is above its target, down if it is below."""
    more = ["--reward-model", whole / "reward_model", "--kl-coef", 0.5, "--steps", 3, *PLAIN]
    out = train(tmp_path / "up", *more, "--kl-target", 1e-9, "--lr", 3e-3, "--steps", 8)
    up = [line["kl_coef"] for line in read_jsonl(out / "metrics.jsonl")[1:]]
    kl = [line["kl_response"] for line in read_jsonl(out / "metrics.jsonl")[1:]]
    want = [0.5]
    for x in kl[:-1]:
        want.append(want[-1] * (1.02 if x > 1.2e-9 else 0.98 if x < 0.8e-9 else 1 + 0.1 * (x / 1e-9 - 1)))
    assert up == pytest.approx(want) and max(up) > 0.5
    down = read_jsonl(train(tmp_path / "down", "--kl-target", 1e9, *more) / "metrics.jsonl")
    assert [line["kl_coef"] for line in down[1:]] == pytest.approx([0.5 * 0.98**i for i in range(3)])
    fixed = read_jsonl(whole / "metrics.jsonl")[2:]
    assert {line["kl_coef"] for line in fixed} == {ppo.parse_args([]).kl_coef}


# ---- one method is another -------------------------------------------------------------------------------


def test_with_the_group_mean_as_critic_it_is_grpo(scorer, small, tmp_path, float64, monkeypatch):
    """With lambda = 1, no KL, one epoch and V the group mean, advantage and update are Dr. GRPO's."""
    rollout, latest, calls = ppo.rollout, [], []

    def remember(*args):
        latest[:] = rollout(*args)
        calls.clear()
        return latest

    def verdicts_then_means(scorer, tokens, mask, args):
        """The first call in a step is for the reward model, the second for the critic."""
        correct = [[float(c["utility"] >= 2) for c in group] for group in latest]
        means = [[sum(group) / len(group)] * len(group) for group in correct]
        calls.append(scorer)
        value = torch.tensor(list(chain(*(means if len(calls) == 2 else correct))))
        return value[:, None].expand(tokens.shape)

    monkeypatch.setattr(ppo, "rollout", remember)
    monkeypatch.setattr(ppo, "all_values", verdicts_then_means)
    monkeypatch.setattr(ppo, "advantages", lambda advantage, how: advantage)  # not whitened
    monkeypatch.setattr(ppo, "evaluate_reward", lambda *_: {})
    both = "--group-size 4 --steps 3 --loss-norm token --max-grad-norm 1e9 --epochs-per-batch 1".split()
    grpo.main(grpo.parse_args(small("grpo", tmp_path / "grpo", *both, *QUICK)))
    more = ["--kl-coef", 0, "--lam", 1, "--reward-model", scorer, "--no-eos-score", 0]
    ppo.main(ppo.parse_args(small("rlhf_ppo", tmp_path / "ppo", *both, *more, *PLAIN)))
    same_weights(tmp_path / "grpo/final", tmp_path / "ppo/final", 1e-9)
    a, b = (read_jsonl(tmp_path / name / "metrics.jsonl")[1:] for name in ("grpo", "ppo"))
    assert any(line["adv_abs"] > 0 for line in a)
    for x, y in zip(a, b):
        assert x["reward"] == pytest.approx(y["reward"]) and x["adv_abs"] == pytest.approx(y["adv_abs"])


def test_micro_batches_of_one_row_are_one_batch(whole, train, tmp_path, float64):
    more = ["--steps", 1, "--reward-model", whole / "reward_model", "--kl-coef", 0.3, *QUICK]
    a = train(tmp_path / "a", "--micro-batch-tokens", 10**6, *more)
    b = train(tmp_path / "b", "--micro-batch-tokens", 1, *more)
    same_weights(a / "final", b / "final", 1e-9)
    a, b = (read_jsonl(x / "metrics.jsonl")[-1] for x in (a, b))
    for key in "loss grad_norm reward value_loss explained_variance kl_response eval_score eval_kl".split():
        assert a[key] == pytest.approx(b[key], rel=1e-8, abs=1e-12), key


# ---- the script ------------------------------------------------------------------------------------------


KILLS = {
    "while completions are sampled": (ppo, "rollout", 1),
    "between two rankings": (ppo, "write_pairs", 7),
    "while the reward model is fitted": (ppo, "pair_loss", 3),
    "after it, before it is saved": (ppo, "agreement", 1),
    "in step 1": (ppo, "gae", 1),
    "in step 4, after a checkpoint": (ppo, "gae", 4),
}


@pytest.mark.parametrize("where", KILLS)
def test_an_interrupted_run_resumes_to_the_same_bits(where, whole, train, tmp_path, monkeypatch):
    module, name, call = KILLS[where]
    function, calls = getattr(module, name), []

    def dies(*args, **more):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return function(*args, **more)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(module, name, dies)
        train(tmp_path / "run")
    train(tmp_path / "run", "--resume")
    same_metrics(whole, tmp_path / "run")
    same_weights(whole / "final", tmp_path / "run/final")
    for name in ("preferences.jsonl", "samples.jsonl"):
        assert (whole / name).read_text() == (tmp_path / "run" / name).read_text()


def test_the_three_stages_one_by_one(whole, train, tmp_path, monkeypatch):
    """A run that stops after stages 1 and 2 and continues has the same bits and repeats nothing."""
    train(tmp_path / "run", "--stop-after", "preferences")
    assert (tmp_path / "run/preferences.jsonl").exists() and not (tmp_path / "run/reward_model").exists()
    train(tmp_path / "run", "--stop-after", "reward", "--resume")
    assert (tmp_path / "run/reward_model").is_dir() and not (tmp_path / "run/final").exists()
    monkeypatch.setattr(ppo, "preferences", None)  # would be a TypeError
    train(tmp_path / "run", "--resume")
    same_metrics(whole, tmp_path / "run")
    same_weights(whole / "final", tmp_path / "run/final")


def test_stage_3_alone(whole, train, tmp_path):
    out = train(tmp_path / "run", "--reward-model", whole / "reward_model")
    assert not (out / "reward_model").exists() and not (out / "preferences.jsonl").exists()
    same_weights(whole / "final", out / "final")  # the same steps


def test_0_steps_only_evaluate(whole, train, tmp_path, capsys):
    out = train(tmp_path / "run", "--reward-model", whole / "reward_model", "--steps", 0)
    line, scores = read_jsonl(out / "metrics.jsonl")
    assert line["step"] == scores["step"] == 0 and 0 <= line["accuracy"] <= 1
    assert scores["eval_kl"] == pytest.approx(0, abs=1e-4) and scores["eval_utility"] > 0
    assert "eval_utility" in capsys.readouterr().out  # of the summary
    same_weights(out / "final", ROOT / "tiny/model")


def test_a_published_preference_set(train, tmp_path):
    """It has no utilities and --data has no answers: nothing in this run needs them."""
    pairs = [
        {k: x[k] for k in ("prompt", "chosen", "rejected")}
        for x in read_jsonl(ROOT / "tiny/preferences/test.jsonl")
    ]
    questions = write_jsonl(
        tmp_path / "questions.jsonl", [{"question": pair["prompt"]} for pair in pairs[:20]]
    )
    more = ["--preferences", write_jsonl(tmp_path / "pairs.jsonl", pairs[:20]), "--data", questions]
    out = train(tmp_path / "run", *more, "--annotator", "human", "--steps", 1, *QUICK)
    _, fitted, line = read_jsonl(out / "metrics.jsonl")
    assert 0 <= fitted["pair_accuracy"] <= 1 and "pair_accuracy_max" not in fitted
    assert line["accuracy"] == 0 and line["step"] == 1
    with pytest.raises(BadInput, match="--answer-key"):
        train(tmp_path / "other", *more, "--steps", 1, *QUICK)


def test_a_person_ranks_questions_whose_answer_does_not_parse(tmp_path):
    rows = [{"question": "Why?", "answer": "proof"}, {"question": "1 + 1?", "answer": "2"}]
    own, held_out = write_jsonl(tmp_path / "own.jsonl", rows), f"{ROOT}/tiny/data/test.jsonl"
    for who, asked in (("human", ["Why?", "1 + 1?"]), ("simulated", ["1 + 1?"])):
        args = ppo.parse_args(["--data", own, "--eval-data", held_out, "--annotator", who])
        train, _ = data.load_splits(args, no_gold=args.annotator == "human")
        assert train["question"][:] == asked and train["gold"][-1] == "2"


def test_a_person_is_not_asked_under_torchrun(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(BadInput, match="run stage 1 without torchrun"):
        data.check_sources(ppo.parse_args(["--annotator", "human"]))
    data.check_sources(ppo.parse_args(["--annotator", "simulated"]))


def test_a_reward_model_may_not_reward_truncation(train, tmp_path, monkeypatch):
    """One from elsewhere is not shifted: its mean may be below the score of truncated responses."""
    given = ["--reward-model", "tiny/model", *QUICK]
    monkeypatch.setattr(ppo, "evaluate_reward", lambda *_: {"eval_score": -5.0})
    scorer = models.load_scorer
    monkeypatch.setattr(models, "load_scorer", lambda path, tok, args, *_: scorer(path, tok, args, True))
    with pytest.raises(BadInput, match="--no-eos-score -2.0: the mean score is -5.00"):
        train(tmp_path / "run", *given, "--steps", 1)


def test_a_language_model_as_reward_model_is_refused_before_the_evaluation(train, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "evaluate", None)  # would be a TypeError
    with pytest.raises(BadInput, match="--reward-model tiny/model: it has no scalar head"):
        train(tmp_path / "run", "--reward-model", "tiny/model")


def test_three_completions_of_a_question_give_up_to_three_pairs(train, tmp_path):
    out = train(tmp_path / "run", "--group-size", 3, "--stop-after", "preferences", *QUICK)
    rows = [line["row"] for line in read_jsonl(out / "preferences.jsonl")]
    counts = {rows.count(row) for row in rows}
    assert counts <= {1, 2, 3} and 3 in counts and rows == sorted(rows)


@pytest.mark.parametrize(
    "flags",
    [
        "--dtype bf16 --temperature 0.8 --max-new-tokens 8",
        "--minibatches 2 --loss-norm sequence",
    ],
)
def test_flags(flags, train, tmp_path):
    out = train(tmp_path / "run", *flags.split(), "--steps", 2, *QUICK)
    for line in read_jsonl(out / "metrics.jsonl"):
        assert finite(line), line


def test_a_model_whose_pad_is_eos(train, pad_is_eos, tmp_path):
    """A GPT-2: absolute positions, one token for pad and EOS, another name for the head."""
    more = ["--model", pad_is_eos, "--steps", 1, "--max-new-tokens", 8, *QUICK]
    with pytest.raises(BadInput, match="nothing to choose"):  # no sample ends
        train(tmp_path / "none", *more)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", read_jsonl(ROOT / "tiny/preferences/test.jsonl")[:12])
    out = train(tmp_path / "run", "--preferences", pairs, *more)
    assert read_jsonl(out / "metrics.jsonl")[-1]["response_len"] > 1
    assert models.load_scorer(
        out / "reward_model", AutoTokenizer.from_pretrained(pad_is_eos), SETTINGS
    ).classifier


def test_sft_then_grpo_then_rlhf(run, train, tmp_path):
    """Three commands, each with the final folder of the one before."""
    first = run("sft", tmp_path / "sft", "--steps", 2, *QUICK) / "final"
    second = run("grpo", tmp_path / "grpo", "--model", first, "--steps", 2, *QUICK) / "final"
    third = train(tmp_path / "ppo", "--model", second, "--steps", 2, *QUICK) / "final"
    a, b, c = (weights(folder) for folder in (first, second, third))
    assert any(not torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(b[k], c[k]) for k in b)
    run("grpo", tmp_path / "again", "--model", third, "--steps", 1, *QUICK)


BAD = {
    "--reward-model nowhere/at-all": "--reward-model nowhere/at-all",
    "--reward-model tiny/model": "no scalar head",
    "--preferences nowhere/at-all": "--preferences nowhere/at-all",
    "--preferences tiny/data": "no such column",
    "--group-size 1": "--group-size",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_refused_in_one_sentence(flags, train, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", *flags.split(), *QUICK)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error:") and BAD[flags] in error
