"""One table over all quantizers at an equal budget of codes: geometry of the codes, and what a small model makes of them.

    python benchmarks/semantic_ids.py [--quick] [--data shop office instruments] [--seeds 0 1 2] [--work DIR] [--json FILE]

Budget: every method spells four codes per item from 4k codes in all (k = 128 for Office, 256 for Instruments, 64 for the shop).
RQ-OPQ has 5k/4 and 3k/4 codes in its head and k in each tail part, FSQ a grid whose product is k. Networks train for about
3,000 steps of 256 vectors, with hidden layers of 256 and 128 units and the defaults of their config otherwise. Vectors: TF-IDF and
SVD of 64 dimensions for Office and the shop, the published collaborative ones for Instruments. Learned from items only.

Per row: items beyond one per code, ICR, share of the prefixes of two levels in use (CUR), utilisation and entropy (means over
levels), error over variance, neighbours kept, and in the shop, which has queries, recall@10 of the wanted item through the
codes of the query. NDCG@10: a Qwen3 of about 0.2 million parameters, on Instruments, which has no text, an `items` network of
recipes/next_item with 0.8 million; from random weights, the same number of steps for every row, on whole histories; 20
constrained beams (30 on Instruments, where items of the history are left out), whole catalogue, on items. The last row of each
data set gives the codes of residual k-means to items drawn by lot: what the model reaches when codes mean nothing. Differences
are to residual k-means, paired over requests (mean of the seeds), users resampled, p-values adjusted over the rows of the data
set (Holm). Steps and learning rate were chosen on the valid split with residual k-means, on Instruments with the publisher's SIDs.

Rows are written as they come. Run again with the same `--work` and `--json`, it goes on where it was, also with more seeds or data.
Our own measurement; no paper is involved.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sidtune.benchmarks import semantic_ids_downstream as downstream
from sidtune.benchmarks.semantic_ids_downstream import METRIC, Source
from sidtune.core.config import report_error
from sidtune.core.errors import ConfigError, DataError, SidtuneError, nearest
from sidtune.core.folders import read_json, write_json
from sidtune.metrics.statistics.bootstrap import holm

TEXT = {"name": "tfidf_svd", "dims": 64}
COLLABORATIVE = {"name": "precomputed", "path": "instruments/Instruments.sasrec-32d.npy", "align": "row_number"}
SOURCES = {
    "office": Source(
        title="Amazon Office, text",
        reader="amazon_sid",
        folder="amazon_office",
        split={"kind": "source"},
        encoder=TEXT,
        width=128,
        grid=(8, 4, 4),
        epochs=215,
        steps=1000,
        batch=32,
        learning_rate=3e-3,
        requests=5000,
    ),
    "instruments": Source(
        title="Amazon Instruments, collaborative",
        reader="letter",
        folder="instruments",
        split={"kind": "leave_one_out"},
        encoder=COLLABORATIVE,
        width=256,
        grid=(8, 8, 4),
        epochs=77,
        steps=800,
        batch=128,
        learning_rate=1e-3,
        requests=5000,
        model="items",
        hidden=128,
        layers=3,
        max_length=50,
    ),
    "shop": Source(
        title="ShopWorld, text",
        reader="shop_world",
        options={"n_items": 2000, "n_users": 1000, "n_requests": 20_000},
        split={"kind": "global_time", "valid_share": 0.05, "test_share": 0.1},
        encoder=TEXT,
        width=64,
        grid=(8, 8),
        epochs=375,
        steps=400,
        batch=16,
        learning_rate=3e-3,
        requests=5000,
        max_length=512,
        queries=True,
    ),
}
REFERENCE = "residual_kmeans"
SHUFFLED = "residual_kmeans, codes by lot"
BASELINES = ["popularity", "item_knn"]
MEASURES = (
    "collision_rate",
    "icr",
    "cur_2",
    "utilisation",
    "entropy",
    "relative_error",
    "neighbours_kept",
    "query_recall",
    "query_recall_vectors",
    "learn_s",
    "train_s",
)


def quantizers(source: Source) -> dict[str, dict[str, Any]]:
    """Row → options of learn_sids; four codes per item, 4k codes in all."""
    k, training = source.width, {"epochs": source.epochs, "batch_size": 256}
    network = {"hidden": [256, 128], **training}
    return {
        REFERENCE: {"name": "residual_kmeans", "level_sizes": [k] * 4},
        "balanced_kmeans": {"name": "balanced_kmeans", "level_sizes": [k] * 4},
        "rq_opq": {"name": "rq_opq", "head_sizes": [k + k // 4, k - k // 4], "tail_size": k},
        "product_quantizer": {"name": "product_quantizer", "parts": 4, "codes_per_part": k},
        "product_quantizer, rotate: false": {
            "name": "product_quantizer",
            "parts": 4,
            "codes_per_part": k,
            "rotate": False,
        },
        "rq_vae": {"name": "rq_vae", "level_sizes": [k] * 4, **network},
        "rq_kmeans_plus": {"name": "rq_kmeans_plus", "level_sizes": [k] * 4, **training},
        "fsq": {"name": "fsq", "grids": [list(source.grid)] * 4, **network},
    }


def quick(source: Source) -> Source:
    """A source small enough for minutes: fewer items in the shop, few steps, few requests."""
    small = {"n_items": 600, "n_users": 200, "n_requests": 3000} if source.folder is None else {}
    width = 16 if source.folder is None else source.width
    grid = (4, 4) if source.folder is None else source.grid
    return dataclasses.replace(
        source, options=source.options | small, width=width, grid=grid, epochs=20, steps=30, requests=200
    )


class Comparison:
    """Runs what is missing and keeps the results.

    Args:
        sources: name → source.
        work: folder of the steps. Needed again to go on, since differences compare request by request.
        file: JSON of the results, or None.

    Raises:
        ConfigError: the file holds results of other settings.
    """

    def __init__(self, sources: dict[str, Source], work: Path, file: Path | None) -> None:
        self.sources, self.work, self.file = sources, work, file
        self.runs: list[dict[str, Any]] = []
        self.settings = {name: json.loads(json.dumps(dataclasses.asdict(one))) for name, one in sources.items()}
        if file is not None and file.exists():
            known = read_json(file)
            for name in self.settings.keys() & known["settings"].keys():
                if self.settings[name] != known["settings"][name]:
                    raise ConfigError(
                        f"{file} holds rows of '{name}' that were measured with other settings; name another file."
                    )
            self.runs, self.settings = known["runs"], known["settings"] | self.settings

    def run(self, seeds: list[int]) -> None:
        """All rows of the first seed, then of the next; finished ones are skipped."""
        for seed in seeds:
            for data, source in self.sources.items():
                for name in [*quantizers(source), SHUFFLED]:
                    if any((one["data"], one["name"], one["seed"]) == (data, name, seed) for one in self.runs):
                        continue
                    self.runs.append(self.measure(data, name, seed))
                    self.save()
                    print(line(self.runs[-1]), flush=True)

    def folder(self, data: str, name: str, seed: int) -> Path:
        """Where the steps of one run lie."""
        slug = "".join(letter if letter.isalnum() else "_" for letter in name)
        return self.work / data / f"{slug}_{seed}"

    def measure(self, data: str, name: str, seed: int) -> dict[str, Any]:
        """Learns the codes, measures them, trains and evaluates the model."""
        source, folder = self.sources[data], self.folder(data, name, seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with quiet(folder / "log.txt"):
            tables = downstream.build(source, self.work / data / "data")
            started = time.time()
            if name == SHUFFLED:
                downstream.shuffle(self._reference(data, seed), folder / "sids", seed)
            else:
                downstream.learn(source, tables, folder / "sids", quantizers(source)[name], seed)
            learned = time.time()
            report, queries = downstream.quality(source, tables, folder / "sids", seed)
            baselines = BASELINES if name == REFERENCE else []
            scored = downstream.train_and_score(source, tables, folder / "sids", folder, seed, baselines)
        for step in ("model", "sft"):
            shutil.rmtree(folder / step, ignore_errors=True)
        levels = report.levels
        return {
            "data": data,
            "name": name,
            "seed": seed,
            "levels": "-".join(str(level.size) for level in levels),
            "items": report.items,
            "collision_rate": report.lost_rate,
            "icr": report.icr,
            "cur_2": levels[1].cur,
            "utilisation": statistics.fmean(level.utilisation for level in levels),
            "entropy": statistics.fmean(level.normalized_entropy for level in levels),
            "relative_error": report.relative_error,
            "neighbours_kept": report.neighbour_overlap,
            "query_recall": None if queries is None else queries.recall[10],
            "query_recall_vectors": None if queries is None else queries.vector_recall[10],
            "learn_s": round(learned - started, 1),
            **scored,
        }

    def _reference(self, data: str, seed: int) -> Path:
        """SID folder of the reference, which codes by lot are made from."""
        folder = self.folder(data, REFERENCE, seed) / "sids"
        if not folder.exists():
            raise DataError(f"{folder} is gone; go on with the --work folder of the earlier rows, or start a new file.")
        return folder

    def rows(self) -> list[dict[str, Any]]:
        """One row per data set and quantizer: means over seeds, differences to the reference; baselines last."""
        made = []
        for data in dict.fromkeys(run["data"] for run in self.runs):
            found = [run for run in self.runs if run["data"] == data]
            order = list(quantizers(self.sources[data])) if data in self.sources else []
            names = sorted({run["name"] for run in found}, key=lambda name: (order + [SHUFFLED, name]).index(name))
            part = [summary([run for run in found if run["name"] == name]) for name in names]
            self._add_differences(data, part)
            made += part + baseline_rows([run for run in found if "baselines" in run])
        title = {name: one["title"] for name, one in self.settings.items()}
        return [row | {"data": title[row["data"]]} for row in made]

    def _add_differences(self, data: str, rows: list[dict[str, Any]]) -> None:
        """The difference of each row to the reference on the seeds both have, p-values adjusted together."""
        seeds = {row["name"]: [run["seed"] for run in self.runs if same(run, data, row["name"])] for row in rows}
        found = {}
        for row in rows:
            common = [seed for seed in seeds[row["name"]] if seed in seeds.get(REFERENCE, [])]
            sides = [[self.folder(data, name, s) / "test" for s in common] for name in (row["name"], REFERENCE)]
            pair = None if row["name"] == REFERENCE else downstream.paired(*sides)
            if pair is not None:
                found[row["name"]] = pair
        adjusted = holm([pair.p_value for pair in found.values()]) if found else []
        for (name, pair), p_value in zip(found.items(), adjusted, strict=True):
            row = next(row for row in rows if row["name"] == name)
            row["difference"] = f"{pair.difference:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]"
            row["adjusted_p"] = p_value

    def save(self) -> None:
        """Writes everything measured so far."""
        if self.file is not None:
            record = {"machine": machine(), "settings": self.settings, "rows": self.rows(), "runs": self.runs}
            write_json(self.file, record)


def same(run: dict[str, Any], data: str, name: str) -> bool:
    """Whether a run is of this data set and row."""
    return run["data"] == data and run["name"] == name


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of one row, with the sample standard deviation of NDCG@10 where there are several."""
    first = runs[0]
    row = {key: first[key] for key in ("data", "name", "levels", "items", "requests", "parameters", "steps")}
    for key in MEASURES:
        values = [run[key] for run in runs if run[key] is not None]
        row[key] = statistics.fmean(values) if values else None
    return row | spread([run[METRIC] for run in runs])


