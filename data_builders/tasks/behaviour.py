"""Requests and histories → training examples, windowed or in one pass over a user, and prompts for evaluation.

*Windowed* (`request_to_sid`, `history_to_sid`): one example per request, its history cut to the last `max_history`
turns. *Whole history* (`whole_history`): one example per user, which learns the semantic ID of every request on the
way, so a user with n requests costs n turns, not n copies of a history. Both put the same pieces in the same order,
therefore the loss on a target is the same wherever the window covers its past. A turn is learned in the pass only if every
turn before it is older than its request. Others (purchases of one second, a late action) get an example of their own, with
what lay before the request; further items of one request are context only.

Differs from the papers (TIGER, LC-Rec, OneSearch), which copy the history for each target. Our choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.ragged import Ragged, offsets_of, owners, taken
from sidtune.data_builders.prompts.encoding import encoder_of
from sidtune.data_builders.tables.columns import one_array, rows_of
from sidtune.data_builders.tasks.input import TaskInput, Turns, heads, render_turns

_PIECES_AT_A_TIME = 2_000_000


@dataclass(frozen=True)
class _Sequences:
    """The turns of users in order: `offsets` (U+1,) and `head` (U,) per user; `text`, `sid`, `learn`, `apart` (T,) per turn.

    `head`, `text` and `sid` are entries of `texts`. `learn` says which turns are learned in the pass; `apart` is, for those
    learned by themselves, the place of the first turn that is not older than the request, else -1.
    """

    users: pa.Array
    offsets: np.ndarray
    texts: pa.Array
    head: np.ndarray
    text: np.ndarray
    sid: np.ndarray
    learn: np.ndarray
    apart: np.ndarray


def _pool(*kinds: list[str]) -> tuple[pa.Array, list[int]]:
    """Texts of several kinds in one array, and where each kind begins."""
    texts = pa.array([str(text) for kind in kinds for text in kind], pa.string())
    return texts, np.cumsum([0, *map(len, kinds)]).tolist()


def to_dataset(
    task: str, texts: pa.Array, offsets: np.ndarray, codes: np.ndarray, learn: np.ndarray, keys: pa.Array
) -> Dataset:
    """Examples as a data set with columns task, pieces, learn, key.

    Args:
        task: name of the task.
        texts: distinct pieces.
        offsets: (n+1,) where each example begins in `codes`.
        codes: (P,) entry of each piece in `texts`.
        learn: (P,) whether the piece is learned.
        keys: (n,) key of each example.
    """
    tables = []
    begin, count = 0, len(offsets) - 1
    while begin < count or not tables:
        end = int(np.searchsorted(offsets, offsets[begin] + _PIECES_AT_A_TIME, side="right")) - 1
        end = min(count, max(end, begin + 1))
        span = slice(int(offsets[begin]), int(offsets[end]))
        place = pa.array(offsets[begin : end + 1] - offsets[begin], pa.int32())
        columns = {
            "task": pa.array([task] * (end - begin), pa.string()),
            "pieces": pa.ListArray.from_arrays(place, texts.take(pa.array(codes[span]))),
            "learn": pa.ListArray.from_arrays(place, pa.array(learn[span], pa.bool_())),
            "key": keys.slice(begin, end - begin).cast(pa.string()),
        }
        tables.append(pa.table(columns))
        begin = end
    digest = hashlib.blake2b(task.encode(), digest_size=8)
    for buffer in (offsets, codes, learn, *(b for b in (*texts.buffers(), *keys.buffers()) if b is not None)):
        digest.update(np.ascontiguousarray(buffer).view(np.uint8) if isinstance(buffer, np.ndarray) else buffer)
    return Dataset(pa.concat_tables(tables), fingerprint=digest.hexdigest())


def pieces_dataset(task: str, examples: Sequence[Sequence[str]], keys: pa.Array, learned: int = 1) -> Dataset:
    """Examples given as pieces, of which the last `learned` are learned, as a data set."""
    offsets = offsets_of([len(pieces) for pieces in examples])
    flat = pa.array([str(piece) for pieces in examples for piece in pieces], pa.string()).dictionary_encode()
    learn = np.zeros(offsets[-1], bool)
    for back in range(1, learned + 1):
        learn[offsets[1:] - back] = True
    return to_dataset(task, flat.dictionary, offsets, flat.indices.to_numpy().astype(np.int64), learn, keys)


def _interleave(offsets: np.ndarray, text: np.ndarray, sid: np.ndarray, ends: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for head + (text, sid) per turn + `ends` more pieces.

    Returns new offsets and the codes with turns filled in.
    """
    new = offsets_of(2 * np.diff(offsets) + 1 + ends)
    codes = np.empty(new[-1], np.int64)
    row = owners(offsets)
    place = new[row] + 1 + 2 * (np.arange(len(text)) - offsets[row])
    codes[place], codes[place + 1] = text, sid
    return new, codes


