"""The table of `next_item`: test figures read once per model, mean and spread over seeds, what each row cost, paired tests.

Test figures lie in `seed_S/test/SYSTEM/`: `ranked.safetensors` (item rows per user), `metrics.json`, and `run.json` with the
fingerprint of the model. A folder with that fingerprint is reused, so a reported row reads the test targets once. Models are chosen
and tested under one rule for items that the user has (`exclude_seen`); two more columns show the same models under the other rule.
"""

from __future__ import annotations

import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sidtune.core.config import as_dict
from sidtune.core.folders import RUN_FILE, fingerprint, read_json, versions, write_folder, write_json, write_run
from sidtune.data_builders.item_sequences import ItemSequences, SequenceExamples
from sidtune.data_builders.schema import Tables
from sidtune.metrics.baselines import BaselineRequests
from sidtune.metrics.bootstrap import holm, paired_bootstrap
from sidtune.metrics.ranking import Relevance
from sidtune.metrics.registry import BASELINES
from sidtune.recipes.next_item_slices import markdown_slices, mean_slices, slices
from sidtune.recipes.seeds import publish
from sidtune.trainers.next_item import FitSettings, draw_users, measure_targets

if TYPE_CHECKING:
    from sidtune.recipes.next_item import Arguments

PLACES = 20
SHOWN = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
OTHER = ("recall@10", "ndcg@10")  # shown under the other rule for items the user has
PRIMARY = "ndcg@10"
Member = tuple[Any, Any, SequenceExamples]  # a network, its ranker, the histories that it reads


def report(arguments: Arguments, tables: Tables, sequences: ItemSequences) -> dict[str, Any]:
    """Measures what is trained, writes `results.json`, prints and publishes the table."""
    rows: dict[str, dict[str, Any]] = {}
    per_user: dict[str, dict[int, np.ndarray]] = {}
    ranks: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    examples = held_out(arguments, sequences)
    for name in arguments.baselines:
        ranked = rank_baseline(name, examples, tables, sequences)
        ranks[name] = dict.fromkeys(arguments.seeds, {"rows": ranked, "other_rule": ranked})
        result = measure_targets(ranked, sequences, examples)
        means = dict.fromkeys(arguments.seeds, result.means())
        rows[name] = {"kind": "baseline", "metrics": means, "other_rule": means, "cost": {}}
        per_user[name] = dict.fromkeys(arguments.seeds, result.per_request[PRIMARY])
    for name in [*arguments.systems, *arguments.ensembles]:
        members = arguments.ensembles.get(name, [name])
        seeds = [s for s in arguments.seeds if all((arguments.folder(s, m) / RUN_FILE).exists() for m in members)]
        if not seeds:
            continue
        ranks[name] = {}
        for seed in seeds:
            proposals = [ranks[member][seed] for member in members] if len(members) > 1 else []
            ranks[name][seed] = measured(arguments, name, members, seed, sequences, examples, proposals)
        found = {
            key: {seed: measure_targets(sides[key], sequences, examples) for seed, sides in ranks[name].items()}
            for key in ("rows", "other_rule")
        }
        rows[name] = {
            "kind": "ensemble" if name in arguments.ensembles else "model",
            "metrics": {seed: result.means() for seed, result in found["rows"].items()},
            "other_rule": {seed: result.means() for seed, result in found["other_rule"].items()},
            "cost": cost_of(arguments, name, members, seeds),
        }
        per_user[name] = {seed: result.per_request[PRIMARY] for seed, result in found["rows"].items()}
    record = {
        "split": "test" if arguments.test else "valid",
        "users": len(examples),
        "catalogue": len(sequences.item_ids),
        "seeds": arguments.seeds,
        "num_beams": arguments.num_beams,
        "exclude_seen": arguments.exclude_seen,
        "systems": {name: summary(row) for name, row in rows.items()},
        "paired": paired(arguments, rows, per_user),
        "where": where(arguments, ranks, per_user, sequences, examples),
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "versions": versions(),
    }
    write_json(Path(arguments.output_dir) / "results.json", record)
    publish(record, markdown(record), arguments.results, arguments.readme)
    return record


