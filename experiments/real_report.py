"""Tables and a figure of the records of experiments/real.py, for docs/results.md."""

from math import hypot
from pathlib import Path
from statistics import mean

from common.plumbing.flags import demand
from experiments import real_prepare
from experiments.figures import COLORS, GREY, canvas, save, styled
from experiments.intervals import one_sample, student, welch
from experiments.real_cells import (
    RATES,
    RECORDS,
    ROWS,
    SEEDS,
    SIZES,
    TRAINED,
    TUNING_SEED,
    best,
    found_rates,
    sampling_error,
    score,
)
from experiments.real_prepare import HELD_OUT, OTHER
from experiments.tables import insert, table

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "experiments/results/real.svg"
COMPARED = [  # row over row
    ("sft", "start"),
    ("grpo", "start"),
    ("prefix_rft", "start"),
    ("prefix_rft", "sft"),
    ("prefix_rft", "grpo"),
    ("sft, then grpo", "prefix_rft"),
    ("sft, then grpo", "sft"),
    ("dft", "sft"),
    ("rft", "grpo"),
    ("dft", "start"),
    ("rft", "start"),
    ("dft", "grpo"),
]

# ---- tables ----------------------------------------------------------------------------------------------


def of_seeds(values):
    """The mean and its interval over seeds; of one or two seeds the mean alone."""
    if len(values) < len(SEEDS):
        return f"{mean(values):.3f}"
    low, high = student(values).interval()
    return f"{mean(values):.3f} [{low:.3f}, {high:.3f}]"


def difference(a, b, error=0.0):
    """The mean of a minus that of b. A single b, such as the start's, has the error of its samples."""
    between = mean(a) - mean(b)
    if len(a) < len(SEEDS) or 1 < len(b) < len(SEEDS):
        return f"{between:+.3f}"
    found = welch(a, b) if len(b) >= len(SEEDS) else one_sample(a, b[0])
    # both errors, never narrower than the seeds' interval alone
    half = hypot(found.interval()[1] - found.mean, 1.96 * error)
    return f"{between:+.3f} [{between - half:+.3f}, {between + half:+.3f}]"


def places(records):
    """(size, data) of which there are records, smoke tests apart."""
    found = {(x["size"], x["data"]) for x in records.values()}
    return [(s, d) for s in SIZES for d in real_prepare.SOURCES if (s, d) in found and s != "smoke"]


def rows_of(records, size, data):
    """{row: records of its seeds}, in the order of ROWS."""
    some = [x for x in records.values() if (x["size"], x["data"]) == (size, data)]
    some = sorted((x for x in some if x["seed"] != TUNING_SEED), key=lambda x: x["seed"])
    found = {row: [x for x in some if x["row"] == row] for row in ROWS}
    return {row: done for row, done in found.items() if done}


def numbers(done, level, name="pass@1"):
    return [score(x["asked"][level])[name] for x in done]


def results(records, size, data):
    """The table of a data set."""
    lines = []
    for row, done in rows_of(records, size, data).items():
        line = [row]
        for level in (HELD_OUT, OTHER):
            line.append(of_seeds(numbers(done, level)))
            line += [f"{mean(numbers(done, level, name)):.3f}" for name in ("greedy", "pass@4")]
        for name in ("tokens_generated", "tokens_trained"):
            line.append(f"{mean(x[name] for x in done) / 1000:.0f}k")
        spent = [x["wall_train"] for x in done if x["wall_train"]]
        line.append(f"{mean(spent) / 60:.1f}" if spent else "")
        rates = sorted({x["rate"] for x in done if x["rate"]})
        line += [", ".join(f"{rate:g}" for rate in rates), str(len(done))]
        lines.append(line)
    head = ["", "pass@1", "greedy", "pass@4", "other: pass@1", "other: greedy", "other: pass@4"]
    return table([*head, "generated", "trained", "minutes", "learning rate", "seeds"], lines)


