"""The post-ranking model: slots, losses, what trains, what is saved, prompts; checks 6 to 9, 13 and 15 of the notes."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from post_rank_stand_ins import FIELDS, ranker, requests

from sidtune.core.errors import DataError
from sidtune.data_builders.prompts.encoding import token_ids
from sidtune.models.post_ranking.config import FieldSpec
from sidtune.models.post_ranking.files import (
    add_lora,
)
from sidtune.models.post_ranking.losses import answer_loss
from sidtune.models.post_ranking.model import PostRankForCausalLM

pytestmark = pytest.mark.medium

KINDS = ("qwen3", "llama", "gpt2")


def trainable(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# -- slots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_soft_tokens_stand_in_their_slots(kind):
    model, processor = ranker(kind)
    batch = requests(2) + requests(1, seed=1, count=3, history=0, query=None)
    inputs = processor.from_requests(batch)
    features = {key: inputs[key] for key in ("query", "user_fields", "item_fields", "item_mask")}
    embedded = model.embed_prompt(inputs["input_ids"], **features)
    config = processor.config
    for row in range(3):
        ids = inputs["input_ids"][row]
        plain = ids < config.text_config.vocab_size
        assert torch.equal(embedded[row][plain], model.get_input_embeddings()(ids[plain]))
        user = {name: value[row : row + 1] for name, value in inputs["user_fields"].items()}
        torch.testing.assert_close(
            embedded[row][ids == config.user_token_id], model.qia_user(inputs["query"][row : row + 1], user)
        )
        things = [*batch[row].history, *batch[row].candidates]
        for place, thing in zip((ids == config.item_token_id).nonzero()[:, 0].tolist(), things, strict=True):
            fields = {name: torch.tensor(np.atleast_1d(value))[None].float() for name, value in thing.items()}
            torch.testing.assert_close(embedded[row, place], model.qia_item(inputs["query"][row : row + 1], fields)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_candidate_changes_logits_from_its_slot_onward(kind):
    model, processor = ranker(kind)
    one = requests(1, history=1)[0]
    changed = replace(
        one, candidates=[*one.candidates[:2], {**one.candidates[2], "words": np.ones(6)}, one.candidates[3]]
    )
    first, second = (processor.from_requests([r]) for r in (one, changed))
    slot = (first["input_ids"][0] == processor.config.item_token_id).nonzero()[3, 0]
    moved = (model(**first).logits - model(**second).logits).abs().amax(dim=-1)[0]
    assert moved[:slot].max() == 0 and moved[slot] > 1e-5 and moved[-1] > 1e-6


def test_swapping_two_candidates_swaps_the_target_letters():
    _, processor = ranker()
    one = replace(requests(1)[0], relevance=np.array([3.0, 5, 4, 1], np.float32))
    straight = processor.from_requests([one], padding_side="right")
    swapped = processor.from_requests([one], orders=[[2, 1, 0, 3]], padding_side="right")
    labels = processor.config.label_token_ids

    def answer(inputs):
        return [labels.index(token) for token in inputs["labels"][0].tolist() if token in labels]

    assert answer(straight) == [1, 2, 0, 3] and answer(swapped) == [1, 0, 2, 3]
    for name, value in straight["item_fields"].items():
        torch.testing.assert_close(value[0, [0, 1, 4, 3, 2, 5]], swapped["item_fields"][name][0])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_side_and_batch_change_nothing(kind):
    model, processor = ranker(kind)
    batch = requests(2) + requests(1, seed=1, count=7, history=3)
    alone = [model(**processor.from_requests([one])) for one in batch]
    for side in ("left", "right"):
        inputs = processor.from_requests(batch, padding_side=side)
        logits = model(**inputs).logits
        for row, result in enumerate(alone):
            torch.testing.assert_close(
                logits[row][inputs["attention_mask"][row].bool()], result.logits[0], atol=2e-5, rtol=1e-4
            )
    with pytest.raises(DataError, match="padded on the left"):
        model.rank(**processor.from_requests(batch, answers=False, padding_side="right"))


def test_slots_and_items_that_differ_are_refused():
    model, processor = ranker()
    inputs = processor.from_requests(requests(2))
    mask = inputs["item_mask"].clone()
    mask[0, -1] = False
    with pytest.raises(DataError, match="Row 0 of the batch has 6 item placeholders but 5 items"):
        model(**{**inputs, "item_mask": mask})
    ids = inputs["input_ids"].clone()
    # One slot less in one row and one more in the other: the total is right, the rows are not.
    ids[0, (ids[0] == processor.config.item_token_id).nonzero()[0]] = 5
    ids[1, 0] = processor.config.item_token_id
    with pytest.raises(DataError, match="Row 0 of the batch has 5 item placeholders but 6 items"):
        model(**{**inputs, "input_ids": ids})
    with pytest.raises(DataError, match="no item_fields were given"):
        model(**{**inputs, "item_fields": None})
    del inputs["item_fields"]["sid"]
    with pytest.raises(DataError, match="'sid' is absent"):
        model(**inputs)


def test_a_model_without_user_fields_has_no_user_slot():
    model, processor = ranker(fields=FIELDS[2:])
    assert model.qia_user is None
    inputs = processor.from_requests(requests(2))
    assert not (inputs["input_ids"] == processor.config.user_token_id).any()
    assert torch.isfinite(model(**inputs).loss)


def test_missing_features_end_in_a_sentence_or_in_no_user_slot():
    model, processor = ranker()
    one = requests(1)[0]
    nobody = replace(one, user={"uid": None, "activity": np.array([np.nan, np.nan])})
    inputs = processor.from_requests([nobody])
    assert not (inputs["input_ids"] == processor.config.user_token_id).any() and torch.isfinite(model(**inputs).loss)
    partly = replace(one, user={"uid": None, "activity": np.array([np.nan, 1.0])})
    assert (processor.from_requests([partly])["input_ids"] == processor.config.user_token_id).any()
    empty = replace(one, candidates=[dict.fromkeys(one.candidates[0]), *one.candidates[1:]])
    with pytest.raises(DataError, match="needs at least one known feature"):
        model(**processor.from_requests([empty]))
    wrong = replace(one, candidates=[{**one.candidates[0], "words": np.ones(5)}, *one.candidates[1:]])
    with pytest.raises(DataError, match="item field 'words' of request .* has 5 numbers, but the model wants 6"):
        processor.from_requests([wrong])
    outside = replace(one, candidates=[{**one.candidates[0], "genre": 5}, *one.candidates[1:]])
    with pytest.raises(DataError, match="codes outside of its sizes"):
        processor.from_requests([outside])
    unknown = replace(one, relevance=np.array([1, np.nan, 2, 3], np.float32))
    with pytest.raises(DataError, match="relevance of every candidate"):
        processor.from_requests([unknown])
    processor.from_requests([unknown], answers=False)


# -- losses -------------------------------------------------------------------------------------------------------

PAIR = (np.array([2, 0, 1, 3]), np.array([0, 1, 2, 3]), 1)


def mixed(processor) -> dict:
    main = processor.from_requests(requests(2), padding_side="right")
    aux = processor.from_requests(requests(1, seed=5), "aux", pairs=[PAIR], padding_side="right")
    width = max(main["input_ids"].shape[1], aux["input_ids"].shape[1])

    def wide(inputs, key, fill):
        return torch.nn.functional.pad(inputs[key], (0, width - inputs[key].shape[1]), value=fill)

    joined = {
        key: torch.cat([wide(main, key, fill), wide(aux, key, fill)])
        for key, fill in (("input_ids", 1), ("attention_mask", 0), ("labels", -100))
    }
    for key in ("query", "item_mask", "task_id"):
        joined[key] = torch.cat([main[key], aux[key]])
    for key in ("user_fields", "item_fields"):
        joined[key] = {name: torch.cat([main[key][name], aux[key][name]]) for name in main[key]}
    return joined


def test_loss_is_the_responses_nll_with_a_mean_per_task():
    model, processor = ranker(aux_weight=0.5)
    inputs = mixed(processor)
    result = model(**inputs)
    log_p = result.logits.detach().log_softmax(-1)
    sums, counts = [0.0, 0.0], [0, 0]
    for row in range(3):
        ids = inputs["input_ids"][row].tolist()
        answer = (inputs["labels"][row] >= 0).nonzero()[:, 0].tolist()
        # The answer is everything behind the instruction: four labels and the end, or the list's name and the end.
        assert answer == list(range(answer[0], int(inputs["attention_mask"][row].sum())))
        assert len(answer) == (5 if row < 2 else 1 + len(token_ids(processor.tokenizer, [" II"])[0]))
        for position in answer:
            sums[row == 2] -= float(log_p[row, position - 1, ids[position]])
            counts[row == 2] += 1
    main, aux = sums[0] / counts[0], sums[1] / counts[1]
    assert float(result.main_loss) == pytest.approx(main, rel=1e-5) and float(result.aux_loss) == pytest.approx(
        aux, rel=1e-5
    )
    assert float(result.loss) == pytest.approx(main + 0.5 * aux, rel=1e-5)
    model.config.aux_weight = 0.0
    only_main = {
        k: ({n: v[:2] for n, v in value.items()} if isinstance(value, dict) else value[:2])
        for k, value in inputs.items()
    }
    assert float(model(**inputs).loss) == pytest.approx(float(model(**only_main).loss), rel=1e-5)
    assert float(model(**only_main).aux_loss) == 0.0


def test_a_batch_of_one_task_has_a_finite_loss_and_gradients():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.full((2, 5), -100)
    labels[0, 3:] = 2
    for task in (0, 1):
        loss, main, aux = answer_loss(logits[:, :-1], labels[:, 1:], torch.tensor([task, task]), 2.0)
        expected = -logits[0, 2:4].log_softmax(-1)[:, 2].mean()
        assert float(loss) == pytest.approx(float(expected) * (1, 2)[task], rel=1e-5)
        assert float((main, aux)[1 - task]) == 0
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    assert float(answer_loss(logits, torch.full((2, 5), -100), None, 1.0)[0]) == 0
    assert PostRankForCausalLM.accepts_loss_kwargs is False


@pytest.mark.parametrize("main_loss", ["tokens", "permutation"])
def test_the_head_of_training_gives_the_loss_and_gradients_of_the_whole_head(main_loss):
    model, processor = ranker("llama")
    model.config.main_loss = main_loss
    for inputs in (processor.from_requests(requests(3)), mixed(processor), processor.from_requests(requests(2), "fa")):
        parameters = [p for p in model.parameters() if p.requires_grad]
        whole, short = model.eval()(**inputs), model.train()(**inputs)
        assert short.logits.shape[1] < whole.logits.shape[1]
        assert float(short.loss) == pytest.approx(float(whole.loss), rel=1e-6)
        for one, other in zip(
            *(torch.autograd.grad(x.loss, parameters, allow_unused=True) for x in (whole, short)), strict=True
        ):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_candidate_carries_the_embedding_of_its_label_where_asked():
    model, processor = ranker("qwen3")
    inputs = {k: v for k, v in mixed(processor).items() if k not in ("labels", "task_id", "attention_mask")}
    plain = model.embed_prompt(**inputs)
    model.config.label_sum = True
    added = model.embed_prompt(**inputs) - plain
    table, labels = model.get_input_embeddings().weight, list(model.config.label_token_ids)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        marked = 0
        for place, token in enumerate(ids):
            wanted = torch.zeros_like(table[0])
            if token == model.config.item_token_id and ids[place - 1] in labels:
                wanted, marked = table[ids[place - 1]], marked + 1
            torch.testing.assert_close(added[row, place], wanted, rtol=1e-5, atol=1e-6)
        assert marked == 4  # the candidates, and none of the history


# -- what trains --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_feature_adaptation_moves_the_adapters_only(kind, checkpointing):
    model, processor = ranker(kind)
    model.train_adapters_only()
    inputs = processor.from_requests(requests(2), "fa")
    features = {name: value.clone() for name, value in inputs["item_fields"].items()}
    if checkpointing:
        reference = torch.autograd.grad(model.train()(**inputs).loss, list(model.adapter_parameters()))
        model.gradient_checkpointing_enable()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.language_model.modules())
    before = snapshot(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(**inputs).loss.backward()
    if checkpointing:
        for parameter, expected in zip(model.adapter_parameters(), reference, strict=True):
            torch.testing.assert_close(parameter.grad, expected)
    optimizer.step()
    for name, parameter in model.named_parameters():
        inside = name.startswith("language_model.")
        assert torch.equal(parameter, before[name]) == inside, name
        assert (parameter.grad is None) == inside, name
    assert all(torch.equal(value, inputs["item_fields"][name]) for name, value in features.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["A", "B"])
def test_lora_is_on_queries_and_keys_and_never_in_an_adapter(kind, layout):
    model, processor = ranker(kind)
    reference = model(**processor.from_requests(requests(2))).logits
    adapters = sum(p.numel() for p in model.adapter_parameters())
    tuned = add_lora(model, layout)
    names = trainable(tuned)
    lora = [name for name in names if "lora_" in name]
    parts = ("c_attn",) if kind == "gpt2" else ("q_proj", "k_proj")
    assert len(lora) == 2 * len(parts) * 2
    assert all("language_model" in name and name.split(".lora_")[0].endswith(parts) for name in lora)
    rest = [name for name in names if name not in lora]
    assert rest and all("qia_" in name for name in rest) and not any("qia_" in name for name in lora)
    assert sum(dict(tuned.named_parameters())[name].numel() for name in rest) == adapters
    scales = [m.scaling["default"] for m in tuned.modules() if isinstance(getattr(m, "scaling", None), dict)]
    assert scales and set(scales) == {1.0}
    torch.testing.assert_close(tuned.eval()(**processor.from_requests(requests(2))).logits, reference)


def test_the_lora_pattern_matches_no_layer_of_an_adapter_whatever_its_name():
    model, _ = ranker()
    model.qia_item.q_proj = torch.nn.Linear(4, 4)
    tuned = add_lora(model, "A")
    pattern = tuned.peft_config["default"].target_modules
    matched = [name for name, _ in ranker()[0].named_modules() if re.fullmatch(pattern, name)]
    assert len(matched) == 4 and re.fullmatch(pattern, "qia_item.q_proj") is None
    assert not [name for name, _ in tuned.named_parameters() if "qia_" in name and "lora_" in name]


def test_one_lora_step_changes_what_it_should():
    model, processor = ranker()
    tuned = add_lora(model, "A", r=4, alpha=4, dropout=0.0).train()
    before = snapshot(tuned)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    tuned(**mixed(processor)).loss.backward()
    optimizer.step()
    names = set(trainable(tuned))
    changed = {name for name, value in tuned.named_parameters() if not torch.equal(value, before[name])}
    # The gradient of A is zero while B is zero; AdamW still decays it.
    assert changed == names


def test_learning_brings_the_right_order():
    """Overfits eight requests: the answer of every method is then the target."""
    model, processor = ranker(d_h=16)
    batch = [
        replace(r, relevance=np.random.default_rng(n).permutation(4).astype(np.float32))
        for n, r in enumerate(requests(8))
    ]
    inputs = processor.from_requests(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(100):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    prompts = processor.from_requests(batch, answers=False)
    for method in ("greedy", "beam", "unconstrained"):
        found = model.eval().rank(**prompts, method=method)
        assert found.order.tolist() == [np.argsort(-r.relevance).tolist() for r in batch], method
        assert bool(found.valid.all())
    first = model.rank(**prompts, method="single_forward").order[:, 0]
    assert first.tolist() == [int(r.relevance.argmax()) for r in batch]


@pytest.mark.parametrize("adapter", ["mlp", "mlp_query"])
def test_the_ablations_run_in_the_same_place(adapter):
    model, processor = ranker(adapter=adapter)
    inputs = processor.from_requests(requests(2))
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.adapter_parameters())
    other = {**inputs, "query": inputs["query"] + 1}
    assert torch.equal(model(**inputs).logits, model(**other).logits) == (adapter == "mlp")


def test_upstream_scores_are_standardised_by_the_config():
    """The generator's log-probabilities enter as a numeric field; the config's statistics make their scale irrelevant."""
    raw = (FieldSpec("score", "numeric", "item", 1, mean=(-40.0,), std=(10.0,)), FIELDS[-1])
    model, processor = ranker(fields=raw)
    scaled, _ = ranker(fields=(FieldSpec("score", "numeric", "item", 1, mean=(-4.0,), std=(1.0,)), FIELDS[-1]))
    scaled.load_state_dict(model.state_dict())
    one = requests(1)[0]
    times = [
        replace(one, candidates=[{**c, "score": c["score"] * f} for c in one.candidates], history=()) for f in (10, 1)
    ]
    torch.testing.assert_close(
        model(**processor.from_requests(times[:1])).logits, scaled(**processor.from_requests(times[1:])).logits
    )
