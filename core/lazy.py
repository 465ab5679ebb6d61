"""Public names that are imported on first use, so that `import sidtune` and a sub-room's package stay instant. Our choice.

The names stand once, as imports below `if TYPE_CHECKING:` in the package's own `__init__.py`: type checkers and editors read
them there, and at run time this module reads the same lines and imports a name when somebody asks for it.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of a package whose public names stand below `if TYPE_CHECKING:` in its source:

    if TYPE_CHECKING:
        from sidtune.tokenizers.quantizers.fsq import Fsq as Fsq
    else:
        __all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
    """
    homes = declared_names(Path(file).read_text("utf-8"))

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return sorted(homes), get, lambda: sorted(homes)


def declared_names(source: str) -> dict[str, str]:
    """Name → module of every `from module import Name as Name` below `if TYPE_CHECKING:` of a module's source.

    >>> declared_names("if TYPE_CHECKING:\\n    from a.b import C as C\\n")
    {'C': 'a.b'}
    """
    blocks = [
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    imports = [line for block in blocks for line in block if isinstance(line, ast.ImportFrom)]
    return {alias.name: line.module or "" for line in imports for alias in line.names if alias.asname == alias.name}
