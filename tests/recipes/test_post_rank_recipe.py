"""The post-ranking recipe: sources, refused options, and a tiny run from ratings to the table."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from post_rank_sources import rating_rows, recbole
from post_rank_stand_ins import tiny_training
from safetensors.torch import load_file

from sidtune.core.config import build, parse
from sidtune.core.errors import ConfigError
from sidtune.core.folders import read_json
from sidtune.data_builders.post_ranking.sources import load_source, parse_source
from sidtune.data_builders.post_ranking.text import request_of
from sidtune.decoding.serving.generator_source import KINDS
from sidtune.metrics.list_ranking import BEST, RANDOM
from sidtune.models.post_ranking.ranker import PostRanker
from sidtune.recipes.llm4pr import post_rank
from sidtune.recipes.llm4pr.post_rank import Arguments, main
from sidtune.recipes.llm4pr.training import Training, start_model, table_for, train_system
from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
from sidtune.trainers.post_ranking import trainer as post_rank_steps

pytestmark = pytest.mark.medium

STEPS, TRAINING = tiny_training(3)


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    return str(recbole(tmp_path_factory.mktemp("ml") / "r", rating_rows()))


def arguments(source, output, **changes):
    values = {
        "source": source,
        "output_dir": str(output),
        "training": TRAINING,
        "metrics": {"ks": [3, 5]},
        "seeds": [0, 1],
        "samples": 100,
    }
    return build(Arguments, {**values, **changes}, "test")


def movielens(path):
    return {"kind": "movielens", "path": path, "segments": {"upstream_share": 0.3, "width": 4, "d_q": 6}}


@pytest.fixture(scope="module")
def run(ratings, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    readme = output.parent / "README.md"
    readme.write_text("Before\n<!-- results -->\n<!-- /results -->\nAfter\n")
    chosen = arguments(movielens(ratings), output, readme=[str(readme)])
    main(chosen)
    return chosen, output, readme


def test_a_run_writes_what_it_says(run):
    chosen, output, readme = run
    record = read_json(output / "metrics.json")
    names = [row["name"] for row in record["systems"]]
    assert names == ["initial", "llm4pr", "llm4pr (single_forward)", RANDOM, BEST]
    values = {row["name"]: row["metrics"]["ndcg@5"]["value"] for row in record["systems"]}
    assert values[BEST] == 1.0 and all(0 < values[name] <= 1 for name in names)
    assert set(record["against"]) == set(names) - {"llm4pr", RANDOM, BEST}
    for name, pair in record["against"].items():
        assert pair["difference"] == pytest.approx(values["llm4pr"] - values[name])
        assert pair["p_value"] <= pair["adjusted_p_value"] <= 1
    table = pq.read_table(output / "per_request.parquet")
    assert table.num_rows == record["requests"]["test"]
    for name in names:
        assert np.mean(table[f"{name}/ndcg@5"].to_numpy()) == pytest.approx(values[name])
        assert np.mean(record["each_seed"].get(name, [values[name]])) == pytest.approx(values[name])
    text = readme.read_text()
    written = (output / "table.md").read_text()
    assert RANDOM in written and text == f"Before\n<!-- results -->\n{written}<!-- /results -->\nAfter\n"
    assert read_json(output / "run.json")["step"] == "post_rank"
    assert [set(one) for one in record["told"]["llm4pr"]] == [{"seed", "adaptation", "post_rank"}] * 2


def test_the_saved_model_gives_the_orders_of_the_table(run):
    chosen, output, _ = run
    source = load_source(chosen.source)
    requests = [request_of(source.table, row, 2) for row in source.table.rows_of("test")]
    found = PostRanker.from_pretrained(output / "seed_1" / "llm4pr" / "model").rank(requests)
    told = read_json(output / "seed_1" / "llm4pr" / "result.json")["orders"]["llm4pr"]
    assert [order.tolist() for order in found] == told
    assert not list(output.glob("seed_*/*/work"))


def test_finished_systems_are_kept_and_changed_ones_are_trained_again(run, monkeypatch):
    chosen, output, _ = run
    trained = []
    real = post_rank.train_system
    monkeypatch.setattr(post_rank, "train_system", lambda *given: trained.append(given[3]) or real(*given))
    before = json.loads((output / "metrics.json").read_text())
    main(chosen)
    after = json.loads((output / "metrics.json").read_text())
    assert not trained and before == after
    changed = {**TRAINING, "aux_weight": 0.5}
    main(arguments(chosen.source, output, training=changed, seeds=[0]))
    assert trained == [0]


def test_an_interrupted_system_ends_as_an_uninterrupted_one(ratings, tmp_path, monkeypatch):
    saving = {**STEPS, "save_strategy": "steps", "save_steps": 2}
    training = {**TRAINING, "adaptation": saving, "post_rank": saving}
    options = {"seeds": [0], "training": training}
    main(arguments(movielens(ratings), tmp_path / "whole", **options))
    real = post_rank_steps.learn_to_post_rank

    class Stop(Exception):
        pass

    def stop(*given, **named):
        raise Stop

    monkeypatch.setattr(post_rank_steps, "learn_to_post_rank", stop)
    with pytest.raises(Stop):
        main(arguments(movielens(ratings), tmp_path / "parts", **options))
    adapted = []
    monkeypatch.setattr(post_rank_steps, "learn_to_post_rank", real)
    step = post_rank_steps.PostRankTrainer.training_step
    monkeypatch.setattr(
        post_rank_steps.PostRankTrainer,
        "training_step",
        lambda self, *rest: adapted.append(self.train_dataset.step) or step(self, *rest),
    )
    main(arguments(movielens(ratings), tmp_path / "parts", **options))
    assert adapted == ["post_rank"] * 3
    weights = [
        load_file(next((tmp_path / n / "seed_0/llm4pr/model").glob("*.safetensors"))) for n in ("whole", "parts")
    ]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


def test_trainings_of_one_adapter_share_their_adaptation(ratings, tmp_path, monkeypatch):
    real, made = post_rank_steps.adapt_features, []
    monkeypatch.setattr(
        post_rank_steps, "adapt_features", lambda model, *a, **k: made.append(model) or real(model, *a, **k)
    )
    kept, alone = tmp_path / "kept", tmp_path / "alone"
    table = load_source(movielens(ratings)).table
    given, states = (table, table.rows_of("train"), 0), []
    for changes, folder in (({}, kept), ({"aux": False}, kept), ({"adapter": "mlp"}, kept), ({"aux": False}, alone)):
        training = Training(**{**TRAINING, **changes})
        model, _, told = train_system(training, *given, tmp_path / f"work_{len(states)}", folder)
        states.append(model.state_dict())
        assert told["adaptation"]["steps"] == 3
    assert len(made) == 3  # once for each adapter, and once where nothing was kept
    assert all((states[1][key] == states[3][key]).all() for key in states[1])


def test_new_factors_do_not_depend_on_who_trained_the_adaptation(ratings, tmp_path):
    """A run that was stopped behind the adaptation reads it, an uninterrupted one has just trained it."""
    table = load_source(movielens(ratings)).table
    tokenizer = train_lm_tokenizer(["a b c d e f"] * 50, vocab_size=300)
    build_model({**TRAINING["scratch"]}, tokenizer).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    lora = {"backbone": str(tmp_path / "backbone"), "train": "lora", "adaptation_trains": "adapters", "lora": {"r": 2}}
    given = (Training(**{**TRAINING, **lora}), table, table.rows_of("train"), 0)
    states = [train_system(*given, tmp_path / name, tmp_path / "kept")[0].state_dict() for name in ("one", "two")]
    assert any("lora_A" in name for name in states[0])
    assert all((states[0][name] == states[1][name]).all() for name in states[0])


def test_another_adapter_starts_from_the_same_language_model(ratings, tmp_path):
    table = load_source(movielens(ratings)).table
    rows = table.rows_of("train")
    made = [Training(**{**TRAINING, "adapter": adapter}) for adapter in ("qia", "qia", "mlp")]
    models = [start_model(training, table, rows, 3, tmp_path)[0] for training in made]
    states = [model.state_dict() for model in models]
    assert all((states[0][key] == states[1][key]).all() for key in states[0])
    language = [key for key in states[0] if key.startswith("language_model")]
    assert all((states[0][key] == states[2][key]).all() for key in language)
    assert models[2].config.adapter == "mlp"


def test_only_a_training_that_asks_for_it_sees_the_personal_query(ratings):
    table = load_source(movielens(ratings)).table
    train = table.rows_of("train")
    plain = Training(train="all", adaptation_trains="all")
    assert table_for(replace(plain, query="personal"), table, train).d_q > table.d_q
    assert table_for(plain, table, train) is table


def test_sessions_have_their_expected_clicks_and_the_best_list_is_the_ceiling(tmp_path):
    shop = {"n_items": 200, "n_users": 40, "n_requests": 400, "days": 10}
    source = {"kind": "shop", "world": shop, "count": 60, "candidates": 4}
    chosen = arguments(source, tmp_path / "o", seeds=[0], methods=["greedy"], primary="ndcg@3")
    main(chosen)
    rows = {row["name"]: row["metrics"] for row in read_json(tmp_path / "o" / "metrics.json")["systems"]}
    clicks = {name: row["expected clicks"]["value"] for name, row in rows.items()}
    assert max(clicks.values()) == clicks[BEST] > clicks["initial"] and clicks[BEST] > clicks[RANDOM]
    splits = load_source(source).table.requests["split"].to_pylist()
    assert splits == ["train"] * 42 + ["valid"] * 6 + ["test"] * 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"kind": "movie_lens"}}, "movielens"),
        ({"source": {"kind": "movielens", "path": "x", "segments": {"sise": 3}}}, "size"),
        ({"source": {"kind": "shop", "label": "click"}}, "clicks"),
        ({"source": {"kind": "shop", "sessions": {"interactions": 1}}}, "interaction"),
        ({"source": {"kind": "passages", "train": {}, "test": {}}}, "required key"),
        ({"training": {**TRAINING, "adapter": "mpl"}}, "training.adapter"),
        ({"methods": ["gredy"]}, "greedy"),
        ({"training": {**TRAINING, "train": "lora"}}, "name a backbone"),
        (
            {"training": {**TRAINING, "backbone": "x", "drill": {"max_steps": 1}}},
            "drill is for a backbone built from scratch",
        ),
        ({"training": {**TRAINING, "epoch": 1}}, "unknown key 'epoch'"),
        ({"training": {**TRAINING, "lora": {"rank": 2}}}, "training.lora"),
        ({"metrics": {"gains": "exp2"}}, "gain"),
        ({"primary": "ndcg@7"}, "primary"),
        ({"seeds": [1, 1]}, "seeds"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        arguments(**{"source": {"kind": "movielens", "path": "x"}, "output": tmp_path, **changes})


def test_the_sources_of_the_shipped_configs_are_known(repo_root, tmp_path):
    for file in sorted((repo_root / "recipes" / "llm4pr").glob("*.yaml")):
        assert parse_source(parse(Arguments, ["--config", str(file), "--output_dir", str(tmp_path)]).source, KINDS)


def test_options_of_the_comparison_that_old_configs_have_are_left_out_with_a_notice(tmp_path, caplog):
    made = arguments({"kind": "movielens", "path": "x"}, tmp_path, baselines=["initial"], reranker={"epochs": 3})
    assert made == arguments({"kind": "movielens", "path": "x"}, tmp_path)
    assert "'baselines' is no option here any more" in caplog.text and "post_rank_rivals.py" in caplog.text
