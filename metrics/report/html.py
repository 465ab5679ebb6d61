"""The report of a run: one HTML file that needs nothing else, and the metric table for Markdown and the console.

The page holds its style and its plots (inline SVG), runs no script and loads nothing: a content security policy in
its head forbids it. Titles and queries come from strangers, so the template escapes everything; only our own SVG is
passed through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.metrics.report import plots as report_plots
from sidtune.metrics.report.data import ReportData
from sidtune.metrics.statistics.compare import Estimate, SystemRow
from sidtune.metrics.statistics.slices import SliceRow

TEMPLATE = "report.html.jinja"
MARKS = {"better": "▲", "worse": "▼", "": ""}

# key of SidQuality.to_dict() → label, format, what it says
_SID_FACTS = (
    ("items", "items", "{:,}", ""),
    ("codes", "distinct codes", "{:,}", ""),
    ("icr", "ICR", "{:.1%}", "items with a code of their own"),
    ("lost_rate", "collisions", "{:.1%}", "items beyond one per code"),
    ("largest_group", "largest group", "{:,}", "items on one code"),
    ("cur_total", "CUR", "{:.2%}", "codes in use of all that the levels can spell"),
    ("relative_error", "error / variance", "{:.3f}", "of the item vectors after decoding"),
    ("neighbour_overlap", "neighbours kept", "{:.1%}", "nearest items that stay nearest"),
    ("shared_levels_neighbours", "levels shared, neighbours", "{:.2f}", ""),
    ("shared_levels_random", "levels shared, random", "{:.2f}", ""),
)
_LEVEL_COLUMNS = (
    ("name", "level", "{}"),
    ("size", "codes", "{:,}"),
    ("used", "used", "{:,}"),
    ("utilisation", "of all", "{:.1%}"),
    ("entropy_bits", "entropy (bits)", "{:.2f}"),
    ("normalized_entropy", "of maximum", "{:.1%}"),
    ("gini", "Gini", "{:.2f}"),
    ("prefixes", "prefixes", "{:,}"),
    ("relative_error", "error / variance", "{:.3f}"),
)


def write_report(path: str | Path, data: ReportData) -> Path:
    """Writes the report as one HTML file.

    Raises:
        DataError: rows of the slices differ between systems.
    """
    path = Path(path)
    text = render_report(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate in a stranger's title must not stop the report.
    path.write_bytes(text.encode("utf-8", "replace"))
    return path


def render_report(data: ReportData) -> str:
    """The report as HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["value"] = format_value
    environment.filters["yaml"] = _yaml
    metrics = _metrics(data.systems)
    primary = data.primary if data.primary in metrics else (metrics[0] if metrics else "")
    quality = data.sid_quality or {}
    plots = {
        "metrics": report_plots.metric_plot(data.systems, primary, data.level),
        "slices": report_plots.slice_plot(data.slices, data.slice_metric),
        "levels": report_plots.level_plot(quality.get("levels") or []),
        "post_rank": report_plots.metric_plot(data.post_rank, data.post_rank_metric, data.level),
    }
    curves = [(curve.name, Markup(report_plots.panel_plot(curve))) for curve in data.curves]  # noqa: S704
    post_rank = _metrics(data.post_rank)
    return environment.get_template(TEMPLATE).render(
        data=data,
        level=f"{100 * data.level:g} %",
        metrics=metrics,
        primary=primary,
        best=_best(data.systems, metrics),
        post_rank=post_rank,
        post_rank_best=_best(data.post_rank, post_rank),
        marks=MARKS,
        plots={name: Markup(svg) for name, svg in plots.items()},  # noqa: S704
        curves=[(name, svg) for name, svg in curves if svg],
        slices=_slice_lines(data.slices),
        sid_facts=[(n, f.format(quality[k]), t) for k, n, f, t in _SID_FACTS if quality.get(k) is not None],
        level_table=_level_table(quality.get("levels") or []),
        stage_columns=list(dict.fromkeys(key for stage in data.stages for key in stage)),
    )


