"""Each task against a plain-Python telling of it, and what all of them promise: format, seed, limit, counts."""

from __future__ import annotations

import inspect

import pytest
import text_tokenizers as made
from whole_history_oracle import make_world, positives

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.prompts.encoding import IGNORE, encode_examples, is_sid
from sidtune.data_builders.prompts.sanitizer import Sanitizer
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.schema import table_from_rows
from sidtune.data_builders.tasks.alignment import query_to_sid
from sidtune.data_builders.tasks.registry import TASKS

pytestmark = pytest.mark.medium

EOS = "<|endoftext|>"
WORLD = make_world(11)
GENERAL = [
    task for task in TASKS if task != "reason_to_sid"
]  # that one needs tokens of its own: test_reasoning_task.py


def inputs(templates="plain", world=WORLD, **options):
    return world.task_input(Serializer(made.byte_bpe(), templates), **options)


def rows(task, data, **options):
    return TASKS.get(task)(data, **options).to_list()


def catalogue(*needed):
    return [i for i in WORLD.items if i["item_id"] in WORLD.sids and all(i.get(name) for name in needed)]


def targets():
    """(request, item row) of each train request with a query and a positive."""
    items = {i["item_id"]: i for i in WORLD.items}
    found = [(r, positives(WORLD, r)) for r in WORLD.train if r["query"]]
    return [(r, items[p[0]]) for r, p in found if p]


def test_item_tasks_equal_the_oracle():
    data = inputs()
    s, sid = data.serializer, WORLD.sids
    fields = [{k: v for k, v in i.items() if k != "item_id"} for i in WORLD.items]
    text = {i["item_id"]: str(s.item(f)) for i, f in zip(WORLD.items, fields, strict=True)}
    bare = {i["item_id"]: str(s.item({**f, "category": None})) for i, f in zip(WORLD.items, fields, strict=True)}
    path = {i["item_id"]: " / ".join(i.get("category") or ()) for i in WORLD.items}
    wanted = {
        "item_to_sid": [
            (i["item_id"], [f"item: {text[i['item_id']]}:", sid[i["item_id"]]])
            for i in catalogue()
            if i.get("title") or i.get("brand") or i.get("category")
        ],
        "sid_to_item": [
            (i["item_id"], ["title of ", sid[i["item_id"]], ":", f" {i['title']}{EOS}"]) for i in catalogue("title")
        ],
        "sid_to_category": [
            (i["item_id"], ["category of ", sid[i["item_id"]], ":", f" {path[i['item_id']]}{EOS}"])
            for i in catalogue("category")
        ],
        "text_to_category": [
            (i["item_id"], [f"category of {bare[i['item_id']]}:", f" {path[i['item_id']]}{EOS}"])
            for i in catalogue("category")
            if i.get("title") or i.get("brand")
        ],
    }
    for task, examples in wanted.items():
        got = rows(task, data)
        assert [(row["key"], row["pieces"]) for row in got] == examples, task
        assert all(row["learn"] == [False] * (len(row["pieces"]) - 1) + [True] and row["task"] == task for row in got)
        assert data.counts[task] == {"items_without_sid": 1, "items_without_text": len(WORLD.sids) - len(examples)}


def test_query_tasks_equal_the_oracle():
    data = inputs()
    s, sid = data.serializer, WORLD.sids
    clean = {q: str(s.field(q, "query")) for q in ("red shoes", "blue t-shirt", "water bottle", "<a_1> mouse")}
    found = [(r["request_id"], clean[r["query"]], item) for r, item in targets()]
    wanted = {
        "query_to_sid": [(key, [f"search: {q}:", sid[item["item_id"]]]) for key, q, item in found],
        "query_to_item_text": [
            (key, [f"title for search {q}:", f" {item['title']}{EOS}"]) for key, q, item in found if item.get("title")
        ],
        "item_text_to_query": [
            (key, [f"search for {s.item(item)}:", f" {q}{EOS}"])
            for key, q, item in found
            if item.get("title") or item.get("brand") or item.get("category")
        ],
    }
    for task, examples in wanted.items():
        assert [(row["key"], row["pieces"]) for row in rows(task, data)] == examples, task
        assert len(examples) > 30
    asked = sum(1 for r in WORLD.train if positives(WORLD, r)) - len(found)
    assert data.counts["query_to_sid"] == {"requests_without_query": asked, "requests_without_text": 0}


