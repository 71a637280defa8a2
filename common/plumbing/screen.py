"""Screen: a step's numbers in aligned columns, its speed, the memory that was used; a run's summary."""

import json
import resource
import shlex
import sys

import torch
from tqdm import tqdm

MOSTLY = 0.5  # a share of truncated completions above which there is little to learn from
SAID = set()  # hints that have been given


def peak_memory():
    """Bytes: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def speed(metrics):
    """Tokens per second of a step, and how much of its time is sampling, for the bar."""
    spent = [metrics.get(f"seconds_{part}", 0) for part in ("sample", "train")]
    tokens = metrics.get("tokens_generated", 0) + metrics.get("tokens_trained", 0)
    words = f"{tokens / max(sum(spent), 1e-9):.0f} tokens/s"
    if "seconds_sample" in metrics:
        words += f", sampling {spent[0] / max(sum(spent), 1e-9):.0%}"
    return words


def hint(metrics):
    """Say once that most completions of a step were truncated; of demonstrations `examples` says it."""
    share = metrics.get("truncated_frac", 0)
    if share > MOSTLY and "tokens_generated" in metrics and "truncated" not in SAID:
        SAID.add("truncated")
        sentence = "of the completions were truncated; raise --max-new-tokens or begin with sft.py"
        tqdm.write(f"step {metrics['step']}: {share:.0%} {sentence}")


def show(metrics):
    """One line per step, its columns aligned, and one line for each level of an evaluation."""
    first = list(metrics)[:6]
    names = [k for k in metrics if k in first or k == "accuracy" or k.startswith("pass@")]
    cells = [f"step {metrics['step']:<6}"]
    for name in names:
        if name not in ("step", "levels"):
            value = f"{metrics[name]:.4g}"
            if len(value) > 9:  # -0.0001234
                value = f"{metrics[name]:.3g}"
            cells.append(f"{name} {value:9}")
    tqdm.write("  ".join(cells).rstrip())
    for level, scores in metrics.get("levels", {}).items():
        tqdm.write(f"  level {level:20}" + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))


def summary(out, args, script):
    """Of a run that has ended: its main metrics before -> after, where things are, what to do with them."""
    metrics = out / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    print()
    for name in {name: None for row in rows for name in row}:  # in the order of the file
        if name in ("accuracy", "eval_utility") or name.startswith("pass@"):
            values = [f"{row[name]:.3f}" for row in rows if row.get(name) is not None]
            ends = values if len(values) < 2 else [values[0], values[-1]]
            print(f"{name:14}{' -> '.join(ends)}")
    for label, path in ("metrics", metrics), ("samples", out / "samples.jsonl"), ("model", out / "final"):
        if path.exists():
            print(f"{label:14}{path}")
    if (out / "final").exists() and args.steps:  # with 0 steps this was the evaluation
        print(f"{'evaluate it':14}{evaluate_command(out, args, script)}")
    print(f"{'plot it':14}{shlex.join(['python', 'tools/plot.py', str(out)])}")


def evaluate_command(out, args, script):
    """The command of this run, with its final model and without training."""
    replaced = ("--model", "--steps", "--output-dir", "--eval-first", "--preferences", "--pairs")
    kept = []
    words = iter(sys.argv[1:])
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag in replaced and not equals:
            next(words, None)  # its value
        elif flag not in (*replaced, "--resume"):
            kept.append(word)
    command = ["python", script or sys.argv[0], "--model", str(out / "final"), "--steps", "0"]
    command += ["--output-dir", f"{out}-eval", *kept]
    if (out / "reward_model").exists() and not args.reward_model:
        command += ["--reward-model", str(out / "reward_model")]
    return shlex.join(command)
