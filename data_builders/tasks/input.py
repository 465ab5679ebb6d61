"""What all tasks share: the tables, the positives of requests, and past actions as rendered turns.

A *turn* is one (request, item) a user acted on, placed where its first action is; events without a request are turns
of their own, one per (user, time, item). Turns are made once for all tasks, as an events table that `History` sorts,
so the order of a history is decided in one place. A turn is rendered with the query and the context of its request
and therefore reads the same as a part of a history and as a target. Our choice, no paper.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.ragged import offsets_of
from sidtune.data_builders.prompts.encoding import SID_TEXT
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.columns import encode, one_array, rows_of
from sidtune.data_builders.tables.history import History, TimeCut, action_strength
from sidtune.data_builders.tables.splits import training_cut
from sidtune.data_builders.tables.store import DataFolder

T = TypeVar("T")
logger = logging.getLogger(__name__)

_REQUESTS_AT_A_TIME = 50_000
ALL_TURNS = 1_000_000  # "no limit" for builders that want a number
LABELS = ("order", "like", "click")  # strongest first


@dataclass(frozen=True)
class Turns:
    """Past actions, one row per turn; all arrays are aligned with `events`.

    Attributes:
        events: the first, strongest event of each turn, in the `events` schema, sorted by (time, strength, item id).
        item: (n,) row of the item in `TaskInput.sid_texts`.
        request: (n,) row of its request in the context requests, -1 if it has none.
        asked: (n,) time of the request, or of the event where it has none.
        trains: (n,) whether it stems from a train request or from no request at all.
        text: (n,) entry of `texts` that it renders to.
        texts: the distinct rendered turns.
        history: history over `events`.
    """

    events: pa.Table
    item: np.ndarray
    request: np.ndarray
    asked: np.ndarray
    trains: np.ndarray
    text: np.ndarray
    texts: list[str]
    history: History


@dataclass(frozen=True)
class Positives:
    """Items of requests with order=1, like=1 or click=1, sorted by (request, strength, item id); null is ignored.

    Attributes:
        request: (m,) row of the requests table.
        item: (m,) row of the item in `TaskInput.sid_texts`.
        strongest: (m,) whether it is the first of its request.
    """

    request: np.ndarray
    item: np.ndarray
    strongest: np.ndarray


@dataclass
class TaskInput:
    """Everything a task reads.

    Attributes:
        items, users, events: tables of the data folder. Events may reach beyond the training time; only what lies
            before a request, or before `until`, is read.
        requests: the **train** requests only (for prompts at evaluation too: the requests asked are passed apart).
        sids: item id → SID text. Items without one take no part; they are counted.
        serializer: renders the rows.
        max_history: longest history in turns.
        until: whole-history training reads turns strictly before this time (a number, or a `TimeCut` with one per
            user); None reads each user up to its last train request, whose late actions count until `cut`.
        cut: end of the training time, which `of_split` takes from the data folder; None knows none.
        seed: of every random choice.
        context_requests: requests whose query and context past turns may show, default `requests`. For evaluation
            pass all.
        counts: task → what was left out and why, filled by the tasks.

    Raises:
        ConfigError: a negative max_history.
        DataError: a SID text that is none.
    """

    items: pa.Table
    users: pa.Table
    events: pa.Table
    requests: pa.Table
    sids: Mapping[str, str]
    serializer: Serializer
    max_history: int = 20
    until: int | TimeCut | None = None
    cut: TimeCut | None = None
    seed: int = 0
    context_requests: pa.Table | None = None
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_history < 0:
            raise ConfigError(f"max_history must be 0 or more turns, got {self.max_history}.")
        bad = next((key for key, text in self.sids.items() if not SID_TEXT.fullmatch(text)), None)
        if bad is not None:
            raise DataError(
                f"The semantic ID of item '{bad}' is {self.sids[bad]!r}; it must look like <a_12><b_7><c_0>."
            )

    @classmethod
    def of_split(
        cls,
        data: DataFolder,
        sids: Mapping[str, str],
        serializer: Serializer,
        split: str,
        max_history: int | None,
        seed: int = 0,
    ) -> TaskInput:
        """One split of a data folder: its requests are the targets, the requests of all splits explain past turns.

        Args:
            data: data folder.
            sids: item id → SID text.
            serializer: renders the rows.
            split: `train`, `valid` or `test`.
            max_history: longest history in turns, None for no limit.
            seed: of every random choice.
        """
        shown = {part: table for part, table in data.requests.items() if table.num_rows}
        every = pa.concat_tables(shown.values()) if shown else None
        names = np.repeat([*shown], [table.num_rows for table in shown.values()])
        return cls(
            items=data.items,
            users=data.users,
            events=data.events,
            requests=data.requests[split],
            sids=sids,
            serializer=serializer,
            max_history=ALL_TURNS if max_history is None else max_history,
            cut=None if every is None else training_cut(every, names, data.meta.get("split") or {}),
            seed=seed,
            context_requests=every,
        )

    def rng(self, task: str) -> np.random.Generator:
        """The random generator of a task: the same for the same seed, whatever other tasks draw."""
        return np.random.default_rng([self.seed, zlib.crc32(task.encode())])

    def choose(self, task: str, rows: np.ndarray, limit: int | None) -> np.ndarray:
        """At most `limit` of the rows, drawn without replacement, in their old order."""
        if limit is None or limit >= len(rows):
            return rows
        if limit < 0:
            raise ConfigError(f"The limit of task {task} must be 0 or more examples, got {limit}.")
        return rows[np.sort(self.rng(task).permutation(len(rows))[:limit])]

    def choose_made(
        self,
        task: str,
        rows: np.ndarray,
        limit: int | None,
        what: str,
        make: Callable[[np.ndarray], Sequence[T | None]],
    ) -> tuple[np.ndarray, list[T]]:
        """As `choose`, where only rows count out of which `make` makes something.

        Args:
            what: how `counts` calls the rows out of which nothing was made.
            make: gives what each of some rows becomes, or None.

        Returns:
            The rows that became something, at most `limit`, in their old order, and what they became.
        """
        few = limit is not None and 0 <= limit < len(rows)
        order = rows[self.rng(task).permutation(len(rows))] if few else self.choose(task, rows, limit)
        wanted, looked, done = limit if few else len(rows), 0, []
        while looked < len(order) and len(done) < wanted:
            part = order[looked : looked + wanted - len(done)]
            looked += len(part)
            done += [(row, one) for row, one in zip(part.tolist(), make(part), strict=True) if one is not None]
        self.count(task, **{what: looked - len(done)})
        done.sort(key=lambda pair: pair[0])
        return np.array([row for row, _ in done], np.int64), [one for _, one in done]

    def count(self, task: str, **numbers: int) -> None:
        """Notes what a task left out."""
        self.counts.setdefault(task, {}).update({name: int(number) for name, number in numbers.items()})
        told = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in numbers.items() if number)
        logger.info("task %s: %s", task, told or "nothing left out")

    @cached_property
    def sid_ids(self) -> pa.Array:
        """Item ids that have a SID, (S,)."""
        return pa.array(list(self.sids), pa.string())

    @cached_property
    def sid_texts(self) -> list[str]:
        """SID text of each of `sid_ids`."""
        return list(self.sids.values())

    @cached_property
    def item_rank(self) -> np.ndarray:
        """(S,) place of each of `sid_ids` in the order of ids."""
        rank = np.empty(len(self.sid_ids), np.int64)
        rank[pc.sort_indices(self.sid_ids).to_numpy()] = np.arange(len(rank))
        return rank

    @cached_property
    def positives(self) -> Positives:
        """Positives of the train requests."""
        return find_positives(self, self.requests)

    @cached_property
    def turns(self) -> Turns:
        """All turns of the events table."""
        return make_turns(self)

    @cached_property
    def shown(self) -> pa.Table:
        """The requests that past turns may show."""
        return self.requests if self.context_requests is None else self.context_requests


def find_positives(data: TaskInput, requests: pa.Table) -> Positives:
    """The positives of any requests table; unknown items and items without a SID are left out."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    begin = unknown = 0
    column = requests["candidates"]
    # Result pages are long and few of their items are positives, so pages are looked at some at a time.
    while begin < len(column):
        candidates = one_array(column.slice(begin, _REQUESTS_AT_A_TIME))
        flat = pc.list_flatten(candidates)
        strength = np.full(len(flat), len(LABELS), np.int64)
        for place, label in reversed(list(enumerate(LABELS))):
            strength[pc.fill_null(pc.equal(flat.field(label), 1), False).to_numpy(zero_copy_only=False)] = place
        liked = np.flatnonzero(strength < len(LABELS))
        item = rows_of(flat.field("item_id").take(pa.array(liked)), data.sid_ids)
        parent = begin + pc.list_parent_indices(candidates).to_numpy().astype(np.int64)[liked]
        parts.append((parent[item >= 0], strength[liked][item >= 0], item[item >= 0]))
        unknown += int((item < 0).sum())
        begin += _REQUESTS_AT_A_TIME
    if unknown:
        data.count("requests", positives_without_sid=unknown)
    nothing = np.zeros(0, np.int64)
    parts.append((nothing, nothing, nothing))
    request, strength, item = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((data.item_rank[item], strength, request))
    request, item = request[order], item[order]
    # A result page may list an item twice; it is one positive.
    _, first = np.unique(request * max(1, len(data.sid_texts)) + item, return_index=True)
    keep = np.sort(first)
    request = request[keep]
    return Positives(request, item[keep], np.diff(request, prepend=-1) != 0)


