"""Does IDFT forget less than SFT at equal pass@1?

    python experiments/retention.py              # runs what is not recorded; half an hour with one thread
    python experiments/retention.py --write      # and puts the table and the figure into the page of IDFT

"Towards On-Policy SFT" (arXiv 2602.12222) says so. A method that has learnt less has also changed less, so the
study's retention of IDFT, whose pass@1 is low, and of SFT, whose pass@1 is at the ceiling, answer nothing.
Here SFT is stopped earlier: runs of fewer steps, each with its own linear decay, give retention as a function
of pass@1. Read there, by linear interpolation between the two runs around it, at the pass@1 where IDFT ends.

The rule, fixed before the runs: SFT at its own tuned learning rate and at IDFT's, seeds 11 to 15 as in the
study, the study's numbers (pass@1 at T = 0.6 of levels 1 to 6; retention: the split `side`). IDFT forgets less
where Welch's test over the seeds has p < .05 after Holm's correction over both learning rates. IDFT on
demonstrations as they are and IDFT on rewrites are two questions. This study is not part of the protocol, which
calls the claim not testable.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import records as rec  # noqa: E402
from experiments import study  # noqa: E402
from experiments.figures import COLORS, GREY, canvas, save, styled  # noqa: E402
from experiments.intervals import holm, student, welch  # noqa: E402
from experiments.rows import SEEDS, SUPERVISED, Row  # noqa: E402
from experiments.tables import insert, table  # noqa: E402

RESULTS = ROOT / "experiments/results"
RECORDS = RESULTS / "retention.jsonl"
STEPS = (10, 20, 30, 40, 60, 80, 120)  # of SFT
RATES = (4e-4, 9e-4)  # IDFT's tuned learning rate and SFT's
ASKED = {"idft": "all: idft", "hinted": "all: hinted + idft"}  # colour: row of the study


# ---- runs ------------------------------------------------------------------------------------------------


def of_sft(steps):
    return Row(f"sft, {steps} steps", "all", f"sft.py --steps {steps}", SUPERVISED)


def run_all():
    """Each run is a line of the records, in the study's form."""
    runs = ROOT / "runs/retention"
    runs.mkdir(parents=True, exist_ok=True)
    done = {(x["row"], x["lr"], x["seed"]) for x in rec.read(RECORDS)}
    for row in map(of_sft, STEPS):
        for rate in RATES:
            for seed in SEEDS[: row.seeds]:
                if (row.key, rate, seed) in done:
                    continue
                option = (None, rate)
                commands = study.stages([], row, option)
                record = study.run(row, "final", option, seed, commands, runs)
                with open(RECORDS, "a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{row.key}, {rate:g}, seed {seed}", flush=True)


# ---- retention at equal pass@1 ---------------------------------------------------------------------------


def path(records, base, rate, seed):
    """[(pass@1, retention)] of a seed: the base, then SFT by its number of steps."""
    runs = [base]
    for row in map(of_sft, STEPS):
        runs += [x for x in records if (x["row"], x["lr"], x["seed"]) == (row.key, rate, seed)]
    return [(rec.number(x, "primary"), rec.number(x, "side")) for x in runs]


def at(points, target):
    """Retention where the path last rises through the target, or None if it does not."""
    found = None
    for (x, y), (next_x, next_y) in zip(points, points[1:]):
        if x < target <= next_x:
            found = y + (next_y - y) * (target - x) / (next_x - x)
    return found


def compared(study_records, records):
    """The lines of the table, for both questions and both learning rates."""
    base = rec.finals(study_records, rec.BASE)[0]
    lines = []
    for key in ASKED.values():
        own = rec.numbers(study_records, key, "side", "all")
        target = mean(rec.numbers(study_records, key, "primary", "all"))
        lines.append([key.removeprefix("all: "), f"{target:.3f}", interval(student(own)), "", ""])
        gains, sides = [], []
        for rate in RATES:
            seeds = [at(path(records, base, rate, seed), target) for seed in SEEDS[: len(own)]]
            sides.append(seeds)
            gains.append(welch(own, seeds))
        for rate, seeds, gain, p in zip(RATES, sides, gains, holm([x.p for x in gains])):
            line = [f"sft, learning rate {rec.rate(rate)}", f"{target:.3f}", interval(student(seeds))]
            low, high = gain.interval()
            line.append(f"{gain.mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            lines.append([*line, "< .001" if p < 0.001 else f"{p:.3f}".replace("0.", ".")])
    return table(["", "pass@1", "side [95 %]", "IDFT − SFT [95 %]", "p after Holm"], lines)


def interval(estimate):
    low, high = estimate.interval()
    return f"{estimate.mean:.3f} [{low:.3f}, {high:.3f}]"


@styled
def draw(study_records, records):
    """Retention over pass@1: SFT by its number of steps, and where IDFT ends."""
    base = rec.finals(study_records, rec.BASE)[0]
    figure, [[axis]] = canvas(1, 1, 2.8)
    for rate, style in zip(RATES, ("--", "-")):
        paths = [path(records, base, rate, seed) for seed in SEEDS[:5]]
        points = [[mean(values) for values in zip(*some)] for some in zip(*paths)]
        name = f"sft, {rec.rate(rate)}, 0 to {STEPS[-1]} steps"
        axis.plot(*zip(*points), f"o{style}", color=COLORS["sft"], markersize=4, label=name)
    for name, key in ASKED.items():
        xs, ys = (rec.numbers(study_records, key, number, "all") for number in ("primary", "side"))
        axis.plot(xs, ys, "|", color=COLORS[name], alpha=0.7)
        axis.plot(mean(xs), mean(ys), "o", color=COLORS[name], label=key.removeprefix("all: "))
    axis.axhline(rec.number(base, "side"), color=GREY, linestyle=":", linewidth=1)
    axis.set(xlabel="pass@1 at T = 0.6", ylabel="side: retention", xlim=(0, 1.02))
    axis.set_title("means of five seeds; ticks: seeds of IDFT; dotted: the base", fontsize=9)
    axis.grid()
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write table and figure of the page of IDFT")
    args = parser.parse_args()
    run_all()
    lines = compared(rec.read(), rec.read(RECORDS))
    print("\n".join(lines))
    if args.write:
        insert("retention", lines)
        save(draw(rec.read(), rec.read(RECORDS)), RESULTS / "retention.svg")


if __name__ == "__main__":
    main()
