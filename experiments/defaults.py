"""What each script does with no argument: pass@1 before and after, as the run itself reports it.

    python experiments/defaults.py                 # runs what is not recorded; half an hour on one core
    python experiments/defaults.py grpo --seeds 0 1 2 3 4

Records are in experiments/results/defaults.json. README and the scripts' docstrings give their means, and a
test holds that. `rlhf_ppo.py` reports rewards, and experiments/ppo_sweep.py measures them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "experiments/results/defaults.json"
SCRIPTS = ("sft", "rft_rejection", "idft_hinted", "dpo", "grpo", "prefix_rft", "luffy", "opsd")


def read():
    """{script: {seed: its record}}; seeds are text, as in JSON."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def means(script):
    """Mean pass@1 before and after, and the number of seeds."""
    runs = read()[script].values()
    return mean(x["before"] for x in runs), mean(x["after"] for x in runs), len(runs)


def run(script, seed):
    """Train once, with one thread; the evaluation of a run has 300 questions, 4 samples at temperature 1."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, f"{script}.py", "--seed", str(seed), "--output-dir", f"{folder}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
        arguments = json.loads(Path(f"{folder}/run/args.json").read_text())
    found = [round(line["pass@1"], 4) for line in lines if "pass@1" in line]
    record = {"before": found[0], "after": found[-1]}
    return record | {"commit": arguments["commit"], "versions": arguments["versions"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    args = parser.parse_args()
    for script in args.scripts:
        for seed in args.seeds:
            records = read()
            if str(seed) not in records.get(script, {}):
                records.setdefault(script, {})[str(seed)] = run(script, seed)
                RECORDS.write_text(json.dumps(records, indent=1) + "\n")
        before, after, seeds = means(script)
        print(f"{script}.py: {before:.2f} -> {after:.2f}, {seeds} seeds", flush=True)


if __name__ == "__main__":
    main()
