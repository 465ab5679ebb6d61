"""Sources as strangers write them, over all readers: unknown feedback, repeated rows, byte-order marks, control characters."""

from __future__ import annotations

import codecs
import gzip
import json

import pytest
from reader_sources import OPTIONS, SOURCES, amazon_2023, read, unknown
from source_folders import lines, qrels

from sidtune.core.errors import DataError
from sidtune.data_builders.registry import READERS
from sidtune.data_builders.tables.schema import Tables
from sidtune.data_builders.tables.validate import check_tables


def test_every_reader_has_a_source_here():
    assert {*SOURCES, "shop_world"} == set(READERS)


def labels(tables: Tables) -> set[tuple]:
    rows = tables.requests.to_pylist()
    return {(name, c[name]) for row in rows for c in row["candidates"] for name in ("click", "like", "order")}


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
