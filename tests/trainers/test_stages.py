"""Stages: each starts from the one before, is skipped when unchanged, and survives being killed."""

from __future__ import annotations

import gc
import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sft_stand_ins import model_folder, random_examples, task_examples
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.core.resume import COMPLETE_FILE, is_complete, last_complete_checkpoint
from sidtune.trainers.common.stage import finite
from sidtune.trainers.sft.mixture import StageConfig, TaskMix, chosen_rows, describe, mixture, parse_stages
from sidtune.trainers.sft.stages import run_stages

pytestmark = pytest.mark.medium

ARGS = {
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-3,
    "num_train_epochs": 2,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 5,
    "disable_tqdm": True,
}
TASKS = {"text_to_sid": {"weight": 2.0}, "query_to_text": {"limit": 10}}


def stage(name="align", train="all", **changes):
    args = ARGS | changes.pop("args", {})
    return {"name": name, "tasks": TASKS, "train": train, "args": args, "max_length": 64} | changes


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Each stage collects garbage; the objects of the imported libraries need not be looked at each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def world(tmp_path):
    """Model, data and SID folders, and a function that runs stages on them."""
    model_folder(tmp_path / "model")
    for name in ("data", "sids"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content.txt").write_text(name)

    def run(*values, output="out", **options):
        options = {"build_examples": task_examples, "seed": 7} | options
        paths = [tmp_path / name for name in ("model", "data", "sids", output)]
        return run_stages(values, *paths, **options)

    run.root = tmp_path
    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(one, two, tolerance=1e-6):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=tolerance, rtol=0)


def changed(one, two):
    one, two = weights(one), weights(two)
    return {name for name in one if not torch.equal(one[name], two[name])}


class Kill(TrainerCallback):
    """Dies in the middle of a step, or in the middle of writing a checkpoint."""

    class Killed(BaseException):
        pass

    def __init__(self, step=None, save=None):
        self.step, self.save = step, save

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.Killed

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.save:
            raise self.Killed


class Steps(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)


def test_each_stage_starts_from_the_folder_of_the_one_before(world):
    first, second = world(stage("rows_first", "rows"), stage("then_all", eval_tasks={"text_to_sid": None}))
    assert (first.name, second.name) == ("stage_1_rows_first", "stage_2_then_all")
    for folder in (first, second):
        AutoModelForCausalLM.from_pretrained(folder)
        assert len(AutoTokenizer.from_pretrained(folder)) == 68
        assert json.loads((folder / "sid_vocabulary.json").read_text())["level_sizes"] == [3, 3]
        history = json.loads((folder / "log_history.json").read_text())
        losses = [h["loss"] for h in history if "loss" in h]
        assert losses[-1] < losses[0]
        record = json.loads((folder / "run.json").read_text())
        train = record["metrics"]["examples"]["train"]
        assert train["text_to_sid"]["examples"] == 64 and train["query_to_text"]["examples"] == 10
        assert record["metrics"]["steps"] == 20
        assert record["config"]["stage"]["tasks"]["text_to_sid"] == {"weight": 2.0, "limit": None, "options": {}}
        assert not list(folder.rglob("*.pt")) and not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pth"))
    assert changed(world.root / "model", first) == {"model.embed_tokens.weight"}
    before, after = (weights(f)["model.embed_tokens.weight"] for f in (world.root / "model", first))
    assert torch.equal(before[:62], after[:62]) and not torch.equal(before[62:], after[62:])
    assert len(changed(first, second)) > 10
    assert json.loads((second / "run.json").read_text())["metrics"]["eval"]["eval_loss_text_to_sid"] > 0
    assert not list(world.root.glob("out/.*"))


