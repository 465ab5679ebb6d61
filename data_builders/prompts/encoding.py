"""Text pieces → token ids, one piece at a time, for training and for serving alike.

An example is a list of pieces with a learn flag each. Every piece is tokenised on its own and the ids are put one
after the other, so what a piece costs and means never depends on its neighbours: a windowed prompt is, token by
token, a slice of the whole-history sequence, and a prompt at serving time is exactly the prefix the model was trained
on. Our choice, no paper.

Too long examples lose their oldest turns, whole turns only: the head (piece 0) and the last learned turn always stay.
An example that is too long even so is dropped and counted, never cut inside a field. Pieces repeat a lot (a SID, a
popular query), so distinct ones are tokenised once and the rest is array work.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from sidtune.core.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

IGNORE = -100
SID_TEXT = re.compile(r"(?:<[a-z]+_\d+>)+")
_CACHED_PIECES = 2_000_000
_ROWS_AT_A_TIME = 4_000


def is_sid(piece: str) -> bool:
    """Whether a piece is exactly one semantic ID, such as `<a_12><b_7><c_0>`."""
    return SID_TEXT.fullmatch(piece) is not None


def _backend(tokenizer: Any) -> Any | None:
    backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    if backend is None:
        return None
    # A former call with truncation or padding leaves both switched on in the backend.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without bos, eos or template, untruncated. Works with fast and slow transformers tokenizers."""
    backend = _backend(tokenizer)
    if backend is None:
        return [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    if len(texts) == 1:
        return [backend.encode(texts[0], add_special_tokens=False).ids]
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def token_spans(tokenizer: Any, text: str) -> list[tuple[int, int, int]] | None:
    """(id, start, end) of each token in `text`, character offsets.

    None for a slow tokenizer, which knows no offsets.
    """
    backend = _backend(tokenizer)
    if backend is None:
        return None
    encoding = backend.encode(text, add_special_tokens=False)
    return [(token, start, end) for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]


def bos_id(tokenizer: Any, bos: bool | None) -> int | None:
    """Id to put in front of every example, or None.

    Args:
        bos: True or False decides; None does what the tokenizer does by itself when it encodes a sentence.

    Raises:
        ConfigError: `bos` is True and the tokenizer has no bos token.
    """
    token = tokenizer.bos_token_id
    if bos is None:
        return token if token is not None and list(tokenizer("a").input_ids[:1]) == [token] else None
    if bos and token is None:
        raise ConfigError("bos is true, but the tokenizer has no bos token; set bos to null or false.")
    return token if bos else None


class PieceEncoder:
    """Tokenises each distinct piece once. Not thread-safe.

    Attributes:
        flat: ids of all known pieces, one after the other, (T,) int64.
        starts, lengths: place of each known piece in `flat`, (U,) int64.
        sid: which known pieces are semantic IDs, (U,) bool.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        self._forget()

    def _forget(self) -> None:
        self._codes: dict[str, int] = {}
        self._size = len(self._tokenizer())
        self.flat = np.zeros(0, np.int64)
        self.starts = np.zeros(0, np.int64)
        self.lengths = np.zeros(0, np.int64)
        self.sid = np.zeros(0, bool)

    def codes(self, pieces: Sequence[str]) -> np.ndarray:
        """Row of each piece in `starts`/`lengths`/`sid`, (len(pieces),) int64; unknown pieces are tokenised now."""
        if len(self._codes) > _CACHED_PIECES or len(self._tokenizer()) != self._size:
            self._forget()
        new = [piece for piece in dict.fromkeys(pieces) if piece not in self._codes]
        if new:
            ids = token_ids(self._tokenizer(), new)
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            starts = len(self.flat) + np.cumsum(lengths) - lengths
            flat = np.fromiter((token for row in ids for token in row), np.int64, int(lengths.sum()))
            self._codes.update(zip(new, range(len(self.lengths), len(self.lengths) + len(new)), strict=True))
            self.flat = np.concatenate([self.flat, flat])
            self.starts = np.concatenate([self.starts, starts])
            self.lengths = np.concatenate([self.lengths, lengths])
            self.sid = np.concatenate([self.sid, np.fromiter(map(is_sid, new), bool, len(new))])
        return np.fromiter(map(self._codes.__getitem__, pieces), np.int64, len(pieces))


_ENCODERS: weakref.WeakKeyDictionary[Any, PieceEncoder] = weakref.WeakKeyDictionary()


def encoder_of(tokenizer: Any) -> PieceEncoder:
    """The shared piece cache of a tokenizer."""
    if tokenizer not in _ENCODERS:
        _ENCODERS[tokenizer] = PieceEncoder(tokenizer)
    return _ENCODERS[tokenizer]


def _turns_to_drop(
    offsets: np.ndarray, ends: np.ndarray, sid: np.ndarray, last_learned: np.ndarray, need: np.ndarray
) -> np.ndarray:
    """How many pieces after the head each row must lose to shrink by `need` tokens; -1 where that is impossible.

    `ends` is the running token count before each piece, one longer than the pieces; `last_learned` is relative to the
    row.
    """
    count = np.diff(offsets)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], count)
    fits = np.concatenate([[0], np.cumsum(sid != ((place % 2 == 0) & (place > 0)))])
    turns = fits[offsets[1:]] == fits[offsets[:-1]]
    first = np.minimum(offsets[:-1] + 1, offsets[-1])
    dropped = np.searchsorted(ends, ends[first] + need, side="left") - first
    dropped += dropped % 2
    possible = turns & (dropped <= (last_learned - 1) // 2 * 2)
    return np.where(need <= 0, 0, np.where(possible, dropped, -1))


def _encode(
    encoder: PieceEncoder,
    offsets: np.ndarray,
    codes: np.ndarray,
    learn: np.ndarray,
    max_length: int | None,
    bos: int | None,
    reserve: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Encodes rows of pieces at once.

    Returns:
        token offsets of the rows that stay, input ids, labels, the numbers of those rows, and the learned pieces lost
        with dropped turns.
    """
    count = np.diff(offsets)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], count)
    last = np.full(len(count), -1, np.int64)
    np.maximum.at(last, np.repeat(np.arange(len(count)), count), np.where(learn, place, -1))
    ends = np.concatenate([[0], np.cumsum(encoder.lengths[codes])])
    stay = last >= 0
    keep = np.ones(len(codes), bool)
    if max_length is not None:
        total = ends[offsets[1:]] - ends[offsets[:-1]] + (bos is not None) + reserve
        drop = _turns_to_drop(offsets, ends, encoder.sid[codes], last, total - max_length)
        stay &= drop >= 0
        keep = (place == 0) | (place > np.repeat(drop, count))
    lost = int((learn & ~keep & np.repeat(stay, count)).sum())
    keep &= np.repeat(stay, count)
    rows = np.flatnonzero(stay)

    pieces = codes[keep]
    lengths = encoder.lengths[pieces]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    source = np.repeat(encoder.starts[pieces] - ends[:-1], lengths) + np.arange(ends[-1])
    ids = encoder.flat[source]
    labels = np.where(np.repeat(learn[keep], lengths), ids, IGNORE)
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    token_offsets = ends[kept_before[offsets[np.concatenate([[0], rows + 1])]]]
    if bos is not None and len(rows):
        ids = np.insert(ids, token_offsets[:-1], bos)
        labels = np.insert(labels, token_offsets[:-1], IGNORE)
        token_offsets = token_offsets + np.arange(len(rows) + 1)
    return token_offsets, ids, labels, rows, lost


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Sequence[str]],
    max_length: int | None = None,
    reserve: int = 0,
    bos: bool | None = None,
) -> list[list[int]]:
    """Encodes prompts (examples without their target): exactly the ids that come before the target in training.

    Args:
        prompts: pieces of each prompt.
        max_length: longest prompt plus target, in tokens.
        reserve: length of the target in tokens (the SID depth), so that truncation cuts where training cuts.
        bos: True or False; None follows the tokenizer.

    Raises:
        DataError: a prompt is empty, or does not fit even with no history.
    """
    if not prompts:
        return []
    encoder = encoder_of(tokenizer)
    # An empty SID stands in for the target, so that the truncation rule sees the same structure as in training.
    codes = encoder.codes([piece for prompt in prompts for piece in prompt])
    count = np.fromiter(map(len, prompts), np.int64, len(prompts))
    offsets = np.concatenate([[0], np.cumsum(count + 1)])
    with_target = np.full(offsets[-1], len(encoder.lengths), np.int64)
    learn = np.zeros(offsets[-1], bool)
    learn[offsets[1:] - 1] = True
    with_target[~learn] = codes
    view = copy.copy(encoder)
    view.starts, view.lengths = np.append(encoder.starts, 0), np.append(encoder.lengths, 0)
    view.sid = np.append(encoder.sid, True)
    token_offsets, ids, _, rows, _ = _encode(
        view, offsets, with_target, learn, max_length, bos_id(tokenizer, bos), reserve
    )
    if len(rows) < len(prompts):
        bad = int(np.setdiff1d(np.arange(len(prompts)), rows)[0])
        raise DataError(
            f"Prompt {bad} does not fit into {max_length} tokens even without history; raise max_length or lower the "
            "max_chars of the serializer."
        )
    if (np.diff(token_offsets) == 0).any():
        bad = int(np.flatnonzero(np.diff(token_offsets) == 0)[0])
        raise DataError(f"Prompt {bad} has no tokens, so nothing can follow it; let head.jinja render some text.")
    return [part.tolist() for part in np.split(ids, token_offsets[1:-1])]


