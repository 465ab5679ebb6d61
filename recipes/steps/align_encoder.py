"""Trains a text encoder whose vectors follow behaviour, not words alone: OneSearch's aligned embeddings.

    sidtune align-encoder --config recipes/onesearch/align_encoder.yaml \\
        --data_dir runs/onesearch/data --output_dir runs/onesearch/encoder
    sidtune learn-sids --data_dir runs/onesearch/data --output_dir runs/onesearch/sids \\
        --encoder '{name: transformers, model: runs/onesearch/encoder}'

Pairs are mined from the log before the split and filtered by a base encoder; five terms are learned, see
`trainers/contrastive/losses.py`. The output folder is a plain transformers model with its pooling, `report.json` (recall of
held-out pairs, before and after) and `run.json`. An interrupted run goes on from its last checkpoint, in `.work_<name>` beside
the output folder.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.config import SEEDS, build, check_range, command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import write_json, write_run, writes
from sidtune.core.processes import launch, on_main
from sidtune.core.resume import Work, identity_of
from sidtune.data_builders.mining.alignment_pairs import MiningConfig, held_out_pairs
from sidtune.data_builders.tables.splits import training_cut
from sidtune.data_builders.tables.store import DataFolder, load_folder
from sidtune.tokenizers.registry import ENCODERS, made_by
from sidtune.tokenizers.sids.learned import texts_of
from sidtune.trainers.contrastive.sources import AlignmentSource, RelevanceConfig, ThresholdConfig, alignment_source

logger = logging.getLogger(__name__)
REPORT_FILE, PAIRS_FILE = "report.json", "pairs.npz"


@dataclass
class Arguments:
    """Options of align_encoder.

    Attributes:
        data_dir: folder written by build_data.
        output_dir: model folder to write.
        backbone: name or folder of the pretrained text model to start from; null makes a small one from scratch.
        revision: revision of the backbone on the hub.
        scratch: config of the model made from scratch: `model_type` (default bert) and fields of its transformers config.
        text_vocab_size: size of the byte-level BPE of a model made from scratch.
        pooling: `mean`, `cls` or `last`; `auto` takes what the backbone's folder names, else mean.
        max_length: texts are cut to this many tokens, in training and afterwards.
        base: `name` and options of the encoder that filters pairs and is the yardstick of the report; default `tfidf_svd`.
        mining: options of `data_builders.mining.alignment_pairs.MiningConfig`.
        thresholds: `q2q`, `i2i`, `q2i`: pairs above this base cosine are kept.
        relevance: options of `trainers.contrastive.sources.RelevanceConfig`: where relevance scores come from.
        loss: options of `trainers.contrastive.losses.AlignedLossConfig`: weights, temperature, margins.
        args: fields of transformers' TrainingArguments.
        split: held-out requests of the report, `valid` or `test`.
        k: cut-off of the report's recall.
        seed: of weights, order and draws.
    """

    data_dir: str
    output_dir: str
    backbone: str | None = None
    revision: str | None = None
    scratch: dict = field(default_factory=dict)
    text_vocab_size: int = 4096
    pooling: str = "auto"
    max_length: int = 64
    base: dict = field(default_factory=dict)
    mining: dict = field(default_factory=dict)
    thresholds: dict = field(default_factory=dict)
    relevance: dict = field(default_factory=dict)
    loss: dict = field(default_factory=dict)
    args: dict = field(default_factory=dict)
    split: str = "test"
    k: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        from sidtune.tokenizers.encoders.scratch import check_text_model
        from sidtune.trainers.contrastive.losses import AlignedLossConfig
        from sidtune.trainers.contrastive.trainer import checked_aligned_args

        self.mining_config = build(MiningConfig, self.mining, "mining")
        self.threshold_config = build(ThresholdConfig, self.thresholds, "thresholds")
        self.relevance_config = build(RelevanceConfig, self.relevance, "relevance")
        self.loss_config = build(AlignedLossConfig, self.loss, "loss")
        checked_aligned_args(self.args)
        made_by(ENCODERS, {"name": "tfidf_svd", **self.base}, self.seed)
        check_range(self, 1, "max_length", "k")
        check_range(self, 0, "seed", most=SEEDS)
        if self.backbone is None and self.revision is not None:
            raise ConfigError(
                "revision is of a backbone on the hub, and there is none; name it, or leave revision out."
            )
        if self.backbone is None:
            check_text_model(self.scratch, self.text_vocab_size)
        if self.pooling not in ("auto", "mean", "cls", "last"):
            raise ConfigError(f"pooling must be 'auto', 'mean', 'cls' or 'last', got '{self.pooling}'.")
        if self.split not in ("valid", "test"):
            raise ConfigError(f"split must be 'valid' or 'test', got '{self.split}'.")


@writes("align_encoder")
def main(arguments: Arguments) -> None:
    """Mines, trains, writes the folder and prints the report."""
    from sidtune.trainers.contrastive import trainer as training

    checkpoints = Work(arguments.output_dir, {}).checkpoints
    args = training.aligned_args(arguments.args, checkpoints, arguments.seed)  # also forms the group of processes
    work = Work(arguments.output_dir, on_main(lambda: identity_of(arguments)), place=launch())
    if on_main(work.is_done):
        logger.info("%s is unchanged and is skipped.", work.output)
        return
    shape = (_pooling(arguments), arguments.max_length)
    if arguments.backbone is not None:  # a wrong name is told before the mining
        training.check_encoder(training.load_encoder(arguments.backbone, arguments.revision)[0], *shape)
    record = on_main(lambda: work.begin(lambda folder: _prepare(arguments, folder, shape)))
    with np.load(work.folder / PAIRS_FILE, allow_pickle=False) as arrays:
        pairs = dict(arrays)
    source = AlignmentSource(record["queries"], pairs, pairs.pop("scores"), record["told"])
    model, tokenizer = training.load_encoder(str(work.folder / "start"))
    texts = texts_of(load_folder(arguments.data_dir).items)
    examples = training.AlignedExamples(source.queries, texts, source.pairs, source.scores)
    trainer = training.train_aligned(model, tokenizer, examples, args, arguments.loss_config, *shape)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    on_main(lambda: _write(arguments, work, trained, tokenizer, shape, trainer.state.log_history, source))


def _prepare(arguments: Arguments, work: Path, shape: tuple[str, int]) -> dict[str, Any]:
    """Main process: the pairs and the untrained model; returns queries and what there is to tell of the mining."""
    from sidtune.metrics.baselines.tables import training_events
    from sidtune.tokenizers.encoders.scratch import scratch_encoder
    from sidtune.trainers.contrastive.trainer import check_encoder, load_encoder, save_aligned

    data = load_folder(arguments.data_dir)
    texts = texts_of(data.items)
    source = alignment_source(
        *(data, training_events(data), texts, _base(arguments, texts)),
        *(arguments.mining_config, arguments.threshold_config, arguments.relevance_config, arguments.seed),
    )
    for note in source.told["notes"]:
        logger.warning("%s", note)
    np.savez(work / PAIRS_FILE, scores=source.scores, **source.pairs)
    if arguments.backbone is not None:
        model, tokenizer = load_encoder(arguments.backbone, arguments.revision)
    else:
        words, size = [*texts, *source.queries], arguments.text_vocab_size
        model, tokenizer = scratch_encoder(words, arguments.scratch, size, arguments.seed)
    check_encoder(model, *shape)
    save_aligned(work / "start", model, tokenizer, *shape)
    return {"queries": source.queries, "told": source.told}


def _base(arguments: Arguments, texts: list[str]) -> Any:
    """The fitted base encoder."""
    return made_by(ENCODERS, {"name": "tfidf_svd", **arguments.base}, arguments.seed).fit(texts)


def _pooling(arguments: Arguments) -> str:
    """The pooling with `auto` decided."""
    from sidtune.tokenizers.encoders.pooling import saved_pooling

    if arguments.pooling != "auto":
        return arguments.pooling
    named = None if arguments.backbone is None else saved_pooling(arguments.backbone, arguments.revision)
    return named or "mean"


def _write(
    arguments: Arguments,
    work: Work,
    model: Any,
    tokenizer: Any,
    shape: tuple[str, int],
    history: list[dict[str, Any]],
    source: AlignmentSource,
) -> None:
    """Main process: the folder at once, then the work folder goes."""
    from sidtune.metrics.pair_recall import recall_to_markdown
    from sidtune.trainers.contrastive.trainer import save_aligned

    with work.finish("align_encoder") as scratch:
        save_aligned(scratch, model, tokenizer, *shape)
        rows, names = _report(arguments, {"start": work.folder / "start", "aligned": scratch})
        report = {"k": arguments.k, "encoders": names, "mined": source.told, "rows": rows, "curves": history}
        write_json(scratch / REPORT_FILE, report)
        metrics = {"parameters": sum(p.numel() for p in model.parameters()), "pooling": shape[0], "mined": source.told}
        write_run(scratch, metrics={**metrics, "recall": {row["pairs_of"]: row["recall"] for row in rows}})
    for kind in ("q2q", "i2i", "q2i"):
        print(f"{kind}: {source.told[kind]['kept']:,} of {source.told[kind]['mined']:,} mined pairs kept")
    relevance = source.told["relevance"]
    print(f"rank: {source.told['rank']['rows']:,} rows; relevance: {relevance['rows']:,} rows ({relevance['source']})")
    print(*source.told["notes"], sep="\n")
    print(recall_to_markdown(rows, arguments.k, names))


def _report(arguments: Arguments, folders: dict[str, Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Recall of held-out pairs by the base encoder, the start model and the aligned one, as the saved folders encode."""
    from sidtune.metrics.baselines.tables import training_events
    from sidtune.metrics.pair_recall import compare_recall, pair_hits
    from sidtune.tokenizers.encoders.base import make_encoder

    data = load_folder(arguments.data_dir)
    texts, ids = texts_of(data.items), data.items["item_id"].to_pylist()
    early = training_events(data)
    held = held_out_pairs(
        *(data.items, _late_events(data, arguments.split), data.requests[arguments.split], early),
        *(data.requests["train"], arguments.mining_config.actions),
    )
    encoders = {"base": _base(arguments, texts)}
    for name, folder in folders.items():
        encoders[name] = make_encoder("transformers", {"model": str(folder)}).fit(texts)
    hits: dict[str, dict[str, np.ndarray]] = {"query to item": {}, "item to item": {}}
    for name, encoder in encoders.items():
        items = encoder.encode(texts, ids)
        queries = encoder.encode(held.queries) if held.queries else np.zeros((1, items.shape[1]), np.float32)
        hits["query to item"][name] = pair_hits(queries, items, held.q2i, arguments.k)
        hits["item to item"][name] = pair_hits(items, items, held.i2i, arguments.k, among_items=True)
    rows = []
    for kind, pairs, new in (("query to item", held.q2i, held.q2i_new), ("item to item", held.i2i, held.i2i_new)):
        for which, mask in (("all", np.ones(len(pairs), bool)), ("new", new)):
            chosen = {name: values[mask] for name, values in hits[kind].items()}
            row = compare_recall(chosen, pairs[mask, 0], "base", "aligned", seed=arguments.seed)
            rows.append({"pairs_of": f"{kind}, {which}", **row})
    return rows, list(encoders)


def _late_events(data: DataFolder, split: str) -> pa.Table:
    """Events of the held-out requests; where events name no request, all that are not before the split."""
    wanted = data.requests[split]["request_id"].combine_chunks()
    named = data.events["request_id"]
    if named.null_count < len(named):
        return data.events.filter(pc.is_in(named, value_set=wanted))
    held = [data.requests[name].select(["user_id", "time"]) for name in ("valid", "test")]
    late = pa.concat_tables(held)
    cut = training_cut(late, np.full(late.num_rows, "test"), data.meta.get("split") or {})
    return data.events.filter(pa.array(data.events["time"].to_numpy() >= cut.of(data.events["user_id"])))


if __name__ == "__main__":
    command(main, Arguments)
