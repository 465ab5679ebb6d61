"""Trains a next-item network on transformers' Trainer: whole histories or windows, averaged weights, choice by validation.

    trained = train_next_item(network, rows, ranker, settings, "runs/x/work", seed=0)

Overriding points (everything else is transformers' and stays untouched):

1. `_get_train_sampler`: the order of an epoch is a function of seed and epoch; rows of like length share a batch.
2. `compute_loss`: the mean over the targets of the *global* batch, so two processes with half the batch give the loss of one.
3. `floating_point_ops`: what the network says a step costs; transformers sums and stores it.
4. `evaluate`: NDCG and recall of the whole catalogue on validation users, with the averaged weights.
5. `_save`, `_load_from_checkpoint`: a checkpoint holds the network and its average.

The model of a run is the checkpoint with the best validation NDCG@10. Nothing here reads a test target.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from sidtune.core.config import check_range, check_shares, check_types
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.ragged import drawn, gathered, own_rows
from sidtune.data_builders.sequences.item_sequences import ItemSequences, SequenceExamples
from sidtune.decoding.next_item.ranking import HistoryRanker
from sidtune.metrics.ranking import RankingResult, Relevance, evaluate_ranking
from sidtune.models.next_item.network import WEIGHT_FILE, NextItemNetwork
from sidtune.trainers.common.args import COMMON, built, check_together, checked_fields
from sidtune.trainers.common.batches import EpochSampler
from sidtune.trainers.common.callbacks import MarkComplete, SetEpoch, go_on
from sidtune.trainers.common.finite import FiniteSteps
from sidtune.trainers.next_item.data import NextItemRows
from sidtune.trainers.next_item.loss import LossConfig, NextItemLoss

AVERAGE_FILE = "average.safetensors"
BEST = "eval_ndcg@10"
RESERVED = {
    **COMMON,
    "seed": "set seed of the run",
    **dict.fromkeys(("eval_strategy", "eval_steps"), "set evaluate_every"),
    **dict.fromkeys(("save_strategy", "save_steps"), "a checkpoint belongs to each evaluation"),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), "models are chosen by validation NDCG@10"),
    "load_best_model_at_end": "the best checkpoint is always taken",
    "gradient_checkpointing": "the networks are small",
    "label_smoothing_factor": "set label_smoothing of the loss",
    "group_by_length": "rows of like length always share a batch",
}
logger = logging.getLogger(__name__)


@dataclass
class FitSettings:
    """How a network is trained and chosen.

    Attributes:
        args: fields of transformers' `TrainingArguments`, for example num_train_epochs, learning_rate. A batch is
            `per_device_train_batch_size` rows.
        loss: see `LossConfig`.
        average: decay of the moving average of the weights that is evaluated and kept, 0 for none. It starts fast:
            step n uses the smaller of this and (1 + n) / (10 + n).
        evaluate_every: epochs between evaluations; may be a fraction.
        valid_users: validation users drawn once by the seed; None for all.
        patience: stop after that many evaluations without a better one; None to go to the end.
    """

    args: dict = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    average: float = 0.0
    evaluate_every: float = 1.0
    valid_users: int | None = 1500
    patience: int | None = None

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "fit")
        check_shares(self, "average")
        check_range(self, 1, "valid_users", "patience")
        if not self.evaluate_every > 0:
            raise ConfigError(f"evaluate_every must be above 0, got {self.evaluate_every}; correct it.")
        self.args = checked_fields(TrainingArguments, RESERVED, self.args, "training args")
        check_together(TrainingArguments, self.args, "training args")


class StopWhenWorse(TrainerCallback):
    """Ends a run after `patience` evaluations without a better one; those before an interruption count too."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        values = [log[BEST] for log in state.log_history if BEST in log]
        control.should_training_stop |= len(values) - 1 - int(np.argmax(values)) >= self.patience


class WeightAverage(TrainerCallback):
    """An exponential moving average of the weights, updated after each optimizer step.

    Args:
        network: the network in training. decay: see `FitSettings.average`.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self.weights = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, parameter in self.network.named_parameters():
            self.weights[name].lerp_(parameter.to(self.weights[name]), 1 - decay)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The network carries the average inside, and its own weights again afterwards."""
        own = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        self.take(self.weights)
        try:
            yield
        finally:
            self.take(own)

    @torch.no_grad()
    def take(self, weights: dict[str, torch.Tensor]) -> None:
        """Copies weights into the network."""
        for name, parameter in self.network.named_parameters():
            parameter.copy_(weights[name])


