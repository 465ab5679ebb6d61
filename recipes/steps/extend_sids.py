"""Gives new items their SIDs from frozen codebooks, measures the drift, and says whether to learn again.

    sidtune extend-sids --sids_dir runs/shop/sids --data_dir runs/new_items --output_dir runs/shop/sids_2

`data_dir` holds the new items; with `existing: skip` it may be the whole catalogue of today, of which only items without a SID
are encoded. The output is a folder like that of `learn_sids`, for the same model: every old item keeps its SID, no token is
added, no weight is read or written. Beside it stand `trie/`, `drift.json` (report and recommendation) and `batches.safetensors`
(0 for items the codebooks were learned from, n for those of the n-th extension).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import safetensors.numpy

from sidtune.core.config import SEEDS, as_dict, build, check_range, command
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import write_folder, write_json, write_run, writes
from sidtune.core.ragged import drawn
from sidtune.data_builders.tables.past import past_popularity
from sidtune.data_builders.tables.store import load_folder
from sidtune.tokenizers.encoders.base import Encoder, make_encoder, warn_empty
from sidtune.tokenizers.registry import COLLISIONS, ENCODERS, made_by
from sidtune.tokenizers.sids import catalogue_updates as updates
from sidtune.tokenizers.sids.learned import (
    BATCH_FILE,
    COLLISION_FILE,
    VECTOR_FILE,
    LearnedSids,
    texts_of,
)
from sidtune.tokenizers.sids.quality import sid_quality
from sidtune.tokenizers.sids.query_codes import QUERY_FILE
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

LAUNCH = "alone"

_CHECKED = 256  # items that have a SID and are encoded again, to see that the encoder is the same


@dataclass
class Arguments:
    """Options of extend_sids.

    Attributes:
        sids_dir: folder of learn_sids, or of an earlier extend_sids.
        data_dir: data folder with the new items.
        output_dir: folder to write.
        existing: `refuse` items that have a SID already, or `skip` them; with `skip`, some of them are encoded again to see
            that the encoder is the one of the codebooks, and if the folder holds the whole catalogue, rows follow its order.
        encoder: default the encoder in `sids_dir`. Only for SIDs of `precomputed` vectors: options of a `precomputed`
            encoder with the vectors of the new items.
        collisions: treatment of new items on crowded codes, as in learn_sids; default the one the SIDs were learned with.
            Old items never move.
        held_out_share: part of the learned items held out to measure how well the codebooks fit unseen items; the codebooks
            are trained once more for it, and thrown away. 0 compares with the learned items themselves.
        limits: of the recommendation to learn again, see `tokenizers/sids/catalogue_updates.py`.
        model_dir: a model folder to check: its vocabulary must be the one of these SIDs. Its token ids are then bound to
            the trie.
        seed: of the draws.
    """

    sids_dir: str
    data_dir: str
    output_dir: str
    existing: Literal["refuse", "skip"] = "refuse"
    encoder: dict = field(default_factory=dict)
    collisions: dict = field(default_factory=dict)
    held_out_share: float = 0.2
    limits: dict = field(default_factory=dict)
    model_dir: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, 0, "seed", most=SEEDS)
        if not 0 <= self.held_out_share < 1:
            raise ConfigError(f"held_out_share is a share in [0, 1), got {self.held_out_share}.")
        build(updates.DriftLimits, self.limits, "limits")
        if "path" in self.encoder:
            made_by(ENCODERS, {"name": "precomputed", **self.encoder})
        if self.collisions:
            made_by(COLLISIONS, {"name": "expand", **self.collisions})
        if Path(self.output_dir).resolve() == Path(self.sids_dir).resolve():
            raise ConfigError(
                "output_dir is sids_dir; write the extended SIDs into another folder, so that the old stay."
            )


@writes("extend_sids")
def main(arguments: Arguments) -> None:
    """Extends the folder; prints the drift report and the recommendation."""
    old, data = LearnedSids.load(arguments.sids_dir), load_folder(arguments.data_dir)
    items = data.items
    method = made_by(COLLISIONS, {"name": "expand", **(arguments.collisions or old.collisions)})
    encoder = _encoder(arguments, old)
    token_ids = _token_ids(arguments, old.sids)
    new, known = _split(items, old.sids, arguments)
    _check_encoder(encoder, items, known, old, arguments.seed)
    new_items = items.take(new)
    ids, texts = new_items["item_id"].to_pylist(), texts_of(new_items)
    fresh = encoder.encode(texts, ids)
    warn_empty(encoder, len(texts))
    sids = updates.extend_catalogue(old.sids, old.quantizer, ids, fresh, past_popularity(data)[new], method)
    sids = sids.with_titles(new_items)
    made = LearnedSids(
        sids=sids,
        quantizer=old.quantizer,
        encoder=old.encoder,
        vectors=np.concatenate([old.vectors, fresh]),
        batch=np.concatenate([old.batch, np.full(len(ids), old.batch.max() + 1, dtype=np.int32)]),
        collisions={"name": method.name, **as_dict(method.config)},
    )
    held_out = None
    if arguments.held_out_share:
        rows = old.vectors[old.batch == 0]
        held_out = updates.held_out_error(old.quantizer, rows, arguments.held_out_share, arguments.seed)
    limits = build(updates.DriftLimits, arguments.limits, "limits")
    drift = updates.measure_drift(sids, made.batch > 0, len(ids), made.vectors, made.quantizer, held_out, limits)
    _write(arguments, _in_order_of(items, made), drift, token_ids, [*method.notes])
    print(f"{arguments.output_dir}: {len(ids):,} new items, {len(sids):,} in all\n")
    print(drift.to_markdown())


def _encoder(arguments: Arguments, old: LearnedSids) -> Encoder:
    """The frozen encoder, or new vectors of a catalogue that was learned from precomputed ones."""
    if not arguments.encoder:
        return old.encoder
    options = {key: value for key, value in arguments.encoder.items() if key != "name"}
    if {old.encoder.name, arguments.encoder.get("name", old.encoder.name)} != {"precomputed"}:
        raise ConfigError(
            f"The codebooks were trained on vectors of the encoder '{old.encoder.name}' saved beside them, and only these fit "
            "them; leave 'encoder' out. Other vectors can be given only where the SIDs were learned from precomputed ones."
        )
    encoder: Any = make_encoder("precomputed", {"normalize": old.encoder.config.normalize, **options})
    if encoder.config.normalize != old.encoder.config.normalize:
        raise ConfigError(
            f"The codebooks were trained on vectors with normalize: {str(old.encoder.config.normalize).lower()}; leave "
            "'normalize' out."
        )
    return encoder


def _token_ids(arguments: Arguments, sids: SemanticIds) -> np.ndarray | None:
    if arguments.model_dir is None:
        return None
    from sidtune.decoding.retrieval.loading import final_model
    from sidtune.tokenizers.vocabulary.extension import Vocabulary

    vocabulary = Vocabulary.from_pretrained(final_model(arguments.model_dir))
    vocabulary.check(sids=sids)
    return vocabulary.sid_token_ids


def _split(items: pa.Table, sids: SemanticIds, arguments: Arguments) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `items` without and with a SID."""
    rows = sids.rows_of_ids(items["item_id"].to_pylist())
    new, known = np.flatnonzero(rows < 0), np.flatnonzero(rows >= 0)
    if len(known) and arguments.existing == "refuse":
        first = items["item_id"][int(known[0])].as_py()
        raise DataError(
            f"{len(known)} of {len(rows)} items in {arguments.data_dir} have a SID already (first: '{first}'), and it does not "
            "change; leave them out, or set existing: skip to add the others."
        )
    if not len(new):
        raise DataError(f"All {len(rows)} items in {arguments.data_dir} have a SID already; there is nothing to add.")
    return new, known


