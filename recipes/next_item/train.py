"""Next-item models trained from scratch on any folder in the LETTER format, several systems and seeds, one table.

    sidtune next-item.train --config recipes/next_item/instruments/next_item.yaml \\
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
import time
from pathlib import Path
from typing import Any

from sidtune.core.config import as_dict, command
from sidtune.core.errors import DataError
from sidtune.core.folders import RUN_FILE, check_output, read_record, write_json, write_run, writes
from sidtune.core.processes import launch, on_main
from sidtune.core.resume import Work, identity_of
from sidtune.data_builders.sequences.item_sequences import ItemSequences
from sidtune.metrics.report.readme_table import check_readme
from sidtune.recipes.next_item.config import Arguments
from sidtune.tokenizers.sids.sequence_sids import PUBLISHED, item_vectors, make_sids, needed_file

CURVE_FILE = "curve.json"


def trainable(arguments: Arguments, sequences: ItemSequences) -> list[str]:
    """The systems to train now, in order; checks what their SIDs come from before any of them is trained.

    A system for which the folder has no file at all is left out with a sentence, unless `only` names it.

    Raises:
        DataError: a file that is malformed, ambiguous or does not cover the catalogue; no system is left.
    """
    from sidtune.decoding.next_item.ranking import SequenceCatalogue

    kept, source = [], arguments.data()
    folder = Path(source.path)
    for name in arguments.only if arguments.only is not None else arguments.systems:
        spec = arguments.system(name).sids
        pattern, what = needed_file(spec)
        if arguments.only is None and not any(folder.glob(pattern)):
            print(f"{name} is left out: {folder} has no file {pattern}, which it needs for {what}.", flush=True)
            continue
        if spec["name"] == PUBLISHED:
            SequenceCatalogue.of(make_sids(spec, source, sequences), sequences)
        else:
            item_vectors(spec, source, sequences)
        kept.append(name)
    if not kept and arguments.only is None:
        raise DataError(
            f"No system can be trained on {folder}; give systems, and published SIDs or item vectors beside them."
        )
    return kept


def fit(arguments: Arguments, name: str, seed: int, sequences: ItemSequences) -> None:
    """Trains one system with one seed and writes its folder, unless it is there already."""
    import torch

    from sidtune.decoding.next_item.ranking import HistoryRanker, SequenceCatalogue
    from sidtune.models.next_item.network import make_network
    from sidtune.trainers.next_item.data import NextItemRows
    from sidtune.trainers.next_item.trainer import train_next_item

    system, folder, started = arguments.system(name), arguments.folder(seed, name), time.time()
    config = record_of(arguments, name, seed)
    work = Work(folder, on_main(lambda: identity_of(config)), place=launch())
    if on_main(lambda: work.is_done() or _of_before(folder, config)):
        print(f"{folder}: unchanged, skipped", flush=True)
        return
    on_main(lambda: check_output(folder, "next_item"))
    catalogue = SequenceCatalogue.of(make_sids(system.sids, arguments.data(), sequences), sequences)
    sizes = catalogue.sids.level_sizes
    shape, noise, settings = system.parts(f"systems.{name}", list(sizes), len(sequences.item_ids))
    make = sequences.whole_examples if system.examples == "whole" else sequences.window_examples
    rows = NextItemRows(sequences, make(system.max_history), catalogue.codes, sizes, noise, system.packed)
    torch.manual_seed(seed)
    network = make_network(shape)
    ranker = HistoryRanker(sequences, catalogue, arguments.num_beams, exclude_seen=arguments.exclude_seen)
    on_main(work.begin)
    options = {"max_history": system.max_history, "seed": seed}
    trained = train_next_item(network, rows, ranker, settings, work.checkpoints, **options)
    history = [log for log in trained.state.log_history if "eval_ndcg@10" in log]
    metrics = {**_metrics(trained, history), "parameters": network.parameters_count(), "targets": rows.examples.targets}

    def write() -> None:
        with work.finish("next_item") as scratch:
            network.save_pretrained(scratch)
            catalogue.sids.save_pretrained(scratch / "sids")
            write_json(scratch / CURVE_FILE, history)
            write_run(scratch, step="next_item", config=config, metrics=metrics, started=started)

    on_main(write)
    print(f"{folder}: validation NDCG@10 {metrics['valid_ndcg@10']:.4f} in {time.time() - started:.0f} s", flush=True)


def record_of(arguments: Arguments, name: str, seed: int) -> dict[str, Any]:
    """What a trained system depends on, JSON-ready: the same record means the same model."""
    config = {
        "system": as_dict(arguments.system(name)),
        "seed": seed,
        "num_beams": arguments.num_beams,
        "exclude_seen": arguments.exclude_seen,
        "source": as_dict(arguments.data()),
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


def _of_before(folder: Path, config: dict[str, Any]) -> bool:
    """Whether an earlier version, which recorded no identity, trained this system already."""
    record = read_record(folder / RUN_FILE)
    return "identity" not in record and record.get("config") == config


@writes(None, tree=True)
def main(arguments: Arguments) -> None:
    """Trains, measures, and prints the table."""
    from sidtune.recipes.next_item.table import Rankings, report

    for readme in arguments.readme:
        check_readme(readme)
    tables, sequences = arguments.data().read()
    names, who = trainable(arguments, sequences), Rankings(arguments, tables, sequences)
    for seed in arguments.seeds:
        for name in names:
            fit(arguments, name, seed, sequences)
    on_main(lambda: report(who))


if __name__ == "__main__":
    command(main, Arguments)
