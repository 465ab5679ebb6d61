"""One request to a catalogue, and how untrusted input (a JSON body, a line of a file, a call from Python) becomes one.

The HTTP server, the batch script and `SidRetriever.search` read requests with `parse_request` and hence agree on names,
types and messages. A value is checked field by field; the first fault is raised as one sentence that names the field.
Nothing here knows the catalogue: item ids and categories are looked up by `sidtune.decoding.retrieval.catalogue`. Our choice.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sidtune.core.config import MANY
from sidtune.core.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class PastTurn:
    """One past action of the user: the item, and what was asked when it was found. Raises DataError for wrong types."""

    item_id: str
    query: str | None = None
    context: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        _set(self, _checked_turn(vars(self), "turn", UNLIMITED))


@dataclass(frozen=True)
class SearchRequest:
    """What is asked. All texts are data and are sanitised before the model reads them.

    Attributes:
        query: what the user typed; None asks for recommendations.
        profile, context: (name, value) pairs.
        history: past turns, oldest first.
        k: items wanted.
        num_beams: beams of the search; None means max(k, 10).
        exclude_items: item ids that must not be found.
        exclude_seen: exclude the items of the history too.
        only_items: item ids that alone may be found; None for no such limit.
        only_categories: only items that have one of these names in their category path; empty for no such limit.
        only_brands: only items of one of these brands; empty for no such limit.
        price_min, price_max: only items whose price is known and not below or above; None for no such limit.
        in_stock_only: only items of the stock list.

    Raises:
        DataError: a value of a wrong type. All that `parse_request` takes is taken; None means the default.
    """

    query: str | None = None
    profile: Sequence[tuple[str, str]] = ()
    context: Sequence[tuple[str, str]] = ()
    history: Sequence[PastTurn] = ()
    k: int = 10
    num_beams: int | None = None
    exclude_items: Sequence[str] = ()
    exclude_seen: bool = False
    only_items: Sequence[str] | None = None
    only_categories: Sequence[str] = ()
    only_brands: Sequence[str] = ()
    price_min: float | None = None
    price_max: float | None = None
    in_stock_only: bool = False

    def __post_init__(self) -> None:
        _set(self, _checked(vars(self), UNLIMITED))

    @property
    def beams(self) -> int:
        """Beams of the search, with the default applied."""
        return max(self.k, 10) if self.num_beams is None else self.num_beams


@dataclass(frozen=True)
class RequestLimits:
    """The largest request that is read.

    Attributes:
        max_query_chars: characters of a query, also of past ones.
        max_value_chars: characters of a name or value of profile and context, of an item id or a category.
        max_pairs: pairs of a profile or context.
        max_history: past turns; the prompt takes the newest ones that its settings allow.
        max_items: ids in `exclude_items` and in `only_items`.
        max_categories: names in `only_categories` and in `only_brands`.
        max_k: items wanted. max_beams: beams.
    """

    max_query_chars: int = 1000
    max_value_chars: int = 200
    max_pairs: int = 50
    max_history: int = 1000
    max_items: int = 5000
    max_categories: int = 20
    max_k: int = 500
    max_beams: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name} must be at least 1, got {getattr(self, field.name)}; raise it.")


UNLIMITED = RequestLimits(*[MANY] * len(fields(RequestLimits)))
FIELDS = tuple(field.name for field in fields(SearchRequest))
_TURN_FIELDS = tuple(field.name for field in fields(PastTurn))
_PAIR_FIELDS = ("name", "value")


class NoJson(DataError):
    """The input is no JSON text at all, so there are no fields to speak of."""


def load_json(data: bytes) -> Any:
    """Bytes of a stranger as a JSON value, stricter than `json.loads`.

    Raises:
        NoJson: not UTF-8, not JSON, NaN or Infinity, a key that stands twice, or nesting beyond reason.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise NoJson(
            f"The request is not UTF-8 text (byte 0x{data[error.start]:02x} at place {error.start + 1}); encode it as "
            "UTF-8."
        ) from None
    except RecursionError:
        raise NoJson("The request is nested too deeply; send one flat JSON object.") from None
    except ValueError as error:
        reason = error.msg + f" at line {error.lineno}, column {error.colno}" if hasattr(error, "lineno") else error
        raise NoJson(f"The request is not valid JSON ({reason}); send one JSON object.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} stands twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def parse_request(values: Any, limits: RequestLimits | None = None) -> SearchRequest:
    """Makes a request from a JSON value; null means the default.

    Args:
        values: a mapping with the fields of `SearchRequest`. Pairs are a mapping name → text, or a list of
            `{"name": ..., "value": ...}` or of tuples; a turn of the history is an item id, a `PastTurn` or
            `{"item_id": ..., "query": ..., "context": ...}`.
        limits: default `RequestLimits()`.

    Raises:
        DataError: no mapping, an unknown field (the nearest known one is named), a wrong type, or beyond a limit.
    """
    limits = limits or RequestLimits()
    if not isinstance(values, dict):
        raise DataError(f'A request must be a JSON object such as {{"query": "red dress"}}, got {kind_of(values)}.')
    _known(values, FIELDS, "The request")
    request = SearchRequest(**_checked(values, limits))
    if request.beams > limits.max_beams:
        raise DataError(f"k is {request.k} but at most {limits.max_beams} beams are allowed; lower k.")
    return request


def _set(made: Any, values: dict[str, Any]) -> None:
    """Checked values into a frozen dataclass; what is not given gets its default."""
    for field in fields(made):
        object.__setattr__(made, field.name, values.get(field.name, field.default))


def _checked(values: dict[str, Any], limits: RequestLimits) -> dict[str, Any]:
    """The fields that are given (null is not), as `SearchRequest` holds them."""
    given = {name: value for name, value in values.items() if value is not None}
    made: dict[str, Any] = {}
    if "query" in given:
        made["query"] = _text(given["query"], "query", limits.max_query_chars)
    for name in ("profile", "context"):
        if name in given:
            made[name] = _pairs(given[name], name, limits)
    if "history" in given:
        turns = _list(given["history"], "history", limits.max_history, "turns")
        made["history"] = tuple(_turn(turn, f"history[{place}]", limits) for place, turn in enumerate(turns))
    for name, most in (("k", limits.max_k), ("num_beams", limits.max_beams)):
        if name in given:
            made[name] = _count(given[name], name, most)
    for name, most in (
        ("exclude_items", limits.max_items),
        ("only_items", limits.max_items),
        ("only_categories", limits.max_categories),
        ("only_brands", limits.max_categories),
    ):
        if name in given:
            made[name] = _texts(given[name], name, most, limits.max_value_chars)
    for name in ("exclude_seen", "in_stock_only"):
        if name in given:
            made[name] = _flag(given[name], name)
    for name in ("price_min", "price_max"):
        if name in given:
            made[name] = _number(given[name], name)
    if made.get("price_min", -math.inf) > made.get("price_max", math.inf):
        raise DataError(f"'price_min' is {made['price_min']:g}, above 'price_max' {made['price_max']:g}; swap them.")
    return made


def shown(value: Any, most: int = 60) -> str:
    """A stranger's value for a message: on one line, printable, cut to `most` characters."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= most else text[: most - 3] + "..."


def quoted(text: str) -> str:
    """A stranger's text for a message, in quotes; see `shown`."""
    inner = shown(str(text), most=10**9)[1:-1]
    return f"'{inner if len(inner) <= 60 else inner[:57] + '...'}'"


def kind_of(value: Any) -> str:
    """The JSON type of a value, in words."""
    if value is None:
        return "null"
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _known(values: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise DataError(f"{where} has the unknown field {quoted(key)}; {nearest(str(key)[:40], known)}")


def _text(value: Any, where: str, most: int) -> str:
    if not isinstance(value, str):
        raise DataError(f"'{where}' must be a text, got {shown(value)}.")
    if len(value) > most:
        raise DataError(f"'{where}' has {len(value)} characters; at most {most} are allowed, shorten it.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"'{where}' holds half a surrogate pair, which is no text; repair it.")
    return value


def _list(value: Any, where: str, most: int, what: str) -> Sequence[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value  # an array of numpy or Arrow
    if not isinstance(value, (list, tuple)):
        raise DataError(f"'{where}' must be a list, got {kind_of(value)}.")
    if len(value) > most:
        raise DataError(f"'{where}' has {len(value)} {what}; at most {most} are allowed, leave some out.")
    return value


def _texts(value: Any, where: str, most: int, chars: int) -> tuple[str, ...]:
    values = _list(value, where, most, "entries")
    return tuple(_text(one, f"{where}[{place}]", chars) for place, one in enumerate(values))


def _pairs(value: Any, where: str, limits: RequestLimits) -> tuple[tuple[str, str], ...]:
    if isinstance(value, dict):
        value = [{"name": name, "value": text} for name, text in value.items()]
    made = []
    for place, pair in enumerate(_list(value, where, limits.max_pairs, "pairs")):
        here = f"{where}[{place}]"
        if isinstance(pair, tuple) and len(pair) == len(_PAIR_FIELDS):  # JSON has none
            pair = dict(zip(_PAIR_FIELDS, pair, strict=True))
        if not isinstance(pair, dict):
            raise DataError(f"'{here}' must be an object with 'name' and 'value', got {kind_of(pair)}.")
        _known(pair, _PAIR_FIELDS, f"'{here}'")
        both = ("" if pair.get(key) is None else pair[key] for key in _PAIR_FIELDS)
        made.append(
            tuple(
                _text(text, f"{here}.{key}", limits.max_value_chars)
                for text, key in zip(both, _PAIR_FIELDS, strict=True)
            )
        )
    return tuple(made)


def _turn(value: Any, where: str, limits: RequestLimits) -> PastTurn:
    if isinstance(value, PastTurn):
        return value
    if isinstance(value, str):
        return PastTurn(_text(value, where, limits.max_value_chars))
    if not isinstance(value, dict):
        raise DataError(f"'{where}' must be an item id or an object with 'item_id', got {shown(value)}.")
    _known(value, _TURN_FIELDS, f"'{where}'")
    if value.get("item_id") is None:
        raise DataError(f"'{where}' has no 'item_id'; name the item of this turn.")
    return PastTurn(**_checked_turn(value, where, limits))


def _checked_turn(value: dict[str, Any], where: str, limits: RequestLimits) -> dict[str, Any]:
    query, context = value.get("query"), value.get("context")
    return {
        "item_id": _text(value["item_id"], f"{where}.item_id", limits.max_value_chars),
        "query": None if query is None else _text(query, f"{where}.query", limits.max_query_chars),
        "context": () if context is None else _pairs(context, f"{where}.context", limits),
    }


def _count(value: Any, where: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise DataError(f"'{where}' must be a whole number, got {shown(value)}.")
    if not 1 <= value <= most:
        raise DataError(f"'{where}' must be between 1 and {most}, got {shown(value)}.")
    return int(value)


def _number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:  # JSON has whole numbers of any length
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"'{where}' must be a number, got {shown(value)}.")
    return number


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"'{where}' must be true or false, got {shown(value)}.")
    return value
