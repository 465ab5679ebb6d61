"""What encoders and quantizers share: a dataclass of options, a line in a registry, a folder of JSON and safetensors."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any, ClassVar, Self

from sidtune.core.config import as_dict, build
from sidtune.core.errors import DataError
from sidtune.core.folders import read_json, write_files, write_json
from sidtune.core.hub import Published, resolve_folder
from sidtune.core.registry import Registry


class Registered(Published, abc.ABC):
    """Base class of a kind of methods.

    Attributes:
        kind: what a method of it is called; the options stand in `<kind>_config.json`.
        registry: of this kind.
        optional_files: files of the folder that not every save writes.
        name: its name in the registry.
        config_class: dataclass of its options.
        config: the options.
    """

    kind: ClassVar[str]
    registry: ClassVar[Registry]
    optional_files: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str]
    config_class: ClassVar[type]

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config

    def _about(self) -> dict[str, Any]:
        """What the JSON file says beside name and options."""
        return {}

    def _save(self, folder: Path) -> None:  # noqa: B027
        """Writes further files into the folder."""

    def _load(self, folder: Path) -> None:  # noqa: B027
        """Reads them back; raises DataError when they do not fit the options."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder, whole or not at all. Raises DataError before `fit` of what has to learn."""
        with write_files(folder, self.optional_files) as scratch:
            self._save(scratch)
            record = {self.kind: self.name, **self._about(), "config": as_dict(self.config)}
            write_json(scratch / f"{self.kind}_config.json", record)

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, **hub: Any) -> Self:
        """Loads a folder or hub repository. On the base class, the class is taken from the folder.

        Args:
            folder_or_repo: local folder or repository id.
            hub: options of `sidtune.core.hub.resolve_folder` (subfolder, revision, token, ...).

        Raises:
            DataError: missing or damaged files, or a folder of another class.
        """
        folder = resolve_folder(folder_or_repo, what=cls.kind, **hub)
        file = folder / f"{cls.kind}_config.json"
        record, own = read_json(file), getattr(cls, "name", None)
        if not isinstance(record, dict) or cls.kind not in record or "config" not in record:
            raise DataError(f"{file} describes no {cls.kind}; write the folder again.")
        if own not in (None, record[cls.kind]):
            raise DataError(
                f"{folder} holds the {cls.kind} '{record[cls.kind]}', not a '{own}'; use load_{cls.kind}, which takes any."
            )
        target: Any = cls if own else cls.registry.get(record[cls.kind])
        made = target(build(target.config_class, record["config"], str(file)))
        made._load(folder)
        return made
