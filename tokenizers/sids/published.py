"""Readers of semantic IDs that others published, so that their numbers can be reproduced with their own codes.

The `*.index.json` format of LETTER, LC-Rec and MiniOneRec: a JSON mapping of item id to a list of tokens `<a_60>`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import DataError
from sidtune.core.text import read_text
from sidtune.tokenizers.letters import LETTERS


def read_index_json(path: Path, letters: str | None = None) -> tuple[list[str], np.ndarray]:
    """Item ids in file order and the numbers (N, L) int32 of an `index.json` file.

    `letters`: one letter per level, default a, b, c, ...; levels that share a letter are numbered on (`<d_17><d_300>`).

    Raises:
        DataError: unreadable file, an item given twice, a value that is no list of tokens, levels that disagree.
    """
    pairs = _read_pairs(path)
    if not pairs:
        raise DataError(f"{path} holds no semantic IDs; the catalogue is empty.")
    ids = [item_id for item_id, _ in pairs]
    if twice := [item_id for item_id, count in Counter(ids).items() if count > 1]:
        raise DataError(f"{path} gives the item '{twice[0]}' more than once; keep one of its semantic IDs.")
    depth = len(pairs[0][1]) if isinstance(pairs[0][1], list) else 0
    for item_id, tokens in pairs:
        if not isinstance(tokens, list) or not 1 <= len(tokens) <= len(LETTERS) or len(tokens) != depth:
            raise DataError(
                f"{path}: item '{item_id}' has {tokens!r}, expected a list of {max(depth, 1)} tokens such as '<a_60>' "
                "like the first item."
            )
    if letters is not None and len(letters) != depth:
        raise DataError(
            f"{path} has {depth} tokens per item, the letters '{letters}' stand for {len(letters)}; fix one."
        )
    return ids, _codes(path, pairs, letters or LETTERS[:depth])


def _read_pairs(path: Path) -> list[tuple[str, Any]]:
    text = read_text(path, "semantic ID file")
    try:
        # Plain JSON keeps the last of two equal keys without a word, so the pairs are kept as they come.
        pairs = json.loads(text, object_pairs_hook=tuple)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"The semantic ID file {path} is not readable JSON ({error}); copy it again.") from None
    if not isinstance(pairs, tuple):
        raise DataError(f"{path} must be a JSON mapping of item id to tokens, it is a {type(pairs).__name__}.")
    return list(pairs)


def _codes(path: Path, pairs: list[tuple[str, Any]], expected_letters: str) -> np.ndarray:
    depth = len(expected_letters)
    try:
        tokens = pa.array([token for _, values in pairs for token in values], type=pa.string())
    except (pa.ArrowException, UnicodeEncodeError):
        raise DataError(f"{path} has tokens that are no text; each must look like '<a_60>'.") from None
    # At most nine digits, so that every number fits int32.
    found = pc.extract_regex(tokens, r"^<(?P<letter>[a-z])_(?P<code>0|[1-9][0-9]{0,8})>$")
    letters = pc.struct_field(found, "letter")
    expected = pa.array(np.tile(np.array(list(expected_letters), dtype=object), len(pairs)), type=pa.string())
    wrong = pc.index(pc.fill_null(pc.equal(letters, expected), False), False).as_py()
    if wrong >= 0:
        item_id, level = pairs[wrong // depth][0], wrong % depth
        raise DataError(
            f"{path}: token {level + 1} of item '{item_id}' is {tokens[wrong].as_py()!r}, expected "
            f"'<{expected_letters[level]}_N>'."
        )
    return pc.struct_field(found, "code").cast(pa.int32()).to_numpy(zero_copy_only=False).reshape(-1, depth)
