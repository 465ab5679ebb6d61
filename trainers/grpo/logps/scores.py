"""Log-probabilities of chosen tokens from the states in front of a language model's head, multiplying no more of the head
than they need.

At a SID position the softmax runs over the exact legal codes of the trie (`specs/crs_debiased_grpo.md` 4.10 and 5.3: the
policy that constrained decoding samples from), so only the rows of that level are multiplied: a few hundred of 10^5. At
every other position it runs over the whole vocabulary, in TRL's own tiles, which hold no (tokens x vocabulary) matrix.

A head is multiplied by its weight where it is a plain linear layer, or one whose SID rows train on their own
(`tokenizers/vocabulary/trainable_tokens.py`): those rows are then taken without putting the matrix together. Any other head
(LoRA on it, quantised) is called as it is and its columns are picked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.trie import SidTrie

_TILE = 32768
_NEVER = float("-inf")


@dataclass(frozen=True)
class TokenTargets:
    """Tokens to score, N of them.

    Attributes:
        tokens: (N,) token ids.
        levels: (N,) SID level of each, or -1 for a token scored over the whole vocabulary.
        codes: (N,) code of each SID token, 0 elsewhere.
        nodes: (N,) node of the trie that stands before each SID token, 0 elsewhere.
        measured: (N,) bool, SID tokens whose log Z is wanted.
    """

    tokens: Tensor
    levels: Tensor
    codes: Tensor
    nodes: Tensor
    measured: Tensor

    def __getitem__(self, index: Tensor) -> TokenTargets:
        return TokenTargets(*(tensor[index] for tensor in vars(self).values()))


class Levels:
    """A trie and the token ids of its codes, on one device.

    Raises:
        DataError: not one distinct token id per code of all levels.
    """

    def __init__(self, trie: SidTrie, sid_token_ids: Any, device: torch.device) -> None:
        self.trie = trie.to(device)
        self.ids = torch.cat(self.trie.level_tokens(sid_token_ids))
        self.first, self.last = int(self.ids.min()), int(self.ids.max())
        self.sizes = list(trie.level_sizes)
        self._sorted, self._order = self.ids.sort()
        sizes = torch.tensor(self.sizes, device=device)
        self._level = torch.arange(trie.depth, device=device).repeat_interleave(sizes)
        self._code = torch.arange(len(self.ids), device=device) - (sizes.cumsum(0) - sizes)[self._level]

    def codes_of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Level and code of SID tokens, any shape; level -1 for other tokens."""
        place = torch.searchsorted(self._sorted, tokens).clamp(max=len(self._sorted) - 1)
        index = self._order[place]
        return self._level[index].where(self._sorted[place] == tokens, -1), self._code[index]


def find_targets(
    completion_ids: Tensor, completion_mask: Tensor, levels: Levels | None, sid_start: Tensor | None, measured: Tensor
) -> TokenTargets:
    """All (B, C) tokens as flat `TokenTargets`; the SID of row b begins at column `sid_start[b]` (-1: it has none).

    Args:
        measured: (B,) bool, rows whose log Z is wanted.

    Raises:
        DataError: a token of a SID is none of its level, or the SID is not in the trie.
    """
    rows, columns = completion_ids.shape
    level = torch.full_like(completion_ids, -1)
    code, node = torch.zeros_like(completion_ids), torch.zeros_like(completion_ids)
    if levels is not None and sid_start is not None:
        start = sid_start.to(completion_ids.device)
        if start.shape != (rows,):
            raise DataError(f"sid_start must hold one column per row, shape ({rows},), got {tuple(start.shape)}.")
        steps = torch.arange(levels.trie.depth, device=start.device)
        place = start[:, None] + steps
        inside = place.clamp(0, columns - 1)
        there = (start >= 0)[:, None] & (place < columns) & completion_mask.bool().gather(1, inside)
        found_level, found_code = levels.codes_of(completion_ids.gather(1, inside))
        before = _walk(levels.trie, found_code, there & (found_level == steps), there)
        row, step = there.nonzero(as_tuple=True)
        column = place[row, step]
        level[row, column], code[row, column] = steps[step], found_code[row, step]
        node[row, column] = before[row, step]
    measured = measured[:, None] & (level >= 0)
    return TokenTargets(*(tensor.reshape(-1) for tensor in (completion_ids, level, code, node, measured)))


