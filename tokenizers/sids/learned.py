"""The folder of learned SIDs, which `learn_sids` and `extend_sids` write, and what both put into it from a table of items."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidtune.core.errors import DataError
from sidtune.core.folders import read_json
from sidtune.tokenizers.encoders.base import Encoder, item_texts, load_encoder
from sidtune.tokenizers.quantizers.base import Quantizer, load_quantizer
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vectors import load_tensors

VECTOR_FILE, BATCH_FILE, COLLISION_FILE = "vectors.safetensors", "batches.safetensors", "collisions.json"


@dataclass
class LearnedSids:
    """The parts of the folder; `vectors` (N, d) are those of its items.

    Attributes:
        batch: (N,) 0 for items the codebooks were learned from, n for those of the n-th extension.
        collisions: name and options of the treatment of collisions.
    """

    sids: SemanticIds
    quantizer: Quantizer
    encoder: Encoder
    vectors: np.ndarray
    batch: np.ndarray
    collisions: dict

    @classmethod
    def load(cls, folder: str | Path) -> LearnedSids:
        """Raises DataError when a part is missing, damaged, or of another run."""
        folder = Path(folder)
        sids = SemanticIds.from_pretrained(folder / "sids")
        vectors = load_tensors(folder / VECTOR_FILE).get("vectors")
        batch = np.zeros(len(sids), dtype=np.int32)
        if (folder / BATCH_FILE).exists():
            batch = load_tensors(folder / BATCH_FILE).get("batch")
        if vectors is None or batch is None or len(vectors) != len(sids) or batch.shape != (len(sids),):
            raise DataError(
                f"The vectors or batches in {folder} are not those of its {len(sids)} items; write the folder again."
            )
        collisions = {"name": "suffix"} if sids.suffix_level else {"name": "expand"}
        if (folder / COLLISION_FILE).exists():
            collisions = read_json(folder / COLLISION_FILE, {"method": {"name": str}})["method"]
        quantizer, encoder = load_quantizer(folder / "quantizer"), load_encoder(folder / "encoder")
        return cls(sids, quantizer, encoder, vectors, batch, collisions)


def texts_of(items: pa.Table) -> list[str]:
    """The encoder's input for each item. The title says most in the fewest words, so it counts twice."""
    return item_texts(items, repeats={"title": 2})
