"""The table of `next_item`: test figures read once per model, mean and spread over seeds, what each row cost, paired tests.

Test figures lie in `seed_S/test/SYSTEM/`: `ranked.safetensors` (item rows per user), `metrics.json`, and `run.json` with the
fingerprint of the model. A folder with that fingerprint is reused, so a reported row reads the test targets once. Models are chosen
and tested under one rule for items that the user has (`exclude_seen`); two more columns show the same models under the other rule.
"""

from __future__ import annotations

import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from sidtune.core.config import as_dict
from sidtune.core.folders import (
    RUN_FILE,
    fingerprint,
    read_record,
    read_run,
    versions,
    write_folder,
    write_json,
    write_run,
)
from sidtune.data_builders.sequences.item_sequences import ItemSequences, SequenceExamples
from sidtune.data_builders.tables.schema import Tables
from sidtune.decoding.next_item.ensembles import Member, NetworkMember, fit_baseline, rank_together, weights_of
from sidtune.metrics.report.readme_table import publish
from sidtune.metrics.statistics.bootstrap import paired_bootstrap
from sidtune.metrics.statistics.sequence_slices import markdown_slices, mean_slices, slices
from sidtune.recipes.next_item.config import Arguments
from sidtune.recipes.over_seeds import adjusted, difference, means, over, spread, table
from sidtune.trainers.next_item.trainer import FitSettings, draw_users, measure_targets

PLACES = 20
SHOWN = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
OTHER = ("recall@10", "ndcg@10")  # shown under the other rule for items the user has
PRIMARY = "ndcg@10"
COSTS = {"parameters": int, "training_flops": float, "training_seconds": float, "threads": int, "processes": int}


def report(who: Rankings) -> dict[str, Any]:
    """Measures what is trained, writes `results.json`, prints and publishes the table."""
    arguments, sequences = who.arguments, who.sequences
    rows: dict[str, dict[str, Any]] = {}
    per_user: dict[str, dict[int, np.ndarray]] = {}
    ranks: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    names = [*arguments.baselines, *arguments.systems, *arguments.ensembles]
    for name in names:
        seeds = [seed for seed in arguments.seeds if who.ready(name, seed)]
        if not seeds:
            continue
        ranks[name] = {seed: who.ranked(name, seed) for seed in seeds}
        found = {
            key: {seed: measure_targets(sides[key], sequences, who.examples) for seed, sides in ranks[name].items()}
            for key in ("rows", "other_rule")
        }
        rows[name] = {
            "kind": who.kind(name),
            "metrics": {seed: result.means() for seed, result in found["rows"].items()},
            "other_rule": {seed: result.means() for seed, result in found["other_rule"].items()},
            "cost": who.cost(name, seeds),
        }
        per_user[name] = {seed: result.per_request[PRIMARY] for seed, result in found["rows"].items()}
    record = {
        "split": "test" if arguments.test else "valid",
        "users": len(who.examples),
        "catalogue": len(sequences.item_ids),
        **{name: getattr(arguments, name) for name in ("seeds", "num_beams", "exclude_seen")},
        "systems": {name: summary(row) for name, row in rows.items()},
        "untrained": [name for name in names if name not in rows],
        "paired": paired(arguments, rows, per_user),
        "where": where(who, ranks, per_user),
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "versions": versions(),
    }
    write_json(Path(arguments.output_dir) / "results.json", record)
    settings = {"config": {**as_dict(arguments), "output_dir": None}, "tried": len(arguments.systems)}
    publish(record, markdown(record), arguments.results, arguments.readme, **settings)
    return record


