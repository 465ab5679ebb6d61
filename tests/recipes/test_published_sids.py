"""SIDs that others published (an index.json) start a language model: no encoder and no quantizer of ours is needed."""

from __future__ import annotations

import json

import pytest
from tiny_pipeline import SHOP, TINY

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.retrieval.loading import load_retriever
from sidtune.recipes.steps import build_data, init_model
from sidtune.tokenizers.sids.semantic_ids import SemanticIds


def test_a_model_starts_from_published_sids(tmp_path):
    data, sids, model = (str(tmp_path / name) for name in ("data", "sids", "model"))
    build_data.main(build_data.Arguments(data, options=SHOP))
    ids = load_folder(data).items["item_id"].to_pylist()
    index = {item_id: [f"<a_{n % 16}>", f"<b_{n // 16}>"] for n, item_id in enumerate(ids)}
    (tmp_path / "shop.index.json").write_text(json.dumps(index))
    SemanticIds.from_index_json(tmp_path / "shop.index.json").save_pretrained(tmp_path / "sids" / "sids")
    options = {"scratch": TINY, "text_vocab_size": 400}
    with pytest.raises(DataError, match="has no quantizer.*set init to text or mean"):
        init_model.main(init_model.Arguments(data, sids, model, **options))
    init_model.main(init_model.Arguments(data, sids, model, init="text", **options))
    found = load_retriever(model, sids).search(query="lamp", k=5)
    assert len({hit.item_id for hit in found}) == 5 and all(hit.sid == "".join(index[hit.item_id]) for hit in found)


def test_a_revision_needs_a_base():
    with pytest.raises(ConfigError, match="revision is of a base"):
        init_model.Arguments("data", "sids", "model", revision="main")
