"""Curves of a report from the folders of the steps: stages of SFT, a quantizer that is a network, GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sidtune.core.folders import read_json
from sidtune.metrics.report.data import PanelCurves
from sidtune.tokenizers.quantizers.base import CURVE_FILE
from sidtune.tokenizers.sids.semantic_ids import LETTERS

LOG = list[dict[str, float | None]]  # `log_history.json` of a trainer


def stage_curves(folder: Path, stages: list[dict[str, Any]]) -> list[PanelCurves]:
    """Losses and learning rate of the stages of `sft`."""
    panels = {"loss": {"training": "loss", "held-out": "eval_loss"}, "learning rate": {"rate": "learning_rate"}}
    files = {stage["name"]: folder / stage["name"] / "log_history.json" for stage in stages}
    return [
        PanelCurves.from_log_history(name, read_json(file, LOG), panels, from_zero=False)
        for name, file in files.items()
        if file.exists()
    ]


def quantizer_curves(folder: Path) -> list[PanelCurves]:
    """Losses and codes in use per epoch of a quantizer that is a network; nothing for k-means and its kin."""
    if not (folder / CURVE_FILE).exists():
        return []
    epochs = [{"epoch": float, "used": list[float], "loss?": float, "reconstruction?": float, "revived?": float}]
    curves, used = read_json(folder / CURVE_FILE, epochs), "codes in use, level "
    log = [
        {**epoch, "step": epoch["epoch"], **{used + LETTERS[n]: share for n, share in enumerate(epoch["used"])}}
        for epoch in curves
    ]
    other = sorted({key for epoch in curves for key in epoch} - {"epoch", "loss", "reconstruction", "used", "revived"})
    panels = {
        "reconstruction error": {"error": "reconstruction"},
        "other losses": {key: key for key in other},
        "codes in use": {f"level {LETTERS[n]}": used + LETTERS[n] for n in range(len(curves[0]["used"]))},
        "codes moved": {"codes": "revived"} if any(epoch.get("revived") for epoch in curves) else {},
    }
    name = f"semantic IDs, {read_json(folder / 'quantizer_config.json', {'quantizer': str})['quantizer']}"
    return [PanelCurves.from_log_history(name, log, panels, unit="epoch")]


def grpo_curves(folder: str | None) -> list[PanelCurves]:
    """Reward, hits by level and distance to the start of a GRPO run."""
    if folder is None or not (Path(folder) / "log_history.json").exists():
        return []
    log = read_json(Path(folder) / "log_history.json", LOG)
    levels = sorted({key for entry in log for key in entry if key.startswith("hit/level_")})
    panels = {
        "reward": {"reward": "reward"},
        "right codes among the samples": {key.removeprefix("hit/").replace("_", " "): key for key in levels},
        "KL to the start": {"KL": "kl"},
    }
    return [PanelCurves.from_log_history("grpo", log, panels)]