class Rankings:
    """The rankings, validation figures and costs of all rows. Made before any training, because it fits the baselines.

    Attributes:
        examples: the users of the table with their whole histories: all test users, or all validation users where `test` is off.
    """

    def __init__(self, arguments: Arguments, tables: Tables, sequences: ItemSequences) -> None:
        self.arguments, self.sequences = arguments, sequences
        self.examples = sequences.held_out("test" if arguments.test else "valid")
        self._baselines = {name: fit_baseline(name, tables, sequences) for name in arguments.baselines}
        self._ranked: dict[tuple[str, int], dict[str, np.ndarray]] = {}

    def weights(self, name: str) -> dict[str, float]:
        """Who ranks in a row, and with what weight."""
        return weights_of(name, self.arguments.ensembles)

    def networks(self, name: str) -> list[str]:
        """The systems among the members of a row."""
        return [member for member in self.weights(name) if member in self.arguments.systems]

    def kind(self, name: str) -> str:
        """`baseline`, `model` or `ensemble`."""
        kinds = {"baseline": self.arguments.baselines, "model": self.arguments.systems}
        return next((kind for kind, names in kinds.items() if name in names), "ensemble")

    def ready(self, name: str, seed: int) -> bool:
        """Whether all networks of a row are trained."""
        return all((self.arguments.folder(seed, member) / RUN_FILE).exists() for member in self.networks(name))

    def ranked(self, name: str, seed: int) -> dict[str, np.ndarray]:
        """(n, PLACES) item rows of a row: `rows` under `exclude_seen` of the arguments, `other_rule` under its opposite.

        Read from disk where they are of these models, else ranked and written. A baseline has no seed and is not stored.
        """
        seed_of = 0 if self.kind(name) == "baseline" else seed
        if (name, seed_of) not in self._ranked:
            rank = self._rank if self.kind(name) == "baseline" else self._stored
            self._ranked[name, seed_of] = rank(name, seed)
        return self._ranked[name, seed_of]

    def valid_figure(self, name: str, seed: int) -> float:
        """Validation NDCG@10: by which a network was chosen, or of an ensemble or baseline on the users of its first network."""
        if self.kind(name) == "baseline":
            return self._valid_figure(name, seed)
        folder = self.arguments.folder(seed, name) if self.kind(name) == "model" else self._folder(name, seed)
        return read_run(folder, {f"valid_{PRIMARY}": float})["metrics"][f"valid_{PRIMARY}"]

    def cost(self, name: str, seeds: list[int]) -> dict[str, Any]:
        """Sums over the members, means over the seeds; and the validation figures by which rows are compared."""
        values = [self.valid_figure(name, seed) for seed in seeds]
        total: dict[str, Any] = {f"valid_{PRIMARY}": {"mean": statistics.fmean(values), "values": values}}
        members = self.networks(name)
        numbers = sum(self._baselines[m].baseline.numbers for m in self.weights(name) if m not in members)
        if not members:
            return total | ({"parameters": numbers} if numbers else {})
        records = [[read_run(self.arguments.folder(s, m), COSTS)["metrics"] for m in members] for s in seeds]
        for key in ("parameters", "training_flops", "training_seconds"):
            total[key] = statistics.fmean(sum(record[key] for record in of_seed) for of_seed in records)
        total["parameters"] += numbers
        return total | {"threads": records[0][0]["threads"], "processes": records[0][0]["processes"]}

    def _stored(self, name: str, seed: int) -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file, save_file

        folder, weights = self._folder(name, seed), self.weights(name)
        models = {member: fingerprint(self.arguments.folder(seed, member)) for member in self.networks(name)}
        config = {"models": models, "num_beams": self.arguments.num_beams, "exclude_seen": self.arguments.exclude_seen}
        if self.kind(name) == "ensemble":  # of other weights, or of another number of candidates, it is another row
            config |= {"weights": weights, "candidates": PLACES}
        if read_record(folder / RUN_FILE).get("config") == config:
            return load_file(folder / "ranked.safetensors")
        ranked = self._rank(name, seed)
        with write_folder(folder, "next_item_test") as scratch:
            save_file(ranked, scratch / "ranked.safetensors")
            means = measure_targets(ranked["rows"], self.sequences, self.examples).means()
            write_json(scratch / "metrics.json", means)
            if self.kind(name) == "ensemble":
                means = {**means, f"valid_{PRIMARY}": self._valid_figure(name, seed)}
            write_run(scratch, step="next_item_test", config=config, metrics=means)
        return ranked

    def _rank(self, name: str, seed: int) -> dict[str, np.ndarray]:
        """Ranks the users of the table; an ensemble scores what its members ranked under both rules."""
        weights = self.weights(name)
        if len(weights) == 1:
            found = self._member(next(iter(weights)), seed).rank_both(self.examples, PLACES)
        else:
            proposed = [rows for member in weights for rows in self.ranked(member, seed).values()]
            found = self._together(weights, seed, self.examples, proposed)
        rule = self.arguments.exclude_seen
        return {"rows": found[rule], "other_rule": found[not rule]}

    def _valid_figure(self, name: str, seed: int) -> float:
        weights = self.weights(name)
        first = self.arguments.system(next(iter(self.networks(name) or self.arguments.systems)))
        users = first.fit.get("valid_users", FitSettings.valid_users)
        examples = draw_users(self.sequences.held_out("valid"), users, seed)
        proposed = [self._member(member, seed).rank_both(examples, PLACES) for member in weights]
        ranked = proposed[0]
        if len(weights) > 1:
            ranked = self._together(weights, seed, examples, [rows for both in proposed for rows in both.values()])
        return measure_targets(ranked[self.arguments.exclude_seen], self.sequences, examples).means()[PRIMARY]

    def _together(
        self, weights: dict[str, float], seed: int, examples: SequenceExamples, proposed: list[np.ndarray]
    ) -> dict[bool, np.ndarray]:
        members = [self._member(member, seed) for member in weights]
        candidates = np.concatenate(proposed, axis=1)
        return rank_together(members, list(weights.values()), examples, candidates, self.sequences, PLACES)

    def _member(self, name: str, seed: int) -> Member:
        if name in self.arguments.systems:
            return load_member(self.arguments, name, seed, self.sequences)
        return self._baselines[name]

    def _folder(self, name: str, seed: int) -> Path:
        split = "test" if self.arguments.test else "valid"
        return Path(self.arguments.output_dir) / f"seed_{seed}" / split / name


