"""The figures of the study, drawn by report.py: every method has one colour in all of them (figures.COLORS).

Rows that have not been run keep their place and say so.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import records as rec  # noqa: E402
from experiments import study  # noqa: E402
from experiments.figures import COLORS, GREY, band, canvas, label, save, styled  # noqa: E402
from experiments.intervals import MARGIN, student  # noqa: E402
from experiments.rows import BY_KEY, CLAIMS, REGIMES  # noqa: E402

SAID = {  # what is demonstrated
    "answers": "answers: no demonstrations",
    "all": "all: every question is demonstrated",
    "easy": "easy: levels 1 to 3 are demonstrated",
    "few 64": "few 64: 64 questions are demonstrated",
    "few 16": "few 16: 16 questions are demonstrated",
    "noisy": "noisy: half of the demonstrations are incorrect",
}
PASS = "pass@1 at T = 0.6"


def color(key):
    return COLORS[rec.method(BY_KEY[key])]


def short(key):
    """A row's name beside its dot; that of a variant is enough, as its colour says the method."""
    method, _, variant = BY_KEY[key].name.partition(", ")
    return variant if variant and not BY_KEY[key].after_sft else BY_KEY[key].name


def asked(regime):
    """Which questions the primary number of a regime is about."""
    levels = REGIMES[regime][1]
    return f"{PASS}, levels {levels[0]} to {levels[-1]}"


def dot(axis, records, key, regime, y):
    """The mean of a row with its interval over seeds, and the seeds, at the height y."""
    values = rec.numbers(records, key, "primary", regime)
    if not values:
        return
    low, high = student(values).interval() if len(values) > 1 else (mean(values), mean(values))
    axis.plot([max(0, low), min(1, high)], [y, y], color=color(key), linewidth=1.5, alpha=0.7)
    axis.plot(values, [y] * len(values), "|", color=color(key), markersize=5, markeredgewidth=1)
    axis.plot(mean(values), y, "o", color=color(key), markersize=5.5)


def dots(axis, records, keys, names, regime):
    """A line for each row. The base is a dashed line."""
    for y, key in enumerate(keys):
        dot(axis, records, key, regime, y)
    base = rec.numbers(records, rec.BASE, "primary", regime)
    if base:
        axis.axvline(base[0], color=GREY, linestyle="--", linewidth=1)
    lacking = [" (not run)" * (not rec.finals(records, key)) for key in keys]
    axis.set_yticks(range(len(keys)), [name + more for name, more in zip(names, lacking)], fontsize=8)
    axis.set(xlim=(-0.02, 1.02), ylim=(len(keys) - 0.4, -0.6))
    axis.grid(axis="x")
    axis.tick_params(axis="y", length=0)


def results(records):
    """Every row by regime, in two columns."""
    columns = (("all", "noisy", "few 16"), ("answers", "easy", "few 64"))
    figure, _ = canvas(1, 1, 8.2)
    figure.clear()
    for part, regimes in zip(figure.subfigures(1, 2), columns):
        keys = {regime: rec.rows_of(regime)[1:] for regime in regimes}  # without the base
        heights = [len(keys[regime]) + 2 for regime in regimes]
        axes = part.subplots(len(regimes), 1, height_ratios=heights)
        for axis, regime in zip(axes, regimes):
            names = [rec.name_in(regime, key) for key in keys[regime]]
            dots(axis, records, keys[regime], names, regime)
            axis.set_title(SAID[regime], loc="right")
            axis.set_xlabel(asked(regime))
    figure.suptitle("dots: means with 95 % intervals; ticks: seeds; dashed: the base model", fontsize=9)
    return figure


def contrasts(records):
    """The main methods in every regime with demonstrations, in one row of panels."""
    names = ["grpo", *rec.CONTRASTS]
    figure, [axes] = canvas(1, len(rec.DEMONSTRATED), 2.2, sharey=True)
    for axis, regime in zip(axes, rec.DEMONSTRATED):
        keys = [rec.GRPO, *(f"{regime}: {name}" for name in rec.CONTRASTS)]
        dots(axis, records, keys, names, regime)
        axis.set_title(regime)
        axis.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    axes[0].set_yticks(range(len(names)), names)
    text = f"{PASS} (easy: of levels 4 to 6); dots: means with 95 % intervals; ticks: seeds; dashed: the base"
    figure.supxlabel(text, fontsize=9)
    return figure


