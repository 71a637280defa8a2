"""Plot the metrics of runs: python tools/plot.py runs/sft runs/grpo --out curves.png"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.plumbing import flags  # noqa: E402

try:
    import matplotlib.pyplot as plt
    import numpy as np
except ImportError:
    raise flags.BadInput("plots need matplotlib; run pip install matplotlib.") from None

TITLES = {
    "reward": "reward, batch mean",
    "loss": "loss",
    "pass@1": "pass@1, held-out questions",
    "entropy": "entropy, nats per token",
    "response_len": "response length, tokens",
    "kl": "KL of policy and reference, nats per token",
}
# All of medium lightness: readable on a white page and on a dark one.
COLORS = "#1f83d6 #e08020 #2a9d5c #d62728 #9467bd #e0559f #17a2b8 #a5723c".split()
FRAME = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color grid.color".split()
plt.rcParams.update(dict.fromkeys(FRAME, "#7a7a7a") | {"axes.grid": True, "grid.alpha": 0.3})


def read_run(path):
    """The lines of a run's metrics.jsonl as dicts."""
    rows = []
    text = path.read_text(errors="replace") if path.is_file() else ""
    flags.demand(text, f"{path} is missing or empty; give the folder of a run that has begun.")
    for n, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] = float(rows[-1]["step"])
        except (ValueError, TypeError, KeyError):
            raise flags.BadInput(f"{path}, line {n}: not a JSON object with a step.") from None
    return rows


def series(rows, metric, smooth=1):
    """Steps and values of a metric, each value a mean over the last `smooth` steps."""
    if metric == "loss":  # beside a reward it is a policy gradient's, which shows no progress
        rows = [row for row in rows if "reward" not in row]
    rows = [row for row in rows if metric in row]
    steps = np.array([row["step"] for row in rows])
    values = np.array([row[metric] for row in rows], float)  # null becomes NaN, which is a gap
    if metric == "kl" and not values.any():  # the run had no reference
        return [], []
    return steps, [values[(n - smooth < steps) & (steps <= n)].mean() for n in steps]


def draw(runs, smooth=1):
    """A panel for each metric that some run has; `runs` are {label: rows}."""
    panels = {m: [series(rows, m, smooth) for rows in runs.values()] for m in TITLES}
    panels = {m: curves for m, curves in panels.items() if any(len(x) for x, _ in curves)}
    flags.demand(panels, f"{', '.join(runs)}: no metrics yet; wait for the first step.")
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = int(np.ceil(len(panels) / columns))
    figure = plt.figure(figsize=(4.5 * columns, 3 * lines + 0.5), layout="constrained")
    xlabel = "step" if smooth == 1 else f"step (mean of the last {smooth})"
    for place, (metric, curves) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(lines, columns, place, title=TITLES[metric], xlabel=xlabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        for i, (steps, values) in enumerate(curves):  # a run has one colour in all panels
            axis.plot(steps, values, [".-", ".--", ".:"][i // 8 % 3], color=COLORS[i % 8])
    figure.legend(axis.lines, runs, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def main(argv=None):
    parser = flags.Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, help="PNG file to write; without it a window opens")
    parser.add_argument("--smooth", type=flags.integer(1), default=1, help="mean of this many steps")
    args = parser.parse_args(argv)
    figure = draw({str(run): read_run(run / "metrics.jsonl") for run in args.runs}, args.smooth)
    if args.out:
        valid = args.out.suffix == ".png" and args.out.parent.is_dir()
        flags.demand(valid, f"--out {args.out}: must be a .png file in a folder that exists.")
        return figure.savefig(args.out, dpi=130, transparent=True)
    flags.demand(plt.get_backend() != "agg", "no screen for a window; add --out curves.png.")
    plt.show()


if __name__ == "__main__":
    main()
