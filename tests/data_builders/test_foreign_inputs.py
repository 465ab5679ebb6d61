"""Sources as strangers write them, over all readers: unknown feedback, repeated rows, byte-order marks, control characters."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_folders import changed, sound_rows, write_jsonl
from source_folders import jd, kuai, letter, lines, office, qrels

from sidtune.core.errors import DataError
from sidtune.data_builders.registry import READERS
from sidtune.data_builders.tables.schema import Tables
from sidtune.data_builders.tables.validate import check_tables

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


def test_every_reader_has_a_source_here():
    assert {*SOURCES, "shop_world"} == set(READERS)


def labels(tables: Tables) -> set[tuple]:
    rows = tables.requests.to_pylist()
    return {(name, c[name]) for row in rows for c in row["candidates"] for name in ("click", "like", "order")}


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


@pytest.mark.parametrize("name", SOURCES)
def test_unknown_feedback_stays_unknown(name, tmp_path):
    tables = READERS.get(name)(str(unknown(name, tmp_path / "in")), **OPTIONS.get(name, {}))
    found = {label for label in labels(tables) if label[1] == 0}
    # jdsearch states an order for what is labelled 3 and none for 1; that is known.
    assert found == ({("order", 0)} if name == "jdsearch" else set())
    assert tables.requests.num_rows and ("click", None) in labels(tables) | (
        {("click", None)} if name == "jdsearch" else set()
    )


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "letter"])  # a sequence says that both happened
def test_repeated_rows_of_the_log_count_once(name, tmp_path):
    once, twice = read(name, SOURCES[name](tmp_path / "a")), read(name, SOURCES[name](tmp_path / "b", twice=True))
    dropped = {key: count for key, count in twice.counts.items() if key.startswith(("repeated", "duplicate")) and count}
    if name != "jdsearch":
        assert twice.events.equals(once.events) and twice.requests.equals(once.requests)
        assert twice.split_of_request == once.split_of_request
    assert dropped, twice.counts
    if any(key in ("repeated_events_dropped", "repeated_requests_dropped") for key in dropped):
        assert any("count once: 1 dropped." in note for note in twice.notes)
    if name != "kuaisearch":  # its sample repeats lines as it is
        assert not any(count for key, count in once.counts.items() if key.startswith("repeated"))


@pytest.mark.parametrize("name", SOURCES)
def test_byte_order_marks_and_windows_line_ends_change_nothing(name, tmp_path):
    plain, foreign = SOURCES[name](tmp_path / "a"), SOURCES[name](tmp_path / "b")
    for path in (one for one in foreign.rglob("*") if one.is_file()):
        packed = path.suffix == ".gz"
        raw = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        raw = codecs.BOM_UTF8 + raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        path.write_bytes(gzip.compress(raw) if packed else raw)
    one, two = read(name, plain), read(name, foreign)
    for table in ("items", "users", "requests", "events"):
        assert getattr(one, table).equals(getattr(two, table)), table


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in ("kuaisearch", "jdsearch")])  # make their ids
@pytest.mark.parametrize("strange", ["u\x01", "\x7fu", "u\u2028"])
def test_control_characters_in_ids_are_refused(name, strange, tmp_path):
    with pytest.raises(
        DataError, match="the user id .* holds a control character; remove it|expected 'USER_QUERY 0 ITEM 1'"
    ):
        check_tables(read(name, SOURCES[name](tmp_path / "in", user=strange)))


def test_a_null_character_inside_a_product_id_is_refused(tmp_path):
    folder = amazon_2023(tmp_path / "in")
    lines(folder / "X.jsonl", [{"user_id": "u", "parent_asin": "0\u00001", "timestamp": 10**12}])
    with pytest.raises(DataError, match="the item id '0.x001' holds a control character"):
        check_tables(read("amazon_2023", folder))


def test_numbers_as_relevance_other_than_one_are_no_purchases(tmp_path):
    with pytest.raises(DataError, match="line 1 'u_0 0 i1 0'"):
        read("amazon_search", qrels(tmp_path / "in", "u_0 0 i1 0\n", "w_0 0 i1 1\n"))


def test_amazon_2023_as_published(tmp_path):
    """Nested folders, packed files, lists of texts, nested fields, milliseconds, prices and pictures in both shapes."""
    folder = tmp_path / "in"
    for part in ("meta_categories", "review_categories"):
        (folder / "raw" / part).mkdir(parents=True)
    picture = {"thumb": "t.jpg", "large": "l.jpg", "hi_res": None}
    meta = [
        {"parent_asin": "0007420412", "title": "A &amp; <b>B</b>", "description": ["<p>one</p>", "two"], "price": 9.99,
         "store": "S", "main_category": "All Beauty", "categories": [], "images": [picture], "average_rating": 4.5,
         "details": {"Package": "7 x 5", "Ranks": {"Beauty": 3}}, "features": ["f"]},
        {"parent_asin": "B2", "title": "C", "description": [], "features": ["f1", "f2"], "price": "from 3.50",
         "categories": ["Beauty", "Hair"], "images": {"large": ["x.jpg"]}, "details": {}},
        {"parent_asin": "B2", "title": "again"},
    ]  # fmt: skip
    stamps = [1_588_615_855_070, 1_588_615_855_999, 1_588_615_857_000]
    rows = [{"user_id": "AE", "parent_asin": item, "asin": "other", "timestamp": ms, "verified_purchase": n != 1, "rating": 5.0}
            for n, (item, ms) in enumerate(zip(("0007420412", "B2", "B9"), stamps, strict=True))]  # fmt: skip
    lines(folder / "raw" / "meta_categories" / "meta_X.jsonl", meta)
    text = "".join(json.dumps(row) + "\n" for row in [*rows[::-1], rows[0]])
    (folder / "raw" / "review_categories" / "X.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    tables = READERS.get("amazon_2023")(str(folder))
    check_tables(tables)
    first, second, third = tables.items.to_pylist()
    assert (first["title"], first["description"], first["brand"], first["price"]) == ("A & B", "one two", "S", 9.99)
    assert (first["category"], first["image"]) == (["All Beauty"], "l.jpg")
    assert first["attributes"] == [{"name": "Package", "value": "7 x 5"}]
    assert (second["description"], second["category"], second["price"], second["image"]) == (
        "f1 f2", ["Beauty", "Hair"], None, "x.jpg"
    )  # fmt: skip
    assert third["item_id"] == "B9" and third["title"] is None
    events = [(e["item_id"], e["time"]) for e in tables.events.to_pylist()]
    assert events == [("B2", 1_588_615_855), ("0007420412", 1_588_615_855), ("B9", 1_588_615_857)]
    expected = {
        "duplicate_items_dropped": 1,
        "unknown_items_added": 1,
        "prices_without_number": 1,
        "repeated_events_dropped": 1,
    }
    assert {name: tables.counts[name] for name in expected} == expected and tables.requests.num_rows == 1
    fewer = READERS.get("amazon_2023")(str(folder), verified=True, action="click")
    assert fewer.counts["unverified_reviews_dropped"] == 1 and set(fewer.events["action"].to_pylist()) == {"click"}
    lines(
        folder / "raw" / "review_categories" / "Y.jsonl", [{"user_id": "AE", "parent_asin": "B2", "timestamp": "2020"}]
    )
    lines(folder / "raw" / "meta_categories" / "meta_Y.jsonl", [{"title": "no id"}])
    with pytest.raises(DataError, match="2 files like"):
        READERS.get("amazon_2023")(str(folder))
    with pytest.raises(DataError) as caught:
        READERS.get("amazon_2023")(str(folder), category="Y")
    assert "the product has no id" in str(caught.value) and "timestamp in milliseconds is missing or of" in str(
        caught.value
    )
