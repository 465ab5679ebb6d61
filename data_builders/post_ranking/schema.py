"""Post-ranking data: candidate lists with features, as one request at a time or as a table with one matrix per field.

Own design, after the data section of the LLM4PR notes (arXiv 2411.01178 states only what the features are). A request
holds a query, a user, the ranking stage's list in its incoming order, and a history. At scale vectors do not stand in
the rows: rows hold numbers into matrices, and `PostRankTable.batch` gathers what a batch needs. The LLM and every
baseline read the same `PostRankBatch`.

Matrices are float32 and keyed `"{scope}/{field}"`:

| scope | one row for each | field's side, dynamic |
|---|---|---|
| `query` (the key is just `query`) | distinct query vector, named by `query_row` | – |
| `user` | user, named by `user_row` | user, no |
| `request` | request | user, yes |
| `item` | item, named by `item_row` of candidates and history | item, no |
| `candidate`, `history` | candidate, history item, end to end over all requests | item, yes |

A *dynamic* field changes with time (the user's mean rating so far), so it is stored for each request and never read
from the future. A row with any NaN means "missing": the batch holds zeros there and False in its `present` mask. A
categorical field is one-hot or multi-hot (`dim` = number of values, all zeros = none of them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.ragged import offsets_of, owners, side_by_side
from sidtune.data_builders.post_ranking.columns import REQUEST_SCHEMA

KINDS = ("id_embedding", "categorical", "numeric", "text_vector", "sid")
SIDES = ("user", "item")


@dataclass(frozen=True)
class PostRankField:
    """One feature field.

    Attributes:
        name: unique within its side.
        kind: `id_embedding`, `categorical`, `numeric`, `text_vector` or `sid`.
        side: `user` or `item` (candidates and history share the item fields).
        dim: columns of its matrix.
        labels: names of the columns (`dim` many: the values of a categorical field, the statistics of a numeric one),
            or empty. Fields with labels can be written out as text.
        dynamic: stored per request instead of per user or item.
        sources: fingerprints of the semantic IDs that it holds and of those they extend; empty for other values.

    Raises:
        ConfigError: an unknown kind or side, or labels that do not fit.
    """

    name: str
    kind: str
    side: str
    dim: int
    labels: tuple[str, ...] = ()
    dynamic: bool = False
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, value, known in (("kind", self.kind, KINDS), ("side", self.side, SIDES)):
            if value not in known:
                told = f"The post-ranking field '{self.name}' has the {what} '{value}', which is unknown"
                raise ConfigError(f"{told}: {nearest(value, known)}")
        if self.dim < 1:
            raise ConfigError(f"The post-ranking field '{self.name}' must have at least one column, got {self.dim}.")
        if self.labels and len(self.labels) != self.dim:
            raise ConfigError(
                f"The post-ranking field '{self.name}' has {self.dim} columns but {len(self.labels)} labels; give one "
                "for each column or none."
            )

    @property
    def scopes(self) -> tuple[str, ...]:
        """Scopes of the matrices that hold it."""
        if self.side == "user":
            return ("request",) if self.dynamic else ("user",)
        return ("candidate", "history") if self.dynamic else ("item",)


@dataclass(frozen=True)
class PostRankRequest:
    """One request with its features in place; for single predictions and own data.

    Attributes:
        request_id: its name.
        query, query_vector: the text (None = recommendation) and its (d_q,) float32 vector (None = no vector).
        user: field → (d,) array, or None for a missing field.
        candidates: field → (d,) array or None, for each candidate in incoming order.
        item_ids: ids of the candidates.
        relevance: (n,) float32, NaN = unknown.
        history: field → array or None for each history item, oldest first.
        user_text, item_texts: (name, value) pairs of what can be said in words, for the user and for each candidate.
        init_scores: (n,) float32 scores of the ranking stage, NaN = unknown.
        history_texts: as `item_texts`, for the history.
        sources: `"{side}/{field}"` → `PostRankField.sources`, where known.
    """

    request_id: str
    query: str | None
    query_vector: np.ndarray | None
    user: Mapping[str, np.ndarray | None]
    candidates: Sequence[Mapping[str, np.ndarray | None]]
    item_ids: Sequence[str]
    relevance: np.ndarray
    history: Sequence[Mapping[str, np.ndarray | None]] = ()
    user_text: Sequence[tuple[str, str]] = ()
    item_texts: Sequence[Sequence[tuple[str, str]]] = ()
    init_scores: np.ndarray | None = None
    history_texts: Sequence[Sequence[tuple[str, str]]] = ()
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PostRankBatch:
    """Padded arrays of B requests with at most n candidates and h history items; pads are zeros (rows −1).

    Attributes:
        rows (B,): row of each request in its table.
        query (B, d_q) float32, query_present (B,) bool.
        user_fields: name → (B, d_j) float32. user_present: name → (B,) bool, False where missing.
        item_fields: name → (B, n, d_j). item_present: name → (B, n) bool. item_mask (B, n) bool: a real candidate.
        item_rows (B, n) int64: item row, −1 = pad.
        init_rank (B, n) int64: incoming position from 0. init_score (B, n) float32, NaN = unknown.
        relevance (B, n) float32, NaN = unknown or pad.
        history_fields, history_present, history_mask, history_rows: the same of the history, oldest first.
    """

    rows: Any
    query: Any
    query_present: Any
    user_fields: dict[str, Any]
    user_present: dict[str, Any]
    item_fields: dict[str, Any]
    item_present: dict[str, Any]
    item_mask: Any
    item_rows: Any
    init_rank: Any
    init_score: Any
    relevance: Any
    history_fields: dict[str, Any]
    history_present: dict[str, Any]
    history_mask: Any
    history_rows: Any

    def map(self, function: Callable[[Any], Any]) -> PostRankBatch:
        """Applies a function such as `torch.from_numpy` or `lambda t: t.to(device)` to every array."""
        changed = {
            name: {key: function(one) for key, one in value.items()} if isinstance(value, dict) else function(value)
            for name, value in vars(self).items()
        }
        return PostRankBatch(**changed)

    def reordered(self, order: np.ndarray) -> PostRankBatch:
        """The same requests with candidates in another incoming order (NumPy batches).

        Args:
            order: (B, n) a permutation of each row that keeps pads at the end; place k gets candidate `order[:, k]`.

        Returns:
            A batch whose `init_rank` counts the new places; scores and labels travel with their items.
        """
        order = np.asarray(order)
        if order.shape != self.item_mask.shape or (np.sort(order, axis=1) != np.arange(order.shape[1])).any():
            raise DataError("An order must be a permutation of the candidates for each request; check its shape.")
        if (np.take_along_axis(self.item_mask, order, axis=1) != self.item_mask).any():
            raise DataError("An order must keep the pads of a batch at the end of each list.")

        def moved(value: np.ndarray) -> np.ndarray:
            return np.take_along_axis(value, order[..., None] if value.ndim == 3 else order, axis=1)

        return replace(
            self,
            **{n: {k: moved(v) for k, v in getattr(self, n).items()} for n in ("item_fields", "item_present")},
            **{name: moved(getattr(self, name)) for name in ("item_rows", "init_score", "relevance")},
        )


@dataclass(frozen=True)
class PostRankTable:
    """Requests as rows, features as matrices; layout in the module's docstring.

    Attributes:
        requests: columns of `REQUEST_SCHEMA`; `query_row` and `user_row` may be null. Candidates in incoming order.
        item_ids: (I,) ids of the item rows. user_ids: (U,) ids of the user rows.
        fields: the feature fields.
        matrices: `"query"` and `"{scope}/{field}"` → (rows, dim) float32.
        item_texts, user_texts: row → (name, value) pairs beside what the fields say (a title), or empty.
        notes: facts about the source, in full sentences.

    Raises:
        DataError: a matrix is missing, has a wrong shape or holds an infinity, or a row number is out of range.
    """

    requests: pa.Table
    item_ids: Sequence[str]
    user_ids: Sequence[str]
    fields: tuple[PostRankField, ...]
    matrices: dict[str, np.ndarray]
    item_texts: Sequence[Sequence[tuple[str, str]]] = ()
    user_texts: Sequence[Sequence[tuple[str, str]]] = ()
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.requests.schema.equals(REQUEST_SCHEMA):
            raise DataError("The post-ranking requests have not the columns of REQUEST_SCHEMA; cast them to it.")
        keys = [(one.side, one.name) for one in self.fields]
        if len(set(keys)) < len(keys):
            raise DataError("Two post-ranking fields of one side have the same name; rename one of them.")
        self._check_matrices()
        self._check_rows()

    def __len__(self) -> int:
        return self.requests.num_rows

    def fields_of(self, side: str) -> tuple[PostRankField, ...]:
        """The fields of one side, in order."""
        return tuple(one for one in self.fields if one.side == side)

    @property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """`"{side}/{field}"` → fingerprints, of the fields that hold semantic IDs."""
        return {f"{one.side}/{one.name}": one.sources for one in self.fields if one.sources}

    def rows_of(self, split: str) -> np.ndarray:
        """(n,) rows of the requests of a split, in order."""
        return np.flatnonzero(pc.equal(self.requests["split"], split).fill_null(False))

    @cached_property
    def candidate_offsets(self) -> np.ndarray:
        """(R + 1,) where each request's candidates begin, end to end."""
        return _offsets(self.requests["candidates"])

    @cached_property
    def history_offsets(self) -> np.ndarray:
        """(R + 1,) where each request's history begins, end to end."""
        return _offsets(self.requests["history"])

    @cached_property
    def candidate_rows(self) -> np.ndarray:
        """(total,) item row of each candidate."""
        return _flat(self.requests["candidates"]).field("item_row").to_numpy(zero_copy_only=False).astype(np.int64)

    @cached_property
    def init_scores(self) -> np.ndarray:
        """(total,) float32 score of the ranking stage, NaN = unknown."""
        return _floats(_flat(self.requests["candidates"]).field("init_score"))

    @cached_property
    def relevance(self) -> np.ndarray:
        """(total,) float32 relevance of each candidate, NaN = unknown."""
        return _floats(_flat(self.requests["candidates"]).field("relevance"))

    @cached_property
    def history_rows(self) -> np.ndarray:
        """(total,) item row of each history item."""
        return _flat(self.requests["history"]).to_numpy(zero_copy_only=False).astype(np.int64)

    @cached_property
    def query_rows(self) -> np.ndarray:
        """(R,) row of the query matrix, −1 = no vector."""
        return self.requests["query_row"].fill_null(-1).to_numpy()

    @cached_property
    def user_rows(self) -> np.ndarray:
        """(R,) user row, −1 = no user."""
        return self.requests["user_row"].fill_null(-1).to_numpy()

    @property
    def d_q(self) -> int:
        """Width of the query vector."""
        return self.matrices["query"].shape[1]

    def batch(self, rows: Sequence[int] | np.ndarray, max_history: int | None = None) -> PostRankBatch:
        """Gathers requests into padded arrays.

        Args:
            rows: request rows, at least one. max_history: keep only the latest so many history items.

        Raises:
            DataError: no rows, or a row out of range.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1 or not len(rows) or rows.min() < 0 or rows.max() >= len(self):
            raise DataError(f"A batch needs request rows in [0, {len(self)}), got {rows!r:.80}.")
        at, mask = side_by_side(self.candidate_offsets, rows)
        h_at, h_mask = side_by_side(self.history_offsets, rows, max_history)
        items = np.where(mask, _take(self.candidate_rows, at), -1)
        past = np.where(h_mask, _take(self.history_rows, h_at), -1)
        query, query_present = self._gather("query", self.query_rows[rows])
        user_fields, user_present, item_fields, item_present = {}, {}, {}, {}
        past_fields, past_present = {}, {}
        users = self.user_rows[rows]
        for one in self.fields_of("user"):
            key = f"{one.scopes[0]}/{one.name}"
            user_fields[one.name], user_present[one.name] = self._gather(key, rows if one.dynamic else users)
        for one in self.fields_of("item"):
            own, before = (np.where(mask, at, -1), np.where(h_mask, h_at, -1)) if one.dynamic else (items, past)
            item_fields[one.name], item_present[one.name] = self._gather(f"{one.scopes[0]}/{one.name}", own)
            past_fields[one.name], past_present[one.name] = self._gather(f"{one.scopes[-1]}/{one.name}", before)
        nan = np.float32(np.nan)
        return PostRankBatch(
            rows, query, query_present, user_fields, user_present, item_fields, item_present, mask, items,
            np.broadcast_to(np.arange(mask.shape[1]), mask.shape).copy(),
            np.where(mask, _take(self.init_scores, at), nan), np.where(mask, _take(self.relevance, at), nan),
            past_fields, past_present, h_mask, past,
        )  # fmt: skip

    def _gather(self, key: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a matrix, zeros where a row is −1 or missing; and which are present."""
        matrix = self.matrices[key]
        if not len(matrix):
            return np.zeros((*rows.shape, matrix.shape[1]), np.float32), np.zeros(rows.shape, bool)
        taken = np.asarray(matrix[np.maximum(rows, 0)], dtype=np.float32)
        present = (rows >= 0) & ~np.isnan(taken).any(axis=-1)
        return np.where(present[..., None], taken, np.float32(0)), present

    def statistics(self, rows: np.ndarray) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """(side, name) → (mean, standard deviation), (dim,) each, of the numeric fields as the given requests see them
        (candidates only; missing rows left out; a deviation of 0 becomes 1). Pass training rows only."""
        made = {}
        for one in self.fields:
            if one.kind != "numeric":
                continue
            if one.side == "user":
                at = rows if one.dynamic else self.user_rows[rows]
            else:
                owner, mask = side_by_side(self.candidate_offsets, np.asarray(rows))
                at = owner[mask] if one.dynamic else self.candidate_rows[owner[mask]]
            values, present = self._gather(f"{one.scopes[0]}/{one.name}", at)
            values = values[present] if present.any() else np.zeros((1, one.dim), np.float32)
            spread = values.std(axis=0)
            made[one.side, one.name] = values.mean(axis=0), np.where(spread > 0, spread, 1.0).astype(np.float32)
        return made

    def _check_matrices(self) -> None:
        counts = {
            "user": len(self.user_ids),
            "item": len(self.item_ids),
            "request": len(self),
            "candidate": int(self.candidate_offsets[-1]),
            "history": int(self.history_offsets[-1]),
        }
        wanted = {f"{scope}/{one.name}": (counts[scope], one.dim) for one in self.fields for scope in one.scopes}
        if "query" not in self.matrices or self.matrices["query"].ndim != 2:
            raise DataError("The post-ranking table has no (queries, d_q) matrix 'query'; give one (it may be empty).")
        for key, shape in wanted.items():
            found = self.matrices[key].shape if key in self.matrices else None
            if found != shape:
                raise DataError(f"The post-ranking matrix '{key}' must have shape {shape}, got {found}.")
        numbers = {f"matrix '{key}'": value for key, value in self.matrices.items()}
        numbers |= {"relevance": self.relevance, "init_score": self.init_scores}
        for what, values in numbers.items():
            if np.isinf(values).any():
                raise DataError(f"The post-ranking {what} holds infinite values; repair them, or NaN for unknown ones.")
        for name, texts in (("item", self.item_texts), ("user", self.user_texts)):
            if len(texts) not in (0, counts[name]):
                found = f"There are {counts[name]} {name} rows but {len(texts)} {name} texts"
                raise DataError(f"{found}; give one each or none.")

    def _check_rows(self) -> None:
        if (np.diff(self.candidate_offsets) < 1).any():
            raise DataError("A post-ranking request has no candidates; leave such requests out.")
        for what, rows, low, count in (
            ("candidate", self.candidate_rows, 0, len(self.item_ids)),
            ("history item", self.history_rows, 0, len(self.item_ids)),
            ("user row", self.user_rows, -1, len(self.user_ids)),
            ("query row", self.query_rows, -1, len(self.matrices["query"])),
        ):
            if len(rows) and (rows.min() < low or rows.max() >= count):
                raise DataError(f"A {what} of the post-ranking table points outside its {count} rows; check the table.")
        pairs = owners(self.candidate_offsets) * (len(self.item_ids) + 1) + self.candidate_rows
        if len(np.unique(pairs)) < len(pairs):
            raise DataError("A post-ranking request names an item twice among its candidates; keep each item once.")


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten() if column.num_chunks else pa.array([], column.type.value_type)


def _offsets(column: pa.ChunkedArray) -> np.ndarray:
    lengths = column.combine_chunks().value_lengths().fill_null(0).to_numpy() if len(column) else np.zeros(0, int)
    return offsets_of(lengths)


def _floats(values: pa.Array) -> np.ndarray:
    return values.fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float32)


def _take(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    return values[at] if len(values) else np.zeros(at.shape, values.dtype)