def pass_k(records):
    """pass@1 and pass@8 of the same samples: what a method gains in one try and in eight."""
    regimes = ("answers", "easy")
    keys = {regime: [rec.BASE, *rec.rows_of(regime)[1:]] for regime in regimes}
    keys = {regime: [key for key in some if rec.finals(records, key)] for regime, some in keys.items()}
    figure, [axes] = canvas(1, 2, 0.2 * max(map(len, keys.values())) + 1.1)
    for axis, regime in zip(axes, regimes):
        for y, key in enumerate(keys[regime]):
            paint = GREY if key == rec.BASE else color(key)
            runs = rec.finals(records, key)
            one, eight = (mean(rec.number(x, name) for x in runs) for name in ("primary", "pass@8"))
            axis.plot([one, eight], [y, y], color=paint, linewidth=1.5, alpha=0.7)
            axis.plot(one, y, "o", color=paint, markerfacecolor="none", markersize=5)
            axis.plot(eight, y, "o", color=paint, markersize=5)
        names = [rec.name_in(regime, key) for key in keys[regime]]
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(xlim=(0.3, 1.02), ylim=(max(map(len, keys.values())) - 0.4, -0.6), title=SAID[regime])
        axis.grid(axis="x")
        axis.tick_params(axis="y", length=0)
    text = "levels 1 to 6, T = 0.6; open: pass@1, filled: pass@8 of the same samples; means over seeds"
    figure.supxlabel(text, fontsize=9)
    return figure