def load_member(arguments: Arguments, name: str, seed: int, sequences: ItemSequences) -> NetworkMember:
    """A trained system with its search."""
    from sidtune.decoding.next_item.ranking import HistoryRanker, SequenceCatalogue
    from sidtune.models.next_item.network import load_network
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

    folder = arguments.folder(seed, name)
    catalogue = SequenceCatalogue.of(SemanticIds.from_pretrained(folder / "sids"), sequences)
    ranker = HistoryRanker(sequences, catalogue, arguments.num_beams)
    return NetworkMember(load_network(folder), ranker, arguments.system(name).max_history)


def where(
    who: Rankings, ranks: dict[str, dict[int, dict[str, np.ndarray]]], per_user: dict[str, dict[int, np.ndarray]]
) -> dict[str, Any]:
    """Figures of each row by slices of the users, with the SIDs of the first trained system; see `sequence_slices`."""
    from sidtune.decoding.next_item.ranking import SequenceCatalogue
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

    arguments, sequences = who.arguments, who.sequences
    trained = [arguments.folder(seed, name) for name in arguments.systems for seed in arguments.seeds]
    first = next((folder for folder in trained if (folder / RUN_FILE).exists()), None)
    if first is None:
        return {}
    codes = SequenceCatalogue.of(SemanticIds.from_pretrained(first / "sids"), sequences).codes

    def sliced(name: str) -> dict[str, Any]:
        rows = {seed: ranking["rows"] for seed, ranking in ranks[name].items()}
        return mean_slices(
            [slices(r, per_user[name][seed], sequences, who.examples, codes) for seed, r in rows.items()]
        )

    return {name: sliced(name) for name in ranks}


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Mean, sample standard deviation and values over the seeds of every metric of a row, under both rules."""
    found = {}
    for rule in ("metrics", "other_rule"):
        by_seed = list(row[rule].values())
        found[rule] = {metric: spread([one[metric] for one in by_seed]) for metric in by_seed[0]}
    return {"kind": row["kind"], "seeds": len(row["metrics"]), **found, **row["cost"]}


def paired(arguments: Arguments, rows: dict[str, Any], per_user: dict[str, dict[int, np.ndarray]]) -> dict[str, Any]:
    """The row with the best validation figure against every other one on NDCG@10; users resampled, p-values by Holm.

    A user's values are averaged over the seeds that both rows have. Where the trainings of these differ, their chance is in the
    interval too.
    """
    valid = {name: row["cost"]["valid_ndcg@10"]["mean"] for name, row in rows.items() if "valid_ndcg@10" in row["cost"]}
    if not valid:
        return {}
    best = max(valid, key=lambda name: valid[name])
    pairs = {}
    for name in rows:
        common = [seed for seed in per_user[name] if seed in per_user[best]]
        if name == best or not common:
            continue
        one, other = (np.mean([per_user[n][seed] for seed in common], axis=0) for n in (best, name))
        by_seed = [float((per_user[best][seed] - per_user[name][seed]).mean()) for seed in common]
        pairs[name] = paired_bootstrap(one, other, arguments.level, arguments.samples, seeds=by_seed)
    return {"best_by_validation": best, "against": adjusted(pairs)}


def markdown(record: dict[str, Any]) -> str:
    """The table of a README."""
    columns = ["system", *SHOWN, *(f"{metric}*" for metric in OTHER)]
    columns += ["valid ndcg@10", "parameters, M", "training FLOPs", "minutes"]
    rows = []
    for name, row in record["systems"].items():
        cells = [name, *means(row, SHOWN), *(f"{row['other_rule'][m]['mean']:.4f}" for m in OTHER)]
        valid = f"{row['valid_ndcg@10']['mean']:.4f}" if "valid_ndcg@10" in row else ""
        costs = (("parameters", 1e6, ".2f"), ("training_flops", 1.0, ".1e"), ("training_seconds", 60, ".1f"))
        cost = [format(row[key] / unit, form) if key in row else "" for key, unit, form in costs]
        rows.append([*cells, valid, *cost])
    seeds = ", ".join(map(str, record["seeds"]))
    rules = ["ranked like any other (the baselines leave them out where users hardly repeat)", "left out"]
    seen, other = rules[record["exclude_seen"]], rules[not record["exclude_seen"]]
    threads = sorted({row["threads"] * row["processes"] for row in record["systems"].values() if "threads" in row})
    lines = [
        *table(columns, rows),
        "",
        f"{record['split'].capitalize()} targets of {record['users']:,} users, leave-one-out, whole catalogue of "
        f"{record['catalogue']:,} items, {record['num_beams']} beams; items the user has are {seen}; in the columns with a star "
        f"they are {other}. Mean ± standard deviation over seeds {seeds}. Training on {record['machine']['processor']}, "
        f"{' or '.join(map(str, threads))} thread(s).",
    ]
    if record["untrained"]:
        lines += ["", f"Not trained, so not in the table: {', '.join(record['untrained'])}.", ""]
    for name, pair in record["paired"].get("against", {}).items():
        best = record["paired"]["best_by_validation"]
        lines.append(
            f"{best} minus {name} on {PRIMARY}: {difference(pair)}, p = {pair['adjusted_p_value']:.3f}{over(pair)}."
        )
    lines += markdown_slices(record["where"])
    return "\n".join(lines) + "\n"