def baseline_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the baselines, from the runs of the reference."""
    if not runs:
        return []
    names = list(runs[0]["baselines"])
    return [
        {"data": runs[0]["data"], "name": name, **spread([run["baselines"][name][METRIC] for run in runs])}
        for name in names
    ]


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, text with the sample standard deviation, and number of seeds."""
    mean = statistics.fmean(values)
    shown = f"{mean:.4f}" if len(values) < 2 else f"{mean:.4f} ± {statistics.stdev(values):.4f}"
    return {METRIC: mean, "ndcg": shown, "seeds": len(values)}


def line(run: dict[str, Any]) -> str:
    """One run on the console."""
    return (
        f"{run['data']}, {run['name']}, seed {run['seed']}: ICR {run['icr']:.1%}, error / variance "
        f"{run['relative_error']:.3f}, neighbours {run['neighbours_kept']:.1%}, {METRIC} {run[METRIC]:.4f} "
        f"({run['learn_s']} s to learn, {run['train_s']} s to train)"
    )


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """What the recipes print goes into a file."""
    with log.open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def chosen(names: list[str] | None, small: bool) -> dict[str, Source]:
    """The data sets asked for; by default the shop when quick, else all that are on this machine.

    Raises:
        ConfigError: an unknown name.
    """
    if names is None:
        names = ["shop"] if small else [name for name, source in SOURCES.items() if source.available()]
    for name in names:
        if name not in SOURCES:
            raise ConfigError(f"There is no data set '{name}' in this comparison; {nearest(name, SOURCES)}")
    return {name: quick(SOURCES[name]) if small else SOURCES[name] for name in names}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shop and few steps, within five minutes")
    parser.add_argument("--data", nargs="+", help="office, instruments, shop; default all that are there")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of quantizer and model")
    parser.add_argument("--work", type=Path, help="folder of the steps, kept; default a temporary one")
    parser.add_argument("--json", type=Path, help="write the results here, and go on from what it holds")
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        comparison = Comparison(chosen(options.data, options.quick), work, options.json)
        comparison.run(options.seeds)
        comparison.save()
        return comparison.rows()


if __name__ == "__main__":
    try:
        main()
    except SidtuneError as error:
        report_error(error)
        raise SystemExit(2) from None
