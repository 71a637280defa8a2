"""Two figures of docs/: what a model takes of GPUs' memory, and how fast the scripts are beside other code.

    python experiments/hardware.py        # writes docs/memory.svg and docs/speed.svg

Memory is computed as in experiments/memory.py; crosses are peaks that experiments/gpu.py measured. Speeds are
those of the records of experiments/gpu.py (one H100) and experiments/speed.py (CPUs, beside TRL).
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import memory  # noqa: E402
from experiments.figures import GREY, canvas, save, styled  # noqa: E402

RESULTS = ROOT / "experiments/results"
TOKENS, ROWS, LENGTH = 8192, 512, 1024  # the defaults of memory.py
LINES = {"training": "#1f83d6", "training, recomputed": "#e0559f", "sampling": "#b8a000"}
DECODING = {  # a record's name: what it is
    "old": "loop of 0.1.0",
    "generate": "transformers' generate",
    "eager": "not recorded",
    "recorded": "recorded",
}
MEASURED = {  # panel: the record, its line
    "Qwen2.5-0.5B": ("train 0.5B", "training"),
    "Qwen2.5-1.5B": ("train 1.5B recomputed", "training, recomputed"),
}
OURS, THEIRS = "#1f83d6", "#e08020"


def gib_per_gpu(shape, ranks):
    """GiB on one GPU, for each of LINES."""
    training = [memory.total(shape, TOKENS, recompute, ranks) for recompute in (False, True)]
    found = (*training, memory.sampling(shape, ROWS, LENGTH, ranks))
    return [x / memory.GIB for x in found]


@styled
def draw_memory():
    """A panel for each model: GiB per GPU over the number of GPUs, and the cards that have as much."""
    figure, [axes] = canvas(1, len(memory.SHAPES), 2.9, sharey=True)
    records = json.loads((RESULTS / "decoding.json").read_text())
    at = range(len(memory.GPUS))
    for axis, (name, shape) in zip(axes, memory.SHAPES.items()):
        by_ranks = [gib_per_gpu(shape, ranks) for ranks in memory.GPUS]
        for values, (what, color) in zip(zip(*by_ranks), LINES.items()):
            axis.plot(at, values, "o-", color=color, markersize=4, linewidth=1.5, label=what)
        if name in MEASURED:
            record, line = MEASURED[name]
            axis.plot(0, records[record]["GiB training"], "x", color=LINES[line], markersize=8)
        for gib in memory.CARDS.values():
            axis.axhline(gib, color=GREY, linestyle="--", linewidth=1)
        axis.set_yscale("log")
        axis.set(title=name, xlabel="GPUs", xlim=(-0.3, 3.4), ylim=(2, 1200))
        axis.set_xticks(at, memory.GPUS)
        axis.set_yticks([3, 10, 30, 100, 300, 1000], ["3", "10", "30", "100", "300", "1000"])
        axis.minorticks_off()
        axis.grid(axis="y")
    for gb, gib in memory.CARDS.items():
        axes[0].text(3.3, gib * 1.04, f"{gb} GB", ha="right", fontsize=7)
    axes[0].plot([], [], "x", color=GREY, markersize=8, label="measured on an H100")
    axes[0].set_ylabel("GiB per GPU")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def beside_trl():
    """{what: ours / theirs}, of the runs with one thread: times of a step, and memory above the start."""
    records = json.loads((RESULTS / "speed.json").read_text())
    found = {}
    for name, pair in records.items():
        model, threads, what = name.split(", ")
        if threads == "1" and " a step" in what:
            for unit in ("seconds", "MiB"):
                found[f"{what.partition(':')[0]}, {model}", unit] = pair["ours"][unit] / pair["theirs"][unit]
    return found


@styled
def draw_speed():
    """Left: ms of a decode step on an H100 and the floor. Right: ours / TRL's on a CPU."""
    figure, [[left, right]] = canvas(1, 2, 2.6)
    records = json.loads((RESULTS / "decoding.json").read_text())
    for y, key in enumerate(DECODING):
        x = records[f"speed 0.5B {key}"]["ms a step"]
        left.barh(y, x, 0.6, color=OURS if key == "recorded" else GREY, alpha=0.85)
        left.text(x * 1.08, y, f"{x:.1f}", va="center", fontsize=8)
    floor = records["speed 0.5B recorded"]["floor, ms"]
    left.axvline(floor, color=GREY, linestyle="--", linewidth=1)
    left.set_xscale("log")
    left.set_yticks(range(len(DECODING)), list(DECODING.values()))
    left.set_xticks([1, 10, 100], ["1", "10", "100"])
    left.set(xlim=(0.5, 200), title="a decode step, 0.5B, 512 rows, H100")
    left.set_xlabel("ms; dashed: memory traffic alone")
    pairs = beside_trl()
    names = list(dict.fromkeys(name for name, _ in pairs))
    for unit, color, offset, text in (("seconds", OURS, -0.19, "time"), ("MiB", THEIRS, 0.19, "memory")):
        values = [pairs[name, unit] for name in names]
        heights = [y + offset for y in range(len(names))]
        right.barh(heights, values, 0.34, color=color, alpha=0.85, label=text)
        for x, y in zip(values, heights):
            right.text(x + 0.015, y, f"{x:.2f}", va="center", fontsize=8)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.invert_yaxis()
    right.set(xlim=(0, 1.1), title="a step beside TRL's, one CPU thread", xlabel="ours / TRL's")
    right.legend(fontsize=8, loc="lower right")
    return figure


if __name__ == "__main__":
    save(draw_memory(), ROOT / "docs/memory.svg")
    save(draw_speed(), ROOT / "docs/speed.svg")
