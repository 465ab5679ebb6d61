"""What a report shows, as plain dataclasses that the `report` recipe fills from step folders.

Only `title` is required. A field left empty leaves its section out, and the report says so in one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sidtune.metrics.statistics.compare import SystemRow
from sidtune.metrics.statistics.slices import SliceRow

Points = list[tuple[float, float]]


@dataclass
class PanelCurves:
    """Curves of a training, side by side.

    Attributes:
        name: name of the training.
        panels: title → {label → points}; a panel with one label has no legend.
        unit: what a step is called. from_zero: whether the axes of the values begin at 0.
    """

    name: str
    panels: dict[str, dict[str, Points]] = field(default_factory=dict)
    unit: str = "step"
    from_zero: bool = True

    @classmethod
    def from_log_history(
        cls, name: str, log: Sequence[Mapping[str, Any]], panels: Mapping[str, Mapping[str, str]], **options: Any
    ) -> PanelCurves:
        """From `log_history` of a trainer: title → {label → key}; what was never logged is left out."""

        def points(key: str) -> Points:
            return [(float(e["step"]), float(e[key])) for e in log if e.get(key) is not None and "step" in e]

        made = {title: {label: points(key) for label, key in keys.items()} for title, keys in panels.items()}
        made = {title: {label: p for label, p in lines.items() if p} for title, lines in made.items()}
        return cls(name, {title: lines for title, lines in made.items() if lines}, **options)


@dataclass
class SampleItem:
    """One item of a ranked list.

    Attributes:
        title: text of the catalogue.
        sid: its semantic ID as text, for example `<a_12><b_7><c_0>`.
        hit: whether it is relevant.
        score: log-probability of its SID, or None.
        item_id: id, shown when there is no title.
    """

    title: str
    sid: str = ""
    hit: bool = False
    score: float | None = None
    item_id: str = ""


@dataclass
class SampleRequest:
    """One request with what the model answered.

    Attributes:
        query: the query, None for a recommendation.
        items: ranked items, best first.
        context: (name, value) pairs. history: titles, oldest first. targets: titles of the relevant items.
        request_id: id of the request.
    """

    query: str | None
    items: list[SampleItem]
    context: list[tuple[str, str]] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    request_id: str = ""


@dataclass
class ReportData:
    """Everything on the page.

    Attributes:
        title: heading.
        summary: what was run, in a sentence or two. command: how to run it again. created: when, as text.
        facts: name → number or text, shown as tiles (items, users, evaluated requests, seconds, ...).
        versions: package → version.
        warnings: full sentences shown at the top.
        systems: rows of the metric table (`compare_systems`). level: of the intervals. primary: metric of the plot.
        evaluation_notes: full sentences on how the metrics were taken (split, catalogue, what is resampled, ...).
        slices: system → rows (`slice_rows`), the same slices for each system. slice_metric: the metric they hold.
        sid_quality: `SidQuality.to_dict()`, or None.
        curves: of the trainings, by stage.
        post_rank: rows of the post-ranking table, or empty. post_rank_metric: metric of its plot.
        post_rank_notes: full sentences on how it was made.
        samples: sample requests.
        stages: one mapping for each stage; keys become columns.
        config: step → resolved config.
    """

    title: str
    summary: str = ""
    command: str = ""
    created: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    systems: list[SystemRow] = field(default_factory=list)
    level: float = 0.95
    primary: str = "ndcg@10"
    evaluation_notes: list[str] = field(default_factory=list)
    slices: dict[str, list[SliceRow]] = field(default_factory=dict)
    slice_metric: str = "ndcg@10"
    sid_quality: dict[str, Any] | None = None
    curves: list[PanelCurves] = field(default_factory=list)
    post_rank: list[SystemRow] = field(default_factory=list)
    post_rank_metric: str = ""
    post_rank_notes: list[str] = field(default_factory=list)
    samples: list[SampleRequest] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
