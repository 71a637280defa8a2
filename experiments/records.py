"""What the study's records say: numbers of rows, costs, comparisons and verdicts, by experiments/protocol.md.

A record is a line of experiments/results/study.jsonl, written by study.py. A row is complete when all of its
seeds have run. Comparisons take complete rows only, so that no verdict depends on when one looks.
"""

import importlib
import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from math import comb
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import study  # noqa: E402
from experiments.intervals import Estimate, holm, one_sample, welch  # noqa: E402
from experiments.rows import BY_KEY, REGIMES, ROWS, SEEDS  # noqa: E402

BASE = "base"
METHODS = ("sft", "dft", "eaft", "idft", "hinted", "rft", "dpo", "simpo", "grpo")
METHODS += ("maxrl", "gspo", "cispo", "dapo", "opsd", "sft, then grpo", "luffy", "rl + sft loss", "chord")
METHODS += ("srft", "hpt", "uft", "prefix_rft")  # in the order of tables and figures
GRPO = "answers: grpo"  # needs no demonstrations, so it is a row of every regime
HYBRIDS = ("prefix_rft", "luffy")  # scripts whose groups have demonstrated completions
FORMER = "prefix_rft.py --prefix-schedule full --prefix-loss all --prefix-weight luffy"
CONTRASTS = ("sft", "sft, then grpo", "luffy", "prefix_rft")  # in every regime with demonstrations
DEMONSTRATED = tuple(regime for regime in REGIMES if regime != "answers")
ADOPTED = 30  # tokens of the mean response; the base's have 15, demonstrations 50
SIGNIFICANT = 0.05
# names of numbers that a record has for each level, and of the others
BY_LEVEL = {"primary": "test@0.6", "greedy": "test@0", "T = 1": "test@1"}
WHOLE = {"pass@8": "pass@8", "harder": "harder@0.6", "side": "side@0.6"}
WHOLE |= {name: name for name in ("kl", "entropy", "length", "truncated")}


read = study.read_records  # retention.py has records of the same form


# ---- rows ------------------------------------------------------------------------------------------------


def method(row):
    """The method of a row, or of its name, which begins with it."""
    name = getattr(row, "name", row)
    return max((x for x in METHODS if name.startswith(x)), key=len)


def in_order(rows):
    """Rows by their method."""
    return sorted(rows, key=lambda row: METHODS.index(method(row)))


def rows_of(regime):
    """Keys of a regime's table: the base, GRPO, which has no demonstrations, and the rows of the regime."""
    own = [row.key for row in in_order(ROWS) if row.regime == regime]
    return list(dict.fromkeys([BASE, GRPO, *own]))


def by_regime():
    """All rows, in the order of the tables."""
    return [row for regime in REGIMES for row in in_order(ROWS) if row.regime == regime]


def name_in(regime, key):
    if key == BASE:
        return key
    row = BY_KEY[key]
    return row.name if row.regime == regime else f"{row.name} (no demonstrations)"


def rate(value):
    """A learning rate as it is written."""
    return f"{value:.0e}".replace("e-0", "e-")


# ---- numbers of a row ------------------------------------------------------------------------------------


def finals(records, key):
    """The final runs of a row, by seed; of the base its only measurement."""
    found = [x for x in records if x["row"] == key and x["phase"] == "final"]
    seeds = SEEDS[: BY_KEY[key].seeds] if key != BASE else (0,)
    return sorted((x for x in found if x["seed"] in seeds), key=lambda x: x["seed"])


def lacking(records, key):
    """ "" if the row is complete, else its name and how many of its seeds have run."""
    wanted = BY_KEY[key].seeds if key != BASE else 1
    ready = len(finals(records, key))
    if ready == wanted:
        return ""
    return f"{key} ({ready} of {wanted} seeds)" if ready else key


def number(record, name, levels="123456"):
    """A number of a record; one that is known by level is the mean over some levels."""
    if name in BY_LEVEL:
        shares = record[BY_LEVEL[name]]
        return mean(shares[int(level) - 1] for level in levels)
    return record[WHOLE[name]]


def numbers(records, key, name, regime):
    """One number for each seed of a row, read as in a regime."""
    return [number(x, name, REGIMES[regime][1]) for x in finals(records, key)]


def adoption(record):
    """The first recorded step whose mean response has the demonstrations' length, or None."""
    steps = [step for step, _, _, length, _ in record["curve"] if length >= ADOPTED]
    return min(steps, default=None)


def adoptions(records, key):
    """Steps of the seeds that adopt the demonstrated format, and the number of seeds with a curve."""
    steps = [adoption(x) for x in finals(records, key) if x.get("curve")]
    return [step for step in steps if step is not None], len(steps)


def on_policy_reward(record, group):
    """[(step, reward)] of completions that do not begin with a demonstration.

    Of a hybrid's group the first completion may: its mean is recorded and taken out.
    """
    points = []
    for step, reward, _, _, hybrid in record["curve"]:
        if hybrid is not None:
            reward = (group * reward - hybrid) / (group - 1)
        points.append((step, reward))
    return points


