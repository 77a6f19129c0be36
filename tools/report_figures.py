"""report_figures.py: draws the report's pictures with matplotlib, as SVG for inside a page."""

from __future__ import annotations

import html
import io
import math
import re
import zlib
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from report_theme import COLORS, DASHES, css_variables, run_color, stand_in, themed

# A picture is about as wide as a phone, so that its text has the size of the page's text there.
WIDTH, HEIGHT, DPI = 380, 230, 72  # points, which the SVG calls user units
BINS = 300  # a line has at most so many points; beyond, a point stands for several steps
COLUMNS = 240  # of a heat map, likewise
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "safegrad", "font.size": 11,
    "image.composite_image": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": stand_in("muted"),
    "axes.labelcolor": stand_in("muted"), "xtick.color": stand_in("muted"),
    "ytick.color": stand_in("muted"), "text.color": stand_in("ink"), "axes.grid": True,
    "grid.color": stand_in("rule"), "grid.linewidth": 0.6, "lines.linewidth": 1.4,
    "figure.facecolor": "none", "axes.facecolor": "none", "axes.formatter.useoffset": False,
    "axes.axisbelow": True,
}


@dataclass
class Line:
    """What is drawn of one run: a point for a step, or the mean and range of `per_point` steps."""

    run: int
    name: str
    steps: list[float]
    values: list[float]
    low: list[float]
    high: list[float]
    per_point: int = 1
    dots: bool = False  # at each point, besides the line

    @property
    def empty(self) -> bool:
        return not np.isfinite(self.values).any()


