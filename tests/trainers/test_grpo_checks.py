"""The checks of the CRS sheet, section 6, that drive the trainer's own methods; each test begins with its number.

Numbers 2, 3, 4 and 12 by enumeration are in `test_grpo_enumeration.py`, number 17 (two processes) in `test_grpo_distributed.py`.
Numbers 9 (invariances of the list reward) and 16 (the self-evolving filter) are tested with the rewards and the recipe.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grpo_stand_ins import END, PATHS, SID_TOKENS, catalogue, plain_logps, prompts, trainer, weights_of
from sft_stand_ins import tiny_model, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

from sidtune.trainers.grpo import losses as grpo_losses
from sidtune.trainers.grpo.advantages import beam_advantages, group_advantages, set_advantages
from sidtune.trainers.grpo.rollouts import Rollout, Rows

pytestmark = pytest.mark.medium

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def every_item(made, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The nine items behind one prompt: ids and mask."""
    items = torch.tensor(SID_TOKENS)[torch.tensor(PATHS) + torch.tensor([0, 3])]
    eos = torch.full((9, 1), made._tokenizer.eos_token_id)
    rows = torch.cat([torch.tensor([ids] * 9), items, eos], dim=1)
    return rows, torch.ones_like(rows)


def test_5_the_trainers_probabilities_sum_to_one(tmp_path):
    made = trainer(tmp_path)
    rows, mask = every_item(made, [9, 10, 11])
    with torch.no_grad():
        ours, _, _ = made._get_per_token_logps_and_entropies(made.model, rows, mask, 3)
        stock, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(made, made.model, rows, mask, 3)
    assert ours[:, :2].sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert stock[:, :2].sum(1).exp().sum() < 0.5
    # A second implementation, one row per completion and the whole vocabulary, agrees; and so does the share of its mass.
    with torch.no_grad():
        plain = plain_logps(made.model, rows, mask, 3, made.table, compute_entropy=True)
    _, entropies, _ = made._get_per_token_logps_and_entropies(made.model, rows, mask, 3, compute_entropy=True)
    torch.testing.assert_close(entropies[:, :2], plain.entropies[:, :2], atol=1e-5, rtol=0)
    assert entropies.requires_grad  # an entropy bonus must reach the weights
    torch.testing.assert_close(ours[:, :2], plain.log_probs[:, :2], atol=1e-5, rtol=0)
    assert (ours[:, 2:] == 0).all() and (entropies[:, 2:] == 0).all()  # EOS has no credit and is not computed
    torch.testing.assert_close((ours + plain.log_z)[:, :2], stock[:, :2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_6_the_trainers_loss_has_the_exact_gradient(tmp_path, shared):
    """All nine items as a group with advantages 9 p (r - J): the loss must be minus the gradient of J over L."""
    made = trainer(tmp_path, shared_prompt=shared)
    rows, mask = every_item(made, [9, 10, 11])
    rewards = torch.rand(9, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    log_p = plain_logps(made.model, rows, mask, 3, made.table).log_probs[:, :2].sum(1)
    value = (log_p.exp() * rewards).sum()
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
    advantages = 9 * log_p.detach().exp() * (rewards - value.detach())
    inputs = {
        "prompt_ids": rows[:, :3],
        "prompt_mask": mask[:, :3],
        "completion_ids": rows[:, 3:],
        "completion_mask": mask[:, 3:],
        "tool_mask": torch.tensor([[1, 1, 0]] * 9),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(18),
    }
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    loss = made._compute_loss(made.model, inputs)
    found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    found = -made.max_completion_length * found
    assert made.max_completion_length == 2
    assert torch.cosine_similarity(found, truth, dim=0).item() == pytest.approx(1, abs=1e-5)
    assert ((found @ truth) / (truth @ truth)).item() == pytest.approx(1, abs=1e-4)


def injected(made, inputs: dict, log_probs: torch.Tensor) -> torch.Tensor:
    """The gradient of the trainer's loss by log-probabilities that are leaves."""
    leaf = log_probs.detach().clone().requires_grad_()

    def scores(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        return leaf, torch.zeros_like(leaf), None

    made._get_per_token_logps_and_entropies = scores
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    (gradient,) = torch.autograd.grad(made._compute_loss(made.model, inputs), leaf)
    return gradient


def batch(lengths: list[int], advantages: torch.Tensor, credit: torch.Tensor | None = None) -> dict:
    width = max(lengths)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    return {
        "prompt_ids": torch.full((len(lengths), 2), 9),
        "prompt_mask": torch.ones(len(lengths), 2, dtype=torch.long),
        "completion_ids": torch.full((len(lengths), width), 9) * mask,
        "completion_mask": mask,
        "tool_mask": mask if credit is None else credit,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }


WEIGHTS = {
    "grpo": (0.25, 1 / 12),
    "bnpo": (0.125, 0.125),
    "dr_grpo": (0.0625, 0.0625),
    "dapo": (0.125, 0.125),
    "luspo": (0.5, 0.5),
    "sapo": (0.25, 1 / 12),
}


@pytest.mark.parametrize("loss_type", WEIGHTS)
def test_7_length_weights_are_those_of_the_table(tmp_path, loss_type):
    made = trainer(tmp_path, preset="none", loss_type=loss_type)
    made.max_completion_length = 8
    inputs = batch([2, 6], torch.ones(2))
    gradient = injected(made, inputs, torch.full((2, 6), -1.0)).abs()
    for row, weight in enumerate(WEIGHTS[loss_type]):
        assert gradient[row][inputs["completion_mask"][row] == 1].tolist() == pytest.approx(
            [weight] * [2, 6][row], rel=1e-5
        )
    ours = grpo_losses.row_weights(loss_type, inputs["completion_mask"], 8, 1.0, torch.tensor(8.0))
    assert ours.tolist() == pytest.approx(WEIGHTS[loss_type], rel=1e-5)


def test_7b_of_these_weights_strict_keeps_none_that_depends_on_the_length(tmp_path):
    made = trainer(tmp_path)
    assert made.args.loss_type == "dr_grpo" and made.args.scale_rewards == "none"


@pytest.mark.parametrize("value", [0.5, 0.7])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_1_equal_rewards_move_nothing(tmp_path, loss_type, value):
    made = trainer(
        tmp_path,
        rewards={"hit": 0.0},
        trainer_options={"reward_funcs": [lambda completions, **k: [value] * len(completions)]},
        loss_type=loss_type,
        num_generations=8,
        max_steps=1,
        **({"epsilon_high": 5.0} if loss_type == "cispo" else {}),
    )
    before = weights_of(made.model)
    made.train()
    assert torch.equal(weights_of(made.model), before)


def test_1b_stock_trl_moves_by_a_full_step_when_all_rewards_are_equal(tmp_path):
    """Otherwise the test above would prove nothing: float32 cannot average eight times 0.7."""
    config = GRPOConfig(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        report_to=[],
        activation_checkpointing=False,
        per_device_train_batch_size=8,
        num_generations=8,
        max_steps=1,
        learning_rate=1e-3,
        max_completion_length=3,
        save_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    stock = GRPOTrainer(
        tiny_model(),
        [lambda completions, **k: [0.7] * len(completions)],
        config,
        prompts(),
        processing_class=tiny_tokenizer(),
    )
    before = weights_of(stock.model)
    stock.train()
    assert (weights_of(stock.model) - before).abs().max() == pytest.approx(1e-3, rel=0.05)


def reasoned_rollout(made, texts: list[list[int]], leaves: list[list[int]], closed: list[bool]) -> Rollout:
    scores = -torch.arange(1.0, len(leaves[0]) + 1).repeat(len(leaves), 1)
    return made._maker._with_reasoning(
        [[9, 10]] * len(texts), texts, torch.tensor(closed), torch.tensor(leaves), scores
    )


def scored(made, rollout: Rollout, target: int = 0) -> dict:
    """The trainer's own path from a rollout to the inputs of the loss."""
    made._maker = lambda model, prompt_ids, rows: rollout
    rows = [{"prompt": "w7 w8", "target_leaves": [target], "target_gains": [1.0]} for _ in range(len(rollout))]
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made._generate_and_score_completions(rows)


TEXTS = [[10, 11], [12, 13, 14], [15]]
LISTS = [[5, 0, 1, 2], [5, 1, 0, 2], [5, 1, 2, 0]]  # the target, leaf 0, stands at ranks 2, 3 and 4


def reasoning_trainer(folder, **options):
    return trainer(
        folder,
        **{
            "rollout": "reasoning",
            "num_generations": 3,
            "per_device_train_batch_size": 3,
            "num_beams": 4,
            **options,
        },
    )


def test_8_a_list_reward_separates_groups_that_are_all_wrong(tmp_path):
    top = reasoning_trainer(tmp_path, rewards={"list_ndcg": {"k": 1}})
    inputs = scored(top, reasoned_rollout(top, TEXTS, LISTS, [True] * 3))
    assert (inputs["advantages"] == 0).all()
    ranked = reasoning_trainer(tmp_path, rewards={"list_ndcg": 1.0})
    inputs = scored(ranked, reasoned_rollout(ranked, TEXTS, LISTS, [True] * 3))
    first, second, third = inputs["advantages"].tolist()
    assert first > second > third and first > 0 > third
    gradient = injected(ranked, inputs, torch.full(inputs["completion_ids"].shape, -1.0))
    for row, text in enumerate(TEXTS):
        assert (gradient[row, : len(text) + 1] != 0).all()


def test_10_beams_of_one_reasoning_in_one_group_cancel_on_it_and_several_reasonings_do_not(tmp_path):
    """The trap of the sheet (2.7), and how rows of one reasoning each avoid it."""
    made = trainer(tmp_path, num_generations=4)
    rewards = torch.tensor([1.0, 0.3, 0.0, 0.0])
    advantages = group_advantages(rewards, 4, baseline="group_mean").float()
    inputs = batch([5] * 4, advantages)
    shared = injected(made, inputs, torch.full((4, 5), -1.0))
    assert shared.abs().min() > 1e-3
    assert shared[:, :3].sum(0).abs().max() < 1e-7  # the reasoning is the same tokens in all four rows
    ranked = reasoning_trainer(tmp_path, rewards={"list_ndcg": 1.0})
    inputs = scored(ranked, reasoned_rollout(ranked, TEXTS, LISTS, [True] * 3))
    assert (inputs["advantages"].abs() > 1e-3).any()


def test_11_only_credited_tokens_have_a_gradient(tmp_path):
    """The SID is found by its place: here the reasonings hold SID tokens too. The third was closed by force."""
    made = reasoning_trainer(tmp_path, mask_truncated_completions=False, rewards={"list_ndcg": 1.0})
    sid = SID_TOKENS[[0, 3]].tolist()
    texts = [[10, *sid], sid, [11]]
    inputs = scored(made, reasoned_rollout(made, texts, LISTS, [True, True, False]))
    gradient = injected(made, inputs, torch.full(inputs["completion_ids"].shape, -1.0))
    for row, (text, closed) in enumerate(zip(texts, (True, True, False), strict=True)):
        tokens = [True] * len(text) + [closed] + [False] * 3
        assert ((gradient[row, : len(tokens)] != 0) == torch.tensor(tokens)).all()
        assert (gradient[row, len(tokens) :] == 0).all()
    assert made._metrics["train"]["completions/clipped_ratio"] == [pytest.approx(1 / 3)]
    start, codes = made.table.find(inputs["completion_ids"], inputs["completion_mask"])
    assert start.tolist() == [len(text) + 1 for text in texts]
    assert codes.tolist() == [PATHS[leaves[0]].tolist() for leaves in LISTS]


def test_11b_truncated_reasonings_leave_loss_and_baseline_and_sids_stay(tmp_path):
    made = reasoning_trainer(tmp_path, rewards={"list_ndcg": 1.0}, mask_truncated_completions=True)
    inputs = scored(made, reasoned_rollout(made, TEXTS, LISTS, [True, True, False]))
    assert made._rollout.credit_mask == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0], [0] * 5]
    ndcg = 1 / np.log2([3, 4])
    assert inputs["advantages"].tolist() == pytest.approx([ndcg[0] - ndcg[1], ndcg[1] - ndcg[0], 0.0], abs=1e-6)
    gradient = injected(made, inputs, torch.full(inputs["completion_ids"].shape, -1.0))
    assert (gradient[2] == 0).all() and (gradient[:2].abs().sum(1) > 0).all()
    direct = trainer(tmp_path)
    rows = [{"prompt": "w7", "prompt_ids": [9], "target_leaves": [0], "target_gains": [1.0]} for _ in range(4)]
    direct.model.train()
    inputs = direct._generate_and_score_completions(rows)
    assert inputs["tool_mask"].tolist() == [[1, 1, 0]] * 4 and inputs["completion_mask"].tolist() == [[1, 1, 1]] * 4


@pytest.mark.parametrize("kind", ["beam", "without_replacement", "reasoning"])
def test_12_rollouts_are_valid_complete_and_without_fillers(tmp_path, kind):
    """Five leaves, eight asked for: each leaf once, probabilities that sum to one, and rows that say there is nothing."""
    some = catalogue(PATHS[[0, 2, 3, 7, 8]])
    made = trainer(
        tmp_path,
        rollout=kind,
        num_generations=8,
        num_beams=8,
        trainer_options={"catalogue": some},
    )
    rollout = made._maker(made.model, [[9, 10]] * 8, Rows(0, 8, 8))
    leaves, scores = rollout.leaves, rollout.scores
    if kind != "reasoning":
        leaves, scores = leaves.view(1, 8), scores.view(1, 8)
        assert [row for row in rollout.completion_ids if len(row) == 1] == [[1]] * 3
        assert rollout.complete is None or rollout.complete.all()
    for row, values in zip(leaves, scores, strict=True):
        assert sorted(row.tolist()) == [-1, -1, -1, 0, 1, 2, 3, 4]
        assert values.exp().sum().item() == pytest.approx(1, abs=1e-5)
        assert (values[row < 0] == -torch.inf).all()
    for row in rollout.completion_ids:
        sid = row[-3:-1]
        assert not sid or [SID_TOKENS.tolist().index(t) - 3 * n for n, t in enumerate(sid)] in PATHS.tolist()


@pytest.mark.parametrize("kind", ["beam", "without_replacement"])
def test_12b_sets_and_beams_reach_the_loss_by_their_own_estimators(tmp_path, kind):
    """Nine rows hold every leaf, so the gradient of the trainer's loss must be exact; four hold some, by the estimator."""
    rows = [{"prompt": "w7", "prompt_ids": [9, 12], "target_leaves": [4], "target_gains": [1.0]} for _ in range(9)]
    made = trainer(tmp_path, rollout=kind, num_generations=9, per_device_train_batch_size=9)
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    inputs = made._generate_and_score_completions([dict(row) for row in rows])
    parameters = list(made.model.parameters())
    found = torch.cat([g.flatten() for g in torch.autograd.grad(made._compute_loss(made.model, inputs), parameters)])
    items, mask = every_item(made, [9, 12])
    log_p = plain_logps(made.model, items, mask, 3, made.table).log_probs[:, :2].sum(1)
    agree = (torch.tensor(PATHS) == torch.tensor(PATHS[4])).cumprod(1)
    rewards = agree.sum(1) * 0.5 + agree[:, 1]  # prefix_match of weight 1 over two levels of 0.5, and hit
    scale = made._gathered_rewards.sum(1)[made._rollout.leaves[:, 0] == 4].item() / rewards[4].item()
    truth = torch.autograd.grad((log_p.exp() * rewards * scale).sum(), parameters)
    truth = torch.cat([g.flatten() for g in truth])
    assert scale == pytest.approx(1.0)
    assert (-2 * found - truth).norm() < 1e-4 * truth.norm()
    some = trainer(tmp_path, rollout=kind, num_generations=4, per_device_train_batch_size=4)
    some.model.train()
    inputs = some._generate_and_score_completions([dict(row) for row in rows[:4]])
    total, scores = some._gathered_rewards.sum(1), some._rollout.scores[:, 0]
    estimator = set_advantages if kind == "without_replacement" else beam_advantages
    torch.testing.assert_close(inputs["advantages"], estimator(total, scores, 4).float())
    assert (inputs["advantages"] - group_advantages(total, 4)).abs().max() > 1e-3


def test_13_rows_columns_and_extras_stay_aligned(tmp_path):
    """A reward sees its own row; after shuffling and regrouping, extra tensors still belong to their completions."""
    seen = {}

    def check(prompts, completion_ids, leaves, target_leaves, **columns):
        seen["rows"] = list(zip(prompts, [tuple(ids) for ids in completion_ids], leaves, strict=True))
        return [float(leaf[0]) for leaf in leaves]

    made = trainer(
        tmp_path,
        data=prompts(16),
        trainer_options={"reward_funcs": [check]},
        rewards={"hit": 1.0},
        gradient_accumulation_steps=2,
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 2
    rows = [dict(row) for row in made.train_dataset.select(range(4)) for _ in range(4)]
    inputs = made._prepare_inputs(rows)
    assert len(seen["rows"]) == 16
    for number, (prompt, ids, leaf) in enumerate(seen["rows"]):
        assert prompt == rows[number]["prompt"]
        assert ids[:2] == tuple(SID_TOKENS[PATHS[leaf[0]] + [0, 3]])
    parts = made._buffered_inputs
    assert inputs is parts[0] and len(parts) == 2
    numbers = torch.cat([part["row_ids"] for part in parts])
    assert sorted(numbers.tolist()) == list(range(16))
    for part in parts:
        groups = part["group_ids"].tolist()
        assert len(set(groups)) == 2 and groups == sorted(groups, key=groups.index)
        for row, number in enumerate(part["row_ids"].tolist()):
            prompt, ids, leaf = seen["rows"][number]
            assert part["completion_ids"][row].tolist() == list(ids) and part["group_ids"][row] == number // 4
            own = part["prompt_ids"][row][part["prompt_mask"][row] == 1].tolist()
            assert own == rows[number]["prompt_ids"]


def test_14_the_text_of_a_completion_shows_its_sid(tmp_path):
    texts = []

    def from_text(completions, target_leaves, **columns):
        texts.extend(completions)
        names = [f"<a_{a}> <b_{b}>" for a, b in PATHS]
        return [float(names[target[0]] in text) for text, target in zip(completions, target_leaves, strict=True)]

    made = trainer(tmp_path, rewards={"hit": 1.0}, trainer_options={"reward_funcs": [from_text]}, num_generations=8)
    rows = [dict(row) for row in made.train_dataset.select(range(8)) for _ in range(8)]
    made.model.train()
    made._generate_and_score_completions(rows)
    assert all("<a_" in text and "<b_" in text for text in texts)
    both = made._gathered_rewards
    assert torch.equal(both[:, 0], both[:, 1]) and both[:, 0].sum() > 0


@pytest.mark.parametrize("corrected", [True, False])
def test_15_the_kl_term_has_the_direction_it_says(tmp_path, corrected):
    """On a categorical toy, enumerated: importance-weighted k3 is KL(policy, reference), plain k3 KL(reference, policy)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    forward = (log_p.exp() * (log_p - reference)).sum()
    backward = (reference.exp() * (reference - log_p)).sum()
    made = trainer(tmp_path, beta=0.0, use_bias_correction_kl=corrected)
    made.beta = 1.0
    inputs = batch([1] * 6, torch.zeros(6)) | {"ref_per_token_logps": reference[:, None]}
    leaf = log_p[:, None]
    made._get_per_token_logps_and_entropies = lambda *a, **k: (leaf, torch.zeros_like(leaf), None)
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    made.max_completion_length = 1
    by_row = []
    for row in range(6):  # the loss is a mean over rows; the expectation weighs them by their probability
        one = {k: v[row : row + 1] if v.ndim else v for k, v in inputs.items()}
        leaf = log_p[row : row + 1, None]
        loss = made._compute_loss(made.model, one)
        by_row.append(log_p[row].detach().exp() * torch.autograd.grad(loss, logits, retain_graph=True)[0])
    found = torch.stack(by_row).sum(0)
    wanted, other = (forward, backward) if corrected else (backward, forward)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, logits, retain_graph=True)[0], atol=1e-12, rtol=0)
    assert (found - torch.autograd.grad(other, logits)[0]).abs().max() > 1e-2


def test_mixing_conventions_clips_what_one_convention_does_not(tmp_path):
    """Row 11: with the trie in the old policy only, the ratio is Z; with one function for both it is 1 on policy."""
    made = trainer(tmp_path)
    rows, mask = every_item(made, [9, 10])
    with torch.no_grad():
        old, _, _ = made._get_per_token_logps_and_entropies(made.model, rows, mask, 3)
        again, _, _ = made._get_per_token_logps_and_entropies(made.model, rows, mask, 3)
        full, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(made, made.model, rows, mask, 3)
    assert torch.equal(old, again)
    assert ((full - old)[:, :2].exp() < 1 - made.epsilon_low).float().mean() > 0.5


def test_the_sid_is_found_by_its_place_and_must_be_in_the_catalogue(tmp_path):
    made = trainer(tmp_path)
    table = made.table
    ids = torch.tensor([[*SID_TOKENS[[0, 3]], 1], [9, SID_TOKENS[3], 1], [1, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0]])
    start, codes = table.find(ids, mask)
    assert start.tolist() == [0, -1, -1] and codes.tolist() == [[0, 0], [-1, -1], [-1, -1]]
    reasoned = reasoning_trainer(tmp_path).table
    start, _ = reasoned.find(torch.tensor([[10, END, *SID_TOKENS[[2, 5]], 1, 0], [END, 1, 0, 0, 0, 0]]), torch.tensor(
        [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    ))  # fmt: skip
    assert start.tolist() == [2, -1]
