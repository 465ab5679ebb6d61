"""SIDs of next-item data: the publisher's, or learned from the item vectors that lie beside the sequences (row n = item n)."""

from __future__ import annotations

import numpy as np

from sidtune.data_builders.sequences.item_sequences import ItemSequences
from sidtune.data_builders.sequences.source import SequenceSource
from sidtune.tokenizers.encoders.precomputed import PrecomputedConfig, PrecomputedEncoder
from sidtune.tokenizers.registry import COLLISIONS, QUANTIZERS, made_by
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

PUBLISHED = "published"


def needed_file(spec: dict) -> tuple[str, str]:
    """The pattern of the file that SIDs come from, and what it is for."""
    return ("*.index.json", "published SIDs") if spec["name"] == PUBLISHED else ("*.npy", "SIDs of our own")


def item_vectors(spec: dict, source: SequenceSource, sequences: ItemSequences) -> np.ndarray:
    """(N, d) vectors of the source, row n = item n."""
    path = source.only_file(*needed_file(spec))
    encoder = PrecomputedEncoder(PrecomputedConfig(path=str(path), align="row_number"))
    return encoder.encode([""] * len(sequences.item_ids), sequences.item_ids)


def quantizer_spec(spec: dict) -> dict:
    """Name and options of the quantizer."""
    return {key: value for key, value in spec.items() if key != "collisions"}


def make_sids(spec: dict, source: SequenceSource, sequences: ItemSequences) -> SemanticIds:
    """The publisher's SIDs of the source folder, or SIDs learned from its item vectors.

    Args:
        spec: `{name: published}`, or name and options of a quantizer with `collisions`, how shared codes are treated.

    Raises:
        DataError: the folder lacks the one file that is needed, or items lack a SID or a vector.
    """
    if spec["name"] == PUBLISHED:
        return SemanticIds.from_index_json(source.only_file(*needed_file(spec)))
    vectors = item_vectors(spec, source, sequences)
    quantizer = made_by(QUANTIZERS, quantizer_spec(spec))
    codes = quantizer.fit_encode(vectors)
    counts = sequences.training_counts().astype(np.float64)
    coded = SemanticIds(sequences.item_ids, codes, tuple(quantizer.level_sizes), counts)
    return made_by(COLLISIONS, {"name": "expand", **spec.get("collisions", {})}).resolve(coded, vectors, quantizer)
