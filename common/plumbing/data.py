"""Data sets: files, folders and hub names; their columns, gold answers, splits and held-out rows."""

import glob
import os

import datasets
import torch
from datasets import get_dataset_split_names, load_dataset
from transformers import AutoConfig, AutoTokenizer

from common.plumbing import flags, models, ranks
from common.plumbing.flags import BadInput, demand, first_line
from common.tokenization import encode_prompts, encode_response
from common.verifier import check_gold, extract_answer

datasets.disable_progress_bars()  # there is one bar, the script's
datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # BadInput reports an error, once

FILES = (".jsonl", ".json", ".csv", ".parquet")

# ---- one split -------------------------------------------------------------------------------------------


def split_names(path, flag):
    """The names of the splits of a data set. A single file is one split, "train"."""
    if os.path.isfile(path):
        endings = ", ".join(FILES)
        demand(path.endswith(FILES), f"{flag} {path}: the name of a data file must end in {endings}.")
        return ["train"]
    try:
        return get_dataset_split_names(*configured(path))
    except Exception as error:  # one of a dozen types, and every one of them is about the user's path
        raise BadInput(f"{flag} {path}: no data file, folder or hub name ({first_line(error)}).") from None


def configured(path):
    """A hub name and its configuration, if one is given: openai/gsm8k:main."""
    if ":" in path and not os.path.exists(path):
        return path.rsplit(":", 1)
    return [path]


def load_split(path, split, columns, flag="--data"):
    """One split of a data file, a folder, a hub name or name:configuration, memory-mapped.

    `columns` maps the flag that names a column to the column. Each must exist and have text
    in every row.
    """
    names = split_names(path, flag)
    listed = ", ".join(names)
    demand(split in names, f"{path}: no split {split}, only {listed}; see --split and --eval-split.")
    if os.path.isfile(path):
        demand(os.path.getsize(path) > 0, f"{flag} {path}: the file is empty.")
        kind = path.rsplit(".", 1)[-1].replace("jsonl", "json")
        source = {
            "path": kind,
            "data_files": glob.escape(path),  # a file name may contain [ or *
        }
    else:
        source = dict(zip(("path", "name"), configured(path)))
    try:
        rows = load_dataset(**source, split=split)
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise BadInput(f"{flag} {path}: {split} cannot be read ({reason}).") from None
    demand(len(rows), f"{flag} {path}: {split} has no rows.")
    for column_flag, column in columns.items():
        demand_column(rows, column_flag, column)
        for i, text in enumerate(rows[column]):
            sentence = f"{column_flag} {column} is empty or not a string; fix or remove the row."
            is_text = isinstance(text, str) and text.strip()
            demand(is_text, f"{path}, {split}, row {i}: {sentence}")
    return rows


def demand_column(rows, flag, column):
    """Demand that the rows have this column, which a flag names."""
    listed = ", ".join(rows.column_names)
    demand(column in rows.column_names, f"{flag} {column}: the data has no such column, only {listed}.")


def check_lengths(rows, name, args, demonstrations=False):
    """Each prompt and its response must fit into the positions of the model; demonstrations must be text.

    A row is encoded only where that is in question: a token stands for at least one byte.
    """
    solutions = []
    if args.solution_key in rows.column_names:
        solutions = rows[args.solution_key]
    for i, text in enumerate(solutions):
        sentence = f"--solution-key {args.solution_key} is not a string; fix or remove the row."
        demand(text is None or isinstance(text, str), f"{name}, row {i}: {sentence}")
    if args.resume:  # the first run has checked the rest
        return

    config = models.read_folder(AutoConfig, args.model, "--model")
    tokenizer = models.read_folder(AutoTokenizer, args.model, "--model")
    positions = models.max_positions(config)
    try:
        [frame] = encode_prompts(tokenizer, [""], args.prompt_template)
    except Exception as error:
        reason = f"its chat template does not accept a question ({first_line(error)})"
        raise BadInput(f"--model {args.model}: {reason}.") from None

    budget = args.max_new_tokens
    for i, question in enumerate(rows[args.question_key]):
        solution = solutions[i] if demonstrations else ""
        most = max(budget, len(solution.encode()) + 1)  # + 1: EOS
        if len(frame) + len(question.encode()) + most <= positions:
            continue
        [prompt] = encode_prompts(tokenizer, [question], args.prompt_template)
        if solution:
            response = encode_response(tokenizer, solution)[: args.max_demo_tokens]
            most = max(budget, len(response))
        else:
            most = budget
        need = f"{len(prompt)} tokens of prompt and {most} of response"
        remedy = "lower --max-new-tokens or --max-demo-tokens, or remove the row"
        demand(
            len(prompt) + most <= positions,
            f"{name}, row {i}: {need} exceed the model's {positions} positions; {remedy}.",
        )


