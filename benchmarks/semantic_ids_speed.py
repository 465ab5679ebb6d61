"""Speed and memory of learning semantic IDs and of encoding, against the bare library calls behind them.

    python benchmarks/semantic_ids_speed.py [--quick] [--json FILE]

- Training RQ-OPQ against the faiss calls it makes (`Kmeans`, `IndexFlatL2` search, `OPQMatrix`), with the same settings and
  seeds. Each side runs in a process of its own, which also reports the peak of its memory beyond what it had before the
  matrix was made. `times_matrix` is our peak over the size of the matrix, which itself counts.
- Encoding against a search per level and the residual. Both go through blocks of the same size; ours also decides near-ties.
- RQ-VAE (`start: pca`) against a plain PyTorch loop (`DataLoader`, random start, constant rate), both at a rate of 3e-3, where the
  loop is better than at 1e-3: it runs for a number of epochs, ours for the fewest of 1, 2, 4, ... with which a whole training
  ends at an error as low.

Seconds are processor seconds of one thread, so that other work on the machine disturbs them little. `equal` means, for
encoding, that ours is the nearer centroid in float64 wherever the codes of a row part (`rows_differing`, near-ties); in
training, where ours merges repeated residuals and k-means then starts elsewhere, errors within 2 %; for RQ-VAE an error as low.
The paper's own sizes, some hours: `--items 1000000 --head 4096 1024 512 --rounds 50`.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sidtune.tokenizers.quantizers.rq_opq import RqOpq, RqOpqConfig
from sidtune.tokenizers.quantizers.rq_vae import RqVae, RqVaeConfig

BLOCK = 65_536
MB = 1 << 20


def vectors_of(items: int, dims: int, seed: int = 42) -> np.ndarray:
    """Power-law mixture: 512 centres of spread 5, shares `rank^-1.5`, noise 0.5; made block by block."""
    draw = np.random.default_rng(seed)
    means = 5.0 * draw.normal(size=(512, dims)).astype(np.float32)
    share = 1.0 / np.arange(1, 513) ** 1.5
    which = draw.choice(512, size=items, p=share / share.sum())
    vectors = np.empty((items, dims), dtype=np.float32)
    for i in range(0, items, BLOCK):
        part = vectors[i : i + BLOCK]
        draw.standard_normal(out=part, dtype=np.float32)
        part *= 0.5
        part += means[which[i : i + BLOCK]]
    return vectors


def nearest(index: Any, points: np.ndarray) -> np.ndarray:
    """Nearest centroid of every row, block by block."""
    return np.concatenate([index.search(points[i : i + BLOCK], 1)[1][:, 0] for i in range(0, len(points), BLOCK)])


def kmeans(points: np.ndarray, size: int, config: RqOpqConfig, seed: int, most: int) -> Any:
    """A trained `faiss.Kmeans` with the settings of ours."""
    made = faiss.Kmeans(
        points.shape[1],
        size,
        niter=config.iterations,
        seed=seed,
        max_points_per_centroid=most,
        min_points_per_centroid=1,
    )
    made.train(points)
    return made


def bare_training(vectors: np.ndarray, config: RqOpqConfig) -> tuple[np.ndarray, float]:
    """The faiss calls of RQ-OPQ training without anything around them; codes (n, depth) and mean squared error."""
    residual, columns, error = vectors, [], 0.0
    for level, size in enumerate(config.head_sizes):
        made = kmeans(residual, size, config, config.seed + level, config.max_points_per_centroid)
        columns.append(nearest(made.index, residual))
        residual = residual.copy() if level == 0 else residual
        for i in range(0, len(residual), BLOCK):
            residual[i : i + BLOCK] -= made.centroids[columns[-1][i : i + BLOCK]]
    dims, parts = vectors.shape[1], config.tail_parts
    matrix = faiss.OPQMatrix(dims, parts)
    inner = faiss.ProductQuantizer(dims, parts, config.tail_size.bit_length() - 1)
    matrix.pq, matrix.niter = inner, config.rotation_rounds
    matrix.train(residual)
    turn = faiss.vector_to_array(matrix.A).reshape(dims, dims)
    turned, width = residual @ turn.T, dims // parts
    for part in range(parts):
        points = np.ascontiguousarray(turned[:, part * width : (part + 1) * width])
        made = kmeans(points, config.tail_size, config, config.seed, config.tail_points_per_centroid)
        columns.append(nearest(made.index, points))
        for i in range(0, len(points), BLOCK):
            left = points[i : i + BLOCK] - made.centroids[columns[-1][i : i + BLOCK]]
            error += float(np.einsum("nd,nd->", left, left, dtype=np.float64))
    return np.stack(columns, axis=1), error / vectors.size


def _trained(side: str, items: int, dims: int, options: dict[str, Any]) -> tuple[float, float, np.ndarray, float]:
    faiss.omp_set_num_threads(1)
    config = RqOpqConfig(**options)
    unit = MB if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    vectors = vectors_of(items, dims)
    start = time.process_time()
    quantizer = RqOpq(config)
    codes, error = (quantizer.fit_encode(vectors), 0.0) if side == "ours" else bare_training(vectors, config)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit - before
    if side == "ours":
        for i in range(0, items, BLOCK):
            left = vectors[i : i + BLOCK] - quantizer.decode(codes[i : i + BLOCK])
            error += float(np.einsum("nd,nd->", left, left, dtype=np.float64)) / vectors.size
    return seconds, peak, codes.astype(np.int32), error


def training_row(items: int, dims: int, options: dict[str, Any]) -> dict[str, Any]:
    """One training of each side, each in a fresh process."""
    found = {}
    for side in ("ours", "bare"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[side] = pool.submit(_trained, side, items, dims, options).result()
    (ours_s, ours_mb, ours, error), (bare_s, bare_mb, bare, other) = found["ours"], found["bare"]
    differing = int((ours != bare).any(axis=1).sum())
    matrix = items * dims * 4 / MB
    sizes = "-".join(map(str, [*options["head_sizes"], 256, 256]))
    return row(
        f"train RQ-OPQ {sizes} on {items} x {dims}",
        "the faiss calls it makes",
        ours_s,
        bare_s,
        abs(error - other) < 0.02 * other,
        rows_differing=differing,
        error_over_baseline=round(error / other, 4),
        ours_peak_mb=round(ours_mb, 1),
        baseline_peak_mb=round(bare_mb, 1),
        times_matrix=round(ours_mb / matrix, 2),
    )


def bare_encoder(quantizer: RqOpq) -> Callable[[np.ndarray], np.ndarray]:
    """One `IndexFlatL2` per level and part, and the residual between them."""
    books = quantizer.head.codebooks
    indexes = [faiss.IndexFlatL2(book.shape[1]) for book in (*books, *quantizer.tail._centroids)]
    for index, book in zip(indexes, (*books, *quantizer.tail._centroids), strict=True):
        index.add(book)
    turn, width = quantizer.tail.rotation, quantizer.tail._centroids.shape[2]

    def encode(vectors: np.ndarray) -> np.ndarray:
        blocks = []
        for i in range(0, len(vectors), BLOCK):
            residual, columns = vectors[i : i + BLOCK], []
            for index, book in zip(indexes, books, strict=False):
                columns.append(index.search(residual, 1)[1][:, 0])
                residual = residual - book[columns[-1]]
            turned = residual @ turn.T
            for part, index in enumerate(indexes[len(books) :]):
                half = np.ascontiguousarray(turned[:, part * width : (part + 1) * width])
                columns.append(index.search(half, 1)[1][:, 0])
            blocks.append(np.stack(columns, axis=1))
        return np.concatenate(blocks).astype(np.int32)

    return encode


def encoding_row(items: int, dims: int, head: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Encoding with codebooks of these sizes (trained in two rounds only), fastest of alternating rounds."""
    vectors = vectors_of(items, dims)
    config = RqOpqConfig(head, "none", rotation_rounds=1, iterations=1, max_points_per_centroid=4)
    quantizer = RqOpq(config).fit(vectors[: max(20_000, items // 10)])
    bare, times, codes = bare_encoder(quantizer), ([], []), [None, None]
    for _ in range(rounds):
        for side, call in enumerate((quantizer.encode, bare)):
            start = time.process_time()
            codes[side] = call(vectors)
            times[side].append(time.process_time() - start)
    differing = np.flatnonzero((codes[0] != codes[1]).any(axis=1))
    name = f"encode {items} x {dims}, {'-'.join(map(str, [*head, 256, 256]))}"
    return row(
        name,
        "faiss search per level",
        min(times[0]),
        min(times[1]),
        as_near(quantizer, vectors[differing], codes[0][differing], codes[1][differing]),
        rows_differing=len(differing),
    )


def as_near(quantizer: RqOpq, vectors: np.ndarray, ours: np.ndarray, others: np.ndarray) -> bool:
    """Whether, where two codes of a vector part, ours is the nearer centroid or as near but for the rounding of float64."""
    depth = len(quantizer.head.codebooks)
    turn, width = quantizer.tail.rotation.astype(np.float64), quantizer.tail._centroids.shape[2]
    for vector, mine, theirs in zip(vectors, ours, others, strict=True):
        level = int(np.flatnonzero(mine != theirs)[0])
        rest = vector.copy()
        for book, code in zip(quantizer.head.codebooks, mine[: min(level, depth)], strict=False):
            rest = rest - book[code]
        if level < depth:
            book, point = quantizer.head.codebooks[level], rest.astype(np.float64)
        else:
            book = quantizer.tail._centroids[level - depth]
            point = turn[(level - depth) * width : (level - depth + 1) * width] @ rest.astype(np.float64)
        near, far = (float(((point - book[codes[level]]) ** 2).sum()) for codes in (mine, theirs))
        if near > far * (1 + 1e-12):
            return False
    return True


class PlainRqVae(nn.Module):
    """RQ-VAE as most repositories write it."""

    def __init__(self, dims: int, config: RqVaeConfig) -> None:
        super().__init__()
        widths = [dims, *config.hidden, config.latent_dims]
        self.encoder, self.decoder = self._net(widths), self._net(widths[::-1])
        self.books = nn.ModuleList(nn.Embedding(size, config.latent_dims) for size in config.level_sizes)
        for book in self.books:
            nn.init.uniform_(book.weight, -1 / book.num_embeddings, 1 / book.num_embeddings)

    @staticmethod
    def _net(widths: list[int]) -> nn.Sequential:
        pairs = zip(widths[:-1], widths[1:], strict=True)
        layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent = self.encoder(vectors)
        residual, total, loss = latent, torch.zeros_like(latent), torch.zeros(())
        for book in self.books:
            chosen = book(torch.cdist(residual, book.weight).argmin(dim=1))
            loss = loss + ((residual.detach() - chosen) ** 2).mean() + 0.25 * ((residual - chosen.detach()) ** 2).mean()
            residual, total = residual - chosen, total + chosen
        rebuilt = self.decoder(latent + (total - latent).detach())
        return rebuilt, loss + ((rebuilt - vectors) ** 2).mean()


def plain_loop(vectors: np.ndarray, config: RqVaeConfig) -> tuple[float, float]:
    """Trains for the epochs of `config`: (seconds, error over variance)."""
    torch.manual_seed(config.seed)
    data = torch.from_numpy((vectors - vectors.mean(axis=0)) / vectors.std())
    model = PlainRqVae(data.shape[1], config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    loader = DataLoader(TensorDataset(data), batch_size=config.batch_size, shuffle=True)
    start = time.process_time()
    for _ in range(config.epochs):
        for (batch,) in loader:
            optimizer.zero_grad()
            model(batch)[1].backward()
            optimizer.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        error = float(((model(data)[0] - data) ** 2).sum() / ((data - data.mean(dim=0)) ** 2).sum())
    return seconds, error


def rq_vae_row(items: int, dims: int, epochs: int) -> dict[str, Any]:
    """Time to the reconstruction error of the plain loop after `epochs`."""
    vectors = vectors_of(items, dims)
    options = {
        "level_sizes": (64, 64, 64),
        "hidden": (128, 64),
        "batch_size": 512,
        "device": "cpu",
        "learning_rate": 3e-3,
    }
    baseline_s, goal = plain_loop(vectors, RqVaeConfig(**options, epochs=epochs))
    used, error, ours_s = 1, float("inf"), 0.0
    while error > goal and used <= 4 * epochs:
        start = time.process_time()
        quantizer = RqVae(RqVaeConfig(**options, start="pca", epochs=used)).fit(vectors)
        ours_s = time.process_time() - start
        rebuilt = quantizer.decode(quantizer.encode(vectors))
        error = float(((vectors - rebuilt) ** 2).sum() / ((vectors - vectors.mean(axis=0)) ** 2).sum())
        used *= 2
    name = f"RQ-VAE 64-64-64 on {items} x {dims}, {used // 2} epochs to error {error:.3f}"
    more = {"relative_error": round(error, 4), "baseline_error": round(goal, 4)}
    return row(name, f"plain loop, {epochs} epochs to error {goal:.3f}", ours_s, baseline_s, error <= goal, **more)


def row(name: str, baseline: str, ours_s: float, baseline_s: float, equal: bool, **more: Any) -> dict[str, Any]:
    timed = {"ours_s": round(ours_s, 2), "baseline_s": round(baseline_s, 2), "ratio": round(baseline_s / ours_s, 3)}
    return {"name": name, "baseline": baseline, **timed, "equal": bool(equal), **more}


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "threads": 1,
        "clock": "processor seconds",
        "faiss": faiss.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, well under 5 minutes on 2 cores")
    parser.add_argument("--json", type=Path, help="write the result here, after every row")
    parser.add_argument("--items", type=int, default=1_000_000, help="rows to train on")
    parser.add_argument("--encode-items", type=int, default=200_000, help="rows to encode")
    parser.add_argument("--head", type=int, nargs="+", default=[128, 112, 104], help="head codebooks that are trained")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the rotation")
    options = parser.parse_args(argv)
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    items, encoded, head = options.items, options.encode_items, tuple(options.head)
    if options.quick:
        items, encoded, head = 50_000, 30_000, (64, 32, 16)
    training = {"head_sizes": head, "balance": "none", "rotation_rounds": 2 if options.quick else options.rounds}
    wide = (512, 256, 128) if options.quick else (4096, 1024, 512)
    steps: list[Callable[[], dict[str, Any]]] = [
        *[
            functools.partial(rq_vae_row, *sizes)
            for sizes in ([(5_000, 32, 10)] if options.quick else [(20_000, 64, 20), (20_000, 64, 100)])
        ],
        lambda: encoding_row(encoded, 256, wide, 2),
        lambda: training_row(items, 256, training),
    ]
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    for step in steps:
        entry = step()
        result["rows"].append(entry)
        print(
            f"{entry['name']}: {entry['ratio']:.2f}x against {entry['baseline']}, equal: {entry['equal']}", flush=True
        )
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
