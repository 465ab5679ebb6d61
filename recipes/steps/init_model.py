"""Makes the start model: a base LLM (from the hub, from a folder, or built from scratch) whose vocabulary holds the SIDs.

    sidtune init-model --config recipes/quickstart/init_model.yaml \\
        --data_dir runs/quickstart/data --sids_dir runs/quickstart/sids --output_dir runs/quickstart/model

With `base: null` a byte-level BPE is trained on the catalogue and the training queries, and a small model is built from
`scratch`; nothing is downloaded. With `base: Qwen/Qwen3-0.6B` the model and its tokenizer are loaded instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sidtune.core.config import SEEDS, check_range, command
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import write_folder, write_run, writes
from sidtune.core.pipeline import Step
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.store import DataFolder, load_folder
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

LAUNCH = "alone"

MOST_TEXTS = 50_000  # profiles and requests the BPE reads; more change nothing but the time


@dataclass
class Arguments:
    """Options of init_model.

    Attributes:
        data_dir: folder written by build_data.
        sids_dir: folder written by learn_sids; or one with published SIDs in `sids/` and no quantizer, for `init` text or mean.
        output_dir: model folder to write.
        base: model id or folder; null builds one from scratch.
        revision: revision of `base` on the hub.
        scratch: config of the model built from scratch: `model_type` and fields of its transformers config.
        text_vocab_size: size of the byte-level BPE trained for a model built from scratch.
        templates: templates of prompts, saved with the model; they render the texts of that BPE. Those of `sft` fit best.
        extra_tokens: words that become tokens of their own, such as `<think>` and `</think>` for reasoning.
        init: start values of SID rows: `codebook`, `text` or `mean`.
        pad_to_multiple_of: rows of the embedding are padded to a multiple of this.
        dtype: `float32`, `bfloat16`, ... the weights are stored in.
        seed: seed of weights and row noise.
    """

    data_dir: str
    sids_dir: str
    output_dir: str
    base: str | None = None
    revision: str | None = None
    scratch: dict = field(default_factory=lambda: {"model_type": "qwen3"})
    text_vocab_size: int = 4096
    templates: str = "plain"
    extra_tokens: list[str] = field(default_factory=list)
    init: str = "codebook"
    pad_to_multiple_of: int = 64
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        from sidtune.tokenizers.base_models.from_scratch import check_model
        from sidtune.tokenizers.base_models.loading import check_dtype
        from sidtune.tokenizers.vocabulary.extension import check_options, check_words

        check_options(self.init, self.pad_to_multiple_of)
        check_range(self, 0, "pad_to_multiple_of", "text_vocab_size")
        check_range(self, 0, "seed", most=SEEDS)
        check_words(self.extra_tokens)
        check_dtype(self.dtype)
        if self.base is None and self.revision is not None:
            raise ConfigError(
                "revision is of a base on the hub, and base is null; name the base, or leave revision out."
            )
        Serializer(None, self.templates)
        if self.base is None:
            check_model(self.scratch, self.text_vocab_size)


def preflight(step: Step) -> None:
    """Refuses a base that is neither a folder nor the name of a model on the hub."""
    from sidtune.tokenizers.base_models.loading import check_place

    if step.config.base is not None and "base" not in step.before:
        check_place(step.config.base)


@writes("init_model")
def main(arguments: Arguments) -> None:
    """Builds or loads the model, extends it and saves it."""
    from sidtune.decoding.retrieval.model_folder import PromptSettings, complete_model_folder, make_serializer
    from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
    from sidtune.tokenizers.base_models.loading import check_dtype, load_plain, load_tokenizer
    from sidtune.tokenizers.quantizers.base import load_quantizer
    from sidtune.tokenizers.vocabulary.extension import VOCABULARY_FILE, Vocabulary, add_plain_tokens, extend_vocabulary
    from sidtune.tokenizers.vocabulary.saving import save_trained

    data = load_folder(arguments.data_dir)
    sids = SemanticIds.from_pretrained(Path(arguments.sids_dir) / "sids")
    sids.check_items(data.items, arguments.data_dir)
    quantizer, codebooks = Path(arguments.sids_dir) / "quantizer", None
    if arguments.init == "codebook":
        if not quantizer.is_dir():
            raise DataError(
                f"{arguments.sids_dir} has no quantizer, so no codebooks to start from; set init to text or mean."
            )
        codebooks = load_quantizer(quantizer).codebooks
    if arguments.base is not None and (Path(arguments.base) / VOCABULARY_FILE).exists():
        Vocabulary.from_pretrained(arguments.base).check(sids=sids)
    if arguments.base is None:
        tokenizer = train_lm_tokenizer(_texts(data, arguments.templates), vocab_size=arguments.text_vocab_size)
        add_plain_tokens(tokenizer, arguments.extra_tokens)
        kind = check_dtype("float32" if arguments.dtype == "auto" else arguments.dtype)
        model = build_model(arguments.scratch, tokenizer, arguments.seed, kind)
    else:
        tokenizer = load_tokenizer(arguments.base, revision=arguments.revision)
        model = load_plain(arguments.base, revision=arguments.revision, dtype=arguments.dtype)
        add_plain_tokens(tokenizer, arguments.extra_tokens, model, seed=arguments.seed)
    ids, titles = data.items["item_id"].to_pylist(), data.items["title"].to_pylist()
    options = {name: getattr(arguments, name) for name in ("init", "pad_to_multiple_of", "seed")}
    texts = {item: title or "" for item, title in zip(ids, titles, strict=True)}
    start = {"codebooks": codebooks, "item_texts": texts}
    vocabulary = extend_vocabulary(model, tokenizer, sids, **start, **options)
    serializer = make_serializer(tokenizer, arguments.templates, PromptSettings())
    parameters = sum(p.numel() for p in model.parameters())
    with write_folder(arguments.output_dir) as scratch:
        save_trained(model, vocabulary, tokenizer, scratch)
        complete_model_folder(scratch, serializer, PromptSettings(), sids)
        counts = {"vocabulary": len(tokenizer), "sid_tokens": len(vocabulary.sid_token_ids)}
        write_run(scratch, metrics={"parameters": parameters, **counts})
    print(
        f"{arguments.output_dir}: {model.config.model_type} with {parameters:,} parameters, "
        f"{len(tokenizer):,} tokens of which {len(vocabulary.sid_token_ids):,} are SID tokens"
    )


def _texts(data: DataFolder, templates: str) -> Iterator[str]:
    """What the BPE is trained on: the catalogue, profiles and training requests, rendered as prompts render them."""
    serializer = Serializer(None, templates)
    yield from (str(serializer.item(row)) for row in data.items.to_pylist())
    yield from (str(serializer.head(row)) for row in data.users.slice(0, MOST_TEXTS).to_pylist())
    asked = data.requests["train"].select(["query", "context"]).slice(0, MOST_TEXTS)
    yield from (str(serializer.turn(row["query"], row["context"])) for row in asked.to_pylist())


if __name__ == "__main__":
    command(main, Arguments)
