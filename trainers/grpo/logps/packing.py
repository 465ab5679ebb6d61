"""Lays completions that share a prompt out in packed rows: the prompt once, its completions behind it as branches.

    prompt p1 p2 p3 | a1 a2 | b1 b2 b3 | c1        positions 0 1 2 | 3 4 | 3 4 5 | 3

Every branch sees the prompt and its own past, no sibling, and its positions go on after the prompt, so the model computes
for each completion what it would compute for the plain row. The last token of a completion predicts nothing and is left
out; the first token of all completions of a prompt is predicted from the same position, the prompt's last.

Two refinements, both by cost and not by need. A group whose completions are long is cut into several rows, because the
masked part of attention grows with the square of the row (`branch_tokens`). Prompts of different lengths waste padding;
several short ones are put behind one another in a row as long as the longest (first fit, longest first).

No paper is involved. Indices are made with numpy on the host (a few thousand integers); the mask is made on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sidtune.core.errors import DataError


@dataclass(frozen=True)
class Batch:
    """The rows of one call on the host, checked.

    Attributes:
        prompt_start, prompt_length: (B,) where each prompt stands in its padded row, and its tokens.
        completion_length: (B,) tokens of each completion up to the last scored one; 0 when none is.
        scored: (B, C) bool, tokens whose log-probability is wanted.
        prompt_width, completion_width: P and C.
        groups: (B,) number of the prompt of each row, from 0 on.
    """

    prompt_start: np.ndarray
    prompt_length: np.ndarray
    completion_length: np.ndarray
    scored: np.ndarray
    prompt_width: int
    completion_width: int
    groups: np.ndarray

    @property
    def width(self) -> int:
        return self.prompt_width + self.completion_width


@dataclass(frozen=True)
class PackedRows:
    """One forward pass: R rows of T tokens, and which of their positions predict which completion tokens.

    Attributes:
        source: (R, T) index of each token in the flattened (B, P + C) batch of prompts and completions.
        positions: (R, T) position of each token in its own sequence.
        unit: (R, T) number of the packed prompt, from 1 on; 0 for padding.
        branch: (R, T) number of the completion, from 1 on; 0 for prompt tokens and padding.
        predicts_at: (N,) index into the flattened (R, T) of the position that predicts each scored token.
        target: (N,) index of each scored token in the flattened (B, C).
    """

    source: Tensor
    positions: Tensor
    unit: Tensor
    branch: Tensor
    predicts_at: Tensor
    target: Tensor

    def to(self, device: torch.device) -> PackedRows:
        return PackedRows(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

    def attention_mask(self) -> Tensor:
        """(R, 1, T, T) bool, True where the position of the third axis sees that of the fourth.

        Padding sees padding, so that no softmax is over nothing.
        """
        sees = self.positions[:, None, :] <= self.positions[:, :, None]
        sees &= self.unit[:, None, :] == self.unit[:, :, None]
        sees &= (self.branch[:, None, :] == 0) | (self.branch[:, None, :] == self.branch[:, :, None])
        return sees[:, None]


@dataclass(frozen=True)
class _Unit:
    """A prompt with some of its completions; `size` tokens in a packed row."""

    prompt: int
    rows: np.ndarray
    size: int


def read_batch(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    groups: Tensor | None = None,
    scored: Tensor | None = None,
) -> Batch:
    """Lengths and groups of the rows; tokens behind the last scored one are not read.

    Raises:
        DataError: shapes that do not fit, masks with gaps, an empty prompt, or one group with two prompts.
    """
    ids, seen = prompt_ids.detach().cpu().numpy(), prompt_mask.detach().cpu().numpy().astype(bool)
    answered = completion_mask.detach().cpu().numpy().astype(bool)
    if ids.ndim != 2 or seen.shape != ids.shape or answered.shape != tuple(completion_ids.shape):
        raise DataError(
            f"Prompts and completions must be (B, P) and (B, C) with masks of the same shapes, got {ids.shape}, "
            f"{seen.shape}, {tuple(completion_ids.shape)} and {answered.shape}."
        )
    if len(ids) != len(answered) or ids.size == 0 or answered.size == 0:
        raise DataError(f"There must be one completion per prompt row, got {len(answered)} for {len(ids)}.")
    length, start = seen.sum(axis=1), seen.argmax(axis=1)
    places = np.arange(ids.shape[1])
    if not length.all() or ((places >= start[:, None]) & (places < (start + length)[:, None]) != seen).any():
        raise DataError("Every prompt needs at least one token and its tokens side by side; pad it at one end.")
    answer_length = answered.sum(axis=1)
    if scored is not None and tuple(scored.shape) != answered.shape:
        raise DataError(f"scored must have the shape of the completions, {answered.shape}, got {tuple(scored.shape)}.")
    if (answered != (np.arange(answered.shape[1]) < answer_length[:, None])).any():
        raise DataError(
            "A completion mask must be ones and then zeros; leave tokens out of the loss by a mask of the loss, since "
            "a token inside a completion is read all the same."
        )
    wanted = answered if scored is None else answered & scored.detach().cpu().numpy().astype(bool)
    answer_length = np.where(wanted, np.arange(1, wanted.shape[1] + 1), 0).max(axis=1)
    compact = _at_the_left(ids, start, length)
    if groups is None:
        numbers = np.unique(compact, axis=0, return_inverse=True)[1].reshape(-1)
    else:
        numbers = _given_groups(groups, compact, length)
    return Batch(start, length, answer_length, wanted, ids.shape[1], answered.shape[1], numbers)


def _at_the_left(ids: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """(B, longest) tokens of each prompt from its first on, -1 behind its last."""
    places = np.arange(int(length.max()))
    taken = np.take_along_axis(ids, np.minimum(start[:, None] + places, ids.shape[1] - 1), axis=1)
    return np.where(places < length[:, None], taken, -1)


def _given_groups(groups: Tensor, compact: np.ndarray, length: np.ndarray) -> np.ndarray:
    given = groups.detach().cpu().numpy()
    if given.shape != length.shape:
        raise DataError(f"groups must hold one number per row, shape {length.shape}, got {given.shape}.")
    _, first, numbers = np.unique(given, return_index=True, return_inverse=True)
    numbers = numbers.reshape(-1)
    differing = np.flatnonzero((compact != compact[first][numbers]).any(axis=1))
    if len(differing):
        row = int(differing[0])
        raise DataError(
            f"Row {row} is in group {given[row]} with row {int(first[numbers[row]])} but has another prompt; rows of a "
            "group must share their prompt exactly."
        )
    return numbers


def branch_tokens(prompt: int, hidden_size: int) -> int:
    """Completion tokens worth packing behind one reading of a prompt of that many tokens.

    A layer costs about 24 h² operations per token and 4 h per pair of positions, so a pair costs 1/r of a token with
    r = 6 h. A row of prompt p and t branch tokens then costs p + t + (p + t)²/r, per branch token least at
    t = sqrt(p r + p²). With h = 256 that is 680 tokens behind a prompt of 256; with h = 1024, 1280.
    """
    return int((prompt * 6 * hidden_size + prompt**2) ** 0.5)


def pack(
    batch: Batch, hidden_size: int, max_length: int | None = None, max_tokens: int | None = None
) -> list[PackedRows]:
    """The passes for a batch, on the CPU. At least one, even if nothing is scored.

    Args:
        batch: what `read_batch` gave.
        hidden_size: width of the model, for `branch_tokens`.
        max_length: no row longer than this, unless one prompt with one completion is.
        max_tokens: no pass of more than this many tokens, padding included, unless one row has more.
    """
    limits = [limit for limit in (max_length, max_tokens) if limit is not None]
    units = _units(batch, lambda prompt: min([prompt + branch_tokens(prompt, hidden_size), *limits]))
    return _passes(batch, _first_fit(units), max_tokens)


def plain_rows(batch: Batch, max_tokens: int | None = None) -> list[PackedRows]:
    """The ordinary computation in the same form: one row per completion, its prompt in front, padding at the end."""
    scored = np.flatnonzero(batch.completion_length)
    scored = scored if len(scored) else np.zeros(1, dtype=np.int64)
    sizes = batch.prompt_length[scored] + np.maximum(batch.completion_length[scored] - 1, 0)
    units = [_Unit(int(row), np.array([row]), int(size)) for row, size in zip(scored, sizes, strict=True)]
    return _passes(batch, [[unit] for unit in units], max_tokens)


def _passes(batch: Batch, bins: list[list[_Unit]], max_tokens: int | None) -> list[PackedRows]:
    bins = sorted(bins, key=lambda row: -sum(unit.size for unit in row))
    passes, first = [], 0
    while first < len(bins):
        width = sum(unit.size for unit in bins[first])  # the longest of those that are left
        count = len(bins) if max_tokens is None else max(1, max_tokens // width)
        passes.append(_lay_out(batch, bins[first : first + count]))
        first += count
    return passes


def _units(batch: Batch, limit: Callable[[int], int]) -> list[_Unit]:
    """Prompts with as many of their completions as fit into `limit(prompt length)` tokens, longest first."""
    scored = np.flatnonzero(batch.completion_length)
    if not len(scored):
        scored = np.zeros(1, dtype=np.int64)
    added = np.maximum(batch.completion_length - 1, 0)
    ordered = scored[np.argsort(batch.groups[scored], kind="stable")]
    units = []
    for rows in np.split(ordered, np.flatnonzero(np.diff(batch.groups[ordered])) + 1):
        prompt = int(batch.prompt_length[rows[0]])
        room = max(1, limit(prompt) - prompt)
        pieces = min(len(rows), -(-int(added[rows].sum()) // room) or 1)
        for part in _balanced(rows, added[rows], pieces, room):
            units.append(_Unit(int(part[0]), part, prompt + int(added[part].sum())))
    return sorted(units, key=lambda unit: -unit.size)


def _balanced(rows: np.ndarray, sizes: np.ndarray, pieces: int, room: int) -> list[np.ndarray]:
    """Splits rows into at least `pieces` parts of about equal size, none above `room` unless one row alone is."""
    if pieces <= 1:
        return [rows]
    parts: list[list[int]] = [[] for _ in range(pieces)]
    filled = [0] * pieces
    for place in np.argsort(-sizes, kind="stable"):
        least = int(np.argmin(filled))
        if filled[least] and filled[least] + sizes[place] > room:
            parts.append([])
            filled.append(0)
            least = len(parts) - 1
        parts[least].append(int(rows[place]))
        filled[least] += int(sizes[place])
    return [np.array(sorted(part)) for part in parts if part]


def _first_fit(units: list[_Unit]) -> list[list[_Unit]]:
    """Rows of at most the longest unit's length; units come longest first."""
    capacity, bins, free = units[0].size, [], np.zeros(0, dtype=np.int64)
    for unit in units:
        fits = np.flatnonzero(free >= unit.size)
        if len(fits):
            bins[fits[0]].append(unit)
            free[fits[0]] -= unit.size
        else:
            bins.append([unit])
            free = np.append(free, capacity - unit.size)
    return bins


