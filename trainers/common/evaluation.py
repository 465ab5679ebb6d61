"""Items ranked while a model trains: NDCG and recall beside the loss, by the same search as `evaluate`. Our choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sidtune.core.errors import ConfigError
from sidtune.decoding.retrieval.evaluator import Evaluator
from sidtune.decoding.retrieval.model_folder import ModelFolder
from sidtune.decoding.retrieval.prompter import Prompter
from sidtune.decoding.retrieval.retriever import SidRetriever


class EvaluateItems(TrainerCallback):
    """Every so many steps the trainer logs `items_<metric>` of the model as it stands; trackers see them too.

    Args:
        trainer: any trainer of transformers or TRL whose model reads SIDs. Its processes must hold whole models.
        evaluator: the requests and metrics; a few hundred requests of `valid` will do.
        folder: the model folder that training started from: tokenizer, SIDs, templates and limits of prompts.
        every: steps between two evaluations; the last step is always evaluated.
        metrics: names that are logged.

    Raises:
        ConfigError: `every` below 1, or a metric that the evaluator does not compute.
    """

    def __init__(
        self,
        trainer: Trainer,
        evaluator: Evaluator,
        folder: str,
        every: int = 100,
        metrics: Sequence[str] = ("ndcg@10", "recall@10"),
    ) -> None:
        known = [f"{name}@{k}" for name in evaluator.metrics for k in evaluator.ks]
        if every < 1 or not set(metrics) <= set(known):
            raise ConfigError(f"every must be at least 1 and metrics among {known}, got {every} and {list(metrics)}.")
        self.trainer, self.evaluator, self.every, self.metrics = trainer, evaluator, every, tuple(metrics)
        opened = ModelFolder.open(folder, None, evaluator.data)
        self._opened, self._prompter = opened, Prompter.of(opened, evaluator.data.items)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        was_training = model.training
        one, catalogue = self._prompter, self._prompter.catalogue
        parts = (one.tokenizer, self._opened.vocabulary, catalogue.sids, one.serializer, one.settings)
        found = self.evaluator.evaluate(SidRetriever(model, *parts, catalogue=catalogue))
        model.train(was_training)
        self.trainer.log({f"items_{name}": found[name] for name in self.metrics})
