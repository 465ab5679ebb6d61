"""Pre-norm transformer blocks with rotary positions, for small next-item networks.

The layout is that of today's language models (RMSNorm before each part, rotary positions, SwiGLU, no biases) with dropout after
each part, which small data needs and language models leave out. Positions are relative, so a history scores the same wherever it
begins: a copy cut out of a longer row, or several users packed into one row, see what they would see alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KeyValues = tuple[Tensor, Tensor]
_ROTARY_BASE = 10_000.0


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions: x (B, H, S, D) with D even and positions (B, S) give the turned x."""
    half = x.shape[-1] // 2
    rates = _ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Block(nn.Module):
    """Attention and feed-forward, each after its norm and added to its input.

    Args:
        width: D_model. heads: attention heads, which divide the width into even parts. feed_forward: inner width.
        dropout: of the attention weights and of what each part adds.
    """

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.feed_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * feed_forward, bias=False)
        self.down = nn.Linear(feed_forward, width, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, past: KeyValues | None = None
    ) -> tuple[Tensor, KeyValues]:
        """One block.

        Args:
            x: (B, S, D_model). positions: (B, S).
            mask: bool, broadcast to (B, H, S, K), True where a query may look; None for a causal mask.
            past: keys and values (B, H, P, D) that stand before those of `x`; K = P + S.

        Returns:
            (B, S, D_model), and keys and values (B, H, K, D).
        """
        batch, length, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, positions), rotate(k, positions)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate, is_causal=mask is None)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)), self.dropout, self.training)
        gate, up = self.up(self.feed_norm(x)).chunk(2, dim=-1)
        x = x + F.dropout(self.down(F.silu(gate) * up), self.dropout, self.training)
        return x, (k, v)

    def last(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, D_model): what a causal `forward` gives at the last of the positions x (B, S, D_model), without the others."""
        batch, length, width = x.shape
        normed = self.attention_norm(x)
        q = F.linear(normed[:, -1:], self.qkv.weight[:width]).view(batch, 1, self.heads, -1).transpose(1, 2)
        pairs = F.linear(normed, self.qkv.weight[width:]).view(batch, length, 2, self.heads, -1)
        k, v = pairs.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, positions[:, -1:]), rotate(k, positions)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, width)
        x = x[:, -1] + self.out(mixed)
        gate, up = self.up(self.feed_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def block_flops(width: int, feed_forward: int, tokens: int, pairs: int) -> int:
    """Multiply-adds times two of one block forward: `tokens` positions, `pairs` (query, key) pairs that are computed."""
    return 2 * tokens * (4 * width * width + 3 * width * feed_forward) + 4 * pairs * width
