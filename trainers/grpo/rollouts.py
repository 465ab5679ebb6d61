"""Rollouts of a batch of prompts: completions over the catalogue's trie, and what is known about them.

Direct rollouts answer with a SID at once: independent samples, a set without replacement, or beams. Reasoning rollouts
(R-GRPO, `specs/crs_debiased_grpo.md` 2.7) first sample text up to its end mark and then search a beam list behind each
text; the row's SID is the first beam. Every completion ends with EOS, so that no SID looks truncated (sheet 4, row 9),
and a mask says which tokens may carry a gradient: never the last EOS or an end mark that was forced, SID tokens only where they
were sampled. A policy that ends a reasoning by EOS has sampled that EOS, but the end mark takes its place in what the model
reads: the completion holds the EOS, which is scored and credited, and `sid_positions.read_ids` puts the end mark there.

TRL hands every prompt G times in a row; here it is read once. When a process holds part of a group (its rows are no
multiple of G), independent samples, reasonings and beams still come out right, because each row only needs its number
within the group; a set drawn without replacement does not, and the trainer refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from sidtune.core.errors import ConfigError
from sidtune.core.ragged import pad
from sidtune.decoding.trie import SidTrie
from sidtune.trainers.grpo.config import DebiasedGRPOConfig


@dataclass(frozen=True)
class Rows:
    """Where the rows of this process stand among those of all processes.

    Attributes:
        first: number of the first row. count: rows here, n. group_size: G.
    """

    first: int
    count: int
    group_size: int

    @property
    def numbers(self) -> np.ndarray:
        return np.arange(self.first, self.first + self.count)

    @property
    def groups(self) -> np.ndarray:
        """(n,) group of each row, counted over all processes."""
        return self.numbers // self.group_size

    @property
    def places(self) -> np.ndarray:
        """(n,) number of each row within its group."""
        return self.numbers % self.group_size

    @property
    def whole(self) -> bool:
        """Whether no group is shared with another process."""
        return self.first % self.group_size == 0 and self.count % self.group_size == 0


@dataclass
class Rollout:
    """n rows.

    Attributes:
        prompt_ids, completion_ids: token ids of each row.
        credit_mask: 1 on completion tokens that may carry a gradient.
        leaves: (n, K) leaves, best first, -1 where there is none; K = 1 for direct rollouts.
        scores: (n, K) float32 log-probabilities of the leaves given prompt and reasoning, -inf where there is none.
        complete: (n,) bool, the set of the row's group holds every leaf there is (without replacement only).
        closed: (n,) bool, the reasoning ended by its own end mark; None without reasoning.
        reasoning_lengths: (n,) tokens of the reasoning without its end mark; None without reasoning.
        cut: (n,) bool, the reasoning reached its limit, neither end mark nor EOS was sampled; default: not closed.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    credit_mask: list[list[int]]
    leaves: Tensor
    scores: Tensor
    complete: Tensor | None = None
    closed: Tensor | None = None
    reasoning_lengths: Tensor | None = None
    cut: Tensor | None = None

    def __post_init__(self) -> None:
        if self.cut is None and self.closed is not None:
            self.cut = ~self.closed

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass
class RolloutMaker:
    """Makes rollouts of one kind.

    Args:
        config: kind, temperature, beams, lengths.
        trie: the catalogue. sid_token_ids: (sum of level sizes,) token of each code, level-major.
        eos_token_id, pad_token_id: of the tokenizer. end_token_id: the end mark of a reasoning, needed for "reasoning".
    """

    config: DebiasedGRPOConfig
    trie: SidTrie
    sid_token_ids: np.ndarray | Tensor
    eos_token_id: int
    pad_token_id: int
    end_token_id: int | None = None
    _tokens: Tensor = field(init=False)
    _starts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._tokens = torch.from_numpy(np.array(self.sid_token_ids, dtype=np.int64))
        sizes = torch.tensor(self.trie.level_sizes)
        self._starts = sizes.cumsum(0) - sizes
        if self.config.rollout == "reasoning" and self.end_token_id is None:
            raise ConfigError(
                "rollout 'reasoning' needs the token that ends a reasoning; give the trainer end_token_id, or use a direct "
                "rollout such as sample."
            )

    def tokens_of(self, leaves: Tensor) -> Tensor:
        """Leaves (*,) → token ids (*, L) on the CPU; those of leaf 0 where the leaf is -1."""
        codes = self.trie.leaf_codes(leaves.to(self.trie.device).clamp(min=0)).cpu()
        return self._tokens[codes + self._starts]

    def __call__(self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], rows: Rows) -> Rollout:
        """Rolls out. Call it on every process; each makes the same number of calls of the model.

        Args:
            model: the policy, unwrapped and whole. prompt_ids: of each row here, those of a group equal.
        """
        prompts = [list(ids) for ids in prompt_ids]
        if self.config.rollout == "reasoning":
            return self._reasoned(model, prompts, rows)
        leaves, scores, complete = self._direct(model, prompts, rows)
        return self._rows(prompts, leaves, scores, complete)

    def _direct(self, model: nn.Module, prompts: list[list[int]], rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        """(n, 1) leaves and scores, and whether the sets are complete."""
        _, first, owner = np.unique(rows.groups, return_index=True, return_inverse=True)
        ids, mask = pad_left([prompts[row] for row in first], self.pad_token_id)
        options = {"trie": self.trie, "sid_token_ids": self._tokens, "max_rows": self.config.max_rollout_rows}
        places, complete = rows.places, None
        if self.config.rollout == "beam":
            from sidtune.decoding.beam_search import sid_beam_search

            found = sid_beam_search(model, ids, mask, num_beams=rows.group_size, **options)
            leaves, scores = found.leaves, found.scores
        else:
            from sidtune.decoding.sampling import sid_sample

            independent = self.config.rollout == "sample"
            options |= {"replacement": independent, "temperature": self.config.temperature}
            drawn = sid_sample(model, ids, mask, num_samples=rows.group_size, **options)
            leaves, scores = drawn.leaves, drawn.log_probs
            if not independent:
                complete = (drawn.threshold == float("-inf")).cpu()[owner]
        chosen = leaves.cpu()[owner, places], scores.float().cpu()[owner, places]
        return chosen[0][:, None], chosen[1][:, None], complete

    def _rows(self, prompts: list[list[int]], leaves: Tensor, scores: Tensor, complete: Tensor | None) -> Rollout:
        alive = (leaves[:, 0] >= 0).tolist()
        tokens = self.tokens_of(leaves[:, 0]).tolist()
        depth = self.trie.depth
        return Rollout(
            prompts,
            [[*sid, self.eos_token_id] if ok else [self.eos_token_id] for sid, ok in zip(tokens, alive, strict=True)],
            [[1] * depth + [0] if ok else [0] for ok in alive],
            leaves,
            scores.masked_fill(leaves < 0, float("-inf")),
            complete,
        )

    def _reasoned(self, model: nn.Module, prompts: list[list[int]], rows: Rows) -> Rollout:
        from sidtune.decoding.reasoning import reason_then_search

        many = rows.group_size if rows.whole else 1
        ids, mask = pad_left(prompts[::many], self.pad_token_id)
        found = reason_then_search(
            *(model, ids, mask),
            trie=self.trie,
            sid_token_ids=self._tokens,
            end_token_id=self.end_token_id,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
            max_reasoning_tokens=self.config.max_completion_length,
            num_beams=self.config.num_beams,
            num_reasonings=many,
            do_sample=True,
            temperature=self.config.temperature,
            # A ban would make the sampler another distribution than the one that is scored.
            forbid_sids=False,
            max_rows=self.config.max_rollout_rows,
        )
        ended_texts = [text for texts in found.texts() for text in texts]
        beams = found.beams
        return self._with_reasoning(
            prompts,
            [text[:-1] for text in ended_texts],
            found.closed.flatten().cpu(),
            beams.leaves.cpu(),
            beams.scores.cpu(),
            found.stopped.flatten().cpu(),
        )

    def _with_reasoning(
        self,
        prompts: list[list[int]],
        texts: list[list[int]],
        closed: Tensor,
        leaves: Tensor,
        scores: Tensor,
        stopped: Tensor | None = None,
    ) -> Rollout:
        """Rows from the reasonings without their end mark; `closed` by their own, `stopped` by EOS, else cut at the limit."""
        cut = ~closed if stopped is None else ~closed & ~stopped
        masked = self.config.mask_truncated_completions
        marks = torch.where(~closed & ~cut, self.eos_token_id, self.end_token_id).tolist()
        tokens = self.tokens_of(leaves[:, 0]).tolist()
        completions, masks = [], []
        alive = (leaves[:, 0] >= 0).tolist()
        for text, forced, mark, sid, found in zip(texts, cut.tolist(), marks, tokens, alive, strict=True):
            sid = sid if found else []
            completions.append([*text, mark, *sid, self.eos_token_id])
            mask = [1] * len(text) + [int(not forced)] + [0] * (len(sid) + 1)
            masks.append([0] * len(mask) if masked and forced else mask)
        lengths = torch.tensor([len(text) for text in texts])
        scores = scores.float().masked_fill(leaves < 0, float("-inf"))
        return Rollout(prompts, completions, masks, leaves, scores, None, closed, lengths, cut)


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """(n, longest) ids and mask, padded on the left."""
    ids, mask = pad(rows, pad_token_id)
    return torch.from_numpy(ids), torch.from_numpy(mask)
