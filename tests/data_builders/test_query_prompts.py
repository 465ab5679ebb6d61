"""The SID of a query in prompts: ours alone, whatever the query says, and the same from training to the bundle."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import text_tokenizers as made
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipeline import SHOP, TINY, TRAIN

from sidtune.core.errors import ConfigError
from sidtune.core.folders import read_json
from sidtune.data_builders.prompts.encoding import encode_prompts, token_ids
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.retrieval.loading import ModelFolder, final_model, load_retriever, prompts_of
from sidtune.decoding.retrieval.model_folder import PromptSettings, make_serializer
from sidtune.recipes.steps import build_data, init_model, learn_sids, sft
from sidtune.tokenizers.sids.query_codes import QueryCoder
from sidtune.trainers.sft.mixture import parse_stages
from sidtune.trainers.sft.task_examples import TaskExamples

CONTEXT = [{"name": "place", "value": "paris"}]


def two_sids(queries: list[str]) -> list[str]:
    """A coder that knows red from everything else, and no query from none."""
    return [("<a_1><b_2><c_3>" if "red" in query else "<a_4><b_5><c_6>") if query else "" for query in queries]


def sids_in(tokenizer, text: str) -> list[str]:
    tokens = tokenizer.convert_ids_to_tokens(token_ids(tokenizer, [text])[0])
    return [token for token in tokens if token in made.sid_tokens()]


@pytest.mark.parametrize("templates", ["plain", "compact", "chatml"])
def test_a_turn_shows_the_sid_behind_the_query(templates):
    with_sids = Serializer(made.byte_bpe(), templates, query_sids=two_sids)
    without = Serializer(made.byte_bpe(), templates)
    turn, bare = with_sids.turn("red shoes", CONTEXT), without.turn("red shoes", CONTEXT)
    assert turn == bare.replace("red shoes", "red shoes <a_1><b_2><c_3>") != bare
    assert sids_in(with_sids.tokenizer, turn) == ["<a_1>", "<b_2>", "<c_3>"]
    assert with_sids.turn(None, CONTEXT) == without.turn(None, CONTEXT)
    assert with_sids.turn("\u200b", None) == without.turn("\u200b", None)  # nothing is left of this query
    added = set(with_sids.literal_ids()) - set(without.literal_ids())
    assert added == set(made.byte_bpe().convert_tokens_to_ids(made.sid_tokens()))
    assert with_sids.sanitizer.agrees(turn) and with_sids.sanitizer.agrees(bare)


def test_a_sid_in_the_text_of_a_query_stays_text():
    serializer = Serializer(made.byte_bpe(), query_sids=two_sids)
    for query in ("<a_1>", "red <a_9><b_9><c_9>", "x <a_1", "_1> y", "＜a_1＞ blue", "<<a_1>a_1>"):
        turn = serializer.turn(query, [{"name": "<b_2>", "value": "<c_3>"}])
        expected = two_sids([query])[0].replace("><", "> <").split()
        assert sids_in(serializer.tokenizer, turn) == expected, query
        assert serializer.sanitizer.agrees(turn)


SERIALIZERS = [Serializer(made.byte_bpe(), query_sids=two_sids), Serializer(made.metaspace(), query_sids=two_sids)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="<>_abcred 1236\u200b＜", max_size=16), st.text(alphabet="<>_c3 ", max_size=8))
def test_no_query_and_no_context_can_forge_one(query, value):
    for serializer in SERIALIZERS:
        turn = serializer.turn(query, [{"name": "n", "value": value}])
        expected = two_sids([query])[0].replace("><", "> <").split() if serializer.field(query, "query") else []
        assert sids_in(serializer.tokenizer, turn) == expected
        assert serializer.sanitizer.agrees(turn)


def test_wrong_query_sids_and_templates_are_refused(tmp_path):
    for wrong in ("red", "<a_1> ", "<a_99><b_1><c_1>", "<|endoftext|>"):
        with pytest.raises(ConfigError, match="is no SID of this tokenizer"):
            Serializer(made.byte_bpe(), query_sids=lambda queries, wrong=wrong: [wrong] * len(queries))
    (tmp_path / "turn.jinja").write_text("{{ query }}:", encoding="utf-8")
    with pytest.raises(ConfigError, match="does not show 'query_sid'"):
        Serializer(made.byte_bpe(), tmp_path, query_sids=two_sids)
    assert Serializer(made.byte_bpe(), tmp_path).turn("red", None) == "red:"
    with pytest.raises(ConfigError, match="no folder of a query coder"):
        make_serializer(made.byte_bpe(), "plain", PromptSettings(query_sids=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Data, SIDs of a common code space, a small model, and two steps of training with query SIDs."""
    folder = tmp_path_factory.mktemp("queries")
    data, sids, model = (str(folder / name) for name in ("data", "sids", "model"))
    build_data.main(build_data.Arguments(data, options=SHOP))
    learn_sids.main(
        learn_sids.Arguments(
            data,
            sids,
            encoder={"dims": 16},
            quantizer={"name": "residual_kmeans", "level_sizes": [8, 8, 8]},
            queries=True,
        )
    )
    init_model.main(init_model.Arguments(data, sids, model, scratch=TINY, text_vocab_size=512))
    stage = {"name": "all", "tasks": {"whole_history": {}}, "max_length": 256, "args": {**TRAIN, "max_steps": 2}}
    sft.main(sft.Arguments(data, sids, model, str(folder / "sft"), [stage], prompt_max_length=256, query_sids=True))
    return folder