def claims(records):
    """A forest plot: every comparison of every claim, filled where it is significant."""
    lines = []
    for claim in CLAIMS:
        found = rec.comparisons(records, claim)
        lines.append((claim, rec.verdict(found)))
        lines += [(comparison, None) for comparison in found]
    figure, [[axis]] = canvas(1, 1, 0.175 * len(lines) + 0.9)
    names = []
    for y, (what, verdict) in enumerate(lines):
        if verdict:  # the head of a claim, over the whole width
            where = {"xycoords": ("figure fraction", "data"), "va": "center", "annotation_clip": False}
            where |= {"fontsize": 8, "weight": "bold"}
            axis.annotate(what.text, (0.008, y), **where).set_in_layout(False)
            axis.annotate(verdict[0], (0.992, y), ha="right", **where).set_in_layout(False)
            names.append("")
            continue
        names.append(rec.pair(what) + " (not run)" * bool(what.missing))
        axis.fill_betweenx([y - 0.5, y + 0.5], -MARGIN, MARGIN, color=GREY, alpha=0.2, linewidth=0)
        axis.plot([0, 0], [y - 0.5, y + 0.5], color=GREY, linewidth=1)
        if not what.missing:
            paint = color(what.better)
            axis.plot(what.estimate.interval(), [y, y], color=paint, linewidth=1.5)
            inside = paint if what.direction else "none"
            axis.plot(what.estimate.mean, y, "o", color=paint, markerfacecolor=inside, markersize=5)
    axis.set_yticks(range(len(lines)), names, fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_ylim(len(lines) - 0.4, -0.8)
    axis.set_title("first row minus second, 95 % interval; filled: p < .05 after Holm; band: ±.02", size=9)
    axis.set_xlabel(f"difference in {PASS}, or in retention (side)")
    return figure


def costs(records):
    """The primary number over all tokens that were generated and trained, a panel for each regime."""
    figure, axes = canvas(3, 2, 9)
    for axis, regime in zip(axes.flat, REGIMES):
        points = []
        for key in rec.rows_of(regime)[1:]:
            values = rec.numbers(records, key, "primary", regime)
            if values:
                cost = rec.costs(records, key)
                at = (cost["generated"] + cost["trained"], mean(values))
                axis.plot(*at, "o", color=color(key), markersize=6)
                points.append((short(key), at, color(key)))
        axis.set_xscale("log")
        axis.set(xlim=(4e4, 1.6e6), title=SAID[regime], ylabel=asked(regime))
        axis.set_xticks([1e5, 1e6], ["100k", "1M"])
        axis.grid()
        if regime in list(REGIMES)[-2:]:
            axis.set_xlabel("tokens generated + trained")
        base = rec.numbers(records, rec.BASE, "primary", regime)
        heights = [y for _, (_, y), _ in points] + base
        axis.set_ylim(min(heights, default=0) - 0.06, max(heights, default=1) + 0.09)
        if base:
            axis.plot(axis.get_xlim(), [base[0]] * 2, color=GREY, linestyle="--", linewidth=1)
        axis.points = points
    figure.draw_without_rendering()
    for axis in axes.flat:
        label(axis, axis.points)
    return figure


def learning_rates(records):
    """What was tuned, a panel for each row: both seeds, their mean, and the learning rate taken."""
    rows = rec.by_regime()
    columns = 6
    lines = -(-len(rows) // columns)
    figure, axes = canvas(lines, columns, 1.25 * lines + 0.4)
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, rows):
        share = study.best_share(records, row)
        runs = [x for x in study.of_row(records, row, "tune") if x["lr"] in row.rates]
        runs = [x for x in runs if study.share_of(x) == share]
        if row.after_sft and not share:
            runs = []
        paint = COLORS[rec.method(row)]
        values = [[x["primary"] for x in runs if x["lr"] == value] for value in row.rates]
        means = [mean(some) if some else None for some in values]
        known = [i for i, value in enumerate(means) if value is not None]
        for i in known:
            axis.plot([i] * len(values[i]), values[i], "_", color=paint, markersize=7)
        axis.plot(known, [means[i] for i in known], color=paint, linewidth=1)
        axis.plot(known, [means[i] for i in known], "o", color=paint, markerfacecolor="none", markersize=5)
        best = study.best(records, row)
        if best:
            i = row.rates.index(best[1])
            axis.plot(i, means[i], "o", color=paint, markersize=6)
        limits(axis, [x for some in values for x in some])
        axis.set_xticks(range(len(row.rates)), [rec.rate(x) for x in row.rates], fontsize=6.5)
        axis.set_xlim(-0.4, len(row.rates) - 0.6)
        axis.tick_params(axis="y", labelsize=6.5)
        axis.set_title(in_two_lines(row.key), fontsize=7)
    figure.supylabel(f"primary number ({PASS}) on the questions for tuning", fontsize=9)
    figure.supxlabel("learning rate; filled: the one taken, marks: the two seeds", fontsize=9)
    return figure


def limits(axis, values):
    """At least a tenth of the scale, so that noise does not look like an effect."""
    if not values:
        axis.set(ylim=(0, 1), yticks=[0, 0.5, 1])
        return
    middle = (min(values) + max(values)) / 2
    half = max(0.05, 0.6 * (max(values) - min(values)))
    axis.set_ylim(middle - half, middle + half)
    axis.locator_params(axis="y", nbins=4)


def in_two_lines(key):
    regime, _, name = key.partition(": ")
    method, comma, variant = name.partition(", ")
    if len(name) > 16 and comma:
        return f"{regime}: {method},\n{variant}"
    return f"{regime}:\n{name}"


def curves(records):
    """Reward of on-policy completions and length of responses over the steps, by regime."""
    figure, axes = canvas(2, len(rec.DEMONSTRATED), 4.2, sharex=True, sharey="row")
    methods = ("grpo", "sft, then grpo", "luffy", "prefix_rft")
    for column, regime in zip(axes.T, rec.DEMONSTRATED):
        for method in methods:
            key = rec.GRPO if method == "grpo" else f"{regime}: {method}"
            runs = [x for x in rec.finals(records, key) if x["curve"]]
            group = rec.parsed(BY_KEY[key].command)[1].group_size
            rewards = [[reward for _, reward in rec.on_policy_reward(x, group)] for x in runs]
            lengths = [[length for _, _, _, length, _ in x["curve"]] for x in runs]
            for axis, each in zip(column, (rewards, lengths)):
                if each:
                    band(axis, [point[0] for point in runs[0]["curve"]], each, COLORS[method], method)
        column[0].set_title(regime)
        column[1].set_xlabel("step")
        column[1].axhline(rec.ADOPTED, color=GREY, linestyle=":", linewidth=1)
        for axis in column:
            axis.grid()
    axes[0, 0].set(ylabel="reward of on-policy\ncompletions", ylim=(0, 1.02))
    axes[1, 0].set(ylabel="response length, tokens\n(hybrids included)", ylim=(0, 60))
    handles = [axes[0, 0].plot([], [], color=COLORS[method], linewidth=2)[0] for method in methods]
    text = "dotted: 30 tokens, the format is adopted"
    handles.append(axes[0, 0].plot([], [], ":", color=GREY, linewidth=1)[0])
    figure.legend(handles, [*methods, text], loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle("mean over seeds; bands from the lowest seed to the highest", fontsize=9)
    return figure


FIGURES = (results, contrasts, pass_k, claims, costs, learning_rates, curves)


@styled
def draw(records):
    """{file name: figure}."""
    return {f"{function.__name__}.svg": function(records) for function in FIGURES}


def write(records, folder):
    for name, figure in draw(records).items():
        save(figure, folder / name)