def test_lora_stage_writes_a_merged_model_and_what_it_trained(world):
    from sidtune.tokenizers.vocabulary.saving import load_model

    (folder,) = world(stage("lora", "lora", lora={"r": 4}))
    assert len(changed(world.root / "model", folder)) > 10
    assert (folder / "trained" / "adapter_model.safetensors").is_file()
    merged, again = AutoModelForCausalLM.from_pretrained(folder), load_model(folder / "trained")
    ids = torch.tensor([[3, 5, 63, 66]])
    torch.testing.assert_close(merged(ids).logits, again(ids).logits, atol=1e-5, rtol=1e-5)


def test_unchanged_stages_are_skipped_and_a_change_retrains_it_and_all_later_ones(world):
    short = {"max_steps": 2, "save_strategy": "no"}
    plan = [stage("one", args=short), stage("two", "rows", args=short), stage("three", "rows", args=short)]
    folders = world(*plan)
    stamps = [(f / "run.json").stat().st_mtime_ns for f in folders]
    steps = Steps()
    assert world(*plan, callbacks=[steps]) == folders and steps.seen == []
    assert [(f / "run.json").stat().st_mtime_ns for f in folders] == stamps

    plan[1]["args"] = plan[1]["args"] | {"learning_rate": 1e-3}
    world(*plan, callbacks=[steps])
    assert len(steps.seen) == 4
    assert (folders[0] / "run.json").stat().st_mtime_ns == stamps[0]

    for change in (
        {"seed": 8},
        {"settings": {"max_chars": {"title": 9}}},
        {"extra_inputs": {"t": world.root / "sids"}},
    ):
        steps.seen.clear()
        world(*plan, callbacks=[steps], **change)
        assert len(steps.seen) == 6, change
    (world.root / "data" / "content.txt").write_text("other")
    steps.seen.clear()
    world(*plan, callbacks=[steps])
    assert len(steps.seen) == 6


@pytest.mark.parametrize("train", ["all", "rows", "lora"])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_killed_stage_resumes_and_ends_with_the_weights_of_an_uninterrupted_one(world, train, strategy):
    plan = stage("x", train, args={"train_sampling_strategy": strategy, "lr_scheduler_type": "cosine"})
    if train == "lora":
        plan["lora"] = {"lora_dropout": 0.1}
    (whole,) = world(plan, output="whole")
    # Steps 5, 10 and 15 are saved; an epoch has 10 steps. The second run dies in the second epoch.
    for step, expected in ((7, [1, 2, 3, 4, 5, 6, 7]), (13, [6, 7, 8, 9, 10, 11, 12, 13]), (None, list(range(11, 21)))):
        steps = Steps()
        try:
            (folder,) = world(plan, output="killed", callbacks=[steps, Kill(step)])
        except Kill.Killed:
            assert not (world.root / "killed" / "stage_1_x").exists()
        assert steps.seen == expected
    assert_same_weights(whole, folder)
    curves = [
        [(h["step"], h["loss"]) for h in json.loads((f / "log_history.json").read_text()) if "loss" in h]
        for f in (whole, folder)
    ]
    assert [s for s, _ in curves[0]] == [s for s, _ in curves[1]]
    # A log that spans the resume holds only the steps after it; all others agree.
    agree = [np.isclose(a, b, atol=1e-6) for (_, a), (_, b) in zip(*curves, strict=True)]
    assert sum(agree) >= len(agree) - 2 and agree[-1]


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_stage_stopped_behind_its_last_step_is_not_trained_further(world, train):
    """The last checkpoint lies in the middle of an epoch; transformers would go on from it by one step more."""
    plan = stage("x", train, args={"max_steps": 7, "save_steps": 7})
    (whole,) = world(plan, output="whole")
    with pytest.raises(Kill.Killed):
        world(plan, output="killed", callbacks=[Kill(save=7)])
    steps = Steps()
    (folder,) = world(plan, output="killed", callbacks=[steps])
    assert steps.seen == [] and json.loads((folder / "run.json").read_text())["metrics"]["steps"] == 7
    assert_same_weights(whole, folder, 0)


