"""Speed and agreement of common/verifier.py, beside math-verify where that is installed; and real golds.

    python experiments/verifier_bench.py                     # a table; about half a minute with math-verify
    python experiments/verifier_bench.py --against old.py    # beside another version of the file, in one run
    python experiments/verifier_bench.py --golds             # golds of public sets: refused, equal pairs

--golds prints the share of golds that check_gold refuses, for each set, and compares 600 distinct golds
that are no plain numbers pair by pair. Each pair that is called equal is printed, to be looked at. The golds
are those of tests/data/verifier_golds.jsonl, a sample of 16 public sets, or of another file like it.

math-verify is a peer for this comparison only (`pip install "math-verify[antlr4_13_2]"`). It gets the same
completions and the gold in \\boxed{}, with its default settings. Both run in this process, on one core; CPU
seconds, of the best of three passes for this verifier, which forgets what it has read between them.
"""

import argparse
import importlib.util
import itertools
import json
import logging
import random
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common import verifier  # noqa: E402

try:
    import math_verify
except ImportError:
    math_verify = None
logging.disable(logging.CRITICAL)  # math-verify reports each time-out


def rows(name):
    path = ROOT / "tests" / "data" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def peer(completion: str, gold: str) -> bool:
    return math_verify.verify(math_verify.parse(f"\\boxed{{{gold}}}"), math_verify.parse(completion))


