"""Post-ranking on our own generator: its lists, scores and codes are the retriever's, and the truth is that of the shop."""

import json
import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from post_rank_stand_ins import tiny_training
from tiny_pipeline import SHOP, pipeline, run_in_process

from sidtune.core.config import build, parse
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json
from sidtune.data_builders.shop_world.world import ShopWorld
from sidtune.data_builders.tables.history import History
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.retrieval.loading import final_model, load_retriever, prompts_of
from sidtune.metrics.list_ranking import BEST, RANDOM
from sidtune.recipes.llm4pr import post_rank
from sidtune.recipes.llm4pr.sources import load_source, parse_source
from sidtune.recipes.steps import retrieve
from sidtune.trainers.post_ranking.data import judged_rows

COUNTS = {"train": 40, "valid": 10, "test": 20}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """The folders data, sids, model and sft of a tiny shop."""
    values = pipeline()
    values["steps"][3]["args"]["stages"] = values["steps"][3]["args"]["stages"][:1]
    return run_in_process(values, tmp_path_factory.mktemp("generator"), until="sft")


def source(shop, **changes):
    folders = {
        f"{name}_dir": str(shop / place) for name, place in (("data", "data"), ("sids", "sids"), ("model", "sft"))
    }
    options = {"kind": "generator", "num_beams": 8, "candidates": 5, "shard_size": 16, "batch_size": 8, "seed": 3}
    return {**options, **COUNTS, **folders, **changes}


@pytest.fixture(scope="module")
def loaded(shop, tmp_path_factory):
    return load_source(source(shop), tmp_path_factory.mktemp("lists"))


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
    other = load_source(source(shop, seed=4, train=8, valid=0, test=8), tmp_path).table
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
        load_source(source(shop, data_dir=str(moved), train=8, valid=0, test=8), tmp_path / "lists")
    # Other prices under the same ids and at the same times.
    (moved / "meta.json").write_text(json.dumps(meta))
    items = pq.read_table(moved / "items.parquet")
    doubled = pc.multiply(items["price"], 2.0)
    pq.write_table(items.set_column(items.schema.get_field_index("price"), "price", doubled), moved / "items.parquet")
    with pytest.raises(DataError, match="is not the shop that its meta.json describes"):
        load_source(source(shop, data_dir=str(moved), train=8, valid=0, test=8), tmp_path / "lists")
    pq.write_table(items, moved / "items.parquet")
    # Requests of another shop with the same catalogue.
    (moved / "meta.json").write_text(json.dumps({**meta, "options": {**meta["options"], "days": 30}}))
    with pytest.raises(DataError, match="is not the shop"):
        load_source(source(shop, data_dir=str(moved), train=8, valid=0, test=8), tmp_path / "lists")


def test_logged_feedback_is_the_relevance_where_there_is_no_shop(shop, tmp_path, direct):
    data, moved = direct[0], tmp_path / "data"
    shutil.copytree(shop / "data", moved)
    meta = read_json(moved / "meta.json")
    (moved / "meta.json").write_text(json.dumps({**meta, "reader": "sidtune"}))
    wide = {"candidates": 40, "num_beams": 60}
    found = load_source(source(shop, data_dir=str(moved), train=300, valid=10, test=100, **wide), tmp_path / "lists")
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
        load_source(source(shop, data_dir=str(moved), label="best"), tmp_path / "lists")
    logged = load_source(source(shop, label="logged", train=60, valid=0, test=20, **wide), tmp_path / "more")
    assert logged.sessions is None and set(np.unique(logged.table.relevance)) == {0.0, 1.0}


STEPS, TRAINING = tiny_training(2)


def arguments(shop, output, **changes):
    given = source(shop)
    folders = {name: given.pop(name) for name in ("data_dir", "sids_dir", "model_dir")}
    values = {
        "source": given,
        "output_dir": str(output),
        "baselines": ["initial", "mlp"],
        "reranker": {"epochs": 1},
        **folders,
    }
    values |= {
        "variants": ["llm4pr"],
        "training": TRAINING,
        "methods": ["greedy"],
        "metrics": {"ks": [3, 5]},
        "seeds": [0],
    }
    return build(post_rank.Arguments, {**values, "cost_requests": 1, "samples": 100, **changes}, "test")


