"""Evaluation on items, over the whole catalogue: what the step `evaluate` runs, for a notebook and for a training under way.

    evaluator = Evaluator(load_folder("runs/shop/data"), split="valid", max_requests=500)
    evaluator.evaluate(SidRetriever.from_pretrained("runs/shop/model"))     # {"ndcg@10": 0.21, ...}

Requests are spread over the processes and gathered by number, so two processes give exactly the rows of one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from sidtune.core.config import as_dict
from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.core.ragged import Ragged, drawn, gathered, own_rows
from sidtune.data_builders.tables.history import History
from sidtune.data_builders.tables.store import DataFolder
from sidtune.decoding.items import BeamOutput, rank_items
from sidtune.decoding.retrieval.loading import prompts_of
from sidtune.decoding.retrieval.model_folder import check_made_from
from sidtune.decoding.retrieval.retriever import SidRetriever
from sidtune.metrics.baselines.base import BaselineRequests
from sidtune.metrics.baselines.relevance import LABELS, relevance_of
from sidtune.metrics.baselines.tables import training_events
from sidtune.metrics.ranking import RankingResult, Relevance, check_metrics, evaluate_ranking
from sidtune.metrics.registry import BASELINES
from sidtune.metrics.statistics.bootstrap import paired_bootstrap, resampled
from sidtune.metrics.statistics.compare import MODEL, compare_systems
from sidtune.metrics.statistics.slices import build_slices, slice_rows


@dataclass
class Evaluator:
    """The requests of a split that have feedback, and what is measured on them.

    Attributes:
        data: a data folder.
        split: `test`, `valid` or `train`.
        ks, metrics, primary: cut-offs, names in `metrics/registry.py`, and the metric of slices and tests.
        labels: feedback that makes an item relevant when it is 1.
        num_beams, batch_size: beams per request, prompts decoded together.
        max_requests: a random part of the requests, drawn by `seed`; None for all.
        feedback_only: leave out requests without feedback, of which nothing can be measured by the log.
        level, samples: of intervals, by bootstrap over users.

    Raises:
        ConfigError: more places than items, unknown metrics. DataError: no request has feedback.
    """

    data: DataFolder
    split: str = "test"
    ks: Sequence[int] = (5, 10, 20)
    metrics: Sequence[str] = ("ndcg", "hr", "recall", "mrr", "map")
    primary: str = "ndcg@10"
    labels: Sequence[str] = LABELS
    num_beams: int = 20
    batch_size: int = 64
    max_requests: int | None = None
    feedback_only: bool = True
    level: float = 0.95
    samples: int = 1000
    seed: int = 0
    requests: pa.Table = field(init=False)
    excluded: int = field(init=False)

    def __post_init__(self) -> None:
        check_metrics(list(self.ks), list(self.metrics), self.primary)
        if self.places > self.data.items.num_rows:
            raise ConfigError(
                f"ks: {self.places:,} places, but the catalogue has {self.data.items.num_rows:,} items; lower it."
            )
        every = self.data.requests[self.split]
        has = np.diff(relevance_of(every, self.data.items, list(self.labels)).offsets) > 0
        requests = every.filter(pa.array(has)) if self.feedback_only else every
        if not requests.num_rows:
            raise DataError(
                f"No request of the split '{self.split}' has feedback, so nothing can be measured; check labels."
            )
        self.excluded = every.num_rows - requests.num_rows
        chosen = drawn(requests.num_rows, self.max_requests, self.seed)
        self.requests = requests.take(chosen).combine_chunks()

    @property
    def places(self) -> int:
        """The largest cut-off."""
        return max(self.ks)

    @cached_property
    def relevance(self) -> Relevance:
        """The relevant items of each request."""
        return relevance_of(self.requests, self.data.items, list(self.labels))

    @cached_property
    def history(self) -> Ragged:
        """Rows of the events before each request."""
        return History(self.data.events).before(self.requests["user_id"], self.requests["time"].to_numpy())

    def evaluate(self, retriever: SidRetriever) -> dict[str, float]:
        """Mean of every metric, for a model where it stands."""
        return self.measured(self.rank(retriever)[0]).means()

    def rank(self, retriever: SidRetriever) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Item rows and scores (R, places) of a model, -1 and -inf where the beams hold fewer items; and how it decoded."""
        state = PartialState()
        mine = own_rows(self.requests.num_rows, state.process_index, state.num_processes)
        prompts = prompts_of(retriever, self.data, self.requests.take(mine))
        begin, hidden = time.time(), None if state.is_main_process else True
        with tqdm(total=len(prompts), desc="decoding", unit="request", disable=hidden) as bar:
            beams = retriever.beams(prompts, self.num_beams, self.batch_size, progress=bar.update)
        rate = len(prompts) / max(time.time() - begin, 1e-9)
        leaves, values = gathered(mine, beams.leaves.numpy(), beams.scores.numpy())
        if leaves.max() >= retriever.trie.num_leaves or leaves.min() < -1:
            raise SidtuneError("The decoder returned a SID outside the catalogue; this is a defect, please report it.")
        found = BeamOutput(torch.from_numpy(leaves), torch.from_numpy(values))
        rows, scores = rank_items(found, retriever.leaves, self.places)
        short = int((rows[:, -1] < 0).sum())
        return rows, scores, {"num_beams": self.num_beams, "requests_per_second": round(rate, 2), "short_lists": short}

    def baselines(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Item rows (R, places) of baselines in `metrics/registry.py`, fitted on what training may see."""
        events = training_events(self.data)
        wanted = BaselineRequests.from_events(self.requests["query"], self.history, self.data.events, self.data.items)
        return {
            name: BASELINES.get(name)()
            .fit(self.data.items, events, self.data.requests["train"])
            .rank(wanted, self.places)
            for name in tqdm(names, desc="baselines", disable=None)
        }

    def stored(self, folders: Mapping[str, str | Path], data_dir: str | Path) -> dict[str, np.ndarray]:
        """Item rows (R, places) of the models of other evaluations, by name.

        Raises:
            DataError: no finished evaluation of this data, or not of these requests.
        """
        found = {}
        rows = {item: row for row, item in enumerate(self.data.items["item_id"].to_pylist())}
        for name, folder in folders.items():
            path = Path(folder) / "predictions" / f"{MODEL}.parquet"
            if not path.exists():
                raise DataError(f"compare_to.{name}: {path} does not exist; name the folder of a finished evaluation.")
            check_made_from(folder, data_dir=data_dir)
            table = pq.read_table(path)
            strange = [item for one in table["items"].to_pylist() for item in one if item not in rows]
            if strange:
                raise DataError(
                    f"compare_to.{name}: {path} ranks the item '{strange[0]}', which is not in {data_dir}, so they do not belong "
                    "together; evaluate that model on this data."
                )
            place = {request: n for n, request in enumerate(table["request_id"].to_pylist())}
            asked = self.requests["request_id"].to_pylist()
            missing = [request for request in asked if request not in place]
            if missing:
                raise DataError(
                    f"compare_to.{name}: it lacks {len(missing)} of the requests, first '{missing[0]}'; evaluate alike."
                )
            lists = table["items"].take([place[request] for request in asked]).to_pylist()
            found[name] = np.array([([rows[i] for i in one] + [-1] * self.places)[: self.places] for one in lists])
        return found

    def measured(self, rows: np.ndarray) -> RankingResult:
        """Every metric of item rows (R, places), request by request."""
        return evaluate_ranking(rows, self.relevance, list(self.ks), list(self.metrics))

    def compare(
        self, results: Mapping[str, RankingResult], baselines: Sequence[str] = (), bounds: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Systems with intervals, slices, and the model (`MODEL`) against each other model, paired over users; JSON-ready."""
        users = self.requests["user_id"].to_pylist()
        options = {"level": self.level, "samples": self.samples, "seed": self.seed, "clusters": users}
        systems = compare_systems(dict(results), baselines=list(baselines), bounds=list(bounds), **options)
        masks = build_slices(self.data, self.requests, self.relevance, self.history.lengths)
        values = {name: result.values(self.primary) for name, result in results.items()}
        slices = {name: slice_rows(value, masks, **options) for name, value in values.items()}
        others = [name for name in results if name not in (MODEL, *baselines, *bounds)]
        pairs = {name: paired_bootstrap(values[MODEL], values[name], **options) for name in others}
        return {
            "split": self.split,
            "requests": self.requests.num_rows,
            "requests_without_feedback": self.excluded,
            "catalogue": self.data.items.num_rows,
            "primary": self.primary,
            "level": self.level,
            "resampled": resampled(users, len(users)),
            "systems": [as_dict(system.to_dict()) for system in systems],
            "slices": {name: [as_dict(row) for row in rows] for name, rows in slices.items()},
            "against": {name: as_dict(pair) for name, pair in pairs.items()},
        }
