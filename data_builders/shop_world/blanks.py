"""What sellers leave out: values missing from an item's record and from its texts. Own design; sheet `specs/market.md` 3.9.

Each of `BLANKABLE` is left out of each item with probability λ_a (`missing_attributes`), by a coin of its own. The item
keeps the value: feedback depends on it as before, so what is lost is what a reader of the record can know.
"""

from __future__ import annotations

import re

import numpy as np

from sidtune.data_builders.shop_world.catalogue import stream
from sidtune.data_builders.shop_world.config import ShopWorldConfig

BLANKABLE = ("colour", "style", "material", "brand")
BLANK = "\u2423"  # stands for a value left out until the sentence is tidied
# The words that lead up to a value go with it ("by", "in", ...); then brackets, blanks and commas left alone.
_TIDY = (
    (
        re.compile(
            rf"(?:\b(?:made of|it comes in|the (?:colour is|material)|with a|by|in|from|and|-) )?{BLANK}(?: look)?",
            re.I,
        ),
        "",
    ),
    (re.compile(r"\(\s*\)"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r" (?=[,.:])"), ""),
    (re.compile(r"^[\s,:-]+|[\s,:-]+$|(?:,\s*)+(?=[,.])"), ""),
)


def left_out(config: ShopWorldConfig) -> np.ndarray:
    """(N, 4) bool: which of `BLANKABLE` each item's record lacks; all False at dial 0."""
    share = config.dials.missing_attributes
    if not share:
        return np.zeros((config.n_items, len(BLANKABLE)), dtype=bool)
    return stream(config, "market-blanks").random((config.n_items, len(BLANKABLE))) < share


def tidied(text: str) -> str:
    """A title or sentence without its blanks.

    >>> tidied(f"Made of {BLANK}, it comes in red, size M.")
    'It comes in red, size M.'
    """
    for pattern, put in _TIDY:
        text = pattern.sub(put, text)
    return text[:1].upper() + text[1:]
