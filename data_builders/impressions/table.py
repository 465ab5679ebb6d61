"""Impressions: one row for each candidate that a request showed, in columns, with what is known of it.

The contract that rankers, calibrators, fusion, reward models and denoisers read. A feature is stored once for its item, user or
request, and gathered for a batch; a history stands once for its request, and rows of one request share it. Labels are float32 with
NaN for unknown, which masks that task and never means 0. Own design.

    impressions = impressions_of(load_folder("runs/shop/data"), "train")
    for batch in impressions.batches(1024, seed=0):
        batch["numeric"], batch["categorical"], batch["label_click"]      # (B, F) float32, (B, C) int64, (B,) float32
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from sidtune.core.errors import DataError
from sidtune.core.ragged import Ragged, owners, side_by_side, stretches, taken
from sidtune.data_builders.impressions.features import SCOPES, Feature


@dataclass(frozen=True)
class Impressions:
    """N impressions of R requests, end to end.

    Attributes:
        request_ids, user_ids, item_ids: names of the requests, and of the users and items that rows count.
        user_row, time: (R,) int64; user −1 = unknown.
        offsets: (R + 1,) int64; request r has the impressions `offsets[r]:offsets[r + 1]`, in the order of the page.
        item_row: (N,) int64. position: (N,) int32, −1 = unknown. propensity: (N,) float32, NaN = unknown.
        labels: name → (N,) float32, NaN = unknown.
        features: what there is; their arrays, by name, in `columns`, laid out as `features.py` says.

    Raises:
        DataError: an array of another length than its scope, codes or rows out of range, infinite numbers.
    """

    request_ids: pa.Array
    user_ids: pa.Array
    item_ids: pa.Array
    user_row: np.ndarray
    time: np.ndarray
    offsets: np.ndarray
    item_row: np.ndarray
    position: np.ndarray
    propensity: np.ndarray
    labels: Mapping[str, np.ndarray]
    features: tuple[Feature, ...]
    columns: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = {"request": len(self.offsets) - 1, "impression": len(self.item_row)}
        sizes |= {"user": len(self.user_ids), "item": len(self.item_ids)}
        lengths = {"request_ids": "request", "user_row": "request", "time": "request", "position": "impression"}
        arrays = {name: (getattr(self, name), scope) for name, scope in {**lengths, "propensity": "impression"}.items()}
        arrays |= {f"labels['{name}']": (value, "impression") for name, value in self.labels.items()}
        arrays |= {f"columns['{one.name}']": (self.columns.get(one.name, ()), one.scope) for one in self.features}
        for name, (value, scope) in arrays.items():
            if len(value) != sizes[scope]:
                raise DataError(f"Impressions have {sizes[scope]} rows of {scope}s but {name} has {len(value)}.")
        rows = (("item_row", self.item_row, 0, "item"), ("user_row", self.user_row, -1, "user"))
        for name, value, least, scope in rows:
            if len(value) and (value.min() < least or value.max() >= sizes[scope]):
                raise DataError(
                    f"{name} of the impressions points outside the {sizes[scope]} {scope}s; check the table."
                )
        for one in self.features:
            _check(one, self.columns[one.name])

    def __len__(self) -> int:
        return len(self.item_row)

    @cached_property
    def request_row(self) -> np.ndarray:
        """(N,) request of each impression."""
        return owners(self.offsets)

    def of_kind(self, kind: str) -> tuple[Feature, ...]:
        """The features of a kind in the order of their columns in a batch: by scope, then as given."""
        found = [one for one in self.features if one.kind == kind]
        return tuple(sorted(found, key=lambda one: SCOPES.index(one.scope)))

    def take(self, requests: np.ndarray) -> Impressions:
        """Chosen requests, in their order, with all of their impressions."""
        places, offsets = taken(self.offsets, requests)
        kept = {"impression": places, "request": requests}
        columns = {
            one.name: _rows(self.columns[one.name], kept[one.scope]) if one.scope in kept else self.columns[one.name]
            for one in self.features
        }
        return replace(
            self,
            request_ids=self.request_ids.take(pa.array(requests)),
            **{name: getattr(self, name)[requests] for name in ("user_row", "time")},
            **{name: getattr(self, name)[places] for name in ("item_row", "position", "propensity")},
            offsets=offsets,
            labels={name: value[places] for name, value in self.labels.items()},
            columns=columns,
        )

    def batches(self, size: int, seed: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """All impressions in batches, the last one maybe smaller; shuffled by `seed`, None keeps the order."""
        order = np.arange(len(self)) if seed is None else np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Impressions `rows` (B,) as arrays.

        Returns:
            `item_row`, `user_row`, `request` (place among the batch's own U requests), `position`, `propensity`: (B,);
            `numeric` (B, F) float32, 0 where unknown, and `numeric_mask` (B, F); `categorical` (B, C) int64 codes + 1, 0 where
            unknown, columns as in `of_kind`; `label_<name>` (B,) float32, 0 where unknown, and `label_<name>_mask`. By name:
            vectors (B, size) and SIDs (B, levels), each with `<name>_mask` (B,); lists `<name>` and `<name>_mask`, of requests
            (U, width), which `request` points into, of others (B, width). Texts stay in `columns`.
        """
        rows = np.asarray(rows, np.int64)
        asked, own = np.unique(self.request_row[rows], return_inverse=True)
        own = own.reshape(-1)
        user = self.user_row[self.request_row[rows]]
        at = {"impression": rows, "request": self.request_row[rows], "user": user, "item": self.item_row[rows]}
        made: dict[str, np.ndarray] = {"item_row": at["item"], "user_row": user, "request": own}
        made |= {"position": self.position[rows], "propensity": self.propensity[rows]}
        numbers = self._stacked("numeric", at, np.float32, np.nan)
        made["numeric_mask"] = known = ~np.isnan(numbers)
        made["numeric"] = np.where(known, numbers, np.float32(0))
        made["categorical"] = self._stacked("categorical", at, np.int64, -1) + 1
        for name, value in self.labels.items():
            label = value[rows]
            made[f"label_{name}_mask"] = mask = ~np.isnan(label)
            made[f"label_{name}"] = np.where(mask, label, np.float32(0))
        for one in self.features:
            places, column = at[one.scope], self.columns[one.name]
            if one.kind in ("vector", "sid"):
                made[one.name], made[f"{one.name}_mask"] = _wide(one, column, places)
            elif one.kind in ("sequence", "multi_categorical"):
                places = asked if one.scope == "request" else places
                made[one.name], made[f"{one.name}_mask"] = _listed(column, places, one.most)
        return made

    def _stacked(self, kind: str, at: dict[str, np.ndarray], dtype: Any, missing: Any) -> np.ndarray:
        """(B, F) columns of all features of a kind; `missing` where a row is −1."""
        parts = []
        for scope, table in self._stacks[kind].items():
            places = at[scope]
            part = table[places]
            if scope == "user" and len(places) and places.min() < 0:
                part[places < 0] = missing
            parts.append(part)
        return np.concatenate(parts, axis=1) if parts else np.zeros((len(at["item"]), 0), dtype)

    @cached_property
    def _stacks(self) -> dict[str, dict[str, np.ndarray]]:
        """Kind → scope → (n, F) of all numeric or categorical features of the scope, so that a batch gathers once."""
        made: dict[str, dict[str, np.ndarray]] = {}
        for kind, dtype in (("numeric", np.float32), ("categorical", np.int64)):
            by_scope = {
                scope: [self.columns[f.name] for f in self.of_kind(kind) if f.scope == scope] for scope in SCOPES
            }
            made[kind] = {scope: np.stack(found, axis=1).astype(dtype) for scope, found in by_scope.items() if found}
        return made


