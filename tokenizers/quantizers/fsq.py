"""Finite scalar quantization (Mentzer et al. 2023): an autoencoder whose latent coordinates are rounded to small grids.

Every coordinate is squashed to its number of grid points g, `b(z) = tanh(z + s) h - o` with `h = (g - 1)(1 + ε) / 2`, `o = 1/2`
for even g else 0 and `s = artanh(o / h)`, then rounded with a straight-through gradient. There is no codebook to learn, so none
can collapse, and the only loss is the reconstruction.

Where it differs from the paper (our choices): the paper reads all coordinates as one code. A language model needs few
thousand tokens, so `grids` names the coordinates of each SID level, and the level's code is their mixed-radix number (first
coordinate fastest). The levels have no order from coarse to fine; a prefix decodes with the other coordinates at
their training mean. Use it to compare, or where codebook learning collapses; for generation prefer residual methods,
whose prefixes group similar items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError
from sidtune.tokenizers.letters import check_sizes
from sidtune.tokenizers.quantizers.training import CodeModule, NeuralQuantizer, TrainingConfig, mlp

_EPSILON = 1e-3


@dataclass
class FsqConfig(TrainingConfig):
    """Options of `Fsq`, beside those of the training loop.

    Attributes:
        grids: per SID level, the grid points of its coordinates. Default three levels of 8·8·4 = 256 codes. The paper
            advises at least 5 points per coordinate; [8, 6, 5] (240 codes) follows that.
        hidden, dropout: widths of the encoder's hidden layers, which the decoder mirrors, and dropout between them.
    """

    grids: Sequence[Sequence[int]] = ((8, 8, 4), (8, 8, 4), (8, 8, 4))
    hidden: Sequence[int] = (512, 256, 128)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grids, self.hidden = tuple(tuple(level) for level in self.grids), tuple(self.hidden)
        sound = [level and all(isinstance(g, int) and g >= 2 for g in level) for level in self.grids]
        if not sound or not all(sound):
            raise ConfigError(
                f"grids must be one list of integers of at least 2 per level, got {[list(level) for level in self.grids]}."
            )
        check_sizes([math.prod(level) for level in self.grids])
        check_range(self, 1, "hidden")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout}.")


class FsqModule(CodeModule):
    """Encoder, grids, decoder of vectors `dims` wide."""

    def __init__(self, dims: int, config: FsqConfig) -> None:
        super().__init__()
        points = [g for level in config.grids for g in level]
        self.ends = list(np.cumsum([len(level) for level in config.grids]))
        widths = [dims, *config.hidden, len(points)]
        self.encoder, self.decoder = mlp(widths, config.dropout), mlp(widths[::-1], config.dropout)
        grid = torch.tensor(points, dtype=torch.float64)
        half = (grid - 1) * (1 + _EPSILON) / 2
        offset = torch.where(grid % 2 == 0, 0.5, 0.0)
        self.register_buffer("grid", grid.float(), persistent=False)
        self.register_buffer("reach", half.float(), persistent=False)
        self.register_buffer("offset", offset.float(), persistent=False)
        self.register_buffer("shift", torch.atanh(offset / half).float(), persistent=False)
        basis = [math.prod(level[:n]) for level in config.grids for n in range(len(level))]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)
        self.register_buffer("mean_point", torch.zeros(len(points)))

    def bounded(self, vectors: Tensor) -> Tensor:
        """Coordinates (n, c) before rounding, each within its grid."""
        return torch.tanh(self.encoder(vectors) + self.shift) * self.reach - self.offset

    def scaled(self, rounded: Tensor) -> Tensor:
        """Grid points as numbers within [-1, 1], which is what the decoder sees."""
        return rounded / torch.div(self.grid, 2, rounding_mode="floor")

    def digits(self, rounded: Tensor) -> Tensor:
        """(n, c) int64 numbers of grid points, from 0."""
        lowest = -torch.div(self.grid, 2, rounding_mode="floor")
        return (rounded - lowest).round().long()

    def codes(self, rounded: Tensor) -> Tensor:
        """(n, L) int64 codes of rounded coordinates."""
        products = self.digits(rounded) * self.basis
        starts = [0, *self.ends[:-1]]
        parts = [products[:, a:b].sum(dim=1) for a, b in zip(starts, self.ends, strict=True)]
        return torch.stack(parts, dim=1)

    def points(self, codes: Tensor) -> Tensor:
        """Scaled coordinates (n, c) of codes (n, l); coordinates of further levels are at their training mean."""
        made = self.mean_point.to(self.grid.dtype).repeat(len(codes), 1)
        starts = [0, *self.ends[:-1]]
        for level in range(codes.shape[1]):
            a, b = starts[level], self.ends[level]
            digits = (
                torch.div(codes[:, level : level + 1], self.basis[a:b], rounding_mode="floor") % self.grid[a:b].long()
            )
            lowest = -torch.div(self.grid[a:b], 2, rounding_mode="floor")
            made[:, a:b] = (digits + lowest) / torch.div(self.grid[a:b], 2, rounding_mode="floor")
        return made

    def losses(self, vectors: Tensor, rows: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        bounded = self.bounded(vectors)
        rounded = bounded + (bounded.round() - bounded).detach()
        scaled = self.scaled(rounded)
        if self.training:
            with torch.no_grad():
                self.mean_point.lerp_(scaled.mean(dim=0), 0.05)
        return {"reconstruction": F.mse_loss(self.decoder(scaled), vectors)}, self.codes(bounded.detach().round())


class Fsq(NeuralQuantizer):
    """FSQ quantizer. `codebooks` are implied: the scaled coordinates a code stands for, zero elsewhere."""

    name: ClassVar[str] = "fsq"
    config_class: ClassVar[type] = FsqConfig

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(level) for level in self.config.grids)

    @property
    def codebooks(self) -> list[np.ndarray]:
        module, books = self._ready(), []
        for level, (start, end) in enumerate(zip([0, *module.ends[:-1]], module.ends, strict=True)):
            codes = torch.zeros(self.level_sizes[level], self.depth, dtype=torch.int64)
            codes[:, level] = torch.arange(len(codes))
            book = np.zeros((len(codes), module.ends[-1]), dtype=np.float32)
            book[:, start:end] = module.points(codes)[:, start:end].numpy()
            books.append(book)
        return books

    def _build(self, dims: int) -> FsqModule:
        return FsqModule(dims, self.config)

    def _codes(self, module: Any, vectors: Tensor) -> np.ndarray:
        return module.codes(module.bounded(vectors).round()).numpy()

    def _vectors(self, module: Any, codes: Tensor) -> Tensor:
        return module.decoder(module.points(codes))
