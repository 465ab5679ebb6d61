"""No option of a quantizer, an encoder or a treatment of collisions is accepted and ignored: another value gives another result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from sidtune.core.errors import ConfigError
from sidtune.tokenizers.registry import COLLISIONS, ENCODERS, QUANTIZERS, made_by
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

pytestmark = pytest.mark.medium

DRAW = np.random.default_rng(0)
VECTORS = (DRAW.normal(size=(12, 6))[DRAW.integers(0, 12, 160)] + 0.3 * DRAW.normal(size=(160, 6))).astype(np.float32)
SIDE = DRAW.normal(size=(160, 5)).astype(np.float32)
WORDS = ["red", "blue", "green", "steel", "pencil", "pen", "chair", "lamp", "desk", "bottle"]
TEXTS = [" ".join(DRAW.choice(WORDS, 4)) + f" {n % 7}" for n in range(60)] + [""]

# Options that change memory, time or what happens after a stop, and by contract not the result.
SILENT = {"chunk_size", "checkpoint", "checkpoint_every", "device", "revision", "batch_size of encoders"}
TRAINING = {"epochs": 3, "batch_size": 40, "learning_rate": 5e-3, "weight_decay": 0.5, "max_grad_norm": 0.01, "seed": 1}
KMEANS = {
    "level_sizes": [4, 6],
    "iterations": 1,
    "seed": 3,
    "normalize_residuals": True,
    "max_points_per_centroid": 2,
    "restarts": 5,
}
START = {"revive": True, "level_sizes": [6, 170], "hidden": [16], "epochs": 2, "batch_size": 64, "learning_rate": 1e-2}
ALL = {
    "sinkhorn_levels": [-1],
    "alignment_weight": 0.1,
    "diversity_weight": 0.1,
    "diversity_clusters": 2,
    "collaborative_path": "side.npy",
}
RQ_VAE = {
    **{
        "level_sizes": [6, 5],
        "hidden": [24],
        "dropout": 0.4,
        "commitment": 2.0,
        "gradient": "rotation",
        "ema_decay": 0.9,
    },
    **{
        "kmeans_start": False,
        "revive": False,
        "sinkhorn_levels": [0],
        "sinkhorn_epsilon": 0.5,
        "sinkhorn_iterations": 1,
    },
    **{"alignment_weight": 1.0, "collaborative_path": "other.npy", "diversity_weight": 2.0, "diversity_clusters": 3},
}
CASES = {
    "residual_kmeans": ({"level_sizes": [6, 6], "max_points_per_centroid": 20}, KMEANS),
    "balanced_kmeans": (
        {"level_sizes": [6, 6], "max_points_per_centroid": 20},
        {**KMEANS, "balance": "private_code", "balanced_levels": [0, 1], "balance_rounds": 0},
    ),
    "rq_opq": (
        {
            "head_sizes": [5, 4],
            "tail_size": 4,
            "max_points_per_centroid": 10,
            "tail_points_per_centroid": 20,
            "rotation_rounds": 3,
        },
        {
            **{
                "head_sizes": [4, 4],
                "balance": "none",
                "tail_parts": 3,
                "tail_size": 8,
                "rotate": False,
                "rotation_rounds": 40,
            },
            **{
                "iterations": 1,
                "max_points_per_centroid": 2,
                "tail_points_per_centroid": 2,
                "shared_letter": True,
                "seed": 5,
            },
        },
    ),
    "product_quantizer": (
        {"parts": 2, "codes_per_part": 8, "rotation_rounds": 3, "max_points_per_centroid": 10},
        {
            **{"parts": 3, "codes_per_part": 4, "rotate": False, "rotation_rounds": 40, "iterations": 1, "seed": 5},
            "max_points_per_centroid": 2,
        },
    ),
    "rq_vae": ({**START, **ALL, "latent_dims": 4}, {**TRAINING, **RQ_VAE, "latent_dims": 5, "start": "pca"}),
    "rq_kmeans_plus": ({**START, **ALL}, {**TRAINING, **RQ_VAE, "latent_dims": 5, "start": "pca"}),
    "fsq": (
        {"grids": [[3, 3], [3, 2]], "hidden": [16], "epochs": 2, "batch_size": 64},
        {**TRAINING, "grids": [[3, 3], [3, 3]], "hidden": [24], "dropout": 0.4},
    ),
}


def quantized(name: str, options: dict, folder: Path) -> str:
    """All that a quantizer of these options says of the vectors; the sentence where they are refused."""
    np.save(folder / "side.npy", SIDE)
    np.save(folder / "other.npy", SIDE[::-1])
    given = {
        key: str(folder / value) if key == "collaborative_path" and value else value for key, value in options.items()
    }
    try:
        quantizer = made_by(QUANTIZERS, {"name": name, **given})
        codes = quantizer.fit_encode(VECTORS)
    except ConfigError as error:
        return str(error)
    parts = [
        codes,
        quantizer.encode(VECTORS),
        quantizer.decode(codes).round(5),
        *(b.round(5) for b in quantizer.codebooks),
    ]
    return json.dumps([[part.tolist() for part in parts], quantizer.level_letters()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "option"), [(n, o) for n in CASES for o in CASES[n][1]])
def test_an_option_of_a_quantizer_changes_something(name, option, tmp_path):
    base, others = CASES[name]
    assert quantized(name, {**base, option: others[option]}, tmp_path) != quantized(name, base, tmp_path)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_option_of_a_quantizer_has_another_value(name):
    known = {field.name for field in dataclasses.fields(QUANTIZERS.get(name).config_class)}
    assert known == CASES[name][1].keys() | (known & SILENT)


TFIDF = {
    "dims": 3,
    "ngram": [1, 1],
    "min_df": 5,
    "max_df": 0.2,
    "max_terms": 8,
    "analyzer": "char_wb",
    "seed": 4,
    "iterations": 1,
}
FUSION = {
    "base": {"name": "tfidf_svd", "dims": 5}, "pool": "other.tsv", "mining": {"min_views": 3}, "word_boundaries": False, "seed": 2,
}  # fmt: skip
TABLES = {
    "path": "other.npy", "tensor": "b", "align": "row_number", "ids_path": "ids.txt", "normalize": True,
}  # fmt: skip


def encoded(name: str, options: dict, folder: Path) -> str:
    np.save(folder / "v.npy", DRAWN)
    np.save(folder / "other.npy", DRAWN + 1)
    (folder / "pool.tsv").write_text("red\tcolor\npen\tentity\n")
    (folder / "other.tsv").write_text("pen\tcolor\nlamp\tentity\n")
    given = {
        key: str(folder / value) if key in ("path", "pool", "ids_path") else value for key, value in options.items()
    }
    try:
        encoder = made_by(ENCODERS, {"name": name, **given})
        return json.dumps(
            encoder.fit(TEXTS).encode(TEXTS, [str(n) for n in reversed(range(len(TEXTS)))]).round(6).tolist()
        )
    except ConfigError as error:
        return str(error)


DRAWN = DRAW.normal(size=(len(TEXTS), 4)).astype(np.float32)
ENCODER_CASES = {
    "tfidf_svd": ({"dims": 6}, TFIDF),
    "precomputed": ({"path": "v.npy"}, TABLES),
    "keyword_fusion": ({"base": {"name": "tfidf_svd", "dims": 6}, "pool": "pool.tsv"}, FUSION),
}


@pytest.mark.parametrize(("name", "option"), [(n, o) for n in ENCODER_CASES for o in ENCODER_CASES[n][1]])
def test_an_option_of_an_encoder_changes_something(name, option, tmp_path):
    base, others = ENCODER_CASES[name]
    if option == "word_boundaries":
        base = {**base, "pool": "other.tsv"}
    assert encoded(name, {**base, option: others[option]}, tmp_path) != encoded(name, base, tmp_path)
    assert others.keys() == {field.name for field in dataclasses.fields(ENCODERS.get(name).config_class)}


@pytest.mark.parametrize(("name", "options"), [
    ("suffix", {"size": 40}), ("next_nearest", {"capacity": 3}), ("capacity", {"capacity": 3}),
    ("capacity", {"max_exact_pairs": 0}),
])  # fmt: skip
def test_an_option_of_a_treatment_of_collisions_changes_something(name, options):
    quantizer = made_by(QUANTIZERS, {"name": "residual_kmeans", "level_sizes": [4, 40]})
    codes = quantizer.fit_encode(VECTORS)
    sids = SemanticIds([str(n) for n in range(160)], codes, quantizer.level_sizes)
    made = []
    for given in ({}, options):
        method = made_by(COLLISIONS, {"name": name, **given})
        found = method.resolve(sids, VECTORS, quantizer)
        made.append((found.level_sizes, found.codes.tolist(), method.notes))
    assert made[0] != made[1]
    known = {field.name for field in dataclasses.fields(COLLISIONS.get(name).config_class)}
    assert known <= {"size", "capacity", "max_exact_pairs"}
