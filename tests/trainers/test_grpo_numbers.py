"""Numbers of GRPO that were not what they said: each against an enumeration or a second implementation of a few lines."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from grpo_stand_ins import END, PATHS, SID_TOKENS, catalogue, config, prompts, trainer, weights_of
from sft_stand_ins import VOCABULARY, tiny_model

from sidtune.core.errors import ConfigError
from sidtune.decoding.beam_search import sid_beam_search
from sidtune.trainers.grpo.advantages import group_advantages, tpma_advantages
from sidtune.trainers.grpo.config import position_weights
from sidtune.trainers.grpo.rollouts import pad_left
from sidtune.trainers.rewards.batch import RewardBatch, Targets, build_rewards

EOS, PROMPT, TARGET = 1, [9, 12], 4


def sid_log_probs(model, prefix: list[int]) -> torch.Tensor:
    """(9,) log-probability of each leaf behind a prefix, over the legal codes."""
    ids = torch.tensor([[*prefix, *SID_TOKENS[[a, b + 3]].tolist()] for a, b in PATHS])
    logits = model(input_ids=ids).logits[:, -3:-1, torch.tensor(SID_TOKENS)]
    first, second = logits[:, 0, :3].log_softmax(-1), logits[:, 1, 3:].log_softmax(-1)
    codes = torch.tensor(PATHS)
    return first.gather(1, codes[:, :1])[:, 0] + second.gather(1, codes[:, 1:])[:, 0]


@pytest.mark.parametrize("shared", [True, False])
def test_every_way_to_end_a_reasoning_is_in_the_gradient(tmp_path, shared):
    """All reasonings of one token: the end mark, EOS (both leave it empty), and 66 words that are cut. Exact policy gradient."""
    options = {"num_generations": VOCABULARY, "per_device_train_batch_size": VOCABULARY, "max_completion_length": 1}
    options |= {"credit": "list", "num_beams": 9, "shared_prompt": shared}
    made = trainer(tmp_path, {"hit": 1.0}, rollout="reasoning", **options)
    model = made.model.train()
    made.current_gradient_accumulation_steps = 1
    first = model(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    exact = 0.0
    texts = [[] if token in (END, EOS) else [token] for token in range(VOCABULARY)]
    for token, text in enumerate(texts):
        exact = exact + first[token].exp() * sid_log_probs(model, [*PROMPT, *text, END])[TARGET].exp()
    wanted = torch.autograd.grad(exact, list(model.parameters()))
    ids = pad_left([[*PROMPT, *text, END] for text in texts], 0)
    found = sid_beam_search(model, *ids, trie=made.table.trie, sid_token_ids=SID_TOKENS, num_beams=9)
    closed, stopped = (torch.arange(VOCABULARY) == token for token in (END, EOS))
    rollout = made._maker._with_reasoning([PROMPT] * VOCABULARY, texts, closed, found.leaves, found.scores, stopped)
    own, made._maker = made._maker, lambda *_: rollout
    made._maker.tokens_of = own.tokens_of
    row = {"prompt": "w7", "prompt_ids": PROMPT, "target_leaves": [TARGET], "target_gains": [1.0]}
    inputs = made._generate_and_score_completions([dict(row) for _ in range(VOCABULARY)])
    chances = first.detach().exp() * VOCABULARY
    inputs["advantages"] = (chances * made._gathered_rewards[:, 0]).float()
    inputs["list_coefficients"] = inputs["list_coefficients"] * chances[:, None]
    gradient = torch.autograd.grad(made._compute_loss(model, inputs), list(model.parameters()))
    flat = [torch.cat([g.flatten() for g in parts]).double() for parts in (gradient, wanted)]
    assert (flat[0] + flat[1]).norm() < 1e-4 * flat[1].norm()


def test_a_reasoning_that_is_cut_is_clipped_and_earns_no_length_reward(tmp_path):
    made = trainer(tmp_path, rollout="reasoning", max_completion_length=3, num_beams=3, num_generations=8)
    made.model.train()
    rows = [dict(row) for row in made.train_dataset.select([0]) for _ in range(8)]
    made._generate_and_score_completions(rows)
    rollout, told = made._rollout, made._metrics["train"]
    ends = [next((n for n, t in enumerate(ids[:3]) if t in (END, EOS)), None) for ids in rollout.completion_ids]
    assert rollout.cut.tolist() == [end is None for end in ends] and 0 < rollout.cut.sum() <= 8
    assert told["completions/clipped_ratio"] == [pytest.approx(np.mean([end is None for end in ends]))]
    assert told["completions/max_terminated_length"] == [max([0, *(end + 1 for end in ends if end is not None)])]
    batch = RewardBatch(
        lists=np.zeros((2, 1), np.int64),
        scores=np.zeros((2, 1), np.float32),
        targets=Targets.from_lists([[0], [0]]),
        leaf_codes=PATHS.astype(np.int32),
        closed=np.array([True, False]),
        reasoning_lengths=np.array([20, 20]),
    )
    assert build_rewards({"reasoning_length": 1.0})(batch)[:, 0].tolist() == [1.0, 0.0]


def test_strict_punishes_a_reasoning_that_never_ends(tmp_path):
    """Four reasonings, two of them cut; their lists are equally good, so only the reward of the format tells them apart."""
    made = trainer(
        tmp_path, {"list_ndcg": 1.0, "format": 0.1}, rollout="reasoning", num_beams=2, max_completion_length=2
    )
    made.model.train()
    leaves, scores = torch.tensor([[0, 1]] * 4), torch.zeros(4, 2)
    closed = torch.tensor([True, True, False, False])
    rollout = made._maker._with_reasoning([PROMPT] * 4, [[10], [11], [12, 13], [14, 15]], closed, leaves, scores)
    made._maker = lambda *_: rollout
    row = {"prompt": "w7", "prompt_ids": PROMPT, "target_leaves": [0], "target_gains": [1.0]}
    advantages = made._generate_and_score_completions([dict(row) for _ in range(4)])["advantages"].tolist()
    assert advantages == pytest.approx([0.2 / 3, 0.2 / 3, -0.2 / 3, -0.2 / 3], abs=1e-6)
    assert rollout.credit_mask[2] == [1, 1, 0, 0, 0, 0]  # what was sampled is credited, the forced end mark is not
    assert config(tmp_path, rollout="sample").mask_truncated_completions


def test_without_a_baseline_equal_rewards_are_advantages(tmp_path):
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5, 0.7])
    assert group_advantages(rewards, 2, baseline="none").tolist() == pytest.approx(rewards.tolist())
    matches = torch.tensor([[1, 0], [1, 1]]).bool()
    found = tpma_advantages(matches, torch.zeros(2), 2, torch.tensor([2.0, 1.0]), baseline="none")
    assert found.tolist() == [[2.0, 0.0], [2.0, 1.0]]
    with pytest.raises(ConfigError, match="Without a baseline equal rewards keep their advantage"):
        config(tmp_path, baseline="none", scale_rewards="group")


def test_tpma_has_the_weights_of_the_figure_and_a_product_gate():
    assert [position_weights(None, depth) for depth in (2, 5, 6)] == [[2, 2], [2, 2, 2, 1, 1], [2, 2, 2, 1, 1, 1]]
    matches = np.array(np.meshgrid(*[[0, 1]] * 5)).reshape(5, -1).T.astype(bool)
    weights = torch.tensor(position_weights(None, 5))
    found = tpma_advantages(torch.tensor(matches), torch.zeros(32), 32, weights, baseline="none")
    for row, values in zip(matches, found.tolist(), strict=True):
        wrong = int(np.argmin(np.append(row, False)))  # the first code that is wrong closes all later ones
        assert values == [w * (n < wrong) for n, w in enumerate((2, 2, 2, 1, 1))]


def test_a_generation_without_differing_rewards_is_skipped_and_said(tmp_path, caplog):
    made = trainer(tmp_path, {"validity": 1.0}, max_steps=3, patience=0, weight_decay=0.1)
    seen = []
    made.model.model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    before = weights_of(made.model)
    with caplog.at_level(logging.WARNING, logger="sidtune.trainers.grpo.trainer"):
        made.train()
    assert not any(seen) and torch.equal(weights_of(made.model), before)
    assert [h["group/skipped"] for h in made.state.log_history if "reward" in h] == [1.0] * 3
    assert caplog.text.count("forward and backward passes are skipped") == 1


@pytest.mark.parametrize(("rollout", "own"), [("without_replacement", "leave_one_out"), ("beam", "group_mean")])
def test_sets_and_beams_of_equal_rewards_teach_nothing(tmp_path, rollout, own):
    """Their baselines are sums of probabilities, which leave rounding errors; without a baseline rewards are advantages."""
    for baseline in (own, "none"):
        made = trainer(tmp_path, {"validity": 0.7}, rollout=rollout, patience=0, baseline=baseline, max_steps=1)
        made.train()
        (told,) = [h for h in made.state.log_history if "reward" in h]
        assert (told["advantage/abs_mean"] == 0.0, told["group/skipped"]) == (
            (True, 1.0) if baseline != "none" else (False, 0.0)
        )


def test_what_else_has_a_gradient_is_not_skipped(tmp_path):
    made = trainer(tmp_path, {"validity": 1.0}, max_steps=2, patience=0, entropy_coef=0.1)
    made.train()
    assert [h["group/skipped"] for h in made.state.log_history if "reward" in h] == [0.0] * 2


def test_one_group_that_differs_keeps_its_generation(tmp_path):
    """The weights are those of a run that skips nothing."""
    found = {}
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_steps": 3}
    for skips in (True, False):
        some = {"catalogue": catalogue(popularity_of_leaf=np.arange(9.0))}
        rewards = {"popularity_penalty": 1.0}
        made = trainer(tmp_path, rewards, tiny_model(), prompts(16), some, optim="sgd", **options)
        if not skips:
            made._is_idle = lambda output: False
        made.train()
        found[skips] = weights_of(made.model)
    assert torch.equal(found[True], found[False])
