"""The model of a stage: opened from a folder, told what trains, gathered from all processes, written as a plain folder
again.

Our choice: whatever a stage trains, its folder is a complete plain model, so that the next stage, evaluation and
serving read every stage alike; what was trained alone (new rows, LoRA factors) lies beside it in `trained/`, a few MB
that fit the stage's input model. The work itself is done by `trainable_tokens.py` and `saving.py` in `tokenizers/vocabulary`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, set_seed
from transformers.integrations import unset_hf_deepspeed_config
from trl import GRPOConfig, SFTConfig

from sidtune.core.errors import ConfigError
from sidtune.tokenizers.base_models.loading import load_tokenizer
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.tokenizers.vocabulary.saving import load_model, merge_and_save, save_trained
from sidtune.tokenizers.vocabulary.token_matrices import is_split
from sidtune.tokenizers.vocabulary.trainable_tokens import set_trainable

TRAINED_FOLDER = "trained"


@dataclass
class StageModel:
    """Model, tokenizer and vocabulary of a stage.

    Attributes:
        model: what `set_trainable` made of the model; a `PeftModel` when LoRA trains.
        tokenizer: its tokenizer.
        vocabulary: which token ids the semantic IDs have.
        source: the folder it came from.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    source: Path
    train: str

    @classmethod
    def open(cls, source: str | Path, args: SFTConfig | GRPOConfig, *, name: str, train: str, lora: dict) -> StageModel:
        """Loads a model folder and chooses what trains. Call on every process, after `args` was made.

        Args:
            source: folder with model, tokenizer and `sid_vocabulary.json`.
            args: `model_init_kwargs` (dtype, attn_implementation, ...) and the seed of new LoRA factors.
            name: of the stage, for messages.
            train, lora: what trains, and the options of LoRA, see `StageConfig` in `trainers/sft/mixture.py`.

        Raises:
            DataError: missing or damaged files, or a vocabulary of another model.
            ConfigError: LoRA options that do not fit.
        """
        options = dict(args.model_init_kwargs or {})
        if "trust_remote_code" in options:
            raise ConfigError(f"{name}: sidtune runs no code from model folders; remove trust_remote_code.")
        vocabulary = Vocabulary.from_pretrained(source)
        tokenizer = load_tokenizer(source)
        vocabulary.check(tokenizer)
        set_seed(args.seed)
        model = load_model(source, **options)
        if model.config.is_encoder_decoder:
            raise ConfigError(f"{source} holds an encoder-decoder model; the stages need a causal LM such as Qwen3.")
        model = set_trainable(model, vocabulary, train, lora if train == "lora" else None)
        return cls(model, tokenizer, vocabulary, Path(source), train)

    @property
    def level_token_ids(self) -> list[Any]:
        """Token ids of each SID level."""
        return [self.vocabulary.level_token_ids(level) for level in range(self.vocabulary.depth)]

    def collect(self, trainer: Trainer, work: Path) -> dict[str, torch.Tensor] | None:
        """Brings what was trained to the main process. Collective: every process must call it.

        Rows and LoRA factors are written to `work/trained`; the weights of a sharded model that was trained whole are
        returned; of an unsharded one nothing needs to be brought.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.train != "all":
            if trainer.is_world_process_zero():
                shutil.rmtree(work / TRAINED_FOLDER, ignore_errors=True)  # what a stop while writing it left
            save_trained(
                *(model, self.vocabulary, self.tokenizer, work / TRAINED_FOLDER),
                base_model=self.source,
                is_main_process=trainer.is_world_process_zero(),
            )
            return None
        return trainer.accelerator.get_state_dict(trainer.model_wrapped) if self._sharded(model) else None

    def save(self, trainer: Trainer, folder: Path, work: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """Writes the plain model folder, and `trained/` beside it. Main process only; consumes the model.

        Args:
            trainer: the trainer after training.
            folder: where to write (the scratch folder of `write_folder`).
            work: where `collect` wrote; as deep as `folder`, because the base is stored by a relative path.
            weights: what `collect` returned.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.train == "all":
            if weights is not None:
                # Gathered tensors no longer share memory, so a tied head would be stored twice.
                tied = getattr(model, "_tied_weights_keys", None) or {}
                weights = {k: v for k, v in weights.items() if not (model.config.tie_word_embeddings and k in tied)}
            save_trained(model, self.vocabulary, self.tokenizer, folder, state_dict=weights)
        elif self._sharded(model):
            # A ZeRO-3 launch would share out the model, but only this process loads it.
            unset_hf_deepspeed_config()
            merge_and_save(load_model(work / TRAINED_FOLDER), self.vocabulary, self.tokenizer, folder)
        else:
            merge_and_save(model, self.vocabulary, self.tokenizer, folder)
        if self.train != "all":
            shutil.copytree(work / TRAINED_FOLDER, folder / TRAINED_FOLDER)

    @staticmethod
    def _sharded(model: nn.Module) -> bool:
        return any(is_split(parameter) for parameter in model.parameters())