def thin(run: int, name: str, steps: list[int], values: list[float], per_point: int) -> Line:
    """Of each bin of `per_point` steps the mean and the extremes are kept, so no spike is lost."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    starts = range(0, len(x), per_point)
    bins = [y[i:i + per_point] for i in starts]
    kept = [part[np.isfinite(part)] for part in bins]

    def each(function):
        return [float(function(part)) if len(part) else math.nan for part in kept]

    middles = [float(x[i:i + per_point].mean()) for i in starts]
    return Line(run, name, middles, each(np.mean), each(np.min), each(np.max), per_point)


def moving_share(flags: list[float], window: int) -> list[float]:
    """The percentage of ones among the last `window` entries that are not NaN."""
    shares, recent = [], []
    for flag in flags:
        if math.isfinite(flag):
            recent = [*recent, flag][-window:]
        shares.append(100 * sum(recent) / len(recent) if math.isfinite(flag) else math.nan)
    return shares


def line_chart(lines: list[Line], *, zero: bool = False, percent: bool = False,
               skipped: dict[int, list[int]] | None = None, label: str = "") -> str:
    """All lines over the steps. `skipped`: run -> steps that are marked at the upper edge."""
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(HEIGHT)
        for line in lines:
            draw_line(axes, line)
        if zero:
            axes.axhline(0, color=stand_in("muted"), linewidth=0.9)
        if percent:
            axes.set_ylim(-3, 103)
        elif scale := decades(lines):
            axes.set_yscale(**scale)
            axes.yaxis.get_major_locator().set_params(numticks=6)  # else labels may overlap
        for run, steps in (skipped or {}).items():
            axes.plot(steps, [1.0] * len(steps), "x", transform=axes.get_xaxis_transform(),
                      clip_on=False, color=stand_in(run_color(run)), markersize=6)
        axes.set_xlabel("step", labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        return svg_of(figure, label)


def draw_line(axes, line: Line) -> None:
    color = stand_in(run_color(line.run))
    dashes = DASHES[line.run]
    axes.plot(line.steps, line.values, color=color, dashes=dashes or (None, None),
              zorder=3, solid_joinstyle="round")
    # A line through one point would not be seen.
    alone = np.isfinite(line.values) if line.dots else isolated(line.values)
    axes.plot(np.asarray(line.steps)[alone], np.asarray(line.values)[alone], "o", color=color,
              markersize=4, zorder=3)
    if line.per_point > 1:
        axes.fill_between(line.steps, line.low, line.high, color=color, alpha=0.25, linewidth=0)


def isolated(values: list[float]) -> np.ndarray:
    known = np.isfinite(values)
    before, after = np.r_[False, known[:-1]], np.r_[known[1:], False]
    return known & ~before & ~after


def decades(lines: list[Line]) -> dict:
    """A logarithmic scale where a linear one would flatten nearly all of it, else nothing."""
    drawn = np.concatenate([[*line.low, *line.high] for line in lines])
    drawn = drawn[np.isfinite(drawn)]
    sizes = np.abs(drawn[drawn != 0])
    if len(sizes) == 0 or sizes.max() < 100 * np.median(sizes):
        return {}
    if drawn.min() > 0:
        return {"value": "log"}
    return {"value": "symlog", "linthresh": 10 ** math.floor(math.log10(np.median(sizes)))}


def bar_chart(rows: dict[str, list[float]], unit: str, label: str) -> str:
    """Rows of horizontal bars, in each one bar a run, the first run on top."""
    runs = len(next(iter(rows.values())))
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(60 + len(rows) * (12 + 7 * runs))
        thickness = 0.8 / runs
        for run in range(runs):
            y = [row + (run - (runs - 1) / 2) * thickness for row in range(len(rows))]
            axes.barh(y, [values[run] for values in rows.values()], height=thickness * 0.9,
                      color=stand_in(run_color(run)))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(unit, labelpad=2)
        return svg_of(figure, label)


@dataclass
class HeatMap:
    """blocks x columns; a column is `per_column` steps, of which the mean cosine is shown."""

    blocks: list[str]
    steps: list[int]  # the first step of each column
    last_step: int
    values: list[list[float]]
    per_column: int


def heat_map_of(steps: list[int], rows: dict[str, list[float]]) -> HeatMap:
    """`rows`: block -> its cosine at each step, NaN where there is none."""
    per_column = max(1, math.ceil(len(steps) / COLUMNS))
    starts = range(0, len(steps), per_column)

    def means(values):
        parts = [[v for v in values[i:i + per_column] if math.isfinite(v)] for i in starts]
        return [sum(part) / len(part) if part else math.nan for part in parts]

    return HeatMap(list(rows), [steps[i] for i in starts], steps[-1],
                   [means(values) for values in rows.values()], per_column)


def heat_chart(heat: HeatMap, limit: float, label: str) -> str:
    """Colour for the sign, opacity for the size: nothing at 0, full at ±limit and beyond."""
    values = np.asarray(heat.values)
    missing = ~np.isfinite(values)
    image = np.empty((*values.shape, 4))
    for where, name in ((values < 0, "against"), (values >= 0, "along"), (missing, "muted")):
        image[where, :3] = to_rgb(COLORS[name][0])
    image[..., 3] = np.where(missing, 0.2, np.clip(np.abs(values) / limit, 0, 1))
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = canvas(66 + max(13 * len(heat.blocks), 40))
        axes.imshow(image, aspect="auto", interpolation="none")
        axes.set_yticks(range(len(heat.blocks)), heat.blocks, fontsize=10)
        columns = np.unique(np.linspace(0, len(heat.steps) - 1, 6).round().astype(int))
        axes.set_xticks(columns, [str(heat.steps[c]) for c in columns])
        axes.set_xlabel("step", labelpad=2)
        return svg_of(figure, label)


def canvas(height: float):
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def svg_of(figure: Figure, label: str) -> str:
    """The picture as an <svg> for inside a page; `label` is read to those who do not see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None,
                                                   "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):]
    # The page decides on fonts, and a <style> in here would be the whole page's.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    # Names must be unique in a page that holds many pictures.
    prefix = f"f{zlib.crc32(svg.encode() + label.encode()):08x}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    return themed(svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1))


def standalone_svg(figure: Figure, label: str) -> str:
    """The picture as a file of its own, which follows the theme of the page that shows it."""
    style = f"<style>{css_variables()}\ntext{{font-family:sans-serif}}</style>"
    return re.sub(r">", f">{style}", svg_of(figure, label), count=1)
