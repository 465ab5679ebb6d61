"""The recipe from step folders to a model folder: prompts as evaluation renders them, targets from feedback, resume, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_pipeline import pipeline, run_in_process
from transformers import AutoModelForCausalLM, TrainerCallback

from sidtune.core.config import build
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.scripts import find_script
from sidtune.data_builders.prompts.encoding import encode_prompts
from sidtune.data_builders.tables.store import load_folder
from sidtune.data_builders.tasks.behaviour import prompt_for_requests
from sidtune.data_builders.tasks.input import TaskInput
from sidtune.decoding.retrieval.loading import ModelFolder, final_model, load_retriever, prompts_of
from sidtune.recipes.steps import grpo as recipe
from sidtune.recipes.steps.grpo import Arguments
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.trainers.grpo.examples import grpo_examples, hard_rows, position_bias
from sidtune.trainers.grpo.stage import GRPOStage
from sidtune.trainers.rewards.gains import LeafFacts

pytestmark = pytest.mark.medium

ARGS = {
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The folders data, sids, model and sft of a tiny shop."""
    values = pipeline()
    for stage in values["steps"][3]["args"]["stages"]:
        stage["args"]["max_steps"] = 5
    return run_in_process(values, tmp_path_factory.mktemp("tiny"), until="sft")


def options(steps, output, **changes) -> Arguments:
    values = {
        "data_dir": str(steps / "data"),
        "sids_dir": str(steps / "sids"),
        "model_dir": str(steps / "sft"),
        "output_dir": str(output),
        "rewards": {"list_ndcg": 1.0, "prefix_match": 0.3},
        "args": dict(ARGS),
        "max_requests": 200,
    }
    return Arguments(**(values | changes))


def stage_of(arguments: Arguments, **more) -> GRPOStage:
    from pathlib import Path

    source = ModelFolder.open(arguments.model_dir)
    return GRPOStage(
        source.path,
        Path(arguments.data_dir),
        Path(arguments.sids_dir) / "sids",
        Path(arguments.output_dir),
        source.serializer,
        source.settings.max_history,
        source.settings.max_length,
        source.complete,
        arguments,
        **more,
    )


def test_the_recipe_writes_a_model_folder_that_everything_reads(steps, tmp_path):
    arguments = options(steps, tmp_path / "grpo")
    recipe.main(arguments)
    folder = tmp_path / "grpo"
    AutoModelForCausalLM.from_pretrained(folder)
    retriever = load_retriever(final_model(folder), steps / "sids")
    hits = retriever.search("pen", k=3)
    assert len(hits) == 3
    record = json.loads((folder / "run.json").read_text())
    assert record["step"] == "grpo" and record["metrics"]["steps"] == 4
    assert record["metrics"]["preset_values"]["baseline"] == "leave_one_out"
    assert (
        record["metrics"]["prompts"]
        == 200
        < sum(record["metrics"]["data"][n] for n in ("requests", "without_positive"))
    )
    assert "hit/level_1" in record["metrics"]["last"]
    assert not (tmp_path / ".work_grpo").exists() and find_script("grpo").module == "sidtune.recipes.steps.grpo"
    history = json.loads((folder / "log_history.json").read_text())
    assert len([h for h in history if "reward" in h]) == 4


