"""Minutes a step of the papers' recipes on H100s, computed from what one H100 measured.

    python experiments/step_time.py            # the tables and the commands
    python experiments/step_time.py --write    # and into docs/gpu.md

Nothing is measured here. Every recipe is a command line: it is parsed by its script, and the numbers below
come from the parsed arguments. How rows are divided into batches and micro-batches, and how many rows fit,
is asked of the functions that the scripts call. With N weights of matrices and head, L layers, q heads of
width h, and n GPUs, of which the slowest counts, a step takes

    sampling        for each batch of rows its prompts, 2 N FLOPs a token, and then for each token of its
                    longest response one decode step: kernels x seconds a kernel + traffic / bandwidth.
                    Traffic is weights, the cache of the rows held, and logits. Rows leave, and buffers
                    grow, when they do in `decoding.Batch`.
    scoring         2 N + 2 L q h w FLOPs a token in rows of width w, where the recipe needs a pass without
                    gradient: pi_old (several updates), pi_ref (--kl-coef), prefix tokens of hybrids
    training        8 N + 8 L q h w FLOPs a token: forward, backward and the forward pass again
    communication   n > 1, fp32 weights: 4 P (n - 1) / n bytes per pass without gradient and for the copy
                    that samples; three times as many per pass with gradient (gathered twice, gradients once)

The record (experiments/results/decoding.json) has two decode steps, of 0.5B and 1.5B, each with its number of
kernels and its traffic. They give the two unknowns, seconds a kernel and the share of the bandwidth that
traffic gets; a third size would test that, and has not been measured. The step of training gives the share
of the peak FLOPs. The high case takes these three as measured. The low case assumes better ones, because
larger matrices keep a GPU busier. Not counted: the verifier, evaluation, saving, loading.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import random
import sys
from bisect import bisect
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import tokenization as tok  # noqa: E402
from common.plumbing import decoding, ranks  # noqa: E402
from common.plumbing import memory as room  # noqa: E402
from experiments import gpu, memory  # noqa: E402
from experiments.tables import insert  # noqa: E402

RECORD = ROOT / "experiments/results/decoding.json"
BANDWIDTH, PEAK = gpu.CARDS["H100"]
CARD = 80  # GB

# ---- recipes ---------------------------------------------------------------------------------------------

# script, and the flags that its paper gives
RECIPES = {
    "Prefix-RFT": (
        "prefix_rft",
        "--loss-norm token --batch-size 128 --group-size 8 --steps 500 --prefix-decay-steps 500",
        "--lr 1e-6 --schedule constant --max-new-tokens 8192",
    ),
    "Dr. GRPO": (
        "grpo",
        "--batch-size 128 --group-size 8 --minibatches 8 --steps 63",
        "--lr 1e-6 --schedule constant --max-new-tokens 3000",
    ),
    "GRPO, DeepSeekMath": (
        "grpo",
        "--advantage grpo --loss-norm sequence --kl-coef 0.04 --batch-size 16 --group-size 64",
        "--steps 9000 --lr 1e-6 --schedule constant --max-new-tokens 1024",
    ),
}
# model, GPUs a node, nodes, and what the machine asks for
MACHINES = {
    "1 × 80 GB": ("Qwen2.5-1.5B", 1, 1, "--micro-batch-tokens 16384"),
    "8 × 80 GB": ("Qwen2.5-7B", 8, 1, "--micro-batch-tokens 32768"),
    "2 × 8 × 80 GB": ("Qwen2.5-7B", 8, 2, "--micro-batch-tokens 32768"),
}
EVERY = "--dtype bf16 --gradient-checkpointing"
MEETING = "--rdzv-backend=c10d --rdzv-endpoint=HOST:29500"


def command(recipe, machine):
    """A command line for the shell, in lines."""
    script, *method = RECIPES[recipe]
    model, gpus, nodes, wide = MACHINES[machine]
    lines = []
    start = f"python {script}.py"
    if gpus > 1:
        lines = [f"torchrun --nproc-per-node={gpus}"]
        start = f"{script}.py"
    if nodes > 1:
        lines = [f"torchrun --nnodes={nodes} --nproc-per-node={gpus} {MEETING}"]
    name = model.replace("Qwen2.5", "Qwen2.5-Math")
    # a response of 8,192 tokens needs a copy of the model with more positions
    source = f"{name}-16k" if recipe == "Prefix-RFT" else f"Qwen/{name}"
    start += f" --model {source} --data DIR"
    lines += [start, f"{EVERY} {wide}", *method]
    return " \\\n    ".join(lines)


def parsed(text):
    """The arguments of a command line, as its script reads them."""
    words = text.replace("\\\n", " ").split()
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = importlib.import_module(words[at].removesuffix(".py"))
    return script.parse_args(words[at + 1 :])


# ---- what was measured, and what is assumed --------------------------------------------------------------


@cache
def records():
    return json.loads(RECORD.read_text())


def measured():
    """Seconds a kernel of a decode step, its share of the bandwidth, and training's share of the FLOPs."""
    record = records()
    rows = []
    for size in ("0.5B", "1.5B"):
        step = record[f"speed {size} recorded"]
        kernels = record[f"profile {size}"]["kernels a step"]
        rows.append((kernels, step["floor, ms"] / 1e3, step["ms a step"] / 1e3))
    (k1, floor1, step1), (k2, floor2, step2) = rows
    both = k1 * floor2 - k2 * floor1
    kernel = (step1 * floor2 - step2 * floor1) / both
    share = both / (k1 * step2 - k2 * step1)
    run = record["train 1.5B recomputed"]
    width = run["tokens"] / 512
    done = flops(memory.SHAPES["Qwen2.5-1.5B"], 512, width, 4)
    return kernel, share, done / run["seconds_train"] / PEAK