def render_turns(serializer: Serializer, query: pa.Array, context: pa.Array) -> tuple[np.ndarray, list[str]]:
    """Renders (query, context) pairs, each distinct pair once.

    Args:
        query: (n,) strings, nullable.
        context: (n,) lists of name/value, nullable.

    Returns:
        (n,) entry of each row in the texts, and the texts.
    """
    contexts = _context_keys(context).dictionary_encode()
    queries = pc.fill_null(query, "").dictionary_encode()  # an empty query and none render alike
    if serializer.query_sids is not None:
        serializer.query_sids(queries.dictionary.to_pylist())  # all at once; the turns below ask one by one
    width = max(1, len(contexts.dictionary))
    key = queries.indices.to_numpy().astype(np.int64) * width + contexts.indices.to_numpy()
    distinct, first, codes = np.unique(key, return_index=True, return_inverse=True)
    rows = pa.array(first)
    pairs = zip(query.take(rows).to_pylist(), context.take(rows).to_pylist(), strict=True)
    return codes.reshape(-1), [serializer.turn(words, where) for words, where in pairs]


def _context_keys(context: pa.Array) -> pa.Array:
    flat = pc.list_flatten(context)
    # Sanitising turns the separators into spaces too, so texts that differ in that alone render alike.
    parts = [pc.replace_substring_regex(pc.fill_null(flat.field(n), ""), "[\x1e\x1f]", " ") for n in ("name", "value")]
    words = pc.binary_join_element_wise(*parts, "\x1f")
    offsets = offsets_of(pc.fill_null(pc.list_value_length(context), 0).to_numpy())
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), words.cast(pa.string())), "\x1e")