def _check(one: Feature, column: Any) -> None:
    values = column.rows if isinstance(column, Ragged) else column
    ragged, text = one.kind in ("sequence", "multi_categorical"), one.kind == "text"
    if ragged != isinstance(column, Ragged) or text != isinstance(column, pa.Array):
        raise DataError(f"The column '{one.name}' is a {type(column).__name__}, which no {one.kind} feature is.")
    wanted = {"vector": (one.size,), "sid": (len(one.levels),)}.get(one.kind, ())
    if not text and values.shape[1:] != wanted:
        raise DataError(f"The column '{one.name}' must have rows of shape {wanted}, got {values.shape[1:]}.")
    if one.kind in ("numeric", "vector") and np.isinf(values).any():
        raise DataError(f"The column '{one.name}' holds infinite values; repair them, or NaN for unknown ones.")
    if one.kind in ("categorical", "multi_categorical", "sequence", "sid") and len(values):
        most = np.array(one.levels or (one.size,))
        if int(values.min()) < (-1 if one.kind in ("categorical", "sid") else 0) or bool((values >= most).any()):
            raise DataError(f"The column '{one.name}' holds codes outside its {most.tolist()} values; check the table.")


def _rows(column: Any, rows: np.ndarray) -> Any:
    if isinstance(column, Ragged):
        places, offsets = taken(column.offsets, rows)
        return Ragged(offsets, column.rows[places])
    return column.take(pa.array(rows)) if isinstance(column, pa.Array) else column[rows]


def _wide(one: Feature, column: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of vectors or SIDs, zeros where unknown, and which are known."""
    found = column[np.maximum(places, 0)]
    bad = np.isnan(found) if one.kind == "vector" else found < 0
    known = (places >= 0) & ~bad.any(axis=1)
    return np.where(known[:, None], found, found.dtype.type(0)), known


def _listed(column: Ragged, places: np.ndarray, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(n, width) elements, 0 at padding, and the mask; the list of row −1 is empty."""
    if len(places) and places.min() < 0:
        start = np.where(places < 0, 0, column.offsets[np.maximum(places, 0)])
        stop = np.where(places < 0, 0, column.offsets[places + 1])
        offsets, at = stretches(start, stop)
        column, places = Ragged(offsets, column.rows[at]), np.arange(len(places))
    at, mask = side_by_side(column.offsets, places, most)
    return (column.rows[at] if len(column.rows) else np.zeros(at.shape, np.int64)) * mask, mask
