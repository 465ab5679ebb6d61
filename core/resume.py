"""How an interrupted run goes on: what it is, how far it came, and how it ends. One mechanism for all trainers and steps.

    work = Work("runs/x/model", {"settings": settings, "data": fingerprint("runs/x/data")})
    if not work.is_done():
        told = work.begin(prepare)                              # prepare(folder) is not repeated after an interruption
        ... last_complete_checkpoint(work.checkpoints) ...      # where training goes on
        with work.finish() as scratch:                          # the output at once, then the work folder goes
            ...

*Identity*: everything the result depends on, role by role, inputs by their content; what is of another identity is never used.
*Checkpoint*: a folder `checkpoint-<n>` that holds every file of a list with sizes, which is written last. *Finish*: the identity
stands in `run.json` of the output, so that a finished run is known again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sidtune.core.config import as_dict
from sidtune.core.errors import ConfigError
from sidtune.core.folders import RUN_FILE, is_whole, read_json, read_record, write_folder, write_json
from sidtune.core.inputs import fingerprint, inputs_of

COMPLETE_FILE, WORK_FILE = "complete.json", "work.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
logger = logging.getLogger(__name__)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-ready value, which may hold numpy arrays."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_content).encode()).hexdigest()


def _content(value: Any) -> Any:
    if not hasattr(value, "tobytes"):
        return str(value)
    return [str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]


def identity_of(config: Any) -> dict[str, Any]:
    """Option → value of a filled config but `output_dir`; of an option that names a file or folder, its content instead."""
    values = {name: value for name, value in as_dict(config).items() if name != "output_dir"}
    return {**values, **{name: fingerprint(path) for name, path in inputs_of(config).items()}}


def work_folder(output: str | Path) -> Path:
    """Where the unfinished parts of the folder `output` lie: beside it."""
    output = Path(output)
    return output.parent / f".work_{output.name}"


class Work:
    """The unfinished parts of one output folder. Use it on one process.

    Args:
        output: folder that the run writes.
        identity: role → JSON-ready value of all that the result depends on.
        folder: of the unfinished parts, default `work_folder(output)`.
        place: JSON-ready; what unfinished parts depend on and the result does not, for example the number of processes.

    Attributes:
        folder, checkpoints: where unfinished parts and checkpoints lie.
        name: digest of the identity.
    """

    def __init__(
        self, output: str | Path, identity: Mapping[str, Any], folder: str | Path | None = None, place: Any = None
    ) -> None:
        self.output, self.folder = Path(output), Path(folder or work_folder(output))
        self.checkpoints = self.folder / "checkpoints"
        self._mine = {"identity": {role: digest(value) for role, value in identity.items()}, "place": place}
        self.name = digest(self._mine["identity"])

    def is_done(self) -> bool:
        """Whether the output is whole and this run's; unfinished parts, left by a stop at the very end, go then."""
        done = read_record(self.output / RUN_FILE).get("identity") == self.name and is_whole(self.output)
        if done:
            self.close()
        return done

    def begin(self, prepare: Callable[[Path], Any] | None = None, *, refuse: str | None = None) -> Any:
        """Opens the work folder; what belongs to another run is thrown away first, with a notice.

        Args:
            prepare: fills the new folder; not called where an interrupted run of this identity has done so.
            refuse: nothing is thrown away; what to do instead, for the message.

        Returns:
            What `prepare` returned, JSON-ready, now or in the interrupted run.

        Raises:
            ConfigError: what another run left is there, and `refuse` is given; names the roles that differ.
        """
        left = read_record(self.folder / WORK_FILE)
        if {key: left.get(key) for key in self._mine} == self._mine:
            return left.get("told")
        if self.folder.is_dir() and any(self.folder.iterdir()):
            differs = _differences(left, self._mine)
            what = f"an unfinished run that differs in {differs}" if left else "no run that can go on"
            if refuse is not None:
                raise ConfigError(f"{self.folder} holds {what}; {refuse}, or run as before to go on.")
            logger.warning("%s holds %s; it is thrown away.", self.folder, what)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        told = prepare(self.folder) if prepare is not None else None
        write_json(self.folder / WORK_FILE, {**self._mine, "told": told})
        return told

    @contextlib.contextmanager
    def checkpoint(self, number: int) -> Iterator[Path]:
        """Yields an empty folder that becomes the checkpoint `number`; earlier ones go then."""
        folder = self.checkpoints / f"checkpoint-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        mark_complete(folder)
        for other in self.checkpoints.iterdir():
            if other != folder:
                shutil.rmtree(other)

    @contextlib.contextmanager
    def finish(self, step: str | None = None) -> Iterator[Path]:
        """Yields the scratch folder of `write_folder(output, step)`, to be given a `run.json`; then the work folder goes."""
        with write_folder(self.output, step) as scratch:
            yield scratch
            write_json(scratch / RUN_FILE, {**read_json(scratch / RUN_FILE), "identity": self.name})
        self.close()

    def close(self) -> None:
        """Removes the work folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _differences(left: dict[str, Any], mine: dict[str, Any]) -> str:
    old, new = left.get("identity") or {}, mine["identity"]
    roles = [role for role in {**new, **old} if old.get(role) != new.get(role)]
    return ", ".join(roles[:5]) or "the number or kind of its processes"


def mark_complete(folder: Path, **told: Any) -> None:
    """Writes the list of a checkpoint's files, as the very last of them; `told` is written beside it."""
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(COMPLETE_FILE, None)
    write_json(folder / COMPLETE_FILE, {**told, "files": files})


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of its list in the recorded size."""
    files = read_record(folder / COMPLETE_FILE).get("files")
    return isinstance(files, dict) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items()
    )


def last_complete_checkpoint(folder: str | Path, remove_broken: bool = False) -> Path | None:
    """The newest complete checkpoint below `folder`, or None; `remove_broken` also deletes the others (one process only)."""
    found = []
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if not match or not path.is_dir():
            continue
        if is_complete(path):
            found.append((int(match.group(1)), path))
        elif remove_broken:
            logger.info("The checkpoint %s is incomplete and is skipped.", path.name)
            shutil.rmtree(path)
    return max(found)[1] if found else None
