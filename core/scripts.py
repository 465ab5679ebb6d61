"""What a person can run: the scripts of `recipes/`, found by name. There is no list to keep.

A script is a file of `recipes/` or of a folder in it with a dataclass `Arguments`, a function `main(arguments)`, and a last line
that hands both to `core.config.command`. It is looked for by reading text, never by importing, so that listing is instant.
Steps are called by their file's name (`sft`), a system's own scripts by system and file (`crs.reason`). A script whose work does
not divide into processes says `LAUNCH = "alone"`. Our choice.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sidtune.core.errors import ConfigError, nearest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Short names that commands written down somewhere use, whatever other file may get such a name.
_KEPT = {
    "post_rank": "llm4pr.post_rank", "reason": "crs.reason", "self_evolve": "crs.self_evolve",
    "trajectories": "crs.trajectories", "next_item": "next_item.train",
}  # fmt: skip


@dataclass(frozen=True)
class Script:
    """One script.

    Attributes:
        name: `sft`, or `crs.reason` for the script of a system.
        module: importable name.
        alone: runs as one process, whatever a launcher is told.
        summary: first line of its docstring, or why its file is no Python.
        sound: whether its file is Python.
    """

    name: str
    module: str
    alone: bool
    summary: str
    sound: bool = True

    def load(self) -> ModuleType:
        """Its module. Raises ConfigError where its file is no Python."""
        if not self.sound:
            raise ConfigError(f"The script '{self.name}' cannot run: {self.summary}; correct the file.")
        return importlib.import_module(self.module)

    @property
    def command(self) -> str:
        """Its name after `sidtune` on a command line, with dashes."""
        return self.name.replace("_", "-")


@functools.lru_cache
def scripts(folder: Path = RECIPES) -> dict[str, Script]:
    """All scripts below `folder` by name: first the one of `recipes/` itself, then the steps, then those of the systems."""
    found = {}
    files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("steps/*.py")), *sorted(folder.glob("*/*.py"))]
    for file in dict.fromkeys(files):
        parts = file.relative_to(folder).with_suffix("").parts
        text = "" if any(part.startswith(".") for part in parts) else file.read_text("utf-8", errors="replace")
        if '\nif __name__ == "__main__":' not in text:
            continue
        name = ".".join(parts[1:] if parts[0] == "steps" else parts)
        alone = re.search(r'^LAUNCH = "alone"', text, re.MULTILINE) is not None
        try:
            summary, sound = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0], True
        except (SyntaxError, ValueError) as error:
            summary, sound = (
                f"line {getattr(error, 'lineno', None) or 1} of {file} is no Python ({error.args[0]})",
                False,
            )
        found[name] = Script(name, ".".join(("sidtune", "recipes", *parts)), alone, summary, sound)
    return found


def find_script(name: str) -> Script:
    """The script called `name`; `-` and `_` are the same.

    Beside the full name, `steps.sft`, the file's name alone where only one script has it (`reason`), and the name of a system with
    one script are understood. Raises ConfigError that names the nearest one.

    >>> find_script("build-data").module
    'sidtune.recipes.steps.build_data'
    """
    known, named = scripts(), name.replace("-", "_")
    wanted = _KEPT.get(named, named.removeprefix("steps."))
    if wanted in known:
        return known[wanted]
    for part in (-1, 0):  # the file's name, then the system's
        same = [script for script in known.values() if script.name.split(".")[part] == wanted]
        if len(same) == 1:
            return same[0]
        if same:
            names = ", ".join(script.name for script in same)
            raise ConfigError(f"'{name}' may be any of {names}; write one of these names.")
    short = [script.name.split(".")[-1] for script in known.values() if "." in script.name]
    close = nearest(wanted, [*known, *short])
    if not close.startswith("did you mean"):
        close = nearest(wanted, known)
    raise ConfigError(f"there is no script '{name}': {close}")


def find_config(name: str) -> str:
    """The YAML file that `name` means: a file, or the pipeline of a folder, here or else in `recipes/`.

    >>> Path(find_config("quickstart")).parts[-2:]
    ('quickstart', 'pipeline.yaml')
    """
    places = [Path(name), Path(name, "pipeline.yaml"), RECIPES / name, RECIPES / name / "pipeline.yaml"]
    found = next((place for place in places if place.is_file()), None)
    if found is None and "/" not in name and not Path(name).suffix:
        known = [file.parent.relative_to(RECIPES).as_posix() for file in RECIPES.rglob("pipeline.yaml")]
        raise ConfigError(f"There is neither a file nor a pipeline of recipes/ called '{name}': {nearest(name, known)}")
    return str(found or name)