def window(data: TaskInput, asked: pa.Table, max_history: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The last turns before each of the requests `asked`: their offsets, and the rows of the turns."""
    turns = data.turns
    limit = data.max_history if max_history is None else max_history
    found = turns.history.before(one_array(asked["user_id"]), asked["time"].to_numpy(), limit)
    own = rows_of(asked["request_id"], data.shown["request_id"])
    parent = owners(found.offsets)
    # An action logged before its own request would show the answer.
    other = (own[parent] < 0) | (turns.request[found.rows] != own[parent])
    return offsets_of(np.bincount(parent[other], minlength=len(own))), found.rows[other]


def _windowed(
    data: TaskInput,
    requests: pa.Table,
    target: np.ndarray | None,
    max_history: int | None = None,
    asks: bool = True,
) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Composes windowed pieces of requests, with a target or without: the pool's texts, offsets and codes."""
    turns = data.turns
    offsets, past = window(data, requests, max_history)
    head, head_texts = heads(data, one_array(requests["user_id"]))
    query, context = one_array(requests["query"]), one_array(requests["context"])
    if not asks:
        query, context = pa.nulls(len(query), query.type), pa.nulls(len(query), context.type)
    last, last_texts = render_turns(data.serializer, query, context)
    texts, first = _pool(head_texts, turns.texts, last_texts, data.sid_texts)
    new, codes = _interleave(
        offsets, first[1] + turns.text[past], first[3] + turns.item[past], 1 if target is None else 2
    )
    codes[new[:-1]] = first[0] + head
    codes[new[1:] - (1 if target is None else 2)] = first[2] + last
    if target is not None:
        codes[new[1:] - 1] = first[3] + target
    return texts, new, codes


def _request_examples(
    data: TaskInput, task: str, limit: int | None, all_positives: bool, asks: bool, need_history: bool
) -> Dataset:
    found = data.positives
    chosen = np.arange(len(found.request)) if all_positives else np.flatnonzero(found.strongest)
    data.count(task, requests_without_positive=data.requests.num_rows - int(found.strongest.sum()))

    def past(places: np.ndarray) -> list[bool | None]:
        offsets, _ = window(data, data.requests.take(pa.array(found.request[places])))
        return [True if some else None for some in np.diff(offsets).tolist()]

    if need_history:
        chosen, _ = data.choose_made(task, chosen, limit, "requests_without_history", past)
    else:
        chosen = data.choose(task, chosen, limit)
    requests = data.requests.take(pa.array(found.request[chosen]))
    texts, offsets, codes = _windowed(data, requests, found.item[chosen], asks=asks)
    learn = np.zeros(len(codes), bool)
    learn[offsets[1:] - 1] = True
    return to_dataset(task, texts, offsets, codes, learn, one_array(requests["request_id"]))


def request_to_sid(data: TaskInput, limit: int | None = None, all_positives: bool = False) -> Dataset:
    """The full personalised request → SID: user, history, query and context; target is the strongest positive.

    Args:
        limit: at most so many examples, drawn at random.
        all_positives: one example for each positive of a request instead of the strongest.
    """
    return _request_examples(data, "request_to_sid", limit, all_positives, asks=True, need_history=False)


def history_to_sid(data: TaskInput, limit: int | None = None, all_positives: bool = False) -> Dataset:
    """History → SID: the request's own query and context are withheld; requests without history are left out."""
    return _request_examples(data, "history_to_sid", limit, all_positives, asks=False, need_history=True)


def prompt_for_requests(data: TaskInput, requests: pa.Table, max_history: int | None = None) -> list[list[str]]:
    """The pieces before the target of each request, by the code that builds training examples.

    Args:
        data: set `context_requests` to all requests, so that past turns show their context.
        requests: any requests, in the `requests` schema.
        max_history: turns of history, default `data.max_history`.
    """
    texts, offsets, codes = _windowed(data, requests, None, max_history)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts.take(pa.array(codes))).to_pylist()