def test_a_half_written_checkpoint_is_skipped(world):
    plan = stage("x")
    (whole,) = world(plan, output="whole")
    with pytest.raises(Kill.Killed):
        world(plan, output="killed", callbacks=[Kill(save=10)])
    work = world.root / "killed" / ".work_stage_1" / "checkpoints"
    # The callbacks of a caller come after ours, so the checkpoint is complete; break it as a dying process would.
    assert is_complete(work / "checkpoint-10")
    (work / "checkpoint-10" / "optimizer.pt").write_bytes(b"half")
    shutil.copytree(work / "checkpoint-5", work / "checkpoint-12")
    (work / "checkpoint-12" / COMPLETE_FILE).unlink()
    assert last_complete_checkpoint(work).name == "checkpoint-5"
    steps = Steps()
    (folder,) = world(plan, output="killed", callbacks=[steps])
    assert steps.seen[0] == 6
    assert_same_weights(whole, folder)


def test_a_changed_config_does_not_resume_from_the_old_checkpoint(world):
    with pytest.raises(Kill.Killed):
        world(stage("x"), callbacks=[Kill(7)])
    steps = Steps()
    world(stage("x", args={"weight_decay": 0.1}), callbacks=[steps])
    assert steps.seen[0] == 1


def test_two_runs_give_the_same_weights_and_another_seed_others(world):
    folders = [world(stage("x"), output=f"out{n}", seed=seed)[0] for n, seed in enumerate((3, 3, 4))]
    assert_same_weights(folders[0], folders[1], 0)
    assert changed(folders[0], folders[2])


def test_weights_repeat_and_limits_cut():
    datasets = {
        task: Dataset.from_dict(random_examples(40).filter(lambda e, t=task: e["task"] == t)[:]) for task in TASKS
    }
    mixes = {"text_to_sid": TaskMix(weight=2.5), "query_to_text": TaskMix(limit=4)}
    mixed = mixture(datasets, mixes, 3, "test")
    rows = len(datasets["text_to_sid"])
    assert mixed.column_names == ["input_ids", "labels", "task"]
    assert describe(mixed)["text_to_sid"]["examples"] == 2 * rows + rows // 2
    assert describe(mixed)["query_to_text"]["examples"] == 4
    counts = np.unique([str(r["input_ids"]) for r in mixed if r["task"] == "text_to_sid"], return_counts=True)[1]
    assert sorted(counts) == [2] * (rows - rows // 2) + [3] * (rows // 2)
    assert describe(mixed)["text_to_sid"]["targets"] == 2 * describe(mixed)["text_to_sid"]["examples"]
    assert mixture(datasets, mixes, 3, "test")[:] == mixed[:]
    assert mixture(datasets, mixes, 4, "test")[:] != mixed[:]
    alone = mixture({"query_to_text": datasets["query_to_text"]}, {"query_to_text": TaskMix(limit=4)}, 3, "test")
    both = mixed.filter(lambda e: e["task"] == "query_to_text")
    assert sorted(map(str, alone["input_ids"])) == sorted(map(str, both["input_ids"]))


@pytest.mark.parametrize(("weight", "limit", "expected"), [(1, None, 10), (0.3, None, 3), (3, 2, 6), (1.25, 4, 5)])
def test_number_of_chosen_rows(weight, limit, expected):
    rows = chosen_rows(10, TaskMix(weight=weight, limit=limit), 0, "a")
    assert len(rows) == expected and rows.min() >= 0 and rows.max() < 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"taks": {}}, "did you mean 'tasks'"),
        ({"train": "row"}, "'train' must be one of 'rows', 'lora', 'all', got 'row'"),
        ({"name": "Stage 1"}, "lower-case letters"),
        ({"tasks": {}}, "names no tasks"),
        ({"tasks": {"a": {"wieght": 1}}}, "tasks.a: unknown key 'wieght' .did you mean 'weight'"),
        ({"tasks": {"a": {"weight": 0}}}, "weight must be a number above 0"),
        ({"tasks": {"a": {"weight": "much"}}}, "'weight' must be a number"),
        ({"tasks": {"a": {"limit": 0}}}, "limit must be at least 1"),
        ({"tasks": ["a"]}, "'tasks' must be a mapping"),
        ({"lora": {"r": 4}}, "lora options are set, but train is 'all'"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"args": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"args": {"model_init_kwargs": {"trust_remote_code": True}}}, "runs no code"),
        ({"train": "lora", "lora": {"rank": 4}}, "unknown key 'rank'"),
        ({"max_length": 6}, "longer than max_length=6"),
        ({"tasks": {"nothing_here": None}}, "'nothing_here' has no examples"),
    ],
)
def test_wrong_stages_are_refused_in_one_sentence_and_leave_nothing(world, change, words):
    with pytest.raises(SidtuneError, match=words) as caught:
        world(stage("x") | change)
    assert "\n" not in str(caught.value)
    assert not list(world.root.glob("out/stage_*"))


