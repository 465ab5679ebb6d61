"""Comparing variants of a step over seeds: which steps run, and what the table says."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidtune.core import pipeline as run
from sidtune.core.config import build, load_yaml
from sidtune.core.errors import ConfigError, DataError
from sidtune.recipes.steps.ablation import Arguments, compare, markdown


def arguments(repo_root, folder, **changes):
    root = repo_root / "recipes" / "crs" / "ablation"
    values = {**load_yaml(root / "shop.yaml"), "output_dir": str(folder), "root": str(root), **changes}
    return build(Arguments, values, "shop.yaml")


def test_every_variant_starts_from_the_same_step_on_the_same_requests(repo_root, tmp_path):
    chosen = arguments(repo_root, tmp_path)
    steps = run.resolve(chosen.pipeline_of(2))
    names = [step.name for step in steps]
    assert names[:5] == ["data", "sids", "model", "sft", "test_start"]
    assert names[5:] == [name for variant in chosen.variants for name in (variant, f"test_{variant}")]
    for step in steps[5::2]:
        assert step.config.model_dir == str(tmp_path / "seed_2" / "sft") and step.config.seed == 2
    for step in steps[6::2]:
        assert step.config.model_dir.endswith(step.name.removeprefix("test_")) and step.config.split == "test"
    assert {step.config.data_dir for step in steps[1:]} == {str(tmp_path / "seed_2" / "data")}


def write(folder, seed, name, values):
    place = folder / f"seed_{seed}" / f"test_{name}"
    place.mkdir(parents=True)
    users = [f"u{n % 40}" for n in range(len(values))]
    pq.write_table(
        pa.table(
            {
                "request_id": [f"r{n}" for n in range(len(values))],
                "user_id": users,
                "sidtune/ndcg@10": values,
                "sidtune/hr@10": values,
            }
        ),
        place / "per_request.parquet",
    )


def test_means_spread_and_differences_are_those_of_the_requests(repo_root, tmp_path):
    chosen = arguments(repo_root, tmp_path, seeds=[0, 1], variants={"better": {}, "same": {}})
    draw = np.random.default_rng(0)
    starts = [draw.random(200) / 2, draw.random(300) / 2]
    for seed, start in enumerate(starts):
        write(tmp_path, seed, "start", start)
        write(tmp_path, seed, "better", start + 0.1 + 0.01 * draw.normal(size=len(start)))
        write(tmp_path, seed, "same", start + 0.2 * draw.normal(size=len(start)))
    record = compare(chosen)
    means = [float(start.mean()) for start in starts]
    assert record["rows"]["start"]["metrics"]["ndcg@10"]["values"] == pytest.approx(means)
    assert record["rows"]["start"]["metrics"]["ndcg@10"]["std"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    better, same = (record["rows"][name]["against_start"] for name in ("better", "same"))
    assert better["difference"] == pytest.approx(0.1, abs=0.003) and better["low"] > 0.09
    assert better["adjusted_p_value"] < 0.01 < 0.05 < same["adjusted_p_value"] and same["low"] < 0 < same["high"]
    assert better["requests"] == 500 and better["clusters"] == 80  # 40 users in each of two shops
    table = markdown(record)
    assert f"| start | {np.mean(means):.4f} ± " in table and "200 to 300 test requests" in table


def test_wrong_options_are_refused_before_anything_runs(repo_root, tmp_path):
    for change, words in (
        ({"seeds": [1]}, "two different"),
        ({"variants": {}}, "variants"),
        ({"variants": {"start": {}}}, "start"),
    ):
        with pytest.raises(ConfigError, match=words):
            arguments(repo_root, tmp_path, **change)
    for text in ("{}", "steps: {a: 1}", "steps: [1]", "steps: [{name: a, inputs: null}]"):
        (tmp_path / "p.yaml").write_text(text)
        with pytest.raises(ConfigError, match="is none, because"):
            arguments(repo_root, tmp_path, pipeline=str(tmp_path / "p.yaml")).pipeline_of(0)
    with pytest.raises(ConfigError, match="no step 'sfft'"):
        arguments(repo_root, tmp_path, start="sfft").pipeline_of(0)
    with pytest.raises(ConfigError, match="learning_rat"):
        run.resolve(arguments(repo_root, tmp_path, variants={"a": {"args": {"learning_rat": 1}}}).pipeline_of(0))
    chosen = arguments(repo_root, tmp_path, seeds=[0, 1], variants={"a": {}}, metric="ndcg@3")
    for seed in (0, 1):
        for name in ("start", "a"):
            write(tmp_path, seed, name, np.ones(50))
    with pytest.raises(DataError, match="has no ndcg@3"):
        compare(chosen)


def test_models_of_further_steps_get_rows_of_their_own(repo_root, tmp_path):
    root = repo_root / "recipes" / "crs"
    values = {**load_yaml(root / "compare_shop.yaml"), "output_dir": str(tmp_path), "root": str(root)}
    chosen = build(Arguments, values, "compare_shop.yaml")
    steps = {step.name: step for step in run.resolve(chosen.pipeline_of(1))}
    assert steps["evolve"].config.model_dir == str(tmp_path / "seed_1" / "sft") and steps["evolve"].config.seed == 1
    assert not steps["evolve"].config.stop_within_noise
    for name, place in (("cold_start", "cold_start/sft"), ("r_grpo", "round_1/rl"), ("round_2", "round_2/sft")):
        found = steps[f"test_{name}"].config
        assert found.model_dir == str(tmp_path / "seed_1" / "evolve" / place) and found.reasoning
        assert found.split == "test" and found.num_beams == steps["test_start"].config.num_beams
    assert not steps["test_start"].config.reasoning and not steps["test_round_2_direct"].config.reasoning
    with pytest.raises(ConfigError, match="must have a `model`"):
        build(Arguments, {**values, "models": {"x": {"modle": "evolve"}}}, "compare_shop.yaml")
    with pytest.raises(ConfigError, match="different names"):
        build(Arguments, {**values, "models": {"stock": {"model": "evolve"}}}, "compare_shop.yaml")


def test_rows_on_other_requests_are_not_compared(repo_root, tmp_path):
    chosen = arguments(repo_root, tmp_path, seeds=[0, 1], variants={"a": {}})
    for seed in (0, 1):
        write(tmp_path, seed, "start", np.ones(50))
        write(tmp_path, seed, "a", np.ones(50))
    file = tmp_path / "seed_1" / "test_a" / "per_request.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(list(range(49, -1, -1))), file)
    with pytest.raises(DataError, match="'a' of seed 1 was evaluated on other requests"):
        compare(chosen)


def test_a_row_can_be_compared_with_the_model_it_began_with(repo_root, tmp_path):
    models = {"seeded": {"model": "sft"}, "trained": {"model": "sft", "against": "seeded"}}
    chosen = arguments(repo_root, tmp_path, seeds=[0, 1], variants={"a": {}}, models=models)
    draw = np.random.default_rng(0)
    for seed in (0, 1):
        base = draw.random(300)
        for name, gain in (("start", 0.0), ("a", 0.0), ("seeded", -0.2), ("trained", -0.1)):
            write(tmp_path, seed, name, base + gain)
    rows = compare(chosen)["rows"]
    assert rows["trained"]["against_start"]["difference"] == pytest.approx(-0.1)
    assert rows["trained"]["against_base"]["difference"] == pytest.approx(0.1) and rows["trained"]["base"] == "seeded"
    assert "against_base" not in rows["seeded"] and "against_base" not in rows["a"]
    line = next(line for line in markdown(compare(chosen)).splitlines() if line.startswith("| trained"))
    assert "seeded: +0.1000" in line and line.count("|") == 8
    with pytest.raises(ConfigError, match="against"):
        arguments(repo_root, tmp_path, models={"x": {"model": "sft", "against": "y"}})
