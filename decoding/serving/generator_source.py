"""Our own generator as the upstream of post-ranking: its top-K lists, its log-probabilities, its semantic IDs.

`kind: generator` of a source (`data_builders.post_ranking.sources`). The lists are those of `batch`, nothing excluded, so they are
the ones that evaluation and serving give. Each split has a folder of its own, and an interrupted retrieval goes on after its last
finished shard. A list with fewer items than asked for is left out, and counted.

| label | relevance of a candidate | where |
|---|---|---|
| `best`, `clicks`, `none` | of the simulated session, see `post_ranking/shop_lists.py` | data of the reader shop_world |
| `logged` | 1 if the log holds a click, like or order of it for this request, else 0 | any data |
| `auto` | `best` in a simulated shop, else `logged` | |

With `logged`, lists without any relevant item are left out and counted: no order of them is better than another. In a simulated
shop the log would be about other lists than these, so `logged` brings no expected clicks there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sidtune.core.config import build, check_range
from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.data_builders.post_ranking.generated_lists import GeneratedLists, generator_fields, logged_table, shop_of
from sidtune.data_builders.post_ranking.schema import PostRankTable
from sidtune.data_builders.post_ranking.shop_lists import LABELS, session_table
from sidtune.data_builders.post_ranking.sources import SOURCES, Source
from sidtune.data_builders.shop_world.sessions import SessionConfig, ShopSessions
from sidtune.data_builders.tables.store import DataFolder, load_folder
from sidtune.metrics.baselines.relevance import relevance_of
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

FOLDERS = ("data_dir", "sids_dir", "model_dir")
SHOP = "shop_world"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratorSource:
    """Options of `kind: generator`.

    Attributes:
        data_dir, sids_dir, model_dir: folders of the earlier steps; `model_dir` is a model folder or the folder of `sft`.
        num_beams: beams per request, at least `candidates`. candidates: length of the lists.
        train, valid, test: most requests of each split, drawn at random; 0 valid requests are none.
        label: see the module's docstring. sessions: fields of `SessionConfig`, for a simulated shop.
        history: latest items kept. seed: of the draws and of sampled clicks.
        batch_size: requests decoded together. shard_size: requests kept together when the retrieval is interrupted.

    Raises:
        ConfigError: a folder is missing, a value out of range.
    """

    data_dir: str | None = None
    sids_dir: str | None = None
    model_dir: str | None = None
    num_beams: int = 20
    candidates: int = 10
    train: int = 4000
    valid: int = 400
    test: int = 1000
    label: str = "auto"
    sessions: dict = field(default_factory=dict)
    history: int = 10
    seed: int = 0
    batch_size: int = 64
    shard_size: int = 256

    def __post_init__(self) -> None:
        missing = [name for name in FOLDERS if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"The source 'generator' needs {', '.join(missing)}: the folders of the steps before.")
        known = ("auto", "logged", *LABELS)
        if self.label not in known:
            raise ConfigError(f"source.label: there is no label '{self.label}': {nearest(self.label, known)}")
        check_range(self, 1, "num_beams", "candidates", "batch_size", "shard_size", "train", "test")
        check_range(self, 0, "valid", "history")
        if not 2 <= self.candidates <= self.num_beams:
            raise ConfigError(
                f"source: candidates must lie between 2 and num_beams, got {self.candidates} of {self.num_beams} beams."
            )
        build(SessionConfig, self.sessions, "source.sessions")

    def load(self, folder: Path) -> Source:
        """The lists, kept in `folder`, as a table."""
        return Source(*generator_table(self, folder))


KINDS = {**SOURCES, "generator": GeneratorSource}


def with_folders(source: dict[str, Any], folders: dict[str, str | None]) -> dict[str, Any]:
    """The source with folders that a pipeline gives beside it.

    Raises:
        ConfigError: the source is no generator, or names a folder itself.
    """
    given = {name: folder for name, folder in folders.items() if folder is not None}
    if given and source.get("kind") != "generator":
        raise ConfigError(
            f"{', '.join(given)} belong to the source 'generator', but source.kind is '{source.get('kind')}'; leave them out."
        )
    twice = [name for name in given if name in source]
    if twice:
        raise ConfigError(f"{', '.join(twice)} stand both in source and beside it; keep one of them.")
    return {**source, **given}


def generator_table(options: GeneratorSource, folder: Path) -> tuple[PostRankTable, ShopSessions | None]:
    """Retrieves the lists and makes the table; in a simulated shop also what knows the truth, row b of both the same.

    Args:
        options: checked ones. folder: where the lists of each split are kept.

    Raises:
        ConfigError, DataError: a folder is damaged or belongs to another run, or no list is left.
    """
    data = load_folder(options.data_dir)
    simulated = data.meta.get("reader") == SHOP
    label = ("best" if simulated else "logged") if options.label == "auto" else options.label
    if label in LABELS and not simulated:
        raise ConfigError(f"source.label '{label}' needs a simulated shop; use logged for {options.data_dir}.")
    sids = SemanticIds.from_pretrained(Path(str(options.sids_dir)) / "sids")
    lists, notes = generated_lists(options, data, folder)
    if label == "logged":
        return _logged(options, data, sids, lists, notes), None
    world = shop_of(data, lists.requests)
    rows = world.request_rows(lists.requests["request_id"])
    sessions = ShopSessions(world, rows, lists.items, build(SessionConfig, options.sessions, "source.sessions"))
    extra = generator_fields(sids.codes, sids.level_sizes, lists.scores, (sids.fingerprint(), *sids.extends))
    settings = {"label": label, "history": options.history, "extra": extra, "seed": options.seed}
    table = session_table(sessions, lists.splits, lists.scores, **settings)
    table.notes.extend(notes)
    return table, sessions


def generated_lists(options: GeneratorSource, data: DataFolder, folder: Path) -> tuple[GeneratedLists, list[str]]:
    """The generator's lists of all splits, and sentences about what was left out."""
    parts = []
    for split, count in (("train", options.train), ("valid", options.valid), ("test", options.test)):
        if count and data.requests[split].num_rows:
            parts.append(_lists_of(options, data, split, count, folder / split))
    short = sum(one for _, one in parts)
    made = [one for one, _ in parts]
    lists = GeneratedLists(
        pa.concat_tables([one.requests for one in made]).combine_chunks(),
        [name for one in made for name in one.splits],
        np.concatenate([one.items for one in made]),
        np.concatenate([one.scores for one in made]),
    )
    if not len(lists.splits):
        raise DataError(
            f"Not one list has {options.candidates} items; ask for fewer candidates, or give more beams (num_beams)."
        )
    note = f"{short} lists with fewer than {options.candidates} items are left out."
    logger.info("%d lists of the generator; %s", len(lists.splits), note)
    return lists, ["The candidates are the generator's own list, nothing excluded.", note]


