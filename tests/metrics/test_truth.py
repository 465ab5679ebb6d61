"""The truth beside the log: against the market itself, and out of reach of whatever trains."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from sidtune.data_builders.shop_world.market import Market
from sidtune.data_builders.shop_world.world import ShopWorld
from sidtune.metrics.online.truth import truth, truth_lines

ROOT = Path(__file__).resolve().parents[2]
# What trains, or chooses what is trained; files and rewards called `oracle_*` say openly that they know.
BLIND = ("trainers", "models", "tokenizers", "decoding")
STEPS = ("sft", "grpo", "learn_sids", "init_model", "align_encoder", "extend_sids")
FORBIDDEN = re.compile(
    r"attraction\w*|\w+_given_click|click_probability|order_probability|ideal_ranking|oracle_ranking|by_attraction"
)
MODULES = ("metrics.online.truth", "shop_world.market", "shop_world.ideal", "shop_world.world", "shop_world.sessions")


@pytest.fixture(scope="module")
def world():
    return ShopWorld.from_options(seed=2, n_items=200, n_users=60, n_requests=2000, n_departments=3, leaves_per_department=4,
                                  phenomena={"cascade": 0.5, "stop_after_click": 0.5, "value_spread": 0.5})  # fmt: skip


def test_means_are_those_of_the_market_and_the_ideal_regrets_nothing(world):
    market, rows = Market(world), np.arange(0, 2000, 9)
    lists = {
        "production": market.production(rows, 12),
        "log": world.oracle_ranking(rows, 12),
        "one": market.ideal(rows, 1),
    }
    found = truth(world, rows, lists, 10, {"production": 0.2, "log": 0.9, "one": 0.1})
    for name, shown in lists.items():
        expected = market.serve(rows, shown[:, :10]).expected
        for value in ("click", "order", "value"):
            assert found["systems"][name][value] == pytest.approx(expected[value].sum(axis=1).mean(), rel=1e-12)
        assert found["systems"][name]["regret"] > 0
    assert found["systems"]["ideal"]["regret"] == 0 and found["requests"] == len(rows)
    clicks = [found["systems"][name]["click"] for name in ("production", "log", "one")]
    pairs = [(0, 1), (0, 2), (1, 2)]
    agree = [np.sign((clicks[a] - clicks[b]) * ([0.2, 0.9, 0.1][a] - [0.2, 0.9, 0.1][b])) for a, b in pairs]
    assert found["kendall_tau"] == pytest.approx(np.mean(agree))
    lines = truth_lines(found, "ndcg@10")
    assert lines[0].index("ideal") < lines[0].index("production") and f"{found['kendall_tau']:+.2f}" in lines[1]
    assert truth(world, rows, {}, 5)["systems"].keys() == {"ideal"}


def test_the_log_ranks_the_wrong_list_first(world):
    """The best list for the log is not the best list: that is what the table is for (sheet 2.7)."""
    rows = np.arange(0, 2000, 9)
    found = truth(world, rows, {"log": world.oracle_ranking(rows, 10)}, 10)["systems"]
    assert found["log"]["click"] < 0.9 * found["ideal"]["click"]


def blind_files() -> list[Path]:
    rooms = [file for room in BLIND for file in sorted((ROOT / room).rglob("*.py"))]
    steps = [ROOT / "recipes" / "steps" / f"{name}.py" for name in STEPS]
    return [
        file
        for file in [*rooms, *steps, *sorted((ROOT / "recipes" / "crs").glob("*.py"))]
        if "oracle_" not in file.name
    ]


def truths_in(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.endswith(MODULES):
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [one.name for one in node.names if one.name.endswith(MODULES)]
        elif isinstance(node, ast.Attribute) and FORBIDDEN.fullmatch(node.attr):
            found.append(node.attr)
    return found


# Simulated sessions as post-ranking requests, whose label may be the best list, and says so.
ALLOWED = {"decoding/serving/generator_source.py"}


def test_nothing_that_trains_reads_the_truth():
    files = blind_files()
    assert len(files) > 150
    told = {file.relative_to(ROOT).as_posix(): truths_in(ast.parse(file.read_text("utf-8"))) for file in files}
    assert {name: found for name, found in told.items() if found and name not in ALLOWED} == {}


@pytest.mark.parametrize("line", [
    "from sidtune.metrics.online.truth import truth", "import sidtune.data_builders.shop_world.market",
    "x = world.attraction(rows)", "y = world.order_given_click(rows)", "z = shop.ideal_ranking(rows, 3)",
])  # fmt: skip
def test_the_guard_sees_what_it_must(line):
    assert truths_in(ast.parse(line))
