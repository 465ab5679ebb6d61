"""Debiased GRPO on logged requests: rollouts over the catalogue's trie, rewards from feedback, a model folder like an
SFT stage's.

    sidtune grpo --config recipes/quickstart/grpo.yaml --data_dir runs/quickstart/data \\
        --sids_dir runs/quickstart/sids --model_dir runs/quickstart/sft --output_dir runs/quickstart/grpo

The output folder is a complete model folder (model, tokenizer, SID vocabulary, prompt settings), with `run.json`,
`log_history.json` and, unless everything was trained, `trained/`. An interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from sidtune.core.config import command
from sidtune.core.folders import writes
from sidtune.core.pipeline import Step, check_there
from sidtune.recipes.preflight import check_data, check_lengths, sids_before
from sidtune.trainers.grpo.options import GRPOOptions

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Arguments(GRPOOptions):
    """Options of grpo.

    Attributes:
        data_dir, sids_dir, model_dir: folders of the earlier steps; `model_dir` is a model folder or the folder of
            `sft`.
        output_dir: folder to write.
    """

    data_dir: str
    sids_dir: str
    model_dir: str
    output_dir: str


def preflight(step: Step) -> None:
    """Refuses batches that do not hold whole groups, limits that a SID alone fills, and files that are not there."""
    from sidtune.trainers.grpo.args import checked_args
    from sidtune.trainers.grpo.config import position_weights

    config, learned = step.config, sids_before(step)
    checked_args(config.args, "args", step.processes)
    check_lengths(step, max_length=config.max_length)
    check_data(step, config.split)
    if learned is not None and config.args.get("position_weights") is not None:
        position_weights(config.args["position_weights"], learned.depth())
    bias = None if config.position_bias == "interventions" else config.position_bias
    check_there(step, hard_set=config.hard_set, position_bias=bias)


@writes("grpo")
def main(arguments: Arguments) -> None:
    """Trains; writes the model folder."""
    from accelerate import PartialState

    from sidtune.data_builders.tables.store import load_folder
    from sidtune.decoding.retrieval.model_folder import ModelFolder
    from sidtune.trainers.grpo.stage import GRPOStage

    source = ModelFolder.open(arguments.model_dir, arguments.sids_dir, load_folder(arguments.data_dir))
    stage = GRPOStage(
        model_dir=source.path,
        data_dir=Path(arguments.data_dir),
        sids_dir=Path(arguments.sids_dir) / "sids",
        output_dir=Path(arguments.output_dir),
        serializer=source.serializer,
        max_history=source.settings.max_history,
        max_length=arguments.max_length or source.settings.max_length,
        save_prompts=source.complete,
        options=arguments,
    )
    metrics = stage.run()
    if PartialState().is_main_process:
        logger.info("%s: %d steps on %d prompts", arguments.output_dir, metrics["steps"], metrics["prompts"])


if __name__ == "__main__":
    command(main, Arguments)
