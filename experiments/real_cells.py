"""The cells of experiments/real.py: rows, sizes, learning rates, command lines, and what their records say.

A cell is a row, a data set and a seed. experiments/real.py runs them, and its docstring says what was fixed
before the runs; experiments/real_report.py makes tables and a figure of the records.
"""

import json
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean

from experiments import real_prepare

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "experiments/results/real.jsonl"

# ---- what is run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    questions: int  # of a step
    steps: int
    dtype: str
    asked: int = 800  # questions of an evaluation at most; there are 800
    start: str = "--steps 30 --batch-size 16"


SIZES = {
    "small": Size(8, 40, "fp32"),
    "small-bf16": Size(8, 40, "bf16"),  # for a GPU, or a CPU with instructions for it
    "half": Size(4, 40, "fp32"),  # for two CPU cores
    "large": Size(16, 80, "bf16"),
    "smoke": Size(2, 2, "fp32", 6, "--steps 2 --batch-size 2"),  # only tries everything
}
BUDGET = "--steps {steps} --batch-size {questions}"
GRPO = f"grpo.py {BUDGET} --group-size 8"
ROWS = {  # row: its command, without model, data, seed and learning rate
    "base": "",
    "start": "sft.py {start} --schedule cosine --lr 2e-4",
    "sft": f"sft.py {BUDGET}",
    "grpo": GRPO,
    "prefix_rft": f"prefix_rft.py {BUDGET} --group-size 8 --prefix-decay-steps {{steps}}",
    "dft": f"idft_hinted.py --hinted off --weight dft {BUDGET}",
    "rft": f"rft_rejection.py --k 8 --questions {{all}} {BUDGET}",
    "sft, then grpo": GRPO,
}
TRAINED = list(ROWS)[2:]  # from the start, in the order in which they are run
AFTER = {"start": "base", "sft, then grpo": "sft"}  # whose model a row begins with; the others: start's
SUPERVISED, RL = (2e-5, 5e-5, 1e-4, 2e-4), (3e-6, 1e-5, 3e-5, 1e-4)
RATES = {  # learning rates to choose from
    "sft": SUPERVISED,
    "grpo": RL,
    "prefix_rft": RL,
    "dft": (5e-5, 1e-4, 2e-4, 4e-4),  # its weights are below 1
}
RATE_OF = {"rft": "sft", "sft, then grpo": "grpo"}  # whose rate a row has; the others: their own
TUNING_SEED, SEEDS = 7, (0, 1, 2)
TOKENS = {"wp": 48, "legs": 64}  # --max-new-tokens: twice an ordinary solution
SAMPLES, TEMPERATURE = 4, 0.6  # of an evaluation
QUIET = "--eval-first off --eval-questions 1 --eval-samples 0"  # of training: the evaluation is another run
DEVICES = {  # what changes speed and memory, and neither a gradient nor a distribution
    "cpu": "--sample-rows 128 --micro-batch-tokens 1024 --save-every 15",
    "cuda": "--sample-rows 800 --micro-batch-tokens 4096 --save-every 0",  # 10 GB a cell,
}


@dataclass(frozen=True)
class Cell:
    size: str
    data: str
    row: str
    seed: int
    rate: float | None = None  # of a tuning run only: other cells have the best one

    @property
    def key(self):
        name = f"{self.size}-{self.data}-{self.row}-{self.seed}".replace(", ", "-").replace(" ", "-")
        return f"{name}-{self.rate:g}" if self.rate else name

    @property
    def source(self):
        """The cell whose model this one begins with; None for the base."""
        if self.row == "base":
            return None
        row = AFTER.get(self.row, "start")
        return Cell(self.size, self.data, row, self.seed if row == "sft" else 0)


def plan(size, sets, records, seeds=SEEDS):
    """All cells in the order in which they are run. The first set is tuned on if there are no rates yet."""
    cells = []
    for data in sets:
        cells += [Cell(size, data, "base", 0), Cell(size, data, "start", 0)]
        for row in TRAINED:
            own = (size, data)
            if row in RATES and data == sets[0] and tuned_on(records, *own, row) in (None, own):
                cells += [Cell(*own, row, TUNING_SEED, rate) for rate in RATES[row]]
            cells += [Cell(*own, row, seed) for seed in seeds]
    return cells


# ---- learning rates --------------------------------------------------------------------------------------


def found_rates(records, size, data, row):
    """{learning rate: pass@1} of a row's tuning runs."""
    cells = [Cell(size, data, row, TUNING_SEED, rate) for rate in RATES[row]]
    return {cell.rate: records[cell.key]["pass@1"] for cell in cells if cell.key in records}