def another(path: str):
    """Another version of the verifier, as a module."""
    spec = importlib.util.spec_from_file_location("another_verifier", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed(judge, cases, repeats: int, module=None):
    """Verdicts, and the CPU seconds of the fastest pass and of the slowest case in it."""
    best = worst = float("inf")
    for _ in range(repeats):
        if module:
            module._read.cache_clear()
        verdicts, slowest, start = [], 0.0, time.process_time()
        for completion, gold, _ in cases:
            before = time.process_time()
            verdicts.append(bool(judge(completion, gold)))
            slowest = max(slowest, time.process_time() - before)
        best, worst = min(best, time.process_time() - start), min(worst, slowest)
    return verdicts, best, worst


def sets_of_cases():
    examples = rows("verifier_examples.jsonl") + rows("verifier_real_completions.jsonl")
    own = [
        (rf"\boxed{{{answer}}}", row["gold"], verdict == "right")
        for row in rows("verifier_cases.jsonl")
        for verdict in ("right", "wrong")
        for answer in row[verdict]
    ]
    words = "Let us think step by step: 12 + 30 = 42, so that x^2 = 42, and then some more words follow.\n"
    filler = words * 185

    def triples(some):
        return [(row["completion"], row["gold"], row.get("expected", True)) for row in some]

    return {
        "integers": [(f"The total is \\boxed{{{i}}}.", str(i + i % 2), i % 2 == 0) for i in range(2000)],
        "fractions": [(rf"\boxed{{{i}/{i + 7}}}", rf"\frac{{{i}}}{{{i + 7}}}", True) for i in range(1, 500)],
        "quadratics": [(rf"\boxed{{{i} + 3x + x^2}}", f"x^2 + 3x + {i}", True) for i in range(1, 300)],
        "17 kB completions": [(filler + rf"\boxed{{{i}}}", str(i), True) for i in range(400)],
        "17 kB without a box": [(filler + f"The answer is {i}.", str(i), True) for i in range(400)],
        "examples": triples(r for r in examples if "policy" not in r),
        "examples, policy": triples(r for r in examples if "policy" in r),
        "own cases": own,
        "cases of other graders": triples(rows("verifier_peer_cases.jsonl")),
        "MATH-500 solutions": triples(rows("verifier_math500.jsonl")),
    }


def speed(against: str | None):
    judges = [("this verifier", verifier.verify, 3, verifier)]
    if against:
        other = another(against)
        judges.append((Path(against).name, other.verify, 3, other))
    if math_verify:
        judges.append(("math-verify", peer, 1, None))
    else:
        print("math-verify is not installed: left out")
    print(f"{'':29}" + "".join(f" | {name:^39}" for name, *_ in judges))
    head = f"{'cases/s':>9}{'worst ms':>10}{'accuracy':>10}{'FP':>5}{'FN':>5}"
    print(f"{'cases':23}{'n':>6}" + f" | {head}" * len(judges) + (" | times faster" if judges[1:] else ""))
    for name, cases in sets_of_cases().items():
        speeds, line = [], f"{name:23}{len(cases):>6}"
        for _, judge, repeats, module in judges:
            verdicts, seconds, worst = timed(judge, cases, repeats, module)
            speeds.append(len(cases) / seconds)
            positives = sum(v and not e for v, (_, _, e) in zip(verdicts, cases, strict=True))
            negatives = sum(e and not v for v, (_, _, e) in zip(verdicts, cases, strict=True))
            accuracy = 1 - (positives + negatives) / len(cases)
            line += f" | {speeds[-1]:>9.0f}{1000 * worst:>10.1f}{accuracy:>10.1%}{positives:>5}{negatives:>5}"
        print(line + " |" + "".join(f"{speeds[0] / other:>8.2f}" for other in speeds[1:]), flush=True)


# What a set's golds are, by their look: the first pattern that is found names the category.
CATEGORIES = {
    "prose": r"(?<![\\A-Za-z{])[A-Za-z]{3,}[^\\]*\b[A-Za-z]{3,}|[一-鿿]",
    "matrix": r"\\begin",
    "sum, product or integral": r"\\(?:sum|prod|int|bigcup|lim)",
    "relation": r"=|<|>|\\le|\\ge|\\approx|\\neq",
    "list, set or interval": r",|;|\\cup|\\in|\\\{",
    "formula": r"[\\^a-zA-Z]",
    "number": r"[0-9]",
    "other": "",
}


def category(gold: str) -> str:
    return next(name for name, pattern in CATEGORIES.items() if re.search(pattern, gold))


def golds(path: Path, pairs: int):
    some = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    count, refused = Counter(row["dataset"] for row in some), defaultdict(list)
    for row in some:
        if not verifier.check_gold(row["gold"]):
            refused[row["dataset"]].append(row["gold"])
    print(f"{'set':24}{'golds':>7}{'refused':>9}{'share':>8}  by category")
    for name, n in count.items():
        kinds = Counter(map(category, refused[name])).most_common()
        line = f"{name:24}{n:>7}{len(refused[name]):>9}{len(refused[name]) / n:>8.1%}  "
        print(line + ", ".join(f"{kind}: {k}" for kind, k in kinds))
    answers = [name for name in count if name not in ("college_math", "deepmind-mathematics")]
    n = sum(count[name] for name in answers)
    k = sum(len(refused[name]) for name in answers)
    print("without college_math, which is prose, and deepmind-mathematics, whose lists have no commas:")
    print(f"{k} of {n}, {k / n:.2%}")

    def is_plain(gold):
        value = verifier.core(verifier._read(gold))
        return isinstance(value, verifier.Number) and value.plain

    chosen = sorted({r["gold"] for r in some if not is_plain(r["gold"]) and verifier.check_gold(r["gold"])})
    chosen = random.Random(0).sample(chosen, min(pairs, len(chosen)))
    equal = [
        (a, b)
        for a, b in itertools.combinations(chosen, 2)
        if verifier.equivalent(a, b) or verifier.equivalent(b, a)
    ]
    print(f"\n{len(chosen)} golds that are no plain numbers: {len(equal)} of their pairs are called equal")
    for a, b in equal:
        print(f"    {a!r} = {b!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "tests" / "data" / "verifier_golds.jsonl"
    parser.add_argument("--golds", nargs="?", type=Path, const=default, metavar="FILE")
    parser.add_argument("--pairs", type=int, default=600, help="golds that are compared pair by pair")
    parser.add_argument("--against", metavar="FILE", help="another version of verifier.py, for its speed")
    args = parser.parse_args()
    if args.golds:
        golds(args.golds, args.pairs)
    else:
        speed(args.against)


if __name__ == "__main__":
    main()
