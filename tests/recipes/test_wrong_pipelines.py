"""Wrong pipelines: each is refused before its first step by a sentence that names the step and the option; the right one passes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_pipeline import GRPO_STEP, whole_pipeline, write_pipeline

from sidtune.core.config import parse
from sidtune.core.errors import ConfigError
from sidtune.core.pipeline import RunArguments, is_done, resolve
from sidtune.recipes.steps import seeds, serve, sft
from sidtune.recipes.steps.retrieve import Arguments as Retrieve

pytestmark = pytest.mark.medium

NAN, HUGE = math.nan, 10**9
TRAJECTORIES = {
    "name": "loop", "script": "self_evolve", "inputs": GRPO_STEP["inputs"],
    "args": {"grpo": {"args": GRPO_STEP["args"]["args"]}, "cold_start": {}, "sft": {}},
}  # fmt: skip

# (step, path of the option below `args`, wrong value, words of the sentence)
WRONG: list[tuple[str, str, Any, str]] = [
    ("data", "reader", "shop_wordl", "did you mean 'shop_world'?"),
    ("data", "options.n_itmes", 10, "did you mean 'n_items'?"),
    ("data", "options.n_items", 0, "n_items"),
    ("data", "options.n_requests", 0, "n_requests"),
    ("data", "options.launch_share", 1.5, "launch_share"),
    ("data", "options.click_bias", NAN, "click_bias"),
    ("data", "split.kind", "globaltime", "did you mean 'global_time'?"),
    ("data", "split.test_share", 1.2, "test_share"),
    ("data", "split.valid_share", -0.1, "valid_share"),
    ("data", "split.tset_share", 0.1, "did you mean 'test_share'?"),
    ("data", "split.test_share", "much", "test_share"),
    ("sids", "encoder.name", "tfidf", "did you mean 'tfidf_svd'?"),
    ("sids", "encoder.dimz", 3, "did you mean 'dims'?"),
    ("sids", "encoder.dims", 0, "dims"),
    ("sids", "encoder", {"name": "precomputed", "path": "/nowhere/v.npy"}, "/nowhere/v.npy does not exist"),
    ("sids", "quantizer.name", "residual_kmean", "did you mean 'residual_kmeans'?"),
    ("sids", "quantizer.level_size", [8], "did you mean 'level_sizes'?"),
    ("sids", "quantizer.level_sizes", [], "level"),
    ("sids", "quantizer.level_sizes", [8, 0], "level"),
    ("sids", "collisions", {"name": "sufix"}, "did you mean 'suffix'?"),
    ("sids", "learn_share", 0, "learn_share"),
    ("model", "scratch.model_type", "qwen99", "model_type"),
    ("model", "scratch.hidden_size", 0, "hidden_size"),
    ("model", "scratch.hidden_size", HUGE, "more than this machine has"),
    ("model", "scratch.hiden_size", 32, "did you mean 'hidden_size'?"),
    ("model", "scratch.num_key_value_heads", 3, "num_key_value_heads"),
    ("model", "scratch.hidden_act", "reluu", "reluu"),
    ("model", "scratch", {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "multiple"),
    ("model", "text_vocab_size", 12, "vocab_size"),
    ("model", "templates", "planin", "did you mean 'plain'?"),
    ("model", "init", "codebok", "did you mean 'codebook'?"),
    ("model", "dtype", "float23", "dtype"),
    ("model", "pad_to_multiple_of", 0, "pad_to_multiple_of"),
    ("model", "extra_tokens", ["two words"], "two words"),
    ("model", "base", "/nowhere/at/all", "does not exist"),
    ("sft", "templates", "compcat", "did you mean 'compact'?"),
    ("sft", "max_chars", {"titel": 3}, "did you mean 'title'?"),
    ("sft", "max_chars", {"title": -3}, "max_chars.title"),
    ("sft", "prompt_max_length", 3, "prompt_max_length"),
    ("sft", "prompt_max_history", -1, "prompt_max_history"),
    ("sft", "stages.personalise.max_length", 3, "stages.personalise.max_length"),
    ("sft", "stages.align.args.optim", "adamww", "adamww"),
    ("sft", "stages.align.args.lr_scheduler_type", "cosin", "cosin"),
    ("sft", "stages.align.args.learning_rate", NAN, "learning_rate"),
    ("sft", "stages.align.args.learning_rate", "inf", "learning_rate"),
    ("sft", "stages.align.args.learning_rate", -1.0, "learning_rate"),
    ("sft", "stages.personalise.args.num_train_epochs", -2, "num_train_epochs"),
    ("sft", "stages.personalise.args.per_device_train_batch_size", 0, "per_device_train_batch_size"),
    ("sft", "stages.personalise.args.adam_beta1", 2.0, "beta"),
    ("sft", "stages.personalise.args.train_sampling_strategy", "by_length", "train_sampling_strategy"),
    ("sft", "stages.personalise.args.report_to", "wandbb", "wandbb"),
    ("sft", "stages.personalise.args.max_steps", 0, "max_steps"),
    ("sft", "stages.personalise.args.eval_strategy", "epoch", "eval_tasks"),
    ("grpo", "rewards", {"list_ndgc": 1.0}, "did you mean 'list_ndcg'?"),
    ("grpo", "rewards", {"list_ndcg": {"weight": 1.0, "gamas": [0.1]}}, "gamas"),
    ("grpo", "rewards", {"list_ndcg": NAN}, "list_ndcg"),
    ("grpo", "max_requests", 0, "max_requests"),
    ("grpo", "max_length", 2, "max_length"),
    ("grpo", "args.num_generations", 5, "divisible"),
    ("grpo", "args.optim", "adam", "adam"),
    ("grpo", "args.loss_type", "grop", "did you mean 'grpo'?"),
    ("grpo", "args.beta", -0.1, "beta"),
    ("grpo", "args.learning_rate", math.inf, "learning_rate"),
    ("grpo", "position_bias", "/nowhere/bias", "position_bias"),
    ("grpo", "gains", {"popularity_alfa": 1.0}, "did you mean 'popularity_alpha'?"),
    ("eval", "num_beams", 0, "num_beams"),
    ("eval", "num_beams", 9, "ks"),
    ("eval", "num_beams", HUGE, "num_beams"),
    ("eval", "ks", [5, 10, HUGE], "ks"),
    ("eval", "ks", [], "ks"),
    ("eval", "samples", 50, "samples"),
    ("eval", "samples", 10**12, "samples"),
    ("eval", "level", 1.0, "level"),
    ("eval", "metrics", ["ndgc"], "did you mean 'ndcg'?"),
    ("eval", "primary", "ndcg@7", "primary"),
    ("eval", "labels", ["clik"], "did you mean 'click'?"),
    ("eval", "baselines", ["bm52"], "did you mean 'bm25'?"),
    ("eval", "max_requests", 0, "max_requests"),
    ("eval", "batch_size", 0, "batch_size"),
    ("eval", "compare_to", {"other": "/nowhere/eval"}, "/nowhere/eval"),
    ("post_rank", "source.candidates", 9, "candidates"),
    ("post_rank", "source.num_beams", HUGE, "num_beams"),
    ("post_rank", "source.train", 0, "train"),
    ("post_rank", "source.label", "bst", "label"),
    ("post_rank", "methods", ["gredy"], "did you mean 'greedy'?"),
    ("post_rank", "metrics.ks", [0], "cut-offs"),
    ("post_rank", "primary", "ndcg@9", "primary"),
    ("post_rank", "samples", 50, "samples"),
    ("post_rank", "training.adapter_learning_rate", NAN, "learning_rate"),
    ("post_rank", "training.scratch.hidden_size", 0, "hidden_size"),
    ("post_rank", "training.post_rank.optim", "adamm", "adamm"),
    ("post_rank", "training.post_rank.learning_rat", 1.0, "did you mean 'learning_rate'?"),
    ("post_rank", "training.max_history", -1, "max_history"),
    ("bundle", "push_to_hub", True, "hub_model_id"),
    ("report", "titel", "x", "did you mean 'title'?"),
]  # fmt: skip


def wrong_split(values: dict) -> None:
    step(values, "data")["args"]["split"] = {"valid_share": 0.0}
    step(values, "grpo")["args"]["split"] = "valid"


def small_catalogue(values: dict) -> None:
    step(values, "data")["args"]["options"] |= {"n_items": 60}
    step(values, "eval")["args"] |= {"ks": [5, 10, 61], "num_beams": 61}


def strange_clicks(values: dict) -> None:
    step(values, "data")["args"] = {"reader": "hub", "path": "some/dataset"}
    step(values, "post_rank")["args"]["primary"] = "expected clicks"


def precomputed_queries(values: dict, folder: Path) -> None:
    (folder / "v.npy").write_bytes(b"")
    step(values, "sids")["args"]["encoder"] = {"name": "precomputed", "path": str(folder / "v.npy")}
    step(values, "sft")["args"]["query_sids"] = True


# What takes more than one option, or no option of a step, to see: (change, step, words).
TOGETHER: list[tuple[Callable, str, str]] = [
    (wrong_split, "grpo", "valid_share"),
    (small_catalogue, "eval", "61 places"),
    (strange_clicks, "post_rank", "simulated shop"),
    (lambda p: step(p, "sids")["args"].update(suffix=True) or step(p, "sft")["args"].update(prompt_max_length=4), "sft",
     "a SID of 4 tokens"),
    (lambda p: step(p, "sids")["args"].update(queries=True, encoder={"name": "precomputed", "path": "v.npy"}), "sids",
     "items only"),
    (lambda p: step(p, "data").update(script="build_dat"), "data", "did you mean 'build_data'?"),
    (lambda p: step(p, "sft")["inputs"].update(model_dir="mode"), "sft", "did you mean 'model'?"),
    (lambda p: step(p, "eval")["args"].update(start_name="bm25"), "eval", "name of another system"),
    (lambda p: step(p, "report").update(name="eval"), "eval", "used twice"),
    (lambda p: step(p, "report").update(name="../eval"), "../eval", "name of its folder"),
    (lambda p: p["steps"].append(loop(grpo={"args": {"optim": "adamm"}})), "loop", "adamm"),
    (lambda p: p["steps"].append(loop(validate={"primary": "ndcg@7"})), "loop", "primary"),
    (lambda p: p["steps"].append(loop(samples=50)), "loop", "samples"),
    (lambda p: p["steps"].append(loop(hard={"num_beams": 4})), "loop", "num_beams"),
    (lambda p: p["steps"].append(loop(seeds={"source": "templated", "aspects": ["colur"]})), "loop", "aspects"),
    (lambda p: p["steps"].append(loop(sft={"stages": [REASON | {"max_length": 2}]})), "loop", "max_length"),
]  # fmt: skip
REASON = {"name": "reason", "tasks": {"reason_to_sid": {}}}


def step(values: dict, name: str) -> dict:
    return next(one for one in values["steps"] if one["name"] == name)


def loop(**args: Any) -> dict:
    return {**TRAJECTORIES, "args": args}


def put(target: Any, path: str, value: Any) -> None:
    *above, last = path.split(".")
    for key in above:
        target = (
            next(one for one in target if one["name"] == key)
            if isinstance(target, list)
            else target.setdefault(key, {})
        )
    target[last] = value


def refused(values: dict, output: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(RunArguments(steps=values["steps"], output_dir=str(output)))
    assert not output.exists() or not list(output.iterdir())
    text = str(caught.value)
    assert text.startswith("steps[") and "\n" not in text
    return text


@pytest.mark.parametrize(("name", "option", "value", "words"), WRONG, ids=[f"{w[0]}.{w[1]}={w[2]}"[:60] for w in WRONG])
def test_a_wrong_option_is_refused_before_the_first_step(name, option, value, words, tmp_path):
    values = whole_pipeline()
    put(step(values, name).setdefault("args", {}), option, value)
    text = refused(values, tmp_path / "run")
    assert f"'{name}'" in text and words in text, text


@pytest.mark.parametrize(("change", "name", "words"), TOGETHER)
def test_what_does_not_go_together_is_refused_before_the_first_step(change, name, words, tmp_path):
    values = whole_pipeline()
    change(values)
    text = refused(values, tmp_path / "run")
    assert f"'{name}'" in text and words in text, text


def test_query_sids_of_precomputed_vectors_are_refused(tmp_path):
    values = whole_pipeline()
    precomputed_queries(values, tmp_path)
    assert "query_sids" in refused(values, tmp_path / "run")


def test_the_right_pipeline_passes(tmp_path):
    steps = resolve(RunArguments(steps=[*whole_pipeline()["steps"], loop()], output_dir=str(tmp_path / "run")))
    assert [one.name for one in steps][-2:] == ["report", "loop"] and not (tmp_path / "run").exists()


def test_batches_of_groups_are_those_of_all_processes(tmp_path):
    """Two processes with two rows each hold one group of four; one process holds half of one."""
    values = whole_pipeline()
    step(values, "grpo")["args"]["args"]["per_device_train_batch_size"] = 2
    options = {"steps": values["steps"], "output_dir": str(tmp_path / "run")}
    resolve(RunArguments(**options, launch={"num_processes": 2}))
    with pytest.raises(ConfigError, match="'grpo'.*divisible"):
        resolve(RunArguments(**options))


def test_an_output_that_cannot_be_written_is_told_first(tmp_path):
    (tmp_path / "file").write_text("x")
    values = whole_pipeline()
    with pytest.raises(ConfigError, match="'data'.*cannot be written"):
        resolve(RunArguments(steps=values["steps"], output_dir=str(tmp_path / "file" / "run")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sft").write_text("x")
    with pytest.raises(ConfigError, match="'sft'"):
        resolve(RunArguments(steps=values["steps"], output_dir=str(tmp_path / "run")))


def test_steps_and_stages_are_addressed_by_name_or_number(tmp_path):
    values = whole_pipeline()
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(step(values, "sft").pop("args")), "utf-8")
    step(values, "sft")["config"] = "sft.yaml"
    file = write_pipeline(tmp_path / "p.yaml", values)

    def stages(*options: str) -> list[dict]:
        steps = resolve(parse(RunArguments, ["--config", str(file), "--output_dir", str(tmp_path / "run"), *options]))
        return next(one for one in steps if one.name == "sft").config.stages

    plain = stages()
    by_name = stages("--steps.sft.args.stages.personalise.args.num_train_epochs", "2")
    assert by_name[1]["args"] == {**plain[1]["args"], "num_train_epochs": 2} and by_name[0] == plain[0]
    assert by_name == stages("--steps.3.args.stages.1.args.num_train_epochs", "2")
    for option, words in (
        ("--steps.sfd.args.seed", "did you mean 'sft'?"),
        ("--steps.sft.args.stages.personalize.args.max_steps", "did you mean 'personalise'?"),
        ("--steps.12.args.seed", "a list of 9"),
    ):
        with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
            stages(option, "1")


def test_former_names_have_their_former_meaning(tmp_path):
    values = whole_pipeline()
    args = step(values, "sft")["args"]
    now = resolve(RunArguments(steps=values["steps"], output_dir=str(tmp_path)))[3].config
    args["max_length"] = args.pop("prompt_max_length")
    former = resolve(RunArguments(steps=values["steps"], output_dir=str(tmp_path)))[3]
    assert former.config == now and not is_done(former)
    args["prompt_max_length"] = 128
    with pytest.raises(ConfigError, match="'max_length' is the former name of 'prompt_max_length'"):
        resolve(RunArguments(steps=values["steps"], output_dir=str(tmp_path)))
    folders = [word for name in ("data", "sids", "model", "output") for word in (f"--{name}_dir", name)]
    stages = ["--stages", yaml.safe_dump(args["stages"], default_flow_style=True)]
    made = parse(sft.Arguments, [*folders, *stages, "--max_history", "4"])
    assert (made.prompt_max_history, made.stages[0]["max_length"]) == (4, 256)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eval_step": "evel"}, "did you mean 'eval'?"),
        ({"metrics": ["ndcg@7"]}, "ndcg@7"),
        ({"seeds": [1, 1]}, "seeds"),
    ],
)
def test_seeds_are_refused_before_the_first_run(change, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        seeds.main(seeds.Arguments(steps=whole_pipeline()["steps"], output_dir=str(tmp_path / "run"), **change))
    assert words in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"k": HUGE}, {"num_beams": HUGE}, {"k": 0}, {"batch_size": HUGE}])
def test_impossible_sizes_of_retrieval_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Retrieve(model_dir="m", output_dir="o", requests="r.jsonl", **options)


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_queue": 0}, {"timeout_s": 0}, {"max_wait_ms": -1}])
def test_impossible_sizes_of_a_server_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        serve.Arguments(model_dir="m", **options)
