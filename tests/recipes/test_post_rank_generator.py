"""The post-ranking recipe on our own generator: it goes on after an interruption, and its table has the bounds of the shop."""

import pytest
from generator_stand_ins import generator_shop
from generator_stand_ins import generator_source as source
from post_rank_stand_ins import tiny_training

from sidtune.core.config import build, parse
from sidtune.core.errors import ConfigError
from sidtune.core.folders import read_json
from sidtune.data_builders.post_ranking.sources import load_source, parse_source
from sidtune.decoding.serving import batch
from sidtune.decoding.serving.generator_source import KINDS
from sidtune.metrics.list_ranking import BEST, CLICKS, RANDOM, SORTED
from sidtune.recipes.llm4pr import post_rank

pytestmark = pytest.mark.medium

STEPS, TRAINING = tiny_training(2)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return generator_shop(tmp_path_factory.mktemp("generator"))


def arguments(shop, output, **changes):
    given = source(shop)
    folders = {name: given.pop(name) for name in ("data_dir", "sids_dir", "model_dir")}
    values = {
        "source": given,
        "output_dir": str(output),
        **folders,
    }
    values |= {
        "training": TRAINING,
        "methods": ["greedy"],
        "metrics": {"ks": [3, 5]},
        "seeds": [0],
    }
    return build(post_rank.Arguments, {**values, "samples": 100, **changes}, "test")


def test_a_step_interrupted_in_its_retrieval_or_training_ends_as_an_uninterrupted_one(shop, tmp_path, monkeypatch):
    post_rank.main(arguments(shop, tmp_path / "whole"))
    whole = read_json(tmp_path / "whole" / "metrics.json")
    assert set(read_json(tmp_path / "whole" / "run.json")["inputs"]) == {"data_dir", "sids_dir", "model_dir"}

    class Stop(Exception):
        pass

    parts, answered = tmp_path / "parts", []
    real = batch.Shards.write

    def write(self, number, table):
        if len(answered) == 4:
            raise Stop
        answered.append(table.num_rows)
        real(self, number, table)

    with monkeypatch.context() as patch:
        patch.setattr(batch.Shards, "write", write)
        with pytest.raises(Stop):
            post_rank.main(arguments(shop, parts))
    assert answered == [16, 16, 8, 10] and not (parts / "run.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(batch.Shards, "write", lambda self, n, t: answered.append(t.num_rows) or real(self, n, t))
        patch.setattr(post_rank, "train_system", lambda *rest: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            post_rank.main(arguments(shop, parts))
    assert answered == [16, 16, 8, 10, 16, 4]
    monkeypatch.setattr(batch.Shards, "write", lambda *rest: pytest.fail("the lists were there"))
    post_rank.main(arguments(shop, parts))
    again = read_json(parts / "metrics.json")
    assert again["systems"] == whole["systems"] and again["each_seed"] == whole["each_seed"]


def test_the_table_has_the_sorted_and_the_best_list(shop, tmp_path):
    chosen = arguments(shop, tmp_path / "o", primary=CLICKS)
    post_rank.main(chosen)
    record = read_json(tmp_path / "o" / "metrics.json")
    rows = {row["name"]: row for row in record["systems"]}
    assert list(rows) == ["initial", "llm4pr", RANDOM, SORTED, BEST]
    found = load_source(chosen.whole_source(), tmp_path / "o" / "lists", KINDS)
    test = found.table.rows_of("test")
    for name, orders in (("initial", found.sessions.incoming), (SORTED, found.sessions.by_attraction())):
        value = rows[name]["metrics"]["expected clicks"]["value"]
        assert value == pytest.approx(found.sessions.utility(orders)[test].mean())
    clicks = {name: row["metrics"]["expected clicks"]["value"] for name, row in rows.items()}
    assert clicks[BEST] > clicks[SORTED] > clicks["initial"] and record["primary"] == CLICKS
    assert record["each_seed"]["initial"] == [pytest.approx(clicks["initial"])]
    # Without simulated sessions nobody knows the clicks.
    wide = {**chosen.source, "label": "logged", "candidates": 40, "num_beams": 60, "train": 60}
    with pytest.raises(ConfigError, match="only simulated sessions have"):
        arguments(shop, tmp_path / "l", primary=CLICKS, source=wide)


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
        ({"samples": 20}, "samples of at least 100"),
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
    assert parse_source(chosen.whole_source(), KINDS).model_dir == "m"
    with pytest.raises(ConfigError, match="needs data_dir, sids_dir, model_dir"):
        parse(post_rank.Arguments, words)
