"""What a type checker sees of the public names, in strict mode: every name and every public method has a complete type.

    python tests/support/typed_surface.py

Writes a client that touches them all, beside a link called `sidtune` to this checkout, and runs basedpyright on it. Part of
`make lint`; exits with the checker's code.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import sidtune

ROOT = Path(__file__).resolve().parents[2]
# Names whose types come from libraries without complete ones (torch, transformers, pyarrow) are no fault of ours.
SETTINGS = {"typeCheckingMode": "strict", "reportMissingTypeStubs": False, "reportUnusedVariable": False}


def client() -> str:
    """One line per public name and per public method that the name's own class defines."""
    lines = ["import sidtune", ""]
    for name in sidtune.__all__:
        value = getattr(sidtune, name)
        lines.append(f"{name} = sidtune.{name}")
        if inspect.isclass(value):
            own = [m for m in vars(value) if not m.startswith("_") and _is_ours(getattr(value, m))]
            lines += [f"{name}_{method} = sidtune.{name}.{method}" for method in own]
    return "\n".join(lines) + "\n"


def _is_ours(method: object) -> bool:
    return callable(method) and (getattr(method, "__module__", None) or "").startswith("sidtune")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sidtune").symlink_to(ROOT, target_is_directory=True)
        (Path(folder) / "client.py").write_text(client(), "utf-8")
        (Path(folder) / "pyrightconfig.json").write_text(json.dumps({"include": ["client.py"], **SETTINGS}), "utf-8")
        words = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
        return subprocess.run(words, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
