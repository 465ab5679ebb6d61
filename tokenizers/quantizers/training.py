"""The training loop of quantizers that are networks: RQ-VAE, RQ-KMeans+, FSQ (and later VRQ).

A `NeuralQuantizer` owns a torch module that turns a batch into named losses; the loop adds them, steps AdamW under a cosine
schedule, records one line per epoch (`curves`), and writes checkpoints from which a run continues as if it had not
stopped: batches and draws depend on seed and epoch alone. All of this is our choice; no paper is involved.

Vectors are centred and divided by one common scale before training (so that learning rate and loss weights mean the same
on any data) and put back by `decode`. Encoding runs in float64 on the CPU, so codes depend neither on the batch nor on the
machine that trained.
"""

from __future__ import annotations

import abc
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.finite import check_step, check_weights
from sidtune.core.folders import read_json, write_json
from sidtune.core.resume import Work, identity_of, last_complete_checkpoint
from sidtune.tokenizers.quantizers.base import ROWS, Quantizer
from sidtune.tokenizers.vectors import check_vectors, load_tensors

STATE_FILE, CURVES_FILE = "state.safetensors", "curves.json"
_ELSEWHERE = ("device", "checkpoint", "checkpoint_every")  # options that change nothing about the result


@dataclass
class TrainingConfig:
    """Options of the training loop.

    Attributes:
        epochs: passes over the vectors.
        batch_size: vectors per step.
        learning_rate: peak rate of AdamW; falls to zero along half a cosine.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this length.
        device: `auto` (a GPU where there is one), `cpu`, `cuda`.
        seed: of start values, batches and draws.
        checkpoint: folder for the state of an unfinished run; a run of the same vectors and options continues from it.
        checkpoint_every: epochs between checkpoints.
    """

    epochs: int = 100
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    checkpoint: str | None = None
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        check_range(self, 1, "batch_size", "checkpoint_every")
        check_range(self, 0, "epochs", "weight_decay")
        check_range(self, 0, "seed", most=2**31 - 1)
        if not (self.learning_rate > 0 and self.max_grad_norm > 0):
            raise ConfigError(
                f"learning_rate and max_grad_norm must be positive, got {self.learning_rate} and {self.max_grad_norm}."
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda' but no GPU is there; set it to 'auto' or 'cpu'.")


def mlp(widths: list[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of these widths with ReLU (and dropout) between them."""
    layers: list[nn.Module] = []
    for n, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        if n:
            layers += [nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


class CodeModule(nn.Module, abc.ABC):
    """What the loop trains. Tensors are standardised vectors (B, d)."""

    @abc.abstractmethod
    def losses(self, vectors: Tensor, rows: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        """`(losses to add up, codes (B, L))` of a batch; `rows` (B,) are its rows, `generator` lives on the CPU.

        The loss `reconstruction` is the mean squared error per entry of the standardised vectors.
        """

    def start(self, vectors: Tensor) -> None:  # noqa: B027
        """Called once with all vectors before the first step, for start values that depend on them."""

    def begin_epoch(self, generator: torch.Generator) -> None:  # noqa: B027
        """Called before the steps of an epoch."""

    def end_epoch(
        self, vectors: Tensor, counts: list[Tensor], optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> dict[str, float]:
        """Called after an epoch with how often each code (k_l,) was used; returns further values for the curves."""
        return {}


class NeuralQuantizer(Quantizer):
    """Base of quantizers with a trained encoder and decoder.

    Subclasses say how to build the module and how to encode and decode standardised vectors.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.module: CodeModule | None = None
        self._exact: CodeModule | None = None
        self._mean = np.zeros(0, dtype=np.float64)
        self._scale = 1.0

    @abc.abstractmethod
    def _build(self, dims: int) -> CodeModule:
        """A new module for vectors of this width; start values from torch's global generator."""

    @abc.abstractmethod
    def _codes(self, module: Any, vectors: Tensor) -> np.ndarray:
        """Codes (n, L) of standardised float64 vectors (n, d) under a float64 module on the CPU."""

    @abc.abstractmethod
    def _vectors(self, module: Any, codes: Tensor) -> Tensor:
        """Standardised float64 vectors (n, d) of codes (n, l) int64."""

    def _prepare(self, vectors: np.ndarray, side: Any) -> None:  # noqa: B027
        """Called before training, after `_build`; takes what `fit` got beside the vectors."""

    @property
    def dims(self) -> int | None:
        return len(self._mean) if self._exact is not None else None

    def _ready(self) -> Any:
        """The float64 module."""
        self._require_fit()
        return self._exact

    def fit_encode(self, vectors: np.ndarray) -> np.ndarray:
        return self.fit(vectors).encode(vectors)

    def fit(self, vectors: np.ndarray, *, checkpoint: str | Path | None = None, side: Any = None) -> Self:
        """Trains from vectors (n, d).

        Args:
            vectors: (n, d) finite numbers.
            checkpoint: folder to write the state to every `checkpoint_every` epochs, and to continue from if it is
                there. It must be of the same vectors, `side` and options. Default: the option of that name.
            side: what a method takes beside the vectors (RQ-VAE: collaborative vectors); None for most.

        Raises:
            DataError: wrong vectors, a loss that is not finite.
            ConfigError: a checkpoint folder of another run, or with other files.
        """
        vectors = check_vectors(vectors)
        checkpoint = checkpoint or self.config.checkpoint
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self._standardise(vectors)
            self.module = self._build(vectors.shape[1])
            self._prepare(vectors, side)
            self._train(vectors, None if checkpoint is None else self._work(checkpoint, vectors, side))
        self._freeze()
        return self

    def _standardise(self, vectors: np.ndarray) -> None:
        self._mean = vectors.mean(axis=0, dtype=np.float64)
        spread = float(
            np.sqrt(np.mean([np.mean((row - self._mean) ** 2) for row in np.array_split(vectors, 64) if len(row)]))
        )
        self._scale = spread if spread > 0 else 1.0

    def _device(self) -> torch.device:
        name = self.config.device
        return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")

    def _work(self, folder: str | Path, vectors: np.ndarray, side: Any) -> Work:
        """The folder of the checkpoints. A run may continue on another device and from a folder that was moved."""
        options = {key: value for key, value in identity_of(self.config).items() if key not in _ELSEWHERE}
        work = Work(folder, {"quantizer": self.name, **options, "vectors": vectors, "side": side}, folder)
        work.begin(refuse="remove it, name another folder")
        return work

    def _train(self, vectors: np.ndarray, work: Work | None) -> None:
        config, device = self.config, self._device()
        data = torch.from_numpy(((vectors - self._mean) / self._scale).astype(np.float32)).to(device)
        module = self.module.to(device).train()
        kept = None if work is None else last_complete_checkpoint(work.checkpoints, remove_broken=True)
        self.curves = []
        if kept is None:
            module.start(data)
        optimizer = torch.optim.AdamW(module.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        if kept is not None:
            self.curves = _load_checkpoint(kept, module, optimizer)
        for epoch in range(len(self.curves), config.epochs):
            self.curves.append(self._epoch(epoch, data, optimizer, kept))
            check_weights(module, f"the {self.name} quantizer after epoch {epoch + 1}")
            last = epoch + 1 == config.epochs
            if work is not None and (last or (epoch + 1) % config.checkpoint_every == 0):
                with work.checkpoint(epoch + 1) as kept:
                    _save_checkpoint(kept, module, optimizer, self.curves)

    def _epoch(self, epoch: int, data: Tensor, optimizer: torch.optim.Optimizer, kept: Path | None) -> dict[str, Any]:
        module, config, count = self.module, self.config, len(data)
        generator = torch.Generator().manual_seed((config.seed + 1) * 1_000_003 + epoch)
        module.begin_epoch(generator)
        order = torch.randperm(count, generator=generator).to(data.device)
        steps = math.ceil(count / config.batch_size)
        counts = [torch.zeros(size, dtype=torch.int64, device=data.device) for size in self.level_sizes]
        sums: dict[str, Tensor] = {}
        for step in range(steps):
            rows = order[step * config.batch_size : (step + 1) * config.batch_size]
            progress = (epoch * steps + step) / (config.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * config.learning_rate * (1 + math.cos(math.pi * progress))
            losses, codes = module.losses(data[rows], rows, generator)
            optimizer.zero_grad(set_to_none=True)
            loss = sum(losses.values())
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
            check_step(loss.detach(), norm, f"{self.name} quantizer", epoch * steps + step + 1, kept)
            optimizer.step()
            for level, number in enumerate(counts):
                number += torch.bincount(codes[:, level], minlength=len(number))
            for key, value in losses.items():
                sums[key] = sums.get(key, 0) + value.detach() * len(rows) / count
        values = {key: float(value) for key, value in sums.items()}
        more = module.end_epoch(data, counts, optimizer, generator)
        used = [round(float((number > 0).float().mean()), 6) for number in counts]
        return {"epoch": epoch + 1, "loss": sum(values.values()), **values, "used": used, **more}

    def _freeze(self) -> None:
        self.module = self.module.cpu().eval()
        self._exact = copy.deepcopy(self.module).double()

    @torch.inference_mode()
    def _encode(self, vectors: np.ndarray) -> np.ndarray:
        block = torch.from_numpy((vectors - self._mean) / self._scale)
        return self._codes(self._exact, block).astype(np.int32)

    @torch.inference_mode()
    def _decode(self, codes: np.ndarray) -> np.ndarray:
        made = np.empty((len(codes), self.dims or 0), dtype=np.float32)
        for start in range(0, len(codes), ROWS):
            block = self._vectors(self._exact, torch.from_numpy(codes[start : start + ROWS].astype(np.int64))).numpy()
            made[start : start + ROWS] = block * self._scale + self._mean
        return made

    def _tensors(self) -> dict[str, np.ndarray]:
        weights = {f"module.{key}": value.numpy() for key, value in self.module.state_dict().items()}
        return weights | {"mean": self._mean, "scale": np.array([self._scale])}

    def _set_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        self._lacks(tensors, "mean", "scale")
        self._mean, self._scale = tensors["mean"], float(tensors["scale"][0])
        with torch.random.fork_rng(devices=[]):
            module = self._build(len(self._mean))
        given = {key[7:]: torch.from_numpy(value.copy()) for key, value in tensors.items() if key.startswith("module.")}
        _load_weights(module, given, "The saved quantizer")
        self.module = module
        self._freeze()


def _load_weights(module: nn.Module, given: dict[str, Tensor], what: str) -> None:
    known = module.state_dict()
    wrong = [key for key in known if key not in given or given[key].shape != known[key].shape]
    if wrong:
        raise DataError(
            f"{what} does not fit the config beside it (tensor '{wrong[0]}' is missing or of another shape); write it again."
        )
    module.load_state_dict({key: given[key] for key in known})
    check_weights(module, what)


def _save_checkpoint(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, curves: list[dict[str, Any]]
) -> None:
    from safetensors.torch import save_file

    tensors = {f"module.{key}": value for key, value in module.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / STATE_FILE)
    write_json(folder / CURVES_FILE, curves)


def _load_checkpoint(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Fills module and optimizer; returns the curves so far."""
    tensors = {key: torch.from_numpy(value.copy()) for key, value in load_tensors(folder / STATE_FILE).items()}
    _load_weights(module, {k[7:]: v for k, v in tensors.items() if k.startswith("module.")}, f"The checkpoint {folder}")
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".")
            states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return read_json(folder / CURVES_FILE)
