"""Step folders: written whole or not at all, each with a `run.json` that says where it came from.

A step writes into a hidden sibling folder and renames it at the end, so a folder that exists is complete. `run.json` holds the
name of the step, the resolved config, package versions, fingerprints of all inputs, the metrics, and the list of the files that the
step wrote. Only a folder that the same step wrote, with no other file in it, is ever replaced. A *tree* (`sft`, `post_rank`) fills
its folder in place, part by part; until it is complete a hidden file stands for its `run.json`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import glob
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sidtune.core.config import as_dict
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.inputs import RUN_FILE, fingerprint, inputs_of, same_inputs
from sidtune.core.locks import locked
from sidtune.core.shapes import misfit
from sidtune.core.text import parse_json, read_lines, read_text

__all__ = [
    "RUN_FILE", "check_output", "fingerprint", "inputs_of", "is_whole", "locked", "read_json", "read_json_lines",
    "read_record", "read_run", "same_inputs", "versions", "write_files", "write_folder", "write_json", "write_run",
    "writes",
]  # fmt: skip

T = TypeVar("T")
STARTED_FILE = ".started.json"
# What we keep in a tree while it is filled.
_WORK = re.compile(r"\.(work_.+|.+\.(lock|work|shards)|.+\.partial-.+|started\.json)")
# What every `run.json` holds, as far as it does; the last lines are newer than some folders.
_RECORD = {
    "step?": str, "config?": dict, "metrics?": {"stages?": [{"name": str}], "final?": str}, "versions?": dict[str, str],
    "seconds?": float | None, "finished?": str, "inputs?": {...: {"path": str, "sha256": str}}, "files?": dict[str, int],
}  # fmt: skip
_PACKAGES = (
    "sidtune", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "faiss-cpu", "numpy",
)  # fmt: skip


@dataclass
class _Run:
    """The run of a step in this process: what it writes, and what it read when it started."""

    output: Path
    step: str | None
    arguments: Any
    inputs: dict[str, str]
    fingerprints: dict[str, str]
    started: float


_RUN: contextvars.ContextVar[_Run | None] = contextvars.ContextVar("run", default=None)


def writes(step: str | None, *, tree: bool = False) -> Callable[[Callable[[T], None]], Callable[[T], None]]:
    """Decorates `main(arguments)` of a script with an `output_dir`: before any work the output is checked (`check_output`) and
    locked, and all that the options name is fingerprinted. Of several processes the main one does so.

    Args:
        step: name of the step, in its `run.json`; None where the folder itself gets none.
        tree: the folder is filled in place.

    The decorated function has `step` and `check(arguments)`, for a look before the run; what an earlier step will write need not
    exist then.
    """

    def decorated(main: Callable[[T], None]) -> Callable[[T], None]:
        def check(arguments: Any) -> None:
            check_output(arguments.output_dir, step, inputs_of(arguments), tree=tree)

        @functools.wraps(main)
        def run(arguments: Any) -> None:
            if os.environ.get("RANK", "0") != "0":
                return main(arguments)
            output, inputs, started = Path(arguments.output_dir).resolve(), inputs_of(arguments), time.time()
            check(arguments)
            with locked(output):
                known = {path: fingerprint(path) for path in dict.fromkeys(inputs.values())}
                if tree and step is not None:
                    output.mkdir(parents=True, exist_ok=True)
                    write_json(output / STARTED_FILE, {"step": step})
                    (output / RUN_FILE).unlink(missing_ok=True)  # it is complete again when the record is back
                token = _RUN.set(_Run(output, step, arguments, inputs, known, started))
                try:
                    return main(arguments)
                finally:
                    _RUN.reset(token)

        run.check, run.step = check, step  # type: ignore[attr-defined]
        return run

    return decorated


def check_output(
    path: str | Path, step: str | None = None, inputs: Mapping[str, str | Path] | None = None, *, tree: bool = False
) -> None:
    """Refuses an output folder that `step` must not, or cannot, write; leaves everything as it is.

    Args:
        path: the output folder.
        step: name of the step; None for what is no step, which may replace nothing.
        inputs: option → path of what is read. The output must not be one of them, hold one, or lie inside one.
        tree: the folder is filled in place (see the module's docstring).

    Raises:
        ConfigError: one sentence with the reason.
    """
    final = Path(path).resolve()
    nearest = next(place for place in (final, *final.parents) if os.path.lexists(place))
    try:
        for place in {nearest, nearest if nearest != final else final.parent}:
            tempfile.TemporaryFile(dir=place).close()  # it has no name, so a stop here leaves nothing
    except OSError as error:
        told = f"{nearest}: {error.strerror}"
        raise ConfigError(f"The output folder {path} cannot be written ({told}); name another folder.") from None
    for name, given in (inputs or {}).items():
        other = Path(given).resolve()
        if final == other or final in other.parents or other in final.parents:
            how = "is" if final == other else "holds" if final in other.parents else "lies inside"
            raise ConfigError(f"The output folder {path} {how} the input {name} ({given}); name another folder.")
    if nearest == final and (step is not None or not tree):
        _check_replaced(final, path, step, tree)


def _check_replaced(final: Path, path: str | Path, step: str | None, tree: bool) -> None:
    """Refuses a folder that holds anything but what an earlier run of `step` wrote."""
    standing = [name for name in _listed(final, tree) if name != RUN_FILE]
    record = read_record(final / RUN_FILE)
    begun = tree and step is not None and read_record(final / STARTED_FILE).get("step") == step
    if begun or (not standing and record.get("step", step) == step):
        return
    way = "move it away or name another folder"
    if "step" not in record:
        raise ConfigError(f"The output folder {path} holds {(standing or [RUN_FILE])[0]}, which no step wrote; {way}.")
    if record["step"] != step:
        other = f", not of '{step}'" if step else ""
        raise ConfigError(f"The output folder {path} holds the result of '{record['step']}'{other}; {way}.")
    if "files" not in record:
        raise ConfigError(f"The output folder {path} is of an earlier version that did not list its files; {way}.")
    foreign = [name for name in standing if name not in record["files"]]
    if foreign:
        raise ConfigError(f"The output folder {path} holds {foreign[0]}, which '{step}' did not write; {way}.")


@contextlib.contextmanager
def write_folder(path: str | Path, step: str | None = None) -> Iterator[Path]:
    """Yields an empty scratch folder that becomes `path` if the block succeeds and vanishes if it fails.

    An existing `path` is replaced only at the very end, and only where `check_output` allows it, which is asked before and after
    the block. Use on one process only.

    `step` names what writes it; default: the step that runs, where this is its output.
    """
    final, run = Path(path).resolve(), _RUN.get()
    own = run if run is not None and run.output == final else None
    step, inputs = step or (own.step if own else None), own.inputs if own else None
    check_output(final, step, inputs)
    with locked(final):
        for stale in final.parent.glob(f".{glob.escape(final.name)}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        scratch = final.parent / f".{final.name}.partial-{os.getpid()}"
        scratch.mkdir()
        try:
            yield scratch
            _seal(scratch, step)
            check_output(final, step, inputs)
            old = final.parent / f".{final.name}.partial-old-{os.getpid()}"
            if final.exists():
                os.replace(final, old)
            os.replace(scratch, final)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


@contextlib.contextmanager
def write_files(folder: str | Path, optional: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a scratch folder whose files take their places in `folder` if the block succeeds; other files there stay.

    For `save_pretrained`, whose folder may be anybody's. A new folder appears whole; in an old one each file is replaced whole, the
    JSON files last.

    Args:
        optional: names of files that an earlier save may have left and this one need not write; they do not outlive it.

    Raises:
        ConfigError: the folder, or one above it, is a file.
    """
    final = Path(folder).resolve()
    for place in (final, *final.parents):
        if place.exists() and not place.is_dir():
            raise ConfigError(f"The folder {folder} cannot be made, because {place} is a file; name another one.")
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.partial-", dir=final.parent) as made:
        scratch = Path(made) / final.name
        scratch.mkdir()
        yield scratch
        _seal(scratch, None)
        if not final.exists():
            os.replace(scratch, final)
            return
        made_files = sorted(_listed(scratch), key=lambda name: (name.endswith(".json"), name))
        for name in made_files:
            (final / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / name, final / name)
        for name in set(optional) - set(made_files):
            (final / name).unlink(missing_ok=True)


def _listed(folder: Path, tree: bool = False) -> dict[str, int]:
    """Relative path → size of every file and link below a folder, in order; of a tree without what we keep there for the work."""
    found = {}
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        if tree:
            folders[:] = [name for name in folders if not _WORK.fullmatch(name)]
            files = [name for name in files if not _WORK.fullmatch(name)]
        for file in (Path(place, name) for name in [*files, *links]):
            found[file.relative_to(folder).as_posix()] = file.lstat().st_size
    return dict(sorted(found.items()))


def read_record(file: Path) -> dict[str, Any]:
    """A JSON mapping, `run.json` or another one; an empty one where there is none that can be read."""
    try:
        return read_json(file, _RECORD if file.name == RUN_FILE else dict)
    except DataError:
        return {}


def read_run(folder: str | Path, metrics: Any = dict) -> dict[str, Any]:
    """`run.json` of a finished step; `metrics` is the shape of its metrics. Raises DataError as `read_json` does."""
    return read_json(Path(folder) / RUN_FILE, {**_RECORD, "step": str, "config": dict, "metrics": metrics})


def _seal(folder: Path, step: str | None) -> None:
    """Gives all below a folder the permissions of ordinary files, and lists the files in its `run.json`."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            with contextlib.suppress(PermissionError, FileNotFoundError):
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    record = read_record(folder / RUN_FILE) or ({"step": step} if step else {})
    if record:
        record["files"] = {name: size for name, size in _listed(folder, tree=True).items() if name != RUN_FILE}
        write_json(folder / RUN_FILE, record)


def is_whole(folder: str | Path) -> bool:
    """Whether a folder is complete: it has a `run.json`, and every file that it lists with the size it had.

    Only sizes are compared, so that this is quick. A `run.json` of an earlier version lists no files and is believed.
    """
    record, standing = read_record(Path(folder, RUN_FILE)), _listed(Path(folder))
    return bool(record) and all(standing.get(name) == size for name, size in record.get("files", {}).items())


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON (UTF-8, sorted by insertion, two-space indent) through a temporary file. NaN is refused."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: str | Path, shape: Any = None) -> Any:
    """Reads a JSON file; one that is missing, damaged, or not of `shape` (see `core/shapes.misfit`) is a DataError."""
    if not os.path.lexists(path):
        raise DataError(f"The file {path} does not exist; run the step that writes it first.")
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise DataError(f"The file {path} is not readable JSON in UTF-8 ({error}); write it again.") from None
    if shape is not None and (why := misfit(value, shape)) is not None:
        raise DataError(f"The file {path} is not as it was written, because {why}; write it again.")
    return value


def read_json_lines(path: str | Path, shape: Any, what: str = "file") -> list[Any]:
    """The values of a file with one JSON value of a shape a line, empty lines aside. Raises DataError that names the line."""
    found = []
    for number, line in enumerate(read_lines(path, what), 1):
        try:
            why = misfit(value := parse_json(line), shape) if line.strip() else ""
        except ValueError as error:
            why = f"it is no JSON ({error})"
        if why:
            raise DataError(f"The {what} {path} is wrong in line {number}, because {why}; got {line.strip()[:80]!r}.")
        if line.strip():
            found.append(value)
    return found


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
    step: str | None = None,
    config: dict[str, Any] | None = None,
    inputs: Mapping[str, str | Path] | None = None,
    metrics: dict[str, Any] | None = None,
    started: float | None = None,
) -> None:
    """Writes `run.json` of a step, the last file of its folder.

    Args:
        folder: the scratch folder of the step, or the folder of a tree.
        step: name of the step; default the one that runs, with its options and its start.
        config: the resolved config, JSON-ready. What it names is fingerprinted (`inputs_of`): as it was when the step started
            (`writes`), else as it is now.
        inputs: role → path of what is read and the config does not name.
        metrics: JSON-ready metrics.
        started: `time.time()` at the start of the step.
    """
    now, folder, run = time.time(), Path(folder), _RUN.get()
    if step is None and run is not None:
        step, config, started = run.step, as_dict(run.arguments), run.started
    known = run.fingerprints if run is not None else {}
    read = {name: str(path) for name, path in {**inputs_of(config), **(inputs or {})}.items()}
    record = {
        "step": step,
        "config": config,
        "inputs": {name: {"path": path, "sha256": known.get(path) or fingerprint(path)} for name, path in read.items()},
        "metrics": metrics or {},
        "versions": versions(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seconds": None if started is None else round(now - started, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
    }
    write_json(folder / RUN_FILE, record)
    _seal(folder, step)
    (folder / STARTED_FILE).unlink(missing_ok=True)