def markdown_table(rows: Sequence[SystemRow], metrics: Sequence[str] | None = None) -> str:
    """Rows as a GitHub table, each of the metrics (default all) as `0.1234 [0.1200, 0.1270] ▲`."""
    header, lines = _grid(rows, metrics, estimate_text)
    numeric = [all(_is_number(line[n]) for line in lines) for n in range(len(header))]
    parts = ["| " + " | ".join(_cell(name) for name in header) + " |"]
    parts.append("|" + "|".join("---:" if right else "---" for right in numeric) + "|")
    parts += ["| " + " | ".join(_cell(value) for value in line) + " |" for line in lines]
    return "\n".join(parts) + "\n"


def console_table(rows: Sequence[SystemRow], metrics: Sequence[str] | None = None) -> Table:
    """The same as a rich table, `rich.print(console_table(rows))`; below each mean half the width of its interval."""
    header, lines = _grid(rows, metrics, _short_text)
    table = Table(header_style="bold")
    for place, name in enumerate(header):
        right = all(_is_number(line[place]) for line in lines)
        table.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row, line in zip(rows, lines, strict=True):
        style = {"model": "bold", "bound": "italic dim"}.get(row.kind, "")
        # Text, not markup: a name may hold square brackets.
        table.add_row(*(Text(value) for value in line), style=style)
    return table


def format_value(value: Any) -> str:
    """A value as a person reads it: thousands separated, four significant decimals, lists joined, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".") if 1e-3 <= abs(value) < 1e9 or value == 0 else f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(one) for one in value)
    return str(value)


def estimate_text(estimate: Estimate) -> str:
    """`0.1234 [0.1200, 0.1270] ▲`."""
    text = f"{estimate.value:.4f}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{estimate.low:.4f}, {estimate.high:.4f}]"
    return f"{text} {MARKS.get(estimate.mark, '')}".rstrip()


def _short_text(estimate: Estimate) -> str:
    text = f"{estimate.value:.4f}{MARKS.get(estimate.mark, '')}"
    if estimate.low is not None and estimate.high is not None:
        text += f"\n±{(estimate.high - estimate.low) / 2:.4f}"
    return text


def _grid(
    rows: Sequence[SystemRow], wanted: Sequence[str] | None, show: Callable[[Estimate], str]
) -> tuple[list[str], list[list[str]]]:
    metrics, lines = _chosen(_metrics(rows), wanted), []
    for row in rows:
        cells = [row.metrics.get(metric) for metric in metrics]
        label = f"{row.name} (bound)" if row.kind == "bound" else row.name
        lines.append([label, *("–" if cell is None else show(cell) for cell in cells)])
    return ["system", *metrics], lines


def _chosen(known: list[str], wanted: Sequence[str] | None) -> list[str]:
    for name in wanted or ():
        if name not in known:
            raise ConfigError(f"The table has no column '{name}': {nearest(name, known)}")
    return known if wanted is None else list(wanted)


def _metrics(systems: Sequence[SystemRow]) -> list[str]:
    return list(dict.fromkeys(metric for row in systems for metric in row.metrics))


def _best(systems: Sequence[SystemRow], metrics: Sequence[str]) -> dict[str, float]:
    """Metric → highest mean of the systems that are no upper bound and no anchor."""
    rows = [row for row in systems if row.kind not in ("bound", "anchor")]
    return {m: max((row.metrics[m].value for row in rows if m in row.metrics), default=0.0) for m in metrics}


def _slice_lines(slices: Mapping[str, Sequence[SliceRow]]) -> list[tuple[SliceRow, list[SliceRow]]]:
    """One line for each slice: its first row (name and size) and the rows of all systems."""
    systems = list(slices.values())
    names = [[row.name for row in rows] for rows in systems]
    if any(one != names[0] for one in names):
        raise DataError("The systems of a report have different slices; build them with the same masks.")
    return [(rows[0], list(rows)) for rows in zip(*systems, strict=True)]


def _level_table(levels: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = [column for column in _LEVEL_COLUMNS if any(level.get(column[0]) is not None for level in levels)]
    lines = [["–" if level.get(key) is None else f.format(level[key]) for key, _, f in columns] for level in levels]
    return [label for _, label, _ in columns], lines


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110).strip()


def _cell(text: str) -> str:
    text = " ".join(str(text).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _is_number(text: str) -> bool:
    return text == "–" or text.lstrip("-+")[:1].isdigit()
