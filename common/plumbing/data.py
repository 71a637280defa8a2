"""Data sets: questions, gold answers and demonstrations; splits and held-out rows; samples and batches."""

import hashlib
import json
import os
from math import ceil

import torch
from datasets import Dataset
from transformers import AutoConfig

from common.plumbing import configs, examples, flags, lengths, ranks
from common.plumbing.columns import split_names
from common.plumbing.flags import demand
from common.plumbing.tables import key, load_pairs, load_questions, load_split, without_questions
from common.verifier import check_gold, extract_answer

__all__ = ["load_pairs", "load_split"]  # of tables.py, for the scripts

# ---- what a script reads ---------------------------------------------------------------------------------


def load_samples(out):
    """The rows of a run's samples.jsonl to train on: all but those of evaluations."""
    with open(out / "samples.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if row.get("kind") != "evaluation"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def check_sources(args):
    """Refuse what rlhf_ppo.py needs later before anything is sampled."""
    asks = args.annotator == "human" and not (args.preferences or args.reward_model)
    demand(not asks or ranks.world_size() == 1, "--annotator human: run stage 1 without torchrun.")
    if args.preferences and not args.resume:
        load_pairs(args.preferences, args.preferences_split, "--preferences", args, held_out(args))
    if args.reward_model and not args.resume:
        configs.read_folder(AutoConfig, args.reward_model, "--reward-model")


# ---- training and held-out rows --------------------------------------------------------------------------


def load_splits(args, demonstrations=False, no_gold=False):
    """Training and held-out rows, by --data --split --eval-data --eval-split --eval-questions.

    The held-out rows are --eval-split of --eval-data (or of --data), by default its split
    "test". Where there is none, a tenth of the questions is held out. No question that is held
    out is trained on. Held-out rows have a column `gold`. So have training rows, but with
    `demonstrations` they have a solution instead, and rows without one are left out. `no_gold`:
    data without gold answers will do, and then no response is correct.
    """
    ranks.shard()  # from here on only the first rank prints
    flags.check(args)
    configs.check_dtype(args)
    flags.settle_rates(args, configs.is_small(configs.load_config(args)))
    imitates = demonstrations and args.steps > 0  # 0 steps only evaluate
    needs_column = imitates or (examples.has_hybrids(args) and args.steps > 0)
    train = load_questions(args.data, args.split, args, "--data", needs_column, no_gold)
    path, flag, split = held_out_split(args)
    test = load_questions(path, split, args, flag, no_gold=no_gold) if split else None
    if not args.resume:  # the first run has checked the rest
        examples.look(train, f"{args.data}, {args.split}", args, show=needs_column)
        if args.steps or not split:  # else none of these rows is used
            lengths.check_rows(train, f"{args.data}, {args.split}", args, imitates)
        if split:
            lengths.check_rows(test, f"{path}, {split}", args)
    if split:
        if args.steps:  # else nothing is trained
            train = without_questions(train, "question", test["question"], f"{flag} {path}")
    else:
        train, test = hold_out(train, args)
        sentence = f"a tenth of the questions of {args.split} is held out and never trained on"
        print(f"there is no other split to evaluate on: {sentence}")

    args.unparseable_gold = 0  # counted by with_gold, for args.json and the first line of metrics.jsonl
    if not demonstrations:
        train = with_gold(train, args, no_gold)
    test = with_gold(test, args, no_gold)
    if needs_column:
        train = examples.demonstrated(train, args, demonstrations)
        train = lengths.check_budget(train, args)
    test = subset(test, args.eval_questions, args.seed)
    args.fingerprint = fingerprint(train, test)  # a resumed run must have the same rows
    return train, test


def held_out(args):
    """All held-out rows, also those that --eval-questions leaves out."""
    path, flag, split = held_out_split(args)
    if split:
        return load_questions(path, split, args, flag, no_gold=True)
    return hold_out(load_questions(args.data, args.split, args, "--data", no_gold=True), args)[1]


def held_out_split(args):
    """Path, its flag, and the split with the held-out rows; None where a part of --split is held out."""
    path = args.eval_data or args.data
    flag = "--eval-data" if args.eval_data else "--data"
    names = split_names(path, flag)
    same = path == args.data
    if os.path.exists(path) and os.path.exists(args.data):
        same = os.path.samefile(path, args.data)
    if same:
        names = [name for name in names if name != args.split]
    split = names[0] if args.eval_data and names else None
    if args.eval_split:
        split = None if same and args.eval_split == args.split else args.eval_split
    elif "test" in names:
        split = "test"
    return path, flag, split


def hold_out(rows, args):
    """Training and held-out rows: a tenth of the questions, by a hash, whatever their order and the seed.

    A question that occurs several times is in one of them, and held out only once.
    """
    keys = [key(question) for question in rows["question"]]
    ordered = sorted(set(keys), key=lambda text: hashlib.sha256(text.encode()).digest())
    sentence = "one question cannot be both trained on and held out; give --eval-data."
    demand(len(ordered) > 1, f"--data {args.data}: {sentence}")
    tenth = set(ordered[: ceil(len(ordered) / 10)])
    first = {}  # question -> its first row
    for i, text in enumerate(keys):
        first.setdefault(text, i)
    train = [i for i, text in enumerate(keys) if text not in tenth]
    return rows.select(train), rows.select(sorted(first[text] for text in tenth))


def with_gold(rows, args, no_gold=False):
    """The rows whose gold parses, with a column `gold`; the others are dropped and counted.

    The answer column has the bare answer or a text that ends in it (GSM8K's ####, MATH's
    \\boxed{}, "The answer is"). Without such a column the gold is what the solution ends in.
    A demonstration may be incorrect, a gold may not: then it has a column of its own. Of
    several answers each is correct: `gold` has one a line.
    """
    if "gold" in rows.column_names:  # it is read again
        rows = rows.remove_columns("gold")
    has_answers = "answer" in rows.column_names
    column = "answer" if has_answers else "solution"
    if no_gold and column not in rows.column_names:
        print(f"{len(rows):,} questions without a gold answer: every response counts as incorrect")
        return rows.add_column("gold", [""] * len(rows))
    golds = []
    for cell in rows[column]:
        answers = []
        for text in cell if isinstance(cell, list) else [cell or ""]:
            text = text.strip()
            is_bare = has_answers and not any(mark in text.lower() for mark in MARKS)
            answers.append(text if is_bare else extract_answer(text))
        answers = [" ".join(answer.split()) for answer in answers if answer and check_gold(answer)]
        golds.append("\n".join(dict.fromkeys(answers)))
    parsed = [i for i, gold in enumerate(golds) if gold]
    name = args.answer_key if has_answers else args.solution_key
    print(f"{len(rows):,} questions, {len(parsed):,} with a gold answer that parses (column {name})")
    args.unparseable_gold += len(rows) - len(parsed)
    if no_gold:  # a person ranks; every response to the other questions counts as incorrect
        return rows.add_column("gold", golds)
    demand(parsed, f"--{column}-key {name}: not one gold answer parses.")
    return rows.add_column("gold", golds).select(parsed)


MARKS = ("\\boxed", "####", "answer is", "answer:")  # what comes before the answer in a longer text


def fingerprint(*splits):
    """A hash of all rows."""
    digest = hashlib.sha256()
    for rows in splits:
        for name in rows.column_names:
            digest.update(repr((name, rows[name][:])).encode())
    return digest.hexdigest()[:16]


# ---- samples and batches ---------------------------------------------------------------------------------


def subset(rows, count, seed):
    """A random sample of `count` rows, in their order; 0 means all. A larger one has those of a smaller."""
    if not count or count >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows.select(sorted(order[:count].tolist()))


def shuffled_batches(rows, steps, batch_size):
    """The row numbers of each step's batch, out of so many rows: a fresh permutation in every epoch."""
    epochs = steps * batch_size // max(1, rows) + 1  # no rows: --steps 0 of dpo.py
    order = torch.cat([torch.randperm(rows) for _ in range(epochs)])
    return order.split(batch_size)
