"""Tables: the columns of a split that are in use, as text, under the names of the scripts."""

import os

from datasets import Dataset

from common.plumbing import columns, examples, lengths
from common.plumbing.columns import read_split, split_names
from common.plumbing.flags import BadInput, demand

# ---- one split -------------------------------------------------------------------------------------------


def load_split(path, split, wanted, flag="--data"):
    """One split of a data file, a folder, a hub name or name:configuration, as text.

    `wanted` maps the flag that names a column to the column; only these are read. Each must
    exist and have text in every row. If it is empty all are read, and nothing is demanded.
    """
    cells, names = cells_of(path, split, flag, wanted.values() if wanted else None)
    for column_flag, column in wanted.items():
        demand_name(names, column_flag, column)
        cells[column] = texts(cells[column], f"{path}, {split}", f"{column_flag} {column}")
    return Dataset.from_dict(cells)


def cells_of(path, split, flag, wanted):
    """`columns.read_split` of a split that exists and has rows."""
    names = split_names(path, flag)
    hint = "; see --split and --eval-split" if flag in ("--data", "--eval-data") else ""
    demand(split in names, f"{flag} {path}: no split {split}, only {', '.join(names)}{hint}.")
    if split == "train" and os.path.isfile(path):
        demand(os.path.getsize(path) > 0, f"{flag} {path}: the file is empty.")
    cells, names = read_split(path, split, flag, wanted and list(dict.fromkeys(wanted)))
    demand(any(len(column) for column in cells.values()) or not cells, f"{flag} {path}: {split} has no rows.")
    return cells, names


def demand_name(names, flag, column):
    """Demand that a data set has this column, which a flag names."""
    demand(column in names, f"{flag} {column}: the data has no such column, only {', '.join(names)}.")


def texts(cells, name, column, role="user", required=True, row=None):
    """The cells of a column (or of one row) as text; None where there is none and none is required."""
    if row is None and all(isinstance(cell, columns.Number) for cell in cells):
        raise BadInput(f"{name}: {column} holds numbers only; give a column of text.")
    found = []
    for i, cell in enumerate(cells):
        i = i if row is None else row
        try:
            text = columns.text(cell, role)
        except ValueError as reason:
            raise BadInput(f"{name}, row {i}: {column} {reason}; fix or remove the row.") from None
        has_text = text and text.strip()
        sentence = f"{column} is empty or not a string; fix or remove the row."
        demand(has_text or not required, f"{name}, row {i}: {sentence}")
        found.append(text)
    return found


# ---- questions and pairs ---------------------------------------------------------------------------------


def load_questions(path, split, args, flag, needs_solution=False, no_gold=False):
    """The columns that the flags name, under the names of the scripts, which none of the user's can take.

    `question`, and where they exist `solution`, `answer` (a list: any of them is correct) and
    `level`. A row may lack a solution, but with `needs_solution` there must be the column.
    Without `no_gold` there must be something to read a gold answer from.
    """
    keys = {"question": args.question_key, "solution": args.solution_key, "answer": args.answer_key}
    cells, names = cells_of(path, split, flag, [*keys.values(), "level"])
    name = f"{path}, {split}"
    demand_name(names, "--question-key", args.question_key)
    if needs_solution:
        demand_name(names, "--solution-key", args.solution_key)
    elif not no_gold and not {args.answer_key, args.solution_key} & {*names}:
        sentence = f"--answer-key {args.answer_key}, --solution-key {args.solution_key}: no such column"
        raise BadInput(f"{sentence}, only {', '.join(names)}.")
    rows = {}
    rows["question"] = texts(cells[args.question_key], name, f"--question-key {args.question_key}")
    if args.solution_key in names:
        column = f"--solution-key {args.solution_key}"
        rows["solution"] = texts(cells[args.solution_key], name, column, "assistant", False)
    if args.answer_key in names:
        rows["answer"] = []
        for i, cell in enumerate(cells[args.answer_key]):
            several = isinstance(cell, list) and not any(isinstance(item, dict) for item in cell)
            where = f"--answer-key {args.answer_key}"
            found = texts(cell if several else [cell], name, where, "assistant", False, i)
            rows["answer"].append([answer for answer in found if answer])
    if "level" in names:
        rows["level"] = [None if level is None else str(level) for level in cells["level"]]
    return examples.cleaned(Dataset.from_dict(rows), name, args)


def load_pairs(path, split, flag, args=None, held_out=()):
    """A preference set: prompt, chosen, rejected, as text or as messages; and utilities, if it has them.

    Without a column prompt it is the user's message in `chosen`. Pairs about the questions of
    the rows `held_out` are left out, and with `args` those that do not differ. With `args` a pair
    that exceeds the model's positions is refused.
    """
    nothing = "all completions of a question are truncated, the same or equally good"
    remedy = "raise --max-new-tokens or --group-size"
    found = flag != "--annotator" or os.path.getsize(path) > 0
    demand(found, f"--annotator: there is nothing to choose, because {nothing}; {remedy}.")
    utilities = ("utility_chosen", "utility_rejected")
    cells, names = cells_of(path, split, flag, ("prompt", "chosen", "rejected", *utilities))
    name, rows = f"{path}, {split}", {}
    for column in ("chosen", "rejected"):
        demand_name(names, f"{flag}: column", column)
    begins = {column: [begins_with(cell) for cell in cells[column]] for column in ("chosen", "rejected")}
    if "prompt" not in names:
        demand(all(begins["chosen"]), f"{flag} {path}: no column prompt, only {', '.join(names)}.")
    rows["prompt"] = texts(cells.get("prompt") or cells["chosen"], name, "column prompt:")
    for column, questions in begins.items():
        rows[column] = texts(cells[column], name, f"column {column}:", "assistant")
        for i, question in enumerate(questions):
            sentence = f"column {column} begins with another question than prompt; fix or remove the row."
            demand(question in (None, rows["prompt"][i]), f"{name}, row {i}: {sentence}")
    for column in utilities:
        rows[column] = [number(cell) for cell in cells.get(column) or [None] * len(rows["prompt"])]
    rows = Dataset.from_dict(rows)
    if args:  # before any is left out: errors name the row of the file
        lengths.check_pairs(rows, name, args)
        rows = examples.distinct_pairs(rows, flag, name, args)
    if held_out:
        rows = without_questions(rows, "prompt", held_out["question"], f"{flag} {path}")
    return rows


def begins_with(cell):
    """The question that messages begin with; None where a cell is an answer alone."""
    try:
        return columns.text(cell, "user") if isinstance(cell, list) and len(cell) > 1 else None
    except ValueError:  # said when the answer is read
        return None


def number(cell):
    """A cell as a number; None if it is none."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


# ---- questions that are held out -------------------------------------------------------------------------


def key(question):
    """What makes two questions the same: their words."""
    return " ".join(question.split())


def without_questions(rows, column, held_out, name):
    """The rows to train on whose question is not held out, too."""
    held_out = {key(question) for question in held_out}
    kept = [i for i, question in enumerate(rows[column]) if key(question) not in held_out]
    if len(kept) == len(rows):
        return rows
    sentence = f"all {len(rows):,} training questions are held out, too; give other rows or leave it out."
    demand(kept, f"{name}: {sentence}")
    print(f"{len(rows) - len(kept):,} of {len(rows):,} training rows ask what is held out: they are left out")
    return rows.select(kept)
