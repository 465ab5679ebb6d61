"""What each private name of TRL's that our trainers touch does in TRL itself, watched in stock trainers.

A name that is still there but means something else would end in a wrong curve. `test_every_private_name_has_its_meaning_tested`
finds the names in the source, so that a new one cannot be forgotten.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from grpo_stand_ins import config as own_config
from grpo_stand_ins import prompts as prompt_rows
from sft_stand_ins import random_examples, tiny_model, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

BASE = {
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "activation_checkpointing": False,
    "logging_steps": 1,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "learning_rate": 1e-2,
}
NAMES_OF_OURS = {"_mode", "_load", "_prepare", "_run"}  # of our own classes, and of modules


class Watch:
    """Notes the calls of a stock trainer in order."""

    def __init__(self, *args, **kwargs):
        self.calls, self.state_of = [], {}
        super().__init__(*args, **kwargs)

    def _note(self, name, /, **what):
        self.calls.append((name, what))

    def _send_telemetry(self):
        self._note("_send_telemetry")

    def training_step(self, *args, **kwargs):
        self._note("training_step")
        return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._note("_get_grad_norm", weights=before, true=torch.cat([g.flatten() for g in grads]).norm(), norm=norm)
        return norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        weights = torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])
        self._note("_maybe_log_save_evaluate", weights=weights, saves=self.control.should_save)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self._note("_save_checkpoint")
        super()._save_checkpoint(*args, **kwargs)


class WatchedSFT(Watch, SFTTrainer):
    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        made = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        self._note("_prepare_dataset", given=dataset, made=made, name=dataset_name, packing=packing)
        return made


class WatchedGRPO(Watch, GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        made = super()._generate_and_score_completions(inputs)
        self._note("_generate_and_score_completions", inputs=inputs, made=made)
        # A tensor of ours is shuffled and split with the others.
        return made | {"first_tokens": made["completion_ids"][:, 0].clone()}

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        made = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._note("_calculate_rewards", inputs=inputs, ids=completion_ids_list, made=made)
        return made

    def _prepare_inputs(self, generation_batch):
        step = self._step
        made = super()._prepare_inputs(generation_batch)
        self._note("_prepare_inputs", given=generation_batch, step=step, buffer=self._buffered_inputs, made=made)
        return made

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        made = super()._get_per_token_logps_and_entropies(
            *(model, input_ids, attention_mask, logits_to_keep), *args, **kwargs
        )
        if (shift := self.state_of.get("shift")) is not None:
            self.state_of["inputs"]["old_per_token_logps"] = made[0].detach() + shift
        return made

    def _compute_loss(self, model, inputs):
        made = super()._compute_loss(model, inputs)
        self._note("_compute_loss", inputs=inputs, made=made.detach())
        return made

    def log(self, logs, start_time=None):
        self._note("log", metrics={name: list(values) for name, values in self._metrics["train"].items()}, logs=logs)
        super().log(logs, start_time)


def even(completion_ids, **columns):
    return [float(sum(ids) % 5) for ids in completion_ids]


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1}
    args = SFTConfig(str(tmp_path_factory.mktemp("sft")), **BASE, **options)
    data = Dataset.from_dict({"prompt": ["w1 w2", "w3"] * 4, "completion": [" w4", " w5 w6"] * 4})
    made = WatchedSFT(tiny_model(), args, train_dataset=data, processing_class=tiny_tokenizer())
    made.train()
    return made


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "steps_per_generation": 2}
    options |= {"gradient_accumulation_steps": 2, "beta": 0.0, "save_strategy": "no", "max_completion_length": 4}
    args = GRPOConfig(str(tmp_path_factory.mktemp("grpo")), **BASE, **options, loss_type="dr_grpo", temperature=0.7)
    data = prompt_rows(16).select_columns(["prompt"])
    made = WatchedGRPO(tiny_model(), even, args, data, processing_class=tiny_tokenizer())
    made.train()
    return made


def noted(trainer, name):
    return [what for called, what in trainer.calls if called == name]


def test_every_private_name_has_its_meaning_tested(repo_root, sft, grpo):
    touched = set()
    for folder in ("grpo", "sft", "common"):
        for file in (repo_root / "trainers" / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                name = getattr(node, "attr", None) if isinstance(node, ast.Attribute) else getattr(node, "name", None)
                if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
                    touched.add(name)
    stock = {name for name in touched if any(hasattr(one, name) for one in (sft, grpo, trl_utils))} - NAMES_OF_OURS
    tested = Path(__file__).read_text("utf-8")
    assert len(stock) > 15
    assert [name for name in sorted(stock) if name not in tested] == []


def test_telemetry_is_sent_by_one_method(sft, grpo):
    assert len(noted(sft, "_send_telemetry")) == len(noted(grpo, "_send_telemetry")) == 1


@pytest.mark.parametrize("which", ["sft", "grpo"])
def test_a_step_is_micro_batches_then_the_norm_then_the_weights_then_what_is_written(which, request):
    trainer = request.getfixturevalue(which)
    order = ("training_step", "_get_grad_norm", "_maybe_log_save_evaluate", "_save_checkpoint")
    called = [name for name, _ in trainer.calls if name in order]
    step = [*order[:1], *order] if which == "sft" else [*order[:1], *order[:-1]]
    assert called == [*step * 2, "_maybe_log_save_evaluate"]  # the last one is that of the end of an epoch
    norms, ends = noted(trainer, "_get_grad_norm"), noted(trainer, "_maybe_log_save_evaluate")
    for norm, end in zip(norms, ends[:2], strict=True):
        # It gives the norm of before clipping, when the gradients are clipped already.
        assert float(norm["true"]) == pytest.approx(min(float(norm["norm"]), 1.0), rel=1e-4)
        assert (norm["weights"] != end["weights"]).any() and end["saves"] == (which == "sft")
    assert torch.equal(ends[0]["weights"], norms[1]["weights"])


def test_a_data_set_becomes_ids_and_a_mask_of_the_completion(sft):
    (prepared,) = noted(sft, "_prepare_dataset")
    tokenizer, made = tiny_tokenizer(), prepared["made"]
    assert (prepared["name"], prepared["packing"]) == ("train", False)
    for given, row in zip(prepared["given"], made, strict=True):
        whole = tokenizer(given["prompt"] + given["completion"])["input_ids"] + [tokenizer.eos_token_id]
        learned = len(whole) - len(tokenizer(given["prompt"])["input_ids"])
        assert row["input_ids"] == whole
        assert [int(one != -100) for one in row["labels"]] == [0] * (len(whole) - learned) + [1] * learned


def test_only_columns_of_the_signature_reach_the_collator(tmp_path):
    class Keeps(SFTTrainer):
        def _set_signature_columns_if_needed(self):
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, "task"]

    for kind, kept in ((SFTTrainer, False), (Keeps, True)):
        args = SFTConfig(str(tmp_path), **BASE, dataset_kwargs={"skip_prepare_dataset": True})
        made = kind(
            tiny_model(),
            args,
            train_dataset=random_examples(4),
            processing_class=tiny_tokenizer(),
            data_collator=lambda rows: {"names": sorted(rows[0])},
        )
        names = next(iter(made.get_train_dataloader()))["names"]
        assert {"input_ids", "labels"} <= set(names) and ("task" in names) is kept


@pytest.mark.parametrize("labelled_only", [False, True])
def test_triton_chooses_the_positions_and_no_value(labelled_only, monkeypatch):
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: labelled_only)
    scored = []
    apply = trl_utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        trl_utils._ChunkedLogProbFunction, "apply", lambda *a: scored.append(a[0].shape[0]) or apply(*a)
    )
    model = tiny_model()
    plain = tiny_model()
    trl_utils.add_fused_lm_head(model)
    ids = torch.arange(2, 18).view(2, 8)
    labels = ids.masked_fill(torch.arange(8) < 6, -100)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    logits = plain(input_ids=ids).logits[:, :-1].log_softmax(-1)
    wanted = logits.gather(2, ids[:, 1:, None])[..., 0][:, -2:]
    assert sum(scored) == (4 if labelled_only else 14)
    torch.testing.assert_close(found.log_probs[found.label_mask].view(2, 2), wanted)


def test_prompts_are_repeated_and_a_batch_is_generated_once(grpo):
    generated, prepared = noted(grpo, "_generate_and_score_completions"), noted(grpo, "_prepare_inputs")
    assert len(generated) == 2 and [one["step"] for one in prepared] == [0, 1, 2, 3]
    for number, one in enumerate(prepared):
        assert one["made"] is one["buffer"][number % 2] and len(one["buffer"]) == 2
    for number, one in enumerate(generated):
        texts = [row["prompt"] for row in one["inputs"]]
        assert texts == [row["prompt"] for row in prepared[2 * number]["given"]]
        assert len(texts) == 8 and texts[::2] == texts[1::2] and len(set(texts)) == 4
        assert {"advantages", "completion_ids", "completion_mask", "prompt_ids", "prompt_mask"} <= one["made"].keys()
        assert all(len(one["made"][name]) == 8 for name in ("advantages", "completion_ids", "prompt_ids"))
    for one in prepared:
        assert len(one["made"]["advantages"]) == 4
        assert torch.equal(one["made"]["first_tokens"], one["made"]["completion_ids"][:, 0])


def test_the_sampler_gives_each_prompt_once_per_generation_and_batch_for_each_step_of_it(grpo):
    order = list(grpo._get_train_sampler(grpo.train_dataset))
    blocks = [order[n : n + 8] for n in range(0, len(order), 8)]
    assert len(order) == 16 * 2 * 2 and blocks[::2] == blocks[1::2]  # one generation fills two micro-batches
    assert all(block[::2] == block[1::2] for block in blocks)
    assert sorted(n for block in blocks[::2] for n in block[::2]) == list(range(16))


def test_rewards_are_rows_times_functions_and_advantages_follow_them(grpo):
    for scored, made in zip(
        noted(grpo, "_calculate_rewards"), noted(grpo, "_generate_and_score_completions"), strict=True
    ):
        assert scored["made"].flatten().tolist() == even(scored["ids"]) and scored["made"].shape == (8, 1)
        pairs = scored["made"].view(4, 2)
        wanted = (pairs - pairs.mean(1, keepdim=True)) / (pairs.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(made["made"]["advantages"], wanted.flatten())
        rows = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(made["made"]["completion_ids"], made["made"]["completion_mask"], strict=True)
        ]
        assert rows == scored["ids"]


def test_prompts_become_ids_by_the_tokenizer(grpo):
    texts = ["w1 w2 w3", "w4"]
    ids, *_ = grpo._tokenize_prompts(texts)
    assert ids == [tiny_tokenizer()(text)["input_ids"] for text in texts]
    assert grpo._tokenizer is grpo.processing_class


def test_log_probabilities_are_those_of_the_completion_at_the_temperature(grpo):
    ids = torch.arange(2, 16).view(2, 7)
    mask = torch.ones_like(ids)
    model = grpo.model.eval()
    with torch.no_grad():
        found, entropies, _ = grpo._get_per_token_logps_and_entropies(model, ids, mask, 3, compute_entropy=True)
        logits = (model(input_ids=ids, attention_mask=mask).logits[:, -4:-1].float() / 0.7).log_softmax(-1)
    torch.testing.assert_close(found, logits.gather(2, ids[:, -3:, None])[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropies, -(logits.exp() * logits).sum(-1), rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_inputs_and_reads_old_log_probabilities_after_the_new_ones(grpo):
    grpo.model.train()
    inputs = dict(noted(grpo, "_prepare_inputs")[0]["made"])
    inputs["advantages"] = torch.tensor([1.0, -1.0, 2.0, 0.5])
    mask = inputs["completion_mask"]
    divisor = len(mask) * grpo.max_completion_length * grpo.current_gradient_accumulation_steps
    for shift in (0.0, -0.1):
        grpo.state_of |= {"shift": shift, "inputs": inputs}
        ratio = torch.tensor(-shift).exp()
        wanted = -(ratio * inputs["advantages"][:, None] * mask).sum() / divisor
        torch.testing.assert_close(grpo._compute_loss(grpo.model, inputs).detach(), wanted, rtol=1e-4, atol=1e-6)
    inputs["advantages"] = torch.zeros(4)
    assert float(grpo._compute_loss(grpo.model, inputs)) == 0.0
    grpo.state_of.clear()


def test_metrics_are_lists_whose_mean_is_logged_once(grpo):
    logged = [one for one in noted(grpo, "log") if "loss" in one["logs"]]
    rewards = [float(one["made"].mean()) for one in noted(grpo, "_calculate_rewards")]
    assert [one["metrics"]["reward"] for one in logged] == [[reward] for reward in rewards]
    assert [one["logs"]["reward"] for one in logged] == pytest.approx(rewards)


def test_entropy_is_rewarded_only_on_request(grpo, tmp_path):
    assert not grpo._entropy_bonus_enabled
    args = own_config(tmp_path, entropy_coef=0.1)
    data = prompt_rows().select_columns(["prompt"])
    made = GRPOTrainer(
        tiny_model(),
        even,
        GRPOConfig(str(tmp_path), **BASE, entropy_coef=args.entropy_coef, beta=0.0),
        data,
        processing_class=tiny_tokenizer(),
    )
    assert made._entropy_bonus_enabled
