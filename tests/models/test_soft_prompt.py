"""Vectors at placeholders: against the same model on tokens, whose embeddings are the vectors."""

from __future__ import annotations

import pytest
import torch
from lm_stand_ins import tiny_model

from sidtune.core.errors import DataError
from sidtune.models.soft_prompt.soft_prompt import SoftPrompt

KINDS = ("qwen3", "llama", "gpt2", "t5", "bart")


def prompts(model, side: str = "left"):
    """Prompts in words; the same with three tokens as placeholders, their embeddings, and the mask."""
    prompt = SoftPrompt(model, ["user", "item"])
    words = torch.tensor([[7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]])
    mask = torch.ones_like(words)
    mask[1, :2] = 0
    held = words.clone()
    held[0, 1], held[0, 4], held[1, 5] = prompt.ids["item"], prompt.ids["user"], prompt.ids["item"]
    if side == "right":
        words, held, mask = (torch.cat([x[:, :], x[:, :0]], 1) for x in (words, held, mask))
        words[1], held[1], mask[1] = words[1].roll(-2), held[1].roll(-2), mask[1].roll(-2)
    rows = model.get_input_embeddings()
    vectors = {name: rows(words[held == number]).detach() for name, number in prompt.ids.items()}
    return prompt, words, held, mask, vectors


def extra(model) -> dict:
    return {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 8]])} if model.config.is_encoder_decoder else {}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_tokens_give_the_logits_of_the_tokens(kind, side):
    model = tiny_model(kind)
    prompt, words, held, mask, vectors = prompts(model, side)
    options = extra(model)
    if not options and kind == "gpt2":
        options = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    wanted = model(input_ids=words, attention_mask=mask, **options).logits
    found = prompt(held, mask, vectors, **extra(model)).logits
    real = torch.ones_like(found[..., 0], dtype=torch.bool) if model.config.is_encoder_decoder else mask.bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_each_vector_and_other_vectors_change_the_answer(kind):
    model = tiny_model(kind)
    prompt, _, held, mask, vectors = prompts(model)
    free = {name: value.clone().requires_grad_() for name, value in vectors.items()}
    logits = prompt(held, mask, free, **extra(model)).logits
    logits[:, -1].logsumexp(-1).sum().backward()
    assert all((value.grad.abs().sum(1) > 0).all() for value in free.values())
    moved = {**vectors, "item": torch.randn(vectors["item"].shape)}
    assert (prompt(held, mask, moved, **extra(model)).logits[:, -1] - logits[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_that_of_the_tokens(kind):
    model = tiny_model(kind)
    prompt, words, held, mask, vectors = prompts(model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    wanted = model.generate(input_ids=words, attention_mask=mask, **options)
    wanted = wanted if model.config.is_encoder_decoder else wanted[:, words.shape[1] :]
    assert torch.equal(prompt.generate(held, mask, vectors, **options), wanted)


def test_a_placeholder_is_no_row_of_the_vocabulary():
    model = tiny_model()
    before = model.get_input_embeddings().num_embeddings
    prompt = SoftPrompt(model, ["a", "b"])
    assert prompt.ids == {"a": before, "b": before + 1} and model.get_input_embeddings().num_embeddings == before


def test_vectors_that_do_not_fit_are_refused():
    prompt, _, held, mask, vectors = prompts(tiny_model())
    with pytest.raises(DataError, match="2 placeholders 'item', so .* needed, got \\(1, 32\\)"):
        prompt(held, mask, {**vectors, "item": vectors["item"][:1]})
    with pytest.raises(DataError, match="1 placeholders 'user'"):
        prompt(held, mask, {"item": vectors["item"]})
    with pytest.raises(DataError, match="did you mean 'user'"):
        prompt(held, mask, {**vectors, "usr": vectors["user"]})
    with pytest.raises(DataError, match="padded on the left"):
        prompt.generate(held, mask.flip(1), vectors)
    empty = prompt(torch.tensor([[7, 8]]), None, {})
    assert empty.logits.shape[:2] == (1, 2)
