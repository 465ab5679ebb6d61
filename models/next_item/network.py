"""Networks that write the next item's SID, code by code, from a user's history. Trained from scratch; no text, no LLM.

Three shapes behind one interface (`NextItemNetwork`):

* `tokens`: a causal decoder over all codes of the history, four tokens an item where SIDs have four levels;
* `items`: one position per item (the sum of its code vectors); a small second decoder writes the codes from the state there, so a
  history costs a `depth`-th of the positions. The split into a model over items and one over their parts is RQ-Transformer's
  (Lee et al. 2022, 2203.01941);
* `t5`: TIGER's encoder-decoder (Rajput et al. 2023, 2305.05065) on transformers' T5, in `models/next_item/t5.py`.

Every network answers two questions. `forward(**batch)` gives the codes of all targets of whole histories in one pass. `read` and
`continue_codes` read a history once and score the continuations of any number of code prefixes, which is what a re-scoring of
candidates needs; `next_logits` gives the last of them alone, for a beam search. All give the same logits for the same history; a
test compares them.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sidtune.core.config import as_dict, build, check_range, check_shares, check_types
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.finite import check_weights
from sidtune.core.folders import read_json, write_json
from sidtune.models.registry import NETWORKS

CONFIG_FILE, WEIGHT_FILE = "config.json", "model.safetensors"


@dataclass
class NextItemConfig:
    """Shape of a next-item network.

    Attributes:
        level_sizes: codes per SID level.
        num_items: N, rows of the catalogue.
        network: `tokens`, `items` or `t5`.
        width: size of the states. layers: blocks over the history (`t5`: of the encoder). heads, feed_forward: of a block.
        dropout: after embeddings and in every block.
        code_layers: blocks of the second decoder (`items`), or of the decoder (`t5`).
        head_dim: size of an attention head; only `t5` may set it, elsewhere it is width / heads.
        causal_encoder: `t5` only: an item of the history sees earlier items only, which lets one pass learn a whole history.
            False is TIGER's full attention, for windows.
        tied: score codes with their input vectors (default), or with vectors of their own.
        level_embeddings: add a vector per SID level to each code's vector. It gives codes of a level something in common; what a
            code's own vector says already, it says faster where codes are rare.
        user_tokens: U buckets of user tokens before the history (user number modulo U, as in TIGER, which takes 2,000); 0 for none.
        item_embeddings: add a free vector per item to the input, beside its codes. The output is written in codes all the same.
        ahead: further items after the target whose codes the state must predict too (multi-token prediction); 0 for none.
    """

    level_sizes: list[int] = field(default_factory=list)
    num_items: int = 0
    network: Literal["tokens", "items", "t5"] = "items"
    width: int = 128
    layers: int = 3
    heads: int = 4
    feed_forward: int = 256
    dropout: float = 0.2
    code_layers: int = 1
    head_dim: int | None = None
    causal_encoder: bool = True
    tied: bool = True
    level_embeddings: bool = False
    user_tokens: int = 0
    item_embeddings: bool = False
    ahead: int = 0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "A next-item network")
        if not self.level_sizes or min(self.level_sizes) < 1 or self.num_items < 1:
            raise ConfigError("A next-item network needs level_sizes and num_items of the catalogue it writes.")
        check_range(self, 1, "width", "layers", "heads", "feed_forward", "code_layers", "head_dim")
        check_range(self, 0, "user_tokens", "ahead")
        check_shares(self, "dropout")
        if self.network != "t5" and (self.head_dim is not None or self.width % (2 * self.heads)):
            raise ConfigError(
                f"The width {self.width} must divide into {self.heads} heads of an even size, and head_dim is for t5 only."
            )
        if self.head_dim is None and self.width % self.heads:
            raise ConfigError(
                f"The width {self.width} must divide into {self.heads} heads; change one, or set head_dim."
            )

    @property
    def depth(self) -> int:
        """Codes of a SID."""
        return len(self.level_sizes)


@dataclass(frozen=True)
class NextTargets:
    """What a network says about the P targets of a batch, in the order of `learn.nonzero()`.

    Attributes:
        logits: per level (P, k_level), given the true codes before it.
        states: (P, D_model), the state before the first code.
    """

    logits: list[Tensor]
    states: Tensor


class NextItemNetwork(nn.Module, abc.ABC):
    """What all shapes share: vectors of codes, levels, users and items, heads, saving.

    A batch is a mapping with `codes` (B, T, depth) int64 codes of the items oldest first, `rows` (B, T) int64 item rows,
    `segments` (B, T) int64 (0 for the only sequence of a row, 0, 1, ... where several are packed, -1 for padding on the right),
    `users` (B,) int64 user numbers, and for training `learn` (B, T) bool, True on the targets. Where training perturbs the
    codes of the history, `target_codes` (B, T, depth) are the true ones.
    """

    def __init__(self, config: NextItemConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        offsets = torch.tensor([0, *config.level_sizes]).cumsum(0)
        self.register_buffer("offsets", offsets[:-1], persistent=False)
        self.bounds = offsets.tolist()
        self.codes = nn.Embedding(self.bounds[-1], width)
        self.head = None if config.tied else nn.Linear(width, self.bounds[-1], bias=False)
        self.levels = nn.Embedding(config.depth, width) if config.level_embeddings else None
        self.users = nn.Embedding(config.user_tokens, width) if config.user_tokens else None
        self.items = nn.Embedding(config.num_items, width) if config.item_embeddings else None
        self.ahead = nn.ModuleList(nn.Linear(width, width * config.depth, bias=False) for _ in range(config.ahead))
        self.dropout = nn.Dropout(config.dropout)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors (*, l, D_model) of code prefixes (*, l)."""
        depth = codes.shape[-1]
        vectors = self.codes(codes + self.offsets[:depth])
        return vectors if self.levels is None else vectors + self.levels.weight[:depth]

    def item_vectors(self, codes: Tensor) -> Tensor:
        """(*, D_model): the mean of the output vectors of an item's codes (*, depth)."""
        table = self.codes.weight if self.head is None else self.head.weight
        return nn.functional.embedding(codes + self.offsets, table).mean(dim=-2)

    def level_logits(self, states: Tensor, level: int) -> Tensor:
        """(*, k_level) scores of a level's codes from states (*, D_model)."""
        table = self.codes.weight if self.head is None else self.head.weight
        return states @ table[self.bounds[level] : self.bounds[level + 1]].T

    def ahead_logits(self, states: Tensor, step: int) -> list[Tensor]:
        """Per level (P, k_level): scores of the codes of the item `step + 1` places after the target, from its state."""
        parts = self.ahead[step](states).unflatten(-1, (self.config.depth, -1))
        return [self.level_logits(parts[..., level, :], level) for level in range(self.config.depth)]

    def user_vectors(self, users: Tensor) -> Tensor:
        """(B, 1, D_model): the user tokens."""
        return self.users(users % self.config.user_tokens)[:, None]

    @abc.abstractmethod
    def forward(self, **batch: Tensor) -> NextTargets:
        """All targets of the batch; see `NextTargets`."""

    @abc.abstractmethod
    def read(self, **batch: Tensor) -> Any:
        """Reads the histories once; what it returns is for `continue_codes` of the same network."""

    @abc.abstractmethod
    def continue_codes(self, memory: Any, codes: Tensor) -> list[Tensor]:
        """Scores of what follows each prefix of `codes` (B, W, l): per level 0 .. l a tensor (B, W, k_level)."""

    def next_logits(self, memory: Any, codes: Tensor) -> Tensor:
        """(B, W, k_l): scores of what follows each whole prefix of `codes` (B, W, l), the last of `continue_codes`."""
        return self.continue_codes(memory, codes)[-1]

    @abc.abstractmethod
    def forward_flops(self, batch: int, items: int, targets: int) -> int:
        """Floating-point operations of one forward pass over B rows of T items with P targets, padding included."""

    def head_flops(self, targets: int) -> int:
        """The part of `forward_flops` that the scores of all codes take."""
        heads = 1 + self.config.ahead
        own = self.config.ahead * self.config.depth * self.config.width
        return 2 * targets * self.config.width * (heads * self.bounds[-1] + own)

    def parameters_count(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into an existing folder."""
        write_json(Path(folder) / CONFIG_FILE, as_dict(self.config))
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, Path(folder) / WEIGHT_FILE, metadata={"format": "pt"})


def item_mask(segments: Tensor) -> Tensor:
    """(B, T, T) bool: which items an item may see, itself and the earlier ones of its own sequence; padding sees itself."""
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return same & causal


def make_network(config: NextItemConfig) -> NextItemNetwork:
    """A fresh network of this shape, weights drawn from torch's generator."""
    return NETWORKS.get(config.network)(config)


def load_network(folder: str | Path) -> NextItemNetwork:
    """The network that `save_pretrained` wrote, in evaluation mode.

    Raises:
        DataError: missing or damaged files, or weights of another shape or not finite.
    """
    folder = Path(folder)
    network = make_network(build(NextItemConfig, read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE)))
    try:
        network.load_state_dict(load_file(folder / WEIGHT_FILE))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise DataError(
            f"{folder / WEIGHT_FILE} does not hold the weights of its config ({first}); train anew."
        ) from None
    check_weights(network, folder)
    return network.eval()
