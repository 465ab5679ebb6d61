"""The two decoder-only next-item networks: over all codes (`tokens`) and over items (`items`). See `models/next_item/network.py`.

In both, the state from which an item's first code is written has seen every earlier item of the sequence and nothing else, so one
pass over a history learns all its items at once and gives each the loss it would have at the end of a copy of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidtune.models.next_item.blocks import Block, KeyValues, block_flops
from sidtune.models.next_item.network import NextItemConfig, NextItemNetwork, NextTargets, item_mask


def _blocks(config: NextItemConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(Block(config.width, config.heads, config.feed_forward, config.dropout) for _ in range(count))


def _with_user(mask: Tensor) -> Tensor:
    """(B, S, S) to (B, S + 1, S + 1): a first column that all may see, and a first row that sees only itself."""
    mask = nn.functional.pad(mask, (1, 0, 1, 0), value=False)
    mask[:, :, 0] = True
    return mask


@dataclass(frozen=True)
class TokenMemory:
    """A read history: `past` keys and values per block, `seen` (B, S) the positions that count, `next` (B,) the position of the
    code to come, `state` (B, D_model) the last state."""

    past: list[KeyValues]
    seen: Tensor
    next: Tensor
    state: Tensor


class TokenDecoder(NextItemNetwork):
    """A causal decoder over all codes of the history; an item is `depth` positions."""

    def __init__(self, config: NextItemConfig) -> None:
        super().__init__(config)
        self.blocks = _blocks(config, config.layers)
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self._initialise()

    def _run(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[KeyValues], Tensor]:
        """States (B, S, D_model), keys and values per block, and (B, S) which positions hold something."""
        depth = self.config.depth
        x = self.embed(batch["codes"])
        if self.items is not None:
            # Only the last code of an item: from there on the item is known, before it is being written.
            last = torch.arange(depth, device=x.device) == depth - 1
            x = x + self.items(batch["rows"].clamp(min=0))[:, :, None] * last[:, None]
        x = x.flatten(1, 2)
        segments = batch["segments"].repeat_interleave(depth, dim=1)
        mask, seen = item_mask(segments), segments >= 0
        if self.users is not None:
            x = torch.cat([self.user_vectors(batch["users"]), x], dim=1)
            mask, seen = _with_user(mask), nn.functional.pad(seen, (1, 0), value=True)
        x, past = self.dropout(x), []
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        for block in self.blocks:
            x, pair = block(x, positions, mask[:, None])
            past.append(pair)
        return self.norm(x), past, seen

    def forward(self, **batch: Tensor) -> NextTargets:
        states, _, _ = self._run(batch)
        row, place = batch["learn"].nonzero(as_tuple=True)
        before = place * self.config.depth - 1 + int(self.users is not None)
        logits = [self.level_logits(states[row, before + level], level) for level in range(self.config.depth)]
        return NextTargets(logits, states[row, before])

    def read(self, **batch: Tensor) -> TokenMemory:
        states, past, seen = self._run(batch)
        count = seen.sum(dim=1)
        return TokenMemory(past, seen, count, states[torch.arange(len(states), device=states.device), count - 1])

    def continue_codes(self, memory: TokenMemory, codes: Tensor) -> list[Tensor]:
        rows, width, length = codes.shape
        logits = [self.level_logits(memory.state, 0)[:, None].expand(-1, width, -1)]
        if not length:
            return logits
        x = self.embed(codes).flatten(1, 2)
        positions = (memory.next[:, None, None] + torch.arange(length, device=x.device)).expand(rows, width, length)
        own = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        own = torch.block_diag(*[own] * width).expand(rows, -1, -1).bool()
        mask = torch.cat([memory.seen[:, None].expand(-1, width * length, -1), own], dim=-1)[:, None]
        for block, past in zip(self.blocks, memory.past, strict=True):
            x, _ = block(x, positions.flatten(1), mask, past)
        states = self.norm(x).view(rows, width, length, -1)
        return logits + [self.level_logits(states[:, :, level], level + 1) for level in range(length)]

    def forward_flops(self, batch: int, items: int, targets: int) -> int:
        length = items * self.config.depth + (self.users is not None)
        one = block_flops(self.config.width, self.config.feed_forward, batch * length, batch * length * length)
        return self.config.layers * one + self.head_flops(targets)


class ItemDecoder(NextItemNetwork):
    """One position per item over the history, and a second small decoder that writes the codes from one state."""

    def __init__(self, config: NextItemConfig) -> None:
        super().__init__(config)
        self.blocks = _blocks(config, config.layers)
        self.code_blocks = _blocks(config, config.code_layers)
        self.norm, self.code_norm = nn.RMSNorm(config.width, eps=1e-6), nn.RMSNorm(config.width, eps=1e-6)
        self._initialise()

    def _run(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T, D_model): the state after each item (and the user token before them is dropped again)."""
        x = self.embed(batch["codes"]).sum(dim=2)
        if self.items is not None:
            x = x + self.items(batch["rows"].clamp(min=0))
        mask = item_mask(batch["segments"])
        if self.users is not None:
            x, mask = torch.cat([self.user_vectors(batch["users"]), x], dim=1), _with_user(mask)
        x = self.dropout(x)
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        for block in self.blocks:
            x, _ = block(x, positions, mask[:, None])
        return self.norm(x if self.users is None else x[:, 1:])

    def _write(self, states: Tensor, codes: Tensor) -> list[Tensor]:
        """States (n, D_model) and prefixes (n, l) give per level 0 .. l the scores (n, k_level)."""
        x = torch.cat([states[:, None], self.dropout(self.embed(codes))], dim=1)
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        for block in self.code_blocks:
            x, _ = block(x, positions, None)
        x = self.code_norm(x)
        return [self.level_logits(x[:, level], level) for level in range(x.shape[1])]

    def forward(self, **batch: Tensor) -> NextTargets:
        row, place = batch["learn"].nonzero(as_tuple=True)
        states = self._run(batch)[row, place - 1]
        prefixes = batch.get("target_codes", batch["codes"])[row, place, :-1]
        return NextTargets(self._write(states, prefixes), states)

    def read(self, **batch: Tensor) -> Tensor:
        states, count = self._run(batch), (batch["segments"] >= 0).sum(dim=1)
        return states[torch.arange(len(states), device=states.device), count - 1]

    def continue_codes(self, memory: Tensor, codes: Tensor) -> list[Tensor]:
        rows, width = codes.shape[:2]
        states = memory[:, None].expand(-1, width, -1).flatten(0, 1)
        return [part.view(rows, width, -1) for part in self._write(states, codes.flatten(0, 1))]

    def next_logits(self, memory: Tensor, codes: Tensor) -> Tensor:
        rows, width, length = codes.shape
        states = memory[:, None].expand(-1, width, -1).flatten(0, 1)
        x = torch.cat([states[:, None], self.embed(codes.flatten(0, 1))], dim=1)
        positions = torch.arange(length + 1, device=x.device).expand(x.shape[:2])
        for block in self.code_blocks[:-1]:
            x, _ = block(x, positions, None)
        last = self.code_norm(self.code_blocks[-1].last(x, positions))
        return self.level_logits(last, length).view(rows, width, -1)

    def forward_flops(self, batch: int, items: int, targets: int) -> int:
        config, length = self.config, items + (self.users is not None)
        over = block_flops(config.width, config.feed_forward, batch * length, batch * length * length)
        depth = config.depth
        write = block_flops(config.width, config.feed_forward, targets * depth, targets * depth * depth)
        return config.layers * over + config.code_layers * write + self.head_flops(targets)
