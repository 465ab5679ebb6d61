"""Step folders: written whole or not at all, each with a `run.json` that says where it came from.

A step writes into a hidden sibling folder and renames it at the end, so a folder that exists is complete. `run.json` holds
the resolved config, seeds, package versions, fingerprints of the inputs, and the metrics of the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sidtune.core.errors import DataError

RUN_FILE = "run.json"
_PACKAGES = (
    "sidtune",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "faiss-cpu",
    "numpy",
)


@contextlib.contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty scratch folder that becomes `path` if the block succeeds and vanishes if it fails.

    An existing `path` is replaced only at the very end. Use on one process only.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(f".{final.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = final.parent / f".{final.name}.partial-{os.getpid()}"
    scratch.mkdir()
    try:
        yield scratch
        if final.exists():
            old = final.parent / f".{final.name}.partial-old-{os.getpid()}"
            os.replace(final, old)
            os.replace(scratch, final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(scratch, final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON (UTF-8, sorted by insertion, two-space indent) through a temporary file. NaN is refused."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: str | Path) -> Any:
    """Reads a JSON file; a missing or damaged one is a DataError that names it."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"The file {path} does not exist; run the step that writes it first.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"The file {path} is not readable JSON in UTF-8 ({error}); write it again.") from None


def fingerprint(path: str | Path) -> str:
    """SHA-256 over names and contents of a file, or of all files below a folder but `run.json` and hidden ones."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"The input {path} does not exist; check the path or run the step that writes it.")
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        relative = file.relative_to(path) if path.is_dir() else Path(file.name)
        if file.name == RUN_FILE or any(part.startswith(".") for part in relative.parts):
            continue
        digest.update(relative.as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_run(
    folder: str | Path,
    *,
    step: str,
    config: dict[str, Any],
    inputs: dict[str, str] | None = None,
    metrics: dict[str, Any] | None = None,
    started: float | None = None,
) -> None:
    """Writes `run.json` of a step.

    Args:
        folder: the (scratch) folder of the step.
        step: name of the step.
        config: the resolved config, JSON-ready.
        inputs: role → path of each input folder or file; their fingerprints are taken here.
        metrics: JSON-ready metrics.
        started: `time.time()` at the start of the step.
    """
    now = time.time()
    record = {
        "step": step,
        "config": config,
        "inputs": {role: {"path": str(p), "sha256": fingerprint(p)} for role, p in (inputs or {}).items()},
        "metrics": metrics or {},
        "versions": versions(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seconds": None if started is None else round(now - started, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
    }
    write_json(Path(folder) / RUN_FILE, record)
