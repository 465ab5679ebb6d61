"""Rows → text by Jinja2 templates that a user can edit.

A request is one *turn*: `turn.jinja` renders query and context, and the semantic ID of the item follows. A history is
`head.jinja` (the user) and one turn per past action, so a past request reads exactly as it did when it was the
target. Every value is sanitised when it enters a template and whatever an expression prints is sanitised again, so
only the template's own text (and the semantic IDs we put there) can hold added tokens. Where a field and the text
around it form one, they are parted.

Differs from the prompts of OneSearch and LC-Rec (one long instruction per target) in that the history is a multi-turn
conversation, which lets one pass learn every next item. Our choice. The templates are described in
`templates/README.md`.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from sidtune.core.errors import ConfigError, nearest
from sidtune.data_builders.prompts.encoding import is_sid, token_ids
from sidtune.data_builders.prompts.sanitizer import SEPARATORS, Piece, Sanitizer

ITEM_FIELDS = ("title", "brand", "category", "attributes", "price", "description")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "head.jinja": ("profile",),
    "turn.jinja": ("query", "context", "query_sid"),
    "item.jinja": ITEM_FIELDS,
    "item_to_sid.jinja": ITEM_FIELDS,
    "sid_to_item.jinja": ("sid",),
    "sid_to_category.jinja": ("sid",),
    "text_to_category.jinja": ITEM_FIELDS,
    "query_to_sid.jinja": ("query",),
    "query_to_item_text.jinja": ("query",),
    "item_text_to_query.jinja": ITEM_FIELDS,
    "answer.jinja": ("text", "eos"),
}
MAX_CHARS = {
    "title": 120,
    "brand": 40,
    "category": 40,
    "category_path": 120,
    "attributes": 40,
    "description": 200,
    "query": 80,
    "context": 40,
    "profile": 40,
}
BUILT_IN = ("plain", "chatml")
VARIANTS = {"compact": "plain"}  # built-in sets that change some files of another
_FOLDER = Path(__file__).parent / "templates"
# Private-use characters mark the parts of a rendered text; a sanitised field never holds one.
_FIELD, _SID, _END = "\ue000", "\ue001", "\ue002"
_MARKS = (_FIELD, _SID, _END)
_SPAN = re.compile(f"([{_FIELD}{_SID}])([^{_FIELD}{_SID}{_END}]*){_END}")
_CACHE_SIZE = 200_000


class _Clean(str):
    """A text that has been sanitised."""

    __slots__ = ()


class _Sid(str):
    """A semantic ID, which becomes a piece of its own."""

    __slots__ = ()


class _Trusted(str):
    """A token of ours, printed as template text."""

    __slots__ = ()


class Serializer:
    """Renders users, requests and items for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer with the SID tokens in it. None renders for the training of a new
            tokenizer: no eos, and nothing is checked against added tokens.
        templates: `plain` (short, for small models), `compact` (shorter still: context values without their names),
            `chatml` (multi-turn `<|im_start|>` blocks), or a folder whose `.jinja` files override those of `plain`.
        max_chars: longest field in characters, by field name; overrides single entries of `MAX_CHARS` (None: no
            limit).
        history_context: whether turns of the history show the context of their request. With false only the target
            turn does, which saves tokens and rules out whole-history training, where every turn is both.
        query_sids: gives the SID text of each query of a list, such as a `QueryCoder`; turns then show it
            behind the query (`query_sid`). Default: no turn shows one.

    Raises:
        ConfigError: unknown templates, template file, variable or field name; a template that does not compile or
            render; ChatML without its tokens; query SIDs that are none of this tokenizer, or that no template shows.
    """

    def __init__(
        self,
        tokenizer: Any,
        templates: str | Path = "plain",
        max_chars: Mapping[str, int | None] | None = None,
        history_context: bool = True,
        query_sids: Callable[[Sequence[str]], Sequence[str]] | None = None,
    ) -> None:
        for name in max_chars or {}:
            if name not in MAX_CHARS:
                raise ConfigError(f"max_chars names the unknown field '{name}': {nearest(name, MAX_CHARS)}")
            most = (max_chars or {})[name]
            if most is not None and (not isinstance(most, int) or most < 0):
                raise ConfigError(f"max_chars.{name} must be 0 or more characters, or null for all, got {most!r}.")
        self.tokenizer = tokenizer
        self.history_context = history_context
        self.max_chars: dict[str, int | None] = {**MAX_CHARS, **(max_chars or {})}
        self.sanitizer = Sanitizer(tokenizer)
        self.query_sids = query_sids
        self._paths, self.sources = _load(templates)
        self._environment = ImmutableSandboxedEnvironment(
            loader=jinja2.FunctionLoader(lambda name: (self.sources[name], name, lambda: True)),
            undefined=jinja2.StrictUndefined,
            finalize=self._print,
        )
        self._templates = {name: self._compile(name) for name in TEMPLATES}
        self._turns: dict[Any, Piece] = {}
        self._heads: dict[Any, Piece] = {}
        self._literals: dict[str, bool] = {}
        self._eos = "" if tokenizer is None else tokenizer.eos_token
        self._try(chatml=str(templates) == "chatml")

    def head(self, user_row: Mapping[str, Any] | None) -> Piece:
        """What opens a history: the user's profile. A null row or profile renders as an unknown user."""
        pairs = _pairs((user_row or {}).get("profile"))
        return self._remembered(self._heads, pairs, "head.jinja", lambda: {"profile": self._named(pairs, "profile")})

    def turn(self, query: str | None, context: Iterable[Mapping[str, Any]] | None) -> Piece:
        """A request up to its semantic ID.

        Null query and no context render very short; the built-in templates: nothing.
        """
        pairs = _pairs(context)
        return self._remembered(self._turns, (query, pairs), "turn.jinja", lambda: self._turn_fields(query, pairs))

    def item(self, item_row: Mapping[str, Any]) -> Piece:
        """The text of an item. Empty when the item has no text at all."""
        return self._one("item.jinja", self.item_fields(item_row))

    def prompt(self, task: str, **fields: Any) -> list[Piece]:
        """The prompt of a task, cut at the semantic IDs in it, which are pieces of their own.

        Args:
            task: name of a template, such as `item_to_sid`.
            **fields: raw values of the variables of the template; `sid` is the SID text of an item; item columns may
                be null.

        Raises:
            ConfigError: no such template, or a field it does not know.
        """
        name = f"{task}.jinja"
        if name not in TEMPLATES:
            raise ConfigError(
                f"There is no template for the task '{task}': {nearest(task, [n[:-6] for n in TEMPLATES])}"
            )
        known = TEMPLATES[name]
        for key in fields:
            if key not in known:
                raise ConfigError(f"The template {name} has no variable '{key}': {nearest(key, known)}")
        values: dict[str, Any] = {}
        if set(known) & set(ITEM_FIELDS):
            values.update(self.item_fields(fields))
        if "query" in known:
            values["query"] = self._field(fields.get("query"), "query")
        if "sid" in known:
            values["sid"] = _Sid(fields.get("sid") or "")
        return self._pieces(name, values)

    def answer(self, text: str | None, field: str = "title") -> Piece:
        """A free-text completion: the text, sanitised as `field`, and the tokenizer's eos.

        Raises:
            ConfigError: the tokenizer has no eos token, so a completion could not end.
        """
        if self._eos is None:
            raise ConfigError("This tokenizer has no eos token, which ends a text completion; set tokenizer.eos_token.")
        return self._one("answer.jinja", {"text": self._field(text, field), "eos": _Trusted(self._eos)})

    def field(self, text: str | None, name: str) -> str:
        """One sanitised field, cut to its `max_chars`."""
        return str(self._field(text, name))

    def item_fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The sanitised variables of an item template; absent columns are empty."""
        price = row.get("price")
        category = (self._field(level, "category") for level in row.get("category") or ())
        return {
            "title": self._field(row.get("title"), "title"),
            "brand": self._field(row.get("brand"), "brand"),
            "category": [level for level in category if level],
            "attributes": self._named(_pairs(row.get("attributes")), "attributes"),
            "price": _Clean("" if price is None else self.sanitizer.clean(f"{price:.2f}".removesuffix(".00"))),
            "description": self._field(row.get("description"), "description"),
        }

    def literal_ids(self) -> list[int]:
        """Added-token ids that the text of the templates may hold, eos and the SIDs of queries among them, ascending."""
        if self.tokenizer is None:
            return []
        texts = [node.data for source in self.sources.values() for node in _template_text(self._environment, source)]
        texts += filter(is_sid, self.sanitizer.contents) if self.query_sids else []
        found = {i for ids in token_ids(self.tokenizer, [*texts, self._eos or ""]) for i in ids}
        return sorted(found & self.sanitizer.ids)

    def save_templates(self, folder: str | Path) -> None:
        """Writes all templates as they are in use, so that the folder can be given as `templates` again."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, source in self.sources.items():
            (Path(folder) / name).write_text(source, encoding="utf-8")

    # -- fields

    def _field(self, text: str | None, name: str) -> _Clean:
        return _Clean(self.sanitizer.clean(None if text is None else str(text), self.max_chars[name]))

    def _named(self, pairs: tuple[tuple[str, str], ...], field: str) -> list[dict[str, _Clean]]:
        named = [{"name": self._field(name, field), "value": self._field(value, field)} for name, value in pairs]
        return [pair for pair in named if pair["value"]]

    def _turn_fields(self, query: str | None, pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
        words = self._field(query, "query")
        sid = self._query_sid(query) if words and self.query_sids else _Clean()
        return {"query": words, "context": self._named(pairs, "context"), "query_sid": sid}

    def _query_sid(self, query: str) -> str:
        """The SID of a query: text of ours, whatever the query says."""
        sid = self.query_sids([query])[0]
        if sid and not (is_sid(sid) and len(self.sanitizer.added(sid)) == sid.count("<")):
            raise ConfigError(f"'{sid[:80]}' is no SID of this tokenizer; code queries as the items it was made for.")
        return _Trusted(sid)

    def _print(self, value: Any) -> str:
        if isinstance(value, _Sid):
            return f"{_SID}{value}{_END}"
        if isinstance(value, _Trusted):
            return value
        if not isinstance(value, _Clean):
            value = "" if value is None else self.sanitizer.clean(str(value))
        return f"{_FIELD}{value}{_END}" if value else ""

    # -- rendering

    def _remembered(self, cache: dict[Any, Piece], key: Any, name: str, fields: Any) -> Piece:
        piece = cache.get(key)
        if piece is None:
            if len(cache) >= _CACHE_SIZE:
                cache.clear()
            piece = cache[key] = self._one(name, fields())
        return piece

    def _one(self, name: str, values: dict[str, Any]) -> Piece:
        pieces = self._pieces(name, values)
        return pieces[0]

    def _pieces(self, name: str, values: dict[str, Any]) -> list[Piece]:
        rendered = self._render(name, values)
        pieces: list[Piece] = []
        spans: list[tuple[bool, str]] = []
        place = 0
        for match in _SPAN.finditer(rendered):
            spans.append((False, rendered[place : match.start()]))
            place = match.end()
            if match[1] == _FIELD:
                spans.append((True, match[2]))
            else:
                pieces += [self._join(spans), Piece(match[2], [match[2]])]
                spans = []
        spans.append((False, rendered[place:]))
        if any(mark in text for is_field, text in spans if not is_field for mark in _MARKS):
            raise self._error(name, None, "cuts through a field; put filters on the fields, not on blocks around them")
        return [*pieces, self._join(spans)]

    def _join(self, spans: list[tuple[bool, str]]) -> Piece:
        """Puts fields and template text together and parts them where, together, they form an added token."""
        piece = _joined(spans, "")
        if self.tokenizer is None or not (self.sanitizer.exact or any(self._is_risky(text) for text in piece.literals)):
            return piece
        fields = [place for place, (is_field, _) in enumerate(spans) if is_field]
        for attempt in (*SEPARATORS, *fields):
            if self.sanitizer.agrees(piece):
                return piece
            if isinstance(attempt, int):
                spans = [*spans[:attempt], (False, ""), *spans[attempt + 1 :]]
                piece = _joined(spans, "")
            else:
                piece = _joined(spans, attempt)
        return piece

    def _is_risky(self, literal: str) -> bool:
        if literal not in self._literals:
            self._literals[literal] = self.sanitizer.risky(literal)
        return self._literals[literal]

    def _render(self, name: str, values: dict[str, Any]) -> str:
        try:
            return self._templates[name].render(values)
        except (
            jinja2.TemplateError,
            SecurityError,
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            ArithmeticError,
        ) as error:
            line = _line(error, set(self.sources))
            raise self._error(name, line, f"cannot be rendered ({' '.join(str(error).split())})") from None

    # -- checks at the start

    def _compile(self, name: str) -> jinja2.Template:
        try:
            tree = self._environment.parse(self.sources[name], name, name)
            for other in meta.find_referenced_templates(tree):
                if other not in TEMPLATES:
                    raise self._error(
                        name, None, f"includes '{other}', which does not exist: {nearest(str(other), TEMPLATES)}"
                    )
            known = TEMPLATES[name]
            for variable in sorted(meta.find_undeclared_variables(tree)):
                if variable not in known:
                    line = next((n.lineno for n in tree.find_all(nodes.Name) if n.name == variable), None)
                    raise self._error(
                        name, line, f"uses the unknown variable '{variable}' ({nearest(variable, known)})"
                    )
            return self._environment.get_template(name)
        except jinja2.TemplateSyntaxError as error:
            known = error.name if error.name in TEMPLATES else name
            raise self._error(known, error.lineno, f"is no valid Jinja2 ({error.message})") from None

    def _error(self, name: str, line: int | None, what: str) -> ConfigError:
        place = f"{self._paths[name]}, line {line}" if line else f"{self._paths[name]}"
        variables = ", ".join(TEMPLATES[name])
        return ConfigError(f"The template {place} {what}; the variables of {name} are: {variables}.")

    def _try(self, chatml: bool) -> None:
        """Renders every template with full and with empty values, so that a mistake shows before any work."""
        if self.query_sids and "query_sid" not in self.sources["turn.jinja"]:
            raise self._error("turn.jinja", None, "does not show 'query_sid', but queries shall have SIDs; print it")
        if chatml and self.tokenizer is not None:
            missing = [t for t in ("<|im_start|>", "<|im_end|>") if t not in self.sanitizer.contents]
            if missing:
                raise ConfigError(
                    f"The chatml templates need the token {missing[0]}, which this tokenizer does not have; use "
                    "templates: plain, or add the token to the tokenizer."
                )
        word = "some words"
        pair = [{"name": word, "value": word}]
        full = dict.fromkeys(ITEM_FIELDS, word) | {"category": [word, word], "attributes": pair, "price": 1.0}
        for item, pairs, query in ((full, pair, word), ({}, None, None)):
            self.turn(query, pairs)
            self.item(item)
            for name, known in TEMPLATES.items():
                task = name.removesuffix(".jinja")
                if task in ("head", "turn", "item", "answer"):
                    continue
                fields = {"query": query, "sid": "<a_0>", **{key: item.get(key) for key in ITEM_FIELDS}}
                if not "".join(self.prompt(task, **{key: fields[key] for key in known})):
                    raise self._error(
                        name, None, "renders to nothing when the fields are empty; let it print some text"
                    )
            if not self.head({"profile": pairs}):
                raise self._error(
                    "head.jinja", None, "renders to nothing; a user without history needs some text to start from"
                )
        if self._eos is not None:
            self.answer("a")


def _joined(spans: Sequence[tuple[bool, str]], separator: str) -> Piece:
    text, literals, run = "", [], ""
    before = False
    for is_field, part in spans:
        if not part:
            continue
        if separator and text and (is_field or before) and not text[-1].isspace() and not part[0].isspace():
            text += separator
        text += part
        if is_field and run:
            literals.append(run)
        run = "" if is_field else run + part
        before = is_field
    return Piece(text, [*literals, run] if run else literals)


def _pairs(pairs: Iterable[Mapping[str, Any]] | None) -> tuple[tuple[str, str], ...]:
    return tuple((pair["name"] or "", pair["value"] or "") for pair in pairs or () if pair)


def _template_text(environment: jinja2.Environment, source: str) -> Iterable[nodes.TemplateData]:
    return environment.parse(source).find_all(nodes.TemplateData)


def _line(error: BaseException, names: set[str]) -> int | None:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in names]
    return lines[-1] if lines else None


