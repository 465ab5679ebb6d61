"""Reasoning before the answer: prompt, <think>, a short text about the request, </think>, semantic ID, eos.

CRS (`specs/crs_debiased_grpo.md` 2.4) starts from a small set of high-quality reasonings; who wrote them is not known. Offline
they are templated here from what the request itself shows: its words, its place and time, the latest item, and the category,
brand and price level its user mostly acted on before. Reasonings of any teacher come as a JSON-lines file instead:

    {"request_id": "r17", "reasoning": "wants a small lamp, usually buys Nordby", "item_id": "i3"}     # item_id is optional

What the model learns is `<think>`, the reasoning, `</think>`, the SID and eos; the prompt is that of any other request. No
reasoning may hold the SID or the title of its target (leak check, 2.4 iv): the model would learn to copy an answer that nobody
gives it when it serves.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.folders import fingerprint, read_json_lines
from sidtune.core.ragged import owners
from sidtune.data_builders.prompts.encoding import encoder_of, token_ids
from sidtune.data_builders.tables.columns import encode, one_array, rows_of
from sidtune.data_builders.tasks.behaviour import pieces_dataset, prompt_for_requests, window
from sidtune.data_builders.tasks.input import TaskInput

logger = logging.getLogger(__name__)

THINK, END = "<think>", "</think>"
ASPECTS = ("words", "recent", "category", "brand", "price", "context")
PRICE_LEVELS = ("low", "middle", "high")
RECENT = 20
RECENT_WORDS = 5  # of the title of the latest item
NAMED = 0.7  # how likely an aspect is named
_SID_PART = re.compile(r"<[a-z]+_\d+>")


@dataclass(frozen=True)
class Reasonings:
    """Reasonings of requests.

    Attributes:
        request: (n,) rows of the requests table.
        item: (n,) rows of the target in `TaskInput.sid_ids`.
        text: n reasonings, without the marks.
    """

    request: np.ndarray
    item: np.ndarray
    text: list[str]

    def take(self, rows: np.ndarray) -> Reasonings:
        """Chosen reasonings."""
        return Reasonings(self.request[rows], self.item[rows], [self.text[row] for row in rows.tolist()])


def mark_ids(tokenizer: Any) -> tuple[int, int]:
    """Token ids of `<think>` and `</think>`.

    Raises:
        ConfigError: the tokenizer does not have them as tokens of their own.
    """
    found = token_ids(tokenizer, [THINK, END])
    if any(len(ids) != 1 for ids in found):
        raise ConfigError(
            f"This tokenizer has no tokens {THINK} and {END}, which reasoning needs; make the model with init_model and "
            f"extra_tokens: ['{THINK}', '{END}']."
        )
    return found[0][0], found[1][0]


def marked(reasoning: str) -> str:
    """A reasoning as the model writes it: `<think>`, the text, `</think>`."""
    return f"{THINK}{reasoning}{END}"


def leaks(reasoning: str, sid: str, title: str | None) -> bool:
    """Whether a reasoning holds the SID text of its target, any other SID, or the whole title, in any case and spacing."""
    plain, title = " ".join(reasoning.casefold().split()), " ".join((title or "").casefold().split())
    return sid in reasoning or _SID_PART.search(reasoning) is not None or (bool(title) and title in plain)


def strongest_targets(data: TaskInput) -> tuple[np.ndarray, np.ndarray]:
    """Requests with a positive and its strongest one: rows of `data.requests` and of `data.sid_ids`, both (n,)."""
    found = data.positives
    return found.request[found.strongest], found.item[found.strongest]


def templated(data: TaskInput, limit: int | None = None, aspects: Sequence[str] = ASPECTS) -> Reasonings:
    """Reasonings made of the request's own features; the target is not looked at but for the leak check.

    Each names a random part of the aspects, so that sampling from the model finds out which of them help, always in the order
    given: in another order, a small model would not know where to end.

    Args:
        limit: at most so many requests, drawn at random.
        aspects: which features may be named, of `ASPECTS`.

    Raises:
        ConfigError: an unknown aspect.
    """
    for name in aspects:
        if name not in ASPECTS:
            raise ConfigError(f"There is no aspect '{name}' of a reasoning: {nearest(name, ASPECTS)}")
    request, item = strongest_targets(data)
    titles = _of_items(data, "title").to_pylist()
    # Numbers of every request, so that the text of one does not depend on how many are drawn.
    draw = data.rng("templated reasonings").random((data.requests.num_rows, len(aspects)))

    def made(places: np.ndarray) -> list[str | None]:
        texts: list[str | None] = []
        for place, features in zip(places.tolist(), _features(data, request[places]), strict=True):
            there = [number for number, name in enumerate(aspects) if features[name]]
            kept = [number for number in there if draw[request[place], number] < NAMED] or there[:1]
            text = "; ".join(features[aspects[number]] for number in kept) or "no hints"
            texts.append(None if leaks(text, data.sid_texts[item[place]], titles[item[place]]) else text)
        return texts

    chosen, texts = data.choose_made("reason_to_sid", np.arange(len(request)), limit, "reasonings_that_leak", made)
    return Reasonings(request[chosen], item[chosen], texts)


def without_leaks(data: TaskInput, found: Reasonings) -> Reasonings:
    """The reasonings that do not tell their target; the others are counted."""
    titles = _of_items(data, "title").to_pylist()
    good = [
        not leaks(text, data.sid_texts[i], titles[i]) for text, i in zip(found.text, found.item.tolist(), strict=True)
    ]
    data.count("reason_to_sid", reasonings_that_leak=len(good) - sum(good))
    return found.take(np.flatnonzero(good))


def _of_items(data: TaskInput, column: str) -> pa.Array:
    """A column of the items table in the order of `data.sid_ids`, null where the item is missing."""
    row = rows_of(data.sid_ids, data.items["item_id"])
    return one_array(data.items[column].take(pa.array(row, mask=row < 0)))


def _features(data: TaskInput, request: np.ndarray) -> list[dict[str, str]]:
    """What can be said of each request from itself and its user's past."""
    asked = data.requests.take(pa.array(request))
    offsets, past = window(data, asked, min(RECENT, data.max_history))
    owner, item = owners(offsets), data.turns.item[past]
    (category, names), (brand, brands) = _leaves(data), encode(_of_items(data, "brand"))
    names, brands = names.to_pylist(), brands.to_pylist()
    liked = _most_frequent(owner, category[item], len(request))
    bought = _most_frequent(owner, brand[item], len(request))
    level = _most_frequent(owner, _price_level(data, category)[item], len(request))
    clean = data.serializer.field
    titles = _of_items(data, "title").to_pylist()
    latest = [int(item[end - 1]) if end > start else -1 for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
    rows = []
    for place, (query, context) in enumerate(
        zip(asked["query"].to_pylist(), asked["context"].to_pylist(), strict=True)
    ):
        title = clean(titles[latest[place]], "title") if latest[place] >= 0 else ""
        where = [clean(pair["value"], "context") for pair in (context or [])[:3]]
        rows.append(
            {
                "words": f"wants {clean(query, 'query')}" if query else "",
                "recent": f"after {' '.join(title.split()[:RECENT_WORDS])}" if title else "",
                "category": f"often {clean(names[liked[place]], 'category')}" if liked[place] >= 0 else "",
                "brand": f"likes {clean(brands[bought[place]], 'brand')}" if bought[place] >= 0 else "",
                "price": f"price {PRICE_LEVELS[level[place]]}" if level[place] >= 0 else "",
                "context": f"now {' '.join(where)}" if where else "",
            }
        )
    return rows


def _leaves(data: TaskInput) -> tuple[np.ndarray, pa.Array]:
    """Finest category of each of `data.sid_ids` as codes, -1 for none, and the distinct ones."""
    return encode(
        pa.array([path[-1] if path else None for path in _of_items(data, "category").to_pylist()], pa.string())
    )


def _most_frequent(owner: np.ndarray, value: np.ndarray, rows: int) -> np.ndarray:
    """(rows,) the most frequent non-negative value of each owner, of equals the one seen last; -1 where there is none."""
    found = np.full(rows, -1, np.int64)
    place = np.flatnonzero(value >= 0)
    if not len(place):
        return found
    width = int(value.max()) + 1
    keys, last, times = np.unique(
        owner[place][::-1] * width + value[place][::-1], return_index=True, return_counts=True
    )
    order = np.lexsort((-last, times, keys // width))
    found[keys[order] // width] = keys[order] % width
    return found


def _price_level(data: TaskInput, category: np.ndarray) -> np.ndarray:
    """(S,) 0, 1 or 2: the third of its category's prices an item lies in; -1 without a price."""
    price = pc.fill_null(_of_items(data, "price"), np.nan).to_numpy(zero_copy_only=False)
    level = np.full(len(price), -1, np.int64)
    known = np.flatnonzero(~np.isnan(price))
    order = known[np.lexsort((price[known], category[known]))]
    _, first, size = np.unique(category[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, size)
    level[order] = 3 * rank // np.repeat(size, size)
    return level


def read_reasonings(data: TaskInput, path: str | Path) -> Reasonings:
    """Reads a file of reasonings (JSON lines, see the top of the file); those that tell their target are left out.

    Texts are sanitised. Without `item_id` the target is the request's strongest positive.

    Raises:
        DataError: an unreadable line, or a request, target or item that the training data does not have.
    """
    rows = reasoning_lines(path)
    request = rows_of(pa.array([row["request_id"] for row in rows], pa.string()), data.requests["request_id"])
    _refuse_unknown(request, [row["request_id"] for row in rows], path, "request", "among the requests of this split")
    owner, target = strongest_targets(data)
    strongest = np.full(data.requests.num_rows, -1, np.int64)
    strongest[owner] = target
    given = [row.get("item_id") for row in rows]
    named = rows_of(pa.array(given, pa.string()), data.sid_ids)
    wrong = np.where([name is None for name in given], 0, named)
    _refuse_unknown(wrong, given, path, "item", "an item with a semantic ID")
    item = np.where(named >= 0, named, strongest[request])
    _refuse_unknown(item, [row["request_id"] for row in rows], path, "request", "with a positive item")
    # Looked at as written: sanitising would hide a semantic ID from the leak check.
    found = without_leaks(data, Reasonings(request, item, [_without_marks(row["reasoning"]) for row in rows]))
    return Reasonings(found.request, found.item, [data.serializer.sanitizer.clean(text) for text in found.text])


def _without_marks(text: str) -> str:
    return text.strip().removeprefix(THINK).removesuffix(END)


def reasoning_lines(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file of reasonings, one JSON mapping each. Raises DataError where one is none, or a text is empty."""
    what = "file of reasonings (JSON lines with 'request_id' and 'reasoning')"
    rows = read_json_lines(path, {"request_id": str, "reasoning": str, "item_id?": str | None}, what)
    for row in rows:
        if not row["request_id"] or not row["reasoning"]:
            raise DataError(
                f"{path}: expected the texts 'request_id' and 'reasoning', got {str(row)[:80]}; correct it."
            )
    return rows


def _refuse_unknown(found: np.ndarray, names: Sequence[Any], path: Any, kind: str, what: str) -> None:
    if (found < 0).any():
        bad = names[int(np.flatnonzero(found < 0)[0])]
        raise DataError(
            f"{path}: the {kind} '{bad}' is not {what} ({int((found < 0).sum())} such lines); correct the file."
        )


def reason_to_sid(
    data: TaskInput,
    limit: int | None = None,
    file: str | None = None,
    sha256: str | None = None,
    aspects: list[str] | None = None,
    max_tokens: int | None = None,
) -> Dataset:
    """The full personalised request → reasoning → SID → eos.

    Args:
        limit: at most so many examples, drawn at random.
        file: JSON lines with reasonings; None makes templated ones.
        sha256: fingerprint the file must have (`core.folders.fingerprint`), so that a changed file trains the stage again.
        aspects: which features templated reasonings may name; None takes all.
        max_tokens: longest example; older turns of the history are left out until it fits, as when serving.

    Raises:
        ConfigError: a tokenizer without `<think>` and `</think>`, or without an eos token.
        DataError: a file that is not the one of the fingerprint, or that `read_reasonings` refuses.
    """
    tokenizer = data.serializer.tokenizer
    mark_ids(tokenizer)
    if tokenizer.eos_token is None:
        raise ConfigError(
            "This tokenizer has no eos token, which ends an answer with reasoning; set tokenizer.eos_token."
        )
    if file is None:
        found = templated(data, limit, aspects or ASPECTS)
    else:
        if sha256 is not None and fingerprint(file) != sha256:
            raise DataError(
                f"The file of reasonings {file} is not the one this stage was made for; correct its sha256."
            )
        found = read_reasonings(data, file)
        found = found.take(data.choose("reason_to_sid", np.arange(len(found.text)), limit))
    requests = data.requests.take(pa.array(found.request))
    prompts = [list(map(str, pieces)) for pieces in prompt_for_requests(data, requests)]
    examples = []
    for prompt, text, item in zip(prompts, found.text, found.item.tolist(), strict=True):
        answer = [marked(text), data.sid_texts[item], tokenizer.eos_token]
        examples.append([*_fitting(tokenizer, prompt, answer, max_tokens), *answer])
    return pieces_dataset("reason_to_sid", examples, one_array(requests["request_id"]), learned=3)


# Added tokens that the task itself writes; any other added token in a text piece is refused when examples are encoded.
reason_to_sid.marks = (THINK, END)  # type: ignore[attr-defined]


def _fitting(tokenizer: Any, prompt: list[str], answer: list[str], max_tokens: int | None) -> list[str]:
    """The prompt without as many of its oldest turns as it takes to fit."""
    if max_tokens is None:
        return prompt
    encoder = encoder_of(tokenizer)
    codes = encoder.codes([*prompt, *answer])
    size = encoder.lengths[codes]
    room = max_tokens - 1 - int(size.sum())
    first = 1
    while room < 0 and first + 1 < len(prompt):
        room += int(size[first] + size[first + 1])
        first += 2
    return [prompt[0], *prompt[first:]]
