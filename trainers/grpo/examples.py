"""From logged requests to prompts with targets for GRPO, rendered as supervised fine-tuning and evaluation render them.

A target is a leaf whose candidate has a chosen label of 1, with its corrected gain (`gains.py`): a null label
is unknown and never 0, what was not shown is no evidence. Requests without a positive leaf teach nothing here and are
left out, and counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from sidtune.core.config import build
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.ragged import drawn
from sidtune.data_builders.prompts.encoding import encode_prompts
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.columns import rows_of
from sidtune.data_builders.tables.store import DataFolder
from sidtune.data_builders.tasks.behaviour import prompt_for_requests
from sidtune.data_builders.tasks.input import TaskInput
from sidtune.models.position_bias.interventions import PositionBias, PositionLog, estimate_by_interventions
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.trainers.grpo.options import GRPOOptions
from sidtune.trainers.rewards.gains import ExposureGains, GainsConfig, LeafFacts, exposure_gains, shown_rates


def position_bias(how: str | None, requests: pa.Table) -> PositionBias | None:
    """Examination of positions: None, estimated from train requests ("interventions"), or a folder it was saved in."""
    if how is None:
        return None
    if how == "interventions":
        return estimate_by_interventions(PositionLog.of_requests(requests))
    if not Path(how).is_dir():
        raise ConfigError(f"position_bias must be null, interventions or a folder that holds one, got '{how}'.")
    return PositionBias.from_pretrained(how)


def hard_rows(path: str | Path, request_ids: pa.ChunkedArray) -> np.ndarray:
    """Rows of the requests that a hard set names in its column `request_id`, each once, rising.

    Raises:
        DataError: no such file or column, no request, or one that the split does not hold.
    """
    try:
        wanted = pq.read_table(path, columns=["request_id"])["request_id"]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(
            f"The hard set {path} is no parquet file with a column request_id ({' '.join(str(error).split())}); write it again."
        ) from None
    wanted = pc.unique(wanted.cast(request_ids.type))
    rows = rows_of(wanted, request_ids)
    if not len(rows):
        raise DataError(f"The hard set {path} is empty; make it from the split of this data that is trained on.")
    if (rows < 0).any():
        raise DataError(
            f"The hard set names the request '{wanted[int((rows < 0).argmax())].as_py()}', which is not in the split that is "
            "trained on; use data of one run."
        )
    return np.sort(rows)


def logged_gains(
    requests: pa.Table, facts: LeafFacts, options: GRPOOptions, log: pa.Table, train: pa.Table
) -> ExposureGains:
    """Gains of requests as the options correct them.

    Args:
        requests: some requests of `log`, in its order; the whole log tells how often an item was shown to like requests.
        train: requests that position bias is estimated from.
    """
    shown = None
    if options.corrects_exposure:
        kept = pc.is_in(log["request_id"], value_set=requests["request_id"].combine_chunks()).to_numpy()
        lengths = pc.fill_null(pc.list_value_length(log["candidates"]), 0).to_numpy()
        shown = shown_rates(log)[np.repeat(kept, lengths)]
    gains = build(GainsConfig, options.gains, "gains")
    return exposure_gains(requests, facts, position_bias(options.position_bias, train), gains, shown)


def grpo_examples(
    data: DataFolder,
    requests: pa.Table,
    sids: SemanticIds,
    facts: LeafFacts,
    serializer: Serializer,
    tokenizer: Any,
    *,
    made: ExposureGains | None = None,
    max_history: int | None = 20,
    max_length: int | None = None,
    split: str = "train",
    reserve: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Dataset, dict[str, int]]:
    """Prompts with targets.

    Args:
        data: the data folder, for histories. requests: the requests that become prompts.
        sids, facts: of the catalogue. serializer, tokenizer: of the model.
        made: gains of the requests, default uncorrected ones.
        split: of the requests. max_history: most past turns.
        max_length: most tokens of prompt and answer, of which `reserve` belong to the
            answer.
        limit: at most so many prompts, drawn by `seed` among the requests that can be rewarded; None for all.

    Returns:
        Columns `prompt` (text, for people), `prompt_ids`, `request_id`, `target_leaves`, `target_gains`; and
        counts of what was read and left out.

    Raises:
        DataError: no request has a positive leaf, or a prompt does not fit.
    """
    made = exposure_gains(requests, facts) if made is None else made
    useful = np.flatnonzero(_best(made) > 0)
    if not len(useful):
        raise DataError(
            f"No {split} request has a positive label on an item with a semantic ID, so nothing can be rewarded; check the labels "
            "of the gains and the hard set."
        )
    counts = {"requests": requests.num_rows, "without_positive": requests.num_rows - len(useful), **made.counts}
    useful = useful[drawn(len(useful), limit, seed)]
    kept = requests.take(useful)
    source = TaskInput.of_split(data, sids.texts(), serializer, split, max_history)
    ids = encode_prompts(tokenizer, prompt_for_requests(source, kept), max_length, reserve=reserve)
    columns = {name: [values[row] for row in useful] for name, values in made.columns().items()}
    prompts = tokenizer.batch_decode(ids)
    rows = {"prompt": prompts, "prompt_ids": ids, "request_id": kept["request_id"].to_pylist(), **columns}
    return Dataset.from_dict(rows), counts


def _best(made: ExposureGains) -> np.ndarray:
    """(R,) largest gain of each request, 0 without a target."""
    return made.targets.padded[1].max(axis=1, initial=0.0)
