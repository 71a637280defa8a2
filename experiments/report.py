"""Tables, verdicts and figures of the study's records, by the rules of experiments/protocol.md.

    python experiments/report.py              # prints the tables of what has been run
    python experiments/report.py --write      # puts them into docs/ and draws experiments/results/*.svg

Rows that have not been run are named below each table. A row that has some of its seeds is shown with their
number; no comparison takes it before all of them have run.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import records as rec  # noqa: E402
from experiments import study  # noqa: E402
from experiments.intervals import student  # noqa: E402
from experiments.rows import BY_KEY, CLAIMS, LOW, LOWER, NOT_TESTABLE, REGIMES, RL, SUPERVISED  # noqa: E402
from experiments.tables import insert, table  # noqa: E402

RESULTS = ROOT / "experiments/results"
NAMED = 6  # rows at most that are named below a table
SCRIPTS = ("sft", "rft_rejection", "idft_hinted", "dpo", "grpo", "prefix_rft", "luffy", "opsd")  # with rows


# ---- cells -----------------------------------------------------------------------------------------------


def of_seeds(values):
    """The mean and its interval; of one seed the number alone."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    low, high = student(values).interval()
    return f"{mean(values):.3f} [{low:.3f}, {high:.3f}]"


def thousands(tokens):
    return f"{tokens / 1000:,.0f}k"


def p_value(p):
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".")


def not_run(records, keys):
    """Below a table: which of its rows are not complete; of many how many."""
    missing = [rec.lacking(records, key) for key in keys]
    missing = [text for text in missing if text]
    if not missing:
        return []
    text = "; ".join(missing) if len(missing) <= NAMED else f"{len(missing)} of {len(keys)} rows"
    return ["", f"Not run yet: {text}."]


# ---- results ---------------------------------------------------------------------------------------------


def results(records, regime):
    """The table of a regime."""
    head = "row|primary [95 %]|greedy|T = 1|pass@8|levels 1–3|levels 4–6|harder|side|KL|entropy|length"
    lines = []
    for key in rec.rows_of(regime):
        runs = rec.finals(records, key)
        if not runs:
            continue
        line = [rec.name_in(regime, key), of_seeds(rec.numbers(records, key, "primary", regime))]
        for name in ("greedy", "T = 1", "pass@8"):
            line.append(f"{mean(rec.numbers(records, key, name, regime)):.3f}")
        for levels in ("123", "456"):
            line.append(f"{mean(rec.number(x, 'primary', levels) for x in runs):.3f}")
        for name in ("harder", "side", "kl", "entropy"):
            line.append(f"{mean(rec.number(x, name) for x in runs):.3f}")
        line.append(f"{mean(x['length'] for x in runs):.1f}")
        lines.append([*line, adopts(records, key), seeds(records, key)])
    return table([*head.split("|"), "adopts", "seeds"], lines) + not_run(records, rec.rows_of(regime))


def adopts(records, key):
    """How many seeds adopt the demonstrated format, and the median of the steps at which they do."""
    steps, runs = rec.adoptions(records, key)
    if not runs:
        return ""
    return f"{len(steps)} of {runs}" + (f", step {median(steps):g}" if steps else "")


def seeds(records, key):
    if key == rec.BASE:
        return ""
    ready, wanted = len(rec.finals(records, key)), BY_KEY[key].seeds
    return str(ready) if ready == wanted else f"{ready} of {wanted}"


def contrasts(records):
    """The primary number of the main methods in every regime with demonstrations."""
    keys = {name: [f"{regime}: {name}" for regime in rec.DEMONSTRATED] for name in rec.CONTRASTS}
    keys = {"base": [rec.BASE] * len(rec.DEMONSTRATED), "grpo": [rec.GRPO] * len(rec.DEMONSTRATED)} | keys
    lines = []
    for name, row in keys.items():
        cells = []
        for regime, key in zip(rec.DEMONSTRATED, row):
            values = rec.numbers(records, key, "primary", regime)
            cells.append(of_seeds(values) if values else "not run")
        lines.append([name, *cells])
    return table(["", *rec.DEMONSTRATED], lines)


def of_script(records, script):
    """The table of a method's page: all rows that end with this script, by regime."""
    keys = [row.key for row in rec.by_regime() if row.command.split()[0] == f"{script}.py"]
    lines = []
    for key in keys:
        if not rec.finals(records, key):
            continue
        row = BY_KEY[key]
        line = [row.name, row.regime, of_seeds(rec.numbers(records, key, "primary", row.regime))]
        for name in ("greedy", "side"):
            line.append(f"{mean(rec.numbers(records, key, name, row.regime)):.3f}")
        cost = rec.costs(records, key)
        line += [thousands(cost["generated"]), thousands(cost["trained"]), taken(records, row)]
        lines.append([*line, seeds(records, key)])
    head = ["row", "regime", "pass@1 [95 %]", "greedy", "side", "generated", "trained", "learning rate"]
    return table([*head, "seeds"], lines) + not_run(records, keys)


