"""RQ-VAE: an autoencoder whose latent vector is written as a sum of code vectors (TIGER; LC-Rec; LETTER).

`z = E(x)`, `r_0 = z`, `a_l = argmin_j ||r_{l-1} - C_l[j]||²`, `r_l = r_{l-1} - C_l[a_l]`, `ẑ = Σ_l C_l[a_l]`, `x̂ = D(ẑ)`;
`L = ||x - x̂||² + Σ_l ( ||sg[r_{l-1}] - C_l[a_l]||² + β ||r_{l-1} - sg[C_l[a_l]]||² ) + α L_CF + γ L_div`, all squared errors
as means over entries, β = 0.25.

Where it differs from its sources (our choices):
- Codebooks start from residual k-means of all latent vectors, not of the first batch.
- EMA codebooks (van den Oord et al. 2017) and revival of dead codes are options beside the codebook loss: codes that an
  epoch did not use are put on residuals drawn at random, and their optimizer state is cleared.
- Sinkhorn assignment in training works on the levels one names (LC-Rec: the last); encoding takes the nearest code. The
  sources use it again to break ties between items, which here is the map's business.
- The gradient through the choice is applied to ẑ as a whole; `rotation` is an alternative to `straight_through`.
- LETTER's alignment: collaborative vectors of another width than the latent space go through a learned linear map.
  LETTER's diversity: clusters of codes come from equal-size k-means, redone at each epoch.
- Decoding a prefix feeds the partial sum to the decoder, which was trained on whole sums only; expect more from the
  last level than from a prefix.

Room for VRQ: a subclass of `RqVaeModule` adds its terms in `extra_losses`, which gets the partial sums of every level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidtune.core.config import check_range, check_types
from sidtune.core.errors import ConfigError
from sidtune.tokenizers.letters import check_sizes
from sidtune.tokenizers.quantizers.balanced_kmeans import equal_size_kmeans
from sidtune.tokenizers.quantizers.code_losses import contrastive, diversity, rotation_trick, sinkhorn, straight_through
from sidtune.tokenizers.quantizers.linear_start import check_widths, start_as_pca
from sidtune.tokenizers.quantizers.nearest_centroids import nearest_centroids
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.quantizers.training import CodeModule, NeuralQuantizer, TrainingConfig, mlp
from sidtune.tokenizers.vectors import check_vectors, load_array


@dataclass
class RqVaeConfig(TrainingConfig):
    """Options of `RqVae`, beside those of the training loop.

    Attributes:
        level_sizes, latent_dims: codes per level and width of the latent space.
        hidden, dropout: widths of the encoder's hidden layers, which the decoder mirrors, and dropout between them.
        commitment: β.
        gradient: through the choice of codes, `straight_through` or `rotation`.
        ema_decay: above 0, codebooks follow the mean of their latents with this decay instead of a loss (0.99).
        start: of encoder and decoder, `random` (the papers) or `pca`, which needs hidden layers twice as wide as the latent space
            and then reconstructs well before the first step (see `linear_start.py`).
        kmeans_start: start codebooks from residual k-means; false draws small random ones.
        revive: give codes that an epoch did not use a new place.
        sinkhorn_levels: levels with uniform assignment in training, counted from 0, negative from the end; none.
        sinkhorn_epsilon: temperature (LC-Rec: 0.003).
        sinkhorn_iterations: rounds (LC-Rec: 50).
        alignment_weight: α (LETTER: 0.02 or less); above 0 it needs collaborative vectors.
        collaborative_path: `.npy` file with collaborative vectors, one per item in the items' order; or pass them to `fit`.
        diversity_weight: γ (LETTER: 1e-4).
        diversity_clusters: clusters of codes per level (LETTER: 10).
    """

    level_sizes: Sequence[int] = (256, 256, 256)
    latent_dims: int = 32
    hidden: Sequence[int] = (512, 256, 128)
    dropout: float = 0.0
    commitment: float = 0.25
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    ema_decay: float = 0.0
    start: Literal["random", "pca"] = "random"
    kmeans_start: bool = True
    revive: bool = True
    sinkhorn_levels: Sequence[int] = ()
    sinkhorn_epsilon: float = 0.003
    sinkhorn_iterations: int = 50
    alignment_weight: float = 0.0
    collaborative_path: str | None = None
    diversity_weight: float = 0.0
    diversity_clusters: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.level_sizes, self.hidden = tuple(self.level_sizes), tuple(self.hidden)
        self.sinkhorn_levels = tuple(self.sinkhorn_levels)
        check_types(type(self), vars(self), "Options of the RQ-VAE")
        depth = len(check_sizes(self.level_sizes))
        check_range(self, 1, "latent_dims", "hidden", "sinkhorn_iterations", "diversity_clusters")
        check_range(self, 0, "commitment", "alignment_weight", "diversity_weight")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(f"ema_decay and dropout lie in [0, 1), got {self.ema_decay} and {self.dropout}.")
        if self.sinkhorn_epsilon <= 0:
            raise ConfigError(f"sinkhorn_epsilon must be positive, got {self.sinkhorn_epsilon}.")
        if self.start == "pca":
            check_widths(self.hidden, self.latent_dims)
        if any(not -depth <= level < depth for level in self.sinkhorn_levels):
            raise ConfigError(f"sinkhorn_levels must lie in [-{depth}, {depth}), got {list(self.sinkhorn_levels)}.")


class RqVaeModule(CodeModule):
    """Encoder, codebooks, decoder of vectors `dims` wide; `collaborative` (N, c) float32, rows as in training, is not saved."""

    def __init__(self, dims: int, config: RqVaeConfig) -> None:
        super().__init__()
        self.config = config
        self._make_networks(dims)
        width = self.width(dims)
        books = [torch.randn(size, width) * 0.02 for size in config.level_sizes]
        self.books = nn.ParameterList(nn.Parameter(book, requires_grad=not config.ema_decay) for book in books)
        if config.ema_decay:
            for level, size in enumerate(config.level_sizes):
                self.register_buffer(f"ema_count_{level}", torch.ones(size))
                self.register_buffer(f"ema_sum_{level}", books[level].clone())
        self.sinkhorn_levels = {level % len(config.level_sizes) for level in config.sinkhorn_levels}
        self.collaborative: Tensor | None = None
        self.align: nn.Module = nn.Identity()
        self._clusters: list[Tensor] = []

    def width(self, dims: int) -> int:
        """Width of the latent space."""
        return self.config.latent_dims

    def _make_networks(self, dims: int) -> None:
        widths = [dims, *self.config.hidden, self.config.latent_dims]
        self.encoder = mlp(widths, self.config.dropout)
        self.decoder = mlp(widths[::-1], self.config.dropout)

    def encode(self, vectors: Tensor) -> Tensor:
        """Latent vectors (n, h) of standardised vectors (n, d)."""
        return self.encoder(vectors)

    def decode(self, latent: Tensor) -> Tensor:
        """Standardised vectors (n, d) of latent vectors (n, h)."""
        return self.decoder(latent)

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Networks from principal components where asked for; codebooks from residual k-means of the latent vectors."""
        if self.config.start == "pca":
            start_as_pca(self.encoder, self.decoder, vectors)
        if not self.config.kmeans_start:
            return
        latent = torch.cat([self.encode(part) for part in vectors.split(8192)]).cpu().numpy()
        kmeans = ResidualKMeans(
            ResidualKMeansConfig(
                level_sizes=self.config.level_sizes, seed=self.config.seed, max_points_per_centroid=256
            )
        )
        codes, _ = kmeans._learn(latent)
        for level, book in enumerate(kmeans.codebooks):
            self.books[level].copy_(torch.from_numpy(book))
            if self.config.ema_decay:
                counts = torch.from_numpy(np.bincount(codes[:, level], minlength=len(book)).astype(np.float32))
                # The decayed count of a code settles at its mean count per batch.
                share = min(1.0, self.config.batch_size / len(vectors))
                self._ema_count(level).copy_(counts * share)
                self._ema_sum(level).copy_(self.books[level] * self._ema_count(level)[:, None])

    def _ema_count(self, level: int) -> Tensor:
        return getattr(self, f"ema_count_{level}")

    def _ema_sum(self, level: int) -> Tensor:
        return getattr(self, f"ema_sum_{level}")

    @torch.no_grad()
    def choose(self, residual: Tensor, level: int) -> Tensor:
        """(B,) codes of residuals (B, h): nearest, or by Sinkhorn where the level asks for it in training."""
        book = self.books[level]
        distances = (book * book).sum(dim=1) - 2 * residual @ book.T  # a row's own length does not matter
        if self.training and level in self.sinkhorn_levels:
            distances = distances + (residual * residual).sum(dim=1, keepdim=True)
            plan = sinkhorn(distances, self.config.sinkhorn_epsilon, self.config.sinkhorn_iterations)
            return plan.argmax(dim=1)
        return distances.argmin(dim=1)

    def losses(self, vectors: Tensor, rows: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        config = self.config
        latent = self.encode(vectors)
        total, codes, sums = torch.zeros_like(latent), [], []
        codebook_loss, commitment_loss = latent.new_zeros(()), latent.new_zeros(())
        updates = []
        for level, book in enumerate(self.books):
            residual = latent - total.detach()
            chosen = self.choose(residual.detach(), level)
            vector = book[chosen]
            commitment_loss = commitment_loss + F.mse_loss(residual, vector.detach())
            if not config.ema_decay:
                codebook_loss = codebook_loss + F.mse_loss(vector, residual.detach())
            updates.append((residual.detach(), chosen))
            total = total + vector
            codes.append(chosen)
            sums.append(total)
        through = rotation_trick if config.gradient == "rotation" else straight_through
        quantized = through(latent, total)
        found = {
            "reconstruction": F.mse_loss(self.decode(quantized), vectors),
            "commitment": config.commitment * commitment_loss,
        }
        if not config.ema_decay:
            found["codebook"] = codebook_loss
        if config.alignment_weight:
            other = self.align(self.collaborative[rows])
            found["alignment"] = config.alignment_weight * contrastive(quantized, other)
        if config.diversity_weight:
            terms = [diversity(c, b, k, generator) for c, b, k in zip(codes, self.books, self._clusters, strict=True)]
            found["diversity"] = config.diversity_weight * torch.stack(terms).sum()
        found |= self.extra_losses(rows, latent, sums)
        if config.ema_decay:
            self._move_by_ema(updates)
        return found, torch.stack(codes, dim=1)

    def extra_losses(self, rows: Tensor, latent: Tensor, sums: list[Tensor]) -> dict[str, Tensor]:
        """Further terms of a subclass. `sums[l]` (B, h): code vectors up to level l, differentiable in the codebooks."""
        return {}

    @torch.no_grad()
    def _move_by_ema(self, updates: list[tuple[Tensor, Tensor]]) -> None:
        decay = self.config.ema_decay
        for level, (residual, chosen) in enumerate(updates):
            count, total = self._ema_count(level), self._ema_sum(level)
            count.mul_(decay).add_(torch.bincount(chosen, minlength=len(count)), alpha=1 - decay)
            total.mul_(decay).add_(torch.zeros_like(total).index_add_(0, chosen, residual), alpha=1 - decay)
            seen = count > 1e-3
            self.books[level][seen] = total[seen] / count[seen, None]

    @torch.no_grad()
    def begin_epoch(self, generator: torch.Generator) -> None:
        if not self.config.diversity_weight:
            return
        self._clusters = []
        for book in self.books:
            count = min(self.config.diversity_clusters, len(book))
            clusters = equal_size_kmeans(book.detach().cpu().numpy(), count, iterations=10, rounds=3)[1]
            self._clusters.append(torch.from_numpy(clusters).to(book.device))

    @torch.no_grad()
    def end_epoch(
        self, vectors: Tensor, counts: list[Tensor], optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> dict[str, float]:
        """Puts the codes that were not used on residuals of vectors drawn at random."""
        if not self.config.revive:
            return {}
        revived = 0
        for level, number in enumerate(counts):
            dead = torch.nonzero(number == 0)[:, 0]
            if not len(dead):
                continue
            rows = torch.randint(len(vectors), (len(dead),), generator=generator).to(vectors.device)
            residual = self.encode(vectors[rows])
            for before in range(level):
                residual = residual - self.books[before][self.choose(residual, before)]
            self.books[level][dead] = residual
            revived += len(dead)
            if self.config.ema_decay:
                self._ema_count(level)[dead] = 1.0
                self._ema_sum(level)[dead] = residual
            state = optimizer.state.get(self.books[level], {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key][dead] = 0
        return {"revived": revived}


class RqVae(NeuralQuantizer):
    """RQ-VAE quantizer; `fit(vectors, checkpoint=..., side=collaborative vectors)`.

    `codebooks` are those of the latent space, so they are `latent_dims` wide.
    """

    name: ClassVar[str] = "rq_vae"
    config_class: ClassVar[type] = RqVaeConfig
    module_class: ClassVar[type[RqVaeModule]] = RqVaeModule

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return tuple(self.config.level_sizes)

    @property
    def codebooks(self) -> list[np.ndarray]:
        self._ready()
        return [book.detach().numpy().copy() for book in self.module.books]

    def _build(self, dims: int) -> RqVaeModule:
        return self.module_class(dims, self.config)

    def _prepare(self, vectors: np.ndarray, side: Any) -> None:
        config, module = self.config, self.module
        if config.diversity_weight and config.diversity_clusters >= min(config.level_sizes):
            raise ConfigError(
                f"diversity_weight needs clusters of several codes, so diversity_clusters ({config.diversity_clusters}) must lie "
                f"below each of level_sizes {list(config.level_sizes)}; lower it."
            )
        if not config.alignment_weight:
            if side is not None:
                raise ConfigError("Collaborative vectors were given, but alignment_weight is 0; set it above 0.")
            return
        if side is None and config.collaborative_path:
            side = load_array(config.collaborative_path)
        if side is None:
            raise ConfigError(
                "alignment_weight needs collaborative vectors; set collaborative_path, pass them to fit, or set it to 0."
            )
        side = check_vectors(side, what="collaborative vectors", rows=len(vectors))
        device, width = self._device(), module.width(vectors.shape[1])
        module.collaborative = torch.from_numpy(side / max(float(np.std(side)), 1e-12)).to(device)
        if side.shape[1] != width:
            module.align = nn.Linear(side.shape[1], width, bias=False)

    def _freeze(self) -> None:
        # The alignment served training only; the saved quantizer has no use for it.
        self.module.collaborative, self.module.align = None, nn.Identity()
        super()._freeze()

    def latent(self, vectors: np.ndarray) -> np.ndarray:
        """Latent vectors (n, h) float32 of vectors (n, d)."""
        module = self._ready()
        vectors = check_vectors(vectors, self.dims)
        with torch.inference_mode():
            return module.encode(torch.from_numpy((vectors - self._mean) / self._scale)).float().numpy()

    def _codes(self, module: Any, vectors: Tensor) -> np.ndarray:
        residual, columns = module.encode(vectors).float().numpy(), []
        for book in self.module.books:
            centroids = book.detach().numpy()
            columns.append(nearest_centroids(residual, centroids))
            residual = residual - centroids[columns[-1]]
        return np.stack(columns, axis=1)

    def _vectors(self, module: Any, codes: Tensor) -> Tensor:
        return module.decode(sum(module.books[level][codes[:, level]] for level in range(codes.shape[1])))
