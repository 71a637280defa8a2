"""Learning rates with equal effort: three or four for each method, on questions that no other table uses.

    python experiments/tune.py                       # two runs at a time, one thread each
    python experiments/tune.py --report --write      # run nothing: what has been run, into docs/protocol.md

Fixed before the runs: one seed, the rates x / 3, x and 3 x around what the scripts began with; the last
200 questions of the held-out split (`reproduce.py` asks the first 300), 8 samples each at temperature 1;
the rate with the highest pass@1 is the one of `reproduce.py`'s cells. A variant that is not here has the
learning rate of its method. The results are in experiments/results/tuning.json.

Since then: where 3 x was best, it became x, and the next rate was run; x is kept where it is within .02
of the best, about one standard error of a run's pass@1.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments.ppo_sweep import flags  # noqa: E402
from experiments.reproduce import name_of, train  # noqa: E402
from experiments.tables import insert  # noqa: E402

SEED, QUESTIONS = 7, 200
AROUND = {"sft": 9e-4, "dft": 9e-4, "eaft": 9e-4, "idft": 9e-4, "hinted + idft": 9e-4}
AROUND |= {"rft, k = 4, base": 1e-4, "dpo": 3e-5, "simpo": 3e-5}
AROUND |= {"grpo": 2e-4, "sft, then grpo": 2e-4, "prefix_rft": 2e-4, "luffy": 2e-4, "rl + sft loss": 6e-4}
FACTORS = {"x": 1, "3 x": 3, "x / 3": 1 / 3, "x / 9": 1 / 9}  # the last one of what was moved up only
KEPT = 0.02
RECORDS = ROOT / "experiments/results/tuning.json"


def rate_of(cell, factor):
    return float(f"{AROUND[cell] * FACTORS[factor]:.1e}")


def run(cell, factor, runs):
    """pass@1 of a method at a learning rate; nothing is run if it is known."""
    out = runs / f"{name_of(cell, SEED)}-{rate_of(cell, factor)}"
    asked = f"--eval-data {runs / 'questions.jsonl'} --eval-questions {QUESTIONS} --eval-samples 8"
    train(cell, SEED, out, f"{asked} --lr {rate_of(cell, factor)}")
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"{cell}, {rate_of(cell, factor)}: {last['pass@1']:.3f}", flush=True)
    return last["pass@1"]


def best(records, cell):
    """The rate that the cells of a method run with."""
    found = records[cell]
    stays = found["x"] >= max(found.values()) - KEPT
    return rate_of(cell, "x" if stays else max(found, key=found.get))


def table(records):
    text = ["| | x | pass@1 at x / 9 | at x / 3 | at x | at 3 x | taken |", "|---" * 7 + "|"]
    for cell, found in ((cell, records[cell]) for cell in AROUND if cell in records):
        line = [f"{found[f]:.3f}" if f in found else "" for f in ("x / 9", "x / 3", "x", "3 x")]
        text.append("| " + " | ".join([cell, f"{AROUND[cell]:g}", *line, f"{best(records, cell):g}"]) + " |")
    return text


def main():
    args = flags(__doc__, AROUND, ROOT / "runs/tune", seeds=()).parse_args()
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    if not args.report:
        args.runs.mkdir(parents=True, exist_ok=True)
        rows = (ROOT / "tiny/data/test.jsonl").read_text().splitlines(keepends=True)
        (args.runs / "questions.jsonl").write_text("".join(rows[-QUESTIONS:]))
        todo = [(c, f) for f in list(FACTORS)[:3] for c in args.cells if f not in records.get(c, {})]
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(partial(run, runs=args.runs), *cell) for cell in todo]
            for (cell, factor), job in zip(todo, jobs):
                records.setdefault(cell, {})[factor] = round(job.result(), 4)
                RECORDS.write_text(json.dumps(records, indent=1) + "\n")
    print("\n".join(table(records)))
    if args.write:
        insert("tuning", table(records))


if __name__ == "__main__":
    main()
