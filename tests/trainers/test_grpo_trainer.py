"""DebiasedGRPOTrainer as a whole: it learns in every mode, resumes, stops, and refuses what contradicts itself."""

from __future__ import annotations

import ast
import copy
import logging

import numpy as np
import pytest
import torch
from grpo_stand_ins import END, PATHS, SID_TOKENS, catalogue, config, plain_logps, prompts, trainer, weights_of
from sft_stand_ins import model_folder, tiny_model, tiny_tokenizer
from transformers import TrainerCallback
from trl import GRPOTrainer, TrlParser

from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.decoding.beam_search import sid_beam_search
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.tokenizers.vocabulary.saving import load_model
from sidtune.tokenizers.vocabulary.trainable_tokens import set_trainable
from sidtune.trainers.common import trl_surface
from sidtune.trainers.grpo.advantages import group_advantages
from sidtune.trainers.grpo.args import checked_args, grpo_config
from sidtune.trainers.grpo.config import PRESETS, DebiasedGRPOConfig, position_weights
from sidtune.trainers.grpo.diagnostics import group_metrics
from sidtune.trainers.grpo.rollout_rewards import RolloutRewards
from sidtune.trainers.grpo.rollouts import Rollout, Rows, pad_left
from sidtune.trainers.grpo.sid_positions import SidTable, read_ids
from sidtune.trainers.grpo.trainer import DebiasedGRPOTrainer

pytestmark = pytest.mark.medium


def target_probability(made) -> float:
    """Mean probability of the targets, over all leaves."""
    rows = made.train_dataset
    ids, mask = pad_left(rows["prompt_ids"], 0)
    trie = made.table.trie
    with torch.no_grad():
        found = sid_beam_search(made.model, ids, mask, trie=trie, sid_token_ids=SID_TOKENS, num_beams=9)
    place = found.leaves.argsort(1)
    scores = found.scores.gather(1, place)
    targets = torch.tensor([leaves[0] for leaves in rows["target_leaves"]])
    return scores[torch.arange(len(rows)), targets].exp().mean().item()


