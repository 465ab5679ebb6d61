"""One pass over a history learns what the windowed copies learn: same targets, each once, same pieces, same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import text_tokenizers as made
from datasets import Dataset
from whole_history_oracle import make_world, pieces_of, positives, turns_before, windowed

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.prompts.encoding import IGNORE, encode_examples, encode_prompts
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.history import TimeCut
from sidtune.data_builders.tables.schema import table_from_rows
from sidtune.data_builders.tasks.behaviour import history_to_sid, prompt_for_requests, request_to_sid, whole_history

pytestmark = pytest.mark.medium

MANY = 10_000


def build(kind="byte_bpe", templates="plain", seed=0, **options):
    world = make_world(seed)
    serializer = Serializer(made.ALL[kind](), templates)
    return world, serializer, world.task_input(serializer, **{"max_history": MANY, **options})


def encoded(tokenizer, pieces, learn, max_length=None):
    """One example as the data set encodes it; None where it does not fit."""
    rows = Dataset.from_dict({"task": ["t"], "pieces": [pieces], "learn": [learn], "key": ["k"]})
    return next(iter(encode_examples(tokenizer, rows, max_length)), None)


def learned(example):
    """(pieces before, SID) of each learned target."""
    return [(tuple(example["pieces"][:n]), example["pieces"][n]) for n, flag in enumerate(example["learn"]) if flag]


@pytest.mark.parametrize("max_history", [0, 3, MANY])
@pytest.mark.parametrize("templates", ["plain", "chatml"])
def test_windowed_examples_equal_the_oracle(templates, max_history):
    world, serializer, data = build(templates=templates, max_history=max_history)
    examples = {row["key"]: row for row in request_to_sid(data)}
    wanted = {r["request_id"]: positives(world, r) for r in world.train}
    assert set(examples) == {key for key, items in wanted.items() if items}
    for request in world.train:
        if items := wanted[request["request_id"]]:
            row = examples[request["request_id"]]
            assert row["pieces"] == [*windowed(world, serializer, request, max_history), world.sids[items[0]]]
            assert row["learn"] == [False] * (len(row["pieces"]) - 1) + [True] and row["task"] == "request_to_sid"


def test_all_positives_gives_one_example_each():
    world, _, data = build()
    got = sorted((row["key"], row["pieces"][-1]) for row in request_to_sid(data, all_positives=True))
    assert got == sorted((r["request_id"], world.sids[i]) for r in world.train for i in positives(world, r))


def test_history_to_sid_withholds_the_request():
    world, serializer, data = build(max_history=5)
    rows = {row["key"]: row for row in history_to_sid(data)}
    for request in world.train:
        past = turns_before(world, request["user_id"], request["time"])
        items = positives(world, request)
        assert (request["request_id"] in rows) == bool(items and past)
        if items and past:
            pieces = pieces_of(world, serializer, request["user_id"], past[-5:])
            assert rows[request["request_id"]]["pieces"] == [*pieces, "", world.sids[items[0]]]


def fair_targets(world):
    """Oracle: (user, turn number, event) of turns before `train_until` that all earlier turns precede strictly."""
    train = {r["request_id"] for r in world.train}
    found = []
    for user in sorted({e["user_id"] for e in world.events}):
        turns = turns_before(world, user, world.train_until)
        for n, event in enumerate(turns):
            first = n == 0 or turns[n - 1]["time"] < event["time"]
            if first and (event.get("request_id") is None or event["request_id"] in train):
                found.append((user, n, event))
    return found


def apart_targets(world):
    """Oracle: (user, turns before the request, turn number, event) of train requests' first turns, and of turns without a
    request, that the pass cannot learn because something before them is not older than the request."""
    train, fair = {r["request_id"]: r for r in world.train}, {(user, n) for user, n, _ in fair_targets(world)}
    found = []
    for user in sorted({e["user_id"] for e in world.events}):
        turns = turns_before(world, user, world.train_until)
        for n, event in enumerate(turns):
            request = event.get("request_id")
            first = request is None or all(turn.get("request_id") != request for turn in turns[:n])
            if first and (user, n) not in fair and (request is None or request in train):
                asked = event["time"] if request is None else train[request]["time"]
                found.append((user, sum(turn["time"] < asked for turn in turns), n, event))
    return found


def in_the_pass(examples):
    return [row for row in examples if "+" not in row["key"]]


@pytest.mark.parametrize(
    "kind, templates", [("byte_bpe", "plain"), ("byte_bpe", "chatml"), ("metaspace", "plain"), ("odd", "plain")]
)
def test_whole_history_equals_the_windowed_examples(kind, templates):
    world, serializer, data = build(kind, templates)
    tokenizer = serializer.tokenizer
    examples = whole_history(data, max_turns=MANY, overlap=0)
    rows = {row["key"].rsplit("/", 1)[0]: row for row in in_the_pass(examples)}
    apart = {row["key"]: row for row in examples if "+" in row["key"]}
    for user, before, n, event in apart_targets(world):
        row, turns = apart.pop(f"{user}/0+{n}"), turns_before(world, user, world.train_until)
        assert row["pieces"] == pieces_of(world, serializer, user, [*turns[:before], event])
        assert row["learn"] == [False] * (2 * before + 2) + [True]
    assert not apart
    targets = {(user, n): event for user, n, event in fair_targets(world)}
    assert sum(sum(row["learn"]) for row in rows.values()) == len(targets)
    by_id = {r["request_id"]: r for r in world.train}
    compared = 0
    for (user, n), event in targets.items():
        row = rows[user]
        place = 2 * n + 2
        assert row["learn"][place] and row["pieces"][place] == world.sids[event["item_id"]]
        assert row["pieces"][: place - 1] == pieces_of(
            world, serializer, user, turns_before(world, user, event["time"])
        )
        request = by_id.get(event.get("request_id"))
        if request is None:
            continue
        assert event["item_id"] == positives(world, request)[0], "the strongest positive comes first"
        window = windowed(world, serializer, request, MANY)
        assert row["pieces"][:place] == window
        whole = encoded(tokenizer, row["pieces"], row["learn"])
        alone = encoded(tokenizer, [*window, row["pieces"][place]], [False] * len(window) + [True])
        size = len(alone["input_ids"])
        assert whole["input_ids"][:size] == alone["input_ids"]
        assert whole["labels"][size - 3 : size] == alone["labels"][-3:] == alone["input_ids"][-3:]
        assert set(alone["labels"][:-3]) == {IGNORE}
        assert encode_prompts(tokenizer, [window])[0] == alone["input_ids"][:-3]
        compared += 1
    assert compared > 50


@pytest.mark.parametrize("ties", [False, True])
def test_every_request_is_learned_exactly_once(ties):
    """Also of several purchases in one second, each with what lay before that second."""
    world = make_world(3, ties=ties, loose=False)
    assert bool(apart_targets(world)) == ties
    data = world.task_input(Serializer(made.byte_bpe()), max_history=MANY)
    windows = sorted(learned(row)[0] for row in request_to_sid(data))
    passes = sorted(target for row in whole_history(data, max_turns=MANY, overlap=0) for target in learned(row))
    assert windows == passes and len(passes) > 50


@pytest.mark.parametrize("max_turns, overlap", [(1, 0), (4, 0), (5, 2), (7, 6), (MANY, 3)])
def test_chunks_learn_every_target_once_and_stay_linear(max_turns, overlap):
    world, serializer, data = build(seed=1)
    chunks = whole_history(data, max_turns=max_turns, overlap=overlap)
    got, total = [], 0
    for row in in_the_pass(chunks):
        user, number = row["key"].rsplit("/", 1)
        turns = turns_before(world, user, world.train_until)
        full = pieces_of(world, serializer, user, turns)
        start = int(number)
        assert start % (max_turns - overlap) == 0
        assert row["pieces"] == [full[0], *full[1 + 2 * start :][: len(row["pieces"]) - 1]]
        count = (len(row["pieces"]) - 1) // 2
        assert 1 <= count <= max_turns and row["learn"][-1], "nothing follows the last target"
        assert not any(row["learn"][::2][1 : 1 + (overlap if start else 0)]), "the overlap is context only"
        got += [(user, start + (n - 2) // 2) for n, flag in enumerate(row["learn"]) if flag]
        total += count
    assert sorted(got) == sorted((user, n) for user, n, _ in fair_targets(world))
    apart = {row["key"]: row["pieces"] for row in chunks if "+" in row["key"]}
    for user, before, n, event in apart_targets(world):
        begin = max(0, before - max_turns + 1)
        turns = turns_before(world, user, world.train_until)[begin:before]
        assert apart.pop(f"{user}/{begin}+{n}") == pieces_of(world, serializer, user, [*turns, event])
    assert not apart and data.counts["whole_history"]["targets"] == len(got) + len(apart_targets(world))
    turns = sum(len(turns_before(world, user, world.train_until)) for user in {e["user_id"] for e in world.events})
    assert total <= turns * max_turns / (max_turns - overlap) + 1


@pytest.mark.parametrize("max_tokens", [60, 90, 200])
def test_chunks_by_tokens_lose_no_target(max_tokens):
    world, serializer, data = build(seed=2)
    world.events[0]["query"] = None
    examples = whole_history(data, max_turns=MANY, overlap=2, max_tokens=max_tokens)
    targets = sorted((k.split("/")[0], int(k.split("/")[1]) + n) for k, n in (
        (row["key"], (n - 2) // 2) for row in in_the_pass(examples) for n, flag in enumerate(row["learn"]) if flag
    ))  # fmt: skip
    assert targets == sorted((user, n) for user, n, _ in fair_targets(world))
    counts = {}
    rows = encode_examples(serializer.tokenizer, examples, max_length=max_tokens, counts=counts)
    assert counts == {"examples": len(examples), "examples_truncated_away": 0, "targets_dropped": 0}
    assert max(map(len, rows["input_ids"])) <= max_tokens
    assert sum(label != IGNORE for row in rows["labels"] for label in row) == 3 * len(targets + apart_targets(world))


def test_chunks_by_tokens_need_no_earlier_encoding():
    """A tokenizer that has encoded nothing yet gives the same chunks."""
    world, _, data = build(seed=2)
    fresh = world.task_input(Serializer(made.byte_bpe.__wrapped__()), max_history=MANY)
    assert whole_history(fresh, max_tokens=80).to_list() == whole_history(data, max_tokens=80).to_list()


def test_a_turn_that_never_fits_is_counted():
    _, _, data = build(seed=2)
    with pytest.raises(DataError, match="no target"):
        whole_history(data, max_tokens=5)
    small = whole_history(data, max_tokens=18, overlap=0)
    counts = data.counts["whole_history"]
    assert counts["turns_longer_than_max_tokens"] > 0
    world = make_world(2)
    wanted = len(fair_targets(world)) + len(apart_targets(world))
    assert counts["turns_longer_than_max_tokens"] + sum(sum(row["learn"]) for row in small) == wanted


def test_nothing_at_or_after_the_moment_matters():
    """Cutting every event from `train_until` on, or shuffling the log, changes no training example."""
    world, serializer, data = build(seed=4, max_history=6)
    before = {row["key"]: row for task in (whole_history, request_to_sid) for row in task(data)}
    late = [e for e in world.events if e["time"] >= world.train_until]
    world.events = [e for e in world.events if e["time"] < world.train_until]
    assert late
    again = world.task_input(serializer, max_history=6)
    assert {row["key"]: row for task in (whole_history, request_to_sid) for row in task(again)} == before
    request = max(world.train, key=lambda r: r["time"])
    kept = [e for e in world.events if e["time"] < request["time"]]
    assert len(kept) < len(world.events)
    table = table_from_rows("requests", [request])
    prompt = prompt_for_requests(again, table)
    world.events = kept
    assert prompt_for_requests(world.task_input(serializer, max_history=6), table) == prompt


def test_until_may_be_a_cut_per_user_or_the_last_train_request():
    world, serializer, data = build(seed=5)
    users = sorted({e["user_id"] for e in world.events})
    per_user = TimeCut(
        0,
        table_from_rows("users", [{"user_id": u} for u in users])["user_id"].combine_chunks(),
        np.full(len(users), 70),
    )
    rows = whole_history(data).to_list()
    assert whole_history(world.task_input(serializer, until=per_user)).to_list() == rows
    free = whole_history(world.task_input(serializer, until=None))
    last = {u: max((r["time"] for r in world.train if r["user_id"] == u), default=-1) for u in users}
    targets = fair_targets(world) + apart_targets(world)
    wanted = sum(event["time"] <= last[user] for user, *_, event in targets)
    assert sum(map(sum, free["learn"])) == wanted > 50


def test_a_late_action_on_a_train_request_is_not_learned_after_the_cut():
    """The order of a train request that came after the end of training, however it is tied."""
    world, serializer, data = build(seed=6)
    request = next(r for r in world.train if len(positives(world, r)) == 0)
    world.events.append(
        {
            "user_id": request["user_id"],
            "item_id": "i03",
            "time": 71,
            "action": "order",
            "request_id": request["request_id"],
        }
    )
    cut = TimeCut(world.train_until)
    free = world.task_input(serializer, until=None).__class__
    assert free is type(data)
    seen = whole_history(world.task_input(serializer, until=None)).to_list()
    capped = whole_history(world.task_input(serializer, until=None, cut=cut)).to_list()
    late = serializer.turn(request["query"], request["context"])
    asked = [(row["key"].split("/")[0], row["pieces"][-2:]) for row in seen]
    answer = (request["user_id"], [late, world.sids["i03"]])
    assert answer in asked and answer not in [(row["key"].split("/")[0], row["pieces"][-2:]) for row in capped]


def test_the_limit_counts_users_with_something_to_learn():
    world, serializer, _ = build(seed=7)
    keep = {user for user, *_ in fair_targets(world)}
    kept = sorted(keep)[: len(keep) // 2]
    world.requests = [r for r in world.requests if r["user_id"] in kept or r["time"] >= world.train_until]
    ids = {r["request_id"] for r in world.requests}
    world.events = [e for e in world.events if e.get("request_id") or e["user_id"] in kept]
    assert any(e["request_id"] not in ids for e in world.events if e.get("request_id")), "users with nothing to learn"
    for limit in (1, len(kept) - 1, len(kept)):
        rows = whole_history(world.task_input(serializer, seed=limit), limit=limit)
        assert len({row["key"].split("/")[0] for row in rows}) == limit


def test_history_without_context():
    world = make_world(1)
    serializer = Serializer(made.byte_bpe(), history_context=False)
    data = world.task_input(serializer, max_history=4)
    for row in request_to_sid(data).select(range(40)):
        request = next(r for r in world.train if r["request_id"] == row["key"])
        assert row["pieces"][:-1] == windowed(world, serializer, request, 4)
        assert not any("place=" in piece for piece in row["pieces"][1:-2])
    with pytest.raises(ConfigError, match="history_context"):
        whole_history(data)


@pytest.mark.parametrize("max_history", [0, 4])
def test_prompts_of_held_out_requests(max_history):
    world, serializer, data = build(seed=7)
    held_out = [r for r in world.requests if r["time"] >= world.train_until]
    prompts = prompt_for_requests(data, table_from_rows("requests", held_out), max_history=max_history)
    assert prompts == [windowed(world, serializer, r, max_history) for r in held_out] and len(prompts) > 20


@pytest.mark.parametrize("kind", ["byte_bpe", "metaspace", "odd"])
@pytest.mark.parametrize("max_length", [40, 70, None])
def test_prompts_are_the_training_prefix_token_by_token(kind, max_length):
    world, serializer, data = build(kind, seed=8, max_history=8)
    tokenizer = serializer.tokenizer
    train = {row["key"]: row for row in request_to_sid(data)}
    requests = [r for r in world.train if r["request_id"] in train]
    prompts = prompt_for_requests(data, table_from_rows("requests", requests))
    fits = [
        n
        for n, r in enumerate(requests)
        if encoded(tokenizer, train[r["request_id"]]["pieces"], train[r["request_id"]]["learn"], max_length)
    ]
    ids = encode_prompts(tokenizer, [prompts[n] for n in fits], max_length, reserve=3)
    assert len(fits) > 20
    for n, prompt in zip(fits, ids, strict=True):
        row = train[requests[n]["request_id"]]
        assert encoded(tokenizer, row["pieces"], row["learn"], max_length)["input_ids"][:-3] == prompt
    if len(fits) < len(requests):
        with pytest.raises(DataError, match="does not fit"):
            encode_prompts(tokenizer, prompts, max_length, reserve=3)


def test_the_loss_on_a_target_is_the_same():
    """A random Qwen3 gives every target of the one pass the loss of its windowed copy."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    world = make_world(9, users=4, moments=20)
    serializer = Serializer(made.byte_bpe())
    data = world.task_input(serializer, max_history=MANY)
    tokenizer = serializer.tokenizer
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()

    def losses(example):
        example = encoded(tokenizer, example["pieces"], example["learn"])
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(example["labels"])[1:]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)
        return loss[labels != IGNORE].reshape(-1, 3).sum(1).tolist()

    one_pass = {t: x for row in whole_history(data) for t, x in zip(learned(row), losses(row), strict=True)}
    pairs = [(one_pass[t], losses(row)[0]) for row in request_to_sid(data) for t in learned(row) if t in one_pass]
    assert len(pairs) > 15
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=2e-5)
