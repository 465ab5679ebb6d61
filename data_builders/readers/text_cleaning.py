"""Plain text out of shop HTML: tags, comments, scripts, style sheets and entities go, the words stay.

Catalogue text comes from strangers: half of a page, broken mark-up, CSS rules without their `<style>`. Cleaning is
our choice of rules (no paper prescribes one) and its time is linear in the length of the text: the text is scanned by
`str.find`, and no pattern can backtrack.

What it is not: protection of the prompt. A title may still spell a SID or chat token; the serializer neutralises those.
"""

from __future__ import annotations

import ast
import html
import re
import warnings

# Each pass removes one layer of escaping ("&amp;lt;b&amp;gt;" has two); the bound keeps the time linear.
_MAX_LAYERS = 6
_MAX_LITERAL = 1_000_000

_INLINE_TAGS = "a abbr b big em font i ins mark s small span strike strong sub sup u"
_INLINE = frozenset(_INLINE_TAGS.split())
_SILENT = ("script", "style")
_SELECTOR_WORDS = """
a b body div dl dt dd em font form h1 h2 h3 h4 h5 h6 hr html i img li ol p span strong table tbody td th tr ul > + ~ * ,
"""
_SELECTORS = frozenset(_SELECTOR_WORDS.split())
_TAG_NAME = re.compile(r"</?([a-zA-Z][a-zA-Z0-9]*)")
_OPEN_END = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]{0,15}\s{0,3}/?$")
_BLOCK = re.compile(r"\{([^{}]*)\}")
# html.unescape fails on numbers beyond Python's digit limit.
_HUGE_ENTITY = re.compile(r"&#[xX]?[0-9a-fA-F]{9,};?")
_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), " ")
# `str.lower` changes the length of a few texts, and with it every position after.
_ASCII_LOWER = {code: code + 32 for code in range(65, 91)}
_LIST_SEAM = re.compile(r"""(['"]), (['"])""")


def clean_html(text: str | None) -> str:
    """Turns HTML (or plain text with stray mark-up) into plain text on one line.

    Removes comments, `<script>`/`<style>` with their content, every tag (block tags leave a space, inline tags
    nothing), CSS rules that stand outside a style sheet, entities (decoded, up to six layers of escaping) and control
    characters; collapses white space. A `<` that opens no tag ("uses <2W", "a < b") stays.

    Args:
        text: the dirty text; None counts as empty.

    Returns:
        The clean text, possibly empty. Time is linear in `len(text)`.

    >>> clean_html("<p>A <b>2&quot;</b> pipe,<br>uses <2W</p>")
    'A 2" pipe, uses <2W'
    """
    if not text:
        return ""
    for _ in range(_MAX_LAYERS):
        before = text
        if "<" in text:
            text = _drop_tags(text)
        if "&" in text:
            text = html.unescape(_HUGE_ENTITY.sub(" ", text))
        if text == before:
            break
    if "{" in text:
        text = _drop_css(text)
    return " ".join(text.translate(_CONTROL).split())


def _drop_tags(text: str) -> str:
    """Removes comments, declarations, silent elements and tags in one walk from left to right."""
    kept: list[str] = []
    lower = ""
    missing: set[str] = set()  # endings known not to occur any more, so that no search is repeated in vain
    here = 0
    while True:
        start = text.find("<", here)
        if start < 0:
            kept.append(text[here:])
            return "".join(kept)
        kept.append(text[here:start])
        if text.startswith("<!--", start):
            here = _after(text, "-->", start + 4, missing)
            here = len(text) if here < 0 else here
            kept.append(" ")
            continue
        name = _TAG_NAME.match(text, start)
        if name is None and not text.startswith(("<!", "<?"), start):
            kept.append("<")
            here = start + 1
            continue
        end = _after(text, ">", start + 1, missing)
        if end < 0:
            # An unclosed tag name at the very end ("<br") is mark-up; anything longer is text.
            kept.append(" " if _OPEN_END.match(text, start) else "<")
            here = len(text) if _OPEN_END.match(text, start) else start + 1
            continue
        here = end
        tag = name.group(1).lower() if name else ""
        if tag in _SILENT and text[start + 1] != "/":
            lower = lower or text.translate(_ASCII_LOWER)
            closing = _after(lower, f"</{tag}", here, missing)
            here = len(text) if closing < 0 else closing
            if closing >= 0:
                rest = _after(text, ">", here, missing)
                here = len(text) if rest < 0 else rest
        kept.append("" if tag in _INLINE else " ")


def _after(text: str, ending: str, start: int, missing: set[str]) -> int:
    """Place after the next `ending`, or -1; remembers endings that no longer occur."""
    if ending in missing:
        return -1
    place = text.find(ending, start)
    if place < 0:
        missing.add(ending)
        return -1
    return place + len(ending)


def _drop_css(text: str) -> str:
    """Removes `selector {property: value}` rules left in running text, innermost braces first (three levels)."""
    text = _drop_css_comments(text)
    for _ in range(3):
        kept: list[str] = []
        here, removed = 0, False
        for block in _BLOCK.finditer(text):
            rule = block.group(1)
            before, here_next = text[here : block.start()], block.end()
            is_rule = ":" in rule or not rule.strip()
            prose, selectors = _split_selector(before) if is_rule else (before, 0)
            if selectors or (is_rule and ";" in rule):
                kept.append(prose + " ")
                removed = True
            else:
                kept.append(text[here:here_next])
            here = here_next
        if not removed:
            return text
        text = "".join(kept) + text[here:]
    return text


def _drop_css_comments(text: str) -> str:
    kept: list[str] = []
    here = 0
    while (start := text.find("/*", here)) >= 0 and (end := text.find("*/", start + 2)) >= 0:
        kept.append(text[here:start])
        here = end + 2
    return " ".join([*kept, text[here:]])


def _split_selector(text: str) -> tuple[str, int]:
    """Takes CSS selector words (`.headerM`, `hr.dashed`, `ul,`, `@media`) off the end: the rest, and how many there
    were."""
    words = text.split()
    count = len(words)
    while words:
        word = words[-1].strip(",").lower()
        element = word.split(".")[0].split("#")[0].split(":")[0]
        is_class = word[:1] in (".", "#", "@") and len(word) > 1
        is_element = element in _SELECTORS and len(word) > len(element)
        if not (is_class or is_element or word in _SELECTORS or not word):
            break
        words.pop()
    for back in range(1, min(4, len(words)) + 1):
        if words[-back].startswith("@") and "{" not in words[-back:]:  # "@media screen and"
            del words[-back:]
            break
    return " ".join(words), count - len(words)


def parse_list_text(text: str | None) -> tuple[list[str], bool]:
    """Reads a Python list that was written as text (`"['one', 'two']"`), without ever evaluating code.

    Sources such as the Amazon dumps write descriptions this way; some are not valid lists because of unescaped quotes.

    Args:
        text: the text; None or empty gives an empty list.

    Returns:
        The parts, and whether the text was a proper list (or plain text); a broken list gives its raw content as one
        part.
    """
    text = (text or "").strip()
    if not text.startswith("["):
        return ([text] if text else []), True
    if len(text) <= _MAX_LITERAL:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = ast.literal_eval(text)
            if isinstance(value, list) and all(isinstance(part, str) for part in value):
                return value, True
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            pass
    inner = text.removeprefix("[").removesuffix("]").strip().strip("'\"")
    inner = _LIST_SEAM.sub(" ", inner).replace("\\n", " ").replace("\\t", " ").replace("\\'", "'").replace('\\"', '"')
    return ([inner] if inner else []), False
