"""The tiny world: data are correct, disjoint and reproducible; the model is as its datasheet says."""

import os
import random
import re
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.verifier import extract_answer, verify
from tiny.make_tiny import encode_prompt, render, sample, style_of, utility
from tiny.world import HINT, STAGES, demonstration, document, draw_problem, held_out, make_data

TINY = Path(__file__).parent.parent / "tiny"
COLUMNS = ["question", "answer", "solution", "noisy_solution", "level", "easy_solution"]
SIZES = {"train": 4000, "test": 600, "harder": 200, "side": 300, "few_16": 2000, "few_64": 2000}
FEW = {"few_16": 16, "few_64": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(str(TINY / "data"), cache_dir=str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="module")
def tok():
    return AutoTokenizer.from_pretrained(TINY / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY / "model").eval()


def operations(question):
    """(start, operations), parsed from the words of a question, independently of the generator."""
    story = question.split(". How many")[0]
    verbs = {"gets": "+", "loses": "-"}
    ops = [
        ("*", 2)
        if part == "doubles"
        else ("*", 3)
        if part == "triples"
        else (verbs[part.split()[0]], int(part.split()[1]))
        for part in story.split(", ")[1:]
    ]
    return (int(re.search(r"has (\d+)", story)[1]), *ops)


def solve(key):
    value = key[0]
    for op, n in key[1:]:
        value = {"+": value + n, "-": value - n, "*": value * n}[op]
    return str(value)


def test_splits_columns_sizes(data):
    assert {s: len(d) for s, d in data.items()} == SIZES
    assert all(d.column_names == COLUMNS for d in data.values())
    counts = {s: {lv: d["level"][:].count(lv) for lv in set(d["level"])} for s, d in data.items()}
    assert counts["test"] == {str(lv): 100 for lv in range(1, 7)}
    assert counts["harder"] == {"7": 100, "8": 100}
    assert counts["side"] == {f"side: {kind}": 100 for kind in ("arithmetic", "comparison", "median")}
    shares = {lv: round(n / 4000, 2) for lv, n in sorted(counts["train"].items())}
    assert shares == {"1": 0.05, "2": 0.15, "3": 0.21, "4": 0.22, "5": 0.21, "6": 0.16}
    assert all(len(set(d["level"][:50])) == len(set(d["level"])) for d in data.values()), "rows are shuffled"


def test_golds_and_demonstrations(data):
    for split in SIZES.keys() - FEW:  # these have rows of train
        rows = data[split]
        for row in rows:
            assert row["solution"].endswith(f" \\boxed{{{row['answer']}}}") or split == "side"
            assert (
                verify(row["solution"], row["answer"]) and extract_answer(row["noisy_solution"]) is not None
            )
            if split != "side":
                assert solve(operations(row["question"])) == row["answer"]
                assert style_of(row["solution"]) == style_of(row["noisy_solution"]) == "numbered"
        incorrect = sum(not verify(r["noisy_solution"], r["answer"]) for r in rows) / len(rows)
        assert incorrect == 0 if split == "side" else 0.4 < incorrect < 0.6


def test_easy_solutions_are_the_solutions_of_levels_1_to_3(data):
    for split in SIZES.keys() - FEW:
        for row in data[split]:
            assert row["easy_solution"] == (row["solution"] if row["level"] in ("1", "2", "3") else "")
    assert sum(text != "" for text in data["train"]["easy_solution"]) == 1649


def test_few_demonstrations(data):
    """Half of the rows repeat 16 or 64 rows of train, the other half are rows without a demonstration."""
    train = list(data["train"])
    levels = Counter(row["level"] for row in train)
    solution_columns = ("solution", "noisy_solution", "easy_solution")
    demonstrated, others = {}, {}
    for split, count in FEW.items():
        rows = list(data[split])
        shown = [row for row in rows if row["solution"]]
        plain = [row for row in rows if not row["solution"]]
        assert len(shown) == len(plain) == 1000
        assert all(row in train for row in {row["question"]: row for row in shown}.values())
        times = Counter(row["question"] for row in shown)
        assert len(times) == count and set(times.values()) == {1000 // count, 1000 // count + 1}
        of_level = Counter({row["question"]: row["level"] for row in shown}.values())
        assert all(abs(of_level[lv] - count * n / 4000) < 1 for lv, n in levels.items())

        blank = dict.fromkeys(solution_columns, "")
        known = {row["question"]: row | blank for row in train}
        assert all(row == known[row["question"]] for row in plain)
        assert len({row["question"] for row in plain}) == 1000
        both = [{operations(row["question"]) for row in part} for part in (shown, plain)]
        assert len(both[0]) == count and not both[0] & both[1]
        runs = [bool(row["solution"]) for row in rows]
        assert 400 < sum(runs[:1000]) < 600, "rows are shuffled"
        demonstrated[split] = set(times)
        others[split] = {row["question"] for row in plain}
    assert demonstrated["few_16"] < demonstrated["few_64"]
    assert others["few_16"] == others["few_64"]


def test_steps_of_demonstrations_follow_from_each_other(data):
    """Every line of a correct demonstration is true; a noisy one has at most one false line."""
    for row in data["train"]:
        for column in ("solution", "noisy_solution"):
            lines = re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)\.", row[column])
            false = sum(solve((int(a), (op, int(n)))) != b for a, op, n, b in lines)
            assert len(lines) == int(row["level"]) and all(
                x[3] == y[0] for x, y in zip(lines, lines[1:], strict=False)
            )
            assert false == (0 if column == "solution" or verify(row[column], row["answer"]) else 1)


def test_no_problem_in_two_splits(data):
    keys = {s: [operations(q) for q in data[s]["question"]] for s in ("train", "test", "harder")}
    keys["side"] = data["side"]["question"][:]
    for split in ("test", "harder", "side"):
        assert len(set(keys[split])) == len(keys[split])
        assert not set(keys[split]) & set(keys["train"])
    taken = held_out()[1]
    assert taken == set(keys["test"]) | set(keys["harder"]) | set(keys["side"])


@pytest.mark.parametrize("stage", STAGES)
def test_pretraining_never_sees_a_held_out_problem(stage):
    taken, rng = held_out()[1], random.Random(0)
    questions = [document(rng, stage, taken)[0].split("\n")[0] for _ in range(3000)]
    assert not {operations(q) if " has " in q else q for q in questions} & taken


def test_data_files_are_reproducible_bit_for_bit(tmp_path):
    make_data(tmp_path)
    for split in SIZES:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (
            TINY / "data" / f"{split}.jsonl"
        ).read_bytes(), split


def test_tokenizer(tok, data):
    question = data["train"][0]["question"]
    prompt = encode_prompt(tok, question)
    assert tok.decode(prompt) == render(question) == f"Question: {question}\nAnswer:"
    assert tok.pad_token_id != tok.eos_token_id and tok.eos_token_id not in prompt
    for text in (
        question,
        data["train"][0]["solution"],
        "naïve 12×3 = 36 ∴ \\boxed{36}\n\ttabs  and spaces 日本",
    ):
        assert tok.decode(tok.encode(text, add_special_tokens=False)) == text
    # another pre-tokenizer would round-trip too, but with other ids
    ids = tok.encode("So Step 1: 7 * 12 = 84. \\boxed{84}", add_special_tokens=False)
    assert tok.convert_ids_to_tokens(ids)[-17:] == "ĠStep Ġ1 : Ġ7 Ġ* Ġ1 2 Ġ= Ġ8 4 . Ġ\\ boxed { 8 4 }".split()


def test_lengths(tok, data):
    """The defaults of the scripts rely on this: 100 new tokens suffice for levels 1-6, 128 for 7 and 8."""
    longest = {s: max(len(tok.encode(t)) + 1 for t in data[s]["solution"]) for s in ("test", "harder")}
    assert longest["test"] <= 100 and longest["harder"] <= 128
    prompts = [len(encode_prompt(tok, q)) for s in longest for q in data[s]["question"]]
    assert max(prompts) <= 64


def test_model_folder(tok, model):
    assert sum(f.stat().st_size for f in (TINY / "model").iterdir()) <= 6e6
    assert model.config.model_type == "llama" and model.config.max_position_embeddings >= 1024
    assert model.lm_head.weight is model.model.embed_tokens.weight and len(tok) == model.config.vocab_size
    assert next(model.parameters()).dtype == torch.float32
    g = model.generation_config
    assert (g.temperature, g.top_k, g.top_p) == (1.0, 0, 1.0) and g.eos_token_id == tok.eos_token_id


def test_base_is_where_the_datasheet_says(model, tok, data):
    """It solves part of the task, in its own style: this is the room for post-training."""
    rows = list(data["train"])[:64]
    texts = sample(model, tok, [r["question"] for r in rows], 2, seed=0, max_new=48)
    flat = [t for ts in texts for t in ts]
    accuracy = sum(verify(t, r["answer"]) for r, ts in zip(rows, texts, strict=True) for t in ts) / len(flat)
    assert 0.08 <= accuracy <= 0.32  # .185 in the datasheet; 128 samples have a standard error of .034
    assert sum(style_of(t) == "numbered" for t in flat) <= 0.04 * len(flat)
    assert sum(style_of(t) == "terse" for t in flat) >= 0.4 * len(flat)


def test_a_reference_helps_and_the_style_stays(model, tok, data):
    rows = [r for r in data["test"] if r["level"] in "3456"][:40]
    texts = [ts[0] for ts in sample(model, tok, [HINT.format(**r) for r in rows], 1, seed=0, max_new=48)]
    assert sum(verify(t, r["answer"]) for r, t in zip(rows, texts, strict=True)) >= 0.6 * len(rows)
    assert sum(style_of(t) == "terse" for t in texts) >= 0.9 * len(rows)


def test_preferences(tok, tmp_path):
    pairs = load_dataset(str(TINY / "preferences"), cache_dir=str(tmp_path))
    assert {s: len(d) for s, d in pairs.items()} == {"train": 2000, "test": 300}
    assert not set(pairs["train"]["prompt"]) & set(pairs["test"]["prompt"])
    agrees = [r["utility_chosen"] > r["utility_rejected"] for r in pairs["train"]]
    errs = [r["utility_chosen"] < r["utility_rejected"] for r in pairs["train"]]
    assert sum(agrees) > 3 * sum(errs) > 0, "the annotator is informative and fallible"
    for row in pairs["test"]:
        answer = solve(operations(row["prompt"]))
        assert row["chosen"] != row["rejected"]
        assert utility(tok, row["chosen"], answer) == pytest.approx(row["utility_chosen"], abs=0.01)


def test_a_slip_changes_the_final_answer():
    rng = random.Random(0)
    for level in range(1, 9):
        p = draw_problem(rng, level)
        assert (
            extract_answer(demonstration(rng, p))
            == p["answer"]
            != extract_answer(demonstration(rng, p, slip=True))
        )
