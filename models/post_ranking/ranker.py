"""Post-ranking in one line: `PostRanker.from_pretrained(folder).rank(requests)`.

Requests of any length go in, orders come out: batches, windows for lists longer than the labels or than a window, and
self-consistency over shuffled incoming lists (against position bias, an option that costs one ranking per shuffle). All of this
is our choice; LLM4PR (arXiv 2411.01178) only says that generated letters are mapped back to items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidtune.core.errors import ConfigError
from sidtune.data_builders.post_ranking.schema import PostRankRequest
from sidtune.models.post_ranking.model import PostRankForCausalLM
from sidtune.models.post_ranking.permutation import borda, rank_in_windows
from sidtune.models.post_ranking.processor import PostRankProcessor


@dataclass
class RankCounts:
    """What ranking cost and repaired.

    Attributes:
        prompts: prompts ranked (windows and shuffles count one each). prompt_tokens: tokens in them, without padding.
        invalid: prompts whose answer had to be repaired; unknown, repeated, missing: repaired labels, see `RankOutput`.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    invalid: int = 0
    unknown: int = 0
    repeated: int = 0
    missing: int = 0

    @property
    def valid_rate(self) -> float:
        """Share of answers that were permutations as they came; 1 under a constraint."""
        return 1.0 - self.invalid / self.prompts if self.prompts else 1.0


@dataclass
class PostRanker:
    """A model with its processor.

    Attributes:
        model: `PostRankForCausalLM`, or a PEFT model around it; move it to its device yourself.
        processor: of the model.
        batch_size: prompts at a time.
        counts: of the last call of `rank`.
    """

    model: Any
    processor: PostRankProcessor
    batch_size: int = 32
    counts: RankCounts = field(default_factory=RankCounts)

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, **options: Any) -> PostRanker:
        """Loads model and processor from one folder or hub repository; options as of `load_post_rank`."""
        hub = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
        model = PostRankForCausalLM.from_pretrained(folder_or_repo, **options)
        return cls(model, PostRankProcessor.from_pretrained(folder_or_repo, **hub))

    def rank(
        self,
        requests: Sequence[PostRankRequest],
        method: str = "greedy",
        *,
        num_beams: int = 4,
        window: int = 20,
        stride: int = 10,
        shuffles: int = 0,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """For each request the numbers of its candidates, best first.

        Args:
            method, num_beams: as of `PostRankForCausalLM.rank`.
            window, stride: lists longer than `window` are ranked in windows, from the back.
            shuffles: 0 ranks the list as it came; m >= 1 ranks m random orders of it and takes the mean places.
            seed: of the shuffles.

        Raises:
            ConfigError: a window longer than the labels, or a negative number of shuffles.
        """
        labels = len(self.processor.config.label_token_ids)
        if window > labels or min(shuffles, seed) < 0:
            raise ConfigError(
                f"A window may hold as many candidates as there are labels ({labels}), and shuffles and seed cannot be negative; "
                f"got {window}, {shuffles} and {seed}."
            )
        if min(num_beams, self.batch_size) < 1:
            raise ConfigError(f"num_beams and batch_size must be at least 1, got {num_beams} and {self.batch_size}.")
        self.counts = RankCounts()
        settings = {"method": method, "num_beams": num_beams}
        was_training = self.model.training
        self.model.eval()
        try:
            return self._consistent(requests, window, stride, shuffles, seed, settings)
        finally:
            self.model.train(was_training)

    def _consistent(
        self, requests: Any, window: int, stride: int, shuffles: int, seed: int, settings: dict
    ) -> list[np.ndarray]:
        if not shuffles:
            return self._ranked(requests, None, window, stride, settings)
        random = np.random.default_rng(seed)
        drawn = [random.permutation(len(r.candidates)) for _ in range(shuffles) for r in requests]
        found = self._ranked(list(requests) * shuffles, drawn, window, stride, settings)
        return [borda(found[number :: len(requests)]) for number in range(len(requests))]

    def _ranked(self, requests: Any, incoming: Any, window: int, stride: int, settings: dict) -> list[np.ndarray]:
        """Orders, as numbers of the requests' own candidates, of lists that come in as `incoming` says."""
        lengths = [len(r.candidates) for r in requests]
        incoming = [np.arange(n) for n in lengths] if incoming is None else incoming

        def rank(rows: list[int], places: list[np.ndarray]) -> list[np.ndarray]:
            shown = [incoming[row][place] for row, place in zip(rows, places, strict=True)]
            orders = self._prompted([requests[row] for row in rows], shown, settings)
            return [place[order] for place, order in zip(places, orders, strict=True)]

        found = rank_in_windows(lengths, rank, size=window, stride=stride)
        return [before[order] for before, order in zip(incoming, found, strict=True)]

    def _prompted(self, requests: list[PostRankRequest], shown: list[np.ndarray], settings: dict) -> list[np.ndarray]:
        """One prompt per request; similar lengths share a batch."""
        orders: list[Any] = [None] * len(requests)
        device = next(self.model.parameters()).device
        by_length = sorted(range(len(requests)), key=lambda n: len(shown[n]) + len(requests[n].history))
        for start in range(0, len(by_length), self.batch_size):
            part = by_length[start : start + self.batch_size]
            inputs = self.processor.from_requests(
                [requests[n] for n in part], orders=[shown[n] for n in part], answers=False
            )
            self.counts.prompt_tokens += int(inputs["attention_mask"].sum())
            result = self.model.rank(**to_device(inputs, device), **settings)
            self._count(result)
            for n, order in zip(part, result.order.cpu().numpy(), strict=True):
                orders[n] = order[: len(shown[n])]
        return orders

    def _count(self, result: Any) -> None:
        self.counts.prompts += len(result.order)
        self.counts.invalid += int((~result.valid).sum())
        for name in ("unknown", "repeated", "missing"):
            setattr(self.counts, name, getattr(self.counts, name) + int(getattr(result, name).sum()))


def to_device(inputs: dict[str, Any], device: Any) -> dict[str, Any]:
    """The inputs of a processor on another device."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(one) for key, one in value.items()}
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {key: moved(value) for key, value in inputs.items()}
