"""OPSD: what the teacher reads, its advantage of each token, the gradient by enumeration, and whole runs."""

import re
from itertools import product

import pytest
import torch
from conftest import QUICK, ROOT, read_jsonl, same_metrics, same_weights
from datasets import Dataset
from test_contract import ADDED, written_keys

import common.tokenization as tok
import grpo
import idft_hinted
import opsd
from common.plumbing import models
from tiny.world import HINT


@pytest.fixture
def train(small, tmp_path):
    """train(name, *more): a short run of a script; the folder of the run."""

    def go(*more, script=opsd):
        out = tmp_path / f"{script.__name__}-{len(list(tmp_path.iterdir()))}"
        script.main(script.parse_args(small(script.__name__, out, *QUICK, *more)))
        return out

    return go


def metrics(out):
    return read_jsonl(out / "metrics.jsonl")[1:]


# ---- what the teacher reads ------------------------------------------------------------------------------


def test_the_hint_is_that_of_the_tiny_model_and_of_hinted_decoding():
    assert opsd.parse_args([]).hint_template == HINT == idft_hinted.HINT


def test_the_teacher_reads_question_and_solution_in_the_chat_template(tiny):
    """Braces of LaTeX are no fields; the whole is a prompt like any other."""
    rows = [
        {"question": "Ann has {x} cards?", "solution": r"It is \boxed{7}."},
        {"question": "b?", "solution": "1"},
    ]
    args = opsd.parse_args(["--prompt-template", "{question} Box it."])
    hints = opsd.with_hints(*tiny, Dataset.from_list(rows), args)["hinted"][:]
    texts = [HINT.replace("{question}", r["question"]).replace("{solution}", r["solution"]) for r in rows]
    assert hints == tok.encode_prompts(tiny[1], texts, "{question} Box it.")
    shown = tiny[1].decode(hints[0])
    assert "Ann has {x} cards?\nReference solution: It is \\boxed{7}.\nIn your own words: Box it." in shown


def test_a_hint_that_does_not_fit_is_refused_before_sampling(train, monkeypatch, capsys):
    demand = models.demand_positions
    monkeypatch.setattr(models, "demand_positions", lambda model, need: demand(model, need + 2000))
    monkeypatch.setattr(opsd, "rollout", None)
    with pytest.raises(SystemExit) as stop:
        train()
    assert stop.value.code == 2 and "exceed its 2048 positions" in capsys.readouterr().err


# ---- the advantage ---------------------------------------------------------------------------------------


def test_advantage_of_a_worked_example():
    """Prompts of 1 and 2 tokens, hinted ones of 4 and 2; responses of 2 and 3 tokens."""
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    hinted = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0]])
    logp = torch.tensor([[0, -1.0, -2.0, 0, 0], [0, 0, -0.5, -0.25, -4.0]])
    teacher = torch.tensor([[0, 0, 0, 0, -0.5, -3.0], [0, 0, -0.5, -1.25, -1.0, 0]])
    A = opsd.token_advantages(teacher, hinted, logp, mask)
    assert A.tolist() == [[0, 0.5, -1, 0, 0], [0, 0, 0, -1, 3]]


def one_by_one(model, prompt, response, temperature):
    """log pi of each token of a response, by a pass of its own without padding or batch."""
    found = []
    for t, token in enumerate(response):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1]
        found.append((logits.double() / temperature).log_softmax(-1)[token].item())
    return found


@pytest.mark.parametrize("teacher", ["initial", "current"])
def test_advantages_of_a_run_against_single_passes(teacher, train, tiny, monkeypatch):
    """Every token of two steps at temperature 0.8: log pi_T(y_t | x, s, y_<t) - log pi_old(y_t | x, y_<t)."""
    initial, tokenizer = tiny
    rows = {row["question"]: row for row in read_jsonl(ROOT / "tiny/data/train.jsonl")}
    rollout, token_advantages, batches, checked = opsd.rollout, opsd.token_advantages, [], []

    def watched(model, *more):
        batches.append((model, rollout(model, *more)))
        return batches[-1][1]

    def compared(*given):
        A = token_advantages(*given)
        model, groups = batches[-1]
        for i, completion in enumerate(c for group in groups for c in group):
            row, y = rows[completion["question"]], completion["response"]
            hint = HINT.replace("{question}", row["question"]).replace("{solution}", row["solution"])
            student, hinted = tok.encode_prompts(tokenizer, [row["question"], hint])
            teaches = initial if teacher == "initial" else model
            log_t, log_s = one_by_one(teaches, hinted, y, 0.8), one_by_one(model, student, y, 0.8)
            want = torch.zeros(A.shape[1])
            want[len(student) : len(student) + len(y)] = torch.tensor(log_t) - torch.tensor(log_s)
            torch.testing.assert_close(A[i], want, rtol=1e-3, atol=1e-3)
            checked.append(len(y))
        assert not A.requires_grad
        return A

    monkeypatch.setattr(opsd, "rollout", watched)
    monkeypatch.setattr(opsd, "token_advantages", compared)
    out = train("--teacher", teacher, "--steps", 2, "--temperature", 0.8, "--micro-batch-tokens", 200)
    assert len(checked) == 8 and sum(checked) == sum(line["tokens_generated"] for line in metrics(out))
    assert len({*checked}) > 1 and all(line["adv_abs"] > 0.1 for line in metrics(out))