def _load(templates: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """Names → where each template came from, names → source."""
    base, folder = "plain", Path(templates)
    if str(templates) in VARIANTS:
        base, folder = VARIANTS[str(templates)], _FOLDER / str(templates)
    if str(templates) in BUILT_IN:
        base, own = str(templates), {}
    elif folder.is_dir():
        own = {path.name: path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.suffix != ".md"}
    else:
        known = (*BUILT_IN, *VARIANTS)
        raise ConfigError(
            f"The templates '{templates}' are neither a folder nor built in: {nearest(str(templates), known)} "
            f"Give one of {', '.join(known)}, or the path of a folder of .jinja files."
        )
    for name in own:
        if name not in TEMPLATES:
            raise ConfigError(
                f"The template folder {folder} holds the unknown file '{name}': {nearest(name, TEMPLATES)}"
            )
    paths = {name: own.get(name, _FOLDER / base / name) for name in TEMPLATES}
    sources = {}
    for name, path in paths.items():
        try:
            sources[name] = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The template {path} cannot be read as UTF-8 text ({error}); write it again.") from None
        if any(mark in sources[name] for mark in _MARKS):
            raise ConfigError(f"The template {path} holds a private-use character (U+E000 to U+E002); remove it.")
    shown = {name: str(path) if name in own else f"{base}/{name}" for name, path in paths.items()}
    return shown, sources