@pytest.mark.parametrize("templates", ["plain", "chatml"])
@pytest.mark.parametrize("task", GENERAL)
def test_every_task_keeps_its_promises(task, templates):
    data = inputs(templates, max_history=5)
    examples = TASKS.get(task)(data)
    assert examples.column_names == ["task", "pieces", "learn", "key"] and len(examples) >= 10
    features = {name: str(feature) for name, feature in examples.features.items()}
    assert features == {
        "task": "Value('string')", "pieces": "List(Value('string'))", "learn": "List(Value('bool'))",
        "key": "Value('string')",
    }  # fmt: skip
    # Tokens in the encoded text: SIDs from SID pieces, the rest from templates, nothing from the field `<a_1> mouse`.
    tokenizer, serializer = data.serializer.tokenizer, data.serializer
    sids = set(tokenizer.convert_tokens_to_ids(made.sid_tokens()))
    allowed = set(serializer.literal_ids())
    sanitizer = Sanitizer(tokenizer)
    for row in examples:
        for piece, flag in zip(row["pieces"], row["learn"], strict=True):
            if not is_sid(piece):
                assert set(sanitizer.added(piece)) <= allowed
                assert piece.endswith(EOS) == flag
    encoded = encode_examples(tokenizer, examples, allowed_ids=allowed)
    assert len(encoded) == len(examples) and set(encoded["task"]) == {task}
    for row, ids in zip(examples, encoded, strict=True):
        assert sum(i in sids for i in ids["input_ids"]) == 3 * sum(map(is_sid, row["pieces"]))
        assert any(label != IGNORE for label in ids["labels"])


@pytest.mark.parametrize("task", GENERAL)
def test_limit_draws_a_seeded_sample_in_order(task):
    everything = rows(task, inputs())
    some = rows(task, inputs(seed=1), limit=6)
    assert some == rows(task, inputs(seed=1), limit=6) != rows(task, inputs(seed=2), limit=6)
    keys = [row["key"] for row in everything]
    places = [keys.index(row["key"]) for row in some]
    counted = {row["key"].split("/")[0] for row in some}  # a whole history has an example for each turn of a tie
    assert 0 < len(counted) <= 6 and places == sorted(places)
    assert all(row == everything[place] for row, place in zip(some, places, strict=True))
    assert rows(task, inputs(), limit=10**9) == everything
    with pytest.raises(ConfigError, match="limit"):
        TASKS.get(task)(inputs(), limit=-1)


@pytest.mark.parametrize("task", [name for name in TASKS if name not in ("whole_history", "reason_to_sid")])
def test_a_limit_counts_examples_not_the_rows_that_were_looked_at(task):
    total = len(rows(task, inputs()))
    for limit in (1, total // 2, total - 1, total):
        assert len(rows(task, inputs(seed=limit), limit=limit)) == limit


def test_every_task_has_the_same_first_arguments_and_a_docstring():
    for name in TASKS:
        parameters = list(inspect.signature(TASKS.get(name)).parameters.values())
        assert [p.name for p in parameters[:2]] == ["data", "limit"] and parameters[1].default is None
        assert TASKS.get(name).__name__ == name and TASKS.get(name).__doc__
    with pytest.raises(ConfigError, match="did you mean 'whole_history'"):
        TASKS.get("whole_histroy")


def test_null_labels_are_unknown_not_zero():
    base = {"user_id": "u0", "time": 1, "query": "red shoes"}
    kinds = [(None, None, None), (0, 0, 0), (None, None, 1), (1, None, 0)]
    requests = [
        {**base, "request_id": f"r{n}", "candidates": [{"item_id": "i00", "click": c, "like": li, "order": o}]}
        for n, (c, li, o) in enumerate(kinds)
    ]
    world = make_world(0)
    world.requests = [*requests, {**base, "request_id": "none"}, {**base, "request_id": "no", "candidates": []}]
    assert [row["key"] for row in query_to_sid(inputs(world=world))] == ["r2", "r3"]


def test_empty_tables_give_empty_examples_or_one_sentence():
    world = make_world(0)
    world.requests, world.events, world.users = [], [], []
    data = inputs(world=world)
    for task in GENERAL:
        if task == "whole_history":
            with pytest.raises(DataError, match="no target"):
                TASKS.get(task)(data)
        else:
            assert (len(TASKS.get(task)(data)) == 0) == (not task.startswith(("item_to", "sid_to", "text_to")))


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="max_history"):
        inputs(max_history=-1)
    world = make_world(0)
    world.sids = {**world.sids, "i03": "a_1"}
    with pytest.raises(DataError, match="item 'i03'"):
        inputs(world=world)


