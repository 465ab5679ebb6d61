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
from sidtune.decoding.serving.generator_source import KINDS
from sidtune.metrics.list_ranking import BEST, RANDOM
from sidtune.models.post_ranking.ranker import PostRanker
from sidtune.recipes.llm4pr import post_rank
from sidtune.recipes.llm4pr.post_rank import Arguments, main
from sidtune.recipes.llm4pr.systems import VARIANTS, Training, requests_of, start_model, table_for, train_variant
from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
from sidtune.trainers.post_ranking import trainer as post_rank_steps

STEPS, TRAINING = tiny_training(3)


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    return str(recbole(tmp_path_factory.mktemp("ml") / "r", rating_rows()))


def arguments(source, output, **changes):
    values = {
        "source": source,
        "output_dir": str(output),
        "baselines": ["initial", "mlp"],
        "reranker": {"epochs": 1},
        "variants": ["llm4pr", "no_qia", "no_aux", "ptpr"],
        "training": TRAINING,
        "metrics": {"ks": [3, 5]},
        "seeds": [0, 1],
        "cost_requests": 2,
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
    chosen = arguments(movielens(ratings), output, shuffles=2, readme=[str(readme)])
    main(chosen)
    return chosen, output, readme


def test_a_run_writes_what_it_says(run):
    chosen, output, readme = run
    record = read_json(output / "metrics.json")
    names = [row["name"] for row in record["systems"]]
    more = ["llm4pr (single_forward)", "llm4pr (2 shuffles)"]
    assert names == ["initial", "mlp", "llm4pr", *more, "no_qia", "no_aux", "ptpr", RANDOM, BEST]
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
    costs = {name: [one["cost"] for one in seeds] for name, seeds in record["told"].items()}
    assert costs["ptpr"][0]["prompt_tokens"] > 2 * costs["llm4pr"][0]["prompt_tokens"]
    assert all(set(c["milliseconds"]) == {"greedy", "single_forward"} for one in costs.values() for c in one)
    assert all(0 <= c["valid_rate"] <= 1 for one in costs.values() for c in one)
    text = readme.read_text()
    assert RANDOM in text and "prompt tokens" in text and text.startswith("Before") and text.endswith("After\n")
    assert read_json(output / "run.json")["step"] == "post_rank"
    assert "adaptation" in record["told"]["llm4pr"][0] and "adaptation" not in record["told"]["ptpr"][0]
    assert "aux_loss" not in record["told"]["no_aux"][0]["post_rank"]


def test_the_saved_model_gives_the_orders_of_the_table(run):
    chosen, output, _ = run
    source = load_source(chosen.source)
    requests = requests_of(source.table, source.table.rows_of("test"), 2)
    found = PostRanker.from_pretrained(output / "seed_1" / "llm4pr" / "model").rank(requests)
    told = read_json(output / "seed_1" / "llm4pr" / "result.json")["orders"]["llm4pr"]
    assert [order.tolist() for order in found] == told
    assert not (output / "seed_1" / "no_aux" / "model").exists()
    assert not list(output.glob("seed_*/*/work"))


def test_finished_systems_are_kept_and_changed_ones_are_trained_again(run, monkeypatch):
    chosen, output, _ = run
    trained = []
    real = post_rank._train
    monkeypatch.setattr(post_rank, "_train", lambda name, *rest: trained.append(name) or real(name, *rest))
    before = json.loads((output / "metrics.json").read_text())
    main(chosen)
    after = json.loads((output / "metrics.json").read_text())
    assert not trained and before == after
    changed = {**TRAINING, "aux_weight": 0.5}
    main(arguments(chosen.source, output, shuffles=2, training=changed, variants=["llm4pr"], seeds=[0]))
    assert trained == ["llm4pr"]


def test_an_interrupted_system_ends_as_an_uninterrupted_one(ratings, tmp_path, monkeypatch):
    saving = {**STEPS, "save_strategy": "steps", "save_steps": 2}
    training = {**TRAINING, "adaptation": saving, "post_rank": saving}
    options = {"variants": ["llm4pr"], "seeds": [0], "training": training}
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


def test_variants_of_one_adapter_share_their_adaptation(ratings, tmp_path, monkeypatch):
    real, made = post_rank_steps.adapt_features, []
    monkeypatch.setattr(
        post_rank_steps, "adapt_features", lambda model, *a, **k: made.append(model) or real(model, *a, **k)
    )
    kept, alone = tmp_path / "kept", tmp_path / "alone"
    table = load_source(movielens(ratings)).table
    given = (Training(**TRAINING), table, table.rows_of("train"), 0)
    states = []
    for name, folder in (("llm4pr", kept), ("no_aux", kept), ("no_qia", kept), ("no_aux", alone)):
        model, _, told = train_variant(VARIANTS[name], *given, tmp_path / f"work_{len(states)}", folder)
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
    given = (VARIANTS["llm4pr"], Training(**{**TRAINING, **lora}), table, table.rows_of("train"), 0)
    states = [train_variant(*given, tmp_path / name, tmp_path / "kept")[0].state_dict() for name in ("one", "two")]
    assert any("lora_A" in name for name in states[0])
    assert all((states[0][name] == states[1][name]).all() for name in states[0])


def test_a_variant_changes_only_what_it_names(ratings):
    table = load_source(movielens(ratings)).table
    rows = table.rows_of("train")
    full = VARIANTS["llm4pr"]
    for name, changed in (("no_qia", "adapter"), ("no_adaptation", "adaptation"), ("no_aux", "aux")):
        assert [k for k, v in vars(VARIANTS[name]).items() if v != getattr(full, k)] == [changed]
    training = Training(**TRAINING)
    models = [start_model(training, table, rows, adapter, 3)[0] for adapter in ("qia", "qia", "mlp")]
    states = [model.state_dict() for model in models]
    assert all((states[0][key] == states[1][key]).all() for key in states[0])
    language = [key for key in states[0] if key.startswith("language_model")]
    assert all((states[0][key] == states[2][key]).all() for key in language)
    assert models[2].config.adapter == "mlp"


def test_only_variants_that_ask_for_it_see_the_personal_query(ratings):
    table = load_source(movielens(ratings)).table
    train = table.rows_of("train")
    plain = Training(train="all", adaptation_trains="all")
    personal = replace(plain, query="personal")
    assert table_for(VARIANTS["llm4pr"], personal, table, train).d_q > table.d_q
    assert table_for(VARIANTS["query_alone"], personal, table, train) is table
    assert table_for(VARIANTS["llm4pr"], plain, table, train) is table


def test_sessions_have_their_expected_clicks_and_the_best_list_is_the_ceiling(tmp_path):
    shop = {"n_items": 200, "n_users": 40, "n_requests": 400, "days": 10}
    source = {"kind": "shop", "world": shop, "count": 60, "candidates": 4}
    chosen = arguments(source, tmp_path / "o", variants=["llm4pr"], seeds=[0], methods=["greedy"], primary="ndcg@3")
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
        ({"baselines": ["dlmc"]}, "dlcm"),
        ({"variants": ["no_qa"]}, "no_qia"),
        ({"save": ["no_adaptation"]}, "save"),
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
        ({"reranker": {"epochs": 0}}, "epochs"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        arguments(**{"source": {"kind": "movielens", "path": "x"}, "output": tmp_path, **changes})


def test_the_sources_of_the_shipped_configs_are_known(repo_root, tmp_path):
    for file in sorted((repo_root / "recipes" / "llm4pr").glob("*.yaml")):
        assert parse_source(parse(Arguments, ["--config", str(file), "--output_dir", str(tmp_path)]).source, KINDS)