def flops(shape, rows, width, passes):
    """FLOPs of so many forward passes of rows of this width; a backward pass counts as two."""
    layers, _, _, _, q, _, h, _ = shape
    attention = 2 * layers * q * h * width  # causal: a token sees half of the width
    return passes * rows * width * (2 * gpu.products(shape) + attention)


def cases():
    """What the low and the high numbers stand on."""
    kernel, share, utilisation = measured()
    high = SimpleNamespace(
        length=1.0,  # mean response, of the budget; the longest takes all of it
        useful=1.0,  # groups that have a gradient
        kernel=kernel,
        bandwidth=share,
        utilisation=utilisation,
        nvlink=0.5 * 450e9,  # bytes a second and direction; 450 GB/s by the data sheet
        network=0.5 * 50e9,  # between nodes: one link of 400 Gbit/s
        hidden=False,  # communication behind computation
    )
    low = SimpleNamespace(
        length=0.25,
        useful=0.5,
        kernel=kernel / 2,  # they are shorter with fewer rows
        bandwidth=0.7,
        utilisation=0.4,
        nvlink=0.8 * 450e9,
        network=0.8 * 8 * 50e9,  # eight of them, one for each GPU
        hidden=True,
    )
    return low, high


PROMPT = 200  # tokens


def rows_of(args, case):
    """(prefix, response with prefix) of each completion in tokens; groups stand next to each other."""
    budget, total = args.max_new_tokens, args.batch_size * args.group_size
    lengths = [budget] * total
    if case.length < 1:  # exponential: a long tail up to the budget
        drawn = [-math.log(1 - (i + 0.5) / total) for i in range(total)]
        lengths = [max(1, min(budget, int(case.length * budget * x))) for x in drawn]
        random.Random(0).shuffle(lengths)
    prefixes = [0] * total
    if getattr(args, "prefix_schedule", "none") == "cosine":
        # in the middle of the run, when they have their mean length; demonstrations are like responses
        for group in range(args.batch_size):
            ratio = 0.5 + 0.45 * (group + 0.5) / args.batch_size
            prefixes[group * args.group_size] = int(ratio * case.length * budget)
    return [(prefix, max(prefix + 1, length)) for prefix, length in zip(prefixes, lengths)]


# ---- sampling --------------------------------------------------------------------------------------------


def step_seconds(shape, rows, columns, case):
    """One decode step of so many rows, whose attention reads so many columns."""
    traffic = gpu.traffic(shape, rows, columns)
    return kernels(shape) * case.kernel + traffic / BANDWIDTH / case.bandwidth


def kernels(shape):
    """Of a decode step: a line through the two that were counted."""
    record = records()
    few, many = (record[f"profile {size}"]["kernels a step"] for size in ("0.5B", "1.5B"))
    a_layer = (many - few) / 4  # 24 and 28 layers
    return few + (shape[0] - 24) * a_layer


