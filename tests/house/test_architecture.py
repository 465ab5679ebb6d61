"""The walls of the house: imports go up the table only, no room shadows a library, every registry line resolves."""

import ast
import importlib
from pathlib import Path

import pytest

from sidtune.core.registry import Registry

ROOMS = ["core", "data_builders", "tokenizers", "models", "decoding", "metrics", "trainers", "recipes", "benchmarks"]
MAY_IMPORT = {
    "core": set(),
    "data_builders": {"core"},
    "tokenizers": {"core", "data_builders"},
    "models": {"core", "data_builders"},
    "decoding": {"core", "data_builders", "tokenizers"},
    "metrics": {"core", "data_builders", "tokenizers", "decoding"},
    "trainers": {"core", "data_builders", "tokenizers", "models", "decoding", "metrics"},
    "recipes": set(ROOMS) - {"benchmarks", "recipes"},
    "benchmarks": set(ROOMS),
}


def imported_rooms(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} uses a relative import; write 'from sidtune...' instead."
            names = [node.module or ""]
            if node.module == "sidtune":
                names = [f"sidtune.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("sidtune.")}
    return {name for name in found if name in ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_up_the_table_only(repo_root, room):
    for file in (repo_root / room).rglob("*.py"):
        wrong = imported_rooms(file) - MAY_IMPORT[room] - {room}
        assert not wrong, f"{file.relative_to(repo_root)} imports from {sorted(wrong)}, which stand above '{room}'."


def test_no_room_has_an_init_file(repo_root):
    found = [
        str(p.relative_to(repo_root)) for room in (*ROOMS, "tests") for p in (repo_root / room).rglob("__init__.py")
    ]
    assert not found, f"{found}: with it, tokenizers/ shadows the Hugging Face library of that name."


def test_every_registry_line_resolves(repo_root):
    checked = 0
    for file in repo_root.glob("*/*registry.py"):
        if file.parent.name == "core":
            continue
        module = importlib.import_module(f"sidtune.{file.parent.name}.{file.stem}")
        for value in vars(module).values():
            if isinstance(value, Registry):
                for name in value:
                    assert value.get(name) is not None
                    checked += 1
    assert checked >= 10


def test_files_stay_readable(repo_root):
    long = {
        str(p.relative_to(repo_root)): lines
        for room in (*ROOMS, "tests")
        for p in (repo_root / room).rglob("*.py")
        if (lines := len(p.read_text("utf-8").splitlines())) > 520
    }
    assert not long, f"Split these files: {long}"


def test_nothing_is_pickled_evaluated_or_trusted(repo_root):
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for room in ROOMS:
        for file in (repo_root / room).rglob("*.py"):
            text = file.read_text("utf-8")
            assert "trust_remote_code=True" not in text, file
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Import):
                    assert not forbidden & {a.name.split(".")[0] for a in node.names}, file
                if isinstance(node, ast.ImportFrom) and node.module:
                    assert node.module.split(".")[0] not in forbidden, file
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("eval", "exec"), file


def test_every_public_name_of_the_package_exists():
    import sidtune

    for name in sidtune.__all__:
        assert getattr(sidtune, name) is not None
    with pytest.raises(AttributeError):
        _ = sidtune.nothing_like_this