def _check_encoder(encoder: Encoder, items: pa.Table, known: np.ndarray, old: LearnedSids, seed: int) -> None:
    if not len(known):
        return
    part = items.take(known[drawn(len(known), _CHECKED, seed)])
    ids, texts = part["item_id"].to_pylist(), texts_of(part)
    if encoder.name == "precomputed":
        keep = [row for row, item_id in enumerate(ids) if _has_vector(encoder, item_id)]
        ids, texts = [ids[row] for row in keep], [texts[row] for row in keep]
    if ids:
        updates.check_same_encoder(old.vectors[old.sids.rows_of_ids(ids)], encoder.encode(texts, ids))


def _has_vector(encoder: Encoder, item_id: str) -> bool:
    """Whether precomputed vectors cover an item: a file of new vectors need not hold old ones, but those it holds must agree."""
    if encoder.config.align == "order":
        return False  # its rows are the items of one table, so which of them are old cannot be told
    try:
        encoder.encode([""], [item_id])
    except DataError:
        return False
    return True


def _in_order_of(items: pa.Table, made: LearnedSids) -> LearnedSids:
    """Rows in the order of the data folder where it holds the whole catalogue, which later steps compare; else as they are."""
    rows = made.sids.rows_of_ids(items["item_id"].to_pylist())
    if len(rows) != len(made.sids):
        return made
    return replace(made, sids=made.sids.replaced(rows), vectors=made.vectors[rows], batch=made.batch[rows])


def _write(
    arguments: Arguments, made: LearnedSids, drift: updates.Drift, token_ids: np.ndarray | None, notes: list[str]
) -> None:
    from sidtune.decoding.trie import SidTrie

    source = Path(arguments.sids_dir)
    quality = sid_quality(made.sids, made.vectors, made.quantizer, seed=arguments.seed)
    trie = SidTrie.from_semantic_ids(made.sids)
    with write_folder(arguments.output_dir) as scratch:
        # Copies, not saved again: what is frozen stays the same to the byte.
        for name in ("encoder", "quantizer"):
            shutil.copytree(source / name, scratch / name)
        if (source / QUERY_FILE).exists():
            shutil.copy(source / QUERY_FILE, scratch / QUERY_FILE)
        made.sids.save_pretrained(scratch / "sids")
        (trie if token_ids is None else trie.bind(token_ids)).save_pretrained(scratch / "trie")
        safetensors.numpy.save_file({"vectors": np.ascontiguousarray(made.vectors)}, scratch / VECTOR_FILE)
        safetensors.numpy.save_file({"batch": np.ascontiguousarray(made.batch)}, scratch / BATCH_FILE)
        write_json(scratch / "quality.json", quality.to_dict())
        write_json(scratch / "drift.json", drift.to_dict())
        write_json(scratch / COLLISION_FILE, {"method": made.collisions, "notes": notes})
        write_run(scratch, metrics={**quality.to_dict(), "drift": drift.to_dict()})


if __name__ == "__main__":
    command(main, Arguments)
