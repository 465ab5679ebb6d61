"""RQ-KMeans+: residual k-means that is refined by gradients (GPR, Tencent 2025; also in the MiniOneRec code).

`z = x + E(x)`, `x̂ = ẑ + D(ẑ)`, with the codes of RQ-VAE between. The codebooks start from residual k-means of the vectors
themselves and the last layers of E and D from zero, so before the first step this *is* residual k-means (a test says so);
training then bends the space where that lowers the reconstruction error.

Where it differs from its sources (our choices): the paper states the residual encoder and the warm start only; a residual
decoder, the smaller learning rate, no revival of codes and the options shared with `rq_vae.py` are ours. The latent space
is as wide as the vectors, so `latent_dims` does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from sidtune.core.errors import ConfigError
from sidtune.tokenizers.quantizers.rq_vae import RqVae, RqVaeConfig, RqVaeModule
from sidtune.tokenizers.quantizers.training import mlp


@dataclass
class RqKMeansPlusConfig(RqVaeConfig):
    """Options of `RqKMeansPlus`: those of `RqVae` with other defaults; `latent_dims` must stay at 0 (the vectors' width).

    Attributes:
        latent_dims: 0, the width of the vectors.
        hidden: widths of the hidden layers of both residual networks.
        learning_rate: smaller than for RQ-VAE, since training starts from a good solution.
        revive: off, since the k-means start leaves few codes without use.
    """

    latent_dims: int = 0
    hidden: Sequence[int] = (256,)
    learning_rate: float = 3e-4
    revive: bool = False

    def __post_init__(self) -> None:
        if self.latent_dims != 0:
            raise ConfigError(
                f"latent_dims of RQ-KMeans+ is the width of the vectors, got {self.latent_dims}; leave it."
            )
        if not self.kmeans_start:
            raise ConfigError("RQ-KMeans+ starts from k-means by definition; use 'rq_vae' to start from random codes.")
        if self.start != "random":
            raise ConfigError("RQ-KMeans+ starts as residual k-means by definition; `start` is an option of 'rq_vae'.")
        self.latent_dims = 1  # the checks of the base ask for a width
        super().__post_init__()
        self.latent_dims = 0


class RqKMeansPlusModule(RqVaeModule):
    """Residual encoder and decoder around the codes; both are the identity at the start."""

    def width(self, dims: int) -> int:
        return dims

    def _make_networks(self, dims: int) -> None:
        widths = [dims, *self.config.hidden, dims]
        self.encoder, self.decoder = (mlp(widths, self.config.dropout) for _ in range(2))
        for network in (self.encoder, self.decoder):
            nn.init.zeros_(network[-1].weight)
            nn.init.zeros_(network[-1].bias)

    def encode(self, vectors: Tensor) -> Tensor:
        return vectors + self.encoder(vectors)

    def decode(self, latent: Tensor) -> Tensor:
        return latent + self.decoder(latent)


class RqKMeansPlus(RqVae):
    """RQ-KMeans+ quantizer. `codebooks` are as wide as the vectors, in standardised units."""

    name: ClassVar[str] = "rq_kmeans_plus"
    config_class: ClassVar[type] = RqKMeansPlusConfig
    module_class: ClassVar[type[RqVaeModule]] = RqKMeansPlusModule
