"""Run methods x seeds on the tiny world and print the table of results in the README.
here.

    python experiments/reproduce.py                        # all cells, two at a time, one thread each
    python experiments/reproduce.py --cells sft grpo --seeds 0 1
    python experiments/reproduce.py --table                # only the table, of what has been run

A cell is a command line and a seed; its folder is runs/reproduce/<cell>-<seed>. A finished cell is not run
again and an interrupted one continues from its last checkpoint, so the whole can be stopped and started at
any time. What is read from a cell is the first and the last evaluation in its metrics.jsonl, on the same
held-out questions for all.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
CELLS = {
    "sft": ["sft.py"],
    "grpo": ["grpo.py"],
    "prefix_rft": ["prefix_rft.py"],
    "sft, noisy demonstrations": ["sft.py", "--solution-key", "noisy_solution"],
    "prefix_rft, noisy demonstrations": ["prefix_rft.py", "--solution-key", "noisy_solution"],
}
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95 %, by number of seeds


def run(cell, seed, folder):
    """One cell in a process of its own with one thread; its screen goes to <folder>.log."""
    out = folder / f"{cell.replace(', ', '-').replace(' ', '_')}-{seed}"
    if (out / "final").exists():
        return
    script, *flags = CELLS[cell]
    command = [sys.executable, script, *flags, "--seed", str(seed), "--output-dir", str(out)]
    if list(out.glob("checkpoint-" + "[0-9]" * 6)):
        command.append("--resume")
    with open(f"{out}.log", "a") as screen:
        threads = {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=os.environ | threads, stdout=screen, stderr=screen, check=True)
    print(f"done: {cell}, seed {seed}", flush=True)


def read(cell, seed, folder):
    """First and last evaluation of a finished cell, and what it cost."""
    out = folder / f"{cell.replace(', ', '-').replace(' ', '_')}-{seed}"
    if not (out / "final").exists():
        return None
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    cost = {key: sum(line.get(key, 0) for line in lines) for key in ("tokens_generated", "tokens_trained")}
    return {"before": lines[0], "after": lines[-1], "peak": lines[-1]["peak_memory"] / 2**20} | cost


def interval(values):
    """mean ± half the 95 % interval over seeds."""
    if len(values) < 2:
        return f"{mean(values):.3f}"
    return f"{mean(values):.3f} ± {T95[len(values)] * stdev(values) / len(values) ** 0.5:.3f}"


def table(cells, seeds, folder):
    levels, rows = ["1", "2", "3", "4", "5", "6"], []
    for cell in cells:
        done = [x for seed in seeds if (x := read(cell, seed, folder))]
        if not done:
            continue
        if not rows:
            before = done[0]["before"]
            by_level = [f"{before['levels'][level]['pass@1']:.2f}" for level in levels]
            rows.append(
                ["base", f"{before['accuracy']:.3f}", f"{before['pass@1']:.3f}", *by_level, "", "", ""]
            )
        after = [x["after"] for x in done]
        by_level = [f"{mean(x['levels'][level]['pass@1'] for x in after):.2f}" for level in levels]
        tokens = [mean(x[f"tokens_{key}"] for x in done) for key in ("generated", "trained")]
        cost = [f"{n / 1000:.0f}k" if n else "0" for n in tokens]
        cost.append(f"{max(x['peak'] for x in done):.0f}")
        scores = [interval([x[key] for x in after]) for key in ("accuracy", "pass@1")]
        name = cell if len(done) == len(seeds) else f"{cell} ({len(done)} of {len(seeds)} seeds)"
        rows.append([name, *scores, *by_level, *cost])
    head = ["", "greedy accuracy", "pass@1", *(f"L{level}" for level in levels)]
    head += ["tokens generated", "tokens trained", "peak MiB"]
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="which rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="which seeds")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/reproduce", help="where the cells are")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(run, cell, seed, args.folder) for seed in args.seeds for cell in args.cells]
            for job in jobs:
                job.result()
    table(args.cells, args.seeds, args.folder)


if __name__ == "__main__":
    main()
