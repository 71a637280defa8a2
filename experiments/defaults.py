"""What each script does with no argument: pass@1 before, after and on the way, as the run itself reports it.

    python experiments/defaults.py                 # runs what is not recorded; an hour on one core
    python experiments/defaults.py grpo --seeds 0 1 2 3 4

Records are in experiments/results/defaults.json. README and the scripts' docstrings give their means, and a
test holds that. Each script's learning curve is drawn from them, experiments/results/curve_*.svg. The only
flag of a run is --eval-every, which does not change its training: every step seeds its own draws.
`rlhf_ppo.py` reports rewards, and experiments/ppo_sweep.py measures them.
"""

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments.figures import COLORS, band, canvas, save, styled  # noqa: E402

RESULTS = ROOT / "experiments/results"
RECORDS = RESULTS / "defaults.json"
SCRIPTS = {  # script: the method whose colour it has
    "sft": "sft",
    "rft_rejection": "rft",
    "idft_hinted": "hinted",
    "dpo": "dpo",
    "grpo": "grpo",
    "prefix_rft": "prefix_rft",
    "luffy": "luffy",
    "opsd": "opsd",
}
PARTS = 5  # of a run, with an evaluation after each


def read():
    """{script: {seed: its record}}; seeds are text, as in JSON."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def means(script):
    """Mean pass@1 before and after, and the number of seeds."""
    runs = read()[script].values()
    return mean(x["before"] for x in runs), mean(x["after"] for x in runs), len(runs)


# ---- runs ------------------------------------------------------------------------------------------------


def defaults(script):
    """The arguments of a script that is given none."""
    return importlib.import_module(script).parse_args([])


def command(script, seed):
    """The flags of a run, of which --eval-every only reports more."""
    every = defaults(script).steps // PARTS
    return f"python {script}.py --seed {seed} --eval-every {every}"


def run(script, seed):
    """Train once, with one thread; the evaluation of a run has 300 questions, 4 samples at temperature 1."""
    text = command(script, seed)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *shlex.split(text)[1:], "--output-dir", f"{folder}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True, env=environment)
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
        arguments = json.loads(Path(f"{folder}/run/args.json").read_text())
    curve = []  # [step, pass@1, greedy accuracy]
    for line in lines:
        if "pass@1" in line:
            curve.append([line["step"], round(line["pass@1"], 4), round(line["accuracy"], 4)])
    record = {"before": curve[0][1], "after": curve[-1][1], "curve": curve, "command": text}
    return record | {"commit": arguments["commit"], "versions": arguments["versions"]}


def is_recorded(script, seed):
    """Whether there is a record of the command that would run today."""
    record = read().get(script, {}).get(str(seed), {})
    return record.get("command") == command(script, seed)


# ---- learning curves -------------------------------------------------------------------------------------


def figure_of(script):
    return RESULTS / f"curve_{script}.svg"


@styled
def draw(script):
    """pass@1 and greedy accuracy over the steps of a script's default run."""
    runs = list(read()[script].values())
    steps = [step for step, _, _ in runs[0]["curve"]]
    sampled = [[value for _, value, _ in x["curve"]] for x in runs]
    greedy = [[value for _, _, value in x["curve"]] for x in runs]
    paint = COLORS[SCRIPTS[script]]
    figure, [[axis]] = canvas(1, 1, 2.2)
    band(axis, steps, sampled, paint, "pass@1 at T = 1")
    means_of_greedy = [mean(values) for values in zip(*greedy)]
    axis.plot(steps, means_of_greedy, "--", color=paint, linewidth=1, label="greedy accuracy")
    axis.set(xlim=(0, steps[-1]), ylim=(0, 1.02), xlabel="step", ylabel="share correct")
    axis.set_xticks(steps)
    axis.grid()
    questions = defaults(script).eval_questions
    lines = f"means of {len(runs)} seeds; band: from the lowest seed to the highest"
    axis.set_title(f"python {script}.py, {questions} held-out questions; {lines}", fontsize=9)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    args = parser.parse_args()
    for script in args.scripts:
        for seed in args.seeds:
            if not is_recorded(script, seed):
                record = run(script, seed)
                records = read()
                records.setdefault(script, {})[str(seed)] = record
                RECORDS.write_text(json.dumps(records, indent=1) + "\n")
        save(draw(script), figure_of(script))
        before, after, seeds = means(script)
        print(f"{script}.py: {before:.2f} -> {after:.2f}, {seeds} seeds", flush=True)


if __name__ == "__main__":
    main()
