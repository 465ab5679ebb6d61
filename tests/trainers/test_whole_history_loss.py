"""One pass over a history gives each target the loss, and all of them together the gradient, of the windowed copies."""

from __future__ import annotations

import pytest
import text_tokenizers as made
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head
from whole_history_oracle import make_world

from sidtune.data_builders.prompts.encoding import encode_examples
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tasks.behaviour import request_to_sid, whole_history
from sidtune.trainers.common.batches import TaskCollator
from sidtune.trainers.sft.trainer import score_labelled_only

DEPTH = 3
MANY = 10_000


def model_of(kind: str, vocabulary: int, attention: str):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=2048,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.2,
            attn_implementation=attention,
        )
        model = GPT2LMHeadModel(config)
    else:
        config = Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            initializer_range=0.2,
            attn_implementation=attention,
        )
        model = Qwen3ForCausalLM(config)
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    return model.eval()


def examples(max_history: int, task=request_to_sid, **options):
    world = make_world(5, users=9, moments=14, ties=False)  # ties could share a prefix and so a key
    tokenizer = made.byte_bpe()
    serializer = Serializer(tokenizer, "plain")
    data = world.task_input(serializer, max_history=max_history)
    return encode_examples(tokenizer, task(data, **options), allowed_ids=serializer.literal_ids()), tokenizer


def sum_of_losses(model, dataset, rows, tokenizer, backward: bool):
    """Loss of each learned token: {tokens before and with it: loss}; and the gradient of their sum over `rows`."""
    collator = TaskCollator(pad_token_id=tokenizer.pad_token_id)
    found = {}
    model.zero_grad()
    for begin in range(0, len(rows), 16):
        part = [{k: v for k, v in dataset[n].items() if k != "task"} for n in rows[begin : begin + 16]]
        batch = collator(part)
        with score_labelled_only(batch["input_ids"].device):
            output = model(**batch, fused_lm_head=True)
        if backward:
            (-output.log_probs.sum()).backward()
        for row, example in enumerate(part):
            for place in output.label_mask[row].nonzero().flatten().tolist():
                key = tuple(example["input_ids"][: place + 2])
                assert key not in found, "a target is learned twice"
                found[key] = -output.log_probs[row, place].item()
    return found, [p.grad.clone() for p in model.parameters()] if backward else []


@pytest.mark.parametrize(("kind", "attention"), [("qwen3", "sdpa"), ("qwen3", "eager"), ("gpt2", "sdpa")])
def test_every_target_has_the_loss_of_its_windowed_copy(kind, attention):
    whole, tokenizer = examples(MANY, whole_history)
    windowed, _ = examples(MANY, all_positives=True)
    model = model_of(kind, len(tokenizer), attention)
    in_one_pass, gradient = sum_of_losses(model, whole, range(len(whole)), tokenizer, backward=True)

    # One windowed copy for each target of the whole-history examples (further positives of a request are no targets).
    sids = {key: n for n, key in enumerate(map(tuple, windowed["input_ids"])) if key in in_one_pass}
    targets = [key for key in in_one_pass if key in sids]
    copies, expected = sum_of_losses(model, windowed, [sids[key] for key in targets], tokenizer, backward=True)
    loose = {key: loss for key, loss in in_one_pass.items() if key not in copies}
    assert len(targets) > 40 and len(copies) == DEPTH * len(targets)
    for key, loss in copies.items():
        assert in_one_pass[key] == pytest.approx(loss, abs=1e-5)

    # Events without a request are targets of whole histories only; here they are the same example, cut off after them.
    if loose:
        model.zero_grad()
        for key in loose:
            output = model(
                input_ids=torch.tensor([key]),
                labels=torch.tensor([[-100] * (len(key) - 1) + [key[-1]]]),
                fused_lm_head=True,
            )
            assert -output.log_probs.sum().item() == pytest.approx(loose[key], abs=1e-5)
            (-output.log_probs.sum()).backward()
        expected = [a + p.grad for a, p in zip(expected, model.parameters(), strict=True)]
    for one, many in zip(gradient, expected, strict=True):
        torch.testing.assert_close(one, many, atol=1e-5 * float(many.abs().max()), rtol=1e-4)


def test_a_window_that_does_not_cover_the_past_changes_the_loss():
    """The comparison above can fail: with a short window only targets with a short past agree."""
    whole, tokenizer = examples(MANY, whole_history)
    model = model_of("qwen3", len(tokenizer), "sdpa")
    in_one_pass, _ = sum_of_losses(model, whole, range(len(whole)), tokenizer, backward=False)
    keys = {
        n: set(map(tuple, examples(n, all_positives=True)[0]["input_ids"])) & set(in_one_pass) for n in (0, 2, MANY)
    }
    assert 0 < len(keys[0]) < len(keys[2]) < len(keys[MANY])


def test_the_tokens_of_one_pass_are_a_fraction_of_those_of_the_copies():
    whole, windowed = examples(MANY, whole_history)[0], examples(MANY)[0]
    assert sum(map(len, whole["input_ids"])) < 0.5 * sum(map(len, windowed["input_ids"]))
