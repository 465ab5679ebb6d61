"""The step build_data: which split it makes, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from source_folders import letter, office, qrels

from sidtune.core.errors import ConfigError
from sidtune.recipes.steps import build_data


def source(reader: str, folder: Path) -> Path:
    if reader == "letter":
        return letter(folder, {"u": [1, 2, 3, 4], "v": [2, 1, 3]})
    if reader == "amazon_sid":
        return office(folder, {"valid": [("u", [1], 2), ("v", [1], 3)], "test": [("u", [1, 2], 3), ("v", [1, 3], 4)]})
    return qrels(folder, "u_0 0 i1 1\nw_1 0 i2 1\n", "w_0 0 i1 1\n")


PRESCRIBED = {
    "letter": "train 1, valid 2, test 2",
    "amazon_sid": "train 2, valid 0, test 2",
    "amazon_search": "train 2, valid 0, test 1",
}


@pytest.mark.parametrize("reader", PRESCRIBED)
def test_a_prescribed_split_is_kept_and_told(reader, tmp_path, capsys):
    path, out = source(reader, tmp_path / "in"), tmp_path / "out"
    build_data.main(build_data.Arguments(str(out), reader=reader, path=str(path)))
    assert f"  split source (as the source prescribes): {PRESCRIBED[reader]}\n" in capsys.readouterr().out
    meta = json.loads((out / "meta.json").read_text())
    assert meta["split"]["kind"] == "source"
    told = ", ".join(f"{part} {count}" for part, count in meta["rows"]["requests_by_split"].items())
    assert told == PRESCRIBED[reader]
    run = json.loads((out / "run.json").read_text())
    assert run["metrics"]["requests_by_split"] == meta["rows"]["requests_by_split"]


@pytest.mark.parametrize("reader", ["letter", "amazon_search", "jdsearch"])
@pytest.mark.parametrize("split", [{"kind": "global_time"}, {"valid_share": 0.2}, {"train_until": 3}])
def test_a_clock_is_refused_before_any_work_where_there_is_none(reader, split, tmp_path):
    with pytest.raises(ConfigError, match="The times of this source are no clock"):
        build_data.Arguments(str(tmp_path / "out"), reader=reader, path=str(tmp_path), split=split)


def test_a_clock_may_be_asked_for_where_there_is_one(tmp_path, capsys):
    path = source("amazon_sid", tmp_path / "in")
    split = {"kind": "global_time", "valid_share": 0.0, "test_share": 0.25}
    build_data.main(build_data.Arguments(str(tmp_path / "out"), reader="amazon_sid", path=str(path), split=split))
    assert "  split global_time (two moments for all users): train 3, valid 0, test 1\n" in capsys.readouterr().out
