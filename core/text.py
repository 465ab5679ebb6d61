"""Files that people and other programs write: text, lines, YAML and JSON, each read in one place. Our own plumbing.

A byte-order mark and Windows line ends are no part of a text. Lines end at newlines only: what else Unicode calls a line end may
stand in an id. YAML reads what people mean: `1e-3` is a number, `2020-13-45`, `007` and `12:30` are texts.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sidtune.core.errors import ConfigError, DataError

_OURS = ("timestamp", "value", "int", "float")  # what YAML makes of plain texts, and we do not or in our own way
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character, maybe without the other half
_MOST = 1_000_000  # values in one YAML file; aliases of aliases can mean more than any memory holds


def read_text(path: str | Path, what: str = "file") -> str:
    """A UTF-8 file, unpacked where it is `.gz`, without its byte-order mark and with plain newlines.

    Raises:
        DataError: it is missing, cannot be read, or is no such text; `what` it is called in the sentence.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except FileNotFoundError:
        raise DataError(f"The {what} {path} does not exist; check the path.") from None
    except IsADirectoryError:
        raise DataError(f"The {what} {path} is a folder; name the file in it.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"The {what} {path} is no complete gzip file ({error}); copy or download it again.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"The {what} {path} cannot be read ({reason}); check the path.") from None
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        place, byte = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        raise DataError(
            f"The {what} {path} is not UTF-8 text: line {place} has the byte 0x{byte:02x}; convert it."
        ) from None


def read_lines(path: str | Path, what: str = "file") -> list[str]:
    """The lines of a text file; no empty last line."""
    lines = read_text(path, what).split("\n")
    return lines[:-1] if not lines[-1] else lines


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON as RFC 8259 has it, so no NaN, and with whole characters only. Raises ValueError with the reason.

    Args:
        pairs: makes an object of its keys and values; default a dict, where the last of equal keys counts.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=pairs)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError("it holds half a character, such as '\\ud800'") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, which plain YAML resolves silently to the last one."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in _OURS]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node in (key for key, _ in node.value if not key.tag.endswith(":merge")):
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise ConfigError(f"A key must be a text, got {key!r} (line {line}); put it in quotes.")
            if key in seen:
                raise ConfigError(f"The key '{key}' stands twice (line {line}); keep one of them.")
            seen.add(key)
        return super().construct_mapping(node, deep)


_INT = r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+)"
_FLOAT = r"[-+]?(\d[\d_]*\.\d*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _kind, _pattern in (("int", _INT), ("float", _FLOAT)):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"({_pattern})$"), [*"-+.0123456789"])


def parse_yaml(text: str) -> Any:
    """YAML as JSON-ready values. Raises ConfigError with the reason, from the YAMLError of what is no YAML.

    >>> parse_yaml("{rate: 1e-3, day: 2020-13-45, id: 007}")
    {'rate': 0.001, 'day': '2020-13-45', 'id': '007'}
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        _count(value, {}, ())
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError("it is nested too deeply, or in itself") from None
    except Exception as error:  # explicit tags (`!!timestamp 2020-13-45`) and numbers of 5,000 digits raise anything
        raise ConfigError(" ".join(str(error).partition("; use sys.")[0].split())[:300]) from error
    return value


def _count(value: Any, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a value holds; raises where it is no JSON, holds itself, or holds too much."""
    if not isinstance(value, (list, dict)):
        if value is not None and not isinstance(value, (str, int, float)):
            raise ConfigError(f"{value!r} is a {type(value).__name__}, which no option takes; put it in quotes")
        return 1
    if id(value) in above:
        raise RecursionError
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known, (*above, id(value))) for part in parts)
    if known[id(value)] > _MOST:
        raise ConfigError(f"it holds more than {_MOST:,} values")
    return known[id(value)]
