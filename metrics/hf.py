"""The ranking metrics as Hugging Face `evaluate` modules, offline.

    from sidtune.metrics.hf import load_metric

    ndcg = load_metric("ndcg")
    ndcg.compute(predictions=[["i7", "i2"], ["i3"]], references=[["i2"], ["i3"]], k=2)  # {"ndcg@2": 0.8154...}

`evaluate.load(module_path("ndcg"))` does the same. Predictions are item ids, best first; a list shorter than k ends
there. References are the ids of the relevant items. evaluate keeps its copies in its own cache, never beside the
module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import evaluate
import numpy as np

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.metrics.ranking import Relevance, evaluate_ranking

_FOLDER = Path(__file__).parent / "hf_modules"
_INPUTS = """
Args:
    predictions: for each request the ranked item ids, best first, each at most once.
    references: for each request the ids of its relevant items, each once.
    k: cut-off, default 10.
    empty: "refuse" (default) or "exclude" requests without references.
"""


def module_path(name: str) -> str:
    """Folder of the evaluate module of a metric: `ndcg` or `sid_ndcg`. Raises ConfigError with the nearest name."""
    known = sorted(path.name for path in _FOLDER.glob("sid_*") if path.is_dir())
    full = name if name.startswith("sid_") else f"sid_{name}"
    if full not in known:
        raise ConfigError(f"There is no evaluate module named '{name}': {nearest(full, known)}")
    return str(_FOLDER / full)


def load_metric(name: str, **options: Any) -> evaluate.EvaluationModule:
    """Loads a metric module from the installed package without the network; `options` go to `evaluate.load`."""
    return evaluate.load(module_path(name), **options)


def module_info(description: str) -> evaluate.MetricInfo:
    """What every module here tells evaluate about itself."""
    texts = datasets.Sequence(datasets.Value("string"))
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=_INPUTS,
        features=datasets.Features({"predictions": texts, "references": texts}),
    )


def score_ids(
    metric: str,
    predictions: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    k: int = 10,
    empty: Literal["refuse", "exclude"] = "refuse",
) -> dict[str, float]:
    """`{"metric@k": mean}` for lists of item ids; errors as `evaluate_ranking`."""
    if len(predictions) != len(references):
        raise DataError(f"There are {len(predictions)} predictions but {len(references)} references; give one of each.")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ConfigError(f"k must be a positive integer, got {k!r}.")
    lengths = np.array([len(one) for one in predictions], dtype=np.int64)
    wanted = np.array([len(one) for one in references], dtype=np.int64)
    ids = [item for one in (*predictions, *references) for item in one]
    rows = np.unique(np.asarray(ids, dtype=np.str_), return_inverse=True)[1].reshape(-1).astype(np.int64)
    ranked = np.full((len(predictions), max(k, int(lengths.max(initial=0)))), -1, dtype=np.int64)
    ranked[np.arange(ranked.shape[1]) < lengths[:, None]] = rows[: lengths.sum()]
    relevance = Relevance(np.concatenate([[0], np.cumsum(wanted)]).astype(np.int64), rows[lengths.sum() :])
    return evaluate_ranking(ranked, relevance, ks=[k], metrics=[metric], empty=empty).means()
