"""Tables and a figure of the records of experiments/real.py, for docs/results.md."""

from pathlib import Path
from statistics import mean, variance

from mpmath import betainc, findroot

from common.plumbing.flags import demand
from experiments import real_prepare
from experiments.real_cells import (
    RATES,
    RECORDS,
    ROWS,
    SIZES,
    TRAINED,
    TUNING_SEED,
    best,
    found_rates,
    score,
)
from experiments.real_prepare import HELD_OUT, OTHER

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "experiments/results/real.svg"
PAGE = ROOT / "docs/results.md"
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
]

# ---- intervals -------------------------------------------------------------------------------------------


def quantile(freedom, outside=0.05):
    """The t beyond which Student's distribution has 5 %, on both sides together."""

    def excess(t):
        return betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - outside

    return float(findroot(excess, (1, 20), solver="bisect"))


def student(values):
    """Mean and the ends of its 95 % interval over seeds; a single value has none."""
    if len(values) < 2:
        return mean(values), None, None
    half = quantile(len(values) - 1) * (variance(values) / len(values)) ** 0.5
    return mean(values), mean(values) - half, mean(values) + half


def welch(a, b):
    """Difference of two means with its 95 % interval. Variances may differ; of a single value it is 0."""
    difference = mean(a) - mean(b)
    if max(len(a), len(b)) < 2:
        return difference, None, None
    errors = [(variance(x) / len(x), len(x) - 1) for x in (a, b) if len(x) > 1]  # squared, of the means
    total = sum(error for error, _ in errors)
    if not total:
        return difference, difference, difference
    freedom = total**2 / sum(error**2 / n for error, n in errors)
    half = quantile(freedom) * total**0.5
    return difference, difference - half, difference + half


# ---- tables ----------------------------------------------------------------------------------------------


def shown(estimate, sign=""):
    middle, low, high = (None if x is None else f"{x:{sign}.3f}" for x in estimate)
    return middle if low is None else f"{middle} [{low}, {high}]"


def table(head, lines):
    """Lines of cells as Markdown."""
    lines = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(line) + " |" for line in lines]


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
            line.append(shown(student(numbers(done, level))))
            line += [f"{mean(numbers(done, level, name)):.3f}" for name in ("greedy", "pass@4")]
        for name in ("tokens_generated", "tokens_trained"):
            line.append(f"{mean(x[name] for x in done) / 1000:.0f}k")
        spent = [x["cpu_train"] for x in done if x["cpu_train"] is not None]
        line.append(f"{mean(spent) / 60:.0f}" if spent else "")
        rates = sorted({x["rate"] for x in done if x["rate"]})
        line += [", ".join(f"{rate:g}" for rate in rates), str(len(done))]
        lines.append(line)
    head = ["", "pass@1", "greedy", "pass@4", "other: pass@1", "greedy", "pass@4"]
    return table([*head, "generated", "trained", "CPU min", "learning rate", "seeds"], lines)


def comparisons(records, size, data):
    """Differences of rows in pass@1."""
    rows = rows_of(records, size, data)
    lines = []
    for better, worse in COMPARED:
        if better in rows and worse in rows:
            line = [f"{better} over {worse}"]
            for level in (HELD_OUT, OTHER):
                pair = [numbers(rows[row], level) for row in (better, worse)]
                line.append(shown(welch(*pair), "+"))
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
    return lines + ["", f"Best at an end of the rates that were tried: {', '.join(ends)}."] * bool(ends)


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
        lines += [f"**{data}, size {size}**", ""]
        for part in (results, comparisons, tuning, mixed):
            if found := part(records, *place):
                lines += [*found, ""]
    if not lines:
        return ["Nothing has been recorded yet."]
    picture = f"![pass@1 of each row with its interval over seeds](../experiments/results/{FIGURE.name})"
    return [*lines, picture]


# ---- the figure and the page -----------------------------------------------------------------------------


def plot(records, path):
    """pass@1 of each row with its interval: held-out questions and those of another origin."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grey = "#7a7a7a"  # can be read on a light page and on a dark one
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(keys, grey) | {"svg.fonttype": "none", "svg.hashsalt": "real", "font.size": 9}
    found = places(records)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.6, 2.9 * len(found)), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, place in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found):
            rows = rows_of(records, *place)
            for level, color, offset in ((HELD_OUT, "#1f83d6", -0.12), (OTHER, "#e08020", 0.12)):
                for i, done in enumerate(rows.values()):
                    middle, low, high = student(numbers(done, level))
                    if low is not None:
                        axis.plot([low, high], [i + offset] * 2, color=color, linewidth=1.5)
                    label = level if i == 0 else None
                    axis.plot(middle, i + offset, "o", color=color, markersize=5, label=label)
            axis.set_yticks(range(len(rows)), list(rows))
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
            axis.set(title=f"{place[1]}, size {place[0]}", xlabel="pass@1 at temperature 0.6")
            axis.legend(frameon=False)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def insert(lines, page):
    """Put lines between the marks of a page."""
    before, mark, rest = page.read_text().partition("<!-- real -->\n")
    _, end, after = rest.partition("<!-- /real -->")
    assert mark and end, f"{page} has no marks <!-- real --> and <!-- /real -->"
    page.write_text(before + mark + "\n".join(lines) + "\n" + end + after)


def report(records, write):
    lines = report_lines(records)
    print("\n".join(lines))
    if write:
        insert(lines, PAGE)
        if places(records):
            plot(records, FIGURE)