def encode_examples(
    tokenizer: Any,
    dataset: Dataset,
    max_length: int | None = None,
    bos: bool | None = None,
    allowed_ids: Iterable[int] | None = None,
    counts: dict[str, int] | None = None,
) -> Dataset:
    """Encodes a data set of examples (columns task, pieces, learn, key) into columns input_ids, labels, task.

    Args:
        max_length: longest example in tokens, bos included. Oldest turns go first; head and last learned turn stay.
        bos: True or False; None follows the tokenizer.
        allowed_ids: added-token ids that text pieces may hold (`Serializer.literal_ids()`); None checks nothing.
        counts: filled with examples, examples_truncated_away, targets_dropped.

    Raises:
        DataError: a text piece encodes to an added token that is not allowed, or an example learns its very first
            token, which no model can predict.
    """
    encoder, first = encoder_of(tokenizer), bos_id(tokenizer, bos)
    guard = None if allowed_ids is None else _guard_ids(tokenizer, allowed_ids)
    tables, dropped, lost, digest = [], 0, 0, hashlib.blake2b(digest_size=8)
    for batch in dataset.with_format("arrow").iter(_ROWS_AT_A_TIME):
        pieces, learn, task = (batch.column(name).combine_chunks() for name in ("pieces", "learn", "task"))
        offsets = pieces.offsets.to_numpy().astype(np.int64)
        texts = pieces.flatten().dictionary_encode()
        distinct = texts.dictionary.to_pylist()
        known = encoder.codes(distinct)
        if guard is not None:
            _check_ids(encoder, distinct, known, guard)
        codes = known[texts.indices.to_numpy(zero_copy_only=False)]
        flags = learn.flatten().to_numpy(zero_copy_only=False)
        token_offsets, ids, labels, rows, gone = _encode(encoder, offsets - offsets[0], codes, flags, max_length, first)
        starts = token_offsets[:-1][np.diff(token_offsets) > 0]
        if (labels[starts] != IGNORE).any():
            raise DataError(
                "An example learns its very first token: its prompt is empty; let head.jinja render some text."
            )
        dropped, lost = dropped + len(offsets) - 1 - len(rows), lost + gone
        tables.append(_encoded_table(token_offsets, ids, labels, task.take(pa.array(rows))))
        for column in ("input_ids", "labels"):
            digest.update(tables[-1][column].chunk(0).offsets.buffers()[1])
            digest.update(tables[-1][column].chunk(0).values.buffers()[1])
    if dropped or lost:
        logger.info("encoding: %d examples dropped (too long), %d targets lost with dropped turns", dropped, lost)
    if counts is not None:
        counts.update(examples=len(dataset), examples_truncated_away=dropped, targets_dropped=lost)
    tables = tables or [_encoded_table(np.zeros(1, np.int64), [], [], pa.array([], pa.string()))]
    # The default fingerprint would pickle the whole table.
    return Dataset(pa.concat_tables(tables), fingerprint=digest.hexdigest())


