"""TIGER's encoder-decoder (2305.05065) on transformers' T5 stacks, trained on whole histories or on windows.

How an encoder-decoder learns several targets of a user in one pass: the encoder's attention is causal between items (a code sees
all codes of its own item and of earlier items), so the states of the first t items do not depend on what follows. The decoder gets
one block of codes per target; a block sees itself, and of the encoder only the items before its target. The loss of a target is
then exactly its loss at the end of a window of its own **under the same encoder mask**; what is given up against TIGER is that
early items cannot see later ones. `causal_encoder: false` restores TIGER's full attention and takes windows only.

A causal encoder cannot mark the last item, and T5's cross-attention has no positions; so under a causal encoder the cross-attention
gets a learned bias by how many items ago a position was (one table for all layers, as T5's other biases). It begins as a slope of
its own per head, 1, 1/2, 1/4, ... an item. With full attention the stock form is kept.

Other differences from TIGER: codes begin as small vectors and are scored with the same vectors unscaled (T5's begin with variance 1
and are scaled by 1/sqrt(D_model) at the output, which takes many more epochs on small data), and there is no end-of-item token (a
SID has a fixed length, and the trie knows when it ends).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Stack

from sidtune.core.errors import ConfigError
from sidtune.models.next_item.network import NextItemConfig, NextItemNetwork, NextTargets, item_mask


@dataclass(frozen=True)
class T5Memory:
    """A read history: `states` (B, S, D_model) of the encoder, `seen` (B, S) bool, the positions that count, `ago` (B, S) int64,
    how many items before the target they are (0 for the user token)."""

    states: Tensor
    seen: Tensor
    ago: Tensor


_LONGEST_AGO = 31


def _additive(mask: Tensor) -> Tensor:
    """(B, Q, K) bool as the (B, 1, Q, K) float mask that T5 adds to its scores."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]