def test_prompts_are_those_of_evaluation_and_targets_those_of_the_log(steps):
    data = load_folder(steps / "data")
    retriever = load_retriever(final_model(steps / "sft"), steps / "sids")
    sids = SemanticIds.from_pretrained(steps / "sids" / "sids")
    facts = LeafFacts.of(data.items, sids)
    requests = data.requests["train"].slice(0, 60)
    given = (data, requests, sids, facts, retriever.serializer, retriever.tokenizer)
    limits = {"max_history": 20, "max_length": 256, "reserve": 3}
    made, counts = grpo_examples(*given, **limits)
    kept = [r for r in requests.to_pylist() if any(1 in (c["click"], c["like"], c["order"]) for c in r["candidates"])]
    assert made["request_id"] == [r["request_id"] for r in kept]
    assert counts["requests"] == 60 and counts["without_positive"] == 60 - len(kept) > 0
    few, told = grpo_examples(*given, **limits, limit=len(kept) - 1, seed=1)  # counted among those that can be rewarded
    assert len(few) == len(kept) - 1 and told == counts
    assert [one for one in made if one["request_id"] in few["request_id"]] == [*few]
    wanted = requests.filter(pa.array(np.isin(requests["request_id"].to_pylist(), made["request_id"])))
    prompts = encode_prompts(retriever.tokenizer, prompts_of(retriever, data, wanted), 256, reserve=3)
    assert made["prompt_ids"] == prompts
    codes = {item: tuple(code) for item, code in zip(sids.item_ids, sids.codes.tolist(), strict=True)}
    for row, request in zip(made, kept, strict=True):
        positive = {codes[c["item_id"]] for c in request["candidates"] if 1 in (c["click"], c["like"], c["order"])}
        known = {codes[c["item_id"]] for c in request["candidates"] if c["click"] is not None}
        found = dict(
            zip([tuple(facts.leaf_codes[x].tolist()) for x in row["target_leaves"]], row["target_gains"], strict=True)
        )
        assert {code for code, gain in found.items() if gain > 0} == positive
        assert set(found) <= known | positive


@pytest.mark.parametrize("train", ["rows", "lora"])
def test_other_training_modes_write_what_they_trained(steps, tmp_path, train):
    lora = {"r": 4} if train == "lora" else {}
    recipe.main(options(steps, tmp_path / "grpo", train=train, lora=lora, args=ARGS | {"max_steps": 1, "beta": 0.01}))
    AutoModelForCausalLM.from_pretrained(tmp_path / "grpo")
    assert (tmp_path / "grpo" / "trained").is_dir()


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_killed_recipe_goes_on_from_its_checkpoint(steps, tmp_path, caplog):
    whole = options(steps, tmp_path / "whole")
    stage_of(whole).run()
    broken = options(steps, tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        stage_of(broken, callbacks=[Kill()]).run()
    assert not (tmp_path / "broken").exists() and (tmp_path / ".work_broken" / "train").is_dir()
    with caplog.at_level("INFO", logger="sidtune.trainers.common.callbacks"):
        stage_of(broken).run()
    assert "goes on from checkpoint-2" in caplog.text
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "broken"))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (a == b).all(), name


def test_other_settings_do_not_resume_from_a_checkpoint(steps, tmp_path, caplog):
    first = options(steps, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        stage_of(first, callbacks=[Kill()]).run()
    other = options(steps, tmp_path / "one", rewards={"hit": 1.0})
    with caplog.at_level("WARNING"):
        metrics = stage_of(other).run()
    assert "differs in rewards; it is thrown away" in caplog.text
    assert metrics["steps"] == 4 and "rewards/hit/mean" in metrics["last"]


def test_a_hard_set_chooses_the_requests(steps, tmp_path):
    requests = load_folder(steps / "data").requests["train"]
    names = requests["request_id"].to_pylist()[5:25]
    pq.write_table(pa.table({"request_id": names, "rank": range(20)}), tmp_path / "hard.parquet")
    assert hard_rows(tmp_path / "hard.parquet", requests["request_id"]).tolist() == list(range(5, 25))
    arguments = options(steps, tmp_path / "grpo", hard_set=str(tmp_path / "hard.parquet"), args=ARGS | {"max_steps": 1})
    recipe.main(arguments)
    assert json.loads((tmp_path / "grpo" / "run.json").read_text())["metrics"]["data"]["requests"] == 20
    pq.write_table(pa.table({"request_id": ["nobody"]}), tmp_path / "wrong.parquet")
    with pytest.raises(DataError, match="names the request 'nobody', which is not in the split that is trained on"):
        hard_rows(tmp_path / "wrong.parquet", requests["request_id"])
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "column.parquet")
    for name in ("column", "missing"):
        with pytest.raises(DataError, match="no parquet file with a column request_id"):
            hard_rows(tmp_path / f"{name}.parquet", requests["request_id"])


