"""Writes a folder that vLLM and SGLang load, with the catalogue as a grammar for their structured outputs.

    sidtune export-engine --sids_dir runs/quickstart/sids --model_dir runs/quickstart/sft \\
        --output_dir runs/quickstart/engine

The folder's README has launch lines and request bodies, and says what was not tested; `decoding/serving/engines.md` says
when to use it. Beside the server's files lie the SIDs and the serializer, with which prompts are made and answers read.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidtune.core.config import check_range, command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import write_folder, write_run, writes

LAUNCH = "alone"


@dataclass
class Arguments:
    """Options of export_engine.

    Attributes:
        sids_dir: folder of learn_sids.
        model_dir: a model folder or the folder of `sft`; adapters and trained rows are merged.
        output_dir: folder to write.
        dtype: of the written weights: `float32`, `bfloat16` or `float16`.
        max_sids: largest catalogue, in SIDs, that becomes a grammar; servers read the grammar with every request.
        end_token: text of the token that ends a reasoning, such as `</think>`; also writes the grammar with free text
            before the SID. Null: none.
    """

    sids_dir: str
    model_dir: str
    output_dir: str
    dtype: str = "bfloat16"
    max_sids: int = 100_000
    end_token: str | None = None

    def __post_init__(self) -> None:
        check_range(self, 1, "max_sids", most=2**63)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, got '{self.dtype}'.")


@writes("export_engine")
def main(arguments: Arguments) -> None:
    """Writes the folder."""
    import torch

    from sidtune.decoding.retrieval.model_folder import ModelFolder
    from sidtune.decoding.serving.engine_export import export_engine
    from sidtune.decoding.trie import SidTrie

    source = ModelFolder.open(arguments.model_dir, arguments.sids_dir)
    end = None if arguments.end_token is None else _one_token(source.tokenizer, arguments.end_token)
    model = source.load_model()
    with write_folder(arguments.output_dir) as scratch:
        facts = export_engine(
            *(model.to(getattr(torch, arguments.dtype)), source.tokenizer, source.vocabulary),
            *(SidTrie.from_semantic_ids(source.sids), scratch),
            max_sids=arguments.max_sids,
            end_token_id=end,
        )
        source.complete(scratch)
        write_run(scratch, metrics=facts)
    print(
        f"{arguments.output_dir}: {facts['sids']:,} SIDs in a grammar of {facts['grammar_bytes'] / 1000:,.0f} kB; "
        "its README has the commands"
    )


def _one_token(tokenizer, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(
            f"end_token '{text}' is {len(ids)} tokens of this tokenizer, expected one; add it to the tokenizer before "
            "training, or choose another."
        )
    return ids[0]


if __name__ == "__main__":
    command(main, Arguments)
