"""Multi-stage supervised fine-tuning: every stage names its task mixture, what trains, and its schedule.

    sidtune sft --config recipes/quickstart/sft.yaml --data_dir runs/quickstart/data \\
        --sids_dir runs/quickstart/sids --model_dir runs/quickstart/model --output_dir runs/quickstart/sft

The output folder holds one complete model folder per stage (how prompts are rendered and the SIDs are in each), and `run.json`,
which names the last stage. An interrupted run goes on from the last checkpoint of the stage it was in.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sidtune.core.config import SEEDS, check_range, command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import read_run, write_run, writes
from sidtune.core.pipeline import Step, check_there
from sidtune.recipes.preflight import check_data, check_lengths, sids_before

if TYPE_CHECKING:
    from sidtune.trainers.sft.task_examples import TaskExamples

logger = logging.getLogger(__name__)


@dataclass
class Arguments:
    """Options of sft.

    Attributes:
        data_dir, sids_dir, model_dir: folders of the earlier steps.
        output_dir: folder to write.
        stages: list of stages, see `trainers.sft.mixture.StageConfig`.
        templates: `plain`, `chatml`, or a folder with templates of your own.
        max_chars: field → longest text in characters, over the defaults of the serializer.
        history_context: render the context of past turns too (whole-history training needs it).
        prompt_max_history: most past turns in prompts at evaluation and serving; null for all that fit.
        prompt_max_length: most tokens of prompt and SID at evaluation and serving; null for no limit.
        query_sids: show the SID of every query behind its text, from the encoder and quantizer in sids_dir (best learned with
            `queries: true`); costs one token per level and query.
        seed: seed of mixtures, order and LoRA.
    """

    data_dir: str
    sids_dir: str
    model_dir: str
    output_dir: str
    stages: list[dict]
    templates: str = "plain"
    max_chars: dict = field(default_factory=dict)
    history_context: bool = True
    prompt_max_history: int | None = 20
    prompt_max_length: int | None = 1024
    query_sids: bool = False
    seed: int = 0

    # Beside these stand the `max_history` and `max_length` of the stages, which are of training.
    RENAMED: ClassVar[dict[str, str]] = {"max_history": "prompt_max_history", "max_length": "prompt_max_length"}

    def __post_init__(self) -> None:
        from sidtune.trainers.common.args import checked_sft
        from sidtune.trainers.sft.mixture import parse_stages

        stages = parse_stages(self.stages)
        self.examples().check(stages)
        for stage in stages:
            where = f"stage '{stage.name}', args"
            checked_sft(stage.args, max_length=stage.max_length, evaluate=bool(stage.eval_tasks), where=where)
        check_range(self, 0, "prompt_max_history")
        check_range(self, 0, "seed", most=SEEDS)
        check_range(self, 2, "prompt_max_length")

    def examples(self) -> TaskExamples:
        """What builds the examples of a stage."""
        from sidtune.trainers.sft.task_examples import TaskExamples

        options = {name: getattr(self, name) for name in ("seed", "templates", "max_chars", "history_context")}
        options |= {"max_history": self.prompt_max_history, "max_length": self.prompt_max_length}
        coder = self.sids_dir if self.query_sids else None
        return TaskExamples(self.data_dir, Path(self.sids_dir) / "sids", query_coder=coder, **options)


def preflight(step: Step) -> None:
    """Refuses limits that a SID alone fills, SIDs that no query can have, and files that are not there."""
    config, learned = step.config, sids_before(step)
    lengths = {f"stages.{stage['name']}.max_length": stage.get("max_length") for stage in config.stages}
    check_lengths(step, prompt_max_length=config.prompt_max_length, **lengths)
    if config.query_sids and learned is not None and learned.encoder_spec()["name"] == "precomputed":
        raise ConfigError("query_sids needs SIDs of texts, but the encoder is 'precomputed'; leave query_sids out.")
    for stage in config.stages:
        check_data(step, "valid" if stage.get("eval_tasks") else None)
        options = [(mix or {}).get("options") or {} for mix in (stage.get("tasks") or {}).values()]
        for one in options:
            check_there(step, file=one.get("file"))


@writes("sft", tree=True)
def main(arguments: Arguments) -> None:
    """Trains all stages."""
    from sidtune.core.processes import on_main
    from sidtune.tokenizers.base_models.loading import load_tokenizer
    from sidtune.tokenizers.vocabulary.extension import Vocabulary
    from sidtune.trainers.sft.stages import run_stages

    examples = arguments.examples()
    # A mistake in a template, and folders of different runs, show now, not after the first stage.
    examples.opened(load_tokenizer(arguments.model_dir), Vocabulary.from_pretrained(arguments.model_dir))
    folders = run_stages(
        *(arguments.stages, arguments.model_dir, arguments.data_dir, Path(arguments.sids_dir) / "sids"),
        arguments.output_dir,
        seed=arguments.seed,
        build_examples=examples,
        extra_inputs={"templates": examples.templates_folder} if examples.templates_folder else None,
    )

    def finish() -> None:
        records = {folder.name: read_run(folder) for folder in folders}
        stages = [{"name": name, "seconds": one["seconds"], **one["metrics"]} for name, one in records.items()]
        write_run(arguments.output_dir, metrics={"final": folders[-1].name, "stages": stages})

    on_main(finish)
    logger.info("%s: %d stages, the last is %s", arguments.output_dir, len(folders), folders[-1].name)


if __name__ == "__main__":
    command(main, Arguments)
