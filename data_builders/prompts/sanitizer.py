"""Text is data: titles, queries and profiles come from strangers and must never act as tokens of the model.

`Sanitizer.clean` returns a text that, encoded by the tokenizer at hand, holds none of its added tokens: no semantic
ID, no chat marker, no bos/eos/pad, no `[SEP]`, no word somebody added. Two layers:

1. *By character.* The first (and closing) punctuation of every added token is replaced by a lookalike, in every
   Unicode form that normalises to it; control, format, private and unassigned characters are dropped; white space
   runs become one space. With such characters gone, a field cannot hold an added token, nor the half of one that a
   neighbour completes.
2. *By the tokenizer.* Where the characters alone prove nothing (added plain words, unusual normalisers, a vocabulary
   with an unknown token), each text is encoded and every added token found is broken up, until there is none.

Characters the tokenizer has no token for (`[UNK]`) lose their accents or are dropped: they tell the model nothing. Our
choice, no paper.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from sidtune.core.errors import DataError
from sidtune.data_builders.prompts.encoding import token_ids, token_spans

_DROPPED_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn")
# Invisible although their category is a mark or a letter: joiner, fillers, vowel inherents, variation selectors.
_INVISIBLE = frozenset(
    [0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10)]
) | frozenset(range(0xE0100, 0xE01F0))
_LOOKALIKES = {
    "<": "‹(",
    ">": "›)",
    "[": "⁅(",
    "]": "⁆)",
    "{": "❴(",
    "}": "❵)",
    "(": "❨",
    ")": "❩",
    "|": "¦/",
    "_": "-",
    "-": "–",
}
SEPARATORS = (" ", "-", "/", ".", "·")
_CHARACTERWISE = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"}
_ROUNDS = 8
_WORD_PART = 50
_LOOK_EVERY = 256


def added_token_ids(tokenizer: Any) -> np.ndarray:
    """Ids of all added and special tokens of a tokenizer, the unknown token among them, (A,) int64, ascending."""
    return np.array(sorted(set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)), np.int64)


class Piece(str):
    """A rendered text that remembers which parts of it the template wrote.

    Attributes:
        literals: the maximal runs of template text, in order; added tokens may stem from them only.
    """

    __slots__ = ("literals",)
    literals: tuple[str, ...]

    def __new__(cls, text: str, literals: Iterable[str] = ()) -> Piece:
        piece = super().__new__(cls, text)
        piece.literals = tuple(literals)
        return piece


class _Characters(dict):
    """Table for `str.translate`, filled on demand."""

    def __init__(self, decide: Callable[[str], str | None]) -> None:
        super().__init__()
        self._decide = decide

    def __missing__(self, code: int) -> str | None:
        self[code] = result = self._decide(chr(code))
        return result


def _state(component: Any) -> dict[str, Any]:
    return {} if component is None else json.loads(component.__getstate__())


def _parts(state: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [part for inner in state[key] for part in _parts(inner, key)] if key in state else [state] if state else []


class Sanitizer:
    """Makes field texts harmless for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer, with all added tokens (SIDs, chat markers) in it already. None knows no
            tokens and only tidies white space, control characters and angle brackets: for the texts a new tokenizer
            is trained on.
        cache_size: how many distinct texts are remembered.

    >>> Sanitizer(None).clean("a  red\\tlamp\\x00", 40)
    'a red lamp'
    """

    def __init__(self, tokenizer: Any, cache_size: int = 1 << 16) -> None:
        self.tokenizer = tokenizer
        self._misses = 0
        self._cached = lru_cache(maxsize=cache_size)(self._clean)
        self._added_cached = lru_cache(maxsize=1024)(self._added)
        self.ids = frozenset() if tokenizer is None else frozenset(added_token_ids(tokenizer).tolist())
        self._unknown = None if tokenizer is None else tokenizer.unk_token_id
        self._size = 0 if tokenizer is None else len(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
        self._normalizer = None if backend is None else backend.normalizer
        contents = [] if tokenizer is None else [str(token) for token in tokenizer.added_tokens_decoder.values()]
        contents += [] if tokenizer is None else [str(token) for token in tokenizer.all_special_tokens]
        self.contents = tuple(sorted({content for content in contents if content}))
        self._blank_tokens = any(not content.strip() for content in self.contents)
        self._replacement: dict[str, str] = {}
        self._ban()
        self._table = _Characters(self._decide)
        self.exact = tokenizer is not None and not self._characters_suffice(backend)

    def clean(self, text: str | None, max_chars: int | None = None) -> str:
        """A field text that encodes to no added token; null becomes "".

        Args:
            text: any text.
            max_chars: longest result, in characters, cut at a word where one ends in the second half; None does not
                cut.

        Raises:
            DataError: the tokenizer has grown since this sanitizer was made (looked at every 256 new texts).
        """
        return "" if not text else self._cached(text, max_chars)

    def added(self, text: str) -> list[int]:
        """Added-token ids in the encoding of `text`, in order; the unknown token is left out."""
        return [] if self.tokenizer is None else self._added(text)

    def _added(self, text: str) -> list[int]:
        return [i for i in token_ids(self.tokenizer, [text])[0] if i in self.ids and i != self._unknown]

    def agrees(self, piece: str) -> bool:
        """Whether the added tokens of an encoded piece are exactly those of its template text."""
        literals = getattr(piece, "literals", ())
        return self.added(piece) == [i for literal in literals for i in self._added_cached(literal)]

    def risky(self, literal: str) -> bool:
        """Whether template text holds, outside of whole added tokens, a character that opens or closes one."""
        if self.tokenizer is None:
            return False
        for content in sorted(self.contents, key=len, reverse=True):
            if content.strip():
                literal = literal.replace(content, "")
        return any(self._banned_form(char) is not None for char in literal)

    def _ban(self) -> None:
        normal = self._normal
        ends = set("<>") if self.tokenizer is None else set()
        for content in self.contents:
            for form in {
                content,
                normal(content),
                *(unicodedata.normalize(f, content) for f in ("NFC", "NFD", "NFKC")),
            }:
                if form.strip() and _is_punctuation(form[0]):
                    ends.add(form[0])
                    if _is_punctuation(form[-1]):
                        ends.add(form[-1])
        self._replacement = dict.fromkeys(ends, " ")
        for char in ends:
            self._replacement[char] = next((c for c in _LOOKALIKES.get(char, "") if self._harmless(c)), " ")

    def _harmless(self, char: str) -> bool:
        if self._banned_form(char) is not None:
            return False
        return self.tokenizer is None or not self.ids.intersection(token_ids(self.tokenizer, [char])[0])

    def _normal(self, text: str) -> str:
        return text if self._normalizer is None else self._normalizer.normalize_str(text)

    def _forms(self, char: str) -> set[str]:
        forms = {unicodedata.normalize(form, char) for form in ("NFC", "NFD", "NFKC", "NFKD")}
        forms |= {char, char.casefold(), char.lower(), char.upper(), self._normal(char)}
        return forms

    def _banned_form(self, char: str) -> str | None:
        if char in self._replacement:
            return char
        return next((c for form in self._forms(char) for c in sorted(form) if c in self._replacement), None)

    def _decide(self, char: str) -> str | None:
        category = unicodedata.category(char)
        if char.isspace() or category.startswith("Z"):
            return " "
        if category in _DROPPED_CATEGORIES or ord(char) in _INVISIBLE:
            return None
        banned = self._banned_form(char)
        if banned is not None:
            return self._replacement[banned]
        if self._blank_tokens and any(c.isspace() for form in self._forms(char) for c in form):
            return " "
        return char

    def _characters_suffice(self, backend: Any) -> bool:
        """Whether layer 1 is a proof: byte-level BPE, character-wise normaliser, and punctuation-led added tokens."""
        if backend is None or not isinstance(backend.model, BPE):
            return False
        if not {part["type"] for part in _parts(_state(backend.normalizer), "normalizers")} <= _CHARACTERWISE:
            return False
        splitters = {part["type"] for part in _parts(_state(backend.pre_tokenizer), "pretokenizers")}
        if "ByteLevel" not in splitters or any(backend.token_to_id(char) is None for char in ByteLevel.alphabet()):
            return False
        marked = {form for content in self.contents for form in (content, self._normal(content)) if content.strip()}
        if any(form != form.strip() or form[:1] not in self._replacement for form in marked):
            return False
        # A non-ASCII content that is also a BPE entry stands for bytes there, which other characters can hold too.
        if any(not content.isascii() and backend.model.token_to_id(content) is not None for content in self.contents):
            return False
        blanks = [content for content in self.contents if not content.strip()]
        ordered = sorted(marked)
        nested = any(longer.startswith(shorter) for shorter, longer in zip(ordered, ordered[1:], strict=False))
        return " " not in blanks and not nested

    def _clean(self, text: str, max_chars: int | None) -> str:
        self._misses += 1
        # The length of a tokenizer costs more than the cleaning itself, so it is looked at now and then.
        if self._misses % _LOOK_EVERY == 1 and self.tokenizer is not None and len(self.tokenizer) != self._size:
            raise DataError("The tokenizer has got new tokens since its Sanitizer was made; make a new Sanitizer.")
        if max_chars is not None:
            text = text[: 8 * max_chars + 256]
        text = _shorten(" ".join(text.translate(self._table).split()), max_chars)
        if not self.exact or not text:
            return text
        text = self._broken(text)
        if max_chars is not None and len(text) > max_chars:
            text = self._broken(_shorten(text, max_chars))
            text = "" if len(text) > max_chars else text
        return text

    def _dirty(self, text: str) -> bool:
        return not self.ids.isdisjoint(token_ids(self.tokenizer, [text])[0])

    def _broken(self, text: str) -> str:
        for separator in (*SEPARATORS, *[""] * (_ROUNDS - len(SEPARATORS))):
            if not self._dirty(text):
                return text
            spans = token_spans(self.tokenizer, text)
            if spans is None:
                break
            for token, start, end in reversed([span for span in spans if span[0] in self.ids]):
                text = text[:start] + self._break(token, text[start:end], separator) + text[end:]
            text = " ".join(text.translate(self._table).split())
        words = " ".join(word for word in text.split() if not self._dirty(word))
        return "" if self._dirty(words) else words

    def _base(self, char: str) -> str:
        """The letter below an accent where the tokenizer knows only that; otherwise nothing."""
        base = "".join(c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c))
        return base if base and not self._dirty(base) else ""

    def _break(self, token: int, found: str, separator: str) -> str:
        if token == self._unknown and separator:
            known = "".join(char if char.isspace() or not self._dirty(char) else self._base(char) for char in found)
            if known != found:
                return known
            step = max(1, min(_WORD_PART, len(found) // 2))
            return " ".join(found[i : i + step] for i in range(0, len(found), step))
        word = found.strip()
        if not separator or len(word) < 2:
            return " "
        return found.replace(word, word[: len(word) // 2] + separator + word[len(word) // 2 :])


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char)[0] in "PS"


def _shorten(text: str, max_chars: int | None) -> str:
    if max_chars is None or len(text) <= max_chars:
        return text
    cut = text[:max_chars]
    if text[max_chars] != " " and (space := cut.rfind(" ")) >= max_chars // 2:
        cut = cut[:space]
    return cut.strip()
