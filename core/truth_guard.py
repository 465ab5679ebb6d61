"""No truth while training: inside `no_truth()` a simulated shop refuses to say what only it can know. Sheet `specs/market.md` 7.

Every `train()` of our trainers runs inside it, so a callback, a reward or a sampler that asks the shop for an exact chance ends
the training with a sentence. What a production system knows too (scores, pages, propensities) can be asked as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sidtune.core.errors import DataError

_depth = 0  # of the process and not of a thread: a loader's thread trains too


@contextmanager
def no_truth() -> Iterator[None]:
    """Until the end of the block `check_truth` raises."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def check_truth() -> None:
    """Raises DataError inside `no_truth()`."""
    if _depth:
        raise DataError(
            "A training asked the simulated shop for its truth, which no real shop could tell; use the log, scores or "
            "propensities, or look at the truth after the training."
        )
