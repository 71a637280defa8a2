"""What all figures share: colours of methods, a style for light and dark pages, labels that do not collide.

A figure is an SVG file of at most 830 px, the width of a page on the hosting site. It is transparent, and its
text has a grey that can be read on white and on black. The same numbers give the same bytes.
"""

from itertools import product
from statistics import mean

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

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
    "maxrl": "#5f9ed1",
    "gspo": "#3f6fb5",
    "cispo": "#7c8fd0",
    "dapo": "#4a90a4",
    "opsd": "#c2703d",
    "sft, then grpo": "#b8a000",
    "luffy": "#2a9d5c",
    "rl + sft loss": "#6aa84f",
    "chord": "#45a392",
    "srft": "#8fa32e",
    "hpt": "#3d9a75",
    "uft": "#b06ab3",
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
# Whatever a user or another module has set, a figure starts from the library's defaults.
_FAMILIES = ("axes", "figure", "font", "grid", "legend", "lines", "savefig", "svg", "text", "xtick", "ytick")
_DEFAULTS = {k: v for k, v in matplotlib.rcParamsDefault.items() if k.split(".")[0] in _FAMILIES}
styled = matplotlib.rc_context(_DEFAULTS | STYLE)  # a decorator of functions that draw


def canvas(rows, columns, height, **more):
    """A figure and its axes, [rows, columns]; the height is in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)  # can measure text
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


@styled
def save(figure, path):
    """Write an SVG file; without a date the same figure has the same bytes."""
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def band(axis, steps, seeds, paint, name):
    """The mean of the seeds within the range of all of them."""
    by_step = list(zip(*seeds))
    axis.plot(steps, [mean(x) for x in by_step], color=paint, linewidth=1.5, label=name)
    axis.fill_between(steps, [min(x) for x in by_step], [max(x) for x in by_step], color=paint, alpha=0.2)


def _along(corners):
    """Points every few pixels along a line, [n, 2]."""
    parts = [corners[:1]]
    for a, b in zip(corners, corners[1:]):
        steps = int(np.hypot(*(b - a)) / 5) + 1
        parts.append(a + (b - a) * np.linspace(0, 1, steps + 1)[1:, None])
    return np.concatenate(parts)


def _drawn(axis):
    """Pixels on the markers, lines and error bars of an axis, [n, 2]."""
    to_pixels = axis.transData.transform
    found = [to_pixels(line.get_xydata()) for line in axis.lines] + [np.empty((0, 2))]
    found += [_along(xy) for line, xy in zip(axis.lines, found) if line.get_linestyle() != "None"]
    for bars in axis.collections:
        if isinstance(bars, LineCollection):
            found += [_along(to_pixels(bar)) for bar in bars.get_segments()]
    return np.concatenate(found)


def overlaps(box, others):
    """The areas that a box (x0, y0, x1, y1) shares with others, [n, 4]; in square pixels."""
    width = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    height = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    return width.clip(0) * height.clip(0)


RING = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
RING += [(x, y) for x in (1, -1) for y in (0.5, -0.5)] + [(x, y) for x in (0.5, -0.5) for y in (1, -1)]
DISTANCES = (7, 13, 20, 28, 38, 50, 64, 80)  # of a text from its point
FAR = 13  # beyond this a line leads from the text to its point


def label(axis, points, size=8):
    """Write texts beside points, where they cover as little as possible; points: (text, (x, y), color).

    The layout of the figure must be settled: figure.draw_without_rendering().
    """
    renderer = axis.figure.canvas.get_renderer()
    inside = axis.get_window_extent(renderer).padded(-3).extents
    dots = _drawn(axis)
    markers = axis.transData.transform([xy for _, xy, _ in points]) if points else dots[:0]
    boxes = np.concatenate([np.hstack([dots - 3, dots + 3]), np.hstack([markers - 6, markers + 6])])
    weights = np.array([1.0] * len(dots) + [3.0] * len(markers))  # how bad it is to cover them

    for i, (text, xy, color) in enumerate(points):
        middle = markers[i]
        style = {"fontsize": size, "color": color, "textcoords": "offset points"}
        note = axis.annotate(text, xy, (0, 0), **style)
        extent = note.get_window_extent(renderer)
        note.remove()
        best = None
        for distance, (dx, dy) in product(DISTANCES, RING):
            end = np.array([dx, dy]) * distance  # of the line to the text, from the point
            corner = end + np.array([extent.width * (dx - 1), extent.height * (dy - 1)]) / 2
            box = np.concatenate([middle + corner, middle + corner + [extent.width, extent.height]])
            outside = extent.width * extent.height - overlaps(box, inside[None])[0]
            covers = [box]
            cost = distance + 20 * outside
            if distance > FAR:
                line = _along(np.array([middle, middle + end]))[2:]
                covers += list(np.hstack([line - 2, line + 2]))
            else:  # it must not seem to belong to another point
                gaps = np.hypot(*(markers - markers.clip(box[:2], box[2:])).T)
                cost += 30 * (gaps < gaps[i]).sum()
            cost += sum((weights * overlaps(x, boxes)).sum() for x in covers)
            if best is None or cost < best[0]:
                best = cost, distance, corner, covers
        _, distance, corner, covers = best
        if distance > FAR:
            style["arrowprops"] = {"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkB": 3}
        axis.annotate(text, xy, corner * 72 / axis.figure.dpi, **style).set_in_layout(False)
        boxes = np.vstack([boxes, covers])
        weights = np.append(weights, [30.0] * len(covers))