def _walk(trie: SidTrie, codes: Tensor, fits: Tensor, there: Tensor) -> Tensor:
    """(B, depth) node before each code."""
    node = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    before, legal = [], []
    for level in range(trie.depth):
        before.append(node)
        node = trie.step(node, codes[:, level])
        legal.append(node >= 0)
    wrong = (there & ~(fits & torch.stack(legal, dim=1))).nonzero()
    if len(wrong):
        row, level = wrong[0].tolist()
        raise DataError(
            f"The SID of row {row} leaves the trie at level {level}, so it has no probability over the legal codes; "
            "give that row sid_start -1, or pass the trie it was sampled from."
        )
    return torch.stack(before, dim=1)


@dataclass(frozen=True)
class Scorer:
    """What is computed for each target.

    Attributes:
        levels: the trie and its tokens, or None when every token is scored over the whole vocabulary.
        temperature: divides the logits.
        entropy, log_z: also compute these.
        float32: multiply the head in float32 whatever the mixed precision.
    """

    levels: Levels | None
    temperature: float = 1.0
    entropy: bool = False
    log_z: bool = False
    float32: bool = False

    def from_states(
        self, states: Tensor, targets: TokenTargets, head: nn.Module, call: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """(N, 1 + entropy + log_z) float32 from the (N, d) states in front of the head, one per target.

        Args:
            head: the head module, whose parameters are whole at this moment.
            call: its own forward.
        """
        if self.float32:
            with torch.autocast(states.device.type, enabled=False):
                return self._from_states(states.float(), targets, head, call)
        return self._from_states(states, targets, head, call)

    def _from_states(
        self, states: Tensor, targets: TokenTargets, head: nn.Module, call: Callable[[Tensor], Tensor]
    ) -> Tensor:
        matrix = _matrix_of(head, self.levels)
        if matrix is None:
            return self.from_logits(call(states[None])[0], targets)
        is_text = targets.levels < 0
        text, sid = is_text.nonzero().flatten(), (~is_text).nonzero().flatten()
        out = states.new_zeros(len(states), 1 + self.entropy + self.log_z, dtype=torch.float32)
        if len(text) or not len(sid):  # nothing to score still joins the head to the graph, as DDP and ZeRO need it
            out = out.index_put((text,), self._over_vocabulary(states[text], targets[text], matrix))
        if len(sid):
            block, bias = matrix.level_rows()
            scored = self._over_children(states[sid], targets[sid], block, bias)
            out = out.index_put((sid,), self._with_log_z(scored, states[sid], targets[sid], matrix))
        return out

    def _over_vocabulary(self, states: Tensor, targets: TokenTargets, matrix: _Matrix) -> Tensor:
        """(N, 1 + entropy + log_z); log Z is 0, since every token is legal."""
        outputs = ("log_probs", "entropy") if self.entropy else ("log_probs",)
        weight, bias = matrix.whole()
        weight = weight.float() if self.float32 else weight
        log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
            states, weight, bias, targets.tokens, self.temperature, _TILE, None, 1.0, outputs
        )
        columns = [log_probs, *([entropy] if self.entropy else [])]
        return torch.stack([*columns, *([torch.zeros_like(log_probs)] if self.log_z else [])], dim=1)

    def _over_children(self, states: Tensor, targets: TokenTargets, block: Tensor, bias: Tensor | None) -> Tensor:
        """(N, 1 + entropy) over the legal codes; `block (sum of level sizes, d)` are the head's rows of all codes."""
        blocks = block.split(self.levels.sizes)
        biases = [None] * len(blocks) if bias is None else bias.split(self.levels.sizes)
        out = states.new_zeros(len(states), 1 + self.entropy, dtype=torch.float32)
        for level, (rows, row_bias) in enumerate(zip(blocks, biases, strict=True)):
            here = (targets.levels == level).nonzero().flatten()
            if len(here):
                logits = _linear(states[here], rows, row_bias, self.float32)
                out = out.index_put((here,), self._renormalised(logits.float(), targets[here], level))
        return out

    def _renormalised(self, logits: Tensor, targets: TokenTargets, level: int) -> Tensor:
        """(N, 1 + entropy) from the (N, level size) logits of one level."""
        codes, _, legal = self.levels.trie.children(targets.nodes, level)
        values = logits / self.temperature
        children = values.gather(1, codes).masked_fill(~legal, _NEVER)
        total = children.logsumexp(dim=1)
        log_prob = values.gather(1, targets.codes[:, None])[:, 0] - total
        if not self.entropy:
            return log_prob[:, None]
        shares = (children - total[:, None]).exp()
        return torch.stack([log_prob, total - (shares * children.masked_fill(~legal, 0)).sum(dim=1)], dim=1)

    @torch.no_grad()
    def _log_mass(self, log_probs: Tensor, states: Tensor, targets: TokenTargets, matrix: _Matrix) -> Tensor:
        """(N,) log of the mass on legal codes: both log-probabilities of a token have the same numerator."""
        found = torch.full_like(log_probs, float("nan"))
        chosen = targets.measured.nonzero().flatten()
        if len(chosen):
            whole = self._over_vocabulary(states[chosen], targets[chosen], matrix)[:, 0]
            found[chosen] = whole - log_probs[chosen]
        return found

    def _with_log_z(self, scored: Tensor, states: Tensor, targets: TokenTargets, matrix: _Matrix) -> Tensor:
        if not self.log_z:
            return scored
        return torch.cat([scored, self._log_mass(scored[:, 0], states, targets, matrix)[:, None]], dim=1)

    def from_logits(self, logits: Tensor, targets: TokenTargets) -> Tensor:
        """The same from (N, vocabulary) logits."""
        logits = logits.float()
        values = logits / self.temperature
        total = values.logsumexp(dim=1)
        log_probs = values.gather(1, targets.tokens[:, None])[:, 0] - total
        columns = [log_probs]
        if self.entropy:
            columns.append(total - ((values - total[:, None]).exp() * values).sum(dim=1))
        if self.log_z:
            columns.append(torch.zeros_like(log_probs))
        out = torch.stack(columns, dim=1)
        sid = (targets.levels >= 0).nonzero().flatten()
        if not len(sid):
            return out
        picked, wanted = logits[sid][:, self.levels.ids], targets[sid]
        scored = out.new_zeros(len(sid), 1 + self.entropy)
        for level, part in enumerate(picked.split(self.levels.sizes, dim=1)):
            here = (wanted.levels == level).nonzero().flatten()
            scored = scored.index_put((here,), self._renormalised(part[here], wanted[here], level))
        if self.log_z:
            mass = (log_probs[sid] - scored[:, 0]).detach().masked_fill(~wanted.measured, float("nan"))
            scored = torch.cat([scored, mass[:, None]], dim=1)
        return out.index_put((sid,), scored)


