"""Prompts of the post-ranking model: what they cost, what they say, and that text stays data (check 15 of the notes)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lm_stand_ins import tiny_tokenizer
from post_rank_sources import toy_table
from post_rank_stand_ins import D_Q, FIELDS, ranker, requests

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.post_ranking.generated_lists import generator_fields
from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankTable
from sidtune.data_builders.post_ranking.store import load_post_rank, save_post_rank
from sidtune.data_builders.post_ranking.text import request_of, table_from_requests
from sidtune.data_builders.prompts.encoding import token_ids
from sidtune.models.post_ranking.processor import PostRankProcessor, choose_labels
from sidtune.models.post_ranking.templates import TEMPLATES
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.trainers.post_ranking.data import PostRankExamples, field_specs

PAIR = (np.array([2, 0, 1, 3]), np.array([0, 1, 2, 3]), 1)


def length(processor, count: int, **options) -> int:
    inputs = processor.from_requests(requests(1, count=count, **options), answers=False)
    return int(inputs["attention_mask"].sum())


def test_prompts_grow_by_two_tokens_a_candidate_whatever_the_fields():
    _, processor = ranker()
    _, narrow = ranker(fields=(FIELDS[0], FIELDS[2]))
    lengths = [length(processor, count) for count in range(1, 8)]
    assert set(np.diff(lengths)) == {2} and lengths == [length(narrow, count) for count in range(1, 8)]
    assert [length(processor, 4, history=n) for n in (2, 3, 5)] == [lengths[3] + n for n in (0, 1, 3)]
    assert length(processor, 4, history=0) < lengths[3] - 2


def test_features_as_words_cost_tokens_for_every_field():
    model, processor = ranker()
    words = PostRankProcessor(processor.tokenizer, processor.config, words=True)
    one = requests(1)[0]
    sizes = []
    for fields in range(1, 5):
        texts = [[(f"field{n}", "value") for n in range(fields)] for _ in range(4)]
        inputs = words.from_requests([replace(one, item_texts=texts)], answers=False)
        sizes.append(int(inputs["attention_mask"].sum()))
        assert int(inputs["input_ids"].max()) < processor.config.text_config.vocab_size
    assert len(set(np.diff(sizes))) == 1 and sizes[1] - sizes[0] >= 4 * 3 and sizes[0] > length(processor, 4)
    assert sorted(model.rank(**inputs).order[0].tolist()) == [0, 1, 2, 3]
    with pytest.raises(DataError, match="no text for each candidate"):
        words.from_requests([replace(one, item_texts=())])


def test_adaptation_says_features_and_rating():
    _, processor = ranker()
    one = replace(requests(1, count=2)[0], relevance=np.array([4, np.nan], np.float32))
    inputs = processor.from_requests([one], "fa", padding_side="right")
    said = [processor.tokenizer.decode(row[row >= 0]) for row in inputs["labels"]]
    user, end = " User gender is f, mean rating is 3.5.", processor.tokenizer.eos_token
    assert said[0] == f"{user} Item genre is drama, price is 0.5. Rating 4.{end}"
    assert said[1] == f"{user} Item genre is drama, price is 1.5.{end}"
    assert inputs["item_mask"].tolist() == [[True], [True]] and inputs["task_id"].tolist() == [2, 2]
    np.testing.assert_allclose(inputs["item_fields"]["words"][1, 0], one.candidates[1]["words"], rtol=1e-6)


def test_auxiliary_prompt_names_both_lists():
    _, processor = ranker()
    labels, slots = processor.config.label_token_ids, TEMPLATES["v1"]
    main = processor.from_requests(requests(1), answers=False)["input_ids"][0].tolist()
    literal = lambda text: token_ids(processor.tokenizer, [text])[0]  # noqa: E731
    shared = main[: -len(literal(slots.rank))]
    for better, answer in ((0, slots.one), (1, slots.two)):
        inputs = processor.from_requests(requests(1), "aux", pairs=[(*PAIR[:2], better)])
        expected = [
            *shared,
            *literal(slots.list_one),
            *(labels[n] for n in PAIR[0]),
            *literal(slots.list_two),
            *(labels[n] for n in PAIR[1]),
        ]
        expected += [*literal(slots.which), *literal(answer), processor.config.end_token_id]
        assert inputs["input_ids"][0].tolist() == expected and inputs["task_id"].tolist() == [1]
    with pytest.raises(DataError, match="pass `pairs`"):
        processor.from_requests(requests(1), "aux")
    with pytest.raises(ConfigError, match="no post-ranking task 'man': did you mean 'main'"):
        processor.from_requests(requests(1), "man")
    with pytest.raises(ConfigError, match="can rank 1 to 26 candidates"):
        processor.from_requests(requests(1, count=27))


STRANGE = [
    "Rank B A C", "plan B", "A", "ABC", "<|im_end|> A B", "<|user|> <|item|>", "<a_1><b_2>", "USB-C hub", "I II A",
    "Ａ Ｂ", "\u200bA",
    "Z" * 50, " ",
    "İ A", "A\nB\tC", "[PAD]</s><s>",
]  # fmt: skip


def test_strangers_text_becomes_no_placeholder_label_or_added_token():
    _, processor = ranker()
    config, random = processor.config, np.random.default_rng(0)
    alphabet = list("ABZ <>|_[]/abi\n") + ["<|im_end|>", "<|im_start|>", " A", "Ａ"]
    texts = STRANGE + ["".join(random.choice(alphabet, 12)) for _ in range(300)]
    one = requests(1)[0]
    placeholders = [config.user_token_id, config.item_token_id]
    expected = processor.from_requests([one], answers=False)["input_ids"][0]
    structure = [t for t in expected.tolist() if t in placeholders or t in processor.sanitizer.ids]
    count = sum(token in config.label_token_ids for token in expected.tolist())
    for text in texts:
        ids = processor.text_ids(text)
        assert set(ids).isdisjoint([*config.label_token_ids, *placeholders, *processor.sanitizer.ids]), text
        row = processor.from_requests([replace(one, query=text)], answers=False)["input_ids"][0].tolist()
        assert [t for t in row if t in placeholders or t in processor.sanitizer.ids] == structure, text
        assert sum(token in config.label_token_ids for token in row) == count, text
    assert processor.tokenizer.decode(processor.text_ids("red Pen 5")) == " red pen 5"
    assert processor.tokenizer.decode(processor.text_ids("red pen 5")) == " red pen 5"


def test_labels_are_single_tokens_and_preferably_words():
    tokenizer = tiny_tokenizer()
    labels = choose_labels(tokenizer)
    assert len(set(labels)) == 26 and [tokenizer.decode([t]).strip() for t in labels] == list(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    )
    tokenizer.add_tokens(["Q"])
    with pytest.raises(ConfigError, match="does not write each of the letters"):
        choose_labels(tokenizer)
    assert len(choose_labels(tokenizer, 16)) == 16


def test_a_table_batch_gives_the_inputs_of_its_requests():
    fields = tuple(replace(spec, size=None, dim=spec.width) if spec.coded else spec for spec in FIELDS)
    model, processor = ranker(fields=fields)
    processor.max_history = 2
    batch = requests(2, history=3) + requests(1, seed=1, count=6, history=0, query=None)
    batch = [_dense(one, random) for one, random in zip(batch, map(np.random.default_rng, range(3)), strict=True)]
    kinds = tuple(PostRankField(spec.name, spec.kind, spec.side, spec.dim, dynamic=True) for spec in fields)
    table = table_from_requests(batch, kinds, D_Q)
    direct = processor.from_requests(batch)
    read = processor.from_batch(table.batch(np.arange(3)), [one.query for one in batch])
    for key in ("input_ids", "attention_mask", "labels", "query"):
        assert torch.equal(direct[key], read[key]), key
    torch.testing.assert_close(model(**direct).logits, model(**read).logits)
    prompts = processor.from_batch(table.batch(np.arange(3)), [one.query for one in batch], answers=False)
    assert torch.equal(model.rank(**prompts).order, model.rank(**processor.from_requests(batch, answers=False)).order)


def _dense(one, random):
    """Codes as vectors, distinct items, one feature missing."""

    def thing(fields):
        return {
            **fields,
            "genre": random.normal(size=5),
            "sid": random.normal(size=12),
            "price": [float(fields["price"])],
            "score": [float(fields["score"])],
        }

    things = [thing(f) for f in one.candidates]
    things[1] = {**things[1], "words": None}
    names = [f"{one.request_id}-{n}" for n in range(len(things))]
    return replace(one, candidates=things, history=[thing(f) for f in one.history], item_ids=names)


def sid_table(sids: SemanticIds) -> PostRankTable:
    """Two requests over the catalogue of `sids`, whose codes are the only field."""
    sources = (sids.fingerprint(), *sids.extends)
    field, matrix = next(iter(generator_fields(sids.codes, sids.level_sizes, np.zeros((2, 3)), sources).items()))
    table = toy_table(np.ones((2, 2)), np.ones((2, 2, 1)), np.ones((2, D_Q)), ["train", "test"])
    return replace(table, fields=(*table.fields, field), matrices={**table.matrices, "item/sid": matrix[:4]})


def test_a_model_that_reads_semantic_ids_refuses_those_of_strangers(tmp_path):
    """Also once table, model and processor were saved; items added to the model's own semantic IDs are welcome."""
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    own = SemanticIds(list("abcd"), codes, [2, 2])
    table, other = sid_table(own), sid_table(SemanticIds(list("abcd"), codes[::-1], [2, 2]))
    _, processor = ranker(fields=field_specs(table, [0]))
    processor.save_pretrained(tmp_path)
    processor = PostRankProcessor.from_pretrained(tmp_path)
    (tmp_path / "table").mkdir()
    save_post_rank(other, tmp_path / "table")
    strange = load_post_rank(tmp_path / "table")
    processor.from_requests([request_of(table, 0)])
    larger = own.extended(["e"], np.array([[0, 1]]))
    processor.from_requests([request_of(sid_table(larger), 1)])
    PostRankExamples(table, [0], processor)
    with pytest.raises(DataError, match="learned its field 'sid' from the semantic IDs"):
        processor.from_requests([request_of(table, 0), request_of(strange, 1)])
    with pytest.raises(DataError, match="learned its field 'sid' from the semantic IDs"):
        PostRankExamples(strange, [0], processor)
    made = table_from_requests([request_of(strange, 0)], strange.fields, D_Q)
    with pytest.raises(DataError, match="learned its field 'sid' from the semantic IDs"):
        processor.from_requests([request_of(made, 0)])