def _cut(data: TaskInput, users: pa.Array) -> np.ndarray:
    """(n,) first time that each user's whole history leaves out."""
    if isinstance(data.until, (int, np.integer)):
        return np.full(len(users), data.until, np.int64)
    if data.until is not None:
        return data.until.of(users)
    place = rows_of(data.requests["user_id"], users)
    cut = np.full(len(users), np.iinfo(np.int64).min)
    np.maximum.at(cut, place[place >= 0], data.requests["time"].to_numpy()[place >= 0] + 1)
    # A late action on the last train request still counts.
    late = data.turns.trains & (data.turns.request >= 0)
    place = rows_of(data.turns.events["user_id"], users)[late]
    np.maximum.at(cut, place, data.turns.events["time"].to_numpy()[late] + 1)
    return cut if data.cut is None else np.minimum(cut, data.cut.of(users))


def _chunks(
    offsets: np.ndarray, cost: np.ndarray, room: np.ndarray, max_turns: int, overlap: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each user's turns into chunks that fit: (k, 4) user, begin, first learned, end.

    And the turns that never fit.
    """
    ends = np.concatenate([[0], np.cumsum(cost)])
    begin, end = offsets[:-1], offsets[1:]
    whole = (end - begin <= max_turns) & (ends[end] - ends[begin] <= room)
    chunks = [np.stack([np.flatnonzero(whole), begin[whole], begin[whole], end[whole]], axis=1)]
    too_long: list[int] = []
    for user in np.flatnonzero(~whole):
        start = first = int(begin[user])
        while first < end[user]:
            stop = int(np.searchsorted(ends, ends[start] + room[user], side="right")) - 1
            stop = min(stop, start + max_turns, int(end[user]))
            if stop > first:
                chunks.append(np.array([[user, start, first, stop]]))
                # Where tokens are short, an overlap as long as the chunk would copy the history for each target again.
                shared = overlap if stop - start == max_turns else min(overlap, (stop - start) // 4)
                first, start = stop, max(start, stop - shared)
            elif (fits := int(np.searchsorted(ends, ends[first + 1] - room[user]))) <= first:
                start = fits  # a shorter overlap leaves room for one more turn
            else:
                too_long.append(first)
                first = start = first + 1
    table = np.concatenate(chunks)
    return table[np.lexsort((table[:, 1], table[:, 0]))], np.array(too_long, np.int64)


def whole_history(
    data: TaskInput,
    limit: int | None = None,
    max_turns: int = 128,
    overlap: int = 32,
    max_tokens: int | None = None,
) -> Dataset:
    """One pass over each user: head and all turns up to `data.until`, learning every SID that is a fair target.

    The key of an example is the user id, a slash, and the number of its first turn in the user's history; of a turn that is
    learned by itself, a plus sign and its number follow.

    Args:
        limit: at most so many users, drawn at random among those that have something to learn.
        max_turns: longest example; longer users are cut into chunks, and every target is learned in exactly one.
        overlap: turns at the start of a chunk that repeat the end of the one before, as context only; at most a quarter
            of a chunk that `max_tokens` cut short.
        max_tokens: also cut so that an example, with one token for bos, has at most so many tokens; use the
            `max_length` of the encoding, then no target is lost. None counts turns only.

    Raises:
        ConfigError: impossible numbers, or a serializer with history_context off, under which a turn would read
            differently as a target.
    """
    if not 0 <= overlap < max_turns:
        raise ConfigError(f"overlap must be at least 0 and less than max_turns, got {overlap} and {max_turns}.")
    if not data.serializer.history_context:
        raise ConfigError(
            "whole_history needs a serializer with history_context: true, because each turn is target and history at "
            "once; set it, or train on request_to_sid."
        )
    sequences = _sequences(data, limit)
    cost, room = np.zeros(len(sequences.text), np.int64), np.ones(len(sequences.users), np.int64)
    if max_tokens is not None:
        encoder = encoder_of(data.serializer.tokenizer)
        codes = encoder.codes(sequences.texts.to_pylist())  # first: it makes the lengths grow
        size = encoder.lengths[codes]
        cost, room = size[sequences.text] + size[sequences.sid], max_tokens - 1 - size[sequences.head]
    chunks, too_long = _chunks(sequences.offsets, cost, room, max_turns, overlap)
    return _whole_examples(data, sequences, chunks, too_long, _alone(sequences, cost, room, max_turns))


def _sequences(data: TaskInput, limit: int | None) -> _Sequences:
    turns = data.turns
    users = one_array(turns.events["user_id"]).unique()
    found = turns.history.before(users, _cut(data, users), None)
    learn, apart = _targets(turns, found.rows, found.offsets)
    if limit is not None:
        targets = np.add.reduceat(np.append(learn | (apart >= 0), False), found.offsets[:-1]) * (found.lengths > 0)
        chosen = data.choose("whole_history", np.flatnonzero(targets), limit)
        place, offsets = taken(found.offsets, chosen)
        shift = np.repeat(offsets[:-1] - found.offsets[chosen], np.diff(offsets))
        learn, apart = learn[place], np.where(apart[place] >= 0, apart[place] + shift, -1)
        users, found = users.take(pa.array(chosen)), Ragged(offsets, found.rows[place])
    head, head_texts = heads(data, users)
    texts, first = _pool(head_texts, turns.texts, data.sid_texts)
    text, sid = first[1] + turns.text[found.rows], first[2] + turns.item[found.rows]
    return _Sequences(users, found.offsets, texts, first[0] + head, text, sid, learn, apart)


def _targets(turns: Turns, rows: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`learn` and `apart` of `_Sequences`, see the top of the file."""
    time, asked, owner = turns.events["time"].to_numpy()[rows], turns.asked[rows], owners(offsets)
    moments, rank = np.unique(time, return_inverse=True)
    step = len(moments) + 1
    # The first turn of the same user that is not older than the request.
    since = np.searchsorted(owner * step + rank.reshape(-1), owner * step + np.searchsorted(moments, asked))
    allowed = turns.trains[rows] & (asked <= time)
    learn = allowed & (since == np.arange(len(rows)))
    request = turns.request[rows]
    _, first = np.unique(np.where(request >= 0, request, -1 - np.arange(len(rows))), return_index=True)
    strongest = np.zeros(len(rows), bool)
    strongest[first] = True
    return learn, np.where(allowed & strongest & ~learn, since, -1)


def _alone(sequences: _Sequences, cost: np.ndarray, room: np.ndarray, max_turns: int) -> np.ndarray:
    """(k, 4) user, begin, end of the history, turn, of each turn that is learned by itself and fits."""
    turn = np.flatnonzero(sequences.apart >= 0)
    user, end = owners(sequences.offsets)[turn], sequences.apart[turn]
    ends = offsets_of(cost)
    begin = np.maximum(sequences.offsets[user], end - max_turns + 1)
    begin = np.maximum(begin, np.searchsorted(ends, ends[end] + cost[turn] - room[user]))
    return np.stack([user, np.minimum(begin, end), end, turn], axis=1)[cost[turn] <= room[user]]


def _whole_examples(
    data: TaskInput, sequences: _Sequences, chunks: np.ndarray, too_long: np.ndarray, alone: np.ndarray
) -> Dataset:
    user, begin, first, end = chunks.T
    learn = sequences.learn
    # Turns after the last learned one teach nothing; a chunk that learns nothing goes altogether.
    learned_at = np.where(learn, np.arange(len(learn)), -1)
    last = np.maximum.accumulate(learned_at)[end - 1] if len(learn) else end - 1
    keep = last >= first
    ends = np.stack([begin, first, last + 1], axis=1)[keep]
    # A turn by itself takes the place behind its history.
    ends = np.concatenate([ends, np.stack([alone[:, 1], alone[:, 2], alone[:, 2] + 1], axis=1)])
    user, (begin, first, end) = np.concatenate([user[keep], alone[:, 0]]), ends.T
    if not len(user):
        raise DataError(
            "whole_history finds no target; check `until`, and that events carry the ids of train requests."
        )
    span = offsets_of(end - begin)
    place = np.repeat(begin - span[:-1], end - begin) + np.arange(span[-1])
    behind = span[1:][len(user) - len(alone) :] - 1
    place[behind] = alone[:, 3]
    wanted = learn[place] & (place >= np.repeat(first, end - begin))
    wanted[behind] = True
    offsets, codes = _interleave(span, sequences.text[place], sequences.sid[place], 0)
    codes[offsets[:-1]] = sequences.head[user]
    _, flags = _interleave(span, np.zeros(len(place), np.int64), wanted, 0)
    flags[offsets[:-1]] = 0
    data.count(
        "whole_history",
        turns_as_context_only=int((~learn).sum()),
        turns_longer_than_max_tokens=int(sequences.learn[too_long].sum() + (sequences.apart >= 0).sum() - len(alone)),
        targets=int(flags.sum()),
    )
    names = [f"{name}/" for name in sequences.users.take(pa.array(user)).to_pylist()]
    ends_in = [""] * (len(user) - len(alone)) + [f"+{turn}" for turn in (alone[:, 3] - sequences.offsets[alone[:, 0]])]
    numbers = (begin - sequences.offsets[user]).tolist()
    keys = pa.array([f"{a}{b}{c}" for a, b, c in zip(names, numbers, ends_in, strict=True)], pa.string())
    return to_dataset("whole_history", sequences.texts, offsets, codes, flags.astype(bool), keys)
