"""Every part that saves itself into a folder leaves the files of others there, and none of its own that no longer belong."""

import numpy as np
import pytest

from sidtune.tokenizers.encoders.base import load_encoder, make_encoder
from sidtune.tokenizers.keywords.pool import KeywordPool
from sidtune.tokenizers.quantizers.base import load_quantizer, make_quantizer
from sidtune.tokenizers.sids.query_codes import QueryCoder
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

TEXTS = [f"{colour} {thing}" for colour in ("red", "blue", "green", "black") for thing in ("pen", "lamp", "chair")]


def quantizer():
    made = make_quantizer("residual_kmeans", {"level_sizes": [2, 2]})
    return made.fit(np.random.default_rng(0).standard_normal((12, 4)).astype("f4"))


def encoder():
    return make_encoder("tfidf_svd", {"dims": 4}).fit(TEXTS)


def sids():
    return SemanticIds(["a", "b"], np.array([[0, 1], [1, 0]], np.int32), [2, 2])


def coder(known=None):
    return QueryCoder(encoder(), quantizer(), sids(), known)


def pool():
    return KeywordPool(["red"], ["pattern"], [1])


@pytest.mark.parametrize("make", [quantizer, encoder, sids, pool, coder], ids=lambda one: one.__name__)
def test_what_others_put_there_stays(tmp_path, make):
    for name in ("notes.txt", ".env", "mine/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("the only copy")
    for _ in range(2):
        make().save_pretrained(tmp_path)
        assert all((tmp_path / n).read_text() == "the only copy" for n in ("notes.txt", ".env", "mine/notes.txt"))
    type(make()).from_pretrained(tmp_path)


def test_a_file_that_belonged_to_the_save_before_goes(tmp_path):
    made = quantizer()
    made.curves = [{"loss": 1.0}]
    made.save_pretrained(tmp_path / "q")
    quantizer().save_pretrained(tmp_path / "q")
    assert load_quantizer(tmp_path / "q").curves == []
    coder({"red pen": np.array([0, 1], np.int32)}).save_pretrained(tmp_path / "c")
    coder().save_pretrained(tmp_path / "c")
    assert QueryCoder.from_pretrained(tmp_path / "c").known == {} and load_encoder(tmp_path / "c" / "encoder")
