"""One GRPO run from folder to folder: data, trainer, and a model folder like that of an SFT stage, see `trainers/common/stage.py`.

While it trains, prompts and checkpoints lie in `.work_<name>` beside the output folder. Our own plumbing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback

from sidtune.core.config import as_dict
from sidtune.core.errors import ConfigError
from sidtune.core.folders import fingerprint
from sidtune.core.resume import work_folder
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.store import DataFolder, load_folder
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.trainers.common.stage import Stage
from sidtune.trainers.common.stage_model import StageModel
from sidtune.trainers.grpo.args import grpo_config
from sidtune.trainers.grpo.config import DebiasedGRPOConfig
from sidtune.trainers.grpo.examples import grpo_examples, hard_rows, logged_gains
from sidtune.trainers.grpo.options import GRPOOptions
from sidtune.trainers.grpo.rollout_rewards import SidCatalogue
from sidtune.trainers.grpo.trainer import DebiasedGRPOTrainer
from sidtune.trainers.rewards.gains import LeafFacts

logger = logging.getLogger(__name__)


@dataclass
class GRPOStage(Stage):
    """One run.

    Attributes:
        model_dir: model folder to start from. data_dir, sids_dir: data folder and semantic-ID folder. output_dir:
            written.
        serializer: renders requests as for the model before. max_history: most past turns.
        max_length: most tokens of prompt and answer; None for no limit.
        save_prompts: puts into a folder what makes a saved model complete, how prompts are rendered above all.
        options: what the run is told.
        callbacks: further callbacks of the trainer.
    """

    model_dir: Path
    data_dir: Path
    sids_dir: Path
    output_dir: Path
    serializer: Serializer
    max_history: int | None
    max_length: int | None
    save_prompts: Callable[[Path], None]
    options: GRPOOptions = field(default_factory=GRPOOptions)
    callbacks: Sequence[TrainerCallback] = ()

    step = "grpo"

    def __post_init__(self) -> None:
        self.source, self.output, self.work = self.model_dir, self.output_dir, work_folder(self.output_dir)
        self.title, self.train, self.lora = self.output.name, self.options.train, self.options.lora
        self.config = as_dict(self.options)
        places = {name: getattr(self, name) for name in ("data_dir", "sids_dir", "model_dir")}
        self.inputs = {name: path for name, path in places.items() if name not in self.config}

    @functools.cached_property
    def data(self) -> DataFolder:
        """The data folder, read once."""
        return load_folder(self.data_dir)

    @functools.cached_property
    def sids(self) -> SemanticIds:
        """The semantic IDs, read once."""
        return SemanticIds.from_pretrained(self.sids_dir)

    @functools.cached_property
    def facts(self) -> LeafFacts:
        """What is known of each leaf."""
        return LeafFacts.of(self.data.items, self.sids)

    def arguments(self) -> DebiasedGRPOConfig:
        return grpo_config(self.options.args, output_dir=self.work / "checkpoints", seed=self.options.seed)

    def identity(self) -> dict[str, Any]:
        """The options but the names of folders, and the content of everything read."""
        told = {name: getattr(self.options, name) for name in GRPOOptions.__dataclass_fields__}
        read = {"model": self.model_dir, "data": self.data_dir, "sids": self.sids_dir}
        further = {name: told[name] for name in ("hard_set", "position_bias") if told[name]}
        read |= {name: path for name, path in further.items() if Path(path).exists()}
        limits = {"max_history": self.max_history, "max_length": self.max_length}
        return {**told, **limits, **{role: fingerprint(path) for role, path in read.items()}}

    def examples(self, model: StageModel) -> tuple[dict[str, Dataset], dict[str, Any]]:
        options, sids = self.options, self.sids
        model.vocabulary.check(model.tokenizer, sids)
        self._end_token(model)  # told before the prompts are made
        requests = log = self.data.requests[options.split]
        if options.hard_set:
            requests = requests.take(hard_rows(options.hard_set, requests["request_id"]))
        answer = self.args.max_completion_length + 2 if self.args.rollout == "reasoning" else 0
        examples, counts = grpo_examples(
            *(self.data, requests, sids, self.facts, self.serializer, model.tokenizer),
            made=logged_gains(requests, self.facts, options, log, self.data.requests["train"]),
            max_history=self.max_history,
            max_length=self.max_length,
            split=options.split,
            reserve=sids.depth + answer,
            limit=options.max_requests,
            seed=options.seed,
        )
        logger.info("%d prompts with targets; %s", len(examples), ", ".join(f"{k} {v}" for k, v in counts.items()))
        return {"train": examples}, counts

    def trainer(self, model: StageModel, data: dict[str, Dataset]) -> DebiasedGRPOTrainer:
        return DebiasedGRPOTrainer(
            *(model.model, self.options.rewards, self.args, data["train"]),
            processing_class=model.tokenizer,
            catalogue=SidCatalogue.from_semantic_ids(self.sids, model.vocabulary, self.facts),
            end_token_id=self._end_token(model),
            train=self.train,
            callbacks=self.callbacks,
        )

    def metrics(self, trainer: Trainer, told: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "prompts": len(trainer.train_dataset),  # type: ignore[arg-type]
            "data": told,
            "preset_values": self.args.preset_values,
            "last": next((h for h in reversed(history) if "reward" in h), {}),
        }

    def complete(self, folder: Path, model: StageModel) -> None:
        self.save_prompts(folder)

    def _end_token(self, model: StageModel) -> int | None:
        if self.args.rollout != "reasoning":
            return None
        text = self.options.end_of_reasoning
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(
                f"end_of_reasoning '{text}' is {len(ids)} tokens for this tokenizer; it must be one; make the "
                "model with init_model and extra_tokens, or name another end."
            )
        return ids[0]
