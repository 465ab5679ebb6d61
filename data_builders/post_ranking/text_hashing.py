"""Text vectors without a model: hashed bags of words. The offline default where a real encoder is a change of one line.

The hashing trick (Weinberger et al. 2009) with CRC-32: each word adds ±1 to one of `width` columns, rows have length 1.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+")


def hashed_bag(texts: Sequence[str | None], width: int) -> np.ndarray:
    """(n, width) float32, the same on every machine; a text without words is a row of zeros, null a row of NaN."""
    out = np.zeros((len(texts), width), dtype=np.float32)
    for row, text in enumerate(texts):
        if text is None:
            out[row] = np.nan
            continue
        codes = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())], dtype=np.int64)
        if len(codes):
            np.add.at(out[row], (codes >> 1) % width, np.where(codes & 1, 1.0, -1.0))
            out[row] /= max(float(np.linalg.norm(out[row])), 1e-12)
    return out