@pytest.mark.parametrize("teacher", ["initial", "current"])
def test_a_teacher_without_the_solution_has_advantage_0(teacher, train):
    """Exactly: it is the same computation. So nothing is trained, and the weights stay as they are."""
    out = train("--hint-template", "{question}", "--teacher", teacher)
    for line in metrics(out):
        assert line["adv_abs"] == line["kl_teacher"] == line["grad_norm"] == line["tokens_trained"] == 0
    same_weights(out / "final", ROOT / "tiny/model")
    [line] = metrics(train("--hint-template", "{question}", "--kl-coef", 0.1, "--steps", 1))
    assert line["adv_abs"] == 0 < line["tokens_trained"] == line["tokens_generated"]  # the KL has a gradient


def test_metrics_of_the_advantage(train, monkeypatch):
    """KL to the teacher is -mean A over tokens; correct and incorrect responses have means of their own."""
    seen = {}

    def constant(teacher_logp, hinted_mask, logp, mask):
        seen["lengths"] = mask.sum(1)
        return mask * torch.tensor([[-3.0], [1.0], [-1.0], [0.5]])

    monkeypatch.setattr(opsd, "token_advantages", constant)
    monkeypatch.setattr(opsd, "math_reward", lambda texts, golds: [0.0, 1.0, 0.0, 1.0][: len(texts)])
    [line] = metrics(train("--steps", 1, "--eval-questions", 2))
    a, b, c, d = seen["lengths"].tolist()
    assert line["reward"] == 0.5
    assert line["kl_teacher"] == pytest.approx((3 * a - b + c - 0.5 * d) / (a + b + c + d))
    assert line["adv_correct"] == pytest.approx((b + 0.5 * d) / (b + d))
    assert line["adv_incorrect"] == pytest.approx((-3 * a - c) / (a + c))


# ---- the gradient ----------------------------------------------------------------------------------------

V, T = 3, 2  # a vocabulary of three tokens, responses of two: four contexts, nine responses


