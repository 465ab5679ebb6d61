"""The aligned encoder: it learns pairs, resumes exactly, saves the pooling that is then used, ends in SIDs; recall by a loop."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, T5Config, T5Model, TrainerCallback

from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.core.folders import read_json
from sidtune.data_builders.mining.query_pairs import distinct_queries
from sidtune.data_builders.mining.relevance_labels import near_threshold, read_relevance, shop_relevance
from sidtune.data_builders.shop_world.world import ShopWorld
from sidtune.data_builders.tables.store import load_folder
from sidtune.metrics.pair_recall import compare_recall, pair_hits, recall_to_markdown
from sidtune.recipes.steps import align_encoder, build_data, learn_sids
from sidtune.tokenizers.encoders.base import make_encoder
from sidtune.tokenizers.encoders.pooling import saved_pooling
from sidtune.tokenizers.encoders.scratch import scratch_encoder
from sidtune.trainers.contrastive.losses import AlignedLossConfig
from sidtune.trainers.contrastive.trainer import (
    AlignedExamples,
    aligned_args,
    check_encoder,
    save_aligned,
    train_aligned,
)

pytestmark = pytest.mark.medium

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = [
    "ash", "bay", "cod", "dew", "elm", "fig", "gum", "hay", "ivy", "jam",
    "kit", "log", "mud", "nut", "oak", "pea", "rye", "sap", "tar", "urn",
]  # fmt: skip
QUERIES, ITEMS = [f"want {w}" for w in WORDS], [f"{w} thing" for w in WORDS[7:] + WORDS[:7]]


def words_problem(seed: int = 0, dropout: float = 0.0):
    pairs = {"q2i": np.repeat(np.arange(20)[:, None], 2, axis=1), "rank": np.array([[0, 0, 1, 2], [1, 1, -1, 5]])}
    config = {**TINY, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model, tokenizer = scratch_encoder(QUERIES + ITEMS, config, 400, seed)
    return model, tokenizer, AlignedExamples(QUERIES, ITEMS, pairs)


def arguments_of(folder, **values):
    values = {"per_device_train_batch_size": 10, "learning_rate": 1e-2, "max_steps": 6, "disable_tqdm": True, **values}
    return aligned_args(values, folder)


def test_it_learns_pairs_that_share_no_word(tmp_path):
    model, tokenizer, examples = words_problem()

    def recall() -> float:
        save_aligned(tmp_path, model, tokenizer, "mean", 16)
        encoder = make_encoder("transformers", {"model": str(tmp_path), "device": "cpu"})
        diagonal = np.repeat(np.arange(20)[:, None], 2, axis=1)
        return float(pair_hits(encoder.encode(QUERIES), encoder.encode(ITEMS), diagonal, 1).mean())

    before = recall()
    trainer = train_aligned(
        model, tokenizer, examples, arguments_of(tmp_path / "work", max_steps=60), AlignedLossConfig(), max_length=16
    )
    assert before < 0.2 and recall() > 0.9
    first, *_, last, _ = trainer.state.log_history
    assert last["q2i_loss"] < first["q2i_loss"] / 2 and "rank_loss" in last and "q2q_loss" not in last
    assert not model.pooler.dense.weight.requires_grad  # nothing reads it; a free one would stop data parallelism


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_in_the_same_weights(tmp_path):
    ends = []
    for name in ("whole", "broken"):
        args = arguments_of(tmp_path / name, save_steps=3, max_steps=7, per_device_train_batch_size=4)
        model, tokenizer, examples = words_problem(dropout=0.1)
        if name == "broken":
            with pytest.raises(KeyboardInterrupt):
                train_aligned(model, tokenizer, examples, args, AlignedLossConfig(), max_length=16, callbacks=[Stop()])
            model, _, _ = words_problem(seed=5, dropout=0.1)  # what a resumed run starts with does not matter
        train_aligned(model, tokenizer, examples, args, AlignedLossConfig(), max_length=16)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0] if "pooler" not in key)
    assert not torch.equal(
        ends[0]["embeddings.word_embeddings.weight"], words_problem()[0].get_input_embeddings().weight
    )


def test_accumulated_batches_are_a_mean(tmp_path):
    ends = []
    for batch, steps in ((8, 1), (4, 2)):
        model, tokenizer, examples = words_problem()
        loss = AlignedLossConfig(q2i=0.0)  # rank rows have no in-batch negatives, so two halves are one whole
        args = arguments_of(
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
            warmup_steps=0,
        )
        trainer = train_aligned(model, tokenizer, examples, args, loss, max_length=16)
        ends.append(trainer.state.log_history[0]["loss"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_the_saved_pooling_is_what_the_encoder_uses(tmp_path, pooling):
    model, tokenizer, _ = words_problem()
    save_aligned(tmp_path, model, tokenizer, pooling, 9)
    texts = [*ITEMS[:3], "a text that is a good deal longer than nine tokens of this small vocabulary"]
    found = make_encoder("transformers", {"model": str(tmp_path), "device": "cpu"}).encode(texts)
    model, tokenizer = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    for text, vector in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"][:9]
        assert ids[0] == tokenizer.cls_token_id
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        wanted = {"mean": states.mean(dim=0), "cls": states[0], "last": states[-1]}[pooling]
        np.testing.assert_allclose(vector, wanted / wanted.norm(), atol=1e-5)
    assert saved_pooling(str(tmp_path)) == pooling
    modules = read_json(tmp_path / "modules.json")
    assert [m["type"].split(".")[-1] for m in modules] == ["Transformer", "Pooling", "Normalize"]
    forced = make_encoder("transformers", {"model": str(tmp_path), "pooling": "mean", "device": "cpu"}).encode(texts)
    assert np.allclose(forced, found, atol=1e-5) == (pooling == "mean")


def test_a_pooling_nobody_here_does_is_refused(tmp_path):
    assert saved_pooling(str(tmp_path)) is None
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ConfigError, match="names pooling_mode_max_tokens; set 'pooling' to one of mean, cls, last"):
        saved_pooling(str(tmp_path))


@pytest.mark.parametrize("among", [False, True])
def test_pair_hits_equal_a_plain_ranking(monkeypatch, among):
    monkeypatch.setattr("sidtune.metrics.pair_recall._CELLS", 60)
    draw = np.random.default_rng(0)
    items = draw.normal(size=(15, 3))
    items[4] = items[9] * 2  # equal cosines
    anchors = items if among else draw.normal(size=(6, 3))
    pairs = draw.integers(0, 15 if among else 6, (40, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    hits = pair_hits(anchors, items, pairs, 3, among)
    for (anchor, target), hit in zip(pairs.tolist(), hits, strict=True):
        norm = np.linalg.norm(items, axis=1) * np.linalg.norm(anchors[anchor])
        similar = {n: round(v, 5) for n, v in enumerate(items @ anchors[anchor] / norm) if not (among and n == anchor)}
        before = sum(v > similar[target] for v in similar.values())
        tied = sum(v == similar[target] for v in similar.values())
        assert hit == pytest.approx(min(max(3 - before, 0), tied) / tied)
    assert {0.0, 1.0} <= set(hits)


def test_recall_is_compared_pair_by_pair():
    hits = {"base": np.array([0.0, 1.0, 0.0]), "aligned": np.array([1.0, 1.0, 0.0])}
    row = compare_recall(hits, np.array([0, 0, 1]), "base", "aligned")
    assert row["recall"] == pytest.approx({"base": 1 / 3, "aligned": 2 / 3}) and row["difference"] == pytest.approx(
        1 / 3
    )
    assert compare_recall({k: v[:0] for k, v in hits.items()}, np.empty(0, int), "base", "aligned")["low"] is None
    assert "| 0.3333 | 0.6667 | +0.3333 [" in recall_to_markdown([{"pairs_of": "x", **row}], 10, ["base", "aligned"])


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop") / "data"
    options = {"n_items": 200, "n_users": 80, "n_requests": 1500}
    split = {"kind": "global_time", "valid_share": 0.05, "test_share": 0.15}
    build_data.main(build_data.Arguments(output_dir=str(folder), options=options, split=split))
    return folder


def settings(shop, output, **values):
    given = {
        "scratch": TINY,
        "text_vocab_size": 500,
        "max_length": 16,
        "base": {"name": "tfidf_svd", "dims": 16},
        "thresholds": {"q2q": 0.5, "i2i": 0.3, "q2i": 0.2},
        "args": {"max_steps": 4, "per_device_train_batch_size": 4, "disable_tqdm": True},
        **values,
    }
    return align_encoder.Arguments(data_dir=str(shop), output_dir=str(output), **given)


def test_the_recipe_from_log_to_semantic_ids(shop, tmp_path, capsys, monkeypatch):
    output = tmp_path / "encoder"
    arguments = settings(shop, output, pooling="cls")
    with monkeypatch.context() as patch:
        patch.setattr(align_encoder, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            align_encoder.main(arguments)
    assert not output.exists() and (tmp_path / ".work_encoder").is_dir()
    with monkeypatch.context() as patch:  # trained and mined already: neither happens again
        patch.setattr("sidtune.trainers.contrastive.trainer.AlignedTrainer.training_step", None)
        patch.setattr(align_encoder, "alignment_source", None)
        align_encoder.main(arguments)
    shown = capsys.readouterr().out
    assert "recall@10" in shown and "relevance: " in shown and "(shop)" in shown
    assert not (tmp_path / ".work_encoder").exists()
    report = read_json(output / "report.json")
    assert report["encoders"] == ["base", "start", "aligned"] and len(report["rows"]) == 4
    assert all(report["mined"][kind]["kept"] <= report["mined"][kind]["mined"] for kind in ("q2q", "i2i", "q2i"))
    data = load_folder(shop)
    known = set(distinct_queries(data.requests["train"]))
    assert report["mined"]["queries"] == len(known) and saved_pooling(str(output)) == "cls"
    learn_sids.main(
        learn_sids.Arguments(
            data_dir=str(shop), output_dir=str(tmp_path / "sids"), encoder_dir=str(output), encoder={"device": "cpu"},
            quantizer={"name": "residual_kmeans", "level_sizes": [8, 8]},
        )
    )  # fmt: skip
    assert set(read_json(tmp_path / "sids" / "run.json")["inputs"]) == {"data_dir", "encoder_dir"}
    assert read_json(tmp_path / "sids" / "encoder" / "encoder_config.json")["config"]["model"] == str(output)
    with pytest.raises(ConfigError, match="encoder_dir names the encoder"):
        learn_sids.Arguments(data_dir="d", output_dir="o", encoder_dir="e", encoder={"name": "tfidf_svd"})


def test_a_term_without_data_is_off_and_that_is_said(shop, tmp_path, caplog):
    judged = pa.table({"query": ["no such query"], "item_id": ["i"], "score": [1.0]})
    pq.write_table(judged, tmp_path / "judged.parquet")
    values = {"thresholds": {"q2q": 1.0}, "relevance": {"file": str(tmp_path / "judged.parquet")}}
    align_encoder.main(settings(shop, tmp_path / "encoder", **values))
    report = read_json(tmp_path / "encoder" / "report.json")
    assert report["mined"]["relevance"] == {"source": "file", "rows": 0, "left_out": 1}
    for sentence in (
        "No q2q pair lies above the cosine 1.0; its term is off.",
        "No relevance score belongs to a known",
    ):
        assert any(note.startswith(sentence) for note in report["mined"]["notes"]) and sentence in caplog.text
    assert not any("q2q_loss" in entry or "relevance_loss" in entry for entry in report["curves"])


def test_shop_relevance_equals_what_query_and_item_say(shop):
    data = load_folder(shop)
    requests, world = data.requests["train"], ShopWorld.from_options(**data.meta["options"])
    queries = distinct_queries(requests)
    draw = np.random.default_rng(0)
    query, item = draw.integers(0, len(queries), 300), draw.integers(0, 200, 300)
    found = shop_relevance(data.meta, requests, queries, query, item)
    texts = requests["query"].to_pylist()
    for q, i, y in zip(query.tolist(), item.tolist(), found, strict=True):
        row = world.request_rows([requests["request_id"][texts.index(queries[q])].as_py()])[0]
        asked, brand = world.requests.asked[row], world.requests.brand[row]
        met = (asked < 0 or asked in world.catalogue.values[i]) and (brand < 0 or brand == world.catalogue.brand[i])
        relation = world.catalogue.relation[world.requests.scope[row], world.catalogue.leaf[i]]
        assert y == pytest.approx((1 - relation / 3) * (1 if met else 0.5))
    assert len(np.unique(found.round(6))) > 4


def test_judgements_of_a_file_are_scaled_and_checked(shop, tmp_path):
    items = load_folder(shop).items
    known = items["item_id"][3].as_py()
    path = tmp_path / "judged.jsonl"
    lines = [("a  b", known, 2.0), ("a b", "gone", 1.0), ("c", known, 3.0)]
    path.write_text("".join(json.dumps(dict(zip(("query", "item_id", "score"), x, strict=True))) + "\n" for x in lines))
    labels, dropped = read_relevance(path, ["x", "a b"], items, scale=4)
    assert (labels.query.tolist(), labels.item.tolist(), labels.score.tolist(), dropped) == ([1], [3], [0.5], 2)
    with pytest.raises(DataError, match=r"row 0: the score 2.0 lies outside \[0, 1\]"):
        read_relevance(path, ["a b"], items)
    cosine = np.linspace(0, 1, 101)
    assert near_threshold(cosine, 0.6, 0.05, 1000).tolist() == [n for n in range(101) if abs(cosine[n] - 0.6) <= 0.05]
    assert len(near_threshold(cosine, 0.6, 0.2, 7)) == 7


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"loss": {"q2k": 1.0}}, "unknown key 'q2k'"),
        ({"mining": {"method": []}}, "unknown key 'method'"),
        ({"thresholds": {"q2i": "high"}}, "'q2i' must be a number"),
        ({"relevance": {"source": "file"}}, "source 'file' needs 'file'"),
        ({"args": {"learning_rat": 1}}, "unknown key 'learning_rat'"),
        ({"args": {"output_dir": "x"}}, "the key 'output_dir' cannot be set here"),
        ({"pooling": "max"}, "pooling must be 'auto', 'mean', 'cls' or 'last'"),
        ({"split": "train"}, "split must be 'valid' or 'test'"),
    ],
)
def test_wrong_options_are_told_before_any_work(tmp_path, values, sentence):
    with pytest.raises(SidtuneError, match=sentence):
        settings(tmp_path, tmp_path / "out", **values)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_fit_are_refused():
    model, _, _ = words_problem()
    with pytest.raises(ConfigError, match="between 1 and the 512 positions of the model, got 600"):
        check_encoder(model, "mean", 600)
    t5 = T5Model(T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="t5 model is an encoder-decoder"):
        check_encoder(t5, "mean", 8)
    with pytest.raises(ConfigError, match="no model_type 'bird'"):
        scratch_encoder(["a"], {"model_type": "bird"})
    with pytest.raises(ConfigError, match="makes no model"):
        scratch_encoder(["a"], {**TINY, "num_attention_heads": 3}, 300)
