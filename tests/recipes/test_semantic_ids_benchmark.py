"""The comparison of quantizers: equal budgets, the control by lot, resumption, means and paired differences."""

import dataclasses
import json
import statistics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from next_item_worlds import chain_folder

from sidtune.benchmarks import semantic_ids as benchmark
from sidtune.benchmarks import semantic_ids_downstream as downstream
from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.quantizers.base import make_quantizer
from sidtune.tokenizers.registry import QUANTIZERS
from sidtune.tokenizers.sids.quality import sid_quality
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

pytestmark = pytest.mark.medium

SHOP = benchmark.SOURCES["shop"]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("data", benchmark.SOURCES)
def test_every_quantizer_has_the_same_budget(data, small):
    source = benchmark.quick(benchmark.SOURCES[data]) if small else benchmark.SOURCES[data]
    rows = benchmark.quantizers(source)
    assert {options["name"] for options in rows.values()} == set(QUANTIZERS)
    for options in rows.values():
        sizes = make_quantizer(options["name"], {k: v for k, v in options.items() if k != "name"}).level_sizes
        assert len(sizes) == 4 and sum(sizes) == 4 * source.width, options


def test_codes_by_lot_keep_the_counts_and_lose_the_items(tmp_path):
    codes = np.random.default_rng(0).integers(0, 5, size=(200, 3))
    ids, clicks = [f"i{n}" for n in range(200)], np.arange(200.0)
    sids = SemanticIds(ids, codes, (5, 5, 5), clicks)
    sids.save_pretrained(tmp_path / "learned" / "sids")
    downstream.shuffle(tmp_path / "learned", tmp_path / "drawn", seed=1)
    drawn = SemanticIds.from_pretrained(tmp_path / "drawn" / "sids")
    assert drawn.item_ids == ids and drawn.level_sizes == (5, 5, 5) and (drawn.popularity == clicks).all()
    assert sorted(map(tuple, drawn.codes.tolist())) == sorted(map(tuple, codes.tolist()))
    assert (drawn.codes == codes).all(axis=1).mean() < 0.1
    assert (SemanticIds.from_pretrained(tmp_path / "learned" / "sids").codes == codes).all()


def test_the_items_model_learns_the_rule_and_writes_what_it_measured(tmp_path, monkeypatch):
    data = chain_folder(tmp_path / "data" / "chain", users=150)
    monkeypatch.setenv("SIDTUNE_DATA", str(data.parent))
    index = json.loads((data / "X.index.json").read_text())
    codes = np.array([[int(token.strip("<>")[2:]) for token in row] for row in index.values()], dtype=np.int32)
    SemanticIds(list(index), codes, (6, 5, 2)).save_pretrained(tmp_path / "learned" / "sids")
    training = {"steps": 300, "batch": 16, "learning_rate": 1e-2, "hidden": 32, "max_length": 20}
    source = downstream.Source(
        "", "letter", {}, 4, (), 1, requests=100, folder="chain", model="items", **{**training, "layers": 1}
    )
    (tmp_path / "work").mkdir()
    found = downstream.items_model(source, tmp_path / "learned", tmp_path / "work", 0, ["popularity", "item_knn"])
    table = pq.read_table(tmp_path / "work" / "test" / "per_request.parquet")
    raw = json.loads((data / "X.inter.json").read_text())
    assert found["requests"] == len(table) == 100 and set(table["user_id"].to_pylist()) <= set(raw)
    assert found["ndcg@10"] == pytest.approx(np.mean(table["sidtune/ndcg@10"]))
    # A user follows the chain with probability .85, and a target that the user already has cannot be recommended.
    reachable = np.mean([row[-1] not in row[:-1] for row in raw.values()])
    assert 0.6 < found["ndcg@10"] < reachable < 0.9
    assert (
        found["baselines"]["popularity"]["ndcg@10"] < found["baselines"]["item_knn"]["ndcg@10"] < found["ndcg@10"] - 0.2
    )


def fake(calls):
    """Stands for `measure`: NDCG depends on row and seed, every request of the evaluation is written."""

    def measure(self, data, name, seed):
        calls.append((data, name, seed))
        skill = 0.02 * (1 + [*benchmark.quantizers(SHOP), benchmark.SHUFFLED].index(name))
        values = np.random.default_rng(seed + 10).random(300) * skill
        folder = self.folder(data, name, seed) / "test"
        folder.mkdir(parents=True)
        table = {"request_id": [str(n) for n in range(300)], "user_id": [str(n % 60) for n in range(300)]}
        pq.write_table(pa.table({**table, "sidtune/ndcg@10": values}), folder / "per_request.parquet")
        run = dict.fromkeys(benchmark.MEASURES, 0.1 + seed) | {"query_recall": None}
        run |= {"data": data, "name": name, "seed": seed, "levels": "4-4", "items": 9, "requests": 300}
        run |= {"parameters": 1, "steps": 2, "ndcg@10": float(values.mean())}
        return run | ({"baselines": {"popularity": {"ndcg@10": 0.5 + seed}}} if name == benchmark.REFERENCE else {})

    return measure


