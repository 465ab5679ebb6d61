"""The SID constraint for anyone's own `generate`: one vectorised mask per step, no Python per row or beam.

It keeps no state: where a row stands is found again from its generated tokens, so one object may serve several
`generate` calls, also interleaved ones (a step counter kept in the object is a known defect of peers; see
`specs/crs_debiased_grpo.md` 2.9). For constrained search itself `sid_beam_search` does less work and needs no settings.

With `start_after` a row first writes free text (its reasoning) and the constraint begins behind the first such token,
at another column in every row; the paper's inference (2.8) does the same in two calls, as `reason_then_search` does.
`num_sids` asks for a list of SIDs.

`generate` runs warpers (`top_k`, `top_p`, ...) after every processor, so take its settings from `generation_config`:

    processor = SidLogitsProcessor(trie, sid_token_ids, prompt_length=inputs["input_ids"].shape[1])
    config = processor.generation_config(model, num_beams=10, num_return_sequences=10)
    model.generate(**inputs, logits_processor=[processor], generation_config=config)

Give it as the last of your own processors. With more beams than SIDs, `generate` fills up with repeated or dead rows:
drop rows whose score is below -1e8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from sidtune.core.errors import ConfigError
from sidtune.decoding.engine.generation_settings import SidGenerationConfig, constrained_config
from sidtune.decoding.trie import SidTrie

_NEVER = float("-inf")


class SidLogitsProcessor(LogitsProcessor):
    """Leaves the legal next codes of each row as they are and sets every other token to -inf.

    Args:
        trie: legal SIDs, possibly filtered.
        sid_token_ids: (sum of level sizes,) token ids, as for `sid_beam_search`.
        prompt_length: columns of `input_ids` before the answer: the padded prompt length T for decoder-only models, 1
            (the start token) for encoder-decoders.
        eos_token_id: the only token allowed after the last SID. Default None: asking for more is an error.
        start_after: token after which the SID begins, for example that of `</think>`; only one behind the prompt
            counts. Before it everything is free but EOS and, with `forbid_sids`, the SID tokens. Default None: the SID
            begins at once. Needs `eos_token_id` and `max_free_tokens`.
        max_free_tokens: length of the free text at most; then `start_after` is forced.
        forbid_sids: no SID tokens of any level in the free text.
        free_processors: processors and warpers of transformers for the free text only, for example
            `[TemperatureLogitsWarper(0.6), TopPLogitsWarper(0.95)]`; they never touch a SID.
        num_sids: SIDs in a row, one behind the other.
        distinct: a SID occurs at most once in a row.

    Forced tokens (EOS, `start_after`) get the score 0, so that they cost a beam nothing. A row whose codes are no
    prefix of a SID (a dead beam) may only take the first code of the level, so that a softmax over it stays finite; its
    score is -inf already and no leaf can come of it.

    Raises:
        DataError: token ids that do not fit the trie. ConfigError: options that do not go together.
    """

    def __init__(
        self,
        trie: SidTrie,
        sid_token_ids: np.ndarray | Tensor,
        prompt_length: int,
        *,
        eos_token_id: int | None = None,
        start_after: int | None = None,
        max_free_tokens: int | None = None,
        forbid_sids: bool = True,
        free_processors: Sequence[LogitsProcessor] = (),
        num_sids: int = 1,
        distinct: bool = True,
    ) -> None:
        self.trie, self.prompt_length, self.eos_token_id = trie, prompt_length, eos_token_id
        self.start_after, self.max_free_tokens, self.forbid_sids = start_after, max_free_tokens, forbid_sids
        self.free_processors = LogitsProcessorList(free_processors)
        self.num_sids, self.distinct = num_sids, distinct and num_sids > 1
        level_tokens = trie.level_tokens(sid_token_ids)
        _check(self, torch.cat(level_tokens).tolist())
        self._set_tokens(level_tokens)
        self._widest = int(np.argmax(trie.max_children))
        self._leaves_below = _allowed_leaves_below(trie) if self.distinct else None

    def generation_config(self, model: nn.Module, renormalize: bool = True, **settings: Any) -> SidGenerationConfig:
        """Settings for `generate` under this constraint: the model's own without what works against it.

        `settings` are those you would give `generate` (`num_beams`, `do_sample`, `temperature`, ...). Everything that
        would cut legal tokens or change scores is reset, also in `settings`, and one warning lists it; warpers for the
        free text belong into `free_processors`. The length is set to what the constraint needs. `renormalize`: beam
        scores over the legal tokens, as in `sid_beam_search`. The model's own settings are not changed.

        Raises ConfigError for a setting `generate` does not have.
        """
        free = 0 if self.start_after is None else self.max_free_tokens + 1  # type: ignore[operator]
        length = free + self.num_sids * self.trie.depth + (self.eos_token_id is not None)
        return constrained_config(
            model, settings, max_new_tokens=length, eos_token_id=self.eos_token_id, renormalize=renormalize
        )

    def _set_tokens(self, level_tokens: list[Tensor]) -> None:
        self._level_tokens, device = level_tokens, level_tokens[0].device
        size = 2 + max(int(tokens.max()) for tokens in level_tokens)
        # One slot past the largest token stands for every token that is no code.
        self._codes = torch.full((len(level_tokens), size), -1, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(len(level_tokens), max(map(len, level_tokens)), dtype=torch.int64, device=device)
        for level, tokens in enumerate(level_tokens):
            self._codes[level, tokens] = torch.arange(len(tokens), device=device)
            self._tokens[level, : len(tokens)] = tokens

    def _move(self, device: torch.device) -> None:
        if self.trie.device != device:
            self.trie = self.trie.to(device)
            self._set_tokens([tokens.to(device) for tokens in self._level_tokens])
            if self._leaves_below is not None:
                self._leaves_below = self._leaves_below.to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, columns) token ids and (rows, V) scores give (rows, V) scores."""
        self._move(scores.device)
        generated = input_ids[:, self.prompt_length :]
        begin, started = self._begin(generated)
        place = generated.shape[1] - begin
        number, level = place // self.trie.depth, place % self.trie.depth
        inside = started & (number < self.num_sids)
        if self.start_after is None and generated.shape[1] >= self.num_sids * self.trie.depth:
            self._check_end(generated.shape[1])
            masked = torch.full_like(scores, _NEVER)
        else:
            masked = self._inside(generated, scores, begin + number * self.trie.depth, level, inside, begin, number)
        if self.eos_token_id is not None:
            masked[:, self.eos_token_id] = masked[:, self.eos_token_id].masked_fill(started & ~inside, 0.0)
        if self.start_after is None:
            return masked
        return masked.where(started[:, None], self._free(input_ids, scores, generated.shape[1]))

    def _begin(self, generated: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each row's first code, and whether that is known already (there is such a column)."""
        rows, columns = generated.shape
        if self.start_after is None:
            zeros = torch.zeros(rows, dtype=torch.int64, device=generated.device)
            return zeros, torch.ones_like(zeros, dtype=torch.bool)
        found = generated == self.start_after
        first = (found.cumsum(dim=1) == 0).sum(dim=1)
        return (first + 1).clamp(max=columns), first < columns

    def _free(self, input_ids: Tensor, scores: Tensor, length: int) -> Tensor:
        """Scores of rows still in their free text of `length` tokens."""
        if length >= self.max_free_tokens:  # type: ignore[operator]
            forced = torch.full_like(scores, _NEVER)
            forced[:, self.start_after] = 0.0
            return forced
        free = self.free_processors(input_ids, scores).clone()
        free[:, self.eos_token_id] = _NEVER
        if self.forbid_sids:
            free[:, torch.cat(self._level_tokens)] = _NEVER
        return free

    def _inside(
        self, generated: Tensor, scores: Tensor, first: Tensor, level: Tensor, inside: Tensor, *list_place: Tensor
    ) -> Tensor:
        """Scores of rows within a SID that began at column `first` (R,) and has `level` (R,) codes; the others -inf."""
        nodes = self._walk(self._codes_from(generated, first), level)
        widest = generated.shape[1] % self.trie.depth if self.start_after is None else self._widest
        codes, _, legal = self.trie.children(nodes, widest)
        legal = legal & inside[:, None]
        if self.distinct:
            legal = legal & ~self._used_up(generated, nodes, codes, level, *list_place)
        tokens = self._tokens[level[:, None], codes]
        values = scores.gather(1, tokens).masked_fill(~legal, _NEVER)
        # Padding points at code 0 and carries -inf, so the larger value is that of the code itself.
        masked = torch.full_like(scores, _NEVER).scatter_reduce_(1, tokens, values, "amax")
        anything = self._tokens[level, 0][:, None]
        dead = (inside & ~legal.any(dim=1))[:, None]
        return masked.scatter_(1, anything, masked.gather(1, anything).masked_fill(dead, 0.0))

    def _codes_from(self, generated: Tensor, first: Tensor) -> Tensor:
        """(..., depth) codes of the tokens from column `first` (R, ...) on, -1 for what is no code of its level."""
        depth, device = self.trie.depth, generated.device
        if not generated.shape[1]:
            return torch.full((*first.shape, depth), -1, dtype=torch.int64, device=device)
        levels = torch.arange(depth, device=device)
        columns = (first[..., None] + levels).clamp(max=generated.shape[1] - 1)
        tokens = generated.gather(1, columns.flatten(1)).view_as(columns)
        return self._codes[levels, tokens.clamp(max=self._codes.shape[1] - 1)]

    def _walk(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """Node of the first `lengths` (broadcast) codes of each prefix (..., depth); -1 where it is not legal."""
        nodes = torch.zeros(codes.shape[:-1], dtype=torch.int64, device=codes.device)
        for level in range(self.trie.depth):
            nodes = self.trie.step(nodes, codes[..., level]).where(level < lengths, nodes)
        return nodes

    def _used_up(
        self, generated: Tensor, nodes: Tensor, codes: Tensor, level: Tensor, begin: Tensor, number: Tensor
    ) -> Tensor:
        """(R, C) bool: codes below which the row's finished SIDs leave none. A prefix stays while one SID is left."""
        earlier = torch.arange(self.num_sids - 1, device=nodes.device)
        paths = self._codes_from(generated, begin[:, None] + earlier * self.trie.depth)
        leaves = self._walk(paths, torch.full_like(level, self.trie.depth)[:, None])
        repeats = ((leaves[:, :, None] == leaves[:, None, :]) & (earlier[:, None] > earlier)).any(dim=2)
        prefixes = self._walk(paths, level[:, None])
        last = paths.gather(2, level[:, None, None].expand(*paths.shape[:2], 1))[..., 0]
        children = self.trie.step(prefixes, last)
        finished = (earlier < number[:, None]) & (leaves >= 0) & ~repeats & (prefixes == nodes[:, None])
        equal = (children[:, :, None] == children[:, None, :]) & finished[:, None, :]
        exhausted = finished & (equal.sum(dim=2) >= self._leaves_below[children.clamp(min=0)])  # type: ignore[index]
        return ((codes[:, :, None] == last[:, None, :]) & exhausted[:, None, :]).any(dim=2)

    def _check_end(self, length: int) -> None:
        if self.eos_token_id is None:
            whole = self.num_sids * self.trie.depth
            raise ConfigError(
                f"generate() asks for token {length + 1} of an answer that has {whole}; set max_new_tokens={whole}, or "
                "pass eos_token_id to end after the SID."
            )


def _check(options: SidLogitsProcessor, tokens: list[int]) -> None:
    if options.prompt_length < 0:
        raise ConfigError(
            f"prompt_length must not be negative, got {options.prompt_length}; pass the prompt's columns."
        )
    if options.num_sids < 1 or (options.distinct and options.num_sids > options.trie.num_allowed_leaves):
        raise ConfigError(
            f"num_sids must be from 1 to the {options.trie.num_allowed_leaves} SIDs there are, got {options.num_sids}; "
            "ask for fewer, or set distinct=False."
        )
    free = (options.start_after, options.max_free_tokens)
    if (free[0] is None) != (free[1] is None) or (free[0] is not None and options.eos_token_id is None):
        raise ConfigError(
            f"Free text before the SID needs start_after, max_free_tokens and eos_token_id, got {free[0]}, {free[1]} "
            f"and {options.eos_token_id}; pass all three."
        )
    if options.max_free_tokens is not None and options.max_free_tokens < 0:
        raise ConfigError(f"max_free_tokens must not be negative, got {options.max_free_tokens}.")
    if options.start_after is None and len(options.free_processors):
        raise ConfigError("free_processors work on text before the SID, and there is none; pass start_after.")
    special = [token for token in (options.eos_token_id, options.start_after) if token is not None]
    if len(set(special)) < len(special) or set(special) & set(tokens):
        raise ConfigError(
            f"eos_token_id and start_after must be two tokens that are no SID tokens, got {options.eos_token_id} and "
            f"{options.start_after}; check the tokenizer."
        )


def _allowed_leaves_below(trie: SidTrie) -> Tensor:
    """(num_nodes,) int64: how many allowed leaves lie below each node, a leaf itself counting as one."""
    counts = torch.ones(trie.num_nodes, dtype=torch.int64, device=trie.device)
    if trie.alive is not None:
        counts[trie.level_starts[trie.depth] :] = trie.alive[trie.level_starts[trie.depth] :].long()
    for level in range(trie.depth - 1, -1, -1):
        first, last, end = trie.level_starts[level : level + 3]
        running = nn.functional.pad(counts[last:end].cumsum(0), (1, 0))
        counts[first:last] = running[trie.child_start[first : last + 1] - last].diff()
    return counts
