"""Next-item models trained from scratch on any folder in the LETTER format, several systems and seeds, one table.

    python -m sidtune.recipes.next_item.train --config recipes/next_item/instruments/next_item.yaml \\
        --source.path $SIDTUNE_DATA/instruments --output_dir runs/instruments

For every seed and system: SIDs (the publisher's, or learned from the item vectors of the folder), a network, training on the
leave-one-out training part, choice of the best checkpoint by validation NDCG@10. Then the test targets are read, once per
system and seed: a test folder that belongs to the same model is kept, never made again. Finished models are skipped and
interrupted ones go on, so the same command finishes a run. The table stands beside item-kNN and popularity, which see the same
training parts. `accelerate launch` spreads each training over processes.

The output holds `seed_S/SYSTEM/` (network, `sids/`, `curve.json`, `run.json`), `seed_S/test/SYSTEM/` and `results.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sidtune.core.config import as_dict, build, command
from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.folders import RUN_FILE, read_json, write_folder, write_json, write_run
from sidtune.data_builders.registry import READERS
from sidtune.data_builders.sequences.item_sequences import ItemSequences, SequenceExamples
from sidtune.data_builders.tables.schema import Tables
from sidtune.metrics.registry import BASELINES
from sidtune.recipes.next_item.members import check_ensembles
from sidtune.recipes.run import merged
from sidtune.recipes.steps.seeds import check_readme

PUBLISHED = "published"
CURVE_FILE = "curve.json"


@dataclass
class Source:
    """Where the sequences come from.

    Attributes:
        path: folder of the reader; `$NAME` and `~` are expanded.
        reader: name of a reader in `data_builders/registry.py` that reads next-item data.
        options: its options.
    """

    path: str
    reader: str = "letter"
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = os.path.expanduser(os.path.expandvars(self.path))
        if "$" in self.path:
            raise ConfigError(f"source.path {self.path} names an environment variable that is not set; set it.")
        READERS.get(self.reader)


@dataclass
class System:
    """One system of the table.

    Attributes:
        sids: `{name: published}` (the only `*.index.json` of the folder), or the name of a quantizer in `tokenizers/registry.py`
            with its options, fitted on the only `*.npy` of the folder (row n = item n); `collisions` treats shared codes.
        network: fields of `models.next_item.NextItemConfig` but level_sizes and num_items.
        examples: `whole` (a user's training items are all targets of one example) or `windows` (one copy per target).
        max_history: most items before a target, in training, validation and test.
        packed: items of a packed training row; null for one example per row.
        noise: fields of `trainers.next_item_data.NoiseConfig`.
        fit: fields of `trainers.next_item.FitSettings`; `loss` is one of them.
    """

    sids: dict = field(default_factory=lambda: {"name": PUBLISHED})
    network: dict = field(default_factory=dict)
    examples: Literal["whole", "windows"] = "whole"
    max_history: int = 50
    packed: int | None = None
    noise: dict = field(default_factory=dict)
    fit: dict = field(default_factory=dict)

    def check(self, where: str) -> None:
        """Raises ConfigError for a wrong option anywhere in this system, before any work."""
        from sidtune.tokenizers.quantizers.base import make_quantizer
        from sidtune.tokenizers.registry import QUANTIZERS

        name = self.sids.get("name")
        if name != PUBLISHED:
            if name not in QUANTIZERS:
                raise ConfigError(f"{where}.sids: {nearest(str(name), [PUBLISHED, *QUANTIZERS])}")
            make_quantizer(name, _without(self.sids, "name", "collisions"))
        self.parts(where, [2], 1)
        if self.max_history < 1 or (self.packed is not None and self.packed < 2):
            raise ConfigError(f"{where}: max_history must be 1 or more, packed 2 or more or null.")
        if self.packed and self.network.get("user_tokens"):
            raise ConfigError(
                f"{where}: a packed row holds several users, so it has no user token; choose one of both."
            )
        full = self.network.get("network") == "t5" and not self.network.get("causal_encoder", True)
        if full and (self.examples == "whole" or self.packed):
            raise ConfigError(
                f"{where}: an encoder with full attention (causal_encoder: false) takes windows, not packed."
            )

    def parts(self, where: str, level_sizes: list[int], items: int) -> tuple[Any, Any, Any]:
        """The filled configs of network, noise and training."""
        from sidtune.models.next_item.network import NextItemConfig
        from sidtune.trainers.next_item.data import NoiseConfig
        from sidtune.trainers.next_item.loss import LossConfig
        from sidtune.trainers.next_item.trainer import FitSettings

        shape = {**self.network, "level_sizes": level_sizes, "num_items": items}
        loss = build(LossConfig, self.fit.get("loss", {}), f"{where}.fit.loss")
        return (
            build(NextItemConfig, shape, f"{where}.network"),
            build(NoiseConfig, self.noise, f"{where}.noise"),
            build(FitSettings, {**self.fit, "loss": loss}, f"{where}.fit"),
        )


@dataclass
class Arguments:
    """Options of next_item.

    Attributes:
        source: where the data is, see `Source`; `--source.path FOLDER` is all that another data set needs.
        output_dir: folder to write.
        systems: name → options of a `System`, over `defaults`.
        defaults: options of every system.
        ensembles: name → list of systems, baselines of the table, or ensembles above it; they propose candidates together, each
            scores all of them, probabilities are averaged. A baseline's probability of an item is its share of all its scores.
        only: names of systems to train now; null for all. The table shows what is there.
        seeds: each system is trained with each.
        test: read the test targets. Without it, only validation figures are shown; choose all settings so.
        num_beams: beams of every search. exclude_seen: never rank an item the user already has.
        baselines: names of baselines in `metrics/registry.py`.
        level, samples: of the bootstrap.
        results: JSON file that receives all figures, beside `results.json` of the output folder.
        readme: README files whose table is replaced.
    """

    source: dict
    output_dir: str
    systems: dict
    defaults: dict = field(default_factory=dict)
    ensembles: dict = field(default_factory=dict)
    only: list[str] | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    test: bool = True
    num_beams: int = 30
    exclude_seen: bool = False
    baselines: list[str] = field(default_factory=lambda: ["popularity", "item_knn"])
    level: float = 0.95
    samples: int = 1000
    results: str | None = None
    readme: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        build(Source, self.source, "source")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds must be different integers, at least one, got {self.seeds}.")
        names = [*self.systems, *self.ensembles, *self.baselines]
        if len(set(names)) < len(names) or any("/" in name or name in ("test", "") for name in names):
            raise ConfigError("Systems, ensembles and baselines need different names without '/', and none is 'test'.")
        for name in self.systems:
            self.system(name).check(f"systems.{name}")
        check_ensembles(self.ensembles, [*self.systems, *self.baselines])
        for name in self.only or []:
            if name not in self.systems:
                raise ConfigError(f"only: there is no system '{name}': {nearest(name, self.systems)}")
        for name in self.baselines:
            BASELINES.get(name)
        if self.num_beams < 10:
            raise ConfigError(f"num_beams must be 10 or more to fill ten places, got {self.num_beams}.")

    def system(self, name: str) -> System:
        """A system with the defaults below its own options."""
        return build(System, merged(self.defaults, self.systems[name] or {}, f"systems.{name}"), f"systems.{name}")

    def folder(self, seed: int, name: str) -> Path:
        """Folder of a trained system."""
        return Path(self.output_dir) / f"seed_{seed}" / name


def _without(values: dict, *keys: str) -> dict:
    return {key: value for key, value in values.items() if key not in keys}


def read_source(source: dict) -> tuple[Tables, ItemSequences]:
    """The tables and sequences of the source."""
    wanted = build(Source, source, "source")
    tables: Tables = READERS.get(wanted.reader)(wanted.path, **wanted.options)
    return tables, ItemSequences.from_tables(tables)


def _needs(spec: dict) -> tuple[str, str]:
    """The pattern of the file that SIDs come from, and what it is for."""
    return ("*.index.json", "published SIDs") if spec["name"] == PUBLISHED else ("*.npy", "SIDs of our own")


def _only_file(spec: dict, source: dict) -> Path:
    folder, (pattern, what) = Path(build(Source, source, "source").path), _needs(spec)
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{folder} holds {len(found)} files {pattern} and needs exactly one for {what}.")
    return found[0]


def _item_vectors(spec: dict, source: dict, sequences: ItemSequences) -> np.ndarray:
    """(N, d) vectors of the source, row n = item n."""
    from sidtune.tokenizers.encoders.precomputed import PrecomputedConfig, PrecomputedEncoder

    encoder = PrecomputedEncoder(PrecomputedConfig(path=str(_only_file(spec, source)), align="row_number"))
    return encoder.encode([""] * len(sequences.item_ids), sequences.item_ids)


def make_sids(spec: dict, source: dict, sequences: ItemSequences) -> Any:
    """The publisher's SIDs of the source folder, or SIDs learned from its item vectors.

    Raises:
        DataError: the folder lacks the one file that is needed, or items lack a SID or a vector.
    """
    from sidtune.tokenizers.quantizers.base import make_quantizer
    from sidtune.tokenizers.sids.collisions import make_collisions
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

    if spec["name"] == PUBLISHED:
        return SemanticIds.from_index_json(_only_file(spec, source))
    vectors = _item_vectors(spec, source, sequences)
    quantizer = make_quantizer(spec["name"], _without(spec, "name", "collisions"))
    codes = quantizer.fit_encode(vectors)
    counts = sequences.training_counts().astype(np.float64)
    coded = SemanticIds(sequences.item_ids, codes, tuple(quantizer.level_sizes), counts)
    treatment = {"name": "expand", **spec.get("collisions", {})}
    return make_collisions(treatment["name"], _without(treatment, "name")).resolve(coded, vectors, quantizer)


def trainable(arguments: Arguments, sequences: ItemSequences) -> list[str]:
    """The systems to train now, in order; checks what their SIDs come from before any of them is trained.

    A system for which the folder has no file at all is left out with a sentence, unless `only` names it.

    Raises:
        DataError: a file that is malformed, ambiguous or does not cover the catalogue; no system is left.
    """
    from sidtune.decoding.next_item.ranking import SidCatalogue

    kept, folder = [], Path(build(Source, arguments.source, "source").path)
    for name in arguments.only if arguments.only is not None else arguments.systems:
        spec = arguments.system(name).sids
        pattern, what = _needs(spec)
        if arguments.only is None and not any(folder.glob(pattern)):
            print(f"{name} is left out: {folder} has no file {pattern}, which it needs for {what}.", flush=True)
            continue
        if spec["name"] == PUBLISHED:
            SidCatalogue.of(make_sids(spec, arguments.source, sequences), sequences)
        else:
            _item_vectors(spec, arguments.source, sequences)
        kept.append(name)
    if not kept and arguments.only is None:
        raise DataError(
            f"No system can be trained on {folder}; give systems, and published SIDs or item vectors beside them."
        )
    return kept


def examples_of(system: System, sequences: ItemSequences) -> SequenceExamples:
    """The training examples of a system."""
    if system.examples == "whole":
        return sequences.whole_examples(system.max_history)
    return sequences.window_examples(system.max_history)


def fit(arguments: Arguments, name: str, seed: int, sequences: ItemSequences) -> None:
    """Trains one system with one seed and writes its folder, unless it is there already."""
    import torch

    from sidtune.core.processes import on_main
    from sidtune.decoding.next_item.ranking import HistoryRanker, SidCatalogue
    from sidtune.models.next_item.network import make_network
    from sidtune.trainers.next_item.data import NextItemRows
    from sidtune.trainers.next_item.trainer import train_next_item

    system, folder, started = arguments.system(name), arguments.folder(seed, name), time.time()
    config = record_of(arguments, name, seed)
    if (folder / RUN_FILE).exists() and read_json(folder / RUN_FILE)["config"] == config:
        print(f"{folder}: unchanged, skipped", flush=True)
        return
    catalogue = SidCatalogue.of(make_sids(system.sids, arguments.source, sequences), sequences)
    sizes = catalogue.sids.level_sizes
    shape, noise, settings = system.parts(f"systems.{name}", list(sizes), len(sequences.item_ids))
    rows = NextItemRows(sequences, examples_of(system, sequences), catalogue.codes, sizes, noise, system.packed)
    torch.manual_seed(seed)
    network = make_network(shape)
    ranker = HistoryRanker(sequences, catalogue, arguments.num_beams, exclude_seen=arguments.exclude_seen)
    work = _work_folder(folder, config, on_main)
    trained = train_next_item(network, rows, ranker, settings, work, max_history=system.max_history, seed=seed)
    history = [log for log in trained.state.log_history if "eval_ndcg@10" in log]
    metrics = {**_metrics(trained, history), "parameters": network.parameters_count(), "targets": rows.examples.targets}

    def write() -> None:
        with write_folder(folder) as scratch:
            network.save_pretrained(scratch)
            catalogue.sids.save_pretrained(scratch / "sids")
            write_json(scratch / CURVE_FILE, history)
            write_run(scratch, step="next_item", config=config, metrics=metrics, started=started)
        shutil.rmtree(work)

    on_main(write)
    print(f"{folder}: validation NDCG@10 {metrics['valid_ndcg@10']:.4f} in {time.time() - started:.0f} s", flush=True)


def record_of(arguments: Arguments, name: str, seed: int) -> dict[str, Any]:
    """What a trained system depends on, JSON-ready: the same record means the same model."""
    config = {
        "system": as_dict(arguments.system(name)),
        "seed": seed,
        "num_beams": arguments.num_beams,
        "exclude_seen": arguments.exclude_seen,
        "source": as_dict(build(Source, arguments.source, "source")),
    }
    return json.loads(json.dumps(config))


def _metrics(trained: Any, history: list[dict[str, float]]) -> dict[str, Any]:
    """What the training of a system reached and cost."""
    import torch

    return {
        "valid_ndcg@10": trained.state.best_metric,
        "valid_recall@10": max(history, key=lambda log: log["eval_ndcg@10"])["eval_recall@10"],
        "best_step": trained.state.best_global_step,
        "training_flops": history[-1]["eval_flops"],
        "training_seconds": history[-1]["eval_train_seconds"],
        "processes": trained.args.world_size,
        "threads": torch.get_num_threads(),
    }


def _work_folder(folder: Path, config: dict, on_main: Any) -> Path:
    """The folder of the checkpoints; those of another config are removed."""
    work = folder.parent / f".{folder.name}.work"

    def prepare() -> None:
        record = work / "config.json"
        if record.exists() and read_json(record) != config:
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        write_json(record, config)

    on_main(prepare)
    return work


def main(arguments: Arguments) -> None:
    """Trains, measures, and prints the table."""
    from sidtune.core.processes import on_main
    from sidtune.recipes.next_item.table import Rankings, report

    for readme in arguments.readme:
        check_readme(Path(readme))
    tables, sequences = read_source(arguments.source)
    names, who = trainable(arguments, sequences), Rankings(arguments, tables, sequences)
    for seed in arguments.seeds:
        for name in names:
            fit(arguments, name, seed, sequences)
    on_main(lambda: report(who))


if __name__ == "__main__":
    command(main, Arguments)
