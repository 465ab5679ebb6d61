"""Post-ranking on our own generator: its lists, scores and codes are the retriever's, and the truth is that of the shop."""

import json
import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from generator_stand_ins import COUNTS, generator_shop
from generator_stand_ins import generator_source as source
from tiny_pipeline import SHOP

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json
from sidtune.data_builders.post_ranking.sources import load_source
from sidtune.data_builders.shop_world.world import ShopWorld
from sidtune.data_builders.tables.history import History
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.retrieval.loading import final_model, load_retriever, prompts_of
from sidtune.decoding.serving.generator_source import KINDS
from sidtune.trainers.post_ranking.data import judged_rows

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return generator_shop(tmp_path_factory.mktemp("generator"))


def load(values, folder):
    return load_source(values, folder, KINDS)


@pytest.fixture(scope="module")
def loaded(shop, tmp_path_factory):
    return load(source(shop), tmp_path_factory.mktemp("lists"))


@pytest.fixture(scope="module")
def direct(shop, loaded):
    """(requests, item rows, scores) straight from the retriever, request by request, in the order of the table."""
    data = load_folder(shop / "data")
    retriever = load_retriever(final_model(shop / "sft"), shop / "sids")
    rows, scores, kept = [], [], []
    asked = dict(zip(*(loaded.table.requests[c].to_pylist() for c in ("request_id", "split")), strict=True))
    for name, split in asked.items():
        ids = data.requests[split]["request_id"].to_pylist()
        kept.append(data.requests[split].slice(ids.index(name), 1))
        found = retriever.rank(prompts_of(retriever, data, kept[-1]), 5, 8)
        rows.append(found[0][0])
        scores.append(found[1][0])
    return data, retriever, kept, np.array(rows), np.array(scores)