def _encoded_table(offsets: np.ndarray, ids: Any, labels: Any, task: pa.Array) -> pa.Table:
    place = pa.array(offsets, pa.int32())
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(place, pa.array(np.asarray(ids), pa.int32())),
            "labels": pa.ListArray.from_arrays(place, pa.array(np.asarray(labels), pa.int64())),
            "task": task.cast(pa.string()),
        }
    )


def _guard_ids(tokenizer: Any, allowed: Iterable[int]) -> np.ndarray:
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return np.array(sorted(added - set(allowed) - {tokenizer.unk_token_id}), np.int64)


def _check_ids(encoder: PieceEncoder, pieces: list[str], codes: np.ndarray, guard: np.ndarray) -> None:
    text = codes[~encoder.sid[codes]]
    lengths = encoder.lengths[text]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    ids = encoder.flat[np.repeat(encoder.starts[text] - ends[:-1], lengths) + np.arange(ends[-1])]
    bad = np.flatnonzero(np.isin(ids, guard))
    if len(bad):
        piece = pieces[np.flatnonzero(~encoder.sid[codes])[np.searchsorted(ends, bad[0], side="right") - 1]]
        raise DataError(
            f"The text piece {piece[:80]!r} encodes to the added token {int(ids[bad[0]])}, which no template put "
            "there; build the examples again with a Serializer of this tokenizer."
        )