def tuned_on(records, size, data, row):
    """(size, data) of complete tuning runs to take a rate from: its own or the nearest; None without any."""
    sizes = [size, *(x for x in SIZES if x not in (size, "smoke") and size != "smoke")]
    sets = [data, *(x for x in real_prepare.SOURCES if x != data)]
    for place in ((x, y) for x in sizes for y in sets):
        if len(found_rates(records, *place, row)) == len(RATES[row]):
            return place
    return None


def best(found):
    """Of {learning rate: pass@1} the best rate, and of equals the lowest."""
    return max(sorted(found), key=found.get)


def rate_of(cell, records):
    """The learning rate of a cell and where it was tuned; (None, None) where there is none, or not yet."""
    if cell.rate or cell.row in ("base", "start"):
        return cell.rate, None
    row = RATE_OF.get(cell.row, cell.row)
    place = tuned_on(records, cell.size, cell.data, row)
    return (best(found_rates(records, *place, row)), place) if place else (None, None)


def can_start(cell, done, records):
    """Whether the model that it begins with is there, and its learning rate is known.

    The base's model is there before any cell is `done`.
    """
    is_trained = cell.source and cell.source.row != "base"
    if is_trained and cell.source.key not in done:
        return False
    return cell.row in ("base", "start") or rate_of(cell, records)[0] is not None


# ---- command lines ---------------------------------------------------------------------------------------


def folder_of(cell, args):
    return args.runs / "cells" / cell.key


def model_of(cell, args):
    return args.model if cell.row == "base" else folder_of(cell, args) / "final"


def training(cell, rate, args):
    """The command of a cell's training, as words; none for the base."""
    if cell.row == "base":
        return []
    size = SIZES[cell.size]
    numbers = {"steps": size.steps, "questions": size.questions, "all": size.questions * size.steps}
    words = ROWS[cell.row].format(**numbers, start=size.start).split()
    if cell.row != "start":
        words += ["--lr", f"{rate:g}" if rate else "TUNED"]
    words += ["--seed", str(cell.seed), "--model", str(model_of(cell.source, args))]
    return words + shared(cell, "asked", args) + QUIET.split()


def evaluation(cell, args):
    """The command that asks a cell's model: held-out questions, or those of tuning."""
    words = ["sft.py", "--steps", "0", "--seed", "0", "--model", str(model_of(cell, args))]
    words += shared(cell, "valid" if cell.rate else "asked", args)
    words += ["--eval-questions", str(SIZES[cell.size].asked), "--eval-samples", str(SAMPLES)]
    return words + ["--eval-temperature", str(TEMPERATURE)]


def shared(cell, asked, args):
    """Flags that training and evaluation have in common."""
    folder = args.runs / "data" / cell.data
    words = ["--data", str(folder / "train.jsonl"), "--eval-data", str(folder / f"{asked}.jsonl")]
    words += ["--chat-template", "off", "--max-new-tokens", str(TOKENS[cell.data])]
    return words + ["--dtype", SIZES[cell.size].dtype, *DEVICES[args.device].split()]


# ---- records ---------------------------------------------------------------------------------------------


def read_lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read(*files):
    """{key: record} of JSON lines; of two records of a cell the last."""
    return {record["cell"]: record for file in files if file.exists() for record in read_lines(file)}


def verdicts(rows, levels):
    """What an evaluation found: for each level, how many answers to each question are correct.

    rows: of samples.jsonl; levels: {question: level}. A count is a character, in the order of the rows.
    """
    rows = [row for row in rows if row.get("kind") == "evaluation"]
    greedy = {row["question"]: int(row["correct"]) for row in rows if not row["temperature"]}
    counts = dict.fromkeys(greedy, 0)
    for row in rows:
        if row["temperature"]:
            counts[row["question"]] += int(row["correct"])
    found = {}
    for level in dict.fromkeys(levels.values()):
        some = [question for question in greedy if levels[question] == level]
        if some:
            truncated = [row["truncated"] for row in rows if levels[row["question"]] == level]
            found[level] = {
                "greedy": "".join(str(greedy[question]) for question in some),
                "samples": "".join(str(counts[question]) for question in some),
                "truncated": round(mean(truncated), 4),
            }
    return found


def score(found):
    """The numbers of one level of a record."""
    counts = [int(x) for x in found["samples"]]
    return {
        "pass@1": mean(counts) / SAMPLES,
        "greedy": mean(int(x) for x in found["greedy"]),
        "pass@4": mean(count > 0 for count in counts),
    }


def sampling_error(found):
    """Standard error of pass@1 on these questions, which another draw of the samples would show."""
    shares = [int(x) / SAMPLES for x in found["samples"]]
    return sqrt(sum(p * (1 - p) / (SAMPLES - 1) for p in shares)) / len(shares)