def held_out(arguments: Arguments, sequences: ItemSequences) -> SequenceExamples:
    """The users of the table with their whole histories: all test users, or all validation users where `test` is off."""
    return sequences.held_out("test" if arguments.test else "valid")


def rank_baseline(name: str, examples: SequenceExamples, tables: Tables, sequences: ItemSequences) -> np.ndarray:
    """(n, PLACES) item rows of a baseline that saw the training parts and reads the histories of the examples."""
    events = tables.events
    order = np.lexsort((events["time"].to_numpy(), _user_codes(tables)))
    places = np.arange(len(sequences.rows))
    training = places < np.repeat(sequences.training_stops, sequences.lengths)
    baseline = BASELINES.get(name)().fit(tables.items, events.take(order[training]))
    lengths = examples.stops - 1 - examples.starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.repeat(examples.starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    history = Relevance(offsets, sequences.rows[flat])
    return baseline.rank(BaselineRequests([None] * len(examples), history), PLACES)


def _user_codes(tables: Tables) -> np.ndarray:
    from sidtune.data_builders.history import encode

    return encode(tables.events["user_id"])[0]


def measured(
    arguments: Arguments,
    name: str,
    members: list[str],
    seed: int,
    sequences: ItemSequences,
    examples: SequenceExamples,
    proposals: list[dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """The rankings of one row and seed as `rank_members` returns them; read from disk where they are of these models."""
    from safetensors.numpy import load_file, save_file

    folder = measured_folder(arguments, seed, name)
    models = {member: fingerprint(arguments.folder(seed, member)) for member in members}
    config = {"models": models, "num_beams": arguments.num_beams, "exclude_seen": arguments.exclude_seen}
    if len(members) > 1:
        config["candidates"] = PLACES  # of each member and rule; an ensemble of another number is another row
    if (folder / RUN_FILE).exists() and read_json(folder / RUN_FILE)["config"] == config:
        return load_file(folder / "ranked.safetensors")
    ranked = rank_members(arguments, members, seed, sequences, examples, proposals)
    with write_folder(folder) as scratch:
        save_file(ranked, scratch / "ranked.safetensors")
        means = measure_targets(ranked["rows"], sequences, examples).means()
        write_json(scratch / "metrics.json", means)
        if len(members) > 1:
            means = {**means, f"valid_{PRIMARY}": valid_figure(arguments, members, seed, sequences)}
        write_run(scratch, step="next_item_test", config=config, metrics=means)
    return ranked


def measured_folder(arguments: Arguments, seed: int, name: str) -> Path:
    """Where the ranking of a row and seed lies."""
    return Path(arguments.output_dir) / f"seed_{seed}" / ("test" if arguments.test else "valid") / name


def where(
    arguments: Arguments,
    ranks: dict[str, dict[int, dict[str, np.ndarray]]],
    per_user: dict[str, dict[int, np.ndarray]],
    sequences: ItemSequences,
    examples: SequenceExamples,
) -> dict[str, Any]:
    """Figures of each row by slices of the users, with the SIDs of the first trained system; see `next_item_slices`."""
    from sidtune.decoding.next_item_ranking import SidCatalogue
    from sidtune.tokenizers.semantic_ids import SemanticIds

    trained = [arguments.folder(seed, name) for name in arguments.systems for seed in arguments.seeds]
    first = next((folder for folder in trained if (folder / RUN_FILE).exists()), None)
    if first is None:
        return {}
    codes = SidCatalogue.of(SemanticIds.from_pretrained(first / "sids"), sequences).codes
    found = {}
    for name, rankings in ranks.items():
        values = per_user[name]
        parts = [slices(r["rows"], values[seed], sequences, examples, codes) for seed, r in rankings.items()]
        found[name] = mean_slices(parts)
    return found


def rank_members(
    arguments: Arguments,
    members: list[str],
    seed: int,
    sequences: ItemSequences,
    examples: SequenceExamples,
    proposals: list[dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """(n, PLACES) item rows of one model, or of several that average their probabilities over common candidates.

    Args:
        proposals: what this function returned for each of several members: their candidates.

    Returns:
        `rows` under `exclude_seen` of the arguments, `other_rule` under its opposite.
    """
    models = models_of(arguments, members, seed, sequences, examples)
    if len(models) > 1:
        proposed = np.concatenate([rows for member in proposals for rows in member.values()], axis=1)
        ranked = combined(models, proposed, sequences.training_counts())
    else:
        network, ranker, cut = models[0]
        ranked = ranker.rank_both(network, cut, PLACES)
    return {"rows": ranked[arguments.exclude_seen], "other_rule": ranked[not arguments.exclude_seen]}


def models_of(
    arguments: Arguments, members: list[str], seed: int, sequences: ItemSequences, examples: SequenceExamples
) -> list[Member]:
    """The trained networks of the members, each with its ranker and the histories as long as it reads them."""
    from sidtune.decoding.next_item_ranking import HistoryRanker, SidCatalogue
    from sidtune.models.next_item import load_network
    from sidtune.tokenizers.semantic_ids import SemanticIds

    models = []
    for member in members:
        folder = arguments.folder(seed, member)
        catalogue = SidCatalogue.of(SemanticIds.from_pretrained(folder / "sids"), sequences)
        ranker = HistoryRanker(sequences, catalogue, arguments.num_beams)
        models.append((load_network(folder), ranker, examples.cut(arguments.system(member).max_history)))
    return models


def valid_figure(arguments: Arguments, members: list[str], seed: int, sequences: ItemSequences) -> float:
    """Validation NDCG@10 of an ensemble on the users by which its first member was chosen."""
    users = arguments.system(members[0]).fit.get("valid_users", FitSettings.valid_users)
    examples = draw_users(sequences.held_out("valid"), users, seed)
    models = models_of(arguments, members, seed, sequences, examples)
    ranks = [rows for network, ranker, cut in models for rows in ranker.rank_both(network, cut, PLACES).values()]
    ranked = combined(models, np.concatenate(ranks, axis=1), sequences.training_counts())[arguments.exclude_seen]
    return measure_targets(ranked, sequences, examples).means()[PRIMARY]


def combined(models: list[Member], proposed: np.ndarray, counts: np.ndarray) -> dict[bool, np.ndarray]:
    """(n, PLACES): the best candidates by the models' mean probability, then popularity, then row.

    Args:
        models: (network, ranker, examples) of each. proposed: (n, C) item rows, -1 for none, repeated ones count once.
        counts: (N,) training counts.

    Returns:
        Seen items ranked (False) and left out (True), of the same candidates.
    """
    from sidtune.decoding.next_item_search import mean_probability

    proposed = np.sort(proposed, axis=1)
    proposed[:, 1:][proposed[:, 1:] == proposed[:, :-1]] = -1
    proposed = -np.sort(-proposed, axis=1)  # the empty places last
    scores = mean_probability([ranker.score(network, cut, proposed) for network, ranker, cut in models])
    _, ranker, cut = models[0]
    seen = ranker.seen(cut, np.arange(len(cut)))
    pairs = np.repeat(np.arange(len(cut)), [len(rows) for rows in seen]) * len(counts) + np.concatenate(seen)
    had = np.isin(np.arange(len(cut))[:, None] * len(counts) + proposed, pairs) & (proposed >= 0)
    sides = {False: proposed, True: np.where(had, -1, proposed)}
    return {rule: _best(rows, scores, counts) for rule, rows in sides.items()}


def _best(rows: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The first PLACES of candidate rows (n, C), -1 for none, by score, popularity and row."""
    popularity = np.where(rows >= 0, counts[np.maximum(rows, 0)], -1)
    order = np.lexsort((rows, -popularity, -np.where(rows >= 0, scores, -np.inf)), axis=1)[:, :PLACES]
    return np.take_along_axis(rows, order, axis=1)


def cost_of(arguments: Arguments, name: str, members: list[str], seeds: list[int]) -> dict[str, Any]:
    """Sums over the members, means over the seeds; and the validation figures by which rows are compared."""
    records = [[read_json(arguments.folder(s, m) / RUN_FILE)["metrics"] for m in members] for s in seeds]
    total = {
        key: statistics.fmean(sum(record[key] for record in of_seed) for of_seed in records)
        for key in ("parameters", "training_flops", "training_seconds")
    }
    values = [of_seed[0]["valid_ndcg@10"] for of_seed in records]
    if len(members) > 1:
        values = [
            read_json(measured_folder(arguments, seed, name) / RUN_FILE)["metrics"]["valid_ndcg@10"] for seed in seeds
        ]
    total["valid_ndcg@10"] = {"mean": statistics.fmean(values), "values": values}
    return total | {"threads": records[0][0]["threads"], "processes": records[0][0]["processes"]}


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Mean, sample standard deviation and values over the seeds of every metric of a row, under both rules."""
    found: dict[str, dict[str, Any]] = {"metrics": {}, "other_rule": {}}
    for rule, metrics in found.items():
        by_seed = list(row[rule].values())
        for metric in by_seed[0]:
            values = [means[metric] for means in by_seed]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            metrics[metric] = {"mean": statistics.fmean(values), "std": spread, "values": values}
    return {"kind": row["kind"], "seeds": len(row["metrics"]), **found, **row["cost"]}


def paired(arguments: Arguments, rows: dict[str, Any], per_user: dict[str, dict[int, np.ndarray]]) -> dict[str, Any]:
    """The row with the best validation figure against every other one on NDCG@10; users resampled, p-values by Holm.

    A user's values are averaged over the seeds that both rows have, so the test says whether the systems differ on these users,
    and the spread over seeds in the table says how much a training moves.
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
        pairs[name] = paired_bootstrap(one, other, arguments.level, arguments.samples)
    adjusted = holm([pair.p_value for pair in pairs.values()]) if pairs else []
    against = {
        name: {**as_dict(pair), "adjusted_p_value": p_value}
        for (name, pair), p_value in zip(pairs.items(), adjusted, strict=True)
    }
    return {"best_by_validation": best, "against": against}


def markdown(record: dict[str, Any]) -> str:
    """The table of a README."""
    columns = [*SHOWN, *(f"{metric}*" for metric in OTHER), "valid ndcg@10", "parameters", "training FLOPs", "minutes"]
    lines = ["| system | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in record["systems"].items():
        cells = [f"{row['metrics'][m]['mean']:.4f} ± {row['metrics'][m]['std']:.4f}" for m in SHOWN]
        cells += [f"{row['other_rule'][m]['mean']:.4f}" for m in OTHER]
        valid = f"{row['valid_ndcg@10']['mean']:.4f}" if "valid_ndcg@10" in row else ""
        cost = ["", "", ""]
        if "parameters" in row:
            cost = [
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['training_flops']:.1e}",
                f"{row['training_seconds'] / 60:.1f}",
            ]
        lines.append("| " + " | ".join([name, *cells, valid, *cost]) + " |")
    seeds = ", ".join(map(str, record["seeds"]))
    rules = ["ranked like any other (the baselines leave them out where users hardly repeat)", "left out"]
    seen, other = rules[record["exclude_seen"]], rules[not record["exclude_seen"]]
    threads = sorted({row["threads"] * row["processes"] for row in record["systems"].values() if "threads" in row})
    lines += [
        "",
        f"{record['split'].capitalize()} targets of {record['users']:,} users, leave-one-out, whole catalogue of "
        f"{record['catalogue']:,} items, {record['num_beams']} beams; items the user has are {seen}; in the columns with a star "
        f"they are {other}. Mean ± standard deviation over seeds {seeds}. Training on {record['machine']['processor']}, "
        f"{' or '.join(map(str, threads))} thread(s).",
    ]
    for name, pair in record["paired"].get("against", {}).items():
        best = record["paired"]["best_by_validation"]
        lines.append(
            f"{best} minus {name} on {PRIMARY}: {pair['difference']:+.4f} [{pair['low']:+.4f}, {pair['high']:+.4f}], "
            f"p = {pair['adjusted_p_value']:.3f}."
        )
    lines += markdown_slices(record["where"])
    return "\n".join(lines) + "\n"