def test_candidates_scores_and_codes_are_those_of_the_retriever(loaded, direct):
    data, retriever, _, rows, scores = direct
    table = loaded.table
    batch = table.batch(np.arange(len(table)))
    assert len(table) == 70 and batch.item_mask.all() and (batch.item_rows == rows).all()
    np.testing.assert_allclose(batch.init_score, scores, rtol=1e-5, atol=1e-5)
    assert (np.diff(batch.init_score, axis=1) <= 0).all()
    generator = batch.item_fields["generator"]
    np.testing.assert_allclose(generator[..., 0], scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(generator[..., 1], np.tile(np.log(np.arange(5) + 1), (70, 1)), rtol=1e-6)
    assert batch.item_present["generator"].all() and not batch.history_present["generator"].any()
    codes = retriever.sids.codes[rows]
    hot = batch.item_fields["sid"].reshape(70, 5, 3, 8)
    assert (hot.sum(-1) == 1).all() and (hot.argmax(-1) == codes).all()
    assert [table.item_ids[i] for i in rows[0]] == [retriever.sids.item_ids[i] for i in rows[0]]


def test_requests_are_drawn_from_their_own_split_and_another_seed_draws_others(shop, loaded, tmp_path):
    data = load_folder(shop / "data")
    names = loaded.table.requests["request_id"].to_pylist()
    splits = loaded.table.requests["split"].to_pylist()
    assert splits == ["train"] * 40 + ["valid"] * 10 + ["test"] * 20 and len(set(names)) == 70
    for split in COUNTS:
        own = [name for name, one in zip(names, splits, strict=True) if one == split]
        order = data.requests[split]["request_id"].to_pylist()
        assert own == [name for name in order if name in set(own)]
    other = load(source(shop, seed=4, train=8, valid=0, test=8), tmp_path).table
    assert other.requests["split"].to_pylist() == ["train"] * 8 + ["test"] * 8
    assert set(other.requests["request_id"].to_pylist()) != set(names[:8] + names[50:58])


def test_the_truth_is_that_of_the_shop(loaded, direct):
    _, _, kept, rows, _ = direct
    world, sessions = ShopWorld.from_options(**SHOP), loaded.sessions
    asked = world.request_rows([part["request_id"][0].as_py() for part in kept])
    attraction = world.attraction(asked)[np.arange(70)[:, None], rows]
    np.testing.assert_allclose(sessions.attraction, attraction)
    by_clicks = np.argsort(-attraction, axis=1, kind="stable")
    best, sorted_, incoming = (sessions.utility(o) for o in (sessions.best, by_clicks, sessions.incoming))
    assert (best >= sorted_ - 1e-12).all() and best.mean() > sorted_.mean() > incoming.mean()
    relevance = loaded.table.batch(np.arange(70)).relevance
    assert (np.argsort(-relevance, axis=1) == sessions.best).all() and len(judged_rows(loaded.table, range(70))) == 70


def test_another_shop_under_the_same_names_is_refused(shop, tmp_path):
    moved = tmp_path / "data"
    shutil.copytree(shop / "data", moved)
    meta = read_json(moved / "meta.json")
    (moved / "meta.json").write_text(json.dumps({**meta, "options": {**meta["options"], "seed": 9}}))
    with pytest.raises(DataError, match="is not the shop that its meta.json describes"):
        load(source(shop, data_dir=str(moved), train=8, valid=0, test=8), tmp_path / "lists")
    # Other prices under the same ids and at the same times.
    (moved / "meta.json").write_text(json.dumps(meta))
    items = pq.read_table(moved / "items.parquet")
    doubled = pc.multiply(items["price"], 2.0)
    pq.write_table(items.set_column(items.schema.get_field_index("price"), "price", doubled), moved / "items.parquet")
    with pytest.raises(DataError, match="is not the shop that its meta.json describes"):
        load(source(shop, data_dir=str(moved), train=8, valid=0, test=8), tmp_path / "lists")
    pq.write_table(items, moved / "items.parquet")
    # Requests of another shop with the same catalogue.
    (moved / "meta.json").write_text(json.dumps({**meta, "options": {**meta["options"], "days": 30}}))
    with pytest.raises(DataError, match="is not the shop"):
        load(source(shop, data_dir=str(moved), train=8, valid=0, test=8), tmp_path / "lists")


def test_logged_feedback_is_the_relevance_where_there_is_no_shop(shop, tmp_path, direct):
    data, moved = direct[0], tmp_path / "data"
    shutil.copytree(shop / "data", moved)
    meta = read_json(moved / "meta.json")
    (moved / "meta.json").write_text(json.dumps({**meta, "reader": "sidtune"}))
    wide = {"candidates": 40, "num_beams": 60}
    found = load(source(shop, data_dir=str(moved), train=300, valid=10, test=100, **wide), tmp_path / "lists")
    table, sessions = found.table, found.sessions
    assert sessions is None and 5 < len(table) < 400 and "lists without any relevant item" in table.notes[-1]
    batch, history = table.batch(np.arange(len(table))), History(data.events)
    wanted = {}
    for part in data.requests.values():
        for row in part.to_pylist():
            hits = {c["item_id"] for c in row["candidates"] if 1 in (c["click"], c["like"], c["order"])}
            wanted[row["request_id"]] = row, hits
    for n, name in enumerate(table.requests["request_id"].to_pylist()):
        row, hits = wanted[name]
        listed = [table.item_ids[i] for i in batch.item_rows[n]]
        assert batch.relevance[n].tolist() == [float(item in hits) for item in listed] and hits & set(listed)
        past = history.before([row["user_id"]], np.array([row["time"]]), 10)[0]
        items = [data.events["item_id"][int(event)].as_py() for event in past]
        shown = [
            table.item_ids[i] for i, real in zip(batch.history_rows[n], batch.history_mask[n], strict=True) if real
        ]
        assert shown == items
        assert table.requests["query"][n].as_py() == row["query"] and batch.query_present[n] == (
            row["query"] is not None
        )
        assert table.user_ids[table.user_rows[n]] == row["user_id"]
    left_out = int(table.notes[-1].split()[0])
    asked = pq.read_table(tmp_path / "lists" / "test" / "results.parquet").num_rows + 310
    assert left_out + len(table) == asked
    with pytest.raises(ConfigError, match="needs a simulated shop"):
        load(source(shop, data_dir=str(moved), label="best"), tmp_path / "lists")
    logged = load(source(shop, label="logged", train=60, valid=0, test=20, **wide), tmp_path / "more")
    assert logged.sessions is None and set(np.unique(logged.table.relevance)) == {0.0, 1.0}
