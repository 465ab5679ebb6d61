"""Speed of residual k-means encoding and of grouping items by code, against plain ways to do the same work.

    python benchmarks/sid_encoding.py [--quick] [--json FILE]

Every pair runs in this one process, on the same input, alternating; the outputs are compared before anything is
timed. Encoding baselines: scikit-learn's `KMeans.predict` per level and a loop over levels with `torch.cdist`, both
with our centroids. They work in float32 throughout, so a row may differ where two centroids are equally near;
`rows_differing` counts such rows, and `equal` means that each of them is a tie within float32 rounding. Ours also looks
at the second nearest centroid, to decide such rows exactly. The grouping baseline is a Python dictionary of lists.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans

from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

ROUNDS = 5


def best_times(ours: Callable[[], Any], baseline: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the fastest of `ROUNDS` alternating runs of each, after one run to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    ours()
    baseline()
    for _ in range(ROUNDS):
        for which, call in enumerate((ours, baseline)):
            start = time.perf_counter()
            call()
            times[which].append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def vectors_of(items: int, dims: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around centres of power-law popularity, as item embeddings tend to be."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(200, dims))
    share = 1.0 / np.arange(1, 201)
    vectors = centres[draw.choice(200, size=items, p=share / share.sum())] + 0.7 * draw.normal(size=(items, dims))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def sklearn_encoder(quantizer: ResidualKMeans) -> Callable[[np.ndarray], np.ndarray]:
    """KMeans models that hold our centroids, one per level."""
    models = []
    for book in quantizer.codebooks:
        model = KMeans(len(book), init=book, n_init=1, max_iter=1).fit(book)
        model.cluster_centers_ = book
        models.append(model)

    def encode(vectors: np.ndarray) -> np.ndarray:
        residual, columns = vectors, []
        for model in models:
            columns.append(model.predict(residual))
            residual = residual - model.cluster_centers_[columns[-1]]
        return np.stack(columns, axis=1)

    return encode


def torch_encoder(quantizer: ResidualKMeans) -> Callable[[np.ndarray], np.ndarray]:
    """The loop over levels with `torch.cdist` that most SID projects use, in blocks of rows."""
    books = [torch.from_numpy(book) for book in quantizer.codebooks]

    @torch.inference_mode()
    def encode(vectors: np.ndarray) -> np.ndarray:
        parts = []
        for residual in torch.from_numpy(vectors).split(16_384):
            columns = []
            for book in books:
                columns.append(torch.cdist(residual, book).argmin(dim=1))
                residual = residual - book[columns[-1]]
            parts.append(torch.stack(columns, dim=1))
        return torch.cat(parts).numpy()

    return encode


def same_but_for_ties(quantizer: ResidualKMeans, vectors: np.ndarray, ours: np.ndarray, other: np.ndarray) -> bool:
    """True when, at the first level where a row differs, both centroids are equally near up to float32 rounding."""
    rows = np.flatnonzero((ours != other).any(axis=1))
    residual = vectors[rows].astype(np.float64)
    open_rows = np.ones(len(rows), dtype=bool)
    for level, book in enumerate(quantizer.codebooks):
        mine, theirs = book[ours[rows, level]].astype(np.float64), book[other[rows, level]].astype(np.float64)
        gap = np.abs(((residual - mine) ** 2).sum(axis=1) - ((residual - theirs) ** 2).sum(axis=1))
        differs = open_rows & (ours[rows, level] != other[rows, level])
        if (gap[differs] > 1e-5).any():
            return False
        open_rows &= ~differs
        residual = residual - mine
    return True


def encoding_rows(items: int, dims: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    vectors = vectors_of(items, dims)
    quantizer = ResidualKMeans(ResidualKMeansConfig(sizes, iterations=5)).fit(vectors[: 100 * max(sizes)])
    codes = quantizer.encode(vectors)
    rows = []
    makers = {"sklearn KMeans.predict per level": sklearn_encoder, "torch.cdist per level": torch_encoder}
    for name, make in makers.items():
        encode = make(quantizer)
        other = encode(vectors)
        equal = same_but_for_ties(quantizer, vectors, codes, other)
        ours_s, baseline_s = best_times(lambda: quantizer.encode(vectors), lambda encode=encode: encode(vectors))
        label = f"encode {items} x {dims}, {'-'.join(map(str, sizes))}"
        differing = int((codes != other).any(axis=1).sum())
        rows.append(row(label, name, ours_s, baseline_s, equal, rows_differing=differing))
    return rows


def grouped_by_dict(sids: SemanticIds) -> dict[tuple[int, ...], list[int]]:
    """Code → item rows, most popular first, then by id."""
    groups = defaultdict(list)
    for item, code in enumerate(sids.codes.tolist()):
        groups[tuple(code)].append(item)
    order = {code: sorted(rows, key=lambda r: (-sids.popularity[r], sids.item_ids[r])) for code, rows in groups.items()}
    return dict(sorted(order.items()))


def grouping_row(items: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    names = [f"item-{n}" for n in draw.permutation(items)]
    codes, popularity = draw.integers(0, 64, (items, 3)), draw.integers(0, 50, items)

    def fresh() -> SemanticIds:
        return SemanticIds(names, codes, (64, 64, 64), popularity)

    leaf_codes, offsets, rows = fresh().paths()
    expected = grouped_by_dict(fresh())
    equal = [tuple(code) for code in leaf_codes.tolist()] == list(expected)
    equal = equal and rows.tolist() == [item for group in expected.values() for item in group]
    ours_s, baseline_s = best_times(lambda: fresh().paths(), lambda: grouped_by_dict(fresh()))
    return row(f"group {items} items by code", "dict of sorted lists", ours_s, baseline_s, equal)


def row(name: str, baseline: str, ours_s: float, baseline_s: float, equal: bool, **more: Any) -> dict[str, Any]:
    ratio = round(baseline_s / ours_s, 3)
    timed = {"ours_s": round(ours_s, 5), "baseline_s": round(baseline_s, 5), "ratio": ratio, "equal": bool(equal)}
    return {"name": name, "baseline": baseline} | timed | more


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, well under 5 minutes on 2 cores")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(argv)
    items = 50_000 if options.quick else 500_000
    rows = []
    for dims, sizes in ((64, (256, 256, 256)), (256, (1024, 512, 256))):
        rows += encoding_rows(items, dims, sizes)
    rows.append(grouping_row(items))
    result = {"machine": machine(), "rows": rows}
    for entry in rows:
        print(f"{entry['name']}: {entry['ratio']:.2f}x against {entry['baseline']}, equal: {entry['equal']}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
