"""Batch retrieval: requests in, the top K items of each out, as parquet in the order of the input.

    sidtune retrieve --model_dir runs/quickstart/bundle --requests requests.jsonl \\
        --output_dir runs/quickstart/answers --k 100 --num_beams 100

The result does not depend on the number of processes, and a killed run goes on after its last finished shards of `shard_size`
requests. `decoding/serving/README.md` documents the input and the output.
"""

from __future__ import annotations

from sidtune.core.config import command
from sidtune.core.folders import writes
from sidtune.decoding.serving.options import BatchOptions as Arguments


@writes("retrieve")
def main(arguments: Arguments) -> None:
    """Answers the requests."""
    from sidtune.decoding.serving.batch import answer_requests

    answer_requests(arguments)


if __name__ == "__main__":
    command(main, Arguments)
