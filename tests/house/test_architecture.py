"""The walls of the house: imports go up the table only and never in a circle, no room shadows a library, every registry line
resolves."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from sidtune.core.lazy import declared_names
from sidtune.core.registry import Registry

pytestmark = pytest.mark.medium

ROOMS = ["core", "data_builders", "tokenizers", "models", "metrics", "decoding", "trainers", "recipes", "benchmarks"]
MAY_IMPORT = {
    "core": set(),
    "data_builders": {"core"},
    "tokenizers": {"core", "data_builders"},
    "models": {"core", "data_builders"},
    "metrics": {"core", "data_builders", "tokenizers"},
    "decoding": {"core", "data_builders", "tokenizers", "models", "metrics"},
    "trainers": {"core", "data_builders", "tokenizers", "models", "metrics", "decoding"},
    "recipes": set(ROOMS) - {"benchmarks", "recipes"},
    "benchmarks": set(ROOMS),
}


def imported_names(file: Path) -> set[str]:
    """Dotted names a file imports anywhere: at its top, inside functions and for types; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} uses a relative import; write 'from sidtune...' instead."
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


PUBLIC = declared_names((Path(__file__).resolve().parents[2] / "__init__.py").read_text("utf-8"))


def imported_rooms(file: Path) -> set[str]:
    """The rooms a file imports from; of a public name (`from sidtune import SidTrie`) the room where it lives."""
    names = [PUBLIC.get(name.removeprefix("sidtune."), name) for name in imported_names(file)]
    return {name.split(".")[1] for name in names if name.startswith("sidtune.")} & set(ROOMS)


