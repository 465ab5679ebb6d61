"""What every quantizer of the registry must do: one interface, errors ordered as theory says, same codes elsewhere."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
from quantizer_data import clusters, relative_error
from safetensors.numpy import save_file

from sidtune.core.errors import DataError
from sidtune.tokenizers.quantizers.base import Quantizer, load_quantizer, make_quantizer
from sidtune.tokenizers.registry import QUANTIZERS
from sidtune.tokenizers.sids.quality import sid_quality
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.embedding_init import check_codebooks

pytestmark = pytest.mark.medium

SHORT = {"epochs": 25, "learning_rate": 5e-3, "batch_size": 256, "hidden": (32,), "device": "cpu"}
CASES = {
    "residual_kmeans": ("residual_kmeans", {"level_sizes": (16, 16, 16)}),
    "normalized": ("residual_kmeans", {"level_sizes": (16, 16, 16), "normalize_residuals": True}),
    "equal_size": ("balanced_kmeans", {"level_sizes": (16, 16, 16)}),
    "private_code": ("balanced_kmeans", {"level_sizes": (16, 16, 16), "balance": "private_code"}),
    "private_prefix": ("balanced_kmeans", {"level_sizes": (16, 16, 16), "balance": "private_prefix"}),
    "rq_opq": ("rq_opq", {"head_sizes": (16, 16, 16), "tail_size": 16, "rotation_rounds": 3}),
    "rq_opq_private": (
        "rq_opq",
        {"head_sizes": (8, 8, 8), "tail_size": 8, "balance": "private_code", "rotation_rounds": 3},
    ),
    "opq": ("product_quantizer", {"parts": 3, "codes_per_part": 16, "rotation_rounds": 5}),
    "pq": ("product_quantizer", {"parts": 3, "codes_per_part": 16, "rotate": False}),
    "rq_vae": ("rq_vae", {**SHORT, "level_sizes": (16, 16, 16), "latent_dims": 8}),
    "rq_vae_ema": ("rq_vae", {**SHORT, "level_sizes": (16, 16, 16), "latent_dims": 8, "ema_decay": 0.95}),
    "rq_kmeans_plus": ("rq_kmeans_plus", {**SHORT, "level_sizes": (16, 16, 16)}),
    "fsq": ("fsq", {**SHORT, "grids": ((4, 4), (4, 4), (4, 4))}),
}


@pytest.fixture(scope="module")
def fitted() -> tuple[np.ndarray, dict[str, tuple[Quantizer, np.ndarray]]]:
    vectors, made = clusters(), {}
    for case, (name, options) in CASES.items():
        quantizer = make_quantizer(name, options)
        made[case] = quantizer, quantizer.fit_encode(vectors)
    return vectors, made


def test_every_registered_quantizer_is_a_case():
    assert {name for name, _ in CASES.values()} == set(QUANTIZERS)


@pytest.mark.parametrize("case", CASES)
def test_interface(case, fitted):
    vectors, made = fitted
    quantizer, codes = made[case]
    assert codes.shape == (1200, quantizer.depth) and codes.dtype == np.int32 and quantizer.dims == 20
    assert (codes >= 0).all() and (codes < np.array(quantizer.level_sizes)).all()
    if case not in ("equal_size", "rq_opq"):  # equal-size training codes are under a constraint new vectors have not
        np.testing.assert_array_equal(quantizer.encode(vectors), codes)
    check_codebooks(quantizer.codebooks, quantizer.level_sizes, False)
    rebuilt = quantizer.decode(codes)
    assert rebuilt.shape == vectors.shape and rebuilt.dtype == np.float32
    errors = [relative_error(vectors, quantizer.decode(codes[:, :n])) for n in range(1, quantizer.depth + 1)]
    if case != "normalized":
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9
    encoded = quantizer.encode(vectors)
    quality = sid_quality(
        SemanticIds([str(n) for n in range(1200)], encoded, quantizer.level_sizes), vectors, quantizer
    )
    assert quality.relative_error == pytest.approx(relative_error(vectors, quantizer.decode(encoded)), rel=1e-4)
    # Codes of a subset, in another order, are the same rows.
    rows = np.random.default_rng(0).permutation(1200)[:77]
    np.testing.assert_array_equal(quantizer.encode(vectors[rows]), encoded[rows])


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(case, fitted, tmp_path):
    vectors, made = fitted
    quantizer, codes = made[case]
    with pytest.raises(DataError, match="trained on 20"):
        quantizer.encode(vectors[:, :5])
    with pytest.raises(DataError, match="NaN"):
        quantizer.encode(np.full((2, 20), np.nan))
    with pytest.raises(DataError, match="lies outside 0"):
        quantizer.decode(codes + 1000)
    with pytest.raises(DataError, match="integer codes of shape"):
        quantizer.decode(codes.astype(float))
    fresh = make_quantizer(*CASES[case])
    save = functools.partial(fresh.save_pretrained, tmp_path)
    for call in (lambda: fresh.encode(vectors), lambda: fresh.decode(codes), save, lambda: fresh.codebooks):
        with pytest.raises(DataError, match="call fit"):
            call()
    with pytest.raises(DataError):
        fresh._set_tensors({})


def test_errors_are_ordered_as_theory_says(fitted):
    vectors, made = fitted
    error = {case: relative_error(vectors, q.decode(codes)) for case, (q, codes) in made.items()}
    assert error["opq"] < error["pq"]  # the rotation is learned for it
    assert error["residual_kmeans"] < error["opq"]  # whole vectors per level, where a part sees its own columns only
    assert error["residual_kmeans"] < error["equal_size"]  # a constraint costs
    assert error["private_prefix"] < error["private_code"] < error["residual_kmeans"]  # more centroids
    assert error["rq_opq"] < error["equal_size"]  # its head, and two codes more
    assert error["rq_kmeans_plus"] < error["residual_kmeans"]  # it starts there
    assert error["residual_kmeans"] < error["rq_vae"]  # eight latent dimensions and few steps


_ENCODE = """
import sys
import numpy as np
from safetensors.numpy import load_file, save_file
from sidtune.tokenizers.quantizers.base import load_quantizer
from pathlib import Path
vectors = load_file(sys.argv[1])["vectors"]
found = {}
for folder in sorted(Path(sys.argv[2]).iterdir()):
    quantizer = load_quantizer(folder)
    codes = np.concatenate([quantizer.encode(vectors[:1]), quantizer.encode(vectors[1:500]), quantizer.encode(vectors[500:])])
    found[folder.name], found[folder.name + ".decoded"] = codes, quantizer.decode(codes)
