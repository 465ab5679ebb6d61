"""Lists that other programs wrote: a byte-order mark and Windows line ends are no part of an id, and only newlines end one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sidtune.core.errors import DataError
from sidtune.decoding.serving.stock import read_item_ids
from sidtune.tokenizers.encoders.base import make_encoder
from sidtune.tokenizers.keywords.pool import KeywordPool
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

IDS = ["007", "a\u2028b", "c\x85d", "e\x0bf", "None", "ü 1"]


def precomputed(path, ids=IDS):
    np.save(path.with_name("v.npy"), np.eye(len(ids), 8))
    options = {"path": str(path.with_name("v.npy")), "align": "ids", "ids_path": str(path)}
    found = make_encoder("precomputed", options).encode([""] * len(ids), ids)
    assert found.argmax(axis=1).tolist() == list(range(len(ids)))
    return ids


READERS = {
    "precomputed.txt": ("\n".join(IDS) + "\n", precomputed),
    "precomputed.json": (json.dumps(IDS, ensure_ascii=False, indent=1), precomputed),
    "stock.txt": ("\n".join(IDS), read_item_ids),
    "keywords.tsv": (
        "".join(f"{i}\tbrand\n" for i in IDS),
        lambda path: [IDS[n] for n, _ in enumerate(KeywordPool.from_tsv(path).keywords)],
    ),
    "index.json": (
        json.dumps({i: [f"<a_{n}>"] for n, i in enumerate(IDS)}, ensure_ascii=False, indent=1),
        lambda path: SemanticIds.from_index_json(path).item_ids,
    ),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("mark", "end"), [(b"", "\n"), (b"\xef\xbb\xbf", "\n"), (b"", "\r\n"), (b"\xef\xbb\xbf", "\r\n")]
)
def test_marks_and_line_ends_are_no_part_of_an_id(tmp_path, name, mark, end):
    text, read = READERS[name]
    (tmp_path / name).write_bytes(mark + text.replace("\n", end).encode())
    assert read(tmp_path / name) == IDS


@pytest.mark.parametrize("name", READERS)
def test_other_bytes_and_folders_are_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"a\xff\n")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / name, tmp_path / "folder", tmp_path / f"no_{name}"):
        with pytest.raises(DataError) as told:
            READERS[name][1](path)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("one", [None, {"id": 1}, ["a"], 1.5, True])
def test_a_list_of_ids_holds_ids(tmp_path, one):
    (tmp_path / "ids.json").write_text(json.dumps(["a", one]))
    with pytest.raises(DataError, match="JSON list of item ids"):
        precomputed(tmp_path / "ids.json", ["a", str(one)])
