"""Small next-item data in the LETTER format with a rule that a model can learn, and small networks over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidtune.data_builders.sequences.item_sequences import ItemSequences
from sidtune.decoding.next_item.ranking import SequenceCatalogue
from sidtune.models.next_item.network import NextItemConfig, NextItemNetwork, make_network
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

SIZES = (4, 3, 5)


def chain_folder(folder: Path, users: int = 120, items: int = 60, follow: float = 0.85, seed: int = 0) -> Path:
    """A folder in the LETTER format whose users go from an item to its successor with probability `follow`."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    successor = draw.permutation(items)
    sequences = {}
    for user in range(users):
        row = [int(draw.integers(items))]
        for _ in range(int(draw.integers(4, 10))):
            row.append(int(successor[row[-1]]) if draw.random() < follow else int(draw.integers(items)))
        sequences[str(user)] = row
    index = {str(n): [f"<a_{n // 10}>", f"<b_{n % 10 // 2}>", f"<c_{n % 2}>"] for n in range(items)}
    (folder / "X.inter.json").write_text(json.dumps(sequences))
    (folder / "X.index.json").write_text(json.dumps(index))
    np.save(folder / "X.vectors.npy", draw.normal(size=(items, 8)).astype(np.float32))
    return folder


def random_sequences(users: int = 9, items: int = 30, seed: int = 0) -> ItemSequences:
    """Users of 1, 2, 3 and then 3 to 12 random items."""
    draw = np.random.default_rng(seed)
    lengths = np.concatenate([[1, 2, 3], draw.integers(3, 13, users - 3)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = [f"i{n}" for n in range(items)]
    return ItemSequences(ids, [f"u{n}" for n in range(users)], offsets, draw.integers(0, items, offsets[-1]))


def random_catalogue(sequences: ItemSequences, seed: int = 0) -> SequenceCatalogue:
    """Random SIDs of three levels, some of them shared."""
    draw = np.random.default_rng(seed)
    codes = np.stack([draw.integers(0, size, len(sequences.item_ids)) for size in SIZES], axis=1)
    return SequenceCatalogue.of(SemanticIds(sequences.item_ids, codes.astype(np.int32), SIZES), sequences)


def small_network(kind: str, items: int = 30, seed: int = 0, **fields: Any) -> NextItemNetwork:
    """A fresh network in evaluation mode."""
    torch.manual_seed(seed)
    shape = {"width": 16, "heads": 2, "layers": 2, "code_layers": 2, "feed_forward": 32, **fields}
    network = make_network(NextItemConfig(list(SIZES), items, kind, **shape)).eval()
    if getattr(network, "recency", None) is not None:
        # Its start is a straight slope, on which a distance that is off by one would not show.
        torch.nn.init.normal_(network.recency.weight)
    return network


def one_history(catalogue: SequenceCatalogue, rows: np.ndarray, user: int) -> dict[str, torch.Tensor]:
    """A batch of one history."""
    found = torch.from_numpy(np.asarray(rows, dtype=np.int64))[None]
    codes = torch.from_numpy(catalogue.codes)[found]
    return {"rows": found, "codes": codes, "segments": torch.zeros_like(found), "users": torch.tensor([user])}