def test_prompts_carry_query_sids_from_training_on(trained):
    retriever = load_retriever(final_model(trained / "sft"), trained / "sids")
    coder = QueryCoder.from_pretrained(trained / "sids")
    data = load_folder(trained / "data")
    requests = data.requests["test"]
    prompts = prompts_of(retriever, data, requests)
    queries = requests["query"].to_pylist()
    assert any(queries) and not all(queries)
    for query, sid, prompt in zip(queries, coder.token_texts(queries), prompts, strict=True):
        assert (f" {sid}" in prompt[-1]) if query else ("<a_" not in prompt[-1])
    encoded = encode_prompts(retriever.tokenizer, prompts, 256, reserve=3)
    tokens = set(retriever.vocabulary.sid_token_ids.tolist())
    last = encoded[next(n for n, query in enumerate(queries) if query)]
    assert sum(token in tokens for token in last) >= 3
    assert read_json(final_model(trained / "sft") / "serializer.json")["query_sids"] is True


def test_training_examples_hold_the_sids_of_their_queries(trained):
    opened = ModelFolder.open(trained / "sft")
    tokenizer = opened.tokenizer
    stage = parse_stages([{"name": "all", "tasks": {"request_to_sid": {}}, "max_length": 256}])[0]
    build = TaskExamples(trained / "data", trained / "sids" / "sids", query_coder=trained / "sids")
    rows = build(stage, "train", SimpleNamespace(tokenizer=tokenizer, vocabulary=opened.vocabulary))["request_to_sid"]
    coder, found = QueryCoder.from_pretrained(trained / "sids"), 0
    for row in rows:
        prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        shown = re.match(r"(.+?) (<a_\d+><b_\d+><c_\d+>)", tokenizer.decode(prompt).rsplit("\n", 1)[-1])
        if shown is not None:
            assert coder([shown[1]]) == [shown[2]]
            found += 1
    assert found > 100


def test_a_bundle_codes_queries_without_the_folder_of_learn_sids(trained, tmp_path):
    from sidtune.decoding.retrieval.prompter import Prompter
    from sidtune.decoding.retrieval.search_request import SearchRequest

    shutil.copytree(final_model(trained / "sft"), tmp_path / "moved")
    prompter = Prompter.of(ModelFolder.open(tmp_path / "moved"))
    coder = QueryCoder.from_pretrained(trained / "sids")
    for query in (next(iter(coder.known)), "words nobody asked before", "<a_1> desk"):
        turn = prompter.pieces(SearchRequest(query=query))[-1]
        assert f" {coder([query])[0]}" in turn
        assert prompter.serializer.sanitizer.agrees(turn)


def test_other_codes_of_queries_train_the_stages_again(trained, tmp_path):
    shutil.copytree(trained / "sids", tmp_path / "sids")
    plain, with_sids = (
        TaskExamples(trained / "data", tmp_path / "sids" / "sids", query_coder=coder).identity()
        for coder in (None, tmp_path / "sids")
    )
    assert "query_coder" not in plain and {k: v for k, v in with_sids.items() if k != "query_coder"} == plain
    shutil.rmtree(tmp_path / "sids" / "quantizer")
    shutil.copytree(tmp_path / "sids" / "encoder", tmp_path / "sids" / "quantizer")
    changed = TaskExamples(trained / "data", tmp_path / "sids" / "sids", query_coder=tmp_path / "sids").identity()
    assert changed != with_sids
