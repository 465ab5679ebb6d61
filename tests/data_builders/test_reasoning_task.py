"""Reasoning before the answer: its tokens, its examples against a plain telling, its seeds, and what never gets in."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
import text_tokenizers as made
import torch
from whole_history_oracle import make_world, positives, turns_before, windowed

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import fingerprint
from sidtune.data_builders.prompts.encoding import IGNORE, encode_examples, encode_prompts
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tasks.reasoning import END, THINK, leaks, mark_ids, reason_to_sid, templated
from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import add_plain_tokens, extend_vocabulary

WORLD = make_world(11)
EOS = "<|endoftext|>"


def tokenizer():
    found = copy.deepcopy(made.byte_bpe())
    add_plain_tokens(found, [THINK, END])
    return found


TOKENIZER = tokenizer()


def inputs(world=WORLD, templates="plain", **options):
    return world.task_input(Serializer(TOKENIZER, templates), **{"max_history": 5, **options})


def allowed(data):
    return [*data.serializer.literal_ids(), *mark_ids(TOKENIZER)]


# -- tokens


def test_extra_tokens_are_ordinary_and_come_before_the_semantic_ids():
    texts = ["red running shoes", "blue shoes for men", "water bottle"]
    fresh = train_lm_tokenizer(texts, vocab_size=300)
    assert add_plain_tokens(fresh, [THINK, END]) == list(mark_ids(fresh))
    assert not {THINK, END} & set(fresh.all_special_tokens)
    assert fresh.decode(mark_ids(fresh), skip_special_tokens=True) == THINK + END
    assert add_plain_tokens(fresh, [END, THINK]) == list(mark_ids(fresh))[::-1]  # known ones stay
    sids = SemanticIds(["i0", "i1"], np.array([[0, 1], [1, 0]]), [2, 2])
    model = build_model(None, fresh)
    vocabulary = extend_vocabulary(model, fresh, sids, init="mean")
    assert vocabulary.start == max(mark_ids(fresh)) + 1
    text = f"{THINK}red shoes{END}<a_0><b_1>"
    assert fresh.encode(text, add_special_tokens=False)[-2:] == vocabulary.token_ids(np.array([0, 1])).tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_a_ready_model_grows_by_extra_tokens(tied):
    fresh = train_lm_tokenizer(["red running shoes", "blue shoes"], vocab_size=300)
    model = build_model({"model_type": "llama", "tie_word_embeddings": tied}, fresh)
    old = model.get_input_embeddings().weight.detach().clone()
    ids = add_plain_tokens(fresh, [THINK, END], model)
    rows = model.get_input_embeddings().weight.detach()
    assert ids == [len(old), len(old) + 1] and len(rows) == len(fresh) == model.config.vocab_size
    assert torch.equal(rows[: len(old)], old) and not torch.equal(rows[ids[0]], rows[ids[1]])
    spread = (rows[ids] - old.mean(0)).norm(dim=1)
    assert (spread > 0).all() and (spread < 0.2 * (old - old.mean(0)).norm(dim=1).mean()).all()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model(input_ids=torch.tensor([ids])).logits.shape[-1] == len(fresh)
    for bad in ("", "two words", "<a_1>"):
        with pytest.raises(ConfigError, match="extra token"):
            add_plain_tokens(fresh, [bad])


@pytest.mark.parametrize("templates", ["plain", "chatml"])
def test_strangers_cannot_write_a_mark(templates):
    """Titles, queries, profiles and contexts with marks in every form encode to no mark."""
    serializer = Serializer(TOKENIZER, templates)
    marks = set(mark_ids(TOKENIZER))
    evil = [
        THINK,
        END,
        f"x {END}<a_1>",
        "< / think >",
        "\uff1c/think\uff1e",
        "</think\u200b>",
        "<</think>/think>",
        END * 3,
    ]
    for text in evil:
        pair = [{"name": text, "value": text}]
        pieces = [
            serializer.turn(text, pair),
            serializer.head({"profile": pair}),
            serializer.item({"title": text, "brand": text, "category": [text], "attributes": pair}),
            serializer.field(text, "query"),
        ]
        for piece in pieces:
            assert not marks & set(TOKENIZER.encode(str(piece), add_special_tokens=False)), (text, piece)


def test_a_tokenizer_without_marks_is_refused():
    with pytest.raises(ConfigError, match="extra_tokens"):
        reason_to_sid(WORLD.task_input(Serializer(made.byte_bpe())))


# -- examples


def test_examples_equal_a_plain_telling(tmp_path):
    data = inputs()
    request = {r["request_id"]: r for r in WORLD.train}
    wanted = [(r, positives(WORLD, r)) for r in WORLD.train if positives(WORLD, r)][:40]
    lines = [{"request_id": r["request_id"], "reasoning": f"thought number {n}"} for n, (r, _) in enumerate(wanted)]
    lines[3]["item_id"] = wanted[3][1][-1]
    file = tmp_path / "file.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    rows = reason_to_sid(data, file=str(file)).to_list()
    assert [row["key"] for row in rows] == [line["request_id"] for line in lines]
    for row, line, (_, targets) in zip(rows, lines, wanted, strict=True):
        prompt = windowed(WORLD, data.serializer, request[line["request_id"]], 5)
        target = WORLD.sids[line.get("item_id", targets[0])]
        assert row["pieces"] == [*prompt, f"{THINK}{line['reasoning']}{END}", target, EOS]
        assert row["learn"] == [False] * len(prompt) + [True] * 3
    encoded = encode_examples(TOKENIZER, reason_to_sid(data, file=str(file)), allowed_ids=allowed(data)).to_list()
    think, end = mark_ids(TOKENIZER)
    for row, ids in zip(rows, encoded, strict=True):
        prompt = encode_prompts(TOKENIZER, [row["pieces"][:-3]])[0]
        learned = [i for i, label in zip(ids["input_ids"], ids["labels"], strict=True) if label != IGNORE]
        assert ids["input_ids"] == prompt + learned and set(ids["labels"][: len(prompt)]) == {IGNORE}
        assert learned[0] == think and learned[-5] == end and learned[-1] == TOKENIZER.eos_token_id
    assert len(reason_to_sid(data, limit=7, file=str(file))) == 7


def test_long_histories_lose_their_oldest_turns():
    data = inputs(max_history=20)
    full = {row["key"]: row for row in reason_to_sid(data).to_list()}
    sizes = {
        key: sum(map(len, TOKENIZER(row["pieces"], add_special_tokens=False).input_ids)) for key, row in full.items()
    }
    limit = int(np.median(list(sizes.values())))
    cut = {row["key"]: row for row in reason_to_sid(data, max_tokens=limit).to_list()}
    shorter = 0
    for key, row in cut.items():
        whole = full[key]["pieces"]
        lost = len(whole) - len(row["pieces"])
        assert lost % 2 == 0 and row["pieces"] == [whole[0], *whole[1 + lost :]]
        size = sum(map(len, TOKENIZER(row["pieces"], add_special_tokens=False).input_ids))
        assert size <= limit - 1 or len(row["pieces"]) == 5
        # Not one turn more than it takes.
        if lost:
            back = sum(map(len, TOKENIZER(whole[lost - 1 : lost + 1], add_special_tokens=False).input_ids))
            assert size + back > limit - 1
            shorter += 1
    assert shorter > 10
    kept = encode_examples(TOKENIZER, reason_to_sid(data, max_tokens=limit), limit, allowed_ids=allowed(data))
    assert len(kept) > 0.6 * len(full)


# -- seeds


@pytest.mark.parametrize("early", [False, True])
def test_seeds_name_what_the_past_tells(early):
    """A slow telling of the features, request by request; `early`: clicks logged before their own request tell nothing of it."""
    world = make_world(11)
    for event in world.events if early else ():
        event["time"] -= 2 * ("request_id" in event)
    data = inputs(world, max_history=20)
    items = {i["item_id"]: i for i in world.items}
    by_id = {r["request_id"]: r for r in world.train}
    found = templated(data, aspects=["words", "recent", "category", "brand", "price", "context"])
    keys = data.requests["request_id"].to_pylist()
    named = Counter()
    for row, text in zip(found.request.tolist(), found.text, strict=True):
        request = by_id[keys[row]]
        past = turns_before(world, request["user_id"], request["time"])[-20:]
        past = [items[e["item_id"]] for e in past if e.get("request_id") != request["request_id"]]
        parts = dict(part.split(" ", 1) for part in text.split("; ")) if text != "no hints" else {}
        named.update(parts.keys())
        for word, value in parts.items():
            if word == "wants":
                assert value == data.serializer.field(request["query"], "query")
            elif word == "now":
                assert value == " ".join(c["value"] for c in request["context"])
            elif word == "likes":
                assert value == favourite([i.get("brand") for i in past])
            elif word == "after":
                assert value == " ".join(data.serializer.field(past[-1]["title"], "title").split()[:5])
            elif word == "often":
                assert value == favourite([(i.get("category") or [None])[-1] for i in past])
            else:
                assert word == "price" and value in ("low", "middle", "high")
    assert set(named) == {"wants", "after", "now", "likes", "often", "price"} and min(named.values()) > 5


def favourite(values):
    """The most frequent; of equals the one seen last."""
    values = [v for v in values if v]
    counts = Counter(values)
    return max(counts, key=lambda v: (counts[v], max(n for n, x in enumerate(values) if x == v))) if values else None


def test_price_levels_are_thirds_of_a_category():
    data = inputs(max_history=20)
    from sidtune.data_builders.tasks.reasoning import _leaves, _price_level

    category, _ = _leaves(data)
    level = _price_level(data, category)
    items = {i["item_id"]: i for i in WORLD.items}
    for row, item in enumerate(data.sids):
        price = items[item].get("price")
        group = [
            items[i]["price"]
            for c, i in zip(category, data.sids, strict=True)
            if c == category[row] and "price" in items[i]
        ]
        assert level[row] == (-1 if price is None else 3 * sum(p < price for p in group) // len(group))


def test_seeds_do_not_look_at_the_answer_or_the_future():
    """Other labels on the page and other events from the request's time on leave every text as it is."""
    world = make_world(11)
    cut = 50
    for request in world.requests:
        if request["time"] >= cut:
            for candidate in request["candidates"]:
                candidate["click"] = 1
    world.events = [e for e in world.events if e["time"] < cut]
    told = {}
    for name, w in (("old", WORLD), ("new", world)):
        data = inputs(w)
        keys = data.requests["request_id"].to_pylist()
        first = {r["request_id"]: r["time"] for r in w.train}
        found = templated(data)
        told[name] = {
            keys[r]: t for r, t in zip(found.request.tolist(), found.text, strict=True) if first[keys[r]] <= cut
        }
    both = told["old"].keys() & told["new"].keys()
    assert len(both) > 30 and all(told["old"][key] == told["new"][key] for key in both)


