"""Batches for the two training steps of LLM4PR (arXiv 2411.01178): what one example is, and what is drawn for it.

*Feature adaptation*: one candidate with its user, query and rating. *Post-ranking*: one request, as the main task and, where
its candidates differ in relevance, as the auxiliary task too, so that every update uses both (Algorithm 1 of the paper).

Everything that is drawn (the order in which candidates are presented, the part of a long list, the two lists of the auxiliary
task) is a function of seed, epoch and example, so a resumed run meets what the uninterrupted one met. Ours, as the paper is
silent: a share of the examples presents its candidates in a random order; of a list longer than `max_candidates` a random
stretch is used; the two lists are random permutations of the presented candidates, drawn again while their NDCG over the whole
list is equal. The paper calls them random lists and says no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.data_builders.post_ranking.schema import PostRankBatch, PostRankTable
from sidtune.data_builders.post_ranking.targets import target_order
from sidtune.data_builders.post_ranking.text import request_of
from sidtune.models.post_ranking.config import FieldSpec
from sidtune.models.post_ranking.losses import IGNORE
from sidtune.models.post_ranking.processor import PostRankProcessor
from sidtune.trainers.common.batches import EpochSampler

STEPS = ("adaptation", "post_rank")
TIES = ("incoming", "random")
_DRAWS = 100
Pair = tuple[np.ndarray, np.ndarray, int]


def field_specs(table: PostRankTable, rows: Sequence[int] | np.ndarray) -> list[FieldSpec]:
    """The model's fields for a table, with statistics of the numeric ones from the requests `rows` (training only)."""
    known = table.statistics(np.asarray(rows, dtype=np.int64))
    made = []
    for one in table.fields:
        mean, std = known.get((one.side, one.name), (None, None))
        numbers = {} if mean is None else {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
        source = one.sources[0] if one.sources else None
        made.append(FieldSpec(one.name, one.kind, one.side, one.dim, source=source, **numbers))
    return made


def judged_rows(table: PostRankTable, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Those of `rows` whose candidates all have a known relevance."""
    unknown = np.concatenate([[0], np.cumsum(np.isnan(table.relevance))])
    rows = np.asarray(rows, dtype=np.int64)
    at = table.candidate_offsets
    return rows[unknown[at[rows + 1]] == unknown[at[rows]]]


def auxiliary_pair(relevance: np.ndarray, random: np.random.Generator) -> Pair | None:
    """Two permutations and the number (0 or 1) of the one with the higher NDCG over the whole list.

    Args:
        relevance: (n,) known, from 0. The gain is 2^r − 1. random: draws the permutations.

    Returns:
        None where every order is worth the same.
    """
    gains = np.exp2(np.asarray(relevance, dtype=np.float64)) - 1
    if len(gains) < 2 or gains.max() == gains.min():
        return None
    discount = 1.0 / np.log2(np.arange(2, len(gains) + 2))
    # The ideal is shared, so comparing DCG is comparing NDCG. Equal gains in other places may differ by rounding.
    tolerance = 1e-9 * float(np.sort(gains)[::-1] @ discount)
    for _ in range(_DRAWS):
        one, two = random.permutation(len(gains)), random.permutation(len(gains))
        better = float((gains[one] - gains[two]) @ discount)
        if abs(better) > tolerance:
            return one, two, int(better < 0)
    best = np.argsort(-gains, kind="stable")
    return best, best[::-1].copy(), 0


class PostRankExamples(Dataset):
    """Examples of one training step; `collate` makes the batches.

    Args:
        table: the requests. rows: those to use; requests with an unknown relevance are left out.
        processor: of the model; one with `words=True` trains the text-only prompt.
        step: `adaptation` or `post_rank`.
        aux: with the auxiliary task.
        shuffle: share of post-ranking examples whose candidates are presented in a random order.
        ties: of the main answer, `incoming` (equals as presented) or `random` (drawn anew in every epoch).
        max_candidates: most candidates presented at once, as in a window at inference.
        seed: of everything drawn.

    Raises:
        ConfigError: an unknown step, or a value out of range. DataError: no example is left.

    Attributes:
        left_out: requests left out because some relevance is unknown.
    """

    def __init__(
        self,
        table: PostRankTable,
        rows: Sequence[int] | np.ndarray,
        processor: PostRankProcessor,
        step: str = "post_rank",
        *,
        aux: bool = True,
        shuffle: float = 0.5,
        ties: str = "incoming",
        max_candidates: int = 20,
        seed: int = 0,
    ) -> None:
        if step not in STEPS:
            raise ConfigError(f"There is no post-ranking training step '{step}': {nearest(step, STEPS)}")
        labels = len(processor.config.label_token_ids)
        if not 0 <= shuffle <= 1 or not 2 <= max_candidates <= labels:
            raise ConfigError(
                f"Post-ranking examples need shuffle in [0, 1] and max_candidates from 2 to {labels} (the labels), got "
                f"{shuffle} and {max_candidates}."
            )
        if ties not in TIES:
            raise ConfigError(f"Ties of the main answer cannot be '{ties}': {nearest(ties, TIES)}")
        if step == "adaptation" and processor.words:
            raise ConfigError(
                "Feature adaptation trains soft tokens, which a prompt in words has none of; leave it out."
            )
        processor.config.check_sources(table.sources)
        self.table, self.processor, self.step = table, processor, step
        self.aux, self.shuffle, self.ties, self.max_candidates, self.seed = aux, shuffle, ties, max_candidates, seed
        self.rows = judged_rows(table, rows)
        self.left_out = len(rows) - len(self.rows)
        if step == "adaptation":
            sizes = np.diff(table.candidate_offsets)[self.rows]
            self._owner = np.repeat(self.rows, sizes)
            self._place = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        if not len(self):
            raise DataError(
                f"No post-ranking example is left of {len(rows)} requests: each needs a known relevance for all of its "
                "candidates; check the split and the labels."
            )
        self._queries = table.requests["query"].to_pylist()

    def __len__(self) -> int:
        return len(self._owner) if self.step == "adaptation" else len(self.rows)

    def __getitem__(self, number: int) -> tuple[PostRankExamples, int]:
        return self, int(number)

    def collate(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Inputs of the model for examples `epoch * len(self) + place`."""
        places = np.asarray(numbers, dtype=np.int64) % len(self)
        if self.step == "adaptation":
            requests = [request_of(self.table, int(row), 0) for row in self._owner[places]]
            orders = [[int(place)] for place in self._place[places]]
            return self.processor.from_requests(requests, "fa", orders=orders)
        batch = self.table.batch(self.rows[places], self.processor.max_history)
        draws = [np.random.default_rng([self.seed, int(number)]) for number in numbers]
        counts = batch.item_mask.sum(axis=1)
        orders = [self._order(int(count), random) for count, random in zip(counts, draws, strict=True)]
        shown = [batch.relevance[row][order] for row, order in enumerate(orders)]
        pairs: list[Pair | None] = [None] * len(orders)
        if self.aux:
            pairs = [auxiliary_pair(value, random) for value, random in zip(shown, draws, strict=True)]
        targets = [
            target_order(value, ties=self.ties, seed=int(random.integers(1 << 31)))
            for value, random in zip(shown, draws, strict=True)
        ]
        make = self._words if self.processor.words else self._soft
        return make(batch, orders, targets, pairs)

    def _order(self, count: int, random: np.random.Generator) -> np.ndarray:
        """The candidates to present, in order."""
        order = random.permutation(count) if random.random() < self.shuffle else np.arange(count)
        if count <= self.max_candidates:
            return order
        start = int(random.integers(0, count - self.max_candidates + 1))
        kept = (order >= start) & (order < start + self.max_candidates)
        return order[kept]

    def _soft(
        self, batch: PostRankBatch, orders: list[np.ndarray], targets: list[np.ndarray], pairs: list[Pair | None]
    ) -> dict[str, Any]:
        batch = presented_batch(batch, orders)
        queries = [self._queries[row] for row in batch.rows]
        made = [self.processor.from_batch(batch, queries, targets=targets)]
        with_pair = np.array([pair is not None for pair in pairs])
        if with_pair.any():
            some = batch.map(lambda value: value[with_pair])
            asked = [self._queries[row] for row in some.rows]
            chosen = [pair for pair in pairs if pair is not None]
            made.append(self.processor.from_batch(some, asked, "aux", pairs=chosen))
        return joined(made, self.processor.config.end_token_id)

    def _words(
        self, batch: PostRankBatch, orders: list[np.ndarray], targets: list[np.ndarray], pairs: list[Pair | None]
    ) -> dict[str, Any]:
        requests = [request_of(self.table, int(row), self.processor.max_history) for row in batch.rows]
        made = [self.processor.from_requests(requests, orders=orders, targets=targets)]
        kept = [place for place, pair in enumerate(pairs) if pair is not None]
        if kept:
            asked, shown, chosen = ([values[place] for place in kept] for values in (requests, orders, pairs))
            made.append(self.processor.from_requests(asked, "aux", orders=shown, pairs=chosen))
        return joined(made, self.processor.config.end_token_id)


class ExampleSampler(EpochSampler):
    """The order of an epoch (`EpochSampler`) as `epoch * n + example`, so that draws may differ between epochs."""

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self)
        return (first + int(number) for number in super().__iter__())


def collate(samples: Sequence[tuple[PostRankExamples, int]]) -> dict[str, Any]:
    """Collator for transformers' Trainer; the samples say how."""
    return samples[0][0].collate([number for _, number in samples])


def presented_batch(batch: PostRankBatch, orders: Sequence[np.ndarray]) -> PostRankBatch:
    """The batch with the given candidates only, in the given order.

    Args:
        orders: for each request, distinct numbers of its candidates, at least one.
    """
    width = max(map(len, orders))
    full = np.empty(batch.item_mask.shape, dtype=np.int64)
    mask = np.zeros((len(orders), width), dtype=bool)
    for row, order in enumerate(orders):
        rest = np.setdiff1d(np.arange(full.shape[1]), order)
        full[row] = np.concatenate([order, rest])
        mask[row, : len(order)] = True
    moved = batch.reordered(full)

    def cut(value: Any) -> Any:
        return {name: one[:, :width] for name, one in value.items()} if isinstance(value, dict) else value[:, :width]

    names = ("item_fields", "item_present", "item_rows", "init_rank", "init_score", "relevance")
    return replace(moved, item_mask=mask, **{name: cut(getattr(moved, name)) for name in names})


def joined(parts: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Several left-padded inputs as one batch, rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    width = max(part["input_ids"].shape[1] for part in parts)
    fills = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE}

    def wide(value: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(value, (width - value.shape[1], 0), value=fill)

    made: dict[str, Any] = {}
    for key, value in parts[0].items():
        each = [part[key] for part in parts]
        if key in fills:
            each = [wide(one, fills[key]) for one in each]
        if value is None:
            made[key] = None
        elif isinstance(value, dict):
            made[key] = {name: torch.cat([one[name] for one in each]) for name in value}
        else:
            made[key] = torch.cat(each)
    return made
