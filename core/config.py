"""Strict configs: dataclasses of the kind `TrlParser` takes, filled from a YAML file and the command line.

Filling is ours, because TrlParser knows no nested values and lets wrong types pass: an unknown key is refused with the nearest
known one, a value of the wrong type before any work starts, dotted options reach into nested values
(`--stages.align.args.max_steps 5`, an element of a list by its `name` or its number), and `command` turns every sidtune error
into one sentence on stderr and exit code 2, and a stop into one that says how to go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sidtune.core.console import quiet
from sidtune.core.errors import ConfigError, DataError, SidtuneError, nearest, system_error
from sidtune.core.processes import end_processes
from sidtune.core.scripts import find_config
from sidtune.core.shapes import as_number, describe, fits, unusable
from sidtune.core.stopping import stoppable
from sidtune.core.text import parse_yaml, read_text

logger = logging.getLogger(__name__)
T = TypeVar("T")
ERROR_FILE_VARIABLE = "SIDTUNE_ERROR_FILE"
SEEDS = 2**32 - 1  # the largest seed that numpy, torch and transformers all take
MANY = 1_000_000  # more beams, places or rows at once than this are a slip of the pen, and no memory holds them


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping. Raises ConfigError with file and reason when it is missing, damaged or no mapping."""
    try:
        value = parse_yaml(read_text(path, "config file"))
    except DataError as error:
        what = f"The config file {path} is not valid YAML: " if os.path.isfile(path) else ""
        raise ConfigError(f"{what}{error}") from None
    except ConfigError as error:
        what = "not valid YAML" if error.__cause__ else "ambiguous"
        raise ConfigError(f"The config file {path} is {what}: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"The config file {path} holds a {type(value).__name__}; it must be a mapping of key: value.")
    return value


def check_keys(values: dict[str, Any], known: Sequence[str], where: str) -> None:
    """Refuses every key of `values` that is not in `known`, all in one ConfigError, each with its nearest known key."""
    unknown = [key for key in values if key not in known]
    if unknown:
        parts = [f"unknown key '{key}' ({nearest(str(key), known)})" for key in unknown]
        raise ConfigError(f"{where}: " + "; ".join(parts))


def build(cls: type[T], values: Any, where: str) -> T:
    """Makes a (nested) dataclass from a mapping of its fields, strictly; `where` is how messages call this place (`stages[1]`).

    Raises:
        ConfigError: not a mapping, unknown key, missing required key, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping of key: value, got {values!r}.")
    values = renamed(cls, values, where)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    check_keys(values, names, where)
    hints = typing.get_type_hints(cls)
    values = {name: as_number(value, hints[name]) for name, value in values.items()}
    check_types(cls, values, where)
    missing = [name for name in names if name not in {**defaults_of(cls), **values}]
    if missing:
        raise ConfigError(f"{where}: the required key '{missing[0]}' is missing; set it.")
    return cls(**values)


def defaults_of(cls: type) -> dict[str, Any]:
    """Field → default of a dataclass, without those that are required."""
    made = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(cls)
    }
    return {name: value for name, value in made.items() if value is not dataclasses.MISSING}


def renamed(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` with today's names: a class may say in `RENAMED` what its options were called before, and in `GONE` where those
    went that it has no more; they are left out with a notice."""
    before, gone = getattr(cls, "RENAMED", {}), getattr(cls, "GONE", {})
    for name in gone.keys() & values:
        logger.warning("%s: '%s' is no option here any more and is left out; %s.", where, name, gone[name])
    for old, new in before.items():
        if old in values and new in values:
            raise ConfigError(f"{where}: '{old}' is the former name of '{new}'; keep one of them.")
    return {before.get(name, name): value for name, value in values.items() if name not in gone}


def check_range(config: Any, least: float, *names: str, most: float = MANY) -> None:
    """Refuses numbers of `config`, also those in a list, outside [least, most]; null is none. Raises ConfigError."""
    for name in names:
        value = getattr(config, name)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None and not least <= one <= most:
                limit = f"at least {least:,}" if one < least else f"at most {most:,}"
                raise ConfigError(f"{name} must be {limit}, got {one}; correct it.")


def check_shares(config: Any, *names: str) -> None:
    """Refuses numbers of `config` outside [0, 1). Raises ConfigError."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name} must be a share in [0, 1), got {getattr(config, name)}; correct it.")


def check_types(cls: type, values: dict[str, Any], where: str) -> None:
    """Compares plain values with the field types of `cls`; raises ConfigError naming key, expected type and value."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        hint = hints.get(key)
        if hint is not None and not fits(value, hint):
            raise ConfigError(f"{where}: '{key}' must be {describe(hint)}, got {value!r}.")
        if (found := unusable(value, str(key))) is not None:
            raise ConfigError(f"{where}: '{found[0]}' must be {found[1]}; correct it.")


def place_of(values: list, key: str, where: str) -> int:
    """Which element of a list `key` means: the one of that `name`, or of that number, counted from 0; else a ConfigError."""
    names = {
        str(one["name"]): n for n, one in reversed([*enumerate(values)]) if isinstance(one, dict) and "name" in one
    }
    if key in names:
        return names[key]
    if key.isdigit() and int(key) < len(values):
        return int(key)
    if key.isdigit() or not names:
        raise ConfigError(f"{where} names element '{key}' of a list of {len(values)}; count from 0.")
    raise ConfigError(f"{where} names the element '{key}', but the list has none of that name; {nearest(key, names)}")


class _Below(dict):
    """What an option says by dots: `--stages.align.args.max_steps 5`. The value at their end replaces the one that stands there."""


def merged(values: Any, changes: Any, where: str) -> Any:
    """`values` with `changes` laid over them: mappings key by key, a list by names or numbers of its elements, anything
    else replaced.

    So `args: {stages: {personalise: {args: {max_steps: 5}}}}`, or the option
    `--steps.sft.args.stages.personalise.args.max_steps 5`, changes one value of the step's config file.

    Raises:
        ConfigError: a name or number that the list does not have; an option that reaches into a value without keys.
    """
    if not isinstance(changes, dict) or not isinstance(values, (dict, list, types.NoneType)):
        if isinstance(changes, _Below):
            raise ConfigError(f"{where} holds no nested keys, so '{next(iter(changes))}' cannot be set in it.")
        return changes
    made: Any = list(values) if isinstance(values, list) else dict(values or {})
    names = [one["name"] for one in made if isinstance(one, dict) and "name" in one] if isinstance(made, list) else made
    for key, new in _dotted({str(name): name for name in names}, changes):
        place = place_of(made, str(key), where) if isinstance(made, list) else key
        old = made.get(place) if isinstance(made, dict) else made[place]
        whole = isinstance(changes, _Below) and not isinstance(new, _Below)
        made[place] = new if whole else merged(old, new, f"{where}.{key}")
    return made


def _dotted(names: dict[str, Any], changes: dict) -> Iterator[tuple[Any, Any]]:
    """The changes by key as it stands in `names`, where a known name that holds dots (`dropout_0.1`) was split at them."""
    for key, new in changes.items():
        if str(key) not in names and isinstance(new, dict) and any(name.startswith(f"{key}.") for name in names):
            yield from _dotted(names, type(new)({f"{key}.{below}": value for below, value in new.items()}))
        else:
            yield names.get(str(key), key), new


def _split_options(argv: Sequence[str]) -> tuple[str | None, dict[str, Any], list[str]]:
    """Splits argv into the config path, `--key value` pairs (YAML values), and flags such as `--help`."""
    config, options, flags = None, {}, []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            flags.append(word)
            continue
        if not word.startswith("--"):
            raise ConfigError(f"Expected an option such as --key value, got '{word}'.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        if key == "config":
            config = text
        else:
            try:
                options[key] = parse_yaml(text) if text != "" else ""
            except ConfigError as error:
                if not isinstance(error.__cause__, yaml.YAMLError):
                    raise ConfigError(f"The option --{key}: {error}") from None
                options[key] = text  # a text with colons and brackets of its own
    return config, options, flags


def parse(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """Fills the dataclass `cls` from `--config FILE` and command-line options, which win.

    A field named `root` gets the folder of that file, whatever the file says, so that paths in it can start there; only the
    command line (`argv`, default `sys.argv[1:]`) sets another. `cls.POSITIONAL` names an option that may come first without its
    name.

    Raises:
        ConfigError: unknown key, wrong type, missing required key, unreadable file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    first = getattr(cls, "POSITIONAL", None)
    if words and not words[0].startswith("-") and first is not None:
        words = [f"--{first}", *words]
    config_path, options, flags = _split_options(words)
    config_path = find_config(config_path) if config_path else None
    if flags:
        print(help_text(cls))
        sys.exit(0)
    if not words and first == "config":
        raise ConfigError("Name a YAML file, or a pipeline of recipes/: sidtune run quickstart.")
    where = f"In {config_path}" if config_path else "On the command line"
    values = renamed(cls, load_yaml(config_path) if config_path else {}, where)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    check_keys(values, names, where)
    former = getattr(cls, "RENAMED", {})
    check_keys({former.get(name := key.split(".")[0], name): None for key in options}, names, "On the command line")
    for key, value in options.items():
        name, *below = key.split(".")
        for word in reversed(below):
            value = _Below({word: value})
        name = former.get(name, name)
        values[name] = merged(values.get(name), value, f"The option --{name}") if below else value
    if "root" in names and config_path and options.get("root") is None:
        values["root"] = str(Path(config_path).parent)
    return build(cls, values, where)


def help_text(cls: type) -> str:
    """What `--help` prints: how the program is called, the docstring of `cls`, and type and default of every option."""
    program = sys.argv[0] if sys.argv[0].startswith("sidtune ") else Path(sys.argv[0]).name
    hints = typing.get_type_hints(cls)
    about = [inspect.cleandoc(one.__doc__ or "") for one in cls.__mro__[:-1]]  # of inherited options too
    first = {None: "", "config": "[FILE] "}.get(name := getattr(cls, "POSITIONAL", None), f"{str(name).upper()} ")
    lines = [f"usage: {program} {first}[--config FILE] [--OPTION VALUE ...]", "", *about, ""]
    lines.append(
        "Every option may stand in FILE, a YAML file; nested values are reached by dots: --stages.align.args.max_steps 5."
    )
    names, defaults = [one.name for one in dataclasses.fields(cls)], defaults_of(cls)
    for name in names:
        told = f"default {'null' if defaults[name] is None else defaults[name]}" if name in defaults else "required"
        lines.append(f"  --{name:<{max(map(len, names))}}  {describe(hints[name])}; {told}")
    return "\n".join(lines)


def as_dict(config: Any) -> Any:
    """A dataclass as JSON-ready values (paths become text)."""

    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: as_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): as_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [as_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def command(main: Callable[[T], Any], cls: type[T], argv: Sequence[str] | None = None) -> None:
    """Runs `main(config)` as a command: errors of the input become one sentence on stderr and exit code 2, a stop by SIGINT,
    SIGTERM or SIGHUP (or because the runner is gone) one sentence and exit code 128 plus the number of the signal.

    When the environment variable SIDTUNE_ERROR_FILE is set (the pipeline runner sets it), the sentence is written there too,
    because `accelerate launch` replaces the exit code of its child. A process of several leaves its group at the end.
    """
    quiet()
    with stoppable(), one_sentence():
        if getattr(sys.modules["__main__"], "LAUNCH", None) == "alone":
            check_alone()
        main(parse(cls, argv))
        end_processes()


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the process with exit code 2 and one sentence where the block meets an error of the input or of the system."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has seen enough
        raise
    except Exception as error:
        told = error if isinstance(error, SidtuneError) else system_error(error)
        if told is None:
            raise
        report_error(told)
        sys.exit(2)


def check_alone() -> None:
    """Raises ConfigError in one of several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("This command runs as one process; start it without a launcher of several.")


def report_error(error: SidtuneError) -> None:
    """Writes the sentence of `error` to stderr and to the runner's error file, if there is one."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    if path := os.environ.get(ERROR_FILE_VARIABLE):
        with contextlib.suppress(OSError):
            Path(path).write_text(str(error), encoding="utf-8")
