"""What all figures share: colours of methods, a style for light and dark pages, labels that do not collide.

A figure is an SVG file of at most 830 px, the width of a page on the hosting site. It is transparent, and its
text has a grey that can be read on white and on black. The same numbers give the same bytes.
"""

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

COLORS = {  # of a method in every figure, all of medium lightness
    "sft": "#7f7f7f",
    "dft": "#e08020",
    "eaft": "#9467bd",
    "idft": "#d62728",
    "hinted": "#5c6bc0",  # rewritten demonstrations, whatever the weight
    "rft": "#00897b",
    "dpo": "#a5723c",
    "simpo": "#b56576",
    "grpo": "#1f83d6",
    "sft, then grpo": "#b8a000",
    "luffy": "#2a9d5c",
    "prefix_rft": "#e0559f",
    "ppo": "#17a2b8",
    "best of n": "#6b8e23",
}
GREY = "#7a7a7a"  # of everything else: 4.3 : 1 on white, 4.4 : 1 on a dark page
WIDTH = 8.6  # inches of 96 px
_COLORED = "text.color axes.labelcolor axes.edgecolor axes.titlecolor xtick.color ytick.color"
STYLE = dict.fromkeys(_COLORED.split(), GREY) | {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "figures",  # ids do not change from run to run
}
styled = matplotlib.rc_context(STYLE)  # a decorator of functions that draw


def color_of(row):
    """The colour of a row's method; its name begins with it."""
    names = [name for name in COLORS if row == name or row.startswith((f"{name},", f"{name} "))]
    return COLORS[max(names, key=len)]


def canvas(rows, columns, height, **more):
    """A figure and its axes, [rows, columns]; the height is in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)  # can measure text
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


@styled
def save(figure, path):
    """Write an SVG file; without a date the same figure has the same bytes."""
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def boxes(figure):
    """{text: its extent in pixels} of all that is written."""
    renderer = figure.canvas.get_renderer()
    texts = [x for x in figure.findobj(Text) if x.get_text().strip() and x.get_visible()]
    return {text: text.get_window_extent(renderer) for text in texts}


def overlap(a, b):
    """The area that two extents share, in square pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0, width) * max(0, height)


def _along(corners):
    """Points every few pixels along a line, [n, 2]."""
    parts = [corners[:1]]
    for a, b in zip(corners, corners[1:]):
        steps = int(np.hypot(*(b - a)) / 5) + 1
        parts.append(a + (b - a) * np.linspace(0, 1, steps + 1)[1:, None])
    return np.concatenate(parts)


def _drawn(axis):
    """Extents of what an axis shows: small squares on its markers, lines and error bars."""
    to_pixels = axis.transData.transform
    dots = [to_pixels(line.get_xydata()) for line in axis.lines]
    dots += [_along(to_pixels(line.get_xydata())) for line in axis.lines if line.get_linestyle() != "None"]
    for bars in axis.collections:
        if isinstance(bars, LineCollection):
            dots += [_along(to_pixels(bar)) for bar in bars.get_segments()]
    return [Bbox([xy - 3, xy + 3]) for xy in np.concatenate(dots)]


def _places():
    """Where a text may stand beside its point, near ones first: offset and alignment, as of annotate."""
    sides = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}
    for distance in (7, 13, 20, 30, 42, 56):
        for dx, dy in [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]:
            offset = (dx * distance, dy * distance)
            alignment = {"ha": sides[dx][0], "va": sides[dy][1]}
            yield distance, {"xytext": offset, "textcoords": "offset points"} | alignment


def label(axis, points, size=8):
    """Write texts beside points, where they cover as little as possible; points: (text, (x, y), color)."""
    axis.figure.draw_without_rendering()  # settles where everything is
    renderer = axis.figure.canvas.get_renderer()
    inside = axis.get_window_extent(renderer).padded(-3)
    taken = [(box, 1) for box in _drawn(axis)]  # and how bad it is to cover it
    for _, xy, _ in points:
        middle = axis.transData.transform(xy)
        taken.append((Bbox([middle - 6, middle + 6]), 3))

    for text, xy, color in points:
        style = {"fontsize": size, "color": color}
        best = None
        for distance, place in _places():
            note = axis.annotate(text, xy, **place, **style)
            box = note.get_window_extent(renderer)
            note.remove()
            outside = box.width * box.height - overlap(box, inside)
            covered = sum(weight * overlap(box, other) for other, weight in taken)
            cost = distance + 3 * outside + covered
            if best is None or cost < best[0]:
                best = cost, distance, place, box
        _, distance, place, box = best
        if distance > 13:  # far from its point
            style["arrowprops"] = {"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkB": 3}
        axis.annotate(text, xy, **place, **style).set_in_layout(False)
        taken.append((box, 5))
