"""The first picture of the README: the scripts as a family, beside what each of them does to pass@1.

    python experiments/picture.py            # writes docs/family.svg

On the left, a line from a script to its parent has the share of code lines that differ. On the right are
means and 95 % intervals of rows of the study (experiments/study.py), in two regimes.
"""

import ast
import difflib
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments import charts, study  # noqa: E402
from experiments import records as rec  # noqa: E402
from experiments.figures import GREY, canvas, save, styled  # noqa: E402
from experiments.rows import BY_KEY  # noqa: E402

FAMILY = {  # script: parent, what it is
    "sft": (None, "supervised fine-tuning"),
    "rft_rejection": ("sft", "correct own samples"),
    "idft_hinted": ("sft", "weights of tokens"),
    "dpo": ("sft", "pairs"),
    "grpo": (None, "RL from a verifier"),
    "prefix_rft": ("grpo", "demonstration prefixes"),
    "luffy": ("grpo", "whole demonstrations"),
    "opsd": ("grpo", "a teacher with the solution"),
    "rlhf_ppo": ("grpo", "a reward model and a critic"),
}
SHOWN = {  # script: its row where every question is demonstrated, and where only easy ones are
    "sft": ("all: sft", "easy: sft"),
    "rft_rejection": ("answers: rft, k = 4",) * 2,
    "idft_hinted": ("all: hinted + idft", "easy: hinted + idft"),  # as without flags; easy: no row
    "dpo": ("answers: dpo",) * 2,
    "grpo": ("answers: grpo",) * 2,
    "prefix_rft": ("all: prefix_rft", "easy: prefix_rft"),
    "luffy": ("all: luffy", "easy: luffy"),
    "opsd": ("all: opsd", "easy: opsd"),
    "rlhf_ppo": (None, None),
}
REGIMES = ("all", "easy")
TITLES = ("every question demonstrated", "only easy ones demonstrated")


def code_lines(text):
    """The lines of code without their comments; docstrings and blank lines are left out, too."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    starts = {t.start[0]: t.start[1] for t in tokens if t.type == tokenize.COMMENT}
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = []
    for i, line in enumerate(text.splitlines(), 1):
        line = line[: starts.get(i, len(line))].rstrip()
        if line and i not in docstrings:
            code.append(line)
    return code


def changed(parent, child):
    """The share of code lines of two scripts that are in one of them only."""
    a, b = (code_lines((ROOT / f"{name}.py").read_text()) for name in (parent, child))
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return 1 - matcher.ratio()


def tree(axis):
    """Scripts from top to bottom, children to the right of a line from their parent."""
    heights = {name: y for y, name in enumerate(FAMILY)}
    for name, (parent, text) in FAMILY.items():
        y = heights[name]
        x = 0.34 if parent else 0.0
        axis.text(x, y, f"{name}.py", va="center", family="monospace", weight="bold", fontsize=9)
        axis.text(x + 0.02, y + 0.36, text, va="center", fontsize=7.5)
        if parent:
            axis.plot([0.08, 0.08, 0.32], [heights[parent] + 0.6, y, y], color=GREY, linewidth=1)
            share = f"{changed(parent, name):.0%}".replace("%", " %")
            axis.text(0.2, y - 0.24, share, ha="center", va="center", fontsize=8)
    axis.set(xlim=(-0.01, 1.0))
    axis.set_title("share of code lines that differ from the parent", loc="left", fontsize=9)
    axis.set_axis_off()


@styled
def draw(records):
    figure, [axes] = canvas(1, 3, 3.9, width_ratios=[2.1, 1, 1], sharey=True)
    tree(axes[0])
    for i, (axis, regime, title) in enumerate(zip(axes[1:], REGIMES, TITLES)):
        keys = [rows[i] for rows in SHOWN.values()]
        for y, key in enumerate(keys):
            if key in BY_KEY and rec.numbers(records, key, "primary", regime):
                charts.dot(axis, records, key, regime, y)
            elif key:
                axis.text(0.7, y, "not run", ha="center", va="center", fontsize=7.5)
            else:
                axis.text(0.7, y, "gold reward", ha="center", va="center", fontsize=7.5)
        base = rec.numbers(records, rec.BASE, "primary", regime)
        if base:
            axis.axvline(base[0], color=GREY, linestyle="--", linewidth=1)
        axis.set_yticks([])
        axis.set(xlim=(-0.02, 1.02), title=title, xlabel=charts.asked(regime))
        axis.grid(axis="x")
    axes[0].set_ylim(len(FAMILY) - 0.2, -0.7)
    return figure


if __name__ == "__main__":
    save(draw(study.read_records()), ROOT / "docs/family.svg")
