"""The output head of a language model, read only where and as far as a search needs it.

A vocabulary has 10^5 rows and a SID level has a few hundred, so during the model's own pass the head is fed no position
at all, its input is kept, and only the level's rows are multiplied. That is right only if the model does nothing to the
logits after its head (soft-capping, scaling, a bias). Models do, so it is measured, not assumed: in the first pass the
head's output is replaced by a known ramp, and unless the model returns that ramp unchanged, the pass is repeated and the
model's own logits are used. A head that is no plain linear layer (LoRA on it, trained token rows, quantised, sharded) is
called as it is, on the positions that are needed. All of this is our choice; the specs use `generate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_RAMP = 50.0


class LevelHead:
    """The head of one model for one search.

    Args:
        model: language model with `get_output_embeddings`.
        level_tokens: per SID level, (k_level,) int64 token ids of its codes.
    """

    def __init__(self, model: nn.Module, level_tokens: list[Tensor]) -> None:
        self.module = model.get_output_embeddings()
        self.level_tokens = level_tokens
        self.tap = isinstance(self.module, nn.Module)
        self.rows = self._level_rows()
        self._ramp: Tensor | None = None

    def _level_rows(self) -> list[tuple[Tensor, Tensor | None]] | None:
        """Weight and bias rows per level, or None where the head is anything but a plain, whole linear layer."""
        head = self.module
        # Hooks and a replaced `forward` (sharding, offloading) mean that the weight alone does not tell what it does.
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
            return None
        weight, bias = head.weight, head.bias
        if type(weight) not in (Tensor, nn.Parameter) or tuple(weight.shape) != (head.out_features, head.in_features):
            return None
        where = [tokens.to(weight.device) for tokens in self.level_tokens]
        return [(weight[rows], None if bias is None else bias[rows]) for rows in where]

    @contextlib.contextmanager
    def tapped(self, first: bool, positions: int) -> Iterator[None]:
        """Watches one forward pass of the model, of which the last `positions` columns are wanted."""
        self.hidden = self.values = self._ramp = None
        self._positions = positions
        if not isinstance(self.module, nn.Module):
            yield
            return
        hooks = [self.module.register_forward_pre_hook(self._cut)]
        if first and self.tap:
            hooks.append(self.module.register_forward_hook(self._replace))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _cut(self, module: nn.Module, arguments: tuple) -> tuple | None:
        if not arguments:
            return None
        hidden = arguments[0]
        last = hidden[..., -self._positions :, :]
        if not self.tap:
            return (last, *arguments[1:])
        self.hidden = last
        return (hidden[..., :0, :], *arguments[1:])

    def _replace(self, module: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
        if self.hidden is None:
            return None
        self._ramp = torch.linspace(-_RAMP, _RAMP, output.shape[-1], device=output.device).to(output.dtype)
        return self._ramp.expand(1, 1, -1)

    def keep(self, output: dict[str, Any], first: bool) -> bool:
        """Keeps what the pass gave for `read`. False: the model works on its logits, so the pass must be run again."""
        logits = output["logits"]
        if self.hidden is None:
            self.values = logits[:, -self._positions :]
            return True
        if first and not (logits.numel() == len(self._ramp) and torch.equal(logits.flatten(), self._ramp.to(logits))):
            self.tap = False
            return False
        return True

    def read(self, level: int, whole_vocabulary: bool) -> tuple[Tensor, Tensor | None]:
        """Logits of the last pass: (R, positions, k_level) float32, and (R, positions) log-sum-exp or None."""
        tokens = self.level_tokens[level]
        if self.values is None and self.rows is not None and not whole_vocabulary:
            weight, bias = self.rows[level]
            columns = nn.functional.linear(self.hidden.to(weight), weight, bias)
            return columns.float().to(tokens.device), None
        if self.values is None:
            self.values = self.module(self._as_head_takes_it(self.hidden))
        values = self.values.float()
        columns = values.index_select(-1, tokens.to(values.device)).to(tokens.device)
        return columns, values.logsumexp(dim=-1).to(tokens.device) if whole_vocabulary else None

    def _as_head_takes_it(self, hidden: Tensor) -> Tensor:
        """Mixed precision may run the model's pass, and thus `hidden`, in another type than this call has."""
        weight = getattr(self.module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return hidden.to(weight.dtype)
        return hidden