# ---- costs -----------------------------------------------------------------------------------------------


def renamed(command):
    """The command line of today: LUFFY was first recorded as a set of flags of prefix_rft.py."""
    return command.replace(FORMER, "luffy.py")


def parsed(command):
    """(script, arguments) of a command line, by the script of today."""
    script, *flags = renamed(command).split()
    script = script.removesuffix(".py")
    return script, importlib.import_module(script).parse_args(flags)


@cache
def copies(split, column):
    """How often each demonstrated question occurs in a split, and the number of its rows."""
    rows = [json.loads(line) for line in open(ROOT / f"tiny/data/{split}.jsonl")]
    found = {}
    for row in rows:
        if row[column]:
            found[row["question"]] = found.get(row["question"], 0) + 1
    return tuple(found.values()), len(rows)


@cache
def share_missed(copies, rows, drawn, fraction):
    """P(no demonstrated copy of a question is drawn), of `drawn` rows without replacement.

    Each of its copies is demonstrated with probability `fraction`.
    """
    missed = 0.0
    for shown in range(copies + 1):
        p = comb(copies, shown) * fraction**shown * (1 - fraction) ** (copies - shown)
        missed += p * (comb(rows - shown, drawn) / comb(rows, drawn))
    return missed


def demonstrations(commands):
    """Expected number of distinct questions whose demonstration a run reads.

    A script reads steps x batch rows, a fresh permutation in each epoch. Supervised scripts, and OPSD
    for its teacher, read demonstrated rows only, so they see min(steps x batch, demonstrated questions);
    where questions are repeated, as in the regimes few 64 and few 16, practically all. `--hinted on`
    counts the demonstrations that it rewrites. Prefix-RFT and LUFFY read all rows: the expected number of
    demonstrated questions among those. Methods that have only answers or pairs see none.
    """
    expected = 0.0
    for command in commands:
        script, args = parsed(command)
        if script not in ("sft", "idft_hinted", "opsd", *HYBRIDS):
            continue
        each, rows = copies(args.split, args.solution_key)
        fraction = 1.0
        if script in HYBRIDS:
            fraction = args.demo_fraction
        else:
            rows = sum(each)
        drawn = min(rows, args.steps * args.batch_size)
        expected += sum(1 - share_missed(n, rows, drawn, fraction) for n in each)
    return expected


def costs(records, key):
    """Means over seeds; CPU seconds are unknown of interrupted runs and of another machine's."""
    runs = finals(records, key)
    cpu = [x["cpu"] for x in runs if x["cpu"] is not None]
    return {
        "demonstrations": demonstrations(tuple(runs[0]["commands"])),
        "generated": mean(x["tokens_generated"] for x in runs),
        "trained": mean(x["tokens_trained"] for x in runs),
        "cpu": mean(cpu) if cpu else None,
    }


# ---- comparisons and verdicts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The first row of a pair minus the second, in a number that the claim says is larger."""

    better: str
    worse: str
    number: str
    missing: tuple = ()  # rows that are not complete
    estimate: Estimate | None = None
    p: float | None = None  # after Holm's correction within the claim

    @property
    def direction(self):
        """1 if the claimed direction is significant, -1 if the opposite is, else 0."""
        if self.p is None or self.p >= SIGNIFICANT:
            return 0
        return 1 if self.estimate.mean > 0 else -1


def compare(records, better, worse, name):
    """Numbers are read as in the regime of the row that is claimed to be better."""
    missing = tuple(x for x in (lacking(records, key) for key in (better, worse)) if x)
    if missing:
        return Comparison(better, worse, name, missing)
    regime = BY_KEY[better].regime
    a, b = (numbers(records, key, name, regime) for key in (better, worse))
    estimate = one_sample(a, b[0]) if worse == BASE else welch(a, b)
    return Comparison(better, worse, name, estimate=estimate)


def comparisons(records, claim):
    """Those of a claim; p values only where none is missing, because all are corrected together."""
    found = [compare(records, *pair) for pair in claim.comparisons]
    if any(x.missing for x in found):
        return found
    corrected = holm([x.estimate.p for x in found])
    return [replace(x, p=p) for x, p in zip(found, corrected)]


def verdict(found):
    """(word, how many comparisons hold), by the rules of the protocol."""
    missing = dict.fromkeys(x for comparison in found for x in comparison.missing)
    if missing:
        return "no verdict", f"not run: {', '.join(missing)}"
    holds = sum(x.direction == 1 for x in found)
    opposed = sum(x.direction == -1 for x in found)
    details = f"{holds} of {len(found)} {'holds' if holds == 1 else 'hold'}"
    if opposed:
        return "contradicted", f"{details}, {opposed} the reverse"
    return ("supported" if holds == len(found) else "not distinguishable"), details


def pair(comparison):
    """The two rows in words; the regime is said once if it is one."""
    better, worse = comparison.better, comparison.worse
    regime = BY_KEY[better].regime
    text = f"{better} − {worse.removeprefix(f'{regime}: ')}"
    return text if comparison.number == "primary" else f"{text} ({comparison.number})"