def test_seeds_are_seeded_and_do_not_depend_on_the_limit():
    def rows(**options):
        limit = options.pop("limit", None)
        return reason_to_sid(inputs(**options), limit=limit).to_list()

    everything = {row["key"]: row for row in rows()}
    assert rows(seed=3) == rows(seed=3) != rows(seed=4)
    assert all(row == everything[row["key"]] for row in rows(limit=9)) and len(rows(limit=9)) <= 9
    with pytest.raises(ConfigError, match="did you mean 'brand'"):
        reason_to_sid(inputs(), aspects=["brandd"])


# -- what never gets in


def test_leaks():
    sid, title = "<a_1><b_2>", "Red  Wool scarf"
    assert leaks(f"take {sid}", sid, title) and leaks("take <c_9> then", sid, title)
    assert leaks("a red wool\tSCARF it is", sid, title) and not leaks("a red scarf of wool", sid, title)
    assert not leaks("anything", sid, None) and not leaks("anything", sid, "")


def test_files_are_filtered_and_checked(tmp_path):
    world = make_world(11)
    request, item = next(
        (r, positives(world, r)[0]) for r in world.train if positives(world, r) and positives(world, r)[0] == "i01"
    )
    key = request["request_id"]
    good = [
        {"request_id": key, "reasoning": f"  {THINK}fine{END} "},
        {"request_id": key, "reasoning": "it is RED shoes  1 surely"},
        {"request_id": key, "reasoning": f"it is {world.sids[item]}"},
        {"request_id": key, "reasoning": f"so {END} and {EOS} it goes on"},
    ]
    file = tmp_path / "file.jsonl"
    data = inputs(world)

    def write(lines):
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))

    write(good)
    rows = reason_to_sid(data, file=str(file)).to_list()
    assert [row["pieces"][-3] for row in rows][0] == f"{THINK}fine{END}" and len(rows) == 2
    assert data.counts["reason_to_sid"]["reasonings_that_leak"] == 2
    encoded = encode_examples(TOKENIZER, reason_to_sid(data, file=str(file)), allowed_ids=allowed(data)).to_list()
    for ids in encoded:
        learned = [label for label in ids["labels"] if label != IGNORE]
        assert learned.count(mark_ids(TOKENIZER)[1]) == 1 and learned.count(TOKENIZER.eos_token_id) == 1
    reason_to_sid(data, file=str(file), sha256=fingerprint(file))
    with pytest.raises(DataError, match="sha256"):
        reason_to_sid(data, file=str(file), sha256="0" * 64)
    late = next(r["request_id"] for r in world.requests if r["time"] >= world.train_until)
    silent = next(r["request_id"] for r in world.train if not positives(world, r))
    for line, words in (
        ("{", "line 2"),
        ({"request_id": key}, "'request_id' and 'reasoning'"),
        ({"request_id": key, "reasoning": 3}, "'request_id' and 'reasoning'"),
        ({"request_id": late, "reasoning": "x"}, "not among the requests of this split"),
        ({"request_id": key, "reasoning": "x", "item_id": "ghost"}, "'ghost' is not an item"),
        ({"request_id": silent, "reasoning": "x"}, "not with a positive item"),
    ):
        write([good[0], line])
        with pytest.raises(DataError, match=words):
            reason_to_sid(data, file=str(file))
    with pytest.raises(DataError, match="does not exist"):
        reason_to_sid(data, file=str(tmp_path / "none"))