def comparisons(records, size, data):
    """Differences of rows in pass@1."""
    rows = rows_of(records, size, data)
    lines = []
    for better, worse in COMPARED:
        if better in rows and worse in rows:
            line = [f"{better} over {worse}"]
            for level in (HELD_OUT, OTHER):
                pair = [numbers(rows[row], level) for row in (better, worse)]
                single = rows[worse][0]["asked"][level] if len(rows[worse]) == 1 else None
                line.append(difference(*pair, sampling_error(single) if single else 0.0))
            lines.append(line)
    return table(["difference in pass@1", "held out", "another origin"], lines) if lines else []


def tuning(records, size, data):
    """pass@1 of each learning rate on the questions of tuning, the best in bold."""
    lines, ends = [], []
    for row, rates in RATES.items():
        found = found_rates(records, size, data, row)
        line = [row]
        for rate in rates:
            text = f"{found[rate]:.3f} at {rate:g}" if rate in found else ""
            line.append(f"**{text}**" if len(found) == len(rates) and rate == best(found) else text)
        if found:
            lines.append(line)
        if len(found) == len(rates) and best(found) in (rates[0], rates[-1]):
            ends.append(row)
    if not lines:
        return []
    lines = table(["learning rates", "1st", "2nd", "3rd", "4th"], lines)
    if ends:
        lines += ["", f"Best at an end of the learning rates that were tried: {', '.join(ends)}."]
    return lines


def mixed(records, size, data):
    """A sentence where the rows of a table are not comparable: other starts. Other questions are refused."""
    some = [x for done in rows_of(records, size, data).values() for x in done]
    sets = {x["digests"]["data"] for x in some}
    sentence = f"{data}, {size} was recorded with different questions; remove the records of one kind."
    demand(len(sets) < 2, f"{RECORDS.name}: {sentence}")
    starts = {x["digests"]["initial"] for x in some if x["row"] in TRAINED and x["row"] != "sft, then grpo"}
    if len(starts) < 2:
        return []
    return [f"Not all rows began with the same checkpoint: {len(starts)} starts were trained."]


def report_lines(records):
    """What stands between the marks of docs/results.md."""
    lines = []
    for place in places(records):
        size, data = place
        some = [x for done in rows_of(records, *place).values() for x in done]
        machines = {f"{x['device']}, torch {x['versions']['torch']}" for x in some}
        lines += [f"**{data}, size {size}** ({'; '.join(sorted(machines))})", ""]
        for part in (results, comparisons, tuning, mixed):
            if found := part(records, *place):
                lines += [*found, ""]
    if not lines:
        return ["Nothing has been recorded yet."]
    picture = f"![pass@1 of each row with its interval over seeds](../experiments/results/{FIGURE.name})"
    return [*lines, picture]


# ---- the figure ------------------------------------------------------------------------------------------


@styled
def plot(records, path):
    """pass@1 of each row with its interval and its seeds: full dots held out, open ones another origin."""
    found = places(records)
    figure, axes = canvas(len(found), 1, 2.9 * len(found))
    for [axis], (size, data) in zip(axes, found):
        rows = rows_of(records, size, data)
        for y, (row, done) in enumerate(rows.items()):
            color = COLORS.get(row, GREY)
            for level, offset, inside in ((HELD_OUT, -0.15, color), (OTHER, 0.15, "none")):
                values = numbers(done, level)
                low = high = mean(values)
                if len(values) >= len(SEEDS):
                    low, high = student(values).interval()
                axis.plot([max(0, low), high], [y + offset] * 2, color=color, linewidth=1.5, alpha=0.7)
                axis.plot(values, [y + offset] * len(values), "|", color=color, markersize=5)
                axis.plot(mean(values), y + offset, "o", color=color, markerfacecolor=inside, markersize=5)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set(ylim=(len(rows) - 0.4, -0.6), title=f"{data}, size {size}")
        axis.grid(axis="x")
        axis.set_xlabel("pass@1 at T = 0.6; full: held-out questions, open: another origin; ticks: seeds")
    save(figure, path)


def report(records, write):
    lines = report_lines(records)
    print("\n".join(lines))
    if write:
        insert("real", lines)
        if places(records):
            plot(records, FIGURE)
