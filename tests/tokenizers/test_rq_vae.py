"""RQ-VAE, RQ-KMeans+ and FSQ: identities, a plain loop as second implementation, resuming, and options that must act."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from quantizer_data import clusters, nearest_by_hand, relative_error

from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.quantizers import training as quantizer_training
from sidtune.tokenizers.quantizers.base import load_quantizer
from sidtune.tokenizers.quantizers.fsq import Fsq, FsqConfig
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.quantizers.rq_kmeans_plus import RqKMeansPlus, RqKMeansPlusConfig
from sidtune.tokenizers.quantizers.rq_vae import RqVae, RqVaeConfig

pytestmark = pytest.mark.medium

SMALL = {"level_sizes": (16, 8, 8), "batch_size": 256, "epochs": 6, "hidden": (32,), "device": "cpu"}


def vae(**options) -> RqVae:
    return RqVae(RqVaeConfig(**{**SMALL, "latent_dims": 8, **options}))


def test_codes_are_argmin_in_the_latent_space_and_batches_do_not_matter():
    vectors = clusters()
    quantizer = vae().fit(vectors)
    codes, residual = quantizer.encode(vectors), quantizer.latent(vectors)
    assert codes.dtype == np.int32 and quantizer.dims == 20
    for level, book in enumerate(quantizer.codebooks):
        np.testing.assert_array_equal(codes[:, level], nearest_by_hand(residual, book))
        residual = residual - book[codes[:, level]]
    np.testing.assert_array_equal(np.concatenate([quantizer.encode(row[None]) for row in vectors[:60]]), codes[:60])
    whole = sum(book[codes[:, level]] for level, book in enumerate(quantizer.codebooks))
    with torch.no_grad():
        by_hand = quantizer.module.decode(torch.from_numpy(whole)).numpy() * quantizer._scale + quantizer._mean
    np.testing.assert_allclose(quantizer.decode(codes), by_hand, atol=1e-4)


def test_losses_equal_a_plain_implementation():
    vectors = clusters(200)
    quantizer = vae(epochs=0).fit(vectors)
    module = quantizer.module.train()
    x = torch.from_numpy(((vectors - quantizer._mean) / quantizer._scale).astype(np.float32))
    losses, codes = module.losses(x, torch.arange(200), torch.Generator())
    z = module.encoder(x)
    residual, total, expected = z, 0, {"commitment": 0.0, "codebook": 0.0}
    for level, book in enumerate(module.books):
        chosen = torch.cdist(residual, book).argmin(dim=1)
        assert (chosen == codes[:, level]).all()
        expected["commitment"] += 0.25 * ((residual - book[chosen]) ** 2).mean()
        expected["codebook"] += ((residual - book[chosen]) ** 2).mean()
        total, residual = total + book[chosen], residual - book[chosen]
    expected["reconstruction"] = ((module.decoder(total) - x) ** 2).mean()
    assert set(losses) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-4, atol=1e-6)
    # The codebook term moves the books alone, the commitment term the encoder alone.
    module.zero_grad()
    losses["codebook"].backward(retain_graph=True)
    assert module.books[0].grad.abs().sum() > 0 and module.encoder[0].weight.grad is None
    module.zero_grad()
    losses["commitment"].backward(retain_graph=True)
    assert module.encoder[0].weight.grad.abs().sum() > 0 and module.books[0].grad is None
    module.zero_grad()
    losses["reconstruction"].backward()
    assert module.encoder[0].weight.grad.abs().sum() > 0 and module.decoder[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient": "rotation"}, {"ema_decay": 0.9}, {"sinkhorn_levels": (-1,)}, {"kmeans_start": False}],
)
def test_training_lowers_the_reconstruction_error(options):
    vectors = clusters()
    before = vae(**options, epochs=1, learning_rate=1e-9).fit(vectors)
    quantizer = vae(**options, epochs=25, learning_rate=3e-3).fit(vectors)
    error = relative_error(vectors, quantizer.decode(quantizer.encode(vectors)))
    assert error < 0.8 and error < 0.85 * relative_error(vectors, before.decode(before.encode(vectors)))
    curve = [line["reconstruction"] for line in quantizer.curves]
    assert len(curve) == 25 and curve[-1] < curve[0]
    # Dropout and Sinkhorn aside, the curve is the error of the codes themselves.
    if "sinkhorn_levels" not in options:
        assert curve[-1] == pytest.approx(error, rel=0.1)


def test_rotation_changes_what_is_learned_and_sinkhorn_evens_the_level():
    vectors = clusters()
    plain, turned = vae().fit(vectors), vae(gradient="rotation").fit(vectors)
    assert not np.allclose(plain.codebooks[0], turned.codebooks[0])
    module = vae(sinkhorn_levels=(-1,), epochs=0).fit(vectors).module
    residual = torch.from_numpy(clusters(512, dims=8)) + 1.0
    module.train()
    even = torch.bincount(module.choose(residual, 2), minlength=8)
    module.eval()
    free = torch.bincount(module.choose(residual, 2), minlength=8)
    assert even.max() <= 80 and free.max() > 1.5 * even.max()


def test_ema_books_move_to_the_mean_of_their_latents():
    vectors = clusters(300)
    module = vae(ema_decay=0.5, epochs=0).fit(vectors).module.train()
    module.ema_count_0.zero_()
    module.ema_sum_0.zero_()
    residual = torch.randn(40, 8)
    chosen = torch.randint(0, 4, (40,))
    untouched = module.books[0][9].clone()
    module._move_by_ema([(residual, chosen)])
    for code in range(4):
        torch.testing.assert_close(module.books[0][code].data, residual[chosen == code].mean(dim=0))
    torch.testing.assert_close(module.books[0][9].data, untouched.data)
    second, again = torch.randn(40, 8), torch.zeros(40, dtype=torch.int64)
    old_sum, old_count = module.ema_sum_0[0].clone(), module.ema_count_0[0].clone()
    module._move_by_ema([(second, again)])
    expected = (0.5 * old_sum + 0.5 * second.sum(dim=0)) / (0.5 * old_count + 20)
    torch.testing.assert_close(module.books[0][0].data, expected)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_dead_codes_are_revived(ema):
    vectors = clusters()

    class Far(RqVae):
        def _prepare(self, vectors, side):
            super()._prepare(vectors, side)
            start = self.module.start

            def crowded(data):
                start(data)
                self.module.books[0].data[4:] += 100.0  # nobody comes here
                if ema:
                    self.module.ema_sum_0[4:] += 100.0 * self.module.ema_count_0[4:, None]

            self.module.start = crowded

    options = {**SMALL, "latent_dims": 8, "epochs": 2, "ema_decay": ema}
    left = Far(RqVaeConfig(**options, revive=False)).fit(vectors)
    alive = Far(RqVaeConfig(**options)).fit(vectors)
    assert len(np.unique(left.encode(vectors)[:, 0])) <= 4 and "revived" not in left.curves[0]
    assert alive.curves[0]["revived"] >= 12 and alive.curves[0]["used"][0] <= 0.25
    assert len(np.unique(alive.encode(vectors)[:, 0])) >= 12


def test_alignment_pulls_codes_to_the_collaborative_vectors(tmp_path):
    """Items of one collaborative group share codes more often with the term than without; groups are not in the text."""
    vectors, draw = clusters(600), np.random.default_rng(1)
    group = draw.integers(0, 4, size=600)
    vectors[:, :4] = 0.3 * np.eye(4)[group]  # a weak trace of the group
    side = (3 * np.eye(6)[group] + 0.1 * draw.normal(size=(600, 6))).astype(np.float32)

    def agreement(quantizer):
        first = quantizer.encode(vectors)[:, 0]
        same = group[:, None] == group
        match = first[:, None] == first
        return match[same].mean() / match.mean()

    options = {"epochs": 25, "learning_rate": 3e-3}
    with_term = vae(**options, alignment_weight=1.0).fit(vectors, side=side)
    assert agreement(with_term) > 1.2 * agreement(vae(**options).fit(vectors))
    assert with_term.curves[-1]["alignment"] < with_term.curves[0]["alignment"]
    np.save(tmp_path / "side.npy", side)
    by_path = vae(**options, alignment_weight=1.0, collaborative_path=str(tmp_path / "side.npy")).fit(vectors)
    np.testing.assert_array_equal(by_path.encode(vectors), with_term.encode(vectors))
    by_path.save_pretrained(tmp_path / "q")
    (tmp_path / "side.npy").unlink()
    np.testing.assert_array_equal(load_quantizer(tmp_path / "q").encode(vectors), by_path.encode(vectors))
    with pytest.raises(ConfigError, match="needs collaborative vectors"):
        vae(alignment_weight=1.0).fit(vectors)
    with pytest.raises(DataError, match="599 collaborative vectors for 600"):
        vae(alignment_weight=1.0).fit(vectors, side=side[1:])
    with pytest.raises(ConfigError, match="alignment_weight is 0"):
        vae().fit(vectors, side=side)


def test_diversity_term_is_recorded_and_acts():
    vectors = clusters(400)
    plain = vae(epochs=4).fit(vectors)
    spread = vae(epochs=4, diversity_weight=0.5, diversity_clusters=3).fit(vectors)
    assert spread.curves[-1]["diversity"] < spread.curves[0]["diversity"] and "diversity" not in plain.curves[0]
    assert not np.allclose(plain.codebooks[0], spread.codebooks[0])


def test_rq_kmeans_plus_starts_as_residual_kmeans_and_ends_better():
    vectors = clusters()
    options = {"level_sizes": (16, 8, 8), "batch_size": 256, "hidden": (32,), "device": "cpu"}
    start = RqKMeansPlus(RqKMeansPlusConfig(**options, epochs=0)).fit(vectors)
    scaled = ((vectors - start._mean) / start._scale).astype(np.float32)
    kmeans = ResidualKMeans(ResidualKMeansConfig(level_sizes=(16, 8, 8), max_points_per_centroid=256)).fit(scaled)
    codes = start.encode(vectors)
    np.testing.assert_array_equal(codes, kmeans.encode(scaled))
    for ours, theirs in zip(start.codebooks, kmeans.codebooks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    errors = [relative_error(vectors, start.decode(codes[:, :n])) for n in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2] == pytest.approx(relative_error(scaled, kmeans.decode(codes)), rel=1e-4)
    trained = RqKMeansPlus(RqKMeansPlusConfig(**options, epochs=30, learning_rate=1e-3)).fit(vectors)
    assert relative_error(vectors, trained.decode(trained.encode(vectors))) < 0.97 * errors[2]


@pytest.mark.parametrize("hidden", [(), (20,), (40, 24)])
def test_a_pca_start_is_residual_kmeans_of_the_principal_components(hidden):
    """Untrained: the error is what the components leave out plus what k-means of the components leaves, to the last digits."""
    vectors = clusters(500)
    options = {"level_sizes": (16, 8), "hidden": hidden, "latent_dims": 8, "epochs": 0, "start": "pca", "device": "cpu"}
    quantizer = RqVae(RqVaeConfig(**options)).fit(vectors)
    standard = ((vectors - quantizer._mean) / quantizer._scale).astype(np.float64)
    components = np.linalg.svd(standard - standard.mean(axis=0), full_matrices=False)[2][:8]
    latent = quantizer.latent(vectors)
    np.testing.assert_allclose(np.abs(latent), np.abs(standard @ components.T), atol=2e-4)
    codes = quantizer.encode(vectors)
    found = (quantizer.decode(codes) - quantizer._mean) / quantizer._scale
    books = quantizer.codebooks
    lost = ((standard - standard @ components.T @ components) ** 2).sum()
    coded = ((latent - books[0][codes[:, 0]] - books[1][codes[:, 1]]) ** 2).sum()
    np.testing.assert_allclose(((standard - found) ** 2).sum(), lost + coded, rtol=1e-4)
    trained = RqVae(RqVaeConfig(**{**options, "epochs": 15})).fit(vectors)
    assert error_of(trained, vectors) < error_of(quantizer, vectors)


def error_of(quantizer, vectors):
    return float(((vectors - quantizer.decode(quantizer.encode(vectors))) ** 2).sum())


def test_a_pca_start_without_room_is_refused():
    with pytest.raises(ConfigError, match="at least 16 wide"):
        RqVaeConfig(latent_dims=8, hidden=(15,), start="pca")
    with pytest.raises(ConfigError, match="one of 'random', 'pca'"):
        RqVaeConfig(start="best")
    with pytest.raises(ConfigError, match="by definition"):
        RqKMeansPlusConfig(start="pca")


def test_fsq_codes_are_grid_numbers_by_hand():
    vectors = clusters(300)
    quantizer = Fsq(FsqConfig(grids=((5, 4), (3, 2, 2)), hidden=(16,), epochs=8, batch_size=64, device="cpu")).fit(
        vectors
    )
    assert quantizer.level_sizes == (20, 12) and [book.shape for book in quantizer.codebooks] == [(20, 5), (12, 5)]
    codes = quantizer.encode(vectors)
    module = quantizer._exact
    with torch.no_grad():
        z = module.encoder(torch.from_numpy((vectors - quantizer._mean) / quantizer._scale)).numpy()
    grids, digits = [5, 4, 3, 2, 2], []
    for column, points in enumerate(grids):
        reach, offset = (points - 1) * 1.001 / 2, 0.5 if points % 2 == 0 else 0.0
        value = np.round(np.tanh(z[:, column] + np.arctanh(offset / reach)) * reach - offset)
        digits.append(value + points // 2)
        assert digits[-1].min() >= 0 and digits[-1].max() < points
    np.testing.assert_array_equal(codes[:, 0], digits[0] + 5 * digits[1])
    np.testing.assert_array_equal(codes[:, 1], digits[2] + 3 * digits[3] + 6 * digits[4])
    # Decoding: every code is one point of the product grid, all different.
    for book, columns in zip(quantizer.codebooks, ([0, 1], [2, 3, 4]), strict=True):
        assert len(np.unique(book, axis=0)) == len(book)
        assert np.abs(np.delete(book, columns, axis=1)).max() == 0
    scaled = np.stack([(digits[n] - grids[n] // 2) / (grids[n] // 2) for n in range(5)], axis=1)
    with torch.no_grad():
        expected = module.decoder(torch.from_numpy(scaled)).numpy() * quantizer._scale + quantizer._mean
    np.testing.assert_allclose(quantizer.decode(codes), expected, atol=1e-5)
    assert quantizer.curves[-1]["reconstruction"] < quantizer.curves[0]["reconstruction"]
    errors = [relative_error(vectors, quantizer.decode(codes[:, :n])) for n in (1, 2)]
    assert errors[1] < errors[0]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: vae(checkpoint_every=2, diversity_weight=0.1, diversity_clusters=3),
        lambda: vae(checkpoint_every=2, ema_decay=0.9, gradient="rotation"),
        lambda: Fsq(FsqConfig(hidden=(16,), epochs=6, batch_size=256, checkpoint_every=2, device="cpu")),
    ],
)
def test_a_resumed_run_ends_as_one_that_never_stopped(make, tmp_path, monkeypatch):
    vectors = clusters(700)
    whole = make().fit(vectors)
    real, count = quantizer_training.NeuralQuantizer._epoch, []

    def interrupted(self, epoch, *rest):
        if epoch == 5:
            raise Stopped
        count.append(epoch)
        return real(self, epoch, *rest)

    monkeypatch.setattr(quantizer_training.NeuralQuantizer, "_epoch", interrupted)
    with pytest.raises(Stopped):
        make().fit(vectors, checkpoint=tmp_path / "state")
    monkeypatch.setattr(quantizer_training.NeuralQuantizer, "_epoch", real)
    resumed = make().fit(vectors, checkpoint=tmp_path / "state")
    assert count == [0, 1, 2, 3, 4] and resumed.curves == whole.curves
    for key, value in whole._tensors().items():
        np.testing.assert_array_equal(resumed._tensors()[key], value, err_msg=key)
    # A finished run is not trained again.
    monkeypatch.setattr(quantizer_training.NeuralQuantizer, "_epoch", interrupted)
    done = make()
    done.config.checkpoint = str(tmp_path / "state")  # the way of a YAML file
    done.fit(vectors)
    assert done.curves == whole.curves and count == [0, 1, 2, 3, 4]


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    vectors = clusters(300)
    vae(epochs=1).fit(vectors, checkpoint=tmp_path / "state")
    with pytest.raises(ConfigError, match="differs in vectors; remove it"):
        vae(epochs=1).fit(vectors + 1, checkpoint=tmp_path / "state")
    with pytest.raises(ConfigError, match="differs in epochs; remove it"):
        vae(epochs=2).fit(vectors, checkpoint=tmp_path / "state")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "training.json").write_text("{}")  # as an earlier version left it, or anything else
    with pytest.raises(ConfigError, match="holds no run that can go on"):
        vae(epochs=1).fit(vectors, checkpoint=tmp_path / "mine")
    assert (tmp_path / "mine" / "training.json").exists()


def test_collaborative_vectors_belong_to_what_a_checkpoint_is_of(tmp_path):
    vectors, side = clusters(300), clusters(300)[::-1].copy()
    vae(epochs=1, alignment_weight=0.1).fit(vectors, checkpoint=tmp_path / "state", side=side)
    with pytest.raises(ConfigError, match="differs in side"):
        vae(epochs=1, alignment_weight=0.1).fit(vectors, checkpoint=tmp_path / "state", side=side + 1)


def test_a_checkpoint_that_was_cut_short_is_not_used(tmp_path):
    vectors = clusters(300)
    whole = vae(epochs=2).fit(vectors, checkpoint=tmp_path / "state")
    (tmp_path / "state" / "checkpoints" / "checkpoint-2" / "state.safetensors").write_bytes(b"")
    again = vae(epochs=2).fit(vectors, checkpoint=tmp_path / "state")
    assert again.curves == whole.curves


def test_curves_lie_beside_the_quantizer(tmp_path):
    quantizer = vae(epochs=3).fit(clusters(300))
    quantizer.save_pretrained(tmp_path / "q")
    lines = json.loads((tmp_path / "q" / "curves.json").read_text())
    assert [line["epoch"] for line in lines] == [1, 2, 3] and len(lines[0]["used"]) == 3
    assert lines[0]["loss"] == pytest.approx(sum(lines[0][k] for k in ("reconstruction", "commitment", "codebook")))
    assert load_quantizer(tmp_path / "q").curves == lines


def test_training_leaves_the_global_generator_alone_and_is_seeded():
    vectors = clusters(300)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = vae(epochs=2).fit(vectors)
    torch.testing.assert_close(torch.rand(3), expected)
    np.testing.assert_array_equal(vae(epochs=2).fit(vectors).encode(vectors), first.encode(vectors))
    assert (vae(epochs=2, seed=1).fit(vectors).encode(vectors) != first.encode(vectors)).any()


def test_dropout_is_off_when_encoding():
    vectors = clusters(300)
    quantizer = vae(epochs=2, dropout=0.5).fit(vectors)
    codes = quantizer.encode(vectors)
    np.testing.assert_array_equal(quantizer.encode(vectors), codes)
    np.testing.assert_array_equal(quantizer.decode(codes), quantizer.decode(codes))


def test_scale_of_the_vectors_does_not_matter():
    vectors = clusters(300)
    plain, large = vae(epochs=2).fit(vectors), vae(epochs=2).fit(1024 * vectors)
    np.testing.assert_array_equal(plain.encode(vectors), large.encode(1024 * vectors))


def test_diversity_without_clusters_of_several_codes_is_refused():
    with pytest.raises(ConfigError, match=r"diversity_clusters \(16\) must lie below each of level_sizes \[32, 16\]"):
        vae(level_sizes=(32, 16), diversity_weight=0.1, diversity_clusters=16).fit(clusters(100))


def test_options_are_checked(tmp_path):
    for config, options, message in [
        (RqVaeConfig, {"gradient": "gumbel"}, "one of 'straight_through', 'rotation'"),
        (RqVaeConfig, {"sinkhorn_levels": (3,)}, r"\[-3, 3\)"),
        (RqVaeConfig, {"ema_decay": 1.0}, r"\[0, 1\)"),
        (RqVaeConfig, {"learning_rate": 0.0}, "must be positive"),
        (RqVaeConfig, {"hidden": (0,)}, "at least 1"),
        (RqVaeConfig, {"commitment": -1.0}, "at least 0"),
        (RqKMeansPlusConfig, {"latent_dims": 8}, "width of the vectors"),
        (RqKMeansPlusConfig, {"kmeans_start": False}, "by definition"),
        (FsqConfig, {"grids": ((1, 4),)}, "at least 2"),
        (FsqConfig, {"grids": ()}, "at least 2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            config(**options)
    with pytest.raises(DataError, match="no codebooks yet"):
        vae().encode(clusters(10))
    quantizer = vae(epochs=1).fit(clusters(100))
    tensors = quantizer._tensors()
    tensors["module.books.0"] = tensors["module.books.0"][:5]
    with pytest.raises(DataError, match="books.0"):
        vae()._set_tensors(tensors)


@pytest.mark.gpu
def test_training_on_a_gpu_gives_codes_on_the_cpu(tmp_path):
    vectors = clusters()
    quantizer = vae(device="cuda", epochs=10, sinkhorn_levels=(-1,), diversity_weight=1e-3, ema_decay=0.0).fit(
        vectors, checkpoint=tmp_path / "state"
    )
    quantizer.save_pretrained(tmp_path / "q")
    np.testing.assert_array_equal(load_quantizer(tmp_path / "q").encode(vectors), quantizer.encode(vectors))
    assert quantizer.curves[-1]["reconstruction"] < quantizer.curves[0]["reconstruction"]
