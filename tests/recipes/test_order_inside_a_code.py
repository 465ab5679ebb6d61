"""Items of one SID stand by what the log before the split says of them, whatever kind of log it is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sidtune.data_builders.tables.store import load_folder
from sidtune.recipes.steps import build_data, extend_sids, learn_sids
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

NAMES = [f"i{n}" for n in range(30)]
OPTIONS = {"encoder": {"dims": 4, "min_df": 1}, "quantizer": {"level_sizes": [2, 2]}}


def log(folder: Path, actions: list[str]) -> tuple[Path, Counter]:
    """A folder of one log, and the actions before the test requests by hand: the last action of each user is held out."""
    draw = np.random.default_rng(0)
    events = [
        {"user_id": f"u{u}", "item_id": f"i{int(draw.integers(30) ** 2 // 30)}", "time": 10**9 + 1000 * k + u}
        for k in range(8)
        for u in range(12)
    ]
    for n, event in enumerate(events):
        event["action"] = actions[n % len(actions)]
    folder.mkdir()
    tables = {"items": [{"item_id": i, "title": f"pen {n % 3}"} for n, i in enumerate(NAMES)], "events": events}
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = build_data.Arguments(
        str(folder.with_name("data")), reader="sidtune", path=str(folder), split={"kind": "leave_one_out"}
    )
    build_data.main(made)
    data = load_folder(folder.with_name("data"))
    first = {}
    for split in ("valid", "test"):
        for row in data.requests[split].to_pylist():
            first[row["user_id"]] = min(row["time"], first.get(row["user_id"], row["time"]))
    counted = "click" if "click" in actions else "order" if "order" in actions else None
    return folder.with_name("data"), Counter(
        e["item_id"]
        for e in events
        if e["time"] < first.get(e["user_id"], 2 * 10**9) and counted in (None, e["action"])
    )


def assert_by_count(folder: Path, counts: Counter) -> None:
    sids = SemanticIds.from_pretrained(folder / "sids")
    assert dict(zip(sids.item_ids, sids.popularity, strict=True)) == {i: counts[i] for i in sids.item_ids}
    codes, offsets, rows = sids.paths()
    found = [[sids.item_ids[row] for row in rows[offsets[m] : offsets[m + 1]]] for m in range(len(codes))]
    assert found == [sorted(one, key=lambda i: (-counts[i], i)) for one in found]
    assert any(one != sorted(one) for one in found)  # another order than that by id


@pytest.mark.parametrize("actions", [["order"], ["click", "order"], ["like"], ["like", "cart"]])
def test_popularity_inside_a_code(tmp_path, actions):
    data, counts = log(tmp_path / "log", actions)
    learn_sids.main(learn_sids.Arguments(str(data), str(tmp_path / "sids"), learn_share=0.7, **OPTIONS))
    assert_by_count(tmp_path / "sids", counts)
    extend_sids.main(
        extend_sids.Arguments(
            str(tmp_path / "sids"), str(data), str(tmp_path / "more"), existing="skip", held_out_share=0
        )
    )
    assert_by_count(tmp_path / "more", counts)