def _lists_of(
    options: GeneratorSource, data: DataFolder, split: str, count: int, folder: Path
) -> tuple[GeneratedLists, int]:
    from sidtune.decoding.serving.batch import RESULT_FILE, answer_requests
    from sidtune.decoding.serving.options import BatchOptions

    answer_requests(
        BatchOptions(
            **{name: getattr(options, name) for name in (*FOLDERS, "num_beams", "batch_size", "shard_size", "seed")},
            output_dir=str(folder),
            split=split,
            max_requests=count,
            k=options.candidates,
            restart=True,
        )
    )
    found = pq.read_table(folder / RESULT_FILE)
    full = pc.equal(pc.list_value_length(found["items"]), options.candidates)
    short = found.num_rows - int(pc.sum(full).as_py() or 0)
    found = found.filter(full)
    shape = (found.num_rows, options.candidates)
    requests = data.requests[split].combine_chunks()
    asked = pc.index_in(found["request_id"], value_set=requests["request_id"].combine_chunks())
    items = pc.index_in(found["items"].combine_chunks().flatten(), value_set=data.items["item_id"].combine_chunks())
    lists = GeneratedLists(
        requests.take(asked),
        [split] * len(asked),
        items.to_numpy(zero_copy_only=False).astype(np.int64).reshape(shape),
        found["scores"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(shape),
    )
    return lists, short


def _logged(
    options: GeneratorSource, data: DataFolder, sids: SemanticIds, lists: GeneratedLists, notes: list[str]
) -> PostRankTable:
    known = relevance_of(lists.requests, data.items)
    count, step = len(lists.splits), data.items.num_rows
    pairs = np.repeat(np.arange(count), np.diff(known.offsets)) * step + known.rows
    relevance = np.isin(np.arange(count)[:, None] * step + lists.items, pairs).astype(np.float64)
    kept = np.flatnonzero(relevance.any(axis=1))
    if not len(kept):
        raise DataError(
            f"None of the {count} lists holds an item that its request was logged to like; ask for more candidates or requests."
        )
    lists, relevance = lists.take(kept), relevance[kept]
    extra = generator_fields(sids.codes, sids.level_sizes, lists.scores, (sids.fingerprint(), *sids.extends))
    table = logged_table(data, lists, relevance, extra, options.history)
    note = f"{count - len(kept)} lists without any relevant item are left out."
    logger.info("%s", note)
    table.notes.extend([*notes, note])
    return table
