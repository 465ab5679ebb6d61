"""A filtered search is the search of a catalogue that has only the items that are left; and requests are read strictly."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from lm_stand_ins import LEVEL_SIZES, codebooks, tiny_model, tiny_tokenizer

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.decoding.retrieval.catalogue import Catalogue
from sidtune.decoding.retrieval.prompter import PromptSettings
from sidtune.decoding.retrieval.retriever import SidRetriever
from sidtune.decoding.retrieval.search_request import PastTurn, RequestLimits, SearchRequest, load_json, parse_request
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import extend_vocabulary

ITEMS, COLOURS = 90, ("red", "blue", "green", None)


@pytest.fixture(scope="module")
def parts():
    """A random model, and 90 items on at most 60 SIDs, so that many share one."""
    random = np.random.default_rng(11)
    codes = np.stack([random.integers(0, size, ITEMS) for size in LEVEL_SIZES], axis=1)
    sids = SemanticIds([f"item{n:02d}" for n in range(ITEMS)], codes, LEVEL_SIZES, random.integers(0, 5, ITEMS) * 1.0)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    vocabulary = extend_vocabulary(model, tokenizer, sids, codebooks=codebooks())
    colours = [COLOURS[n % 4] for n in range(ITEMS)]
    items = pa.table(
        {
            "item_id": sids.item_ids,
            "title": [f"title {n}" for n in range(ITEMS)],
            "category": [None if c is None else ["all", c] for c in colours],
        }
    )
    return model, tokenizer, vocabulary, sids, items


def make(parts, keep=None):
    """A retriever over all items, or over those whose rows are kept."""
    model, tokenizer, vocabulary, sids, items = parts
    if keep is not None:
        ids = [sids.item_ids[row] for row in keep]
        sids = SemanticIds(ids, sids.codes[keep], LEVEL_SIZES, sids.popularity[keep])
    catalogue = Catalogue.from_table(sids, items if keep is None else None)
    vocabulary = replace(vocabulary, sids_fingerprint=sids.fingerprint())
    return SidRetriever(
        model, tokenizer, vocabulary, sids, Serializer(tokenizer), PromptSettings(), catalogue=catalogue
    )


@pytest.fixture(scope="module")
def retriever(parts):
    return make(parts)


def rows_left(request, stock):
    keep = []
    for n in range(ITEMS):
        item, colour = f"item{n:02d}", COLOURS[n % 4]
        seen = {turn.item_id for turn in request.history} if request.exclude_seen else set()
        wanted = request.only_items is None or item in request.only_items
        fits = not request.only_categories or (colour is not None and {"all", colour} & set(request.only_categories))
        if (
            wanted
            and fits
            and item not in {*request.exclude_items, *seen}
            and (not request.in_stock_only or n in stock)
        ):
            keep.append(n)
    return keep


def random_request(random):
    pick = lambda most: tuple(f"item{n:02d}" for n in random.choice(ITEMS, random.integers(0, most), replace=False))  # noqa: E731
    return SearchRequest(
        query=f"pen {random.integers(100)}",
        history=tuple(PastTurn(item) for item in pick(4)),
        k=int(random.integers(1, 30)),
        num_beams=int(random.choice([2, 5, 40])),
        exclude_items=pick(70) if random.random() < 0.6 else (),
        exclude_seen=bool(random.random() < 0.5),
        only_items=pick(40) if random.random() < 0.3 else None,
        only_categories=tuple(random.choice(["red", "blue", "green"], 2)) if random.random() < 0.4 else (),
        in_stock_only=bool(random.random() < 0.3),
    )


def test_filtered_answers_are_those_of_the_catalogue_without_the_other_items(parts, retriever):
    random = np.random.default_rng(1)
    stock = set(random.choice(ITEMS, 50, replace=False).tolist())
    retriever.catalogue.set_stock([f"item{n:02d}" for n in sorted(stock)])
    requests = [random_request(random) for _ in range(60)]
    found = retriever.search_batch(requests, batch_size=7)
    empty = short = 0
    for request, hits in zip(requests, found, strict=True):
        keep = rows_left(request, stock)
        empty += not keep
        if not keep:
            assert hits == []
            continue
        alone = make(parts, np.array(keep))
        # The past turns keep their own SIDs, filtered or not, so the oracle gets the prompt of the full retriever.
        prompt = retriever.prompter.pieces(request)
        rows, scores = alone.rank([prompt], request.k, request.num_beams)
        rows, scores = rows[0][rows[0] >= 0], scores[0][rows[0] >= 0]
        assert [hit.item_id for hit in hits] == [alone.sids.item_ids[row] for row in rows], request
        assert [hit.score for hit in hits] == pytest.approx(scores.tolist(), abs=1e-5)
        short += len(keep) < request.k
    assert empty and short and len(requests) - empty > 40


def test_a_batch_of_different_requests_is_as_each_alone(retriever):
    random = np.random.default_rng(2)
    retriever.catalogue.set_stock([f"item{n:02d}" for n in range(0, ITEMS, 2)])
    requests = [random_request(random) for _ in range(40)]
    for request, hits in zip(requests, retriever.search_batch(requests, batch_size=16), strict=True):
        alone = retriever.search_batch([request])[0]
        assert [hit.item_id for hit in hits] == [hit.item_id for hit in alone]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone], abs=1e-5)
        fields = {name: getattr(request, name) for name in request.__dataclass_fields__}
        again = retriever.search(fields.pop("query"), **fields)
        assert [hit.item_id for hit in again] == [hit.item_id for hit in alone]


def test_an_item_that_shares_its_sid_can_be_excluded_alone(parts, retriever):
    _, offsets, rows = retriever.sids.paths()
    leaf = int(np.argmax(np.diff(offsets)))
    group = rows[offsets[leaf] : offsets[leaf + 1]]
    assert len(group) > 2
    ids = [retriever.sids.item_ids[row] for row in group]
    hits = retriever.search("pen", k=ITEMS, num_beams=60, exclude_items=ids[:1])
    assert {*ids[1:]} <= {hit.item_id for hit in hits} and len(hits) == ITEMS - 1
    assert [h.item_id for h in retriever.search("pen", k=9, only_items=ids[1:2])] == ids[1:2]
    assert retriever.search("pen", only_items=ids[1:2])[0].score == pytest.approx(0.0, abs=1e-6)


def test_scopes_are_remembered_bounded_and_renewed_with_the_stock(parts):
    catalogue = Catalogue.from_table(parts[3], parts[4])
    assert catalogue.scope() is catalogue.whole and catalogue.scope(["red"]) is catalogue.scope(["red", "red"])
    catalogue.set_stock(["item00"])
    before = catalogue.scope(in_stock=True)
    assert before is catalogue.scope(in_stock=True) and before.trie.num_allowed_leaves == 1
    catalogue.set_stock(["item00", "item01", "not learned yet"])
    assert catalogue.scope(in_stock=True) is not before and catalogue.stock == 2
    with pytest.raises(DataError, match="'not learned yet' of the stock list"):
        catalogue.set_stock(["not learned yet"], unknown="error")
    small = Catalogue(parts[3], categories=parts[4].select(["item_id", "category"]), remembered=2)
    for name in ("red", "blue", "green", "all"):
        small.scope([name])
    assert len(small._scopes) == 2 and small.categories == ["all", "blue", "green", "red"]


def test_what_cannot_be_found_by_is_said(parts, retriever):
    with pytest.raises(DataError, match="did you mean 'blue'"):
        retriever.search("x", only_categories=["bleu"])
    with pytest.raises(DataError, match="categories of this catalogue are not known"):
        make(parts, np.arange(9)).search("x", only_categories=["blue"])
    with pytest.raises(DataError, match="no stock list"):
        make(parts, np.arange(9)).search("x", in_stock_only=True)
    with pytest.raises(DataError, match="'zzz' of only_items"):
        retriever.search("x", only_items=["zzz"])
    with pytest.raises(ConfigError, match="at least 1"):
        retriever.search("x", k=0)
    assert retriever.prompter.target(SearchRequest(exclude_items=("zzz",)), unknown="ignore").exclude.size == 0
    turns = (PastTurn("zzz"), PastTurn("item03"))
    kept = retriever.prompter.pieces(SearchRequest(history=turns), unknown="ignore")
    assert kept == retriever.prompter.pieces(SearchRequest(history=turns[1:]))


def test_long_running_servers_do_not_gather_pieces(retriever, monkeypatch):
    from sidtune.data_builders.prompts.encoding import encoder_of
    from sidtune.decoding.retrieval import prompter

    monkeypatch.setattr(prompter, "_REMEMBERED_PIECES", 50)
    expected = retriever.prompter.encode([retriever.prompter.pieces(SearchRequest("pen 3"))])
    for n in range(200):
        retriever.prompter.encode([retriever.prompter.pieces(SearchRequest(f"pen {n}"))])
        assert len(encoder_of(retriever.tokenizer).lengths) <= 53
    assert retriever.prompter.encode([retriever.prompter.pieces(SearchRequest("pen 3"))]) == expected


def test_a_request_is_read_as_it_was_written():
    values = load_json(
        '\ufeff{"query": "née", "profile": {"age": "30"}, "context": [{"name": "place", "value": null}], "k": 5, '
        '"history": ["a", {"item_id": "b", "query": "q", "context": {"x": "y"}}], "num_beams": null}'.encode()
    )
    assert parse_request(values) == SearchRequest(
        "née",
        (("age", "30"),),
        (("place", ""),),
        (PastTurn("a"), PastTurn("b", "q", (("x", "y"),))),
        k=5,
    )
    assert parse_request({}) == SearchRequest() and SearchRequest(k=30).beams == 30 and SearchRequest(k=3).beams == 10
    assert parse_request({"only_items": []}).only_items == ()


def test_default_beams_stay_within_the_limit():
    with pytest.raises(DataError, match="at most 20 beams are allowed; lower k"):
        parse_request({"k": 30}, RequestLimits(max_beams=20))
    with pytest.raises(ConfigError, match="max_pairs must be at least 1"):
        RequestLimits(max_pairs=0)
