"""What every method of a registry must do, in one table: a new method is tested by its registry line.

Each family says how a small one is made (`make`), what it answers (`answer`, arrays), how it is kept (`kept`: saved and loaded) and
what it makes of nothing (`empty`). A family without a part leaves it None, and the table says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from next_item_worlds import SIZES, random_catalogue, random_sequences, small_network

from sidtune.core.errors import DataError
from sidtune.data_builders.tables.schema import table_from_columns, table_from_rows
from sidtune.metrics.baselines.base import BaselineRequests
from sidtune.metrics.ranking import Relevance, evaluate_ranking
from sidtune.metrics.registry import BASELINES, METRICS
from sidtune.models.next_item.network import load_network
from sidtune.models.registry import NETWORKS
from sidtune.tokenizers.encoders.base import load_encoder
from sidtune.tokenizers.quantizers.base import load_quantizer
from sidtune.tokenizers.registry import COLLISIONS, ENCODERS, QUANTIZERS, made_by
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.trainers.next_item.data import NextItemRows
from sidtune.trainers.rewards.batch import RewardBatch, Targets, build_rewards
from sidtune.trainers.rewards.registry import REWARDS

pytestmark = pytest.mark.medium
DRAW = np.random.default_rng(0)
VECTORS = (DRAW.normal(size=(12, 6))[DRAW.integers(0, 12, 120)] + 0.3 * DRAW.normal(size=(120, 6))).astype(np.float32)
TEXTS = [" ".join(DRAW.choice(["red", "blue", "pen", "lamp", "desk", "hat"], 3)) for _ in range(30)]
IDS = [f"i{n}" for n in range(len(TEXTS))]
FOUND = DRAW.normal(size=(len(TEXTS), 4)).astype(np.float32)
TRAINED = {"hidden": [16], "epochs": 2, "batch_size": 64}
SMALL = {
    "residual_kmeans": {"level_sizes": [6, 6]},
    "balanced_kmeans": {"level_sizes": [6, 6]},
    "rq_opq": {"head_sizes": [5, 4], "tail_size": 4},
    "product_quantizer": {"parts": 2, "codes_per_part": 8},
    "rq_vae": {"level_sizes": [6, 6], **TRAINED},
    "rq_kmeans_plus": {"level_sizes": [6, 6], **TRAINED},
    "fsq": {"grids": [[3, 3], [3, 2]], **TRAINED},
}


@dataclass(frozen=True)
class Family:
    names: list[str]
    make: Callable[[str, Path], Any]
    answer: Callable[[Any], list[np.ndarray]]
    kept: Callable[[Any, Path], Any] | None = None
    empty: Callable[[Any], np.ndarray] | None = None
    part: Callable[[Any], tuple[np.ndarray, np.ndarray]] | None = None  # the answer of some rows, alone and among all


def quantizer(name: str, folder: Path) -> Any:
    made = made_by(QUANTIZERS, {"name": name, **SMALL[name]})
    made.fit(VECTORS)
    return made


def encoder(name: str, folder: Path) -> Any:
    np.save(folder / "v.npy", FOUND)
    (folder / "ids.txt").write_text("\n".join(IDS))
    (folder / "pool.tsv").write_text("red\tcolor\npen\tentity\n")
    options = {
        "tfidf_svd": {"dims": 4},
        "precomputed": {"path": str(folder / "v.npy"), "align": "ids", "ids_path": str(folder / "ids.txt")},
        "keyword_fusion": {"base": {"name": "tfidf_svd", "dims": 4}, "pool": str(folder / "pool.tsv")},
        "collaborative": {"dims": 4},
    }
    made = made_by(ENCODERS, {"name": name, **options[name]})
    if name == "collaborative":
        users, items = np.divmod(np.arange(120), 8)
        columns = {
            "user_id": [f"u{u}" for u in users],
            "item_id": [IDS[(3 * u + i) % len(IDS)] for u, i in zip(users, items, strict=True)],
            "time": np.arange(120),
            "action": ["click"] * 120,
        }
        made.use_log(table_from_columns("events", columns, 120))
    return made.fit(TEXTS)


def saved(load: Callable[[Path], Any]) -> Callable[[Any, Path], Any]:
    def kept(made: Any, folder: Path) -> Any:
        made.save_pretrained(folder)
        return load(folder)

    return kept


CODED = made_by(QUANTIZERS, {"name": "residual_kmeans", "level_sizes": [3, 40]})
CODES = SemanticIds([f"i{n}" for n in range(len(VECTORS))], CODED.fit_encode(VECTORS), CODED.level_sizes)
SEQUENCES = random_sequences(users=6)
CATALOGUE = random_catalogue(SEQUENCES)


def logits(network: Any) -> list[np.ndarray]:
    rows = NextItemRows(SEQUENCES, SEQUENCES.whole_examples(20), CATALOGUE.codes, SIZES)
    with torch.no_grad():
        return [part.numpy() for part in network(**rows.collate(list(range(len(rows))))).logits]


def network_kept(network: Any, folder: Path) -> Any:
    network.save_pretrained(folder)
    return load_network(folder)


ITEMS = table_from_rows("items", [{"item_id": i, "title": t} for i, t in zip(IDS, TEXTS, strict=True)])
EVENTS = table_from_columns(
    "events",
    {"user_id": [f"u{n % 7}" for n in range(90)], "item_id": [IDS[(n * n) % 30] for n in range(90)],
     "time": np.arange(90), "action": ["click"] * 90},
    90,
)  # fmt: skip
ASKED = BaselineRequests(["red pen", None, "hat"], Relevance.from_lists([[1, 2], [], [3]]))


def baseline(name: str, folder: Path) -> Any:
    return BASELINES.get(name)().fit(ITEMS, EVENTS)


LEAVES = np.array([[a, b] for a in range(3) for b in range(3)], np.int32)


def rewarded(reward: Any, rows: int = 4) -> np.ndarray:
    lists = np.array([[0, 1, 2], [3, -1, -1], [8, 7, 6], [4, 5, 4]])[:rows]
    targets = Targets.from_lists([[0], [2, 3], [1], [5]][:rows])
    extra = {
        "closed": np.array([True] * rows),
        "reasoning_lengths": np.arange(rows),
        "popularity_of_leaf": np.arange(9.0),
    }
    scores = np.zeros(lists.shape, np.float32)
    return reward(RewardBatch(lists.reshape(rows, 3), scores.reshape(rows, 3), targets, LEAVES, **extra))[:, 0]


def measured(name: str) -> np.ndarray:
    ranked, wanted = np.array([[0, 1, -1], [2, 1, 0]]), Relevance.from_lists([[1], [0, 2]])
    return next(iter(evaluate_ranking(ranked, wanted, [3], [name]).per_request.values()))


OFFLINE = [name for name in ENCODERS if name not in ("transformers", "sentence_transformers")]  # tests of their own
FAMILIES = {
    "quantizer": Family(
        list(QUANTIZERS), quantizer, lambda q: [q.encode(VECTORS), q.decode(q.encode(VECTORS)), *q.codebooks],
        saved(load_quantizer), lambda q: q.encode(VECTORS[:0]), lambda q: (q.encode(VECTORS[5:9]), q.encode(VECTORS)[5:9]),
    ),
    "encoder": Family(
        OFFLINE, encoder, lambda e: [e.encode(TEXTS, IDS)], saved(load_encoder), lambda e: e.encode([], []),
        lambda e: (e.encode(TEXTS[5:9], IDS[5:9]), e.encode(TEXTS, IDS)[5:9]),
    ),
    "collision": Family(
        list(COLLISIONS), lambda name, folder: made_by(COLLISIONS, {"name": name}),
        lambda method: [method.resolve(CODES, VECTORS, CODED).codes],
    ),
    "network": Family(list(NETWORKS), lambda name, folder: small_network(name), logits, network_kept),
    "baseline": Family(
        list(BASELINES), baseline, lambda b: [b.rank(ASKED, 5)],
        empty=lambda b: b.rank(BaselineRequests([], Relevance.from_lists([])), 5),
        part=lambda b: (b.rank(BaselineRequests(["hat"], Relevance.from_lists([[3]])), 5), b.rank(ASKED, 5)[2:]),
    ),
    "reward": Family(
        list(REWARDS), lambda name, folder: build_rewards({name: None}), lambda r: [rewarded(r)],
        empty=lambda r: rewarded(r, 0), part=lambda r: (rewarded(r, 2), rewarded(r)[:2]),
    ),
    "metric": Family(list(METRICS), lambda name, folder: name, lambda name: [measured(name)]),
}  # fmt: skip
CASES = [(family, name) for family, one in FAMILIES.items() for name in one.names]


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """Small methods warn about their size."""


def made(family: str, name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family].make(name, folder)


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_same_input_gives_the_same_answer(family, name, tmp_path):
    answer = FAMILIES[family].answer
    equal(answer(made(family, name, tmp_path)), answer(made(family, name, tmp_path)))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_answers_are_finite_numbers_of_one_kind(family, name, tmp_path):
    """Codes and rows are integers; vectors, logits and values are floats, NaN only where a reward cannot score."""
    for array in FAMILIES[family].answer(made(family, name, tmp_path)):
        assert array.dtype.kind in "if" and not np.isinf(array).any()
        assert family == "reward" or not (array.dtype.kind == "f" and np.isnan(array).any())


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if FAMILIES[case[0]].kept])
def test_saved_and_loaded_it_answers_the_same(family, name, tmp_path):
    one = FAMILIES[family]
    first = made(family, name, tmp_path)
    (tmp_path / "kept").mkdir()
    again = one.kept(first, tmp_path / "kept")
    assert not [file for file in (tmp_path / "kept").rglob("*") if file.suffix in (".pkl", ".pt", ".bin", ".pickle")]
    equal(one.answer(first), one.answer(again))


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if FAMILIES[case[0]].empty])
def test_nothing_in_is_nothing_out_or_refused_in_a_sentence(family, name, tmp_path):
    one = FAMILIES[family]
    thing = made(family, name, tmp_path)
    try:
        none = one.empty(thing)
    except DataError as error:
        assert "empty" in str(error) and family in ("quantizer", "encoder")
        return
    assert len(none) == 0 and none.dtype == one.answer(thing)[0].dtype


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if FAMILIES[case[0]].part])
def test_a_row_does_not_depend_on_its_neighbours(family, name, tmp_path):
    alone, among = FAMILIES[family].part(made(family, name, tmp_path))
    np.testing.assert_allclose(alone, among, atol=1e-6)


def test_every_registry_of_methods_has_its_family_here():
    import re

    root = Path(__file__).resolve().parents[2]
    found = {
        name
        for file in root.glob("*/**/registry.py")
        if file.relative_to(root).parts[0] not in ("tests", "benchmarks", "runs", ".venv", "build", "core")
        for name in re.findall(r"(?m)^([A-Z]+) = Registry\(", file.read_text("utf-8"))
    }
    elsewhere = {"READERS": "test_foreign_inputs", "TASKS": "test_tasks"}  # over all of theirs, too
    assert found == {"QUANTIZERS", "ENCODERS", "COLLISIONS", "NETWORKS", "BASELINES", "REWARDS", "METRICS", *elsewhere}
