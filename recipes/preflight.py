"""Checks before a pipeline's first step that several scripts share: what they can know of the steps before them."""

from __future__ import annotations

from typing import Any

from sidtune.core.config import build
from sidtune.core.errors import ConfigError
from sidtune.core.pipeline import Step


def check_data(step: Step, split: str | None = None, largest: int = 0) -> None:
    """For steps that read data: refuses a split without requests, and lists that are longer than a simulated catalogue.

    Raises:
        ConfigError: as far as the pipeline itself says what the data will be.
    """
    from sidtune.data_builders.shop_world.config import config_from_options
    from sidtune.data_builders.tables.splits import SplitConfig

    made = step.before.get("data_dir")
    if made is None or made.script.name != "build_data":
        return
    wanted = build(SplitConfig, made.config.split, "split")
    by_share = wanted.kind == "global_time" and wanted.train_until is None
    if split == "valid" and by_share and wanted.valid_share == 0:
        raise ConfigError(
            f"split is valid, but '{made.name}' makes no valid requests (valid_share 0); raise valid_share."
        )
    if made.config.reader == "shop_world":
        items = config_from_options(made.config.options).n_items
        if largest > items:
            raise ConfigError(
                f"{largest:,} places cannot be filled, '{made.name}' makes {items:,} items; lower the number."
            )


def sids_before(step: Step) -> Any:
    """The options of the step that learns the SIDs which a step reads, as far as the pipeline says; else None."""
    made = step.before.get("sids_dir")
    while made is not None and "sids_dir" in made.before:  # extend_sids
        made = made.before["sids_dir"]
    return made.config if made is not None and made.script.name == "learn_sids" else None


def check_lengths(step: Step, **lengths: int | None) -> None:
    """For steps that write or read SIDs in prompts: refuses a limit in tokens that a SID alone fills. Raises ConfigError."""
    learned = sids_before(step)
    for option, most in lengths.items():
        if learned is not None and most is not None and most <= learned.depth():
            raise ConfigError(
                f"{option}: {most} tokens leave no room beside a SID of {learned.depth()} tokens; raise it."
            )
