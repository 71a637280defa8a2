"""The training loops: what each script passes to its functions and to AdamW, recorded in one short run."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import read_jsonl, write_jsonl
from datasets import Dataset

import common.tokenization as tok
import dpo
import rft_rejection

NAMES = "sft rft_rejection idft_hinted dpo grpo prefix_rft luffy opsd rlhf_ppo".split()
SCRIPTS = {name: import_module(name) for name in NAMES}
DEMONSTRATED = ["sft", "rft_rejection", "idft_hinted", "dpo"]
REINFORCED = ["grpo", "prefix_rft", "luffy", "opsd", "rlhf_ppo"]

# ---- the recorded run ------------------------------------------------------------------------------------

SPIED = "sample logprobs values evaluate evaluate_reward self_check join_pairs policy_loss prefix_weight"
FLAGS = "--steps 1 --save-every 0 --eval-questions 3 --eval-samples 1 --dtype bf16"
FLAGS += " --temperature 0.7 --eval-temperature 0.9"
UPDATES = "--group-size 4 --minibatches 2 --loss-norm token --kl-coef 0.1"
OWN = {
    "rft_rejection": "--questions 12 --k 4",
    "dpo": "--pair-questions 12 --k 6",
    "luffy": "--demo-weight srft",
    "rlhf_ppo": "--reward-epochs 1 --reward-lr 1e-3",
}
OWN |= {name: f"{OWN.get(name, '')} {UPDATES}" for name in REINFORCED}


def record(name, flags, patch):
    """Run a script: the calls of its functions by name, and the settings of AdamW at each of its steps."""
    script, calls, running, adamw = SCRIPTS[name], {}, [], torch.optim.AdamW.step

    def watched(function):
        def call(*args):
            running.append(function.__name__)
            result = function(*args)
            running.pop()
            found = SimpleNamespace(args=args, result=result, within=[*running])
            found.gradient, found.bf16 = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            calls[function.__name__].append(found)
            return result

        calls[function.__name__] = []
        return call

    def step(optimizer, *more):
        [group] = optimizer.param_groups
        calls["AdamW"].append({key: group[key] for key in ("lr", "betas", "weight_decay")})
        return adamw(optimizer, *more)

    calls["AdamW"] = []
    patch.setattr(torch.optim.AdamW, "step", step)
    patch.setattr(tok, "join", watched(tok.join))
    for function in SPIED.split():
        if hasattr(script, function):
            patch.setattr(script, function, watched(getattr(script, function)))
    args = script.parse_args(flags)
    script.main(args)
    return SimpleNamespace(**calls, out=Path(args.output_dir))


@pytest.fixture(scope="module")
def questions(data):
    """The questions of each split."""
    return {s: [row["question"] for row in read_jsonl(f"{data}/{s}.jsonl")] for s in ("train", "test")}


@pytest.fixture(scope="module")
def pairs(questions, tmp_path_factory):
    """A file of pairs, also about held-out questions."""
    rows = []
    for i, question in enumerate([*questions["train"][:21], *questions["test"]]):
        both = {"chosen": f"{i} + 1 = {i + 1} \\boxed{{{i + 1}}}", "rejected": f"{i} - 1 \\boxed{{{i - 1}}}"}
        rows.append({"prompt": question} | both)
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def recorded(small, pairs, tmp_path_factory):
    """recorded(name, flags): the record of a short run. All tests with these flags read the same one."""
    done = {}

    def go(name, *more):
        if (name, more) not in done:
            given = ["--preferences", pairs] if name == "rlhf_ppo" else []
            flags = [*FLAGS.split(), *OWN.get(name, "").split(), *given, *more]
            out = tmp_path_factory.mktemp("loops") / name
            with pytest.MonkeyPatch.context() as patch:
                done[name, more] = record(name, small(name, out, *flags), patch)
        return done[name, more]

    return go


@pytest.fixture(scope="module")
def truncated(recorded, pairs):
    """truncated(name): the record of a run on demonstrations, or pairs, of which 5 tokens are trained."""
    own = {
        "rft_rejection": ["--k", 0, "--add-gold", "--restart", "continue"],
        "idft_hinted": ["--hinted", "off"],
        "dpo": ["--pairs", pairs],
    }
    five = ["--max-demo-tokens", 5, "--max-new-tokens", 5, "--eval-first", "off"]
    return lambda name: recorded(name, *own.get(name, []), *five)


# ---- every script ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_temperature_is_used_in_its_place(name, recorded):
    """Evaluations are greedy and at --eval-temperature; what else is sampled is scored as it was sampled."""
    run = recorded(name)
    evaluations = [call.args[3] for call in run.sample if "evaluate" in call.within]
    assert evaluations == [0.0, 0.9] * 2
    assert {call.args[3] for call in run.sample if "evaluate" not in call.within} == {0.7}
    trained = {call.args[3] for call in run.logprobs if call.gradient}
    assert trained == ({1.0} if name == "rft_rejection" else {0.7})  # samples are demonstrations to it
    assert {call.args[3] for call in run.logprobs if not call.gradient} == {0.7}


@pytest.mark.parametrize("name", NAMES)
def test_every_pass_of_a_model_is_in_bf16(name, recorded):
    run = recorded(name)
    for calls in (run.logprobs, getattr(run, "values", run.logprobs)):
        assert {call.gradient for call in calls} == {True, False}
        assert all(call.bf16 for call in calls)
    assert all(call.bf16 for call in run.sample)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_questions_are_evaluated(name, recorded, questions):
    """The same three at the start and at the end, and by the reward model."""
    run = recorded(name)
    rows = [call.args[2] for call in run.evaluate + run.self_check]
    if name == "rlhf_ppo":
        assert len(run.evaluate_reward) == 2
        rows += [call.args[4] for call in run.evaluate_reward]
    asked = {tuple(found["question"]) for found in rows}
    assert len(run.evaluate) == 2 and len(asked) == 1
    [asked] = asked
    assert len(asked) == 3 and set(asked) <= set(questions["test"])


@pytest.mark.parametrize("name", NAMES)
def test_adamw_has_no_weight_decay_and_betas_of_its_own(name, recorded, truncated):
    steps = recorded(name).AdamW
    if name == "rft_rejection":  # with --restart base each round has an AdamW of its own
        assert steps == truncated(name).AdamW
    if name == "rlhf_ppo":  # the first five are the reward model's, with torch's betas
        reward, steps = steps[:5], steps[5:]
        assert all(step["betas"] == (0.9, 0.999) and step["weight_decay"] == 0 for step in reward)
    updates = {name: 2 for name in REINFORCED} | {"rlhf_ppo": 4}  # two epochs
    assert steps == [{"lr": 5e-4, "betas": (0.9, 0.99), "weight_decay": 0}] * updates.get(name, 1)


# ---- demonstrations and pairs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEMONSTRATED)
def test_a_demonstration_beyond_the_limit_is_truncated_without_eos(name, truncated, tiny):
    run, eos, rows = truncated(name), tiny[1].eos_token_id, 0
    for call in run.logprobs:
        if call.gradient:
            _, tokens, mask, _ = call.args
            rows += len(mask)
            assert mask.sum(1).tolist() == [5] * len(mask)
            assert (tokens[mask == 1] != eos).all()
    line = read_jsonl(run.out / "metrics.jsonl")[-1]
    assert rows == (8 if name == "dpo" else 4) and line["truncated_frac"] == 1


def test_dpo_trains_no_pair_about_a_held_out_question(truncated, questions):
    run = truncated("dpo")
    held_out = set(run.evaluate[0].args[2]["question"])
    trained = [row for row in read_jsonl(run.out / "samples.jsonl") if row.get("kind") != "evaluation"]
    asked = {row["question"] for row in trained}
    assert len(held_out) == 3 and held_out < set(questions["test"])  # three of twelve are asked
    assert asked == set(questions["train"][:21])


def test_no_reward_model_is_fitted_to_a_pair_about_a_held_out_question(recorded, questions):
    run = recorded("rlhf_ppo")
    held_out = set(run.evaluate[0].args[2]["question"])
    asked = {pair["prompt"] for call in run.join_pairs for pair in call.args[1]}
    assert len(held_out) == 3 and held_out < set(questions["test"])
    assert asked == set(questions["train"][:21])


def test_the_learning_rate_of_the_reward_model_falls_linearly(recorded):
    """21 prompts, of which 3 judge it and 18 are trained on, 4 at a time; it ends one step above 0."""
    used = [step["lr"] for step in recorded("rlhf_ppo").AdamW[:5]]
    assert used == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])


# ---- what goes into a policy loss ------------------------------------------------------------------------


@pytest.mark.parametrize("name", REINFORCED)
def test_only_the_log_probability_of_the_policy_has_a_gradient(name, recorded):
    for call in recorded(name).policy_loss:
        logp, *others, _ = call.args
        assert logp.requires_grad and not any(x.requires_grad for x in others)


@pytest.mark.parametrize("name", REINFORCED)
def test_z_is_that_of_the_update_and_not_of_the_step(name, recorded):
    """1 / Z over all tokens of an update, under --loss-norm token, has the sum 1."""
    run = recorded(name)
    total = sum(
        (mask * inv_z).sum().item() for _, _, _, _, mask, inv_z, _ in (c.args for c in run.policy_loss)
    )
    assert total == pytest.approx(4 if name == "rlhf_ppo" else 2)


@pytest.mark.parametrize("name", ["grpo", "prefix_rft", "luffy"])
def test_rows_without_advantage_keep_their_kl(name, recorded):
    run = recorded(name)
    given = [call.args for call in run.policy_loss]
    no_advantage = sum((A == 0).all(1).sum().item() for _, _, _, A, *_ in given)
    assert no_advantage > 0 and sum(len(mask) for *_, mask, _, _ in given) == 16


def test_prefix_tokens_are_ranked_by_the_entropy_of_the_policy(recorded, tiny):
    """H(pi) at --temperature, of the distribution that each prefix token follows."""
    run = recorded("prefix_rft")
    [call] = run.prefix_weight
    _, entropy, prefix, _ = call.args
    tokens, mask = run.join[-1].result
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = tiny[0](tokens).logits.float()
    logp = (logits[:, :-1] / 0.7).log_softmax(-1)
    want = -(logp.exp() * logp).sum(-1)  # position t - 1 predicts token t
    on = prefix[:, 1:] == 1
    assert on.sum() > 20 and (prefix <= mask).all() and want[on].std() > 0.1
    torch.testing.assert_close(entropy[:, 1:][on], want[on], atol=0.02, rtol=0.02)
    assert (entropy[prefix == 0] == 0).all()


# ---- what ends a response --------------------------------------------------------------------------------


@pytest.fixture
def four_samples(tiny, monkeypatch):
    """four_samples(name): what a script samples with. Only the first two samples end, with an EOS each."""
    model, tokenizer = tiny
    eos = tokenizer.eos_token_id
    other = next(i for i in range(10, 100) if i != eos)  # only the model's config knows it
    responses = [[5, eos], [5, other], [5, 6], [7, 6]]

    def go(name):
        script = SCRIPTS[name]
        monkeypatch.setattr(model.config, "eos_token_id", [eos, other])
        monkeypatch.setattr(script, "sample", lambda *_: (responses, [[0.0, 0.0]] * 4))
        monkeypatch.setattr(script, "math_reward", lambda texts, golds: [1.0, 0.0, 1.0, 0.0][: len(texts)])
        rows = Dataset.from_list([{"question": "a", "gold": "1", "demonstrated": False, "hinted": [5]}])
        count = "--k" if name in ("dpo", "rft_rejection") else "--group-size"
        return model, tokenizer, rows, script.parse_args([count, "4", "--max-new-tokens", "2"])

    return go


@pytest.mark.parametrize("name", REINFORCED)
def test_a_completion_that_ends_in_any_stop_id_is_not_truncated(name, four_samples):
    *first, args = four_samples(name)
    step = [1] if name in ("prefix_rft", "luffy") else []
    [group] = SCRIPTS[name].rollout(*first, *step, args)
    assert [c["truncated"] for c in group] == [False, False, True, True]


def test_a_pair_may_hold_samples_that_end_in_any_stop_id(four_samples):
    model, tokenizer, *more = four_samples("dpo")
    pairs, _ = dpo.sample_pairs(model, tokenizer, *more)
    want = tok.decode_responses(tokenizer, dpo.sample()[0][:2])
    assert pairs == [("a", *want)]


def test_a_sample_that_ends_in_any_stop_id_has_ended(four_samples):
    *first, args = four_samples("rft_rejection")
    [samples] = rft_rejection.attempt(*first, "{question}", args)
    assert [s["ended"] for s in samples] == [True, True, False, False]
