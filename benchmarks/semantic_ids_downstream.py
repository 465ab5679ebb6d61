"""What a small model makes of semantic IDs: the steps of the recipes, run in one process for `semantic_ids.py`.

One `Source` names a data set, the vectors of its items, the budget of codes and the training of the small model. `learn_sids`,
`init_model`, `sft` and `evaluate` are called as a person would call them; nothing of them is written again here. Where a source has
no text, `items` networks of `recipes/next_item` take the language model's place: on the same time they learn far more. Our own
measurement; no paper is involved.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import torch

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json
from sidtune.data_builders.sequences.source import SequenceSource
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.next_item.ensembles import fit_baseline
from sidtune.decoding.next_item.ranking import HistoryRanker, SequenceCatalogue
from sidtune.metrics.statistics.bootstrap import PairedResult, paired_bootstrap
from sidtune.metrics.statistics.compare import MODEL as OURS
from sidtune.models.next_item.network import NextItemConfig, make_network
from sidtune.recipes.steps import build_data, evaluate, init_model, learn_sids, sft
from sidtune.tokenizers.encoders.base import Encoder, load_encoder
from sidtune.tokenizers.quantizers.base import load_quantizer
from sidtune.tokenizers.sids.learned import VECTOR_FILE
from sidtune.tokenizers.sids.quality import SidQuality, sid_quality
from sidtune.tokenizers.sids.query_recall import QueryItemRecall, query_item_recall, query_targets
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.trainers.next_item.data import NextItemRows
from sidtune.trainers.next_item.trainer import FitSettings, draw_users, measure_targets, train_next_item

METRIC = "ndcg@10"
MODEL = {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
ARGS = {
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.05,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "no",
    "logging_strategy": "no",
    "logging_first_step": False,
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Source:
    """One data set of the comparison.

    Attributes:
        title: as it stands in the table.
        reader, options, split: of build_data. folder: name below `SIDTUNE_DATA`, None for the embedded shop.
        encoder: of learn_sids.
        model: `language` (a small Qwen3) or `items` (see `models/next_item/network.py`).
        width: codes per level k; four levels, so 4k tokens.
        grid: coordinates of one FSQ level, product about k.
        hidden, layers: size of the small model.
        epochs: of quantizers that are networks.
        steps, batch, learning_rate: of its training on whole histories. max_length: tokens of a history, items for `items`.
        requests: test requests that are decoded.
        queries: whether requests have a query.
    """

    title: str
    reader: str
    encoder: dict[str, Any]
    width: int
    grid: tuple[int, ...]
    epochs: int
    steps: int
    batch: int
    learning_rate: float
    requests: int
    folder: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    hidden: int = 64
    layers: int = 2
    model: str = "language"
    max_length: int = 256
    queries: bool = False

    @property
    def path(self) -> str | None:
        """Its folder on this machine; None for the embedded shop."""
        return None if self.folder is None else str(Path(os.environ.get("SIDTUNE_DATA", "")) / self.folder)

    def available(self) -> bool:
        """Whether its files are on this machine."""
        return self.path is None or Path(self.path).is_dir()


def build(source: Source, folder: Path) -> Path:
    """The data folder, built when it is not there. Raises DataError when the files are missing."""
    if (folder / "run.json").exists():
        return folder
    if not source.available():
        raise DataError(
            f"The data of {source.title} is not there; set SIDTUNE_DATA to the folder that holds '{source.folder}'."
        )
    arguments = {"reader": source.reader, "path": source.path, "options": source.options, "split": source.split}
    build_data.main(build_data.Arguments(str(folder), **arguments))
    return folder


def learn(source: Source, data: Path, folder: Path, quantizer: dict[str, Any], seed: int) -> None:
    """Semantic IDs of all items."""
    encoder = dict(source.encoder)
    if "path" in encoder:
        encoder["path"] = str(Path(os.environ["SIDTUNE_DATA"]) / encoder["path"])
    learn_sids.main(learn_sids.Arguments(str(data), str(folder), encoder=encoder, quantizer=quantizer, seed=seed))


def shuffle(learned: Path, folder: Path, seed: int) -> None:
    """The same codes on other items: what is left of a quantizer when its codes mean nothing.

    Collisions, entropies and utilisation stay what they were; only which item has which code is drawn by lot.
    """
    shutil.copytree(learned, folder, dirs_exist_ok=True)
    sids = SemanticIds.from_pretrained(learned / "sids")
    codes = np.random.default_rng(seed).permutation(sids.codes)
    SemanticIds(sids.item_ids, codes, sids.level_sizes, sids.popularity).save_pretrained(folder / "sids")


def quality(source: Source, data: Path, folder: Path, seed: int) -> tuple[SidQuality, QueryItemRecall | None]:
    """Quality of a SID folder, and recall of items through the codes of test queries where there are queries."""
    sids, quantizer = SemanticIds.from_pretrained(folder / "sids"), load_quantizer(folder / "quantizer")
    vectors = safetensors.numpy.load_file(folder / VECTOR_FILE)["vectors"]
    report = sid_quality(sids, vectors=vectors, quantizer=quantizer, seed=seed)
    if not source.queries:
        return report, None
    texts, asked, wanted = query_targets(load_folder(data).requests["test"], sids.item_ids)
    encoder: Encoder = load_encoder(folder / "encoder")
    queries = encoder.encode(texts)
    found = query_item_recall(queries, vectors, quantizer, wanted, query_rows=asked, item_codes=sids.codes)
    return report, found


def train_and_score(
    source: Source, data: Path, sids: Path, folder: Path, seed: int, baselines: list[str]
) -> dict[str, Any]:
    """Trains the small model and evaluates it on test requests: its costs, NDCG@10 and that of the baselines."""
    if source.model == "items":
        return items_model(source, sids, folder, seed, baselines)
    trained = train(source, data, sids, folder, seed)
    return trained | score(source, data, sids, folder, "test", baselines)


def items_model(source: Source, folder: Path, work: Path, seed: int, baselines: list[str]) -> dict[str, Any]:
    """The same with a network of `recipes/next_item`; no item of the user's history is recommended, by no system."""
    tables, sequences = SequenceSource(source.path, source.reader, source.options).read()
    catalogue = SequenceCatalogue.of(SemanticIds.from_pretrained(folder / "sids"), sequences)
    sizes = catalogue.sids.level_sizes
    rows = NextItemRows(sequences, sequences.whole_examples(source.max_length), catalogue.codes, sizes)
    shape = {"width": source.hidden, "layers": source.layers, "feed_forward": 2 * source.hidden}
    torch.manual_seed(seed)
    network = make_network(NextItemConfig(list(sizes), len(sequences.item_ids), **shape))
    args = {
        "max_steps": source.steps,
        "per_device_train_batch_size": source.batch,
        "learning_rate": source.learning_rate,
    }
    epochs = source.steps / -(-len(rows) // source.batch)
    settings = FitSettings(args | {"warmup_steps": source.steps // 20}, average=0.99, evaluate_every=epochs)
    ranker = HistoryRanker(sequences, catalogue, exclude_seen=True)
    started = time.time()
    train_next_item(network, rows, ranker, settings, work / "sft", max_history=source.max_length, seed=seed)
    trained = {"parameters": network.parameters_count(), "steps": source.steps}
    trained["train_s"] = round(time.time() - started, 1)
    started = time.time()
    examples = draw_users(sequences.held_out("test"), source.requests, seed=0)
    ranked = ranker.rank(network, examples.cut(source.max_length), 10)[0]
    result = measure_targets(ranked, sequences, examples)
    users = [sequences.user_ids[user] for user in examples.users]
    values = {f"{OURS}/{METRIC}": result.per_request[METRIC]}
    (work / "test").mkdir()
    pq.write_table(pa.table({"request_id": users, "user_id": users, **values}), work / "test" / "per_request.parquet")
    scored = {"requests": len(examples), METRIC: result.means()[METRIC], "eval_s": round(time.time() - started, 1)}
    simple = {name: fit_baseline(name, tables, sequences).rank_both(examples, 10)[False] for name in baselines}
    means = {name: measure_targets(found, sequences, examples).means() for name, found in simple.items()}
    return trained | scored | ({"baselines": means} if means else {})


def train(source: Source, data: Path, sids: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Trains the small model on whole histories; parameters, steps and seconds."""
    size = {"hidden_size": source.hidden, "num_hidden_layers": source.layers, "intermediate_size": 3 * source.hidden}
    size |= {"head_dim": source.hidden // 4, "max_position_embeddings": 2 * source.max_length}
    start = init_model.Arguments(
        str(data),
        str(sids),
        str(folder / "model"),
        scratch={**MODEL, **size},
        text_vocab_size=1024 if source.queries else 320,
        templates="compact",
        seed=seed,
    )
    init_model.main(start)
    args = {**ARGS, "max_steps": source.steps, "per_device_train_batch_size": source.batch}
    args |= {"learning_rate": source.learning_rate, "warmup_steps": source.steps // 20}
    task = {"tasks": {"whole_history": {}}, "max_length": source.max_length, "max_history": None, "args": args}
    started = time.time()
    sft.main(
        sft.Arguments(
            str(data),
            str(sids),
            str(folder / "model"),
            str(folder / "sft"),
            stages=[{"name": "histories", **task}],
            templates="compact",
            max_chars={"description": 0},
            prompt_max_length=source.max_length,
            seed=seed,
        )
    )
    parameters = read_json(folder / "model" / "run.json")["metrics"]["parameters"]
    return {"parameters": parameters, "steps": source.steps, "train_s": round(time.time() - started, 1)}


def score(source: Source, data: Path, sids: Path, folder: Path, split: str, baselines: list[str]) -> dict[str, Any]:
    """Evaluates by constrained beams over the whole catalogue, on items; NDCG@10 of model and baselines."""
    started = time.time()
    arguments = evaluate.Arguments(
        str(data),
        str(sids),
        str(folder / "sft"),
        str(folder / split),
        split=split,
        ks=[10],
        baselines=baselines,
        upper_bound=False,
        max_requests=source.requests,
        metrics=["ndcg", "hr"],
    )
    evaluate.main(arguments)
    record = read_json(folder / split / "metrics.json")
    values = {row["name"]: {m: one["value"] for m, one in row["metrics"].items()} for row in record["systems"]}
    found = {"requests": record["requests"], **values.pop(OURS), "eval_s": round(time.time() - started, 1)}
    return found | ({"baselines": values} if values else {})


def paired(folders: list[Path], others: list[Path]) -> PairedResult | None:
    """Mean difference of NDCG@10 over seeds, request by request, users resampled; None when an evaluation is gone.

    Args:
        folders: evaluation of each seed. others: those of the reference, the same seeds in the same order.
    """
    if not folders or not all((folder / "per_request.parquet").exists() for folder in [*folders, *others]):
        return None
    tables = [[pq.read_table(folder / "per_request.parquet") for folder in side] for side in (folders, others)]
    requests = tables[0][0]["request_id"]
    if any(table["request_id"] != requests for side in tables for table in side):
        raise ConfigError("Two evaluations hold different requests; remove the working folder and start again.")
    column = f"{OURS}/{METRIC}"
    ours, theirs = (np.mean([table[column].to_numpy() for table in side], axis=0) for side in tables)
    return paired_bootstrap(ours, theirs, clusters=tables[0][0]["user_id"].to_pylist())
