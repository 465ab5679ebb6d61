"""One GRPO run from folder to folder: data, trainer, resume, and a model folder like that of an SFT stage.

While it trains, prompts and checkpoints lie in `.work_<name>` beside the output folder. A run whose settings and inputs
are unchanged goes on from its last complete checkpoint; a finished one is not repeated by the pipeline
(`core/pipeline.py`). Our own plumbing, the same as in `stages.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import load_from_disk

from sidtune.core.config import as_dict, build
from sidtune.core.errors import ConfigError
from sidtune.core.folders import fingerprint, read_json, write_folder, write_json, write_run
from sidtune.core.processes import on_main
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.trainers.common.callbacks import last_complete_checkpoint
from sidtune.trainers.common.stage_model import StageModel
from sidtune.trainers.grpo.args import grpo_config
from sidtune.trainers.grpo.config import DebiasedGRPOConfig
from sidtune.trainers.grpo.examples import chosen_requests, grpo_examples, hard_requests, position_bias
from sidtune.trainers.grpo.rollout_rewards import SidCatalogue
from sidtune.trainers.grpo.trainer import DebiasedGRPOTrainer
from sidtune.trainers.rewards.gains import GainsConfig, LeafFacts

HISTORY_FILE = "log_history.json"
_STATE_FILE = "stage.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GRPOStage:
    """Where a run reads and writes.

    Attributes:
        model_dir: model folder to start from. data_dir, sids_dir: data folder and semantic-ID folder. output_dir:
            written.
        serializer: renders requests as for the model before. max_history: most past turns.
        max_length: most tokens of prompt and answer; None for no limit.
        save_prompts: writes how prompts are rendered into a folder.
    """

    model_dir: Path
    data_dir: Path
    sids_dir: Path
    output_dir: Path
    serializer: Serializer
    max_history: int | None
    max_length: int | None
    save_prompts: Callable[[Path], None]

    @property
    def work(self) -> Path:
        return self.output_dir.parent / f".work_{self.output_dir.name}"


def run_grpo(stage: GRPOStage, options: Any, callbacks: list | None = None) -> dict[str, Any] | None:
    """Trains. Every process calls this; only the main one writes.

    Args:
        stage: folders and prompts.
        options: `Arguments` of `recipes/steps/grpo.py`.
        callbacks: further callbacks of the trainer.

    Returns:
        The metrics of `run.json` on the main process, None on the others.

    Raises:
        ConfigError, DataError: before anything is trained, where the input is to blame.
        SidtuneError: when the run can no longer learn.
    """
    started = time.time()
    args = grpo_config(options.args, output_dir=stage.work / "checkpoints", seed=options.seed)
    model = StageModel.open(
        stage.model_dir, args, name=stage.output_dir.name, train=options.train, lora=dict(options.lora)
    )
    end = _end_token(model, options.end_of_reasoning) if args.rollout == "reasoning" else None
    sids = SemanticIds.from_pretrained(stage.sids_dir)
    model.vocabulary.check(model.tokenizer, sids)
    data = load_folder(stage.data_dir)
    facts = LeafFacts.of(data.items, sids)
    identity = on_main(lambda: _identity(stage, options))
    counts = on_main(lambda: _prepare(stage, options, args, data, sids, facts, model, identity))
    checkpoint = on_main(lambda: _checkpoint(stage.work))
    trainer = DebiasedGRPOTrainer(
        *(model.model, options.rewards, args, load_from_disk(str(stage.work / "train"))),
        processing_class=model.tokenizer,
        catalogue=_catalogue(sids, facts, model),
        end_token_id=end,
        train=options.train,
        callbacks=callbacks,
    )
    if checkpoint:
        logger.info("The run goes on from %s.", Path(checkpoint).name)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    return _write(stage, options, trainer, model, counts, result.metrics, started)


def _catalogue(sids: SemanticIds, facts: LeafFacts, model: StageModel) -> SidCatalogue:
    return SidCatalogue(
        SidTrie.from_semantic_ids(sids),
        model.vocabulary.sid_token_ids,
        category_of_leaf=facts.category_of_leaf,
        popularity_of_leaf=facts.popularity_of_leaf,
        statistics_of_leaf=facts.statistics_of_leaf,
    )


def _end_token(model: StageModel, text: str) -> int:
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(
            f"end_of_reasoning '{text}' is {len(ids)} tokens for this tokenizer; it must be one; make the "
            "model with init_model and extra_tokens, or name another end."
        )
    return ids[0]


def _identity(stage: GRPOStage, options: Any) -> str:
    """What the result depends on; a checkpoint of anything else is not resumed."""
    inputs = {"model": stage.model_dir, "data": stage.data_dir, "sids": stage.sids_dir}
    if options.hard_set:
        inputs["hard_set"] = Path(options.hard_set)
    state = PartialState()
    told = {
        "options": {
            k: v for k, v in as_dict(options).items() if k not in ("output_dir", "data_dir", "sids_dir", "model_dir")
        },
        "inputs": {role: fingerprint(path) for role, path in inputs.items()},
        "launch": [state.num_processes, state.distributed_type.value],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _prepare(
    stage: GRPOStage,
    options: Any,
    args: DebiasedGRPOConfig,
    data: Any,
    sids: SemanticIds,
    facts: LeafFacts,
    model: StageModel,
    identity: str,
) -> dict[str, int]:
    """Main process: builds the prompts, unless an interrupted run of the same settings left them."""
    state_file = stage.work / _STATE_FILE
    if state_file.is_file() and read_json(state_file).get("identity") == identity:
        return read_json(state_file)["counts"]
    shutil.rmtree(stage.work, ignore_errors=True)
    stage.work.mkdir(parents=True)
    requests = data.requests[options.split]
    if options.hard_set:
        requests = hard_requests(options.hard_set, requests)
    examples, counts = grpo_examples(
        *(data, chosen_requests(requests, options.max_requests, options.seed), sids, facts),
        *(stage.serializer, model.tokenizer),
        bias=position_bias(options.position_bias, data.requests["train"]),
        gains=build(GainsConfig, options.gains, "gains"),
        max_history=stage.max_history,
        max_length=stage.max_length,
        split=options.split,
        reserve=sids.depth + (args.max_completion_length + 2 if args.rollout == "reasoning" else 0),
    )
    examples.save_to_disk(str(stage.work / "train"))
    write_json(state_file, {"identity": identity, "counts": counts})
    logger.info("%d prompts with targets; %s", len(examples), ", ".join(f"{k} {v}" for k, v in counts.items()))
    return counts


def _checkpoint(work: Path) -> str | None:
    found = last_complete_checkpoint(work / "checkpoints", remove_broken=True)
    return str(found) if found else None


def _write(
    stage: GRPOStage,
    options: Any,
    trainer: DebiasedGRPOTrainer,
    model: StageModel,
    counts: dict[str, int],
    result: dict[str, float],
    started: float,
) -> dict[str, Any] | None:
    """Writes the folder at once, then removes the work folder."""
    weights: dict[str, torch.Tensor] | None = model.collect(trainer, stage.work)  # type: ignore[arg-type]

    def write() -> dict[str, Any]:
        history = finite(trainer.state.log_history)
        metrics = {
            "steps": trainer.state.global_step,
            "prompts": len(trainer.train_dataset),
            "data": counts,
            "preset_values": finite(trainer.args.preset_values),
            "train": finite(result),
            "last": next((h for h in reversed(history) if "reward" in h), {}),
        }
        with write_folder(stage.output_dir) as scratch:
            model.save(trainer, scratch, stage.work, weights)  # type: ignore[arg-type]
            stage.save_prompts(scratch)
            write_json(scratch / HISTORY_FILE, history)
            write_run(
                scratch,
                step="grpo",
                config=as_dict(options),
                inputs={name: getattr(options, name) for name in ("data_dir", "sids_dir", "model_dir")},
                metrics=metrics,
                started=started,
            )
        shutil.rmtree(stage.work, ignore_errors=True)
        return metrics

    written = on_main(write)
    return written if PartialState().is_main_process else None


def finite(value: Any) -> Any:
    """JSON has no NaN; a metric without a value becomes null."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
