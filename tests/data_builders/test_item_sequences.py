"""Sequences of users: the published leave-one-out rule and the examples cut out of the training part, against plain loops."""

import json

import numpy as np
import pytest
from next_item_worlds import chain_folder, random_sequences

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.registry import READERS
from sidtune.data_builders.sequences.item_sequences import ItemSequences, padded


def lists(sequences: ItemSequences) -> list[list[int]]:
    return [sequences.rows[a:b].tolist() for a, b in zip(sequences.offsets, sequences.offsets[1:], strict=False)]


def learned(sequences: ItemSequences, examples) -> list[tuple[int, int, tuple[int, ...]]]:
    """(user, place of the target in the flat rows, the items shown before it) of every target."""
    found = []
    for start, stop, first, user in zip(examples.starts, examples.stops, examples.firsts, examples.users, strict=True):
        for place in range(first, stop):
            found.append((int(user), int(place), tuple(sequences.rows[start:place].tolist())))
    return found


@pytest.mark.parametrize("split", ["valid", "test"])
def test_held_out_targets_are_the_publishers(tmp_path, split):
    sequences = ItemSequences.from_tables(READERS.get("letter")(str(chain_folder(tmp_path))))
    raw = json.loads((tmp_path / "X.inter.json").read_text())
    found = sequences.held_out(split)
    assert len(found) == len(raw)
    for place, user in enumerate(found.users):
        items = raw[sequences.user_ids[user]]
        history, target = (items[:-1], items[-1]) if split == "test" else (items[:-2], items[-2])
        shown = [int(sequences.item_ids[row]) for row in sequences.rows[found.starts[place] : found.stops[place]]]
        assert shown == [*history, target]


def test_short_users_train_and_are_not_held_out():
    sequences = random_sequences()
    assert sequences.lengths[:3].tolist() == [1, 2, 3]
    assert sequences.held_out("test").users.tolist() == list(range(2, len(sequences)))
    assert (sequences.training_stops[:3] - sequences.offsets[:3]).tolist() == [1, 2, 1]


@pytest.mark.parametrize(("max_history", "overlap"), [(1, None), (2, 1), (3, 2), (4, None), (5, 5), (50, None)])
def test_whole_examples_learn_every_training_target_once(max_history, overlap):
    sequences = random_sequences(users=30)
    examples = sequences.whole_examples(max_history, overlap)
    found = learned(sequences, examples)
    expected, offset = [], 0
    for user, items in enumerate(lists(sequences)):
        training = items[:-2] if len(items) >= 3 else items
        expected += [(user, offset + place) for place in range(1, len(training))]
        offset += len(items)
    assert sorted((user, place) for user, place, _ in found) == expected
    assert examples.targets == len(expected)
    least = max(1, max_history // 2) if overlap is None else overlap
    for user, place, shown in found:
        before = place - int(sequences.offsets[user])
        assert min(before, least) <= len(shown) <= max_history
        assert list(shown) == sequences.rows[place - len(shown) : place].tolist()
    assert examples.lengths.max() <= max_history + 1


@pytest.mark.parametrize("max_history", [1, 3, 50])
def test_window_examples_are_one_copy_per_target(max_history):
    sequences = random_sequences(users=20)
    found = learned(sequences, sequences.window_examples(max_history))
    expected, offset = [], 0
    for user, items in enumerate(lists(sequences)):
        training = items[:-2] if len(items) >= 3 else items
        for place in range(1, len(training)):
            expected.append((user, offset + place, tuple(training[max(0, place - max_history) : place])))
        offset += len(items)
    assert found == expected


def test_counts_and_padding():
    sequences = random_sequences()
    training = [item for items in lists(sequences) for item in (items[:-2] if len(items) >= 3 else items)]
    assert sequences.training_counts().tolist() == np.bincount(training, minlength=30).tolist()
    examples = sequences.held_out("test")
    rows = padded(sequences, examples.starts, examples.stops)
    for place, row in enumerate(rows):
        expected = sequences.rows[examples.starts[place] : examples.stops[place]].tolist()
        assert row.tolist() == expected + [-1] * (rows.shape[1] - len(expected))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_seen_items_are_the_whole_history_however_short_the_example(split):
    sequences = random_sequences(40, items=8)
    examples = sequences.held_out(split, 3)
    places = np.random.default_rng(0).permutation(len(examples))[:20]
    part = examples.take(places)
    behind = 2 if split == "valid" else 1
    repeats = 0
    for user, seen in zip(part.users, sequences.seen(part), strict=True):
        history = sequences.rows[sequences.offsets[user] : sequences.offsets[user + 1] - behind].tolist()
        assert seen.tolist() == sorted(set(history))
        repeats += len(seen) < len(history)
    assert part.users.tolist() == examples.users[places].tolist() and repeats and part.lengths.max() == 4


def test_refusals(tmp_path):
    sequences = random_sequences()
    with pytest.raises(ConfigError, match="valid or test, got 'train'"):
        sequences.held_out("train")
    with pytest.raises(ConfigError, match="overlap must be 1 to max_history = 3, got 4"):
        sequences.whole_examples(3, 4)
    with pytest.raises(ConfigError, match="1 or more"):
        sequences.window_examples(0)
    tables = READERS.get("letter")(str(chain_folder(tmp_path)))
    tables.events = tables.events.slice(0, 0)
    with pytest.raises(DataError, match="no events"):
        ItemSequences.from_tables(tables)


def test_instruments_has_the_published_size(real_data):
    sequences = ItemSequences.from_tables(READERS.get("letter")(str(real_data / "instruments")))
    assert (len(sequences), len(sequences.item_ids), len(sequences.rows)) == (24_772, 9_922, 206_153)
    assert len(sequences.held_out("test")) == 24_772
    assert sequences.window_examples(20).targets == sequences.whole_examples(50).targets == 206_153 - 3 * 24_772