class NextItemT5(NextItemNetwork):
    """An encoder over the codes of the history and a decoder over the codes of the target."""

    def __init__(self, config: NextItemConfig) -> None:
        super().__init__(config)
        shape = {
            "vocab_size": 1,
            "eos_token_id": None,
            "d_model": config.width,
            "d_kv": config.head_dim or config.width // config.heads,
            "d_ff": config.feed_forward,
            "num_heads": config.heads,
            "dropout_rate": config.dropout,
            "use_cache": False,
            "attn_implementation": "eager",
        }
        self.encoder = T5Stack(T5Config(**shape, num_layers=config.layers, is_decoder=False))
        self.decoder = T5Stack(T5Config(**shape, num_layers=config.code_layers, is_decoder=True))
        for stack in (self.encoder, self.decoder):
            stack.set_input_embeddings(nn.Identity())  # codes are embedded here; an unused table would still be saved
        self.start = nn.Parameter(torch.randn(config.width) * 0.02)
        self.recency = nn.Embedding(_LONGEST_AGO + 1, config.heads) if config.causal_encoder else None
        for part in (self.codes, self.head, self.levels, self.users, self.items, *self.ahead):
            if part is not None:
                nn.init.normal_(part.weight, std=0.02)
        if self.recency is not None:
            with torch.no_grad():
                ago = (torch.arange(_LONGEST_AGO + 1) - 1).clamp(min=0)
                self.recency.weight.copy_(-ago[:, None] * 2.0 ** -torch.arange(config.heads))

    def _encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, S, D_model) states and (B, S) segments of the positions; the user token has the segment -2."""
        depth, segments, causal = self.config.depth, batch["segments"], self.config.causal_encoder
        x = self.embed(batch["codes"])
        if self.items is not None:
            x = x + self.items(batch["rows"].clamp(min=0))[:, :, None]
        x = x.flatten(1, 2)
        mask = item_mask(segments) if causal else segments[:, :, None] == segments[:, None, :]
        mask = mask.repeat_interleave(depth, dim=1).repeat_interleave(depth, dim=2)
        segments = segments.repeat_interleave(depth, dim=1)
        if self.users is not None:
            x = torch.cat([self.user_vectors(batch["users"]), x], dim=1)
            mask = nn.functional.pad(mask, (1, 0, 1, 0), value=True)
            mask[:, 0, 1:] = (segments >= 0) & (not causal)
            segments = nn.functional.pad(segments, (1, 0), value=-2)
        states = self.encoder(inputs_embeds=x, attention_mask=_additive(mask)).last_hidden_state
        return states, segments

    def _decode(self, states: Tensor, visible: Tensor, ago: Tensor, codes: Tensor) -> Tensor:
        """Decoder states (B, W, l + 1, D_model) for prefixes (B, W, l).

        Args:
            states: (B, S, D_model) of the encoder. visible: (B, W, S) bool, which of them each block may see.
            ago: (B, W, S) int64, how many items before the block's target they are.
        """
        rows, width, length = codes.shape
        start = self.start.expand(rows, width, 1, -1)
        x = torch.cat([start, self.embed(codes)], dim=2).flatten(1, 2)
        own = torch.ones(length + 1, length + 1, dtype=torch.bool, device=x.device).tril()
        own = torch.block_diag(*[own] * width).bool()[None]
        cross = _additive(visible)
        if self.recency is not None:
            cross = cross + self.recency(ago.clamp(0, _LONGEST_AGO)).permute(0, 3, 1, 2)
        found = self.decoder(
            inputs_embeds=x,
            attention_mask=_additive(own).expand(rows, -1, -1, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=cross.repeat_interleave(length + 1, dim=2),
        ).last_hidden_state
        return found.view(rows, width, length + 1, -1)

    def forward(self, **batch: Tensor) -> NextTargets:
        learn, depth = batch["learn"], self.config.depth
        count = learn.sum(dim=1)
        history = batch
        if not self.config.causal_encoder:
            if int(count.max()) > 1:
                raise ConfigError("An encoder with full attention takes one target per row; train it on windows.")
            # Full attention may only be over the history: the target would tell itself.
            history = {**batch, "segments": batch["segments"].masked_fill(learn, -1)}
        states, segments = self._encode(history)
        slot = torch.sort((~learn).to(torch.int8), dim=1, stable=True).indices[:, : max(1, int(count.max()))]
        filled = torch.arange(slot.shape[1], device=slot.device) < count[:, None]
        place = torch.arange(states.shape[1], device=slot.device) - int(self.users is not None)
        segment = batch["segments"].gather(1, slot)
        visible = (segments[:, None] == segment[..., None]) & (place < slot[..., None] * depth)
        visible |= segments[:, None] == -2
        # A block without a target still needs something to look at, or its softmax has no sum.
        visible[..., 0] |= ~filled
        codes = batch.get("target_codes", batch["codes"]).gather(1, slot[..., None].expand(-1, -1, depth))
        ago = (slot[..., None] - place.div(depth, rounding_mode="floor")).where(segments[:, None] != -2, 0)
        found = self._decode(states, visible, ago, codes[..., :-1])[filled]
        return NextTargets([self.level_logits(found[:, level], level) for level in range(depth)], found[:, 0])

    def read(self, **batch: Tensor) -> T5Memory:
        states, segments = self._encode(batch)
        place = torch.arange(states.shape[1], device=states.device) - int(self.users is not None)
        items = (batch["segments"] >= 0).sum(dim=1, keepdim=True)
        ago = (items - place.div(self.config.depth, rounding_mode="floor")).where(segments != -2, 0)
        return T5Memory(states, segments != -1, ago)

    def continue_codes(self, memory: T5Memory, codes: Tensor) -> list[Tensor]:
        visible, ago = (part[:, None].expand(-1, codes.shape[1], -1) for part in (memory.seen, memory.ago))
        found = self._decode(memory.states, visible, ago, codes)
        return [self.level_logits(found[:, :, level], level) for level in range(found.shape[2])]

    def forward_flops(self, batch: int, items: int, targets: int) -> int:
        config = self.config
        inner = (config.head_dim or config.width // config.heads) * config.heads
        length, depth = items * config.depth + (self.users is not None), config.depth
        attention, feed = 8 * config.width * inner, 4 * config.width * config.feed_forward
        encoder = batch * length * (attention + feed) + 4 * batch * length * length * inner
        blocks = -(-targets // batch) * batch
        written = blocks * depth
        per_row = written // batch
        decoder = written * (attention + 4 * config.width * inner + feed) + 4 * batch * per_row * per_row * inner
        cross = 4 * config.width * inner * batch * length + 4 * written * length * inner
        return config.layers * encoder + config.code_layers * (decoder + cross) + self.head_flops(targets)
