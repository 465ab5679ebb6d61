"""The SID constraint for anyone's own `generate`: one vectorised mask per step, no Python per beam.

It keeps no state: the place in the trie is found again from the generated tokens, so one object may serve several
`generate` calls, also interleaved ones (a step counter kept in the object is a known defect of peers; see
`specs/crs_debiased_grpo.md` 2.9). For constrained search itself `sid_beam_search` does less work and needs none of the
settings below.

Settings it needs: `max_new_tokens=min_new_tokens=trie.depth` and no warpers that cut tokens (`top_k`, `top_p`, `min_p`
run after processors). With `num_beams`, add `renormalize_logits=True` and `length_penalty=0.0` to get our scores, and
drop rows whose score is below -1e8: with more beams than leaves, `generate` fills up with repeated or dead rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from sidtune.core.errors import ConfigError
from sidtune.decoding.beam_search import split_levels
from sidtune.decoding.trie import SidTrie


class SidLogitsProcessor(LogitsProcessor):
    """Leaves the legal next codes of each row as they are and sets every other token to -inf.

    Args:
        trie: legal SIDs, possibly filtered.
        sid_token_ids: (sum of level sizes,) token ids, as for `sid_beam_search`.
        prompt_length: columns of `input_ids` before the SID: the padded prompt length T for decoder-only models, 1 (the
            start token) for encoder-decoders.
        eos_token_id: the only token allowed after a complete SID. Default None: asking for more is an error.

    A row whose codes are no prefix of a SID (a dead beam) may only take the first code of the level, so that a softmax
    over it stays finite; its score is -inf already and no leaf can come of it.

    Raises:
        DataError: token ids that do not fit the trie. ConfigError: negative prompt_length.
    """

    def __init__(
        self,
        trie: SidTrie,
        sid_token_ids: np.ndarray | Tensor,
        prompt_length: int,
        *,
        eos_token_id: int | None = None,
    ) -> None:
        if prompt_length < 0:
            raise ConfigError(f"prompt_length must not be negative, got {prompt_length}; pass the prompt's columns.")
        self.trie = trie
        self.prompt_length = prompt_length
        self.eos_token_id = eos_token_id
        self._set_tokens(split_levels(trie, sid_token_ids, None, trie.device))

    def _set_tokens(self, level_tokens: list[Tensor]) -> None:
        self._level_tokens = level_tokens
        size = 2 + max(int(tokens.max()) for tokens in level_tokens)
        # One slot past the largest token stands for every token that is no code.
        self._codes = torch.full((len(level_tokens), size), -1, dtype=torch.int64, device=level_tokens[0].device)
        for level, tokens in enumerate(level_tokens):
            self._codes[level, tokens] = torch.arange(len(tokens), device=tokens.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, columns) token ids and (rows, V) scores give (rows, V) scores."""
        if self.trie.device != scores.device:
            self.trie = self.trie.to(scores.device)
            self._set_tokens([tokens.to(scores.device) for tokens in self._level_tokens])
        generated = input_ids[:, self.prompt_length :]
        level = generated.shape[1]
        masked = torch.full_like(scores, float("-inf"))
        if level >= self.trie.depth:
            return self._after_sid(masked, level)
        tokens = self._level_tokens[level]
        nodes = self.trie.find(self._codes_of(generated))
        legal = self.trie.legal_mask(level, nodes)
        masked[:, tokens] = scores[:, tokens].masked_fill(~legal, float("-inf"))
        masked[:, tokens[0]] = masked[:, tokens[0]].where(legal.any(dim=1), 0.0)
        return masked

    def _codes_of(self, generated: Tensor) -> Tensor:
        levels = torch.arange(generated.shape[1], device=generated.device)
        return self._codes[levels, generated.clamp(max=self._codes.shape[1] - 1)]

    def _after_sid(self, masked: Tensor, level: int) -> Tensor:
        if self.eos_token_id is None:
            raise ConfigError(
                f"generate() asks for token {level + 1} of a SID that has {self.trie.depth}; set max_new_tokens="
                f"{self.trie.depth}, or pass eos_token_id to end after the SID."
            )
        masked[:, self.eos_token_id] = 0.0
        return masked
