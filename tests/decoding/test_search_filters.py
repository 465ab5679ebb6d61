"""A filtered search is the search of a catalogue that has only the items that are left; and requests are read strictly."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_stand_ins import LEVEL_SIZES, codebooks, tiny_model, tiny_tokenizer

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.decoding.retrieval.catalogue import Catalogue
from sidtune.decoding.retrieval.prompter import PromptSettings
from sidtune.decoding.retrieval.retriever import SidRetriever, catalogue_table
from sidtune.decoding.retrieval.search_request import PastTurn, RequestLimits, SearchRequest, load_json, parse_request
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import extend_vocabulary

ITEMS, COLOURS, BRANDS = 90, ("red", "blue", "green", None), ("Acme", "Bolt", None)


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
            "brand": [BRANDS[n % 3] for n in range(ITEMS)],
            "price": [None if n % 7 == 0 else float(n % 20) for n in range(ITEMS)],
            "clicks": [0] * ITEMS,
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
        brand, price = BRANDS[n % 3], None if n % 7 == 0 else n % 20
        wanted = wanted and (not request.only_brands or brand in request.only_brands)
        for bound, sign in ((request.price_min, 1), (request.price_max, -1)):
            wanted = wanted and (bound is None or (price is not None and sign * price >= sign * bound))
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
        only_brands=tuple(random.choice(["Acme", "Bolt"], 1)) if random.random() < 0.3 else (),
        price_min=float(random.integers(0, 9)) if random.random() < 0.3 else None,
        price_max=float(random.integers(9, 20)) if random.random() < 0.3 else None,
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
    assert empty and short and len(requests) - empty > 35


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
    small = Catalogue(parts[3], items=parts[4].select(["item_id", "category"]), remembered=2)
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
    with pytest.raises(DataError, match="'k' must be between 1 and"):
        retriever.search("x", k=0)
    assert retriever.prompter.target(SearchRequest(exclude_items=("zzz",)), unknown="ignore").exclude.size == 0
    turns = (PastTurn("zzz"), PastTurn("item03"))
    kept = retriever.prompter.pieces(SearchRequest(history=turns), unknown="ignore")
    assert kept == retriever.prompter.pieces(SearchRequest(history=turns[1:]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"k": "3"}, "'k' must be a whole number, got \"3\""),
        ({"k": 3.0}, "'k' must be a whole number, got 3.0"),
        ({"k": True}, "'k' must be a whole number, got true"),
        ({"num_beams": 0}, "'num_beams' must be between 1 and"),
        ({"query": 5}, "'query' must be a text, got 5"),
        ({"profile": "lab"}, "'profile' must be a list, got a text"),
        ({"profile": {"age": 20}}, "'profile[0].value' must be a text, got 20"),
        ({"context": [["place", "home"]]}, "'context[0]' must be an object with 'name' and 'value', got a list"),
        ({"history": "item01"}, "'history' must be a list, got a text"),
        ({"history": [7]}, "'history[0]' must be an item id or an object with 'item_id', got 7"),
        ({"exclude_items": [123]}, "'exclude_items[0]' must be a text, got 123"),
        ({"only_items": "item01"}, "'only_items' must be a list, got a text"),
        ({"only_brands": [None]}, "'only_brands[0]' must be a text, got null"),
        ({"exclude_seen": "no"}, "'exclude_seen' must be true or false, got \"no\""),
        ({"price_min": "9"}, "'price_min' must be a number, got \"9\""),
        ({"price_max": float("nan")}, "'price_max' must be a number, got NaN"),
        ({"price_max": 10**400}, "'price_max' must be a number, got 1000"),
        ({"profile": [{5: "x"}]}, "'profile[0]' has the unknown field '5'"),
        ({"price_min": 9, "price_max": 3}, "'price_min' is 9, above 'price_max' 3"),
    ],
)
def test_every_entrance_refuses_a_wrong_type_in_the_same_words(retriever, fields, words):
    for entrance in (
        parse_request,
        lambda given: SearchRequest(**given),
        lambda given: retriever.search(**given),
        lambda given: retriever.search_batch([given]),
    ):
        with pytest.raises(DataError) as caught:
            entrance(fields)
        assert str(caught.value).startswith(words)


def test_python_takes_what_a_body_takes_and_its_own_types(retriever):
    body = {
        "profile": {"trade": "lab"},
        "history": ["item01", {"item_id": "item02", "query": "q", "context": {"place": "home"}}],
        "k": 4,
        "exclude_items": ["item03"],
    }
    wanted = parse_request(body)
    turns = [PastTurn("item01"), PastTurn("item02", "q", [{"name": "place", "value": "home"}])]
    for given in (
        body,
        {**body, "profile": [{"name": "trade", "value": "lab"}], "k": np.int64(4)},
        {**body, "profile": [("trade", "lab")], "history": turns, "exclude_items": np.array(["item03"])},
        {**body, "context": None, "only_items": None, "exclude_items": pa.array(["item03"])},
    ):
        assert SearchRequest(**given) == wanted == parse_request(given)
        assert retriever.search(**given) == retriever.search_batch([wanted])[0]
    with pytest.raises(DataError, match="unknown field 'brand'; did you mean 'only_brands'"):
        retriever.search("x", brand="Acme")


def test_a_bundle_knows_brands_and_prices_and_an_old_one_says_that_it_does_not(parts, retriever, tmp_path):
    pq.write_table(catalogue_table(parts[4]), tmp_path / "catalogue.parquet")
    new, asked = Catalogue.from_bundle(tmp_path, parts[3]), {"brands": ["Acme"], "prices": (None, 5.0)}
    np.testing.assert_array_equal(new.scope(**asked).leaves.rows, retriever.catalogue.scope(**asked).leaves.rows)
    pq.write_table(parts[4].select(["item_id", "title"]), tmp_path / "catalogue.parquet")
    old = Catalogue.from_bundle(tmp_path, parts[3])
    for name, asked in (("brands", {"brands": ["Acme"]}), ("prices", {"prices": (1.0, None)})):
        with pytest.raises(DataError, match=f"The {name} of this catalogue are not known"):
            old.scope(**asked)


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