def test_unknown_items_and_users_are_counted_not_fatal():
    world = make_world(0)
    world.events.append({"user_id": "stranger", "item_id": "ghost", "time": 1, "action": "order"})
    data = inputs(world=world)
    lost = sum(e["item_id"] not in world.sids for e in world.events)
    assert len(TASKS.get("request_to_sid")(data)) > 10
    assert data.counts["history"] == {"events_without_sid": lost}
    ghosts = sum(
        c["item_id"] == "i19" and 1 in (c["click"], c["like"], c["order"]) for r in world.train for c in r["candidates"]
    )
    assert data.counts["requests"]["positives_without_sid"] == ghosts > 0


def test_fields_reach_the_prompt_sanitised():
    item = {"item_id": "i00", "title": "x <a_1><|im_end|>", "brand": "<|endoftext|>", "category": ["<b_2>"]}
    world = make_world(0)
    world.items[0] = item
    data = inputs("chatml", world=world)
    for task in ("item_to_sid", "sid_to_item", "sid_to_category", "text_to_category"):
        row = next(row for row in rows(task, data) if row["key"] == "i00")
        text = "".join(piece for piece in row["pieces"] if not is_sid(piece))
        assert "<a_1>" not in text and "<b_2>" not in text
        assert text.count(EOS) == (task != "item_to_sid") and text.count("<|im_end|>") == 1
    prompt = data.serializer.prompt("item_to_sid", **{k: item[k] for k in ("title", "brand")})
    assert all(map(data.serializer.sanitizer.agrees, prompt))


def test_tables_in_many_chunks_give_the_same_examples():
    import pyarrow as pa

    data = inputs()
    parts = {}
    for name in ("items", "users", "events", "requests"):
        table = getattr(data, name)
        parts[name] = pa.concat_tables([table.slice(n, 7) for n in range(0, max(1, table.num_rows), 7)])
    chunked = inputs()
    for name, table in parts.items():
        setattr(chunked, name, table)
    assert parts["events"]["time"].num_chunks > 3 and table_from_rows("events", WORLD.events).equals(data.events)
    for task in GENERAL:
        assert rows(task, chunked) == rows(task, data), task


def test_contexts_that_look_alike_to_a_careless_key_stay_apart():
    import pyarrow as pa

    from sidtune.data_builders.tasks.input import render_turns

    s = inputs().serializer
    pairs = [
        [("a", "b"), ("c", "d")], [("a", "b\x1ec\x1fd")], [("a\x1fb", "c")], [("a", "b")], [("ab", "c")], [], None,
        [("a", None)], [(None, "b")], [("a", "b"), ("c", "d")],
    ]  # fmt: skip
    contexts = [None if p is None else [{"name": n, "value": v} for n, v in p] for p in pairs]
    table = table_from_rows("requests", [{"context": c, "query": "q"} for c in contexts])
    codes, texts = render_turns(s, table["query"].combine_chunks(), table["context"].combine_chunks())
    assert [str(texts[code]) for code in codes] == [str(s.turn("q", c)) for c in contexts]
    assert isinstance(table["context"].combine_chunks(), pa.ListArray) and len(set(codes.tolist())) >= 6