def test_rows_are_means_of_seeds_with_paired_differences_and_runs_go_on(tmp_path, monkeypatch):
    calls: list[tuple[str, str, int]] = []
    monkeypatch.setattr(benchmark.Comparison, "measure", fake(calls))
    file, work = tmp_path / "r.json", tmp_path / "work"
    benchmark.Comparison({"shop": SHOP}, work, file).run([0])
    names = [*benchmark.quantizers(SHOP), benchmark.SHUFFLED]
    assert calls == [("shop", name, 0) for name in names]
    again = benchmark.Comparison({"shop": SHOP}, work, file)
    again.run([0, 1])
    assert calls[len(names) :] == [("shop", name, 1) for name in names]
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == [*names, "popularity"] and rows == again.rows()
    assert {row["data"] for row in rows} == {SHOP.title}
    one = rows[1]
    runs = [run for run in again.runs if run["name"] == names[1]]
    scores = [run["ndcg@10"] for run in runs]
    assert one["ndcg"] == f"{statistics.fmean(scores):.4f} ± {statistics.stdev(scores):.4f}"
    assert one["icr"] == pytest.approx(0.6) and one["query_recall"] is None and one["seeds"] == 2
    assert rows[-1]["ndcg@10"] == 1.0 and "difference" not in rows[-1] and "difference" not in rows[0]
    reference = [run["ndcg@10"] for run in again.runs if run["name"] == names[0]]
    shown = float(one["difference"].split()[0])
    assert shown == pytest.approx(statistics.fmean(scores) - statistics.fmean(reference), abs=5e-5) and shown > 0
    assert one["adjusted_p"] < 0.05
    (work / "shop" / f"{names[1]}_1" / "test" / "per_request.parquet").unlink()
    assert "difference" not in again.rows()[1] and "difference" in again.rows()[2]


def test_other_settings_and_lost_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.Comparison, "measure", fake([]))
    benchmark.Comparison({"shop": SHOP}, tmp_path / "work", tmp_path / "r.json").run([0])
    other = dataclasses.replace(SHOP, steps=1)
    with pytest.raises(ConfigError, match="'shop' that were measured with other settings"):
        benchmark.Comparison({"shop": other}, tmp_path / "work", tmp_path / "r.json")
    with pytest.raises(DataError, match="is gone; go on with the --work folder"):
        benchmark.Comparison({"shop": SHOP}, tmp_path / "elsewhere", tmp_path / "r.json")._reference("shop", 0)
    with pytest.raises(ConfigError, match="did you mean 'office'"):
        benchmark.chosen(["ofice"], small=False)
    monkeypatch.setenv("SIDTUNE_DATA", str(tmp_path))
    assert list(benchmark.chosen(None, small=False)) == ["shop"]
    with pytest.raises(DataError, match="set SIDTUNE_DATA to the folder that holds 'instruments'"):
        downstream.build(benchmark.SOURCES["instruments"], tmp_path / "data")


def test_requests_must_be_the_same(tmp_path):
    for name, ids in (("a", ["1", "2"]), ("b", ["1", "3"])):
        (tmp_path / name).mkdir()
        table = pa.table({"request_id": ids, "user_id": ["u", "v"], "sidtune/ndcg@10": [0.0, 1.0]})
        pq.write_table(table, tmp_path / name / "per_request.parquet")
    with pytest.raises(ConfigError, match="different requests"):
        downstream.paired([tmp_path / "a"], [tmp_path / "b"])
    assert downstream.paired([tmp_path / "a"], [tmp_path / "a"]).difference == 0.0


def test_two_rows_from_end_to_end(tmp_path, monkeypatch):
    source = dataclasses.replace(
        benchmark.quick(SHOP),
        options={"n_items": 150, "n_users": 40, "n_requests": 700, "n_departments": 2, "leaves_per_department": 4},
        encoder={"name": "tfidf_svd", "dims": 16},
        width=8,
        hidden=32,
        layers=1,
        steps=3,
    )
    options = {"name": "residual_kmeans", "level_sizes": [8] * 4}
    monkeypatch.setattr(benchmark, "quantizers", lambda source: {benchmark.REFERENCE: options})
    comparison = benchmark.Comparison({"shop": source}, tmp_path / "work", tmp_path / "r.json")
    comparison.run([0])
    first, drawn, *baselines = comparison.rows()
    assert [row["name"] for row in baselines] == benchmark.BASELINES
    assert first["collision_rate"] == drawn["collision_rate"] and first["entropy"] == drawn["entropy"]
    assert first["relative_error"] < 0.8 < 1.0 < drawn["relative_error"]
    assert 0 < first["query_recall"] <= 1 and drawn["query_recall"] < first["query_recall"]
    assert first["levels"] == "8-8-8-8" and first["steps"] == 3 and 0 <= first["ndcg@10"] <= 1
    folder = comparison.folder("shop", benchmark.REFERENCE, 0)
    alone = sid_quality(SemanticIds.from_pretrained(folder / "sids" / "sids"))
    assert first["icr"] == alone.icr and first["cur_2"] == alone.levels[1].cur
    assert not (folder / "model").exists() and (folder / "test" / "per_request.parquet").exists()
    assert "difference" in drawn and (folder / "log.txt").read_text()
