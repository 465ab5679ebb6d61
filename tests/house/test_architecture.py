"""The walls of the house: imports go up the table only and never in a circle, no room shadows a library, every registry line
resolves."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from sidtune.core.registry import Registry

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


def imported_rooms(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_names(file) if name.startswith("sidtune.")} & set(ROOMS)


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