@pytest.mark.parametrize(
    ("rollout", "options"),
    [
        ("sample", {}),
        ("sample", {"position_credit": "tpma"}),
        ("sample", {"preset": "none", "num_iterations": 2}),
        ("sample", {"loss_type": "dapo", "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}),
        ("sample", {"multi_objective_aggregation": "normalize_then_sum", "preset": "none"}),
        ("without_replacement", {}),
        ("beam", {}),
    ],
)
def test_every_direct_rollout_learns(tmp_path, rollout, options):
    options = {"max_steps": 30, "learning_rate": 3e-3, "per_device_train_batch_size": 32} | options
    made = trainer(tmp_path, rollout=rollout, rewards={"hit": 1.0, "prefix_match": 0.3}, **options)
    before = target_probability(made)
    made.train()
    assert target_probability(made) > 3 * before
    logged = made.state.log_history[0]
    for name in ("group/zero_variance", "group/distinct_items", "rollout/valid", "hit/level_1", "hit/level_2"):
        assert name in logged
    assert logged["rollout/valid"] == 1.0 and "rewards/hit/mean" in logged and "clip_ratio/region_mean" in logged
    assert made.args.trie_renormalize == ("log_z/sid" in logged)


def reasoned_target_probability(made, texts: list[list[int]]) -> float:
    prompts_ids = [ids + text + [END] for ids in made.train_dataset["prompt_ids"] for text in texts]
    ids, mask = pad_left(prompts_ids, 0)
    found = sid_beam_search(made.model, ids, mask, trie=made.table.trie, sid_token_ids=SID_TOKENS, num_beams=9)
    targets = torch.tensor([leaves[0] for leaves in made.train_dataset["target_leaves"] for _ in texts])
    return found.scores.exp().where(found.leaves == targets[:, None], 0.0).sum(1).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["reasoning", "list"])
def test_reasoning_rollouts_learn(tmp_path, credit):
    """Credit "list" trains the SID behind a reasoning directly; the other must at least raise the reward it sees."""
    made = trainer(
        tmp_path,
        rollout="reasoning",
        credit=credit,
        rewards={"list_ndcg": 1.0},
        num_beams=9,
        max_completion_length=2,
        mask_truncated_completions=False,
        per_device_train_batch_size=32,
        num_generations=8,
        max_steps=80,
        learning_rate=1e-3,
        data=prompts(4),
    )
    before = reasoned_target_probability(made, [[10], [20]])
    made.train()
    history = [h["reward"] for h in made.state.log_history if "reward" in h]
    assert np.mean(history[-10:]) > np.mean(history[:5]) + 0.05
    assert all(name in made.state.log_history[0] for name in ("rollout/closed", "log_z/sid", "hit/level_2"))
    if credit == "list":
        assert reasoned_target_probability(made, [[10], [20]]) > 2 * before


def test_the_list_loss_is_the_exact_gradient_of_the_rollouts(tmp_path):
    """Reasoning part and list part together, against autograd of the formula with a second implementation of the scores."""
    made = trainer(
        tmp_path,
        rollout="reasoning",
        credit="list",
        rewards={"hit": 1.0, "prefix_match": 0.5},
        num_beams=9,
        max_completion_length=3,
        mask_truncated_completions=False,
    )
    rows = [dict(row) for row in made.train_dataset.select(range(2)) for _ in range(4)]
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    inputs = made._generate_and_score_completions(rows)
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(made._compute_loss(made.model, inputs), parameters)
    rollout, table = made._rollout, made.table
    gains = torch.stack(
        [
            (torch.tensor(PATHS) == torch.tensor(PATHS[row["target_leaves"][0]])).cumprod(1).sum(1) * 0.25
            + (torch.arange(9) == row["target_leaves"][0])
            for row in rows
        ]
    )
    share = rollout.scores.softmax(1)
    each = gains.gather(1, rollout.leaves)
    expected = (share * each).sum(1)
    advantages = group_advantages(expected, 4)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    read = torch.cat(
        [inputs["prompt_ids"], read_ids(inputs["completion_ids"], inputs["completion_mask"], *made.marks)], 1
    )
    states = made.model(input_ids=read, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logs = states[:, -width - 1 : -1].log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    objective = (logs * inputs["tool_mask"] * inputs["completion_mask"] * advantages[:, None]).sum()
    direct = SidTable(table.trie, table.tokens, reasoned=False)
    for row in range(8):
        prefix = rollout.prompt_ids[row] + rollout.completion_ids[row][:-4] + [END]
        items = torch.cat([torch.tensor([prefix] * 9), made._maker.tokens_of(rollout.leaves[row])], 1)
        item_logs = plain_logps(made.model, items, torch.ones_like(items), 2, direct).log_probs.sum(1)
        objective = objective + (share[row] * (each[row] - expected[row]) * item_logs).sum()
    wanted = torch.autograd.grad(-objective / (8 * made.max_completion_length), parameters)
    flat = [torch.cat([g.flatten() for g in gradients]).double() for gradients in (found, wanted)]
    assert (flat[0] - flat[1]).norm() < 1e-4 * flat[1].norm()


@pytest.mark.parametrize("mode", ["rows", "lora", "all"])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_every_training_mode_trains_what_it_says(tmp_path, mode, beta):
    folder = model_folder(tmp_path / "model")
    model = load_model(folder)
    before = copy.deepcopy(model.state_dict())
    vocabulary = Vocabulary.from_pretrained(folder)
    model = set_trainable(model, vocabulary, mode, {"r": 4} if mode == "lora" else None)
    made = trainer(
        tmp_path / "run",
        model=model,
        beta=beta,
        max_steps=3,
        per_device_train_batch_size=16,
        weight_decay=0.1,
        trainer_options={"train": mode},
    )
    made.train()
    assert max(h["grad_norm"] for h in made.state.log_history if "grad_norm" in h) > 0
    if beta:  # the first step compares the model with itself, over the trie on both sides
        kl = [h["kl"] for h in made.state.log_history if "kl" in h]
        assert abs(kl[0]) < 1e-6 < kl[-1]
    embedding = dict(made.model.named_parameters())
    old = before["model.embed_tokens.weight"]
    name = next(n for n in embedding if n.endswith("embed_tokens.weight"))
    changed = (embedding[name].detach() != old).any(1)
    assert changed[: vocabulary.start].any() == (mode == "all")


def test_weight_decay_leaves_token_rows_alone(tmp_path):
    folder = model_folder(tmp_path / "model")
    vocabulary = Vocabulary.from_pretrained(folder)
    for mode, kept in (("rows", 0), ("lora", None)):
        model = set_trainable(load_model(folder), vocabulary, mode)
        names = trainer(tmp_path, model=model, trainer_options={"train": mode}).get_decay_parameter_names(model)
        assert len(names) == 0 if kept == 0 else all("lora_" in n for n in names)


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    """Killed in the second epoch: prompts, rollouts and optimizer go on where they stood."""
    options = {
        "max_steps": None,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 8,
        "data": prompts(8),
    }
    options = {k: v for k, v in options.items() if v is not None} | {"max_steps": 10}
    whole = trainer(tmp_path / "one", **options)
    whole.train()
    broken = trainer(tmp_path / "two", trainer_options={"callbacks": [Kill(6)]}, **options)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(tmp_path / "two", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-6"))
    assert resumed.state.global_step == 10
    torch.testing.assert_close(weights_of(resumed.model), weights_of(whole.model), atol=0, rtol=0)


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    found = []
    for checkpointing in (False, True):
        made = trainer(tmp_path, activation_checkpointing=checkpointing, max_steps=2, per_device_train_batch_size=16)
        made.train()
        found.append(weights_of(made.model))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_hits_by_level_are_those_of_the_best_target():
    rewarding = RolloutRewards(None, catalogue(), by_item=False)
    targets = [
        [2, 4],
        [4],
        [0],
        [],
    ]  # codes (0, 2) and (1, 1); the second is worth more, the first has the longer prefix
    rows = [{"target_leaves": t, "target_gains": [1.0, 5.0][-len(t) :] if t else []} for t in targets]
    leaves = torch.tensor([[1], [7], [0], [3]])  # codes (0, 1), (2, 1), (0, 0), (1, 0)
    rollout = Rollout([[9]] * 4, [[1]] * 4, [[0]] * 4, leaves, torch.zeros(4, 1))
    rewarding.score(rollout, rows)
    assert rewarding.matches().tolist() == [[1, 0], [0, 1], [1, 1], [-1, -1]]
    rewards = torch.tensor([0.2, 0.2, 0.2, 0.2, 1.0, torch.nan, 0.0, 0.0])
    twice = rewarding.matches().repeat(2, 1)
    firsts = torch.tensor([1, 7, 0, 3, 5, 5, 5, -1])
    found = group_metrics(rewards, firsts, twice, torch.tensor([True] * 6 + [False] * 2), 4)
    assert found["hit/level_1"] == pytest.approx(2 / 3) and found["hit/level_2"] == pytest.approx(1 / 3)
    assert found["group/zero_variance"] == 0.5 and found["group/distinct_items"] == (4 + 1) / 2
    assert found["rollout/valid"] == found["rollout/scored"] == 7 / 8 and found["rollout/closed"] == 0.75


def test_evaluation_rolls_out_and_measures_but_trains_nothing(tmp_path):
    made = trainer(
        tmp_path,
        max_steps=1,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        num_generations_eval=2,
        trainer_options={"eval_dataset": prompts(8, seed=9)},
    )
    before = weights_of(made.model)
    made.train()
    (found,) = [h for h in made.state.log_history if "eval_reward" in h]
    for name in ("hit/level_1", "group/zero_variance", "rollout/valid", "log_z/sid", "entropy", "rewards/hit/mean"):
        assert f"eval_{name}" in found
    assert found["eval_rollout/valid"] == 1 and torch.equal(weights_of(made.model), before)


@pytest.mark.parametrize("rollout", ["sample", "beam", "reasoning"])
def test_a_process_with_part_of_a_group_rolls_out_its_part(tmp_path, rollout):
    """Six rows of three groups of four: rows 2 to 7, so that a group is cut on either side."""
    made = trainer(tmp_path, rollout=rollout, max_completion_length=2, num_beams=3)
    texts = [[9], [9], [10, 11], [10, 11], [10, 11], [10, 11]]
    rollout_made = made._maker(made.model, texts, Rows(2, 6, 4))
    assert len(rollout_made) == 6 and rollout_made.prompt_ids == texts
    if rollout == "beam":
        ids, mask = pad_left([[9], [10, 11]], 0)
        best = sid_beam_search(made.model, ids, mask, trie=made.table.trie, sid_token_ids=SID_TOKENS, num_beams=4)
        wanted = torch.cat([best.leaves[0, 2:], best.leaves[1]])
        assert torch.equal(rollout_made.leaves[:, 0], wanted)


def without_targets():
    return prompts(8).remove_columns(["target_leaves", "target_gains"]).add_column("target_leaves", [[]] * 8)


def test_runs_that_cannot_learn_stop_with_a_reason(tmp_path):
    flat = trainer(tmp_path, rewards={"hit": 0.0, "validity": 1.0}, patience=2, max_steps=9)
    with pytest.raises(SidtuneError, match="In the last 2 generations .* all rewards of each group were equal"):
        flat.train()
    assert flat.state.global_step == 2
    lost = trainer(tmp_path, rewards={"hit": 1.0}, patience=2, max_steps=9, data=without_targets())
    with pytest.raises(SidtuneError, match="no rollout could be scored; check that the prompts have targets"):
        lost.train()
    unending = trainer(
        tmp_path, rollout="reasoning", num_beams=2, max_completion_length=1, patience=2, max_steps=9, seed=1
    )
    unending._maker.end_token_id = 6  # a word the model never says next
    with pytest.raises(SidtuneError, match="no reasoning ended by itself"):
        unending.train()
    broken = trainer(tmp_path, max_steps=9)
    with torch.no_grad():
        next(p for n, p in broken.model.named_parameters() if n.endswith("model.norm.weight")).fill_(torch.nan)
    with pytest.raises(SidtuneError, match="NaN"):
        broken.train()


POPULAR = {"catalogue": catalogue(popularity_of_leaf=np.arange(9.0))}  # so that no group has equal rewards


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    made = trainer(tmp_path, max_steps=9, rewards={"hit": 1.0, "popularity_penalty": 0.1}, trainer_options=POPULAR)
    compute = GRPOTrainer._compute_loss

    def bad(self, model, inputs):
        return compute(self, model, inputs) * torch.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_compute_loss", bad)
        with pytest.raises(SidtuneError, match="The loss of step 1 is not finite"):
            made.train()


REFUSED = [
    ({"preset": "strickt"}, "did you mean 'strict'"),
    ({"rollout": "smaple"}, "did you mean 'sample'"),
    ({"rollout": "reasoning", "credit": "sid"}, "has no credit 'sid'"),
    ({"credit": "list"}, "rollout 'sample' has no credit 'list'"),
    ({"baseline": "leave_one_out", "num_generations": 1}, "at least two rows"),
    ({"rollout": "beam", "baseline": "leave_one_out"}, "no independent samples"),
    ({"rollout": "beam", "scale_rewards": "group"}, "weights its rows by their probabilities"),
    ({"rollout": "without_replacement", "baseline": "group_mean"}, "baseline of its own"),
    ({"rollout": "beam", "temperature": 0.7}, "only at temperature 1"),
    ({"rollout": "beam", "position_credit": "tpma"}, "compares independent samples"),
    ({"beta": 0.1, "importance_sampling_level": "sequence"}, "token-level importance sampling"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "divides by standard deviations"),
    ({"loss_type": "cispo"}, "cispo caps the ratio at epsilon_high itself"),
    ({"rollout": "reasoning", "loss_type": "grpo"}, "divides by the length of each reasoning"),
    ({"rollout": "reasoning", "credit": "list", "loss_type": "vespo"}, "needs a clipped loss_type"),
    ({"position_credit": "tpma", "importance_sampling_level": "sequence"}, "needs token-level ratios"),
    ({"use_vllm": True}, "decoded over the catalogue's trie by the model itself"),
    ({"top_p": 0.9}, "another distribution"),
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"num_generations": 3}, "must be divisible by"),
    ({"num_beams": 0}, "must be at least 1"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_settings_that_contradict_each_other_are_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        config(tmp_path, **options)
    assert "\n" not in str(caught.value)
    if "num_generations" not in options or options["num_generations"] == 1:
        with pytest.raises(ConfigError, match=words):
            DebiasedGRPOConfig.check_settings(options)


def test_presets_fill_what_is_left_open_and_say_so(tmp_path, caplog):
    for name in PRESETS:
        made = config(tmp_path, preset=name)
        for key, value in PRESETS[name].items():
            assert getattr(made, key) == value and made.preset_values[key] == value
    faithful = config(tmp_path, preset="faithful", beta=0.0, scale_rewards=False)
    assert (faithful.beta, faithful.scale_rewards) == (0.0, "none")
    assert not {"beta", "scale_rewards"} & set(faithful.preset_values)
    beam = config(tmp_path, rollout="beam")
    assert (beam.baseline, beam.scale_rewards) == ("group_mean", "none")
    with caplog.at_level(logging.INFO, logger="sidtune.trainers.grpo.trainer"):
        trainer(tmp_path, epsilon_high=0.4)
    told = caplog.text
    assert "Preset 'strict' set" in told and "baseline=leave_one_out" in told and "epsilon_high" not in told
    assert position_weights(None, 5) == [2, 2, 2, 1, 1] and position_weights(None, 3) == [2, 2, 2]
    assert position_weights(None, 6) == [2, 2, 2, 1, 1, 1]
    with pytest.raises(ConfigError, match="one weight for each of the 2 levels"):
        position_weights([1.0], 2)


def test_trls_parser_reads_the_config(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--rollout", "beam", "--num_beams", "4"]
    (made,) = TrlParser(DebiasedGRPOConfig).parse_args_into_dataclasses(words)
    assert (made.rollout, made.num_beams, made.baseline, made.loss_type) == ("beam", 4, "group_mean", "dr_grpo")


def test_what_the_trainer_refuses(tmp_path):
    with pytest.raises(ConfigError, match="One generation takes 16 prompts, but there are only 8"):
        trainer(tmp_path, per_device_train_batch_size=64)
    with pytest.raises(ConfigError, match="There is no reward"):
        DebiasedGRPOTrainer(
            tiny_model(), None, config(tmp_path), prompts(), None, tiny_tokenizer(), catalogue=catalogue()
        )
    with pytest.raises(ConfigError, match="needs the token that ends a reasoning"):
        trainer(tmp_path, rollout="reasoning", trainer_options={"end_token_id": None})
    with pytest.raises(ConfigError, match="There is no reward named 'hitt': did you mean 'hit'"):
        trainer(tmp_path, rewards={"hitt": 1.0})
    with pytest.raises(DataError, match="but a prompt has none"):
        trainer(
            tmp_path,
            data=without_targets(),
            rewards={"validity": 1.0},
            position_credit="tpma",
        ).train()


def test_args_of_yaml_are_checked_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'num_generation' .did you mean 'num_generations'"):
        checked_args({"num_generation": 4})
    with pytest.raises(ConfigError, match="'reward_weights' cannot be set here"):
        checked_args({"reward_weights": [1.0]})
    with pytest.raises(ConfigError, match="'num_beams' must be an integer"):
        checked_args({"num_beams": "ten"})
    with pytest.raises(ConfigError, match="cispo"):
        checked_args({"loss_type": "cispo"})
    made = grpo_config({"learning_rate": "1e-5", "gradient_checkpointing": False}, output_dir=tmp_path, seed=4)
    assert made.learning_rate == 1e-5 and made.seed == 4 and made.loss_type == "dr_grpo"


def test_every_method_we_override_is_in_the_table(repo_root):
    tree = ast.parse((repo_root / "trainers" / "grpo" / "trainer.py").read_text("utf-8"))
    (ours,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "DebiasedGRPOTrainer"]
    overridden = {n.name for n in ours.body if isinstance(n, ast.FunctionDef) and hasattr(GRPOTrainer, n.name)}
    listed = {n.path.rpartition(".")[2] for n in trl_surface.GRPO_NAMES if n.path.startswith(trl_surface._GRPO)}
    assert {"_compute_loss", "_prepare_inputs"} <= overridden <= listed
    docstring = ast.get_docstring(tree)
    assert all(f"`{name}`" in docstring for name in overridden)
    assert trl_surface.missing(trl_surface.GRPO_NAMES) == [] and all(n.why for n in trl_surface.GRPO_NAMES)


def test_the_prompt_is_read_once_for_its_group(tmp_path):
    """Fewer tokens go through the model, and the weights come out the same."""
    found = {}
    for shared in (True, False):
        options = {"max_steps": 1, "per_device_train_batch_size": 16, "learning_rate": 0.1}
        rewards = {"hit": 1.0, "popularity_penalty": 0.1}
        made = trainer(tmp_path, rewards, shared_prompt=shared, trainer_options=POPULAR, **options)
        made.args.optim = "sgd"
        tokens = []
        made.model.model.register_forward_pre_hook(
            lambda m, a, k, seen=tokens: seen.append(k["input_ids"].numel()) if torch.is_grad_enabled() else None,
            with_kwargs=True,
        )
        made.train()
        found[shared] = sum(tokens), weights_of(made.model)
    assert found[True][0] < 0.7 * found[False][0]
    torch.testing.assert_close(found[True][1], found[False][1], atol=1e-5, rtol=0)