def test_requests_that_sft_has_not_seen_can_be_trained_on(steps, tmp_path):
    """Prompts of the valid split are those that evaluation gives the same requests, past turns included."""
    arguments = options(steps, tmp_path / "grpo", split="valid", args=ARGS | {"max_steps": 1})
    recipe.main(arguments)
    data = load_folder(steps / "data")
    told = json.loads((tmp_path / "grpo" / "run.json").read_text())["metrics"]["data"]
    assert told["requests"] == data.requests["valid"].num_rows != data.requests["train"].num_rows
    retriever = load_retriever(final_model(steps / "sft"), steps / "sids")
    sids = SemanticIds.from_pretrained(steps / "sids" / "sids")
    given = (data, data.requests["valid"], sids, LeafFacts.of(data.items, sids), retriever.serializer)
    made, _ = grpo_examples(*given, retriever.tokenizer, max_history=20, max_length=256, split="valid", reserve=3)
    asked = data.requests["valid"].filter(
        pa.array(np.isin(data.requests["valid"]["request_id"].to_pylist(), made["request_id"]))
    )
    source = TaskInput.of_split(data, sids.texts(), retriever.serializer, "valid", 20)
    assert made["prompt_ids"] == encode_prompts(retriever.tokenizer, prompt_for_requests(source, asked), 256, reserve=3)
    with pytest.raises(ConfigError, match="split"):
        build(recipe.Arguments, {**vars(arguments), "split": "test"}, "grpo")


def test_gains_and_position_bias_reach_the_targets(steps, tmp_path):
    requests = load_folder(steps / "data").requests["train"]
    assert position_bias(None, requests) is None
    with pytest.raises(ConfigError, match="position_bias must be null, interventions or a folder"):
        position_bias("nothing", requests)
    bias = position_bias("interventions", requests)
    bias.save_pretrained(tmp_path / "bias")
    arguments = options(
        steps,
        tmp_path / "grpo",
        position_bias=str(tmp_path / "bias"),
        gains={"labels": {"click": 1.0, "order": 2.0}, "floor": 0.2},
        args=ARGS | {"max_steps": 1},
    )
    recipe.main(arguments)
    shutil.rmtree(tmp_path / "grpo")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": {"list_ndgc": 1.0}}, "did you mean 'list_ndcg'"),
        ({"args": {"prest": "strict"}}, "did you mean 'preset'"),
        ({"gains": {"flor": 0.1}}, "did you mean 'floor'"),
        ({"lora": {"r": 4}}, "LoRA options need train: lora"),
        ({"max_requests": 0}, "max_requests must be at least 1"),
    ],
)
def test_wrong_options_are_told_before_any_work(steps, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        options(steps, tmp_path, **changes)


def test_reasoning_without_an_end_token_is_told(steps, tmp_path):
    arguments = options(steps, tmp_path / "grpo", args={"rollout": "reasoning", "max_steps": 1})
    with pytest.raises(ConfigError, match="end_of_reasoning '</think>' is .* tokens for this tokenizer"):
        recipe.main(arguments)


def test_reasoning_rollouts_run_from_the_recipe(tmp_path):
    values = pipeline()
    values["steps"][2]["args"]["extra_tokens"] = ["<think>", "</think>"]
    steps = run_in_process(values, tmp_path / "steps", until="model")
    args = ARGS | {"preset": "faithful", "max_steps": 2, "num_beams": 5, "max_completion_length": 6}
    rewards = {"list_ndcg": {"k": 5}, "format": 0.1, "reasoning_length": {"weight": 0.05, "shortest": 1, "longest": 4}}
    recipe.main(options(steps, tmp_path / "grpo", model_dir=str(steps / "model"), args=args, rewards=rewards))
    last = json.loads((tmp_path / "grpo" / "run.json").read_text())["metrics"]["last"]
    assert {"rollout/closed", "rewards/format/mean", "rewards/reasoning_length/mean", "kl"} <= set(last)
    AutoModelForCausalLM.from_pretrained(tmp_path / "grpo")


def test_too_few_prompts_for_a_generation_are_told(steps, tmp_path):
    arguments = options(steps, tmp_path / "grpo", max_requests=3, args=ARGS | {"per_device_train_batch_size": 64})
    with pytest.raises((ConfigError, DataError), match="One generation takes 16 prompts|No train request"):
        recipe.main(arguments)
