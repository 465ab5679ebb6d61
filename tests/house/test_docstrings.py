"""The examples in docstrings run as they stand there, none skipped."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "data_builders", "tokenizers", "models", "metrics", "decoding", "trainers", "recipes")
FILES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")) if ">>> " in file.read_text("utf-8")]
MODULES = ["sidtune." + ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES]


def test_the_house_has_examples():
    assert len(MODULES) >= 12


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    module = importlib.import_module(name)
    found = [one for one in doctest.DocTestFinder().find(module, name) if one.examples]
    assert found and not any(doctest.SKIP in example.options for one in found for example in one.examples)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    for one in found:
        runner.run(one, out=sys.stdout.write)
    assert runner.failures == 0
