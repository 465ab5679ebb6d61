"""A tiny trained generator, and its lists as a source of post-ranking."""

from pathlib import Path

from tiny_pipeline import pipeline, run_in_process

COUNTS = {"train": 40, "valid": 10, "test": 20}


def generator_shop(folder: Path) -> Path:
    """The folders data, sids, model and sft of a tiny shop."""
    values = pipeline()
    values["steps"][3]["args"]["stages"] = values["steps"][3]["args"]["stages"][:1]
    return run_in_process(values, folder, until="sft")


def generator_source(shop: Path, **changes: object) -> dict:
    """Its model as a source of post-ranking lists."""
    folders = {f"{n}_dir": str(shop / place) for n, place in (("data", "data"), ("sids", "sids"), ("model", "sft"))}
    options = {"kind": "generator", "num_beams": 8, "candidates": 5, "shard_size": 16, "batch_size": 8, "seed": 3}
    return {**options, **COUNTS, **folders, **changes}
