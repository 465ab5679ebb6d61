"""One code space for queries and items: learn_sids against the same steps by hand, and queries coded on the fly."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json
from sidtune.data_builders.tables.store import load_folder
from sidtune.recipes.steps import build_data, extend_sids, learn_sids
from sidtune.tokenizers.encoders.base import load_encoder, make_encoder
from sidtune.tokenizers.keywords.mining import PoolConfig, mine_pool
from sidtune.tokenizers.quantizers.base import load_quantizer, make_quantizer
from sidtune.tokenizers.sids import learning
from sidtune.tokenizers.sids.learned import texts_of
from sidtune.tokenizers.sids.query_codes import (
    CODER_FOLDER,
    QUERY_FILE,
    QueryCoder,
    read_query_codes,
    write_query_codes,
)
from sidtune.tokenizers.sids.query_recall import query_item_recall, query_targets
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

pytestmark = pytest.mark.medium

SHOP = {"n_items": 260, "n_users": 60, "n_requests": 900}
QUANTIZER = {"name": "rq_opq", "head_sizes": [12, 8, 6], "tail_size": 8, "rotation_rounds": 3}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    split = {"valid_share": 0.1, "test_share": 0.1}
    build_data.main(build_data.Arguments(str(folder / "data"), options=SHOP, split=split))
    learn(folder / "data", folder / "sids", queries=True)
    return folder


def learn(data: Path, output: Path, **options) -> None:
    arguments = {"encoder": {"dims": 24}, "quantizer": QUANTIZER, **options}
    learn_sids.main(learn_sids.Arguments(str(data), str(output), **arguments))


def test_queries_are_stacked_before_the_items(shop):
    data = load_folder(shop / "data")
    asked = [row["query"] for row in data.requests["train"].to_pylist() if row["query"]]
    queries, codes = read_query_codes(shop / "sids" / QUERY_FILE, (12, 8, 6, 8, 8))
    assert queries == list(dict.fromkeys(asked)) and len(queries) > 100
    texts, ids = texts_of(data.items), data.items["item_id"].to_pylist()
    encoder = make_encoder("tfidf_svd", {"dims": 24}).fit(texts)
    stacked = np.concatenate([encoder.encode(queries), encoder.encode(texts)])
    expected = make_quantizer("rq_opq", {k: v for k, v in QUANTIZER.items() if k != "name"}).fit_encode(stacked)
    sids = SemanticIds.from_pretrained(shop / "sids" / "sids")
    assert (codes == expected[: len(queries)]).all() and (sids.codes == expected[len(queries) :]).all()
    assert sids.item_ids == ids  # queries get codes, items alone get SIDs
    assert (load_file(shop / "sids" / "vectors.safetensors")["vectors"] == stacked[len(queries) :]).all()
    later = {row["query"] for part in ("valid", "test") for row in data.requests[part].to_pylist() if row["query"]}
    assert not (later - set(asked)) & set(queries) and later - set(asked)


def test_recall_of_the_validation_split_is_reported(shop, tmp_path):
    data, coder = load_folder(shop / "data"), QueryCoder.from_pretrained(shop / "sids")
    queries, rows, targets = query_targets(data.requests["valid"], coder.sids.item_ids)
    assert 20 < len(rows) < 2_000
    expected = query_item_recall(
        coder.vectors(queries),
        load_file(shop / "sids" / "vectors.safetensors")["vectors"],
        coder.quantizer,
        targets,
        query_rows=rows,
        item_codes=coder.sids.codes,
        query_codes=coder.codes(queries),
    )
    record = read_json(shop / "sids" / "query_recall.json")
    assert record["recall"] == pytest.approx({str(k): v for k, v in expected.recall.items()})
    assert record["prefix_share"] == pytest.approx(expected.prefix_share)
    assert record["recall"]["100"] > 1.2 * record["chance"]["100"]
    learn(shop / "data", tmp_path / "plain")
    assert not (tmp_path / "plain" / QUERY_FILE).exists()
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "plain" / "query_recall.json")


def test_queries_are_coded_on_the_fly(shop):
    coder = QueryCoder.from_pretrained(shop / "sids")
    queries, codes = read_query_codes(shop / "sids" / QUERY_FILE, coder.quantizer.level_sizes)
    assert (coder.codes(queries) == codes).all()
    nearest = coder.quantizer.encode(coder.encoder.encode(queries))
    assert (nearest != codes).any()  # a balanced level places training rows elsewhere, and they stay there
    new = ["black oak desk", "vintage  earbuds", "black oak desk"]
    assert all(text not in coder.known for text in new)
    by_hand = coder.quantizer.encode(coder.encoder.encode(["black oak desk", "vintage earbuds", "black oak desk"]))
    made = coder.codes([new[0], queries[3], None, new[1], "  ", new[2]])
    assert (made[[0, 3, 5]] == by_hand).all() and (made[1] == codes[3]).all() and (made[[2, 4]] == -1).all()
    assert made.dtype == np.int32 and coder.codes([]).shape == (0, 5)
    texts = coder.token_texts([new[0], None, queries[3]])
    assert texts[1] == "" and all(re.fullmatch(r"(<[a-e]_\d+>){5}", text) for text in (texts[0], texts[2]))
    numbers = [[int(number) for number in re.findall(r"_(\d+)>", text)] for text in (texts[0], texts[2])]
    assert numbers == [by_hand[0].tolist(), codes[3].tolist()] and coder([new[0]]) == texts[:1]


def test_codes_are_written_with_the_letters_of_the_items(shop):
    loaded = QueryCoder.from_pretrained(shop / "sids")
    shared = SemanticIds(["x"], np.zeros((1, 5), np.int32), (12, 8, 6, 8, 8), letters="abcdd").with_suffix(3)
    coder = QueryCoder(loaded.encoder, loaded.quantizer, shared)
    a, b, c, d, e = coder.codes(["black oak desk"])[0].tolist()
    text = f"<a_{a}><b_{b}><c_{c}><d_{d}><d_{e + 8}>"  # the second tail code follows the 8 of the first; no suffix
    assert coder.token_texts(["black oak desk"]) == [text] and f"<d_{e + 8}>" in shared.tokens()


def test_each_new_query_is_encoded_once_until_the_cache_is_full(shop, monkeypatch):
    loaded = QueryCoder.from_pretrained(shop / "sids")
    coder = QueryCoder(loaded.encoder, loaded.quantizer, loaded.sids, cache_size=3)
    asked: list[str] = []
    encode = coder.encoder.encode
    monkeypatch.setattr(coder.encoder, "encode", lambda texts: asked.extend(texts) or encode(texts))
    first = coder.codes(["red desk", "oak lamp", "red desk"])
    again = coder.codes(["oak lamp", "red  desk"])
    assert asked == ["red desk", "oak lamp"] and (again == first[[1, 0]]).all()
    coder.codes(["a", "b", "red desk"])  # two more than fit: all of the cache is forgotten
    coder.codes(["red desk", "a"])
    assert asked == ["red desk", "oak lamp", "a", "b", "red desk"]
    assert (coder.codes(["red desk"]) == first[:1]).all()


def test_coder_survives_saving_and_another_process(shop, tmp_path):
    coder = QueryCoder.from_pretrained(shop / "sids")
    coder.save_pretrained(tmp_path / "bundle" / CODER_FOLDER)
    texts = [next(iter(coder.known)), "black oak desk", "words nobody knows"]
    code = (
        "import sys, numpy as np\nfrom sidtune.tokenizers.sids.query_codes import QueryCoder\n"
        "np.save(sys.argv[2], QueryCoder.from_pretrained(sys.argv[1]).codes(sys.argv[3:]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "bundle"), str(tmp_path / "made.npy"), *texts]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert (np.load(tmp_path / "made.npy") == coder.codes(texts)).all()


def test_keyword_fusion_in_one_code_space(shop, tmp_path, capsys):
    encoder = {"name": "keyword_fusion", "base": {"dims": 24}, "mining": {"head_per_type": 20}}
    learn(shop / "data", tmp_path / "sids", queries=True, encoder=encoder, learn_share=0.8)
    assert "keyword pool: 20 entity, 20 brand" in capsys.readouterr().out
    saved = load_encoder(tmp_path / "sids" / "encoder")
    pool = mine_pool(load_folder(shop / "data"), PoolConfig(head_per_type=20))
    assert (saved.pool.keywords, saved.pool.types) == (pool.keywords, pool.types)
    coder = QueryCoder.from_pretrained(tmp_path / "sids")
    quantizer = load_quantizer(tmp_path / "sids" / "quantizer")
    assert (coder.codes(["vintage oak desk"]) == quantizer.encode(saved.encode(["vintage oak desk"]))).all()
    arguments = extend_sids.Arguments(
        str(tmp_path / "sids"), str(shop / "data"), str(tmp_path / "extended"), existing="skip", held_out_share=0
    )
    extend_sids.main(arguments)
    extended = SemanticIds.from_pretrained(tmp_path / "extended" / "sids")
    assert len(extended) == 260 and len(coder.sids) == 208
    items = load_folder(shop / "data").items
    new = [row for row, item_id in enumerate(items["item_id"].to_pylist()) if item_id not in coder.sids]
    codes = quantizer.encode(saved.encode(texts_of(items.take(new))))
    assert (extended.codes[extended.rows_of_ids(items.take(new)["item_id"].to_pylist())] == codes).all()


def test_what_cannot_share_a_code_space_is_refused(shop, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(260, 8)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    with pytest.raises(DataError, match="vectors of the 'precomputed' encoder are of items only"):
        learn(
            shop / "data",
            tmp_path / "out",
            queries=True,
            encoder={"name": "precomputed", "path": str(tmp_path / "v.npy")},
        )
    with pytest.raises(ConfigError, match="collaborative_path holds vectors of items only"):
        quantizer = {"name": "rq_vae", "alignment_weight": 0.1, "collaborative_path": str(tmp_path / "v.npy")}
        learn(shop / "data", tmp_path / "out", queries=True, quantizer=quantizer)
    data = load_folder(shop / "data")
    data.requests["train"] = data.requests["train"].slice(0, 0)
    with pytest.raises(DataError, match="have no query; leave queries: true out"):
        learning._queries(data)
    with pytest.raises(DataError, match="no encoder and quantizer"):
        QueryCoder.from_pretrained(shop / "data")
    loaded = QueryCoder.from_pretrained(shop / "sids")
    other = SemanticIds(["a"], np.zeros((1, 5), np.int32), (12, 8, 6, 8, 9))
    with pytest.raises(DataError, match="of another run"):
        QueryCoder(loaded.encoder, loaded.quantizer, other)
    assert not (tmp_path / "out").exists()


def test_damaged_query_codes_are_named(tmp_path):
    write_query_codes(tmp_path / "q.parquet", ["a", "b"], np.array([[1, 2], [0, 3]]))
    queries, codes = read_query_codes(tmp_path / "q.parquet", (2, 4))
    assert queries == ["a", "b"] and codes.tolist() == [[1, 2], [0, 3]]
    with pytest.raises(DataError, match="2 levels, the quantizer 3"):
        read_query_codes(tmp_path / "q.parquet", (2, 4, 4))
    with pytest.raises(DataError, match="level 2 lies outside"):
        read_query_codes(tmp_path / "q.parquet", (2, 3))
    (tmp_path / "q.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="no readable list of query codes"):
        read_query_codes(tmp_path / "q.parquet", (2, 4))
