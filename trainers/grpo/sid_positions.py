"""Where the SID of a completion stands and which codes its tokens are, for log-probabilities over the trie.

Old, new and reference policy are all scored by `group_logps.py` with what is found here, so that no ratio mixes two
normalisations (`specs/crs_debiased_grpo.md` 4, rows 10 and 11).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sidtune.decoding.trie import SidTrie


class SidTable:
    """Which token is which code, and where in a completion the SID stands.

    Args:
        trie: the catalogue. sid_token_ids: (sum of level sizes,) token of each code, level-major.
        reasoned: completions end with SID and EOS after a reasoning; otherwise they begin with the SID.
    """

    def __init__(self, trie: SidTrie, sid_token_ids: Tensor, reasoned: bool) -> None:
        self.trie, self.tokens, self.reasoned = trie, sid_token_ids.long(), reasoned
        sizes = torch.tensor(trie.level_sizes)
        self.starts = (sizes.cumsum(0) - sizes).tolist()
        self.place = torch.full((int(self.tokens.max()) + 1,), -1, dtype=torch.int64)
        self.place[self.tokens] = torch.arange(len(self.tokens))

    def to(self, device: torch.device) -> SidTable:
        if self.tokens.device != device:
            self.trie, self.tokens, self.place = self.trie.to(device), self.tokens.to(device), self.place.to(device)
        return self

    def find(self, completion_ids: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The SID of each completion, by its place and never by its looks: a weak policy writes SID tokens into a
        reasoning too.

        Args:
            completion_ids, completion_mask: (B, C).

        Returns:
            (B,) column of the first SID token, -1 where no catalogue SID stands there, and (B, L) its codes, -1
            likewise.
        """
        depth = self.trie.depth
        length = completion_mask.sum(1)
        start = length - 1 - depth if self.reasoned else torch.zeros_like(length)
        columns = start[:, None] + torch.arange(depth, device=length.device)
        inside = (columns >= 0) & (columns < length[:, None])
        tokens = completion_ids.gather(1, columns.clamp(0, completion_ids.shape[1] - 1))
        known = self.place[tokens.clamp(max=len(self.place) - 1)].where(tokens < len(self.place), -1)
        codes = known - torch.tensor(self.starts, device=known.device)
        codes = codes.where(inside & (known >= 0), -1)
        found = self.trie.find(codes) >= 0
        return start.where(found, -1), codes.where(found[:, None], -1)


def read_ids(completion_ids: Tensor, completion_mask: Tensor, eos_token_id: int, end_token_id: int | None) -> Tensor:
    """(B, C) what the model reads of completions: the end mark in place of an EOS that ended a reasoning (None: no reasonings)."""
    if end_token_id is None:
        return completion_ids
    last = completion_mask.sum(1, keepdim=True) - 1
    inside = torch.arange(completion_ids.shape[1], device=last.device) < last
    return completion_ids.masked_fill(inside & (completion_ids == eos_token_id), end_token_id)