# ---- training and held-out rows --------------------------------------------------------------------------


def load_splits(args, demonstrations=False, no_gold=False):
    """Training and held-out rows, by --data --split --eval-data --eval-split --eval-questions.

    The held-out rows are --eval-split of --eval-data (or of --data), by default its split
    "test". Where there is none, every tenth training row is held out and never trained on.
    Held-out rows have a column `gold`. So have training rows, but with `demonstrations` they
    need a solution instead. `no_gold`: data without gold answers will do, and then no
    response is correct.
    """
    ranks.shard()  # from here on only the first rank prints
    flags.check(args)
    columns = {"--question-key": args.question_key}
    solution = {"--solution-key": args.solution_key} if demonstrations else {}
    train = load_split(args.data, args.split, columns | solution)
    check_lengths(train, f"{args.data}, {args.split}", args, demonstrations)

    path = args.eval_data or args.data
    split = held_out_split(path, args)
    if split:
        test = load_split(path, split, columns, "--eval-data")
        check_lengths(test, f"{path}, {split}", args)
    else:
        sentence = "one row cannot be both trained on and held out; give --eval-data."
        demand(len(train) > 1, f"--data {path}: {sentence}")
        print(
            f"there is no split named test: every tenth row of {args.split} is held out and never trained on"
        )
        test = train.select(range(0, len(train), 10))
        train = train.select([i for i in range(len(train)) if i % 10])

    args.unparseable_gold = 0  # counted by with_gold, for args.json and the first line of metrics.jsonl
    if not demonstrations:
        train = with_gold(train, args, no_gold)
    test = with_gold(test, args, no_gold)
    return train, subset(test, args.eval_questions)


def held_out_split(path, args):
    """The name of the split with the held-out rows; None where there is none."""
    names = split_names(path, "--eval-data")
    if path == args.data:
        names = [name for name in names if name != args.split]
    if args.eval_split:
        return args.eval_split
    if "test" in names:
        return "test"
    if args.eval_data and names:
        return names[0]
    return None


def with_gold(rows, args, no_gold=False):
    """The rows whose gold parses, with a column `gold`; the others are dropped and counted.

    The answer column has the bare answer or a text that ends in it (GSM8K's ####, MATH's
    \\boxed{}, "The answer is"). Without such a column the gold is what the solution ends in.
    A demonstration may be incorrect, a gold may not: then it has a column of its own.
    """
    has_answers = args.answer_key in rows.column_names
    column = args.answer_key if has_answers else args.solution_key
    if no_gold and column not in rows.column_names:
        print(f"{len(rows):,} questions without a gold answer: every response counts as incorrect")
        return without_ours(rows).add_column("gold", [""] * len(rows))
    listed = ", ".join(rows.column_names)
    sentence = f"--answer-key {args.answer_key}, --solution-key {args.solution_key}: no such column"
    demand(column in rows.column_names, f"{sentence}, only {listed}.")

    golds = []
    for text in rows[column]:
        text = "" if text is None else str(text).strip()
        is_bare = has_answers and not any(mark in text.lower() for mark in MARKS)
        golds.append(text if is_bare else extract_answer(text))
    parsed = [i for i, gold in enumerate(golds) if gold and check_gold(gold)]
    print(f"{len(rows):,} questions, {len(parsed):,} with a gold answer that parses (column {column})")
    demand(parsed, f"--answer-key {column}: not one gold answer parses.")
    args.unparseable_gold += len(rows) - len(parsed)
    return without_ours(rows).add_column("gold", golds).select(parsed)


MARKS = ("\\boxed", "####", "answer is", "answer:")  # what comes before the answer in a longer text


def subset(rows, count):
    """At most `count` of the rows; 0 means all of them."""
    return rows.select(range(min(count or len(rows), len(rows))))


def shuffled_batches(rows, steps, batch_size):
    """The row numbers of each step's batch, out of so many rows: a fresh permutation in every epoch."""
    epochs = steps * batch_size // rows + 1
    order = torch.cat([torch.randperm(rows) for _ in range(epochs)])
    return order.split(batch_size)


def without_ours(rows):
    """The rows without columns of the names that scripts add: those of the data are not read."""
    ours = [name for name in ("gold", "demonstrated") if name in rows.column_names]
    return rows.remove_columns(ours)