def _lay_out(batch: Batch, bins: list[list[_Unit]]) -> PackedRows:
    width = max(sum(unit.size for unit in row) for row in bins)
    units = [unit for row in bins for unit in row]
    starts = [r * width + sum(u.size for u in row[:n]) for r, row in enumerate(bins) for n in range(len(row))]
    prompt_rows = np.array([unit.prompt for unit in units])
    prompt_at, lengths = np.array(starts), batch.prompt_length[prompt_rows]
    rows = np.concatenate([unit.rows for unit in units])
    unit_of = np.repeat(np.arange(len(units)), [len(unit.rows) for unit in units])
    added = np.maximum(batch.completion_length[rows] - 1, 0)
    before = np.cumsum(added) - added
    first_of_unit = np.searchsorted(unit_of, np.arange(len(units)))
    branch_at = prompt_at[unit_of] + lengths[unit_of] + before - before[first_of_unit][unit_of]
    segments = np.concatenate([lengths, added])
    segment, within = _expand(segments)
    place = np.concatenate([prompt_at, branch_at])[segment] + within
    origin = np.concatenate(
        [prompt_rows * batch.width + batch.prompt_start[prompt_rows], rows * batch.width + batch.prompt_width]
    )
    tables = {
        "source": (origin[segment] + within, batch.width * prompt_rows[0] + batch.prompt_start[prompt_rows[0]]),
        "positions": (np.concatenate([np.zeros_like(lengths), lengths[unit_of]])[segment] + within, 0),
        "unit": (np.concatenate([np.arange(len(units)), unit_of])[segment] + 1, 0),
        "branch": (np.concatenate([np.zeros_like(lengths), np.arange(len(rows)) + 1])[segment], 0),
    }
    filled = {}
    for name, (values, padding) in tables.items():
        table = np.full(len(bins) * width, padding, dtype=np.int64)
        table[place] = values
        filled[name] = torch.from_numpy(table.reshape(len(bins), width))
    of, step = np.nonzero(batch.scored[rows])
    last_of_prompt = (prompt_at + lengths - 1)[unit_of]
    predicts_at = np.where(step == 0, last_of_prompt[of], branch_at[of] + step - 1)
    target = rows[of] * batch.completion_width + step
    return PackedRows(**filled, predicts_at=torch.from_numpy(predicts_at), target=torch.from_numpy(target))


def _expand(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of its run and place within it, for every element of runs of these lengths, one after another."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