def test_a_step_interrupted_in_its_retrieval_or_training_ends_as_an_uninterrupted_one(shop, tmp_path, monkeypatch):
    post_rank.main(arguments(shop, tmp_path / "whole"))
    whole = read_json(tmp_path / "whole" / "metrics.json")
    assert set(read_json(tmp_path / "whole" / "run.json")["inputs"]) == {"data_dir", "sids_dir", "model_dir"}

    class Stop(Exception):
        pass

    parts, answered = tmp_path / "parts", []
    real = retrieve.Shards.write

    def write(self, number, table):
        if len(answered) == 4:
            raise Stop
        answered.append(table.num_rows)
        real(self, number, table)

    with monkeypatch.context() as patch:
        patch.setattr(retrieve.Shards, "write", write)
        with pytest.raises(Stop):
            post_rank.main(arguments(shop, parts))
    assert answered == [16, 16, 8, 10] and not (parts / "run.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(retrieve.Shards, "write", lambda self, n, t: answered.append(t.num_rows) or real(self, n, t))
        patch.setattr(post_rank, "_train", lambda *rest: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            post_rank.main(arguments(shop, parts))
    assert answered == [16, 16, 8, 10, 16, 4]
    monkeypatch.setattr(retrieve.Shards, "write", lambda *rest: pytest.fail("the lists were there"))
    post_rank.main(arguments(shop, parts))
    again = read_json(parts / "metrics.json")
    assert again["systems"] == whole["systems"] and again["each_seed"] == whole["each_seed"]


def test_the_table_has_the_sorted_and_the_best_list(shop, tmp_path):
    chosen = arguments(shop, tmp_path / "o", variants=[], save=[], primary=post_rank.CLICKS)
    post_rank.main(chosen)
    record = read_json(tmp_path / "o" / "metrics.json")
    rows = {row["name"]: row for row in record["systems"]}
    assert list(rows) == ["initial", "mlp", RANDOM, post_rank.SORTED, BEST]
    found = load_source(chosen.whole_source(), tmp_path / "o" / "lists")
    test = found.table.rows_of("test")
    for name, orders in (("initial", found.sessions.incoming), (post_rank.SORTED, found.sessions.by_attraction())):
        value = rows[name]["metrics"]["expected clicks"]["value"]
        assert value == pytest.approx(found.sessions.utility(orders)[test].mean())
    clicks = {name: row["metrics"]["expected clicks"]["value"] for name, row in rows.items()}
    assert clicks[BEST] > clicks[post_rank.SORTED] > clicks["initial"] and record["primary"] == post_rank.CLICKS
    assert record["each_seed"]["initial"] == [pytest.approx(clicks["initial"])]
    # Without simulated sessions nobody knows the clicks.
    wide = {**chosen.source, "label": "logged", "candidates": 40, "num_beams": 60, "train": 60}
    logged = arguments(shop, tmp_path / "l", variants=[], save=[], primary=post_rank.CLICKS, source=wide)
    with pytest.raises(ConfigError, match="only simulated sessions have"):
        post_rank.main(logged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"kind": "shop"}}, "belong to the source 'generator'"),
        ({"data_dir": None}, "needs data_dir"),
        ({"source": {"kind": "generator", "data_dir": "x"}}, "both in source and beside it"),
        ({"source": {"kind": "generator", "candidate": 3}}, "did you mean 'candidates'"),
        ({"source": {"kind": "generator", "candidates": 30}}, "between 2 and num_beams"),
        ({"source": {"kind": "generator", "label": "bets"}}, "did you mean 'best'"),
        ({"source": {"kind": "generator", "sessions": {"interactions": 1}}}, "interaction"),
        ({"source": {"kind": "generator", "test": 0}}, "at least 1"),
        ({"samples": 20}, "samples >= 100"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(shop, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        arguments(shop, tmp_path / "o", **changes)
    assert not list(tmp_path.iterdir())


def test_the_quickstart_s_source_is_known(repo_root, tmp_path):
    file = repo_root / "recipes" / "quickstart" / "post_rank.yaml"
    words = ["--config", str(file), "--output_dir", str(tmp_path)]
    chosen = parse(post_rank.Arguments, [*words, "--data_dir", "d", "--sids_dir", "s", "--model_dir", "m"])
    assert parse_source(chosen.whole_source()).model_dir == "m"
    with pytest.raises(ConfigError, match="needs data_dir, sids_dir, model_dir"):
        parse(post_rank.Arguments, words)
