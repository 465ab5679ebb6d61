"""Fits a re-ranking baseline on a `PostRankTable` and ranks with it: one small loop for all of them.

Own loop (AdamW, early stopping on the valid requests' NDCG with linear gain over the whole list); transformers' `Trainer`
would bring nothing to models of a few thousand weights. Seeded: equal seeds give equal orders on one machine.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sidtune.benchmarks.rivals.registry import RERANKERS
from sidtune.benchmarks.rivals.rerankers.features import RerankerFeatures
from sidtune.benchmarks.rivals.rerankers.listwise import Reranker
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.finite import check_step, check_weights
from sidtune.data_builders.post_ranking.schema import PostRankTable
from sidtune.metrics.list_ranking import ListMetrics, evaluate_lists


@dataclass(frozen=True)
class RerankerConfig:
    """How a baseline is fitted.

    Attributes:
        epochs: most passes over the training requests. patience: epochs without a better valid NDCG before it stops.
        batch_size: requests per step. learning_rate, weight_decay: of AdamW.
        shuffle: share of training lists whose incoming order is shuffled, so that a model cannot just copy it.
        max_history: latest history items read.
        seed: weights, batches, shuffling.
        options: arguments of the model (`hidden`, `layers`, ...).

    Raises:
        ConfigError: a value out of range.
    """

    epochs: int = 20
    patience: int = 3
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    shuffle: float = 0.0
    max_history: int = 10
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.epochs, self.patience, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ConfigError(
                "Fitting a re-ranker needs epochs, patience, batch_size >= 1 and a learning rate above 0."
            )
        if not 0 <= self.shuffle <= 1 or self.max_history < 0 or self.weight_decay < 0:
            raise ConfigError(
                f"Fitting a re-ranker needs shuffle in [0, 1] and no negative max_history or weight_decay, got "
                f"{self.shuffle}, {self.max_history}, {self.weight_decay}."
            )


@dataclass(frozen=True)
class RerankerFit:
    """A fitted baseline.

    Attributes:
        model: with the weights of its best epoch.
        losses: mean training loss of each epoch. valid: valid NDCG of each epoch (empty without valid rows).
        best_epoch: number of the epoch that was kept, from 0.
    """

    model: Reranker
    losses: list[float]
    valid: list[float]
    best_epoch: int


def fit_reranker(
    name: str,
    table: PostRankTable,
    train_rows: Sequence[int] | np.ndarray,
    valid_rows: Sequence[int] | np.ndarray = (),
    config: RerankerConfig | None = None,
) -> RerankerFit:
    """Builds the re-ranker `name` of `benchmarks.rivals.registry.RERANKERS` and fits it.

    Args:
        name: its registered name. table: the requests.
        train_rows: fitted on; statistics come from these only. valid_rows: chosen on; empty = keep the last epoch.
        config: see `RerankerConfig`.

    Raises:
        ConfigError: an unknown name or option. DataError: no training rows, or the loss is not a number.
    """
    config = config or RerankerConfig()
    train = np.asarray(train_rows, dtype=np.int64)
    if not len(train):
        raise DataError("There are no training requests to fit a re-ranker on; check the split.")
    kind = RERANKERS.get(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        features = RerankerFeatures(table, train, kind.use_rank)
        try:
            model = kind(features, **config.options)
        except TypeError as error:
            raise ConfigError(f"The re-ranker '{name}' cannot take these options ({error}); check them.") from None
        return _fit(name, model, table, train, np.asarray(valid_rows, dtype=np.int64), config)


def _fit(
    name: str, model: Reranker, table: PostRankTable, train: np.ndarray, valid: np.ndarray, config: RerankerConfig
) -> RerankerFit:
    rng = np.random.default_rng(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    losses: list[float] = []
    scores: list[float] = []
    best, kept, epoch = -1, copy.deepcopy(model.state_dict()), 0
    for epoch in range(config.epochs):
        model.train()
        each = []
        for rows in _chunks(rng.permutation(train), config.batch_size):
            batch = table.batch(rows, config.max_history)
            if config.shuffle:
                batch = batch.reordered(_shuffled(batch.item_mask, rng, config.shuffle))
            loss = model.loss(batch.map(torch.from_numpy))
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            each.append(float(loss.detach()))
            check_step(each[-1], norm, f"re-ranker '{name}'", epoch * -(-len(train) // config.batch_size) + len(each))
            optimizer.step()
        losses.append(float(np.mean(each)))
        check_weights(model, f"the re-ranker '{name}' after epoch {epoch + 1}")
        if not len(valid):
            continue
        scores.append(valid_ndcg(model, table, valid, config.max_history))
        if best < 0 or scores[-1] > scores[best]:
            best, kept = epoch, copy.deepcopy(model.state_dict())
        elif epoch - best >= config.patience:
            break
    if len(valid):
        model.load_state_dict(kept)
    return RerankerFit(model.eval(), losses, scores, best if len(valid) else epoch)


def rank_table(
    model: Reranker,
    table: PostRankTable,
    rows: Sequence[int] | np.ndarray,
    batch_size: int = 512,
    max_history: int | None = 10,
) -> np.ndarray:
    """(R, widest list) candidate places of each request, best first, −1 after its last candidate."""
    rows = np.asarray(rows, dtype=np.int64)
    width = int(np.diff(table.candidate_offsets)[rows].max(initial=0))
    out = np.full((len(rows), width), -1, dtype=np.int64)
    model.eval()
    first = 0
    for part in _chunks(rows, batch_size):
        batch = table.batch(part, max_history)
        order = model.rank(batch.map(torch.from_numpy)).numpy()
        real = np.take_along_axis(batch.item_mask, order, axis=1)
        out[first : first + len(part), : order.shape[1]] = np.where(real, order, -1)
        first += len(part)
    return out


def valid_ndcg(model: Reranker, table: PostRankTable, rows: np.ndarray, max_history: int | None = 10) -> float:
    """Mean NDCG of the whole list, linear gain, over the requests whose candidates are all judged."""
    order = rank_table(model, table, rows, max_history=max_history)
    batch = table.batch(rows, 0)
    judged = ~(np.isnan(batch.relevance) & batch.item_mask).any(axis=1)
    if not judged.any():
        raise DataError("No valid request has a known relevance for all of its candidates; give other valid requests.")
    settings = ListMetrics((order.shape[1],), ("ndcg",), gain="linear")
    found = evaluate_lists(order[judged], batch.relevance[judged], batch.item_mask[judged], settings)
    return found.means()[f"ndcg@{order.shape[1]}"]


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def _shuffled(mask: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """An order for each list: shuffled for `share` of them, pads last."""
    key = np.where(rng.random(len(mask))[:, None] < share, rng.random(mask.shape), np.arange(mask.shape[1]) / 1e6)
    return np.argsort(np.where(mask, key, np.inf), axis=1, kind="stable")