save_file(found, sys.argv[3])
"""


def test_same_codes_after_loading_in_another_process(fitted, tmp_path):
    """Another process, another number of threads and other batches."""
    from safetensors.numpy import load_file

    vectors, made = fitted
    vectors = np.concatenate([vectors, 2 * clusters(300, seed=4)])
    save_file({"vectors": vectors}, tmp_path / "vectors.safetensors")
    for case, (quantizer, _) in made.items():
        quantizer.save_pretrained(tmp_path / "quantizers" / case)
    words = [sys.executable, "-c", _ENCODE, "vectors.safetensors", "quantizers", "found.safetensors"]
    threads = {"OMP_NUM_THREADS": "2"} if os.environ.get("OMP_NUM_THREADS") == "1" else {"OMP_NUM_THREADS": "1"}
    subprocess.run(words, cwd=tmp_path, check=True, env=os.environ | threads, timeout=300)
    found = load_file(tmp_path / "found.safetensors")
    for case, (quantizer, _) in made.items():
        codes = quantizer.encode(vectors)
        np.testing.assert_array_equal(found[case], codes, err_msg=case)
        np.testing.assert_allclose(found[case + ".decoded"], quantizer.decode(codes), atol=1e-5, err_msg=case)
        loaded = load_quantizer(tmp_path / "quantizers" / case)
        assert (
            type(loaded) is type(quantizer) and loaded.config == quantizer.config and loaded.curves == quantizer.curves
        )
