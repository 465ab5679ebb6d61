"""Runs a pipeline, skipping what is done and going on where a run was interrupted (`core/pipeline.py`).

sidtune run --config recipes/quickstart/pipeline.yaml
"""

from __future__ import annotations

from sidtune.core.config import command
from sidtune.core.pipeline import RunArguments as Arguments
from sidtune.core.pipeline import run_pipeline as main

LAUNCH = "alone"

if __name__ == "__main__":
    command(main, Arguments)
