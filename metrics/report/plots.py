"""The report's plots as SVG that follows the page: its font, and its light or dark colours through CSS variables.

matplotlib draws with marker colours that are replaced by `var(--...)` afterwards, so one drawing serves both modes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sidtune.metrics.report.data import PanelCurves, Points
from sidtune.metrics.statistics.compare import SystemRow
from sidtune.metrics.statistics.slices import SliceRow

MAX_POINTS = 400
_COLOURS = {
    "#1a1b01": "ink",
    "#1a1b02": "muted",
    "#1a1b03": "line",
    **{f"#1a1b1{n}": f"series-{n}" for n in range(1, 7)},
}
_INK, _MUTED, _LINE = "#1a1b01", "#1a1b02", "#1a1b03"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sidtune",
    # Names of stages and systems are not formulas.
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def series(number: int) -> str:
    """Marker colour of the n-th series, from 0; six colours, then again from the first."""
    return f"#1a1b1{number % 6 + 1}"


def metric_plot(systems: Sequence[SystemRow], metric: str, level: float) -> str:
    """Mean and interval of one metric for each system that has it, the first on top; empty text when none has."""
    rows = [(row, row.metrics[metric]) for row in systems if metric in row.metrics]
    if not rows:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.5 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (row, estimate) in enumerate(rows):
            colour = {"model": series(0), "baseline": _MUTED, "bound": series(1), "anchor": series(4)}[row.kind]
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low, estimate.high], [place, place], color=colour, linewidth=2.4, alpha=0.55)
            axes.plot([estimate.value], [place], "o", color=colour, markersize=6.5)
        names = [short(row.name) + (" (bound)" if row.kind == "bound" else "") for row, _ in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{metric}, {level:.0%} interval")
        return _svg(figure, f"{metric} of each system with its interval")


def slice_plot(slices: Mapping[str, Sequence[SliceRow]], metric: str) -> str:
    """Grouped points with intervals: slices down, systems side by side; empty slices and no slices are left out."""
    filled = [place for place, row in enumerate(next(iter(slices.values()), [])) if row.requests]
    if not filled:
        return ""
    slices = {system: [rows[place] for place in filled] for system, rows in slices.items()}
    names = [row.name for row in next(iter(slices.values()))]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 0.7 + (0.12 + 0.075 * len(slices)) * len(names)), layout="constrained")
        axes = figure.subplots()
        shift = 0.62 / max(len(slices), 1)
        for number, (system, rows) in enumerate(slices.items()):
            offset = (number - (len(slices) - 1) / 2) * shift
            colour = series(number)
            places = np.arange(len(rows)) + offset
            for place, row in zip(places, rows, strict=True):
                if row.low is not None and row.high is not None:
                    axes.plot([row.low, row.high], [place, place], color=colour, linewidth=1.8, alpha=0.5)
            axes.plot([row.mean for row in rows], places, "o", color=colour, markersize=4.5, label=short(system))
        axes.set_yticks(range(len(names)), [short(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel(metric)
        for place, (above, below) in enumerate(zip(names, names[1:], strict=False)):
            if above.split("/")[0] != below.split("/")[0]:
                axes.axhline(place + 0.5, color=_LINE, linewidth=0.8)
        figure.legend(loc="outside upper left", ncols=min(len(slices), 5), fontsize=9)
        return _svg(figure, f"{metric} by slice")


def level_plot(levels: Sequence[Mapping]) -> str:
    """Bars of utilisation and relative entropy for each SID level; empty text without levels."""
    if not levels:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.0), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(levels))
        for number, (key, label) in enumerate(
            (("utilisation", "codes in use"), ("normalized_entropy", "entropy / maximum"))
        ):
            heights = [float(level.get(key) or 0.0) for level in levels]
            axes.bar(places + (number - 0.5) * 0.28, heights, width=0.24, color=series(number), label=label)
        axes.set_xticks(places, [f"level {level.get('name', number)}" for number, level in enumerate(levels)])
        axes.set_ylim(0, 1)
        axes.set_xlim(-0.6, len(levels) - 0.4)
        axes.grid(False, axis="x")
        axes.yaxis.set_major_formatter("{x:.0%}")
        figure.legend(loc="outside upper left", ncols=2, fontsize=9)
        return _svg(figure, "Utilisation and entropy of each level")


def panel_plot(curves: PanelCurves) -> str:
    """The panels of a training side by side; empty text when nothing was logged."""
    if not curves.panels:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.3), layout="constrained")
        row = figure.subplots(1, len(curves.panels), squeeze=False)[0]
        for axes, (title, lines) in zip(row, curves.panels.items(), strict=True):
            for number, (label, points) in enumerate(lines.items()):
                _line(axes, points, series(number), short(label))
            axes.set_title(short(title))
            if len(lines) > 1:
                axes.legend(fontsize=8)
            axes.set_xlabel(short(curves.unit))
            if curves.from_zero:
                axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.grid(False, axis="x")
        return _svg(figure, f"Curves of {curves.name}")


def short(text: str, most: int = 42) -> str:
    """A name as it stands in a plot: one short line without characters that a font or XML cannot hold."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """Means of equal blocks of neighbours when there are more than `most` points, so that a long run stays small."""
    if len(points) <= most:
        return points
    values = np.asarray(points, dtype=np.float64)
    starts = np.linspace(0, len(points), most + 1).astype(int)[:-1]
    sizes = np.diff([*starts, len(points)])
    return [tuple(row) for row in (np.add.reduceat(values, starts) / sizes[:, None]).tolist()]  # type: ignore[misc]


def _line(axes: Axes, points: Points, colour: str, label: str) -> None:
    points = [point for point in points if np.isfinite(point).all()]
    if not points:
        return
    steps, values = zip(*thinned(points), strict=True)
    axes.plot(
        steps, values, color=colour, linewidth=1.5, label=label, marker="o" if len(steps) < 12 else None, markersize=3.5
    )


def _svg(figure: Figure, title: str) -> str:
    FigureCanvasSVG(figure)
    stream = io.StringIO()
    with warnings.catch_warnings():
        # The browser brings the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(
            stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": short(title, 120)}
        )
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    # Inside tags only: names between the tags stay as they are.
    return re.sub(r"<[^>]+>", _themed, text)


def _themed(tag: re.Match[str]) -> str:
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag.group())
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    for marker, name in _COLOURS.items():
        text = text.replace(marker, f"var(--{name})")
    return text.replace("xlink:href", "href")
