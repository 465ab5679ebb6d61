"""Writes one HTML file from the step folders: metrics with intervals, slices, post-ranking, SID quality, curves, sample requests.

    sidtune report --config recipes/quickstart/report.yaml --data_dir runs/quickstart/data \\
        --sids_dir runs/quickstart/sids --model_dir runs/quickstart/sft --eval_dir runs/quickstart/eval \\
        --output_dir runs/quickstart/report
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidtune.core.config import command
from sidtune.core.folders import read_json, read_run, write_folder, write_run, writes
from sidtune.recipes.over_seeds import difference
from sidtune.recipes.records import BUILT, LISTS, TRAINED, TUNED, evaluation, sid_quality

LAUNCH = "alone"
SHOW_AT_END = True


@dataclass
class Arguments:
    """Options of report.

    Attributes:
        data_dir, sids_dir, model_dir, eval_dir: folders of the earlier steps; `model_dir` is the one of `sft`.
        grpo_dir, post_rank_dir: folders of these steps, where there are any.
        output_dir: folder that receives `report.html` and `table.md`.
        title: heading of the page.
        command: how to run the whole again, shown on the page.
    """

    data_dir: str
    sids_dir: str
    model_dir: str
    eval_dir: str
    output_dir: str
    grpo_dir: str | None = None
    post_rank_dir: str | None = None
    title: str = "sidtune report"
    command: str = ""


@writes("report")
def main(arguments: Arguments) -> None:
    """Writes the report and prints where it lies."""
    from sidtune.decoding.retrieval.model_folder import check_made_from
    from sidtune.metrics.report.html import markdown_table, write_report

    made = {"data_dir": arguments.data_dir, "sids_dir": arguments.sids_dir}
    models = [folder for folder in (arguments.model_dir, arguments.grpo_dir) if folder is not None]
    for folder in (arguments.eval_dir, arguments.post_rank_dir):
        if folder is not None:
            check_made_from(folder, **made, model_dir=models)
    for folder in models:
        check_made_from(folder, **made)
    data = report_data(arguments)
    with write_folder(arguments.output_dir) as scratch:
        write_report(scratch / "report.html", data)
        (scratch / "table.md").write_text(markdown_table(data.systems), encoding="utf-8")
        write_run(scratch)
    print(f"The report is {Path(arguments.output_dir) / 'report.html'}")


def report_data(arguments: Arguments) -> Any:
    """Collects `ReportData` from the step folders."""
    from sidtune.metrics.report.curves import grpo_curves, quantizer_curves, stage_curves
    from sidtune.metrics.report.data import ReportData, SampleItem, SampleRequest
    from sidtune.metrics.statistics.compare import SystemRow
    from sidtune.metrics.statistics.slices import SliceRow

    folders = {
        "data": (arguments.data_dir, BUILT), "sids": (arguments.sids_dir, dict), "sft": (arguments.model_dir, TRAINED),
        "grpo": (arguments.grpo_dir, TUNED), "eval": (arguments.eval_dir, dict), "post_rank": (arguments.post_rank_dir, dict),
    }  # fmt: skip
    runs = {name: read_run(folder, told) for name, (folder, told) in folders.items() if folder is not None}
    (metrics, samples), quality = evaluation(arguments.eval_dir), sid_quality(arguments.sids_dir)
    stages = runs["sft"]["metrics"].get("stages", [])
    built, decoding = runs["data"]["metrics"], metrics["decoding"]
    seconds = sum(stage["seconds"] or 0 for stage in [*stages, runs.get("grpo", {"seconds": 0})])
    return ReportData(
        title=arguments.title,
        summary=(
            f"{metrics['requests']:,} {metrics['split']} requests, each ranked against the whole catalogue of "
            f"{metrics['catalogue']:,} items by {decoding['num_beams']} constrained beams."
        ),
        command=arguments.command,
        created=runs["eval"]["finished"],
        facts={
            **{name: built[name] for name in ("items", "users", "requests", "events")},
            "evaluated requests": metrics["requests"],
            "training seconds": round(seconds),
            "requests per second": decoding["requests_per_second"],
        },
        versions=runs["eval"]["versions"],
        warnings=quality.get("warnings", []),
        systems=[SystemRow.from_dict(row) for row in metrics["systems"]],
        level=metrics["level"],
        primary=metrics["primary"],
        evaluation_notes=_notes(metrics),
        slices={name: [SliceRow(**row) for row in rows] for name, rows in metrics["slices"].items()},
        slice_metric=metrics["primary"],
        sid_quality=quality,
        curves=[
            *quantizer_curves(Path(arguments.sids_dir) / "quantizer"),
            *stage_curves(Path(arguments.model_dir), stages),
            *grpo_curves(arguments.grpo_dir),
        ],
        **_post_rank(arguments.post_rank_dir),
        samples=[
            SampleRequest(
                **{**sample, "items": [SampleItem(**{**i, "title": i["title"] or ""}) for i in sample["items"]]}
            )
            for sample in samples
        ],
        stages=[*map(_stage_line, stages), *(_grpo_line(run) for name, run in runs.items() if name == "grpo")],
        config={name: run["config"] for name, run in runs.items()},
    )


def _notes(metrics: dict[str, Any]) -> list[str]:
    from sidtune.metrics.online.truth import truth_lines

    return [
        f"{metrics['requests_without_feedback']:,} requests of the split have no positive feedback and are left out.",
        f"Intervals and tests resample {metrics.get('resampled', 'users')}; another seed of the training is not in them.",
        "Metrics are on items after expansion of shared SIDs; ties are broken by fixed rules, so a rerun gives the same numbers.",
        *(truth_lines(metrics["truth"], metrics["primary"]) if "truth" in metrics else ()),
        *(
            f"{metrics['primary']} of the model against '{name}': {difference(pair)}, p = {pair['p_value']:.3f}."
            for name, pair in metrics.get("against", {}).items()
        ),
    ]


def _post_rank(folder: str | None) -> dict[str, Any]:
    """The table of a post-ranking step as fields of `ReportData`."""
    from dataclasses import replace

    from sidtune.metrics.list_ranking import BEST, CLICKS, RANDOM, SORTED
    from sidtune.metrics.statistics.compare import SystemRow

    if folder is None:
        return {}
    record = read_json(Path(folder) / "metrics.json", LISTS)
    rows = {row.name: row for row in map(SystemRow.from_dict, record["systems"])}
    primary = CLICKS if all(CLICKS in row.metrics for row in rows.values()) else record["primary"]
    shown = {
        "initial": {"name": "initial order", "note": "as the generator wrote it"},
        RANDOM: {"name": "random order", "kind": "anchor", "note": "mean of all orders"},
        SORTED: {"kind": "anchor", "note": "knows the true clicks, not that neighbours compete"},
        BEST: {"name": "best list", "note": "by search with the truth" if primary == CLICKS else "by the labels"},
    }
    order = [RANDOM, *(name for name in rows if name not in (RANDOM, SORTED, BEST)), SORTED, BEST]
    made = [replace(rows[name], **shown.get(name, {})) for name in order if name in rows]
    made = [replace(row, metrics=dict(sorted(row.metrics.items(), key=lambda one: one[0] != primary))) for row in made]
    counts = record["requests"]
    notes = [
        f"{counts['train']:,} training, {counts['valid']:,} validation and {counts['test']:,} test lists. {record['definition']}.",
        *record["notes"],
        *(
            f"{record['primary']} of llm4pr against {name}: {difference(pair)}, adjusted p = {pair['adjusted_p_value']:.3f} "
            "(paired bootstrap over users)."
            for name, pair in record["against"].items()
        ),
    ]
    return {"post_rank": made, "post_rank_metric": primary, "post_rank_notes": notes}


def _grpo_line(run: dict[str, Any]) -> dict[str, Any]:
    counts = {"examples": run["metrics"]["prompts"], "steps": run["metrics"]["steps"], "seconds": run["seconds"]}
    return {"stage": "grpo", "tasks": "rewards " + ", ".join(run["config"]["rewards"]), **counts}


def _stage_line(stage: dict[str, Any]) -> dict[str, Any]:
    train = stage.get("examples", {}).get("train", {})
    return {
        "stage": stage["name"],
        "tasks": ", ".join(train),
        "examples": sum(task["examples"] for task in train.values()),
        "learned tokens": sum(task["targets"] for task in train.values()),
        "steps": stage.get("steps"),
        "train loss": (stage.get("train") or {}).get("train_loss"),
        "seconds": stage.get("seconds"),
    }


if __name__ == "__main__":
    command(main, Arguments)
