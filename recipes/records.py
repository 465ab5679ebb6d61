"""What report, publish and seeds read of finished steps; each file has the shape that its step gave it, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sidtune.core.folders import read_json
from sidtune.metrics.statistics.bootstrap import PairedResult
from sidtune.metrics.statistics.compare import SystemRow
from sidtune.metrics.statistics.slices import SliceRow

METRICS = {
    "split": str, "requests": int, "requests_without_feedback": int, "catalogue": int, "primary": str, "level": float,
    "resampled?": str,
    "systems": list[SystemRow], "slices": dict[str, list[SliceRow]], "against?": dict[str, PairedResult],
    "decoding": {"num_beams": int, "requests_per_second": float},
    "truth?": {"requests": int, "k": int, "systems": {...: {"click": float, "order": float, "regret": float}},
               "kendall_tau?": float | None},
}  # fmt: skip
SAMPLES = [
    {
        "request_id": str, "query": str | None, "context": list[tuple[str, str]], "history": list[str], "targets": list[str],
        "items": [{"item_id": str, "title": str | None, "sid": str, "hit": bool, "score": float}],
    }
]  # fmt: skip
LISTS = {
    "requests": {"train": int, "valid": int, "test": int}, "definition": str, "primary": str, "notes": list[str],
    "systems": list[SystemRow],
    "against": {...: {"difference": float, "low": float, "high": float, "adjusted_p_value": float}},
}  # fmt: skip
# Metrics in `run.json` of the steps.
BUILT = {"items": int, "users": int, "requests": int, "events": int}
STAGE = {
    "name": str, "seconds": float | None, "steps?": int | None, "train?": dict | None,
    "examples?": {"train?": {...: {"examples": int, "targets": int}}},
}  # fmt: skip
TRAINED = {"stages?": [STAGE]}
TUNED = {"prompts": int, "steps": int}


def evaluation(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`metrics.json` and `samples.json` of `evaluate`. Raises DataError where they are missing or damaged."""
    return read_json(Path(folder) / "metrics.json", METRICS), read_json(Path(folder) / "samples.json", SAMPLES)


def sid_quality(folder: str | Path) -> dict[str, Any]:
    """`quality.json` of `learn_sids`. Raises DataError where it is missing or damaged."""
    from sidtune.tokenizers.sids.quality import SidQuality

    return read_json(Path(folder) / "quality.json", SidQuality)