def _factor(*keys: np.ndarray) -> np.ndarray:
    """One code for each distinct row of keys, without overflow."""
    code = np.zeros(len(keys[0]), np.int64)
    for key in keys:
        _, part = np.unique(key, return_inverse=True)
        _, code = np.unique(code * (int(part.max(initial=0)) + 1) + part.reshape(-1), return_inverse=True)
        code = code.reshape(-1).astype(np.int64)
    return code


def make_turns(data: TaskInput) -> Turns:
    """Makes the turns of a data set: known items only, one per (request, item)."""
    events = data.events
    item = rows_of(events["item_id"], data.sid_ids)
    rows = np.flatnonzero(item >= 0)
    data.count("history", events_without_sid=len(item) - len(rows))
    events, item = events.take(pa.array(rows)), item[rows]
    time, strength = events["time"].to_numpy(), action_strength(events["action"]).astype(np.int64)
    request = rows_of(events["request_id"], data.shown["request_id"])
    named = events["request_id"].is_valid().to_numpy()
    users = encode(events["user_id"])[0]

    order = np.lexsort((data.item_rank[item], strength, time))
    # Request ids that no table explains still keep their events apart.
    source = np.where(named, encode(events["request_id"])[0], -1)
    moment = np.where(named, 0, time)
    _, first = np.unique(_factor(users, source, moment, item)[order], return_index=True)
    rows = order[np.sort(first)]
    events, item, request, named, time = events.take(pa.array(rows)), item[rows], request[rows], named[rows], time[rows]

    known = request >= 0
    place = pa.array(request, mask=~known)
    own = one_array(events["query"])
    query = pc.if_else(pa.array(known), one_array(data.shown["query"].take(place)), own)
    context = one_array(data.shown["context"].take(place))
    if not data.serializer.history_context:
        context = pa.nulls(len(context), context.type)
    text, texts = render_turns(data.serializer, query, context)
    asked = np.where(known, data.shown["time"].to_numpy()[np.maximum(request, 0)] if known.any() else time, time)
    trains = ~named | (rows_of(events["request_id"], data.requests["request_id"]) >= 0)
    return Turns(events, item, request, asked, trains, text, texts, History(events))


def heads(data: TaskInput, user_ids: pa.Array) -> tuple[np.ndarray, list[str]]:
    """Renders the users' heads: (n,) entry of each user in the texts, and the texts.

    Unknown users get an empty profile.
    """
    row = rows_of(user_ids, data.users["user_id"])
    distinct, codes = np.unique(row, return_inverse=True)
    known = data.users["profile"].take(pa.array(np.maximum(distinct, 0))).to_pylist() if data.users.num_rows else []
    texts = [
        data.serializer.head({"profile": known[place]} if number >= 0 else None)
        for place, number in enumerate(distinct)
    ]
    return codes.reshape(-1), texts