def tables():
    """Logits of student and teacher in each of the contexts: the empty one and each first token."""
    g = torch.Generator().manual_seed(3)
    student = torch.randn(1 + V, V, generator=g, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(1 + V, V, generator=g, dtype=torch.float64)


def of_responses(table):
    """log-probabilities of the nine responses, [9, 2]."""
    logp = table.log_softmax(-1)
    return torch.stack([torch.stack([logp[0, a], logp[1 + a, b]]) for a, b in product(range(V), repeat=T)])


def expected_gradient(student, teacher, norm):
    """The gradient of the script's loss, expected over samples: all nine, each by its probability."""
    args = opsd.parse_args(["--loss-norm", norm])
    logp = of_responses(student)
    p = logp.detach().sum(1, keepdim=True).exp()  # of a response
    mask, hinted = torch.ones(9, T), torch.tensor([[0, 0, 1, 1]]).expand(9, -1)
    teacher_logp = torch.cat([torch.zeros(9, 2), of_responses(teacher)], 1)  # after a longer prompt
    A = opsd.token_advantages(teacher_logp, hinted, logp.detach(), mask)
    inv_z = opsd.inverse_z(mask[:1], norm, 4)  # of a batch of one
    loss, _, _ = opsd.policy_loss(logp, logp.detach(), logp.detach(), A, mask, p * inv_z, args)
    return torch.autograd.grad(loss, student)[0], 1 / inv_z.item()


@pytest.mark.parametrize("norm, z", [("constant", 4), ("token", 2), ("sequence", 2)])
def test_the_expected_gradient_is_that_of_the_reverse_kl(norm, z):
    """Of KL(pi || pi_T) at each position, where the student's own samples lead to it."""
    student, teacher = tables()
    got, divisor = expected_gradient(student, teacher, norm)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    kl = (log_s.exp() * (log_s - log_t)).sum(1)  # in each context, [4]
    visited = torch.cat([torch.ones(1), log_s[0].detach().exp()])  # how often samples come there
    [want] = torch.autograd.grad((visited * kl).sum() / z, student)
    assert divisor == z and want.abs().min() > 1e-4
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_it_is_not_the_gradient_of_the_kl_of_whole_responses():
    """That one also credits a token with the divergence that follows it; A_t is of its own token only."""
    student, teacher = tables()
    got, _ = expected_gradient(student, teacher, "constant")
    logp = of_responses(student).sum(1)
    kl = (logp.exp() * (logp - of_responses(teacher).sum(1))).sum()
    [whole] = torch.autograd.grad(kl / 4, student)
    torch.testing.assert_close(got[1:], whole[1:], rtol=1e-9, atol=1e-12)  # the last token has no future
    assert (got[0] - whole[0]).abs().max() > 1e-3


# ---- whole runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["", "--minibatches 2 --epochs-per-batch 2 --kl-coef 0.1 --loss-norm token"])
def test_with_the_advantages_of_grpo_it_is_grpo(more, train, monkeypatch):
    """Both with an advantage that is 1 or -2 by the row: every metric and every bit of the weights."""
    rows = torch.tensor([1.0, -2.0]).repeat(8)  # of 4 questions with 4 completions each
    monkeypatch.setattr(opsd, "token_advantages", lambda *given: given[3] * rows[:, None])
    monkeypatch.setattr(grpo, "advantages", lambda rewards, how: rows.view(rewards.shape))
    flags = [*"--steps 2 --group-size 4 --loss-norm sequence".split(), *more.split()]
    a, b = train(*flags, script=grpo), train(*flags, "--teacher", "current")
    same_weights(a / "final", b / "final")
    same_metrics(a, b, but={"zero_variance_frac", "kl_teacher", "adv_correct", "adv_incorrect"})
    assert all(line["grad_norm"] > 0 for line in metrics(a))


def test_incorrect_samples_are_trained_and_verdicts_change_nothing(train, monkeypatch):
    a = train("--steps", 2)
    monkeypatch.setattr(opsd, "math_reward", lambda texts, golds: [0.0] * len(texts))
    b = train("--steps", 2)
    same_weights(a / "final", b / "final")
    for line in metrics(b):
        assert line["reward"] == 0 and line["adv_correct"] is None
        assert line["tokens_trained"] == line["tokens_generated"] > 0


def test_the_initial_teacher_stays_and_the_current_one_moves(train):
    """After the first step they are different teachers; before it they are one."""
    a, b = (metrics(train("--steps", 3, "--teacher", which)) for which in ("initial", "current"))
    assert a[0]["kl_teacher"] == b[0]["kl_teacher"] and a[2]["kl_teacher"] != b[2]["kl_teacher"]
    assert a[2]["kl"] > 0 == b[2]["kl"]  # the reference is loaded, so the KL to it is measured


def test_the_student_comes_closer_to_its_teacher(train):
    """The divergence that is minimised falls, on questions that differ from step to step."""
    lines = metrics(train("--steps", 16, "--batch-size", 16, "--lr", 3e-4))
    first, last = (sum(line["kl_teacher"] for line in part) for part in (lines[:4], lines[-4:]))
    assert last < 0.8 * first


def test_metrics_of_a_run_are_those_in_its_source(train):
    out = train("--steps", 1, "--eval-samples", 2)
    keys = {re.sub(r"@\d+$", "@k", key) for line in read_jsonl(out / "metrics.jsonl") for key in line}
    assert keys == written_keys((ROOT / "opsd.py").read_text()) | ADDED


def test_a_question_without_a_solution_is_not_sampled(train, tmp_path):
    """In the regime with demonstrations of easy questions, only these are trained on."""
    given = ("--data", "tiny/data", "--eval-data", "tiny/data", "--solution-key", "easy_solution")
    samples = read_jsonl(train("--steps", 2, "--batch-size", 16, *given) / "samples.jsonl")
    level = {row["question"]: row["level"] for row in read_jsonl(ROOT / "tiny/data/train.jsonl")}
    levels = {level[row["question"]] for row in samples if row.get("kind") != "evaluation"}
    assert levels and levels <= {"1", "2", "3"}