def batch_seconds(shape, prompts, left, case):
    """A batch with prompts of these lengths, of which the last `left` tokens are to be sampled."""
    every, most, left = decoding.LOOK["cuda"], max(left), sorted(left)
    reading = sum(flops(shape, 1, n, 1) for n in prompts) / PEAK / case.utilisation
    held, seconds = len(left), reading
    for t in range(1, most, every):
        alive = len(left) - bisect(left, t)
        if alive < decoding.LEAVE["cuda"] * held:
            held = alive
        grown = -(-(max(prompts) + t) // decoding.COLUMNS["cuda"]) * decoding.COLUMNS["cuda"]
        seconds += min(every, most - t) * step_seconds(shape, held, grown, case)
    return seconds


def gpu_rows(shape, prompts, args, n):
    """What `memory.rows` answers on this card, beside weights, Adam's moments, copy and pi_ref."""
    held = memory.sampling(shape, 0, 0, n) + (4 * memory.parameters(shape)[0] / n if args.kl_coef else 0)
    free = (memory.CARDS[CARD] - memory.SPARE) * memory.GIB - held
    model = SimpleNamespace(config=gpu.config_of(shape), device=torch.device("cpu"))
    quiet = contextlib.redirect_stdout(io.StringIO())
    with patch.object(room, "free", lambda: free), torch.autocast("cpu", torch.bfloat16), quiet:
        return room.rows(model, prompts, args)


def sampling(shape, rows, args, n, case):
    """Seconds of the slowest rank, and the rows of the largest batch."""
    prompts = [PROMPT + prefix for prefix, _ in rows]
    left = [response - prefix for prefix, response in rows]
    at_once = gpu_rows(shape, prompts, args, n)
    slowest = largest = 0
    for rank in range(n):
        with patch.object(ranks, "shard", partial(tuple, [rank, n])):
            parts = [part.tolist() for part in decoding.batches(range(len(rows)), at_once, prompts)]
        seconds = 0
        for part in parts:
            # a prompt that several rows have is read once
            distinct = {(i // args.group_size, rows[i][0]): prompts[i] for i in part}
            read = list(distinct.values())
            seconds += batch_seconds(shape, read, [left[i] for i in part], case)
        slowest, largest = max(slowest, seconds), max(largest, *map(len, parts))
    return slowest, largest


# ---- scoring and training --------------------------------------------------------------------------------


def passes(shape, ends, args, n, nodes, how, case):
    """(seconds of computing, seconds of communication) for rows that end at these tokens."""
    mask = torch.zeros(len(ends), max(ends))
    for i, end in enumerate(ends):
        mask[i, end - 1 : end] = 1
    micro = tok.micro_batches(mask, args.micro_batch_tokens, (0, n))
    work = sum(flops(shape, len(batch), width.stop, how) for batch, width in micro)
    gathers = len(micro) * (1 if how == 1 else 3)
    return work / PEAK / case.utilisation, gathers * gathered(shape, n, nodes, case)


def gathered(shape, n, nodes, case):
    """Seconds in which fp32 weights, or their gradients, go once over the slowest link."""
    link = case.nvlink if nodes == 1 else min(case.nvlink, case.network)
    return 4 * memory.parameters(shape)[0] * (n - 1) / n / link


def together(parts, case):
    """Seconds of computing and communication, one behind the other or side by side."""
    return sum(max(part) if case.hidden else sum(part) for part in parts)


def scoring(shape, rows, args, n, nodes, case):
    ends = [PROMPT + response for _, response in rows]
    parts = []
    if args.epochs_per_batch * args.minibatches > 1:
        parts.append(passes(shape, ends, args, n, nodes, 1, case))
    if args.kl_coef:
        parts.append(passes(shape, ends, args, n, nodes, 1, case))
    hybrids = [PROMPT + prefix for prefix, _ in rows if prefix]
    if hybrids:
        parts.append(passes(shape, hybrids, args, n, nodes, 1, case))
    return parts


def training(shape, rows, args, n, nodes, case):
    groups = [rows[i : i + args.group_size] for i in range(0, len(rows), args.group_size)]
    groups = groups[: math.ceil(case.useful * len(groups))]
    if args.kl_coef:  # every row has a gradient, that of the KL term
        groups = [rows]
    ends = [PROMPT + response for group in groups for _, response in group]
    random.Random(1).shuffle(ends)
    parts = []
    for _ in range(args.epochs_per_batch):
        for i in range(args.minibatches):
            parts.append(passes(shape, ends[i :: args.minibatches], args, n, nodes, 4, case))
    return parts


# ---- the page --------------------------------------------------------------------------------------------


def computed(recipe, machine, case):
    """Everything about a step."""
    args = parsed(command(recipe, machine))
    model, gpus, nodes, _ = MACHINES[machine]
    shape, n = memory.SHAPES[model], gpus * nodes
    rows = rows_of(args, case)
    drawing, at_once = sampling(shape, rows, args, n, case)
    drawing += gathered(shape, n, nodes, case) if n > 1 else 0  # the copy
    scored = scoring(shape, rows, args, n, nodes, case)
    trained = training(shape, rows, args, n, nodes, case)
    found = SimpleNamespace(args=args, at_once=at_once)
    found.tokens = sum(response - prefix for prefix, response in rows)
    found.sampling, found.scoring = drawing, together(scored, case)
    found.training = together(trained, case)
    found.seconds = found.sampling + found.scoring + found.training
    longest = PROMPT + args.max_new_tokens
    reference = 4 * memory.parameters(shape)[0] / n if args.kl_coef else 0
    widest = max(args.micro_batch_tokens, longest)
    found.gib = (memory.total(shape, widest, True, n) + reference) / memory.GIB
    return found


def number(x):
    """About two significant digits."""
    if x >= 9.95 or isinstance(x, int):
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 0.95 else f"{x:.2f}"


def span(low, high):
    low, high = number(low), number(high)
    return low if low == high else f"{low}–{high}"


PHASES = ("sampling", "scoring", "training")


def longest_phase(found):
    return max(PHASES, key=lambda phase: getattr(found, phase))


def step_table():
    names = ["recipe", "machine, model", "GiB training", "rows at once", "M tokens sampled"]
    names += [f"{phase}, min" for phase in PHASES]
    names += ["**minutes a step**", "bottleneck", "steps", "hours"]
    text = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    low, high = cases()
    for recipe in RECIPES:
        for machine, (model, *_) in MACHINES.items():
            a, b = computed(recipe, machine, low), computed(recipe, machine, high)
            line = [recipe, f"{machine}, {model.removeprefix('Qwen2.5-')}", f"{b.gib:.0f}"]
            line += [span(a.at_once, b.at_once), span(a.tokens / 1e6, b.tokens / 1e6)]
            for phase in PHASES:
                line.append(span(getattr(a, phase) / 60, getattr(b, phase) / 60))
            line.append(f"**{span(a.seconds / 60, b.seconds / 60)}**")
            line.append(" or ".join(dict.fromkeys([longest_phase(a), longest_phase(b)])))
            steps = a.args.steps
            line += [f"{steps:,}", span(steps * a.seconds / 3600, steps * b.seconds / 3600)]
            text.append("| " + " | ".join(line) + " |")
    return text


def assumption_table():
    low, high = cases()
    assumed, half = "assumed", "high: measured; low: assumed"
    lines = [
        ("mean response, of the budget; the longest takes all", low.length, high.length, assumed),
        ("groups with a gradient", low.useful, high.useful, assumed),
        ("µs a kernel of a decode step", *(f"{1e6 * x.kernel:.1f}" for x in (low, high)), half),
        ("share of 3.35 TB/s in a decode step", *(f"{x.bandwidth:.2f}" for x in (low, high)), half),
        ("share of 989 TFLOP/s in other passes", *(f"{x.utilisation:.2f}" for x in (low, high)), half),
        ("NVLink, GB/s a direction, of 450", *(f"{x.nvlink / 1e9:.0f}" for x in (low, high)), assumed),
        ("between two nodes, GB/s, of 400 or 50", *(f"{x.network / 1e9:.0f}" for x in (low, high)), assumed),
        ("communication", "behind computation", "added to it", assumed),
    ]
    text = ["| | low | high | |", "|---|---|---|---|"]
    return text + ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def commands():
    text = ["```"]
    for machine in MACHINES:
        for recipe in RECIPES:
            text += [f"# {recipe}, {machine}", *command(recipe, machine).split("\n")]
    return text + ["```"]


TABLES = {"recipe commands": commands, "recipe assumptions": assumption_table, "recipe steps": step_table}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables into docs/gpu.md")
    args = parser.parse_args()
    for mark, table in TABLES.items():
        lines = table()
        print("\n".join(lines) + "\n")
        if args.write:
            insert(mark, lines)


if __name__ == "__main__":
    main()
