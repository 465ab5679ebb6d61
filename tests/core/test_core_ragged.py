"""Ragged arrays, padding and shared rows, against loops."""

import numpy as np
import pytest

from sidtune.core.ragged import Ragged, gathered, offsets_of, own_rows, owners, pad, side_by_side, taken


def lists_of(seed: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 99, draw.integers(0, 6)).tolist() for _ in range(draw.integers(0, 20))]


def ragged(lists: list[list[int]]) -> Ragged:
    return Ragged(offsets_of([len(one) for one in lists]), np.array([x for one in lists for x in one], np.int64))


@pytest.mark.parametrize("seed", range(20))
def test_lists_come_back(seed):
    lists = lists_of(seed)
    made = ragged(lists)
    assert made.offsets.dtype == np.int64 and [made[n].tolist() for n in range(len(made))] == lists
    assert made.lengths.tolist() == [len(one) for one in lists]
    assert owners(made.offsets).tolist() == [n for n, one in enumerate(lists) for _ in one]
    with pytest.raises(IndexError):
        _ = made[len(lists)]
    if lists:
        assert made[-1].tolist() == lists[-1]


@pytest.mark.parametrize("seed", range(20))
def test_chosen_lists_keep_their_order_and_may_stand_twice(seed):
    lists = lists_of(seed)
    made = ragged(lists)
    chosen = np.random.default_rng(seed).integers(0, max(1, len(lists)), 7 if lists else 0)
    places, offsets = taken(made.offsets, chosen)
    again = Ragged(offsets, made.rows[places])
    assert [one.tolist() for one in again] == [lists[n] for n in chosen.tolist()]
    for latest in (None, 0, 2):
        at, mask = side_by_side(made.offsets, chosen, latest)
        wanted = [
            lists[n] if latest is None else lists[n][len(lists[n]) - min(latest, len(lists[n])) :]
            for n in chosen.tolist()
        ]
        got = [[made.rows[a] for a, real in zip(*row, strict=True) if real] for row in zip(at, mask, strict=True)]
        assert got == wanted and not at[~mask].any() and mask.shape[1] == max(map(len, wanted), default=0)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("more", [0, 3])
def test_padding(left, more):
    rows = [[5, 6], [], [7, 8, 9]]
    width = 3 + more
    ids, mask = pad(rows, 1, left, width if more else None)
    for row, got, real in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        fill = [1] * (width - len(row))
        assert got == (fill + row if left else row + fill)
        ones, zeros = [1] * len(row), [0] * len(fill)
        assert real == (zeros + ones if left else ones + zeros)
    assert ids.dtype == mask.dtype == np.int64 and pad([], 0)[0].shape == (0, 0)


@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shared_rows_come_back_in_their_order(count, processes, monkeypatch):
    parts = [own_rows(count, process, processes) for process in range(processes)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    sent = [(rows, rows * 10.0, [f"row {row}" for row in rows]) for rows in parts]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, *sent[1:]])
    values, texts = gathered(*sent[0])
    assert values.tolist() == [row * 10.0 for row in range(count)] and texts == [f"row {row}" for row in range(count)]
