"""A model that reasons before it searches: answers for evaluation, hard requests, and trajectories by rejection sampling.

Source: the self-evolving loop of CRS (`specs/crs_debiased_grpo.md` 2.4, 2.5 and 2.8). What the paper leaves open is our choice, as
in the sheet: a request is hard when its target is not ranked first behind the greedy reasoning; a sampled reasoning is kept when
the target is ranked first behind it. The test is made on the text that will be trained on, written out, sanitised and encoded
again, and with the search of evaluation, because a sampled text need not come back as the same tokens. Of each request at most
two are kept: the shortest, and a random one of the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sidtune.core.errors import ConfigError
from sidtune.core.ragged import pad
from sidtune.data_builders.prompts.encoding import encode_prompts, token_ids
from sidtune.data_builders.tasks.reasoning import leaks, mark_ids, marked
from sidtune.decoding.reasoning import reason_then_search
from sidtune.decoding.retrieval.retriever import SidRetriever

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Answers:
    """R requests with G reasonings each and the K best leaves behind every one.

    Attributes:
        reasonings: R lists of G lists of token ids, as written, `</think>` included.
        closed: (R, G) bool, the model ended the reasoning itself.
        leaves: (R, G, K) int64, best first, -1 where there are fewer.
        scores: (R, G, K) float32 log-probabilities.
    """

    reasonings: list[list[list[int]]]
    closed: np.ndarray
    leaves: np.ndarray
    scores: np.ndarray


def ranks_of(leaves: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(..., K) lists and (...) targets → (...) place of the target, 0 = first, -1 = not in the list."""
    found = leaves == targets[..., None]
    return np.where(found.any(axis=-1), found.argmax(axis=-1), -1)


def is_hard(ranks: np.ndarray, k: int = 1) -> np.ndarray:
    """Whether the target is not among the first k places; every request is either hard or solved."""
    if k < 1:
        raise ConfigError(
            f"A request is hard when its target is not among the first k places; k must be at least 1, got {k}."
        )
    return (ranks < 0) | (ranks >= k)