def test_a_typo_in_the_last_stage_is_told_before_the_first_one_trains(world):
    steps = Steps()
    with pytest.raises(ConfigError, match="learning_rate"):
        world(stage("one"), stage("two", args={"learning_rates": 1}), callbacks=[steps])
    assert steps.seen == []


def test_new_rows_are_refused_under_fsdp(world, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for train in ("rows", "lora"):
        with pytest.raises(ConfigError, match="does not work under FSDP2"):
            world(stage("x", train))


@pytest.mark.parametrize("broken", ["model", "data", "sids"])
def test_missing_inputs_are_told(world, broken):
    shutil.rmtree(world.root / broken)
    with pytest.raises(DataError, match=f"{broken} does not exist"):
        world(stage("x"))


def test_a_damaged_model_folder_is_told(world):
    (world.root / "model" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="No model can be read"):
        world(stage("x"))


def test_stages_need_a_list_and_distinct_names():
    with pytest.raises(ConfigError, match="at least one stage"):
        parse_stages([])
    with pytest.raises(ConfigError, match="is taken"):
        parse_stages([stage("a"), stage("a")])
    with pytest.raises(ConfigError, match="expected a mapping"):
        parse_stages(["a"])
    parsed = StageConfig(name="a", tasks={"t": None})
    assert parse_stages([parsed]) == [parsed] and parsed.tasks == {"t": TaskMix()}


def test_metrics_without_a_value_become_null():
    assert finite({"a": float("nan"), "b": [1.5, float("inf")]}) == {"a": None, "b": [1.5, None]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A small shop on disk, its SIDs and a start model: what the first steps of a pipeline write."""
    from sidtune.data_builders.shop_world.world import ShopWorld
    from sidtune.data_builders.tables.splits import apply_split
    from sidtune.data_builders.tables.store import save_tables
    from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds
    from sidtune.tokenizers.vocabulary.extension import extend_vocabulary
    from sidtune.tokenizers.vocabulary.saving import save_trained

    root = tmp_path_factory.mktemp("shop")
    options = {"n_items": 150, "n_users": 20, "n_requests": 240, "n_departments": 2, "leaves_per_department": 4}
    tables, split = apply_split(ShopWorld.from_options(**options).to_tables())
    (root / "data").mkdir()
    save_tables(tables, root / "data", split, {"reader": "shop_world"})
    codes = np.random.default_rng(0).integers(0, 8, (150, 3)).astype(np.int32)
    sids = SemanticIds(tables.items["item_id"].to_pylist(), codes, (8, 8, 8))
    sids.save_pretrained(root / "sids")
    tokenizer = train_lm_tokenizer(tables.items["title"].to_pylist(), vocab_size=400)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    model = build_model({"model_type": "qwen3", **size}, tokenizer)
    vocabulary = extend_vocabulary(model, tokenizer, sids, init="mean")
    save_trained(model, vocabulary, tokenizer, root / "model")
    return root


def test_the_tasks_of_the_data_builders_train_by_name(shop, tmp_path):
    args = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 5, "disable_tqdm": True}
    plan = [
        {
            "name": "align",
            "train": "rows",
            "tasks": {"item_to_sid": {"weight": 2.0, "limit": 60}, "sid_to_item": {"limit": 20}},
        },
        {
            "name": "behave",
            "tasks": {"whole_history": {"options": {"overlap": 4}}, "query_to_sid": None},
            "eval_tasks": {"request_to_sid": {"limit": 10}},
            "args": {"packing": True},
        },
    ]
    plan = [stage | {"max_length": 256, "args": args | stage.get("args", {})} for stage in plan]
    folders = run_stages(plan, shop / "model", shop / "data", shop / "sids", tmp_path, settings={"templates": "plain"})
    first, second = (json.loads((f / "run.json").read_text())["metrics"] for f in folders)
    assert first["examples"]["train"]["item_to_sid"] == {
        "examples": 120,
        "tokens": first["examples"]["train"]["item_to_sid"]["tokens"],
        "targets": 360,
    }
    assert first["examples"]["train"]["sid_to_item"]["examples"] == 20
    assert set(second["examples"]["train"]) == {"whole_history", "query_to_sid"}
    assert second["examples"]["train"]["query_to_sid"]["targets"] % 3 == 0
    assert second["eval"]["eval_loss_request_to_sid"] > 0 and second["eval"]["eval_sid_accuracy_3"] >= 0
    history = json.loads((folders[0] / "log_history.json").read_text())
    assert [h["loss"] for h in history if "loss" in h][-1] < history[0]["loss"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": {"item_to_sids": None}}, "no task named 'item_to_sids': did you mean 'item_to_sid'"),
        ({"tasks": {"whole_history": {"options": {"max_turn": 3}}}}, "'max_turn' .did you mean 'max_turns'"),
        ({"eval_tasks": {"whole_history": None}}, "cannot be evaluated"),
        ({"max_length": 4}, "'item_to_sid' has no examples"),
    ],
)
def test_wrong_tasks_are_refused_before_any_training(shop, tmp_path, change, words):
    with pytest.raises(SidtuneError, match=words):
        run_stages(
            [stage("x", tasks={"item_to_sid": None}) | change], shop / "model", shop / "data", shop / "sids", tmp_path
        )
    assert not list(tmp_path.glob("stage_*"))


def test_how_examples_are_rendered_is_part_of_what_identifies_a_stage(shop, tmp_path):
    from sidtune.trainers.sft.task_examples import TaskExamples

    def identity(**options):
        return json.dumps(TaskExamples(shop / "data", shop / "sids", **options).identity(), sort_keys=True)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "turn.jinja").write_text("{{ query }}:")
    found = [
        identity(),
        identity(max_chars={"title": 9}),
        identity(history_context=False),
        identity(templates="chatml"),
        identity(templates=tmp_path / "mine"),
        identity(seed=1),
    ]
    (tmp_path / "mine" / "turn.jinja").write_text("{{ query }} ?")
    assert len({*found, identity(templates=tmp_path / "mine")}) == 7
    assert identity() == found[0]
    with pytest.raises(ConfigError, match="no templates 'chatm': did you mean 'chatml'"):
        identity(templates="chatm")


def test_semantic_ids_of_another_model_are_refused(shop, tmp_path):
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

    SemanticIds(["a"], np.zeros((1, 2), np.int32), (4, 4)).save_pretrained(tmp_path / "sids")
    with pytest.raises(DataError, match="levels of"):
        run_stages(
            [stage(tasks={"item_to_sid": None})], shop / "model", shop / "data", tmp_path / "sids", tmp_path / "out"
        )
