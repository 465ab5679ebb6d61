"""Starts an autoencoder of ReLU layers as principal component analysis, exactly.

A ReLU layer can carry a number unchanged as two: `x = relu(x) - relu(-x)`. So networks with hidden layers of at least twice the
latent width can begin as the projection on the first principal components, and as its transpose; what is left of the
hidden units keeps its random weights and no voice in the output, until gradients give it one. Codebooks that start from
k-means of such latents reconstruct well before the first step. Our own addition, for `rq_vae` with `start: pca`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sidtune.core.errors import ConfigError


def check_widths(hidden: Sequence[int], latent: int) -> None:
    """Raises ConfigError where a hidden layer is too narrow to carry `latent` numbers and their negatives."""
    if any(width < 2 * latent for width in hidden):
        raise ConfigError(
            f"start: pca needs hidden layers at least {2 * latent} wide, twice latent_dims, got {list(hidden)}; widen them, "
            "lower latent_dims, or use start: random."
        )


@torch.no_grad()
def start_as_pca(encoder: nn.Sequential, decoder: nn.Sequential, vectors: Tensor) -> None:
    """Sets weights so that the encoder projects on the first principal components of vectors (n, d), in place.

    Args:
        encoder, decoder: layers of `quantizer_training.mlp`, from d to h and back. Latent dimensions beyond d are zero.
    """
    width = min(vectors.shape[1], _linear(encoder)[-1].out_features)
    centred = (vectors - vectors.mean(dim=0)).double()
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :width].T.float().cpu()  # (k, d)
    _carry(_linear(encoder), directions, torch.eye(width))
    _carry(_linear(decoder), torch.eye(width), directions.T)


def _linear(network: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in network if isinstance(layer, nn.Linear)]


def _carry(layers: list[nn.Linear], first: Tensor, last: Tensor) -> None:
    """Makes the layers compute `last @ first @ x`, with `first` (k, in) and `last` (out, k) padded with zeros."""
    k = len(first)
    if len(layers) == 1:
        _only(layers[0], last @ first)
        return
    both, sign = torch.cat([first, -first]), torch.cat([last, -last], dim=1)
    _rows(layers[0], both)
    for layer in layers[1:-1]:
        _rows(layer, torch.eye(2 * k))
    _only(layers[-1], sign)


def _rows(layer: nn.Linear, weight: Tensor) -> None:
    """The first rows of a layer become `weight` alone; the others stay."""
    layer.weight[: len(weight)] = 0.0
    layer.weight[: len(weight), : weight.shape[1]] = weight.to(layer.weight)
    layer.bias[: len(weight)] = 0.0


def _only(layer: nn.Linear, weight: Tensor) -> None:
    """The whole layer becomes `weight`, zeros elsewhere."""
    layer.weight.zero_()
    layer.weight[: weight.shape[0], : weight.shape[1]] = weight.to(layer.weight)
    layer.bias.zero_()
