"""sidtune: fine-tune an LLM to search, recommend and re-rank a catalogue with semantic IDs.

The names below are the public API. They are imported on first use, so `import sidtune` is instant and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "SidtuneError": "sidtune.core.errors",
    "ConfigError": "sidtune.core.errors",
    "DataError": "sidtune.core.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sidtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