def imports_between(root: Path, level: str) -> dict[str, set[str]]:
    """What imports what in the rooms below `root`: modules, or sub-rooms.

    A sub-room is a folder in a room with all that lies in it, `__init__.py` too; a module directly in a room stands for itself.
    """
    modules = {}
    for file in (file for room in ROOMS for file in (root / room).rglob("*.py")):
        path = file.relative_to(root)
        place = path.parent if file.name == "__init__.py" else path.with_suffix("")
        node = path.as_posix() if level == "modules" or len(path.parts) == 2 else "/".join(path.parts[:2])
        modules[".".join(("sidtune", *place.parts))] = (file, node)
    graph: dict[str, set[str]] = {node: set() for _, node in modules.values()}
    for file, node in modules.values():
        graph[node] |= {modules[name][1] for name in imported_names(file) if name in modules}
    return {node: to - {node} for node, to in graph.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, the first of them again at the end; empty where there is none."""
    while free := [node for node, to in graph.items() if not to & graph.keys()]:
        graph = {node: to for node, to in graph.items() if node not in free}
    walk = sorted(graph)[:1]  # every node that is left leads to another one
    while walk and walk[-1] not in walk[:-1]:
        walk.append(min(graph[walk[-1]] & graph.keys()))
    return walk[walk.index(walk[-1]) :] if walk else []


@pytest.mark.parametrize("level", ["modules", "sub-rooms"])
def test_no_imports_in_a_circle(repo_root, level):
    graph = imports_between(repo_root, level)
    found = circle(graph)
    assert not found, f"A circle of imports: {' -> '.join(found)}; move what they share to where it belongs."
    assert len(graph) > 30 and sum(map(len, graph.values())) > len(graph)


WAYS = {
    "at the top": "from sidtune.models.{}.b import name\n",
    "of a module": "from sidtune.models.{} import b\n",
    "plain": "import sidtune.models.{}.b as b\n",
    "in a function": "def f():\n    from sidtune.models.{}.b import name\n",
    "for types": "if TYPE_CHECKING:\n    from sidtune.models.{}.b import name\n",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_planted_circle_is_found(tmp_path, way):
    def plant(name: str, text: str) -> None:
        (tmp_path / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / name).write_text(text)

    plant("x/a.py", WAYS[way].format("x"))
    plant("x/b.py", "from sidtune.models.base import name\n")
    plant("base.py", "import sidtune.core.errors\n")
    assert not circle(imports_between(tmp_path, "modules")) and not circle(imports_between(tmp_path, "sub-rooms"))
    plant("x/b.py", "from sidtune.models.x.a import name\n")
    assert circle(imports_between(tmp_path, "modules")) == ["models/x/a.py", "models/x/b.py", "models/x/a.py"]
    assert not circle(imports_between(tmp_path, "sub-rooms"))
    plant("x/b.py", "")
    plant("x/deeper/c.py", WAYS[way].format("y"))
    plant("y/b.py", "from sidtune.models.base import name\n")
    plant("base.py", "import sidtune.models.x\n")
    plant("x/__init__.py", "")
    assert not circle(imports_between(tmp_path, "modules"))
    found = circle(imports_between(tmp_path, "sub-rooms"))
    assert set(found) == {"models/base.py", "models/x", "models/y"} and len(found) == 4


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_up_the_table_only(repo_root, room):
    for file in (repo_root / room).rglob("*.py"):
        wrong = imported_rooms(file) - MAY_IMPORT[room] - {room}
        assert not wrong, f"{file.relative_to(repo_root)} imports from {sorted(wrong)}, which stand above '{room}'."


def test_a_public_name_counts_as_an_import_of_its_room(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from sidtune import ConfigError, SidSFTTrainer\n")
    assert imported_rooms(tmp_path / "a.py") == {"core", "trainers"}


def wrong_imports_of_recipes(root: Path) -> list[str]:
    """Imports of a script by another file of `recipes/`, and of one system's files by another; steps and systems stand alone."""
    files = {file: file.relative_to(root).with_suffix("").parts for file in (root / "recipes").rglob("*.py")}
    modules = {".".join(("sidtune", *parts)): (file, parts) for file, parts in files.items()}
    found = []
    for file, parts in files.items():
        for name in imported_names(file) & modules.keys():
            other, place = modules[name]
            script = other != file and '\nif __name__ == "__main__":' in other.read_text("utf-8")
            if script or (len(place) > 2 and place[1] != parts[1]):
                found.append(f"{'/'.join(parts)} imports {name}")
    return found


def test_scripts_and_systems_stand_alone(repo_root):
    found = wrong_imports_of_recipes(repo_root)
    assert not found, f"{found}; what two of them share belongs into a library, or into a file of recipes/."


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("steps/sft.py", "from sidtune.recipes.steps.evaluate import Arguments"),
        ("steps/sft.py", "def f():\n    from sidtune.recipes.steps import evaluate"),
        ("crs/loop.py", "import sidtune.recipes.steps.evaluate"),
        ("crs/loop.py", "from sidtune.recipes.llm4pr.training import f"),
        ("preflight.py", "from sidtune.recipes.steps.evaluate import f"),
    ],
)
def test_a_planted_import_between_recipes_is_found(tmp_path, place, line):
    program = '\n\nif __name__ == "__main__":\n    pass\n'
    for name, text in (("steps/evaluate.py", program), ("llm4pr/training.py", ""), ("preflight.py", ""), (place, line)):
        (tmp_path / "recipes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "recipes" / name).write_text(text)
    assert len(wrong_imports_of_recipes(tmp_path)) == 1
    (tmp_path / "recipes" / place).write_text("from sidtune.recipes.preflight import f\n")
    assert not [found for found in wrong_imports_of_recipes(tmp_path) if place != "preflight.py"]


def eager_lines(source: str) -> list[str]:
    """Statements of a sub-room's `__init__.py` that import one of its modules, or do anything else, before somebody asks."""
    lazy = ("from typing import TYPE_CHECKING", "from sidtune.core.lazy import lazy_names")
    found = []
    for node in ast.parse(source).body:
        quiet = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        quiet |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if isinstance(node, ast.If):
            quiet &= all(
                ast.unparse(one) == "__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)"
                for one in node.orelse
            )
        if not quiet and ast.unparse(node) not in lazy:
            found.append(ast.unparse(node))
    return found


def test_a_sub_room_imports_nothing_before_somebody_asks(repo_root):
    for file in (repo_root / room for room in ROOMS):
        for init in file.rglob("__init__.py"):
            assert not eager_lines(init.read_text("utf-8")), init
    assert not eager_lines((repo_root / "__init__.py").read_text("utf-8").replace('__version__ = "0.1.0"', ""))
    assert eager_lines("from sidtune.tokenizers.quantizers.fsq import Fsq as Fsq")
    assert eager_lines("if TYPE_CHECKING:\n    import a\nelse:\n    import a")


def test_no_room_has_an_init_file(repo_root):
    files = [repo_root / room / "__init__.py" for room in ROOMS] + list((repo_root / "tests").rglob("__init__.py"))
    found = [str(file.relative_to(repo_root)) for file in files if file.exists()]
    assert not found, f"{found}: with it, tokenizers/ shadows the Hugging Face library of that name."


def test_every_registry_line_resolves(repo_root):
    checked = 0
    for file in (file for room in ROOMS[1:] for file in (repo_root / room).rglob("registry.py")):
        module = importlib.import_module(".".join(("sidtune", *file.relative_to(repo_root).with_suffix("").parts)))
        for value in vars(module).values():
            if isinstance(value, Registry):
                for name in value:
                    assert value.get(name) is not None
                    checked += 1
    assert checked >= 40


def test_files_stay_readable(repo_root):
    long = {
        str(p.relative_to(repo_root)): lines
        for room in (*ROOMS, "tests")
        for p in (repo_root / room).rglob("*.py")
        if (lines := len(p.read_text("utf-8").splitlines())) > 460
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


def test_public_names_are_those_that_type_checkers_see(repo_root):
    """The block for type checkers, read as Python would import it, against what users get."""
    import sidtune

    (block,) = [
        node
        for node in ast.parse((repo_root / "__init__.py").read_text("utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen: dict[str, object] = {}
    for line in block.body:
        assert isinstance(line, ast.ImportFrom) and all(alias.asname == alias.name for alias in line.names)
        seen |= {alias.name: getattr(importlib.import_module(str(line.module)), alias.name) for alias in line.names}
    assert sidtune.__all__ == sorted(seen) and dir(sidtune) == sorted(seen)
    assert all(getattr(sidtune, name) is value for name, value in seen.items())
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = sidtune.nothing_like_this


def test_importing_the_package_loads_nothing_of_its_rooms():
    code = "import sys, sidtune; print(sorted(m for m in sys.modules if m.startswith('sidtune') or m in ('torch', 'numpy')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['sidtune', 'sidtune.core', 'sidtune.core.lazy']"
