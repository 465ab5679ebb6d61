"""Every table between marks is what its script makes of its figures in the tree, and says where they lie."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from sidtune.benchmarks import market_dials
from sidtune.metrics.report.readme_table import publish, signed
from sidtune.recipes.next_item import table as next_item
from sidtune.recipes.steps import ablation, seeds

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("benchmark_table", ROOT / "benchmarks" / "table.py")
BENCHMARK = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(BENCHMARK)

RECIPES = {
    ("README.md", "results"): ("recipes/quickstart/results.json", seeds.markdown),
    ("recipes/quickstart/README.md", "results"): ("recipes/quickstart/results.json", seeds.markdown),
    ("data_builders/README.md", "results"): ("benchmarks/results/market_dials.json", market_dials.markdown),
    ("recipes/amazon_office/README.md", "results"): ("recipes/amazon_office/results.json", seeds.markdown),
    ("recipes/crs/README.md", "results"): ("recipes/crs/results_shop.json", ablation.markdown),
    ("recipes/crs/office.md", "results"): ("recipes/crs/results_office.json", ablation.markdown),
    ("recipes/crs/ablation/README.md", "results"): ("recipes/crs/ablation/results.json", ablation.markdown),
    ("recipes/next_item/instruments/README.md", "results"): (
        "recipes/next_item/instruments/results.json",
        next_item.markdown,
    ),
}
BENCHMARKS = {
    ("recipes/next_item/instruments/README.md", "time to quality"): ["time_to_quality"],
    ("recipes/llm4pr/README.md", "adapter"): ["post_rank_adapter"],
    ("recipes/llm4pr/README.md", "adapter movielens"): ["post_rank_adapter_movielens"],
    ("tokenizers/README.md", "semantic ids office"): ["semantic_ids_office"],
    ("tokenizers/README.md", "semantic ids shop"): ["semantic_ids_shop"],
    ("tokenizers/README.md", "semantic ids instruments"): ["semantic_ids_instruments"],
    ("tokenizers/README.md", "semantic ids speed"): ["semantic_ids_speed"],
    ("trainers/README.md", "grpo results"): ["grpo"],
    ("decoding/README.md", "decoding results"): ["decoding", "decoding_large"],
}
# Their figures were not kept; `llm4pr.post-rank` and `next_item` make them anew.
WITHOUT = {
    ("recipes/llm4pr/movielens.md", "results"),
    ("recipes/llm4pr/shop.md", "results"),
    ("recipes/next_item/instruments/options.md", "results"),
}


def made(readme: str, mark: str) -> str:
    if (readme, mark) in RECIPES:
        file, markdown = RECIPES[readme, mark]
        record = json.loads((ROOT / file).read_text("utf-8"))
        return signed(record, markdown(record), file)
    files = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in BENCHMARKS[readme, mark]]
    return signed({}, BENCHMARK.table([json.loads(file.read_text("utf-8")) for file in files]), files[0])


def marked() -> list[tuple[str, str]]:
    pages = [page for page in ROOT.rglob("*.md") if not {".venv", "runs", "build"} & set(page.relative_to(ROOT).parts)]
    found = []
    for page in pages:
        names = re.findall(r"(?m)^<!-- (?!/)(.+) -->$", page.read_text("utf-8"))
        found += [(page.relative_to(ROOT).as_posix(), name) for name in names]
    return sorted(found)


def test_every_marked_table_is_known_here():
    assert set(marked()) == {*RECIPES, *BENCHMARKS, *WITHOUT}


@pytest.mark.parametrize(("readme", "mark"), [*RECIPES, *BENCHMARKS])
def test_a_table_is_what_its_script_makes_of_its_figures(readme, mark):
    text = (ROOT / readme).read_text("utf-8").partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- /{mark} -->")[0]
    assert text == made(readme, mark), f"The table '{mark}' of {readme} is stale; write it by its script."


def test_what_is_published_says_where_it_came_from(tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "figures.json"
    readme.write_text("a\n<!-- results -->\nold\n<!-- /results -->\nb\n")
    publish({"seeds": [3, 4]}, "| t |\n", str(results), [str(readme)], config={"rate": 1}, tried=7)
    record = json.loads(results.read_text())
    line = f"Figures: `figures.json`, config `{record['config'][:8]}`, seeds 3, 4, 7 settings tried."
    assert readme.read_text() == f"a\n<!-- results -->\n| t |\n\n{line}\n<!-- /results -->\nb\n"
    publish({"seeds": [3, 4]}, "| t |\n", str(results), [], config={"rate": 2}, tried=7)
    assert json.loads(results.read_text())["config"] != record["config"]