class _Matrix:
    """Weight and bias of a linear head: all of it, or the rows of the SID tokens."""

    def __init__(self, head: nn.Module, levels: Levels | None) -> None:
        self.head, self.levels, self.bias = head, levels, _whole(head.bias)
        self.span = getattr(head, "_rows_span", None)
        # Collective under ZeRO-3: on every process in every pass, whatever positions it holds.
        self.new_rows = None if self.span is None else head._new_rows()

    def whole(self) -> tuple[Tensor, Tensor | None]:
        stored = self.head._parameters["weight"]
        if self.span is None:
            return _whole(stored), self.bias
        if hasattr(stored, "full_tensor"):
            return self.head.weight, self.bias
        start, stop = self.span
        return torch.cat([stored[:start], self.new_rows, stored[stop:]]), self.bias

    def level_rows(self) -> tuple[Tensor, Tensor | None]:
        """(sum of level sizes, d) rows of all codes, level by level, and their biases."""
        ids = self.levels.ids
        bias = None if self.bias is None else self.bias[ids]
        if self.span is not None and self.span[0] <= self.levels.first and self.levels.last < self.span[1]:
            return self.new_rows.index_select(0, ids.to(self.new_rows.device) - self.span[0]), bias
        weight, _ = self.whole()
        return weight.index_select(0, ids.to(weight.device)), bias


def _whole(parameter: Tensor | None) -> Tensor | None:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _matrix_of(head: nn.Module, levels: Levels | None) -> _Matrix | None:
    """None for a head that does more than multiply by a matrix that is there."""
    kind = getattr(type(head), "_plain_class", type(head))  # a head whose SID rows train on their own names its kind
    weight = head._parameters.get("weight")
    if kind is not nn.Linear or weight is None or not weight.is_floating_point() or weight.ndim != 2:
        return None
    if levels is not None and levels.last >= weight.shape[0]:
        raise DataError(
            f"sid_token_ids goes up to {levels.last} but the model's vocabulary has {weight.shape[0]} rows; use the "
            "model, tokenizer and vocabulary of one folder."
        )
    return _Matrix(head, levels)


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None, float32: bool) -> Tensor:
    if float32:
        weight, bias = weight.float(), None if bias is None else bias.float()
    elif not torch.is_autocast_enabled(states.device.type):
        states = states.to(weight.dtype)
    return F.linear(states, weight, bias)


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"The temperature must be above 0, got {temperature}.")
