"""Makes a bundle that stands alone (model, tokenizer, SIDs, item map, trie, metrics, card) and pushes it to the hub if asked.

    sidtune publish --config recipes/quickstart/publish.yaml --data_dir runs/quickstart/data \\
        --sids_dir runs/quickstart/sids --model_dir runs/quickstart/sft --eval_dir runs/quickstart/eval \\
        --output_dir runs/quickstart/bundle --push_to_hub true --hub_model_id me/my-search-model

Without `push_to_hub: true` nothing leaves the machine.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sidtune.core.config import command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import fingerprint, read_run, versions, write_folder, write_run, writes
from sidtune.core.hub import push_folder
from sidtune.recipes.records import evaluation, sid_quality

LAUNCH = "alone"
SHOW_AT_END = True


@dataclass
class Arguments:
    """Options of publish.

    Attributes:
        data_dir, sids_dir, model_dir, eval_dir: folders of the earlier steps.
        output_dir: bundle folder to write.
        push_to_hub: upload the bundle; false by default.
        hub_model_id: repository, `owner/name`; needed for the upload.
        hub_private: make a new repository private.
        model_name: name on the card; default the last part of hub_model_id, or the folder's name.
        dataset_name: how the card calls the data; default the reader's name.
        license: licence of the model on the card.
        command: how to run the whole again, shown on the card.
    """

    data_dir: str
    sids_dir: str
    model_dir: str
    eval_dir: str
    output_dir: str
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = True
    model_name: str | None = None
    dataset_name: str | None = None
    license: str = "apache-2.0"
    command: str = ""

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.hub_model_id:
            raise ConfigError("push_to_hub is true but hub_model_id is missing; set it to owner/name.")


@writes("publish")
def main(arguments: Arguments) -> None:
    """Writes the bundle and, if asked, uploads it."""
    from sidtune.data_builders.tables.store import load_folder
    from sidtune.decoding.retrieval.model_folder import ModelFolder, check_made_from
    from sidtune.decoding.retrieval.retriever import catalogue_table
    from sidtune.decoding.trie import SidTrie
    from sidtune.metrics.report.model_card import write_card
    from sidtune.tokenizers.vocabulary.saving import save_trained

    data = load_folder(arguments.data_dir)
    source = ModelFolder.open(arguments.model_dir, arguments.sids_dir, data)
    joined = {name: getattr(arguments, name) for name in ("data_dir", "sids_dir", "model_dir")}
    check_made_from(arguments.eval_dir, **joined)
    card = card_data(arguments)
    with write_folder(arguments.output_dir) as scratch:
        save_trained(source.load_model(), source.vocabulary, source.tokenizer, scratch)
        source.complete(scratch)
        SidTrie.from_semantic_ids(source.sids).save_pretrained(scratch / "trie")
        pq.write_table(catalogue_table(data.items), scratch / "catalogue.parquet")
        shutil.copy(Path(arguments.eval_dir) / "metrics.json", scratch / "metrics.json")
        write_card(scratch / "README.md", card)
        write_run(scratch)
    print(f"{arguments.output_dir}: bundle ready; next: sidtune serve --model_dir {arguments.output_dir}")
    if arguments.push_to_hub:
        url = push_folder(arguments.output_dir, arguments.hub_model_id, private=arguments.hub_private)
        print(f"Pushed to {url}")


def card_data(arguments: Arguments) -> Any:
    """Collects `CardData` from the step folders."""
    from sidtune.decoding.retrieval.loading import final_model, training_runs
    from sidtune.metrics.report.html import markdown_table
    from sidtune.metrics.report.model_card import CardData
    from sidtune.metrics.statistics.compare import SystemRow
    from sidtune.tokenizers.base_models.loading import hub_id

    (metrics, samples), quality = evaluation(arguments.eval_dir), sid_quality(arguments.sids_dir)
    trainings = training_runs(arguments.model_dir)
    reader = read_run(arguments.data_dir)["config"].get("reader", "unknown")
    systems = [SystemRow.from_dict(row) for row in metrics["systems"]]
    own = next(system for system in systems if system.kind == "model")
    name = arguments.model_name or (arguments.hub_model_id or Path(arguments.output_dir).resolve().name).split("/")[-1]
    start = next((run for run in trainings if "base" in run["config"]), {"config": {"base": None}, "inputs": {}})
    base = None if "base" in start["inputs"] else hub_id(start["config"]["base"])
    queries = [sample["query"] for sample in samples if sample["query"]]
    return CardData(
        name=name,
        repo_id=arguments.hub_model_id or name,
        table=markdown_table(systems),
        index_rows=[{"metric": metric, "value": round(e.value, 6)} for metric, e in own.metrics.items()],
        **{key: metrics[key] for key in ("catalogue", "requests", "split", "level")},
        resampled=metrics.get("resampled", "users"),
        command=arguments.command or f"sidtune publish --model_dir {final_model(arguments.model_dir).name}",
        data_revision=fingerprint(arguments.data_dir),
        dataset_name=arguments.dataset_name or reader,
        dataset_type=reader,
        stages=[name for run in trainings for name in _stages(run)] or ["none"],
        level_sizes=[level["size"] for level in quality["levels"]],
        icr=quality["icr"],
        collision_rate=quality["sharing_rate"],
        versions=versions(),
        seed=trainings[-1]["config"].get("seed", 0) if trainings else 0,
        license=arguments.license,
        base_model=base,
        sample_query=queries[0] if queries else "",
    )


def _stages(training: dict[str, Any]) -> list[str]:
    """Names of what one step trained: the stages of sft, or the step itself; making a model trains nothing."""
    stages = [stage["name"] for stage in training["metrics"].get("stages", [])]
    return stages or ([] if training["step"] == "init_model" else [training["step"]])


if __name__ == "__main__":
    command(main, Arguments)
