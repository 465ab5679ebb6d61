"""Validation NDCG@10 against training FLOPs and seconds: whole histories, packed whole histories, sliding windows.

    python benchmarks/time_to_quality.py [--quick] [--json FILE] [--plot FILE] [--path FOLDER] [--epochs E] [--bf16] [--part PART]

Two groups, in each the same network, data, SIDs, targets in a batch, learning rate and shape of the schedule:

* a causal decoder over codes: whole histories; whole histories packed into full rows; one window per target with the last 10 items
  (MiniOneRec's way);
* T5's shape: whole histories with an encoder that is causal between items; one window of 20 items with full attention
  (TIGER's way).

The targets of one whole-history batch belong to few users, so a step of it says less than one over windows of many users,
and costs less. Whole histories therefore pass over the targets twice as often, still at a fraction of the FLOPs.

Before anything is trained, the loss of every target is compared: inside its whole history, packed, and at the end of a window that
covers its past. Then each side trains in this one process, one after the other, and the whole-history side is asked for the first
evaluation at which it is at least as good as the best one of the windows. FLOPs are counted from the shapes of the batches, padding
included; backward counts twice a forward. Without `--path` the data is a made-up chain of items.

Ratios are windows over ours, above 1 whole histories are cheaper; `flops_ratio` is the claim, `ratio` the seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidtune.data_builders.sequences.item_sequences import ItemSequences, SequenceExamples
from sidtune.data_builders.sequences.source import SequenceSource
from sidtune.decoding.next_item.ranking import HistoryRanker, SequenceCatalogue
from sidtune.models.next_item.network import NextItemConfig, make_network
from sidtune.tokenizers.sids.sequence_sids import make_sids
from sidtune.trainers.next_item.data import NextItemRows
from sidtune.trainers.next_item.loss import LossConfig, NextItemLoss
from sidtune.trainers.next_item.trainer import FitSettings, train_next_item

DECODER, T5 = "decoder", "t5"
WINDOW = {DECODER: 10, T5: 20}


@dataclass
class Setup:
    """Data, shapes and how long to train."""

    sequences: ItemSequences
    catalogue: SequenceCatalogue
    shapes: dict[str, dict[str, Any]]
    epochs: float
    whole_epochs: float
    targets_of_a_batch: int
    learning_rate: float
    history: int
    valid_users: int
    bf16: bool = False

    def config(self, part: str, **changes: Any) -> NextItemConfig:
        shape = {**self.shapes[part], **changes}
        return NextItemConfig(list(self.catalogue.sids.level_sizes), len(self.sequences.item_ids), **shape)

    def rows(self, examples: SequenceExamples, packed: int | None = None) -> NextItemRows:
        return NextItemRows(
            self.sequences, examples, self.catalogue.codes, self.catalogue.sids.level_sizes, packed=packed
        )

    def ways(self, part: str) -> dict[str, tuple[NextItemRows, NextItemConfig, int]]:
        """Name → training rows, network and history length; the windows come last."""
        history = self.history
        whole = self.sequences.whole_examples(history)
        found = {"whole histories": (self.rows(whole), self.config(part), history)}
        if part == DECODER:
            found["packed"] = (self.rows(whole, packed=2 * (history + 1)), self.config(part), history)
        full = {"causal_encoder": False} if part == T5 else {}
        windows = self.rows(self.sequences.window_examples(WINDOW[part]))
        found["windows"] = (windows, self.config(part, **full), WINDOW[part])
        return found


def chain(folder: Path, users: int, items: int, seed: int = 0) -> str:
    """A folder in the LETTER format: users walk along a hidden chain of items, with jumps, for 5 to 40 steps."""
    draw = np.random.default_rng(seed)
    successor, sequences = draw.permutation(items), {}
    for user in range(users):
        row = [int(draw.integers(items))]
        for _ in range(int(draw.integers(5, 40))):
            follow = draw.random() < 0.8
            row.append(int(successor[row[-1]]) if follow else int(draw.integers(items)))
        sequences[str(user)] = row
    index = {str(n): [f"<a_{n % 16}>", f"<b_{n // 16 % 16}>", f"<c_{n // 256}>"] for n in range(items)}
    (folder / "chain.inter.json").write_text(json.dumps(sequences))
    (folder / "chain.index.json").write_text(json.dumps(index))
    return str(folder)


def make_setup(quick: bool, path: str, epochs: float, whole_epochs: float) -> Setup:
    """The data of `path` with its published SIDs, a network of 0.1 (quick) or about 1 million parameters."""
    source = SequenceSource(path)
    _, sequences = source.read()
    catalogue = SequenceCatalogue.of(make_sids({"name": "published"}, source, sequences), sequences)
    if quick:
        decoder = {"network": "tokens", "width": 48, "layers": 2, "heads": 2, "feed_forward": 96, "dropout": 0.1}
        t5 = {
            "network": "t5",
            "width": 48,
            "layers": 1,
            "code_layers": 1,
            "heads": 2,
            "feed_forward": 96,
            "dropout": 0.1,
        }
        return Setup(sequences, catalogue, {DECODER: decoder, T5: t5}, epochs, whole_epochs, 256, 1e-2, 40, 300)
    decoder = {"network": "tokens", "width": 128, "layers": 3, "heads": 4, "feed_forward": 256, "dropout": 0.2}
    t5 = {"network": "t5", "width": 128, "layers": 3, "code_layers": 3, "heads": 4, "head_dim": 32, "feed_forward": 512}
    t5 = {**t5, "dropout": 0.1}
    return Setup(
        sequences, catalogue, {DECODER: decoder, T5: t5}, epochs, whole_epochs, 512, 1e-3, history=20, valid_users=1500
    )


@torch.no_grad()
def target_losses(setup: Setup, rows: NextItemRows, config: NextItemConfig, users: int) -> dict[tuple[int, ...], float]:
    """(user, items up to and with the target) → its loss in a fresh network, for the first users."""
    torch.manual_seed(0)
    network = make_network(config).eval()
    loss = NextItemLoss(LossConfig(), setup.catalogue.trie, torch.from_numpy(setup.catalogue.codes))
    found = {}
    for place, members in enumerate(rows.rows):
        if int(rows.examples.users[members].min()) >= users:
            continue
        batch = rows.collate([place])
        _, plain = loss(network, network(**batch), batch)
        for value, at in zip(plain.tolist(), batch["learn"][0].nonzero()[:, 0].tolist(), strict=True):
            segment = int(batch["segments"][0, at])
            own = (batch["segments"][0] == segment) & (torch.arange(batch["rows"].shape[1]) <= at)
            user = int(rows.examples.users[members[segment]])
            found[(user, *batch["rows"][0][own].tolist())] = value
    return found


def check_equal(setup: Setup, part: str, users: int = 60) -> tuple[float, int]:
    """Largest difference of a target's loss between the ways, with windows that cover the past; and how many were compared.

    Both sides have the causal encoder here: full attention is another function, which is what TIGER's way buys.
    """
    config = setup.config(part)
    short = np.flatnonzero(setup.sequences.lengths <= setup.history)
    whole = target_losses(setup, setup.rows(setup.sequences.whole_examples(setup.history)), config, users)
    others = [setup.rows(setup.sequences.window_examples(setup.history))]
    others.append(setup.rows(setup.sequences.whole_examples(setup.history), packed=2 * (setup.history + 1)))
    worst, compared = 0.0, 0
    for rows in others:
        found = target_losses(setup, rows, config, users)
        common = [key for key in whole if key[0] in short and key in found]
        worst = max([worst, *(abs(whole[key] - found[key]) for key in common)])
        compared += len(common)
    return worst, compared


def curve(
    setup: Setup, rows: NextItemRows, config: NextItemConfig, history: int, epochs: float
) -> list[dict[str, float]]:
    """Trains once; one point per evaluation."""
    per_row = rows.examples.targets / len(rows)
    batch = max(1, round(setup.targets_of_a_batch / per_row))
    args = {"num_train_epochs": epochs, "per_device_train_batch_size": batch, "learning_rate": setup.learning_rate}
    args |= {"warmup_steps": 20, "logging_strategy": "no", "logging_first_step": False, "bf16": setup.bf16}
    fit = FitSettings(args=args, average=0.99, evaluate_every=max(0.05, epochs / 24), valid_users=setup.valid_users)
    torch.manual_seed(0)
    ranker = HistoryRanker(setup.sequences, setup.catalogue, num_beams=20)
    with tempfile.TemporaryDirectory() as folder:
        trainer = train_next_item(make_network(config), rows, ranker, fit, folder, max_history=history, seed=0)
    return [
        {"flops": log["eval_flops"], "seconds": log["eval_train_seconds"], "ndcg@10": log["eval_ndcg@10"]}
        for log in trainer.state.log_history
        if "eval_ndcg@10" in log
    ]


def reach(points: list[dict[str, float]], quality: float) -> dict[str, float] | None:
    """The first evaluation that is at least this good."""
    return next((point for point in points if point["ndcg@10"] >= quality), None)


def compare(setup: Setup, part: str) -> list[dict[str, Any]]:
    """Trains all ways of one group; one row per way other than the windows."""
    difference, compared = check_equal(setup, part)
    curves = {}
    for name, (rows, config, history) in setup.ways(part).items():
        epochs = setup.epochs if name == "windows" else setup.whole_epochs
        curves[name] = curve(setup, rows, config, history, epochs)
        last = max(curves[name], key=lambda point: point["ndcg@10"])
        print(
            f"{part}, {name}: best {last['ndcg@10']:.4f} after {last['flops']:.2e} FLOPs, {last['seconds']:.0f} s",
            flush=True,
        )
    windows = curves.pop("windows")
    best = max(windows, key=lambda point: point["ndcg@10"])
    rows = []
    for name, points in curves.items():
        own = reach(points, best["ndcg@10"])
        rows.append(
            {
                "name": f"{part}: {name}",
                "baseline": f"one window of {WINDOW[part]} items per target",
                "ours_s": own and round(own["seconds"], 2),
                "baseline_s": round(best["seconds"], 2),
                "ratio": own and round(best["seconds"] / own["seconds"], 2),
                "flops_ratio": own and round(best["flops"] / own["flops"], 2),
                "ours_flops": own and own["flops"],
                "baseline_flops": best["flops"],
                "quality": round(best["ndcg@10"], 5),
                "ours_best": round(max(point["ndcg@10"] for point in points), 5),
                "equal": bool(difference < 1e-4 and compared > 0),
                "largest_difference": difference,
                "targets_compared": compared,
                "curve": points,
                "baseline_curve": windows,
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Both axes of cost beside each other, one line per way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    lines = {row["name"]: row["curve"] for row in rows}
    lines |= {row["name"].split(":")[0] + ": windows": row["baseline_curve"] for row in rows}
    for axis, cost, label in zip(axes, ("flops", "seconds"), ("training FLOPs", "training seconds"), strict=True):
        for name, points in lines.items():
            style = "--" if name.endswith("windows") else "-"
            axis.plot([p[cost] for p in points], [p["ndcg@10"] for p in points], style, marker=".", label=name)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation NDCG@10")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def save(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Writes the rows so far and draws them, where the options name files; after each group, for a group takes long."""
    if options.json:
        machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        machine["matrix_products"] = "bfloat16" if options.bf16 else "float32"
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small world; ends within five minutes on two cores")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--path", help="a folder in the LETTER format; default a made-up chain of items")
    parser.add_argument(
        "--epochs", type=float, help="passes of the windows over all targets; default 4 quick, 12 otherwise"
    )
    parser.add_argument("--whole_epochs", type=float, help="the same for whole histories; default twice --epochs")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products on both sides")
    parser.add_argument("--part", choices=[DECODER, T5], action="append", help="only this group; default both")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.path or chain(Path(folder), *((500, 150) if options.quick else (4000, 2000)))
        epochs = options.epochs or (4 if options.quick else 12)
        setup = make_setup(options.quick, path, epochs, options.whole_epochs or 2 * epochs)
        setup.bf16 = options.bf16
    rows: list[dict[str, Any]] = []
    for part in options.part or [DECODER, T5]:
        rows += compare(setup, part)
        save(rows, options)
    for row in rows:
        reached = f"{row['flops_ratio']} x fewer FLOPs, {row['ratio']} x less time" if row["ratio"] else "not reached"
        print(f"{row['name']}: NDCG@10 {row['quality']:.4f} of the windows: {reached}; equal: {row['equal']}")
    if not all(row["equal"] for row in rows):
        raise SystemExit("The losses of a target differ between the two sides; the figures mean nothing.")


if __name__ == "__main__":
    main()