class Reasoner:
    """Reasons and searches with one model.

    Args:
        retriever: model, tokenizer, catalogue and prompt settings.
        num_beams: K of every search.
        max_reasoning_tokens: longest reasoning before `</think>` is forced.
        batch_size: prompts in one pass; with G reasonings, batch_size // G prompts (at least one).

    Raises:
        ConfigError: a tokenizer without eos, or a number below 1. Reasoning itself needs `<think>` and `</think>` too.
    """

    def __init__(
        self, retriever: SidRetriever, num_beams: int = 10, max_reasoning_tokens: int = 64, batch_size: int = 32
    ) -> None:
        self.retriever, self.batch_size = retriever, batch_size
        self.num_beams = min(num_beams, retriever.trie.num_leaves)
        self.max_reasoning_tokens = max_reasoning_tokens
        self._sid_ids = torch.tensor(retriever.vocabulary.sid_token_ids.tolist())
        tokenizer = retriever.tokenizer
        if tokenizer.eos_token_id is None or num_beams < 1 or max_reasoning_tokens < 1 or batch_size < 1:
            raise ConfigError(
                "Reasoning needs a tokenizer with an eos token, and num_beams, max_reasoning_tokens and batch_size of at least "
                f"1, got {num_beams}, {max_reasoning_tokens} and {batch_size}."
            )

    @cached_property
    def marks(self) -> tuple[int, int]:
        """Token ids of `<think>` and `</think>`. Raises ConfigError where the tokenizer has none."""
        return mark_ids(self.retriever.tokenizer)

    @property
    def think(self) -> int:
        """Token id of `<think>`."""
        return self.marks[0]

    @property
    def end(self) -> int:
        """Token id of `</think>`."""
        return self.marks[1]

    def prompts(self, pieces: Sequence[Sequence[str]]) -> list[list[int]]:
        """Token ids of prompts; old turns make room for reasoning, SID and eos."""
        reserve = self.max_reasoning_tokens + 2 + self.retriever.sids.depth
        limit = self.retriever.settings.max_length
        return encode_prompts(self.retriever.tokenizer, [list(p) for p in pieces], limit, reserve=reserve)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        num_reasonings: int = 1,
        temperature: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Answers:
        """Reasons about every prompt, then searches.

        Args:
            prompts: R prompts.
            num_reasonings: G.
            temperature: samples the reasonings at this temperature; None takes the most likely words.
            seed: of the sampling.
            progress: called with the number of prompts finished in each batch.
        """
        size = len(prompts), num_reasonings
        reasonings: list[list[list[int]]] = [[] for _ in prompts]
        closed = np.zeros(size, bool)
        leaves, scores = (
            np.full((*size, self.num_beams), -1, np.int64),
            np.full((*size, self.num_beams), -np.inf, np.float32),
        )
        step = max(1, self.batch_size // num_reasonings)
        order = np.argsort([-len(row) for row in prompts], kind="stable")
        for first in range(0, len(order), step):
            rows = order[first : first + step]
            ids, mask = self._pad([prompts[row] for row in rows])
            out = reason_then_search(
                self.retriever.model,
                ids,
                mask,
                trie=self.retriever.trie,
                sid_token_ids=self._sid_ids,
                end_token_id=self.end,
                eos_token_id=self.retriever.tokenizer.eos_token_id,
                pad_token_id=self._pad_id,
                max_reasoning_tokens=self.max_reasoning_tokens,
                num_beams=self.num_beams,
                num_reasonings=num_reasonings,
                do_sample=temperature is not None,
                temperature=1.0 if temperature is None else temperature,
                generator=torch.Generator().manual_seed(
                    int(np.random.SeedSequence([seed, first]).generate_state(1)[0])
                ),
            )
            for row, texts in zip(rows.tolist(), out.texts(), strict=True):
                reasonings[row] = texts
            closed[rows] = out.closed.cpu().numpy()
            leaves[rows] = out.beams.leaves.cpu().numpy().reshape(len(rows), num_reasonings, -1)
            scores[rows] = out.beams.scores.float().cpu().numpy().reshape(len(rows), num_reasonings, -1)
            if progress is not None:
                progress(len(rows))
        return Answers(reasonings, closed, leaves, scores)

    def search(
        self, prompts: Sequence[Sequence[int]], progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(R, K) leaves and scores behind prompts that hold their reasoning, `</think>` included, already."""
        found = self.retriever.beams_of(prompts, self.num_beams, self.batch_size, progress=progress)
        return found.leaves.numpy(), found.scores.numpy()

    def closed_ids(self, text: str) -> list[int]:
        """Token ids of a reasoning as training writes it, with both marks."""
        return token_ids(self.retriever.tokenizer, [marked(text)])[0]

    def written(self, reasoning: Sequence[int]) -> str | None:
        """The text of a sampled reasoning, sanitised; None unless it is some text between the marks, without added tokens."""
        ids, added = list(reasoning[1:-1]), self.retriever.serializer.sanitizer.ids
        if [*reasoning[:1], *reasoning[-1:]] != [self.think, self.end] or any(token in added for token in ids):
            return None
        text = self.retriever.tokenizer.decode(ids)
        # Tokens of a byte-level BPE can stop within a character.
        return None if "\ufffd" in text else self.retriever.serializer.sanitizer.clean(text) or None

    @property
    def _pad_id(self) -> int:
        pad = self.retriever.tokenizer.pad_token_id
        return self.retriever.tokenizer.eos_token_id if pad is None else pad

    def _pad(self, rows: list[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = pad(rows, self._pad_id)
        return torch.from_numpy(ids), torch.from_numpy(mask)


@dataclass(frozen=True)
class Kept:
    """Reasonings that passed.

    Attributes:
        row: (n,) which prompt each belongs to, rising.
        text: n reasonings.
        counts: what became of all candidates.
    """

    row: np.ndarray
    text: list[str]
    counts: dict[str, int]


def accept(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[str]],
    targets: np.ndarray,
    sids: Sequence[str],
    titles: Sequence[str | None],
    k: int = 1,
    longest: int | None = None,
    progress: Progress | None = None,
) -> list[list[str]]:
    """The candidates of each prompt behind which the search finds the target among the first k; leaks and duplicates go first.

    Args:
        prompts: R prompts.
        candidates: reasonings of each prompt, as text.
        targets: (R,) target leaves. sids, titles: R SID texts and titles of the targets, for the leak check.
        k: places that count.
        longest: most tokens of a reasoning, marks included; None sets no limit.
    """
    tried = []
    for row, texts in enumerate(candidates):
        for text in dict.fromkeys(texts):
            ids = reasoner.closed_ids(text)
            fits = (
                ids[-1:] == [reasoner.end] and ids.count(reasoner.end) == 1 and (longest is None or len(ids) <= longest)
            )
            if fits and not leaks(text, sids[row], titles[row]):
                tried.append((row, text, ids))
    leaves, _ = reasoner.search([[*prompts[row], *ids] for row, _, ids in tried], progress)
    rows = np.array([row for row, *_ in tried], np.int64)
    solved = ~is_hard(ranks_of(leaves, np.asarray(targets)[rows]), k) if len(rows) else np.zeros(0, bool)
    kept: list[list[str]] = [[] for _ in candidates]
    for (row, text, _), good in zip(tried, solved.tolist(), strict=True):
        if good:
            kept[row].append(text)
    return kept


def sample_trajectories(
    reasoner: Reasoner,
    prompts: Sequence[Sequence[int]],
    targets: np.ndarray,
    sids: Sequence[str],
    titles: Sequence[str | None],
    *,
    samples: int = 8,
    keep: int = 2,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Kept:
    """Rejection sampling: G reasonings per prompt, of which at most `keep` correct ones stay (the shortest and random others).

    A reasoning that the model did not end by itself is never kept: it would teach an end that it did not find.

    Args:
        prompts, targets, sids, titles: as for `accept`.
        samples: G. keep: at least 1. temperature: of the sampling. seed: of the sampling and the choice.

    Raises:
        ConfigError: a number out of range.
    """
    if samples < 1 or keep < 1 or not temperature > 0:
        raise ConfigError(
            f"samples and keep must be at least 1 and temperature above 0, got {samples}, {keep} and {temperature}."
        )
    answers = reasoner.answer(prompts, samples, temperature, seed, progress)
    counts: Counter[str] = Counter(sampled=answers.closed.size, not_closed=int((~answers.closed).sum()))
    candidates: list[list[str]] = []
    for row, texts in enumerate(answers.reasonings):
        written = [reasoner.written(ids) for ids, closed in zip(texts, answers.closed[row], strict=True) if closed]
        candidates.append([text for text in written if text])
        counts["unwritable"] += len(written) - len(candidates[-1])
    correct = accept(reasoner, prompts, candidates, targets, sids, titles)
    chosen = [few(texts, keep, np.random.default_rng([seed, row])) for row, texts in enumerate(correct)]
    counts["correct_distinct"] = sum(map(len, correct))
    counts["requests_solved"] = sum(map(bool, correct))
    rows = np.repeat(np.arange(len(chosen)), [len(texts) for texts in chosen])
    return Kept(rows, [text for texts in chosen for text in texts], dict(counts))


def few(texts: Sequence[str], keep: int, rng: np.random.Generator) -> list[str]:
    """The shortest text (the first of equals) and random others, `keep` in all."""
    if len(texts) <= keep:
        return list(texts)
    shortest = min(range(len(texts)), key=lambda place: (len(texts[place]), place))
    others = [place for place in range(len(texts)) if place != shortest]
    return [texts[place] for place in sorted([shortest, *rng.choice(others, keep - 1, replace=False).tolist()])]
