"""Speed and agreement of common/verifier.py, beside math-verify where that is installed.

    python experiments/verifier_bench.py            # prints a table; about half a minute with math-verify

math-verify is a peer for this comparison only (`pip install "math-verify[antlr4_13_2]"`). It gets the same
completions and the gold in \\boxed{}, with its default settings. Both run in this process, on one core; CPU
seconds, of the best of three passes for this verifier, which forgets what it has read between them.
"""

import json
import logging
import sys
import time
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


def timed(judge, cases, repeats: int):
    """Verdicts, and the CPU seconds of the fastest pass."""
    best = float("inf")
    for _ in range(repeats):
        verifier._read.cache_clear()
        start = time.process_time()
        verdicts = [bool(judge(completion, gold)) for completion, gold, _ in cases]
        best = min(best, time.process_time() - start)
    return verdicts, best


def main():
    examples = rows("verifier_examples.jsonl") + rows("verifier_real_completions.jsonl")
    own = [
        (rf"\boxed{{{answer}}}", row["gold"], verdict == "right")
        for row in rows("verifier_cases.jsonl")
        for verdict in ("right", "wrong")
        for answer in row[verdict]
    ]
    filler = (
        "Let us think step by step: 12 + 30 = 42, so that x^2 = 42, and then some more words follow.\n" * 185
    )
    sets = {
        "integers": [(f"The total is \\boxed{{{i}}}.", str(i + i % 2), i % 2 == 0) for i in range(2000)],
        "fractions": [(rf"\boxed{{{i}/{i + 7}}}", rf"\frac{{{i}}}{{{i + 7}}}", True) for i in range(1, 500)],
        "quadratics": [(rf"\boxed{{{i} + 3x + x^2}}", f"x^2 + 3x + {i}", True) for i in range(1, 300)],
        "17 kB completions": [(filler + rf"\boxed{{{i}}}", str(i), True) for i in range(400)],
        "17 kB without a box": [(filler + f"The answer is {i}.", str(i), True) for i in range(400)],
        "examples": [(r["completion"], r["gold"], r["expected"]) for r in examples if "policy" not in r],
        "examples, policy": [(r["completion"], r["gold"], r["expected"]) for r in examples if "policy" in r],
        "own cases": own,
    }
    peer_name = "math-verify" if math_verify else "math-verify is not installed: left out"
    print(f"{'':22}{'':>6} | {'this verifier':^31} | {peer_name}")
    head = f"{'cases/s':>9}{'accuracy':>10}{'FP':>6}{'FN':>6}"
    print(f"{'cases':22}{'n':>6} | {head} | {head + '   times faster' if math_verify else ''}")
    for name, cases in sets.items():
        speeds, line = [], f"{name:22}{len(cases):>6}"
        for judge, repeats in ((verifier.verify, 3), (peer, 1)):
            if judge is peer and not math_verify:
                continue
            verdicts, seconds = timed(judge, cases, repeats)
            speeds.append(len(cases) / seconds)
            positives = sum(v and not e for v, (_, _, e) in zip(verdicts, cases, strict=True))
            negatives = sum(e and not v for v, (_, _, e) in zip(verdicts, cases, strict=True))
            accuracy = 1 - (positives + negatives) / len(cases)
            line += f" | {speeds[-1]:>9.0f}{accuracy:>10.1%}{positives:>6}{negatives:>6}"
        print(line + (f"{speeds[0] / speeds[1]:>15.0f}" if len(speeds) == 2 else ""), flush=True)


if __name__ == "__main__":
    main()
