"""Registries: a name in a YAML file → a class or function, imported only when it is asked for.

Each room keeps one registry file with one line per method. A wrong line fails at import of the registry test, an unknown
name fails with the nearest known one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from sidtune.core.config import build
from sidtune.core.errors import ConfigError, nearest


class Registry:
    """Named methods of one kind.

    Args:
        kind: what is registered, in the singular, as shown in messages ("quantizer").
        entries: name → `"package.module:attribute"`.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries: dict[str, Any] = dict(entries)

    def register(self, name: str, target: Any) -> None:
        """Adds a method at run time: the object itself or `"package.module:attribute"`. ConfigError: the name is taken."""
        if name in self._entries:
            raise ConfigError(f"A {self.kind} named '{name}' is registered already; choose another name.")
        self._entries[name] = target

    def get(self, name: str) -> Any:
        """The object registered as `name`. Raises ConfigError that names the nearest known one."""
        if not isinstance(name, str) or name not in self._entries:
            raise ConfigError(f"There is no {self.kind} named '{name}': {nearest(str(name), self._entries)}")
        target = self._entries[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
        return target

    def make(self, name: str, options: dict[str, Any] | None = None) -> Any:
        """A new object of the class registered as `name`, which has a `config_class` dataclass and takes one of it.

        Raises:
            ConfigError: an unknown name, or an option that is no field of the config or has a wrong value.
        """
        cls = self.get(name)
        return cls(build(cls.config_class, dict(options or {}), f"Options of the {self.kind} '{name}'"))

    def __contains__(self, name: str) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
