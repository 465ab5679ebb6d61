"""SemanticIds against Counter and sorted(): lossless, ordered, strict, equal after saving and publishing."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from hub_stand_in import hub_stand_in
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.hub import push_folder, resolve_folder
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.sids.semantic_ids import SemanticIds


def toy() -> SemanticIds:
    codes = [[1, 0], [0, 2], [0, 2], [0, 1], [0, 2]]
    return SemanticIds(["e", "b", "a", "d", "c"], np.array(codes), (2, 3), np.array([1.0, 5.0, 5.0, 0.0, 9.0]))


def random_ids(items: int = 500, seed: int = 0) -> SemanticIds:
    draw = np.random.default_rng(seed)
    names = [f"item {n}" for n in draw.permutation(items)]
    return SemanticIds(names, draw.integers(0, 4, (items, 3)), (4, 5, 6), draw.integers(0, 3, items))


def groups_of(sids: SemanticIds) -> dict[tuple[int, ...], list[int]]:
    """Plain-Python oracle: code → rows by popularity, then id."""
    groups = defaultdict(list)
    for row, code in enumerate(sids.codes.tolist()):
        groups[tuple(code)].append(row)
    return {
        code: sorted(rows, key=lambda r: (-sids.popularity[r], sids.item_ids[r]))
        for code, rows in sorted(groups.items())
    }


def test_texts_tokens_and_offsets():
    sids = toy()
    assert sids.text("e") == "<a_1><b_0>" and sids.texts() == {
        "e": "<a_1><b_0>",
        "b": "<a_0><b_2>",
        "a": "<a_0><b_2>",
        "d": "<a_0><b_1>",
        "c": "<a_0><b_2>",
    }
    assert sids.tokens() == ["<a_0>", "<a_1>", "<b_0>", "<b_1>", "<b_2>"]
    assert sids.token_offsets.tolist() == [0, 2] and sids.level_tokens(1) == ["<b_0>", "<b_1>", "<b_2>"]
    tokens = np.array(sids.tokens())
    spelled = ["".join(row) for row in tokens[sids.codes + sids.token_offsets]]
    assert spelled == list(sids.texts().values())
    assert len(sids) == 5 and sids.depth == 2 and "a" in sids and "z" not in sids
    assert sids.row_of("c") == 4 and sids.rows_of_ids(["c", "z", "e"]).tolist() == [4, -1, 0]


def test_paths_of_the_toy():
    codes, offsets, rows = toy().paths()
    assert codes.tolist() == [[0, 1], [0, 2], [1, 0]] and offsets.tolist() == [0, 1, 4, 5]
    assert rows.tolist() == [3, 4, 2, 1, 0]  # c is most popular, then a before b
    assert codes.dtype == np.int32 and offsets.dtype == rows.dtype == np.int64


def test_paths_equal_the_dictionary_oracle():
    sids = random_ids()
    codes, offsets, rows = sids.paths()
    oracle = groups_of(sids)
    assert [tuple(code) for code in codes.tolist()] == list(oracle)
    for m, expected in enumerate(oracle.values()):
        assert rows[offsets[m] : offsets[m + 1]].tolist() == expected
    assert sorted(rows.tolist()) == list(range(len(sids))), "no item may be lost"


def test_row_order_does_not_change_the_expansion():
    sids = random_ids()
    mixed = np.random.default_rng(1).permutation(len(sids))
    names = [sids.item_ids[r] for r in mixed]
    other = SemanticIds(names, sids.codes[mixed], sids.level_sizes, sids.popularity[mixed])
    np.testing.assert_array_equal(other.paths()[0], sids.paths()[0])
    assert [names[r] for r in other.paths()[2]] == [sids.item_ids[r] for r in sids.paths()[2]]


def test_collisions_equal_a_counter():
    sids = random_ids()
    counter = Counter(map(tuple, sids.codes.tolist()))
    found = sids.collisions()
    sharing = sum(n for n in counter.values() if n > 1)
    assert (
        found.codes == len(counter)
        and found.sharing_rate == sharing / 500
        and found.lost_rate == (500 - len(counter)) / 500
    )
    assert found.largest_group == max(counter.values())
    assert found.largest_code == sids.code_text(min(c for c, n in counter.items() if n == found.largest_group))
    assert toy().collisions().sharing_rate == 3 / 5


def test_suffix_makes_codes_unique_in_expansion_order():
    sids = random_ids()
    longer = sids.with_suffix()
    assert longer.suffix_level and longer.level_sizes == (4, 5, 6, sids.collisions().largest_group)
    np.testing.assert_array_equal(longer.codes[:, :3], sids.codes)
    for rows in groups_of(sids).values():
        assert longer.codes[rows, 3].tolist() == list(range(len(rows)))
    assert longer.collisions().codes == len(sids) and longer.collisions().sharing_rate == 0
    np.testing.assert_array_equal(longer.paths()[2], sids.paths()[2])
    with pytest.raises(ConfigError, match="suffix level already"):
        longer.with_suffix()
    with pytest.raises(ConfigError, match="too small"):
        sids.with_suffix(1)
    assert toy().with_suffix(7).level_sizes == (2, 3, 7)


def test_suffix_may_not_exceed_the_letters():
    sids = SemanticIds(["x"], np.zeros((1, 26), dtype=int), [1] * 26)
    assert sids.text("x").endswith("<z_0>")
    with pytest.raises(ConfigError, match="at most 26 levels"):
        sids.with_suffix()


def test_extended_keeps_old_codes():
    sids = toy()
    bigger = sids.extended(["f", "g"], np.array([[0, 2], [1, 1]]), np.array([7.0, 0.0]))
    np.testing.assert_array_equal(bigger.codes[:5], sids.codes)
    assert bigger.item_ids == [*sids.item_ids, "f", "g"] and bigger.text("f") == "<a_0><b_2>"
    assert [bigger.item_ids[r] for r in groups_of(bigger)[0, 2]] == ["c", "f", "a", "b"]
    assert sids.extended([], np.zeros((0, 2), dtype=int)) is sids and len(sids) == 5
    with pytest.raises(DataError, match="1 new items have semantic IDs already"):
        sids.extended(["a", "h"], np.array([[0, 0], [0, 0]]))
    with pytest.raises(DataError, match="outside their level"):
        sids.extended(["h"], np.array([[2, 0]]))
    with pytest.raises(DataError, match="shape"):
        sids.extended(["h"], np.array([[1, 0, 0]]))


def test_extended_gives_the_next_free_suffix():
    sids = toy().with_suffix(5)
    old = sids.texts()
    bigger = sids.extended(["z", "y", "x"], np.array([[0, 2], [0, 2], [1, 2]]), np.array([1.0, 2.0, 3.0]))
    assert {k: v for k, v in bigger.texts().items() if k in old} == old
    assert bigger.text("y") == "<a_0><b_2><c_3>" and bigger.text("z") == "<a_0><b_2><c_4>"
    assert bigger.text("x") == "<a_1><b_2><c_0>" and bigger.suffix_level
    assert bigger.collisions().sharing_rate == 0
    with pytest.raises(DataError, match="<a_0><b_2> has no free suffix left"):
        bigger.extended(["w"], np.array([[0, 2]]))


def test_parse_reads_exactly_one_code():
    sids = toy()
    for text, code in zip(sids.texts().values(), sids.codes.tolist(), strict=True):
        assert sids.parse(text) == tuple(code)
    assert sids.parse("<a_1><b_1>") == (1, 1)  # legal though no item has it
    wrong = [
        "",
        "<a_1>",
        "<a_1><b_0> ",
        " <a_1><b_0>",
        "<a_1> <b_0>",
        "<b_1><a_0>",
        "<a_2><b_0>",
        "<a_1><b_3>",
        "<a_1><b_0><c_0>",
    ]
    wrong += ["<a_01><b_0>", "<a_-1><b_0>", "<a_1><b_0>x", "<a_1><c_0>", "<A_1><b_0>", "<a_١><b_0>", "<a_1><b_0>\n"]
    assert [text for text in wrong if sids.parse(text) is not None] == []


@settings(max_examples=60, deadline=None)
@given(data=st.data(), depth=st.integers(1, 5))
def test_any_ids_and_codes_survive_saving(data, depth, tmp_path_factory):
    ids = data.draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20, unique=True))
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=depth, max_size=depth))
    codes = np.array([[data.draw(st.integers(0, size - 1)) for size in sizes] for _ in ids])
    popularity = data.draw(st.lists(st.floats(-1e9, 1e9), min_size=len(ids), max_size=len(ids)))
    sids = SemanticIds(ids, codes, sizes, popularity)
    folder = tmp_path_factory.mktemp("sids") / "s"
    sids.save_pretrained(folder)
    loaded = SemanticIds.from_pretrained(folder)
    assert_equal(loaded, sids)
    assert {sids.parse(text) for text in sids.texts().values()} == {tuple(code) for code in codes.tolist()}
    assert [ids[r] for r in sids.paths()[2]] == [ids[r] for rows in groups_of(sids).values() for r in rows]


def assert_equal(ours: SemanticIds, theirs: SemanticIds) -> None:
    assert ours.item_ids == theirs.item_ids and ours.level_sizes == theirs.level_sizes
    assert ours.suffix_level == theirs.suffix_level
    for name in ("codes", "popularity"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_saved_folder_is_readable_by_people(tmp_path):
    sids = toy().with_suffix()
    sids.save_pretrained(tmp_path / "s")
    assert_equal(SemanticIds.from_pretrained(str(tmp_path / "s")), sids)
    table = pq.read_table(tmp_path / "s" / "item_ids.parquet")
    assert dict(zip(table["item_id"].to_pylist(), table["sid"].to_pylist(), strict=True)) == sids.texts()
    config = json.loads((tmp_path / "s" / "sid_config.json").read_text())
    assert config["level_sizes"] == [2, 3, 3] and config["suffix_level"] is True and config["items"] == 5


def test_arrays_are_read_only_copies():
    codes = np.array([[0, 1]])
    sids = SemanticIds(["a"], codes, (1, 2))
    codes[0, 1] = 0
    assert sids.codes.tolist() == [[0, 1]]
    for array in (sids.codes, sids.popularity, *sids.paths()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("ids", "codes", "sizes", "popularity", "error", "sentence"),
    [
        ([], np.zeros((0, 2), int), (2, 2), None, DataError, "The catalogue is empty"),
        (["a", "a"], [[0], [1]], (2,), None, DataError, "'a' occurs more than once"),
        (["a", 7], [[0], [1]], (2,), None, DataError, "Item id 7 in row 1 is int"),
        (["a", None], [[0], [1]], (2,), None, DataError, "ids must be strings"),
        (["\ud800"], [[0]], (2,), None, DataError, "lone surrogate"),
        (
            ["a"],
            [[0, 0]],
            (2,),
            None,
            DataError,
            r"shape \(1, 1\) for 1 items and 1 levels, got int64 of shape \(1, 2\)",
        ),
        (["a", "b"], [[0]], (2,), None, DataError, "shape"),
        (["a"], [[0.0]], (2,), None, DataError, "integer codes"),
        (["a", "b"], [[0], [2]], (2,), None, DataError, r"first: row 1, level 1, code 2, allowed 0 to 1"),
        (["a"], [[-1]], (2,), None, DataError, "code -1"),
        (["a"], [[0]], (0,), None, ConfigError, "positive integer per level"),
        (["a"], [[0]], (2.5,), None, ConfigError, "positive integer per level"),
        (["a"], [[0] * 27], (2,) * 27, None, ConfigError, "at most 26 levels"),
        (["a"], [[0]], (2,), [np.nan], DataError, "popularity must be 1 finite numbers"),
        (["a"], [[0]], (2,), [1.0, 2.0], DataError, "popularity must be 1 finite numbers"),
    ],
)
def test_wrong_input_is_refused(ids, codes, sizes, popularity, error, sentence):
    with pytest.raises(error, match=sentence):
        SemanticIds(ids, np.asarray(codes), sizes, popularity)


def test_unknown_items_and_levels_are_refused():
    with pytest.raises(DataError, match="'zz' has no semantic ID"):
        toy().text("zz")
    with pytest.raises(ConfigError, match="no level 2"):
        toy().level_tokens(2)


def test_damaged_folders_are_named(tmp_path):
    folder = tmp_path / "s"
    toy().save_pretrained(folder)
    good = (folder / "sid_config.json").read_text()
    (folder / "sid_config.json").write_text(good.replace('"items": 5', '"items": 6'))
    with pytest.raises(DataError, match="has 5 items, sid_config.json says 6"):
        SemanticIds.from_pretrained(folder)
    (folder / "sid_config.json").write_text('{"items": 5}')
    with pytest.raises(DataError, match="lack 'level_sizes'"):
        SemanticIds.from_pretrained(folder)
    (folder / "sid_config.json").write_text(good.replace("3", "2"))
    with pytest.raises(DataError, match="outside their level"):
        SemanticIds.from_pretrained(folder)
    (folder / "sid_config.json").write_text(good)
    parquet = (folder / "item_ids.parquet").read_bytes()
    (folder / "item_ids.parquet").write_bytes(parquet[:100])
    with pytest.raises(DataError, match="not a readable list of item ids"):
        SemanticIds.from_pretrained(folder)
    (folder / "item_ids.parquet").unlink()
    with pytest.raises(DataError, match="does not exist"):
        SemanticIds.from_pretrained(folder)


def write(path, value) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def test_published_index_files(tmp_path):
    path = write(tmp_path / "x.index.json", {"7": ["<a_3>", "<b_0>"], "x y": ["<a_0>", "<b_11>"]})
    sids = SemanticIds.from_index_json(path, popularity={"7": 2.0})
    assert sids.item_ids == ["7", "x y"] and sids.level_sizes == (4, 12) and sids.popularity.tolist() == [2.0, 0.0]
    assert SemanticIds.from_index_json(path, level_sizes=(256, 256)).level_sizes == (256, 256)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({}, "holds no semantic IDs"),
        ([], "must be a JSON mapping"),
        ('{"1": ["<a_0>"], "1": ["<a_1>"]}', "gives the item '1' more than once"),
        ({"1": ["<a_0>"], "2": ["<a_0>", "<b_0>"]}, "item '2' has"),
        ({"1": "<a_0>"}, "expected a list of 1 tokens"),
        ({"1": {"a": 0}}, "expected a list"),
        ({"1": ["<a_0>", "<a_1>"]}, "token 2 of item '1' is '<a_1>', expected '<b_N>'"),
        ({"1": ["<a_00>"]}, "token 1 of item '1' is '<a_00>'"),
        ({"1": ["<a_99999999999>"]}, "token 1 of item '1'"),
        ({"1": ["a_0"]}, "token 1"),
        ({"1": [None]}, "token 1 of item '1' is None"),
        ({"1": [5]}, "tokens that are no text"),
        ("{", "not readable JSON"),
    ],
)
def test_wrong_index_files_are_refused(tmp_path, value, sentence):
    with pytest.raises(DataError, match=sentence):
        SemanticIds.from_index_json(write(tmp_path / "x.json", value))


def test_missing_index_file(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        SemanticIds.from_index_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("file", "depth", "items"),
    [("instruments/Instruments.index.json", 4, 9922), ("amazon_office/Office_Products.index.json", 3, 3459)],
)
def test_published_ids_round_trip(real_data, tmp_path, file, depth, items):
    raw = json.loads((real_data / file).read_text(encoding="utf-8"))
    sids = SemanticIds.from_index_json(real_data / file)
    assert len(sids) == items and sids.depth == depth and sids.level_sizes == (256,) * depth
    assert sids.texts() == {item_id: "".join(tokens) for item_id, tokens in raw.items()}
    counter = Counter("".join(tokens) for tokens in raw.values())
    found = sids.collisions()
    assert found.codes == len(counter) and found.sharing_rate == sum(n for n in counter.values() if n > 1) / items > 0
    sids.save_pretrained(tmp_path / "s")
    assert_equal(SemanticIds.from_pretrained(tmp_path / "s"), sids)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub.constants

    with hub_stand_in() as (endpoint, state):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield state, {"cache_dir": tmp_path / "cache"}


def test_push_and_load_from_the_hub(hub, monkeypatch):
    state, cache = hub
    made, create = [], HfApi.create_repo
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *a, **k: made.append(k) or create(self, *a, **k))
    sids = random_ids().with_suffix()
    url = sids.push_to_hub("tester/ids", token="hf_test", private=True)
    assert url.startswith("http") and state.tokens == {"hf_test"} and made == [{"private": True, "exist_ok": True}]
    assert {"codes.safetensors", "item_ids.parquet", "sid_config.json"} <= set(state.repos["tester/ids"])
    assert_equal(SemanticIds.from_pretrained("tester/ids", **cache), sids)

    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    quantizer = ResidualKMeans(ResidualKMeansConfig((4, 4))).fit(vectors)
    quantizer.push_to_hub("tester/ids", token="hf_test", path_in_repo="quantizer")
    loaded = ResidualKMeans.from_pretrained("tester/ids", subfolder="quantizer", **cache)
    np.testing.assert_array_equal(loaded.encode(vectors), quantizer.encode(vectors))


def test_hub_failures_end_in_one_sentence(hub, tmp_path):
    _, cache = hub
    with pytest.raises(
        DataError, match="no local folder 'tester/none', and it could not be fetched .*RepositoryNotFound"
    ):
        SemanticIds.from_pretrained("tester/none", **cache)
    with pytest.raises(DataError, match="did not accept the upload to 'bad name!'"):
        toy().push_to_hub("bad name!", token="hf_test")
    with pytest.raises(DataError, match="does not exist, so it cannot be pushed"):
        push_folder(tmp_path / "none", "tester/x")


def test_local_folders_never_reach_the_network(hub, tmp_path):
    state, _ = hub
    toy().save_pretrained(tmp_path / "s")
    SemanticIds.from_pretrained(tmp_path / "s")
    with pytest.raises(DataError, match="does not exist"):
        SemanticIds.from_pretrained(str(tmp_path / "none"))
    with pytest.raises(DataError, match="is a file"):
        resolve_folder(tmp_path / "s" / "sid_config.json", what="semantic ID")
    with pytest.raises(DataError, match="no folder 'sub'"):
        resolve_folder(tmp_path / "s", subfolder="sub")
    assert state.requests == []