# ---- costs and learning rates ----------------------------------------------------------------------------


def costs(records):
    """The table of costs, a row for each row of the study."""
    head = ["row", "demonstrations", "tokens generated", "trained", "CPU s", "learning rate", "seeds"]
    lines = []
    for row in rec.by_regime():
        if not rec.finals(records, row.key):
            continue
        cost = rec.costs(records, row.key)
        cpu = f"{cost['cpu']:.0f}" if cost["cpu"] is not None else "unknown"
        line = [row.key, f"{cost['demonstrations']:,.0f}"]
        line += [thousands(cost["generated"]), thousands(cost["trained"]), cpu]
        lines.append([*line, taken(records, row), seeds(records, row.key)])
    return table(head, lines) + not_run(records, [row.key for row in rec.by_regime()])


def taken(records, row):
    """The learning rate of the final runs, and what the protocol says about ends of the grid."""
    run = rec.finals(records, row.key)[0]
    text = rec.rate(run["lr"])
    if run["lr"] in (row.rates[0], row.rates[-1]):
        text += ", end of the grid"
    if run["share"]:
        text += f"; after {run['share'][0]} steps of SFT"
    return text


def tuning(records):
    """Tables of the primary number at each learning rate tried, one table for each grid."""
    lines = []
    for rates in (SUPERVISED, LOWER, RL, LOW):
        rows = [row for row in rec.by_regime() if row.rates == rates]
        cells = [tuned(records, row) for row in rows]
        lines += table(["row", *map(rec.rate, rates), "taken"], cells) + [""]
    shares = [" + ".join(map(str, share)) for share in study.SHARES]
    cells = [tuned_share(records, row) for row in rec.by_regime() if row.after_sft]
    return lines + table(["steps of SFT + GRPO", *shares, "taken"], cells)


def tuned(records, row):
    """A line of the table: the share of SFT is the best one."""
    found, best = study.tuned(records, row), study.best(records, row)
    share = best[0] if best else study.best_share(records, row)
    values = [found.get((share, value)) for value in row.rates]
    if row.after_sft and not share:  # not known yet
        values = [None] * len(row.rates)
    cells = ["" if value is None else f"{value:.3f}" for value in values]
    return [row.key, *cells, rec.rate(best[1]) if best else "not tuned yet"]


def tuned_share(records, row):
    found, share = study.tuned(records, row), study.best_share(records, row)
    values = [found.get(option) for option in study.options(row)]
    cells = ["" if value is None else f"{value:.3f}" for value in values]
    return [row.key, *cells, " + ".join(map(str, share)) if share else "not tuned yet"]


# ---- claims ----------------------------------------------------------------------------------------------


def claims(records):
    """The table of claims: every comparison with its difference, interval and p, and the verdict.

    Claims with a verdict come first. Of the others only the comparisons that are known are given.
    """
    lines, open_ones = [], []
    for claim in CLAIMS:
        found = rec.comparisons(records, claim)
        word, details = rec.verdict(found)
        known = [said(x) for x in found if not x.missing]
        line = [claim.text, claim.source, "<br>".join(known), f"**{word}**<br>{details}"]
        if word == "no verdict":
            open_ones.append(line)
        else:
            lines.append(line)
    lines += open_ones
    lines += [[text, "", "", f"**not testable here**<br>{reason}"] for text, reason in NOT_TESTABLE.items()]
    return table(["claim", "paper", "difference [95 %], p after Holm", "verdict"], lines)


def said(comparison):
    """A comparison in words and numbers."""
    text = rec.pair(comparison)
    estimate = comparison.estimate
    low, high = estimate.interval()
    text += f": {estimate.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    if comparison.p is not None:
        text += f", {p_value(comparison.p)}"
    return f"{text}, equivalent" if estimate.is_equivalent else text


# ---- all of it -------------------------------------------------------------------------------------------


def tables(records):
    """{mark: lines} of everything that docs/ shows."""
    found = {"contrasts": contrasts(records)}
    found |= {f"regime {regime}": results(records, regime) for regime in REGIMES}
    found |= {f"rows {script}": of_script(records, script) for script in SCRIPTS}
    return found | {"verdicts": claims(records), "costs": costs(records), "learning rates": tuning(records)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=study.RECORDS, help="file with the records")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/ and the figures")
    args = parser.parse_args(argv)
    records = rec.read(args.records)
    for mark, lines in tables(records).items():
        print("\n".join([f"\n## {mark}\n", *lines]))
        if args.write:
            insert(mark, lines)
    if args.write:
        from experiments import charts  # needs matplotlib, which the tables do not

        charts.write(records, RESULTS)


if __name__ == "__main__":
    main()