class NextItemTrainer(FiniteSteps, Trainer):
    """Trains a `NextItemNetwork`; see the module's docstring.

    Args:
        network: fresh or trained. args: of `fit_arguments`. rows: training rows.
        ranker: how validation users are ranked. valid: their histories and targets.
        settings: loss and average.

    Logged beside transformers' metrics: `nll` (mean negative log-probability of a target, without smoothing and extra
    terms), and in evaluation `ndcg@10`, `recall@10`, `flops` (training operations so far, padding included) and
    `train_seconds` (training time so far, without evaluations).
    """

    def __init__(
        self,
        network: NextItemNetwork,
        args: TrainingArguments,
        rows: NextItemRows,
        ranker: HistoryRanker,
        valid: SequenceExamples,
        settings: FitSettings,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if bool(settings.loss.ahead) != bool(network.config.ahead):
            raise ConfigError(
                f"The loss weighs items ahead by {settings.loss.ahead}, the network has {network.config.ahead} heads for them; set "
                "both or none."
            )
        self.ranker, self.valid = ranker, valid
        self.loss = NextItemLoss(settings.loss, ranker.catalogue.trie, torch.from_numpy(ranker.catalogue.codes))
        self.average = WeightAverage(network, settings.average) if settings.average else None
        self._epoch_callback, self._nll = SetEpoch(), torch.zeros(2, dtype=torch.float64)
        self._seconds, self._begun = 0.0, 0.0
        own = [self._epoch_callback, *([self.average] if self.average else []), *(callbacks or []), MarkComplete()]
        super().__init__(
            network,
            args,
            rows.collate,
            rows,
            eval_dataset=[0] if len(valid) else None,
            callbacks=own,  # type: ignore[arg-type]
        )
        self.model_accepts_loss_kwargs = False
        self.loss.to(args.device)
        if self.average:
            self.average.weights = {name: p.detach().clone() for name, p in network.named_parameters()}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        rows: NextItemRows = self.train_dataset  # type: ignore[assignment]
        self._epoch_callback.sampler = EpochSampler(len(rows), self.args.seed, rows.lengths, batch)
        return self._epoch_callback.sampler

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        targets = model(**inputs)
        total, plain = self.loss(self.accelerator.unwrap_model(model), targets, inputs)
        count = torch.tensor(float(len(plain)), device=plain.device)
        # Gradients are averaged over the processes, so each divides by the mean number of targets.
        mean = self.accelerator.reduce(count, "mean") if self.args.world_size > 1 else count
        self._nll += torch.stack([plain.sum(), count]).double().cpu()
        loss = total.sum() / mean
        return (loss, targets) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Forward and backward of one batch; backward counts twice a forward."""
        network = self.accelerator.unwrap_model(self.model)
        return 3 * network.forward_flops(*inputs["learn"].shape, int(inputs["learn"].sum()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(self._nll.float().to(self.args.device), "sum").tolist()
            logs["nll"] = sums[0] / max(sums[1], 1.0)
            self._nll.zero_()
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._begun = time.perf_counter()
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Ranks the validation users with the averaged weights and logs what `NextItemTrainer` says."""
        self._seconds += time.perf_counter() - self._begun
        self.store_flos()
        with self.average.used() if self.average else contextlib.nullcontext():
            result = self.measured()
        metrics = {f"eval_{name}": value for name, value in result.means().items()}
        metrics |= {"eval_flops": float(self.state.total_flos), "eval_train_seconds": self._seconds}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._begun = time.perf_counter()
        return metrics

    def measured(self) -> RankingResult:
        """Metrics of the network as it is on the validation users; the processes share the users."""
        mine = own_rows(len(self.valid), self.args.process_index, self.args.world_size)
        part = SequenceExamples(*(getattr(self.valid, n)[mine] for n in ("starts", "stops", "firsts", "users")))
        ranked, _ = self.ranker.rank(self.accelerator.unwrap_model(self.model), part, 10)
        (whole,) = gathered(mine, ranked)
        return measure_targets(whole, self.ranker.sequences, self.valid)

    def take_best(self) -> None:
        """Leaves the weights of the best evaluation in the network. Raises DataError when there was none."""
        if self.state.best_model_checkpoint is None:
            raise DataError("The run ended before its first evaluation; lower evaluate_every or train longer.")
        best, network = Path(self.state.best_model_checkpoint), self.accelerator.unwrap_model(self.model)
        if self.average:
            self.average.take({n: w.to(self.args.device) for n, w in load_file(best / AVERAGE_FILE).items()})
        else:
            load_weights(network, best / WEIGHT_FILE)
        network.eval()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        if self.average:
            save_file({n: w.cpu().contiguous() for n, w in self.average.weights.items()}, folder / AVERAGE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        network = self.accelerator.unwrap_model(self.model if model is None else model)
        load_weights(network, Path(resume_from_checkpoint) / WEIGHT_FILE)
        if self.average:
            found = load_file(Path(resume_from_checkpoint) / AVERAGE_FILE, device=str(self.args.device))
            self.average.weights = found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        logged = [log for log in self.state.log_history if "eval_train_seconds" in log]
        self._seconds = logged[-1]["eval_train_seconds"] if logged else 0.0


def load_weights(network: nn.Module, path: Path) -> None:
    """Copies the weights of a checkpoint into a network of the same shape. Raises DataError when they do not fit."""
    try:
        network.load_state_dict(load_file(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise DataError(
            f"{path} does not fit this network ({str(error).splitlines()[0]}); train in another folder."
        ) from None


def measure_targets(ranked: np.ndarray, sequences: ItemSequences, examples: SequenceExamples) -> RankingResult:
    """NDCG and recall at 5 and 10 (as far as `ranked` (n, k) reaches) of the one target of each example."""
    targets = sequences.rows[examples.firsts]
    relevance = Relevance(np.arange(len(targets) + 1), targets)
    ks = [k for k in (5, 10, 20) if k <= ranked.shape[1]]
    return evaluate_ranking(ranked, relevance, ks, ["recall", "ndcg"])


def draw_users(examples: SequenceExamples, count: int | None, seed: int) -> SequenceExamples:
    """A random part of the examples, or all of them."""
    return examples.take(drawn(len(examples), count, seed))


def fit_arguments(settings: FitSettings, work: str | Path, rows: int, seed: int) -> TrainingArguments:
    """transformers' arguments of a run: evaluation and checkpoint every `evaluate_every` epochs.

    Raises:
        ConfigError: arguments that do not go together.
    """
    values = {
        "per_device_train_batch_size": 128,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.05,
        "max_grad_norm": 1.0,
        "num_train_epochs": 30,
        "disable_tqdm": True,
        "logging_steps": 50,
        **settings.args,
    }
    fixed: dict[str, Any] = {"remove_unused_columns": False, "gradient_checkpointing": False, "save_strategy": "steps"}
    fixed |= {"eval_strategy": "steps", "metric_for_best_model": BEST, "greater_is_better": True}
    arguments = built(TrainingArguments, values, seed, "training args", output_dir=str(work), **fixed)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    every = max(1, round(settings.evaluate_every * -(-rows // batch)))
    arguments.eval_steps = arguments.save_steps = every
    return arguments


def train_next_item(
    network: NextItemNetwork,
    rows: NextItemRows,
    ranker: HistoryRanker,
    settings: FitSettings,
    work: str | Path,
    *,
    max_history: int | None = None,
    seed: int = 0,
) -> NextItemTrainer:
    """Trains, resuming an interrupted run, and leaves the best weights by validation NDCG@10 in the network.

    Args:
        network: fresh. rows: training rows. ranker: for validation. settings: see `FitSettings`.
        work: folder of the checkpoints.
        max_history: items of history in validation; None for all.
        seed: of order, dropout and the draw of validation users.

    Returns:
        The trainer; `trainer.state.log_history` holds every evaluation, `trainer.state.best_metric` the best one.
    """
    valid = draw_users(ranker.sequences.held_out("valid", max_history), settings.valid_users, seed)
    if not len(valid):
        raise DataError(
            "No user has three items, so there is no validation target to choose a model by; check the source."
        )
    arguments = fit_arguments(settings, work, len(rows), seed)
    callbacks = [StopWhenWorse(settings.patience)] if settings.patience else []
    trainer = NextItemTrainer(network, arguments, rows, ranker, valid, settings, callbacks)
    go_on(trainer)
    trainer.take_best()
    return trainer
