"""Pieces → ids: the array code against a plain loop, for every length limit."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import text_tokenizers as made
from hypothesis import given, settings
from hypothesis import strategies as st

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.prompts.encoding import (
    IGNORE,
    encode_examples,
    encode_prompts,
    is_sid,
)
from sidtune.data_builders.tasks.behaviour import to_dataset

TEXTS = ["user", "\nred shoes:", "", " water bottle<|endoftext|>", "search: x y z 1 2 3:"]
SIDS = ["<a_1><b_2><c_3>", "<a_0>", "<a_4><b_2>"]


def brute(tokenizer, pieces, learn, max_length, bos):
    """Drops the oldest (text, SID) pair after the head while too long, never the last learned piece."""
    pieces, learn = list(pieces), list(learn)
    if True not in learn:
        return None
    head = [tokenizer.bos_token_id] if bos else []
    turns = len(pieces) % 2 == 1 and all(is_sid(p) == (n > 0 and n % 2 == 0) for n, p in enumerate(pieces))

    def total():
        return len(head) + sum(len(tokenizer.encode(p, add_special_tokens=False)) for p in pieces)

    while max_length is not None and total() > max_length:
        if not turns or len(pieces) - 1 - learn[::-1].index(True) <= 2:
            return None
        del pieces[1:3], learn[1:3]
    ids, labels = list(head), [IGNORE] * len(head)
    for piece, flag in zip(pieces, learn, strict=True):
        part = tokenizer.encode(piece, add_special_tokens=False)
        ids += part
        labels += part if flag else [IGNORE] * len(part)
    return {"input_ids": ids, "labels": labels}


def example():
    turns = st.lists(st.tuples(st.sampled_from(TEXTS), st.sampled_from(SIDS)), min_size=1, max_size=6).map(
        lambda t: ["user", *(piece for pair in t for piece in pair)]
    )
    other = st.lists(st.sampled_from(TEXTS + SIDS), min_size=1, max_size=6).map(lambda t: ["user", *t])
    return st.one_of(turns, other).flatmap(
        lambda p: st.tuples(st.just(p), st.lists(st.booleans(), min_size=len(p) - 1, max_size=len(p) - 1))
    ).map(lambda t: (t[0], [False, *t[1]]))  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(example(), min_size=1, max_size=6), st.sampled_from([None, 1, 8, 12, 20, 30]), st.booleans())
def test_batches_and_single_examples_equal_a_plain_loop(examples, max_length, bos):
    tokenizer = made.odd()
    wanted = [brute(tokenizer, pieces, learn, max_length, bos) for pieces, learn in examples]
    counts = {}
    got = encode_examples(tokenizer, dataset(examples), max_length=max_length, bos=bos, counts=counts)
    assert got.remove_columns("task").to_list() == [row for row in wanted if row]
    assert got.column_names == ["input_ids", "labels", "task"]
    assert counts["examples_truncated_away"] == wanted.count(None)
    flags = sum(sum(learn) for (_, learn), row in zip(examples, wanted, strict=True) if row)
    kept = [brute_flags(tokenizer, *e, max_length, bos) for e, row in zip(examples, wanted, strict=True) if row]
    assert counts["targets_dropped"] == flags - sum(kept)


def brute_flags(tokenizer, pieces, learn, max_length, bos):
    for drop in range(0, len(pieces), 2):
        left = (pieces[:1] + pieces[1 + drop :], learn[:1] + learn[1 + drop :])
        total = bos + sum(len(tokenizer.encode(p, add_special_tokens=False)) for p in left[0])
        if max_length is None or total <= max_length:
            return sum(left[1])
    raise AssertionError


def dataset(examples):
    pieces = [piece for row, _ in examples for piece in row]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row, _ in examples])])
    learn = np.array([flag for _, row in examples for flag in row], bool)
    keys = pa.array([str(n) for n in range(len(examples))], pa.string())
    return to_dataset("t", pa.array(pieces, pa.string()), offsets, np.arange(len(pieces)), learn, keys)


def test_shuffled_and_sliced_data_sets_encode_alike():
    tokenizer = made.byte_bpe()
    examples = [(["user", f"\nred {n}:", SIDS[n % 3]], [False, False, True]) for n in range(50)]
    full = encode_examples(tokenizer, dataset(examples)).to_list()
    assert encode_examples(tokenizer, dataset(examples).select([7, 3, 40])).to_list() == [full[n] for n in (7, 3, 40)]
    assert encode_examples(tokenizer, dataset(examples).select([])).to_list() == []


def test_bos_follows_the_tokenizer_unless_told():
    tokenizer = made.odd()
    bos = tokenizer.bos_token_id
    assert encode_prompts(tokenizer, [["user"]], bos=True)[0][0] == bos != encode_prompts(tokenizer, [["user"]])[0][0]
    from tokenizers.processors import TemplateProcessing

    adds = made.odd.__wrapped__()
    adds.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    assert encode_prompts(adds, [["user", "\nx:"]])[0].count(bos) == 1 == encode_prompts(adds, [["user"]])[0].count(bos)
    assert bos not in encode_prompts(adds, [["user"]], bos=False)[0]
    with pytest.raises(ConfigError, match="no bos token"):
        encode_prompts(made.byte_bpe(), [["user"]], bos=True)


def test_bad_input_is_refused():
    tokenizer = made.byte_bpe()
    with pytest.raises(DataError, match="no tokens"):
        encode_prompts(tokenizer, [["user"], ["", ""]])
    with pytest.raises(DataError, match="does not fit into 3 tokens"):
        encode_prompts(tokenizer, [["user", "\na long query of many words:"]], max_length=3)
    with pytest.raises(DataError, match="very first token"):
        encode_examples(tokenizer, dataset([(["", SIDS[0]], [False, True])]))
    assert encode_prompts(tokenizer, []) == []
    assert len(encode_examples(tokenizer, dataset([(["user"], [False])]))) == 0


def test_a_tokenizer_that_grew_is_read_again():
    tokenizer = made.byte_bpe.__wrapped__()
    before = encode_prompts(tokenizer, [["hotdog"]])[0]
    tokenizer.add_tokens(["hotdog"])
    assert encode_prompts(tokenizer, [["hotdog"]])[0] == [len(tokenizer) - 1] != before
