"""Requests -> inputs of the post-ranking model: prompts with placeholders, feature arrays, answers.

Tasks: `main` (rank: answer is one label per candidate, best first), `aux` (which of two orders is better), `fa` (feature
adaptation: say the features of one user and one item in words, and the rating). Item slots are history first, then candidates,
the order of the prompt.
`words=True` writes features as text instead of soft tokens: the text-only baseline (PTPR) on the same code.

Text is data. Placeholders have ids outside the vocabulary, so no text becomes one; texts pass the `Sanitizer`, so none becomes an
added token; and a text whose tokens hold a label (the "B" of "Plan B") is written in lower case, so labels stand only where the
template puts them. Template wording has its version in the config. Notation: B requests, n candidates, h history items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.folders import read_json, write_json
from sidtune.core.ragged import pad
from sidtune.data_builders.post_ranking.schema import PostRankBatch, PostRankRequest
from sidtune.data_builders.prompts.encoding import bos_id, token_ids
from sidtune.data_builders.prompts.sanitizer import Sanitizer, added_token_ids
from sidtune.models.post_ranking.arrays import field_value, fitted, main_target, marked, presented, tensors
from sidtune.models.post_ranking.config import FieldSpec, PostRankConfig
from sidtune.models.post_ranking.files import find_folder
from sidtune.models.post_ranking.losses import ADAPTATION, AUX, IGNORE, MAIN
from sidtune.models.post_ranking.permutation import LETTERS, check_counts
from sidtune.models.post_ranking.templates import template

TASKS = {"main": MAIN, "aux": AUX, "fa": ADAPTATION}
PROCESSOR_FILE = "post_rank_processor.json"


def choose_labels(tokenizer: Any, count: int = 26) -> list[int]:
    """Token ids of the labels A, B, ...: with a space in front where each is one token, else without.

    Raises:
        ConfigError: some capital letter is no single token of its own.
    """
    unusable = set(added_token_ids(tokenizer).tolist())
    for form in (" {}", "{}"):
        ids = token_ids(tokenizer, [form.format(letter) for letter in LETTERS[:count]])
        if all(len(one) == 1 for one in ids) and len({one[0] for one in ids} - unusable) == count:
            return [one[0] for one in ids]
    raise ConfigError(
        f"The tokenizer does not write each of the letters {LETTERS[:count]} as one token of its own, so they cannot be labels; "
        "give label_token_ids of your own."
    )


def build_config(
    language_model: Any, tokenizer: Any, fields: Sequence[FieldSpec], d_q: int, **options: Any
) -> PostRankConfig:
    """The configuration for a language model and its tokenizer.

    Args:
        fields: user and item fields, with statistics. d_q: width of the query vector.
        options: other attributes of `PostRankConfig`, for example `d_h`, `adapter`, `aux_weight`.
    """
    options.setdefault("label_token_ids", choose_labels(tokenizer))
    options.setdefault("end_token_id", tokenizer.eos_token_id)
    return PostRankConfig(text_config=language_model.config, fields=list(fields), d_q=d_q, **options)


@dataclass
class _Row:
    """Ids of one prompt with its answer; `learn` is 1 for the tokens of the answer."""

    ids: list[int] = field(default_factory=list)
    learn: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], learn: int = 0) -> None:
        self.ids += ids
        self.learn += [learn] * len(ids)


@dataclass
class _Input:
    """What one prompt says, whatever it was read from."""

    query: str | None
    has_user: bool
    history: int
    count: int
    request: PostRankRequest | None = None


class PostRankProcessor:
    """See the module's text.

    Args:
        tokenizer: of the language model. config: its post-ranking configuration.
        max_history: latest history items in a prompt. max_chars: longest text of a value.
        words: features as text instead of soft tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: PostRankConfig,
        *,
        max_history: int = 20,
        max_chars: int = 200,
        words: bool = False,
    ) -> None:
        if not isinstance(max_history, int) or max_history < 0 or not isinstance(max_chars, int) or max_chars < 1:
            raise ConfigError(
                "A prompt needs whole numbers, max_history of at least 0 and max_chars of at least 1, got "
                f"{max_history!r} and {max_chars!r}."
            )
        self.tokenizer, self.config = tokenizer, config
        self.max_history, self.max_chars, self.words = max_history, max_chars, words
        self.template = template(config.template_version)
        self.sanitizer = Sanitizer(tokenizer)
        self._labels = frozenset(config.label_token_ids)
        self._bos = bos_id(tokenizer, None)
        self._literals: dict[str, list[int]] = {}

    # -- text -----------------------------------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Ids of a stranger's text behind a blank: no added token and no label among them."""
        clean = self.sanitizer.clean(text, self.max_chars)
        ids = token_ids(self.tokenizer, [" " + clean])[0] if clean else []
        if not self._labels.isdisjoint(ids):
            ids = token_ids(self.tokenizer, [" " + clean.lower()])[0]
        forbidden = self._labels | self.sanitizer.ids
        return ids if forbidden.isdisjoint(ids) else [token for token in ids if token not in forbidden]

    def _literal(self, text: str) -> list[int]:
        if text not in self._literals:
            self._literals[text] = token_ids(self.tokenizer, [text])[0] if text else []
        return self._literals[text]

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of "name is value, name is value"."""
        before, _, rest = self.template.pair.partition("{name}")
        middle, _, after = rest.partition("{value}")
        ids: list[int] = []
        for number, (name, value) in enumerate(pairs):
            ids += self._literal(self.template.pair_end) if number else []
            ids += self._literal(before.rstrip()) + self.text_ids(name) + self._literal(middle.rstrip())
            ids += self.text_ids(value) + self._literal(after)
        return ids

    # -- prompts --------------------------------------------------------------------------------------------------

    def _head(self, item: _Input) -> _Row:
        row, slots = _Row(), self.template
        row.add([self._bos] if self._bos is not None else [])
        if item.query:
            row.add(self._literal(slots.query) + self.text_ids(item.query))
        if self.words and item.request is not None and item.request.user_text:
            row.add(self._literal(slots.user) + self._pairs(item.request.user_text))
        elif item.has_user and not self.words:
            row.add([*self._literal(slots.user), self.config.user_token_id])
        return row

    def _lists(self, item: _Input) -> _Row:
        row, slots, config = self._head(item), self.template, self.config
        texts = item.request.item_texts if self.words else ()
        past = item.request.history_texts[-item.history :] if self.words and item.history else ()
        if item.history:
            row.add(self._literal(slots.history))
            row.add([i for pairs in past for i in (*self._pairs(pairs), *self._literal(slots.stop))])
            row.add([] if self.words else [config.item_token_id] * item.history)
        row.add(self._literal(slots.candidates))
        for place, label in enumerate(config.label_token_ids[: item.count]):
            row.add([label])
            if self.words:
                row.add(self._literal(slots.words) + self._pairs(texts[place]) + self._literal(slots.stop))
            else:
                row.add([config.item_token_id])
        return row

    def _main(self, item: _Input, order: np.ndarray | None) -> _Row:
        row = self._lists(item)
        row.add(self._literal(self.template.rank))
        if order is not None:
            row.add([*(self.config.label_token_ids[place] for place in order), self.config.end_token_id], 1)
        return row

    def _aux(self, item: _Input, pair: tuple[np.ndarray, np.ndarray, int], answer: bool) -> _Row:
        row, slots = self._lists(item), self.template
        for head, order in zip((slots.list_one, slots.list_two), pair[:2], strict=True):
            row.add(self._literal(head) + [self.config.label_token_ids[place] for place in order])
        row.add(self._literal(slots.which))
        if answer:
            row.add([*self._literal(slots.two if pair[2] else slots.one), self.config.end_token_id], 1)
        return row

    def _adaptation(self, item: _Input, answer: bool) -> _Row:
        row, slots, request = self._head(item), self.template, item.request
        row.add([*self._literal(slots.item), self.config.item_token_id, *self._literal(slots.describe)])
        if not answer:
            return row
        pairs = request.item_texts[0] if len(request.item_texts) else ()
        for head, said in ((slots.user_says, request.user_text if item.has_user else ()), (slots.item_says, pairs)):
            if said:
                row.add(self._literal(head) + self._pairs(said) + self._literal(slots.stop), 1)
        if len(request.relevance) and not np.isnan(request.relevance[0]):
            value = self.text_ids(f"{float(request.relevance[0]):g}")
            row.add(self._literal(slots.rating_says) + value + self._literal(slots.stop), 1)
        row.add([self.config.end_token_id], 1)
        return row

    # -- inputs ---------------------------------------------------------------------------------------------------

    def from_requests(
        self,
        requests: Sequence[PostRankRequest],
        task: str = "main",
        *,
        orders: Sequence[np.ndarray] | None = None,
        pairs: Sequence[tuple[np.ndarray, np.ndarray, int]] | None = None,
        targets: Sequence[np.ndarray] | None = None,
        answers: bool = True,
        padding_side: str = "left",
    ) -> dict[str, Any]:
        """Inputs of `PostRankForCausalLM` on the CPU.

        Args:
            requests: the requests. For `fa` every candidate is an example of its own, in order.
            task: `main`, `aux` or `fa`.
            orders: for each request the candidates to present, by number, in the order to present them (shuffles, windows); default
                all in incoming order. Everything returned, labels included, refers to the presented order.
            pairs: `aux`: (list I, list II, 0 or 1 for the better one) of presented candidates' numbers.
            targets: `main`: the order to answer, presented candidates' numbers; default by falling relevance, ties in
                incoming order.
            answers: append the answers and return `labels`; without them the prompts are for `rank`, with `counts`.
            padding_side: `left` or `right`.

        Raises:
            ConfigError: an unknown task, or more candidates than labels. DataError: fields that do not fit the config, or unknown
                relevance in a `main` answer, or semantic IDs that are not the model's.
        """
        if task not in TASKS:
            raise ConfigError(f"There is no post-ranking task '{task}': {nearest(task, TASKS)}")
        if orders is not None:
            requests = [presented(one, order) for one, order in zip(requests, orders, strict=True)]
        if task == "fa":
            alone = [replace(one, history=(), history_texts=()) for one in requests]
            requests = [presented(one, [place]) for one in alone for place in range(len(one.candidates))]
        for sources in {tuple(one.sources.items()) for one in requests if one.sources}:
            self.config.check_sources(dict(sources))
        if not requests:
            raise DataError("There are no post-ranking requests; give at least one.")
        requests = [self._shorter(one) for one in requests]
        arrays = self._arrays(requests)
        has_user = self._has_user(arrays["user_fields"], len(requests))
        said = [_Input(r.query, has_user[n], len(r.history), len(r.candidates), r) for n, r in enumerate(requests)]
        rows = self._rows(said, [one.relevance for one in requests], task, pairs, targets, answers)
        return self._finish(rows, arrays, said, task, answers, padding_side)

    def from_batch(
        self,
        batch: PostRankBatch,
        queries: Sequence[str | None],
        task: str = "main",
        *,
        pairs: Sequence[tuple[np.ndarray, np.ndarray, int]] | None = None,
        targets: Sequence[np.ndarray] | None = None,
        answers: bool = True,
        padding_side: str = "left",
    ) -> dict[str, Any]:
        """As `from_requests`, from a NumPy `PostRankBatch` and the query texts; `main` and `aux` only, no `words`.

        Shuffle with `batch.reordered` first.
        """
        if task not in ("main", "aux") or self.words:
            raise ConfigError("from_batch makes main and aux prompts with soft tokens; else use from_requests.")
        past = batch.history_mask.copy()
        past &= np.cumsum(past[:, ::-1], axis=1)[:, ::-1] <= self.max_history
        past_fields, past_present = batch.history_fields, batch.history_present
        arrays = {
            "query": np.where(batch.query_present[:, None], batch.query, np.float32(0)),
            "user_fields": {name: marked(v, batch.user_present[name]) for name, v in batch.user_fields.items()},
            "item_fields": {
                name: np.hstack([marked(past_fields[name], past_present[name]), marked(v, batch.item_present[name])])
                for name, v in batch.item_fields.items()
            },
            "item_mask": np.concatenate([past, batch.item_mask], axis=1),
        }
        self._check_fields(arrays)
        has_user, counts = self._has_user(arrays["user_fields"], len(queries)), batch.item_mask.sum(axis=1)
        said = [_Input(q, has_user[n], int(past[n].sum()), int(counts[n])) for n, q in enumerate(queries)]
        known = [row[:count] for row, count in zip(batch.relevance, counts, strict=True)]
        rows = self._rows(said, known, task, pairs, targets, answers)
        return self._finish(rows, arrays, said, task, answers, padding_side)

    def _rows(
        self, said: list[_Input], relevance: Any, task: str, pairs: Any, targets: Any, answers: bool
    ) -> list[_Row]:
        if task == "fa":
            return [self._adaptation(item, answers) for item in said]
        check_counts(torch.tensor([item.count for item in said]), len(self.config.label_token_ids))
        if task == "main":
            if not answers:
                targets = [None] * len(said)
            elif targets is None:
                targets = [main_target(one) for one in relevance]
            return [self._main(item, order) for item, order in zip(said, targets, strict=True)]
        if pairs is None or len(pairs) != len(said):
            raise DataError("The auxiliary task needs two lists and the better one for every request; pass `pairs`.")
        return [self._aux(item, pair, answers) for item, pair in zip(said, pairs, strict=True)]

    def _shorter(self, request: PostRankRequest) -> PostRankRequest:
        if self.words and len(request.item_texts) != len(request.candidates):
            raise DataError(
                f"The request '{request.request_id}' has no text for each candidate; features as words need item_texts."
            )
        latest = max(len(request.history) - self.max_history, 0)
        return replace(request, history=request.history[latest:], history_texts=request.history_texts[latest:])

    def _arrays(self, requests: Sequence[PostRankRequest]) -> dict[str, Any]:
        items = [[] if self.words else [*request.history, *request.candidates] for request in requests]
        width = max(len(row) for row in items)
        mask = np.arange(width) < np.array([len(row) for row in items])[:, None]
        query = np.zeros((len(requests), self.config.d_q), np.float32)
        for row, request in enumerate(requests):
            if request.query_vector is not None:
                query[row] = fitted(request.query_vector, self.config.d_q, "query vector", request.request_id)
        users, found = {}, {}
        for spec in self.config.field_specs:
            if spec.side == "user":
                users[spec.name] = np.stack([field_value(spec, r.user, r.request_id) for r in requests])
                continue
            found[spec.name] = np.full((len(requests), width, spec.dim), np.nan, np.float32)
            for row, (request, things) in enumerate(zip(requests, items, strict=True)):
                for place, thing in enumerate(things):
                    found[spec.name][row, place] = field_value(spec, thing, request.request_id)
        arrays = {"query": query, "user_fields": users, "item_fields": found, "item_mask": mask}
        self._check_fields(arrays)
        return arrays

    def _check_fields(self, arrays: dict[str, Any]) -> None:
        for spec in self.config.field_specs:
            values = arrays[f"{spec.side}_fields"].get(spec.name)
            if values is None or values.shape[-1] != spec.dim:
                got = "none" if values is None else values.shape[-1]
                wanted = f"{spec.dim} columns of the {spec.side} field '{spec.name}'"
                raise DataError(f"The model wants {wanted}, got {got}; give the fields it was trained on.")
            if spec.coded and values.size and (np.nan_to_num(values, nan=-1) >= np.array(spec.level_sizes)).any():
                raise DataError(
                    f"The {spec.side} field '{spec.name}' has codes outside of its sizes {list(spec.level_sizes)}; use -1 for "
                    "unknown ones."
                )

    def _has_user(self, fields: dict[str, np.ndarray], count: int) -> np.ndarray:
        known = np.zeros(count, dtype=bool)
        for spec in self.config.side_fields("user"):
            missing = np.isnan(fields[spec.name]) | (spec.coded & (fields[spec.name] < 0))
            # Of several numbers one is enough; a vector needs all of them.
            known |= ~missing.all(axis=-1) if spec.kind == "numeric" else ~missing.any(axis=-1)
        return known

    def _finish(
        self, rows: list[_Row], arrays: dict, said: list[_Input], task: str, answers: bool, side: str
    ) -> dict[str, Any]:
        ids, mask = map(tensors, pad([row.ids for row in rows], self.config.end_token_id, side == "left"))
        if self.words:
            arrays = {**arrays, "user_fields": {}, "item_fields": {}}
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            **{key: tensors(arrays[key]) for key in ("query", "item_mask")},
            **{key: tensors(arrays[key]) or None for key in ("user_fields", "item_fields")},
            "task_id": torch.full((len(rows),), TASKS[task]),
        }
        if answers:
            inputs["labels"] = ids.masked_fill(tensors(pad([r.learn for r in rows], 0, side == "left")[0]) == 0, IGNORE)
        else:
            inputs["counts"] = torch.tensor([item.count for item in said])
            del inputs["task_id"]
        return inputs

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer, config and settings beside the model's weights."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        self.config.save_pretrained(folder)
        settings = {name: getattr(self, name) for name in ("max_history", "max_chars", "words")}
        write_json(folder / PROCESSOR_FILE, {**settings, "template_version": self.config.template_version})

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, **hub: Any) -> PostRankProcessor:
        """Loads what `save_pretrained` wrote. Raises DataError when it is not there."""
        folder = find_folder(folder_or_repo, **hub)
        shape = {"max_history": int, "max_chars": int, "words": bool}
        settings = {name: one for name, one in read_json(folder / PROCESSOR_FILE, shape).items() if name in shape}
        return cls(AutoTokenizer.from_pretrained(folder), PostRankConfig.from_pretrained(folder), **settings)
