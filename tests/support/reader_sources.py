"""A small source for each reader, and one whose unknown feedback is null."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_folders import changed, sound_rows, write_jsonl
from source_folders import jd, kuai, letter, lines, office, qrels

from sidtune.data_builders.registry import READERS
from sidtune.data_builders.tables.schema import Tables

Make = Callable[..., Path]
OFFICE = {"valid": [("u", [1], 2), ("u", [1, 2], 3), ("v", [4, 5], 6)], "test": [("u", [2, 3], 4)]}
JD = "q\t1_2\t0.0_1.0\tx_y_-1\t1_2_3\tCLICK_ORD_FLW\t0_5_5_10"


def own(folder: Path, twice: bool = False, user: str = "u0") -> Path:
    rows = changed(sound_rows(), "requests", 3, user_id=user)
    rows = changed(rows, "events", 3, user_id=user, request_id=None)
    if user != "u0":
        rows["users"].append({"user_id": user, "profile": None})
    if twice:
        rows["events"].insert(5, rows["events"][4])
        rows["requests"].insert(5, rows["requests"][4])
    return write_jsonl(folder, rows)


def hub(folder: Path, twice: bool = False, user: str = "u0") -> Path:
    folder.mkdir()
    lines(folder / "items.jsonl", sound_rows()["items"])
    events = [
        {"user_id": user if n % 2 else "v", "item_id": f"i{n % 4}", "time": n, "action": "order"} for n in range(6)
    ]
    lines(folder / "events.jsonl", events + events[3:4] * twice)
    return folder


def amazon_2023(folder: Path, twice: bool = False, user: str = "u0") -> Path:
    folder.mkdir()
    meta = [{"parent_asin": f"000{n}", "title": f"t{n}", "description": [f"<p>d{n}</p>", "more"]} for n in range(3)]
    reviews = [
        {"user_id": user, "parent_asin": f"000{n % 3}", "timestamp": 1_588_615_855_070 + 10**6 * n} for n in range(5)
    ]
    lines(folder / "meta_X.jsonl", meta)
    lines(folder / "X.jsonl", reviews + reviews[1:2] * twice)
    return folder


def movielens(folder: Path, twice: bool = False, user: str = "u0") -> Path:
    folder.mkdir()
    ratings = [f"{user}\tm{n % 2}\t{3 + n}\t{100 + n}" for n in range(2)]
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    lines(folder / "x.inter", [head, *ratings, *ratings[:1] * twice])
    lines(folder / "x.item", ["item_id:token\tmovie_title:token_seq", "m0\tA (1999)", "m1\tB"])
    lines(folder / "x.user", ["user_id:token\tage:token", f"{user}\t30"])
    return folder


SOURCES: dict[str, Make] = {
    "sidtune": own,
    "hub": hub,
    "amazon_2023": amazon_2023,
    "movielens": movielens,
    "amazon_sid": lambda f, twice=False, user="u": office(
        f, {**OFFICE, "valid": [(user, [1], 2)] * (1 + twice) + OFFICE["valid"][1:]}
    ),
    "letter": lambda f, twice=False, user="u": letter(f, {user: [1, 2, 3, 1], "v": [2, 1]}),
    "kuaisearch": lambda f, twice=False, user="u": kuai(f),
    "jdsearch": lambda f, twice=False, user="u": jd(f, [JD.replace("1_2_3", "1_1_3").replace("x_y", "x_x").replace(
        "CLICK_ORD", "CLICK_CLICK").replace("0_5_5", "0_0_5") if twice else JD]),
    "amazon_search": lambda f, twice=False, user="u": qrels(
        f, f"{user}_0 0 i1 1\n" * (1 + twice) + "w_1 0 i2 1\n", "w_0 0 i1 1\n"
    ),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "hub": {"items": {"data_files": "items.jsonl"}, "events": {"data_files": "events.jsonl"}}
}


def read(name: str, folder: Path) -> Tables:
    return READERS.get(name)(str(folder), **OPTIONS.get(name, {}))


# What a source that states no negative feedback may say: nothing is 0, whatever is null or absent in it.
def unknown(name: str, folder: Path) -> Path:
    if name == "sidtune":
        rows = sound_rows()
        for request in rows["requests"]:
            request["candidates"] = [{**c, "click": None, "order": None} for c in request["candidates"]]
        return write_jsonl(folder, rows)
    if name == "kuaisearch":
        key = {"user_id": 1, "session_id": 7, "time_index": 50, "query": "hat", "split": "train"}
        shown = {**key, "impressed_item_ids": [1, 2], "clicked_item_ids": None, "purchased_item_ids": None}
        alone = {**key, "time_index": 60, "target_item_id": 2, "is_clicked": None}
        return kuai(folder, recall=[shown], rank=[alone])
    if name == "jdsearch":
        return jd(folder, [JD.replace("0.0_1.0", "1.0_3.0")])
    return SOURCES[name](folder)
