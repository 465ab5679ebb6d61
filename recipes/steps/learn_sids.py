"""Learns semantic IDs: item text → vectors → codes → `SemanticIds`, with a quality report beside the codes.

    sidtune learn-sids --config recipes/quickstart/learn_sids.yaml \\
        --data_dir runs/quickstart/data --output_dir runs/quickstart/sids

The output folder holds `encoder/`, `quantizer/`, `vectors.safetensors`, `sids/`, `quality.json` and `collisions.json`.
What becomes of items that share a code is `collisions: {name: ...}`, see `tokenizers/sids/collisions.py`. Items that come later get
their SIDs from the same codebooks by `extend_sids`.

With `queries: true` the codebooks are trained on the queries of the training requests and the items together (OneSearch), and
the folder also holds `queries.parquet`, the codes of these queries, and `query_recall.json`, how well codes of queries of the
validation split find their items. `tokenizers/sids/query_codes.py` codes any query from such a folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidtune.core.config import SEEDS, check_range, command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import write_folder, write_run, writes
from sidtune.core.pipeline import Step, check_there
from sidtune.data_builders.tables.store import load_folder
from sidtune.tokenizers.encoders.base import Encoder
from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.registry import COLLISIONS, made_by
from sidtune.tokenizers.sids.learning import learn_semantic_ids, made_parts

LAUNCH = "alone"


@dataclass
class Arguments:
    """Options of learn_sids.

    Attributes:
        data_dir: folder written by build_data.
        output_dir: folder to write.
        encoder_dir: folder of `align_encoder`, whose model then encodes (`encoder` may hold further options of `transformers`).
        encoder: `name` of an encoder in `tokenizers/registry.py` (default `tfidf_svd`) and its options.
        quantizer: `name` of a quantizer in `tokenizers/registry.py` (default `residual_kmeans`) and its options.
        collisions: `name` of a treatment of collisions in `tokenizers/registry.py` (default `expand`: several items may share
            a SID) and its options.
        suffix: short for `collisions: {name: suffix}`, a last level that makes every SID unique.
        compare_collisions: also measure every other treatment on these codes, with default options, and print one table.
        queries: one code space for queries and items: train the quantizer on the distinct queries of the training requests,
            stacked before the items. Needs an encoder of texts.
        learn_share: learn from this share of the items, drawn by `seed`; only these get SIDs. `extend_sids` adds the others
            with frozen codebooks, which for a very large catalogue is also the quicker way.
        seed: seed of encoder, quantizer and draw.
    """

    data_dir: str
    output_dir: str
    encoder_dir: str | None = None
    encoder: dict = field(default_factory=dict)
    quantizer: dict = field(default_factory=dict)
    collisions: dict = field(default_factory=dict)
    suffix: bool = False
    compare_collisions: bool = False
    queries: bool = False
    learn_share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        named = self.encoder.get("name", "transformers") != "transformers" or "model" in self.encoder
        if self.encoder_dir is not None and named:
            raise ConfigError("encoder_dir names the encoder; leave encoder.name and encoder.model out.")
        if self.suffix and self.collisions:
            raise ConfigError("Give either suffix: true or collisions, not both; suffix is collisions: {name: suffix}.")
        if not 0 < self.learn_share <= 1:
            raise ConfigError(f"learn_share is a share in (0, 1], got {self.learn_share}.")
        check_range(self, 0, "seed", most=SEEDS)
        self.parts()

    def parts(self) -> tuple[Encoder, Quantizer]:
        """Encoder and quantizer, untrained, after all options were checked."""
        made_by(COLLISIONS, self.collision_spec())
        return made_parts(self.encoder_spec(), self.quantizer, self.queries, self.seed)

    def collision_spec(self) -> dict:
        """Name and options of the treatment of collisions."""
        return {"name": "suffix"} if self.suffix else {"name": "expand", **self.collisions}

    def depth(self) -> int:
        """Tokens of a SID."""
        return self.parts()[1].depth + (self.collision_spec()["name"] == "suffix")

    def encoder_spec(self) -> dict:
        """Name and options of the encoder."""
        if self.encoder_dir is not None:
            return {**self.encoder, "name": "transformers", "model": self.encoder_dir}
        return {"name": "tfidf_svd", **self.encoder}


def preflight(step: Step) -> None:
    """Refuses vectors that are not there."""
    options = {**step.config.quantizer, **step.config.encoder}
    check_there(step, **{name: options[name] for name in ("path", "ids_path", "collaborative_path") if name in options})


@writes("learn_sids")
def main(arguments: Arguments) -> None:
    """Learns the SIDs; prints the quality table and its warnings."""
    learned = learn_semantic_ids(
        load_folder(arguments.data_dir),
        arguments.encoder_spec(),
        arguments.quantizer,
        arguments.collision_spec(),
        queries=arguments.queries,
        learn_share=arguments.learn_share,
        compare_with_others=arguments.compare_collisions,
        seed=arguments.seed,
    )
    with write_folder(arguments.output_dir) as scratch:
        learned.write(scratch)
        write_run(scratch, metrics=learned.metrics)
    print(learned.to_markdown())


if __name__ == "__main__":
    command(main, Arguments)
