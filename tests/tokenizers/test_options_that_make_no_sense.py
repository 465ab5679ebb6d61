"""Options that nothing could do with are refused in one sentence when the config is made, before any work; nothing is ignored."""

from __future__ import annotations

import pytest

from sidtune.core.errors import ConfigError
from sidtune.tokenizers.base_models.from_scratch import check_model
from sidtune.tokenizers.base_models.loading import check_dtype
from sidtune.tokenizers.encoders.scratch import check_text_model
from sidtune.tokenizers.registry import COLLISIONS, ENCODERS, QUANTIZERS, made_by
from sidtune.trainers.contrastive.sources import RelevanceConfig, ThresholdConfig

KINDS = {"encoder": ENCODERS, "quantizer": QUANTIZERS, "collisions": COLLISIONS}
TRAINED = ("rq_vae", "rq_kmeans_plus", "fsq")
WRONG = [
    *(("quantizer", name, {"level_sizes": sizes}) for name in ("residual_kmeans", "balanced_kmeans", "rq_vae")
      for sizes in ([], [0], [4, -1], [10**9], [True], [4.5], ["4"], [2] * 27, 4)),
    *(("quantizer", name, {key: value}) for name in TRAINED for key, value in (
        ("epochs", -1), ("epochs", 1.5), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", -1e-3),
        ("learning_rate", "fast"),
        ("weight_decay", -0.1), ("max_grad_norm", 0.0), ("dropout", 1.0), ("dropout", -0.1), ("hidden", [0]), ("hidden", [10**7]),
        ("seed", -1), ("checkpoint_every", 0), ("device", "tpu"))),
    *(("quantizer", "rq_vae", {key: value}) for key, value in (
        ("latent_dims", 0), ("ema_decay", 1.0), ("commitment", -1.0), ("sinkhorn_levels", [3]), ("sinkhorn_epsilon", 0.0),
        ("start", "best"), ("gradient", "none"))),
    *(("quantizer", "fsq", {"grids": grids}) for grids in ([], [[]], [[1]], [[2.5]], [[1000, 1001]], [[2]] * 27)),
    *(("quantizer", "rq_opq", {key: value}) for key, value in (
        ("head_sizes", [0]), ("tail_size", 200), ("tail_parts", 0), ("tail_parts", 24), ("balance", "even"),
        ("rotation_rounds", 0))),
    *(("quantizer", "product_quantizer", {key: value}) for key, value in (("parts", 0), ("parts", 27), ("codes_per_part", 3))),
    *(("quantizer", "balanced_kmeans", {key: value}) for key, value in (("balanced_levels", [3]), ("balance_rounds", -1))),
    *(("encoder", "tfidf_svd", {key: value}) for key, value in (
        ("dims", 0), ("dims", 10**7), ("ngram", [2, 1]), ("ngram", [1]), ("min_df", 0), ("max_df", 0.0), ("max_df", 1.5),
        ("seed", -1),
        ("analyzer", "letters"))),
    *(("encoder", "transformers", {"model": "m", key: value}) for key, value in (
        ("batch_size", 0), ("max_length", 0), ("pooling", "max"), ("dtype", "int8"))),
    ("encoder", "transformers", {}),
    ("encoder", "sentence_transformers", {"model": "m", "batch_size": 0}),
    *(("encoder", "precomputed", options) for options in (
        {}, {"path": "v.npy", "align": "ids"}, {"path": "v.npy", "ids_path": "i.txt"},
        {"path": "v.npy", "align": "rows"})),
    *(("encoder", "keyword_fusion", options) for options in (
        {"base": {"name": "precomputed", "path": "v.npy"}}, {"mining": {"head_per_type": 0}},
        {"pool": "a.tsv", "mining": {"min_views": 2}})),
    ("collisions", "suffix", {"size": 0}),
    ("collisions", "next_nearest", {"capacity": 0}),
    ("collisions", "capacity", {"max_exact_pairs": -1}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "options"), WRONG)
def test_wrong_options_are_one_sentence(kind, name, options):
    with pytest.raises(ConfigError) as told:
        made_by(KINDS[kind], {"name": name, **options}, 0)
    assert "\n" not in str(told.value) and str(told.value).endswith(".")


MODELS = [
    *(("qwen3", {key: value}) for key, value in (
        ("hidden_size", 0), ("hidden_size", 12.5), ("hidden_size", "128"), ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9), ("num_attention_heads", 3),
        ("num_key_value_heads", 0), ("head_dim", 31), ("intermediate_size", -1), ("attention_dropout", 2.0),
        ("initializer_range", -1.0), ("rms_norm_eps", -1.0), ("hidden_act", "nope"), ("max_position_embeddings", 0),
        ("hidden_size", 10**7), ("hiden_size", 8))),
    *(("gpt2", {key: value}) for key, value in (("n_embd", 130), ("n_head", 3), ("n_inner", 0), ("n_layer", 0),
                                                ("resid_pdrop", 1.5))),
    *(("t5", {key: value}) for key, value in (("d_kv", 0), ("d_ff", 0), ("num_decoder_layers", 0), ("dropout_rate", -0.1))),
    *(("bart", {key: value}) for key, value in (("decoder_layers", 0), ("encoder_attention_heads", 3), ("encoder_layerdrop", 1.0))),
    ("qwen9", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields"), MODELS)
def test_models_that_cannot_be_are_one_sentence(kind, fields):
    with pytest.raises(ConfigError) as told:
        check_model({"model_type": kind, **fields}, 400)
    assert "\n" not in str(told.value)


SPREAD = {"t5": "initializer_factor", "mt5": "initializer_factor", "bart": "init_std"}


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2", "t5", "mt5", "bart"])
def test_models_that_can_be_are_taken(kind):
    check_model({"model_type": kind, SPREAD.get(kind, "initializer_range"): 0.0}, 400)


@pytest.mark.parametrize("fields", [
    {"hidden_size": 130}, {"num_attention_heads": 3}, {"num_hidden_layers": 0}, {"hidden_dropout_prob": 1.0},
    {"model_type": "bertt"},
])  # fmt: skip
def test_encoders_that_cannot_be_are_one_sentence(fields):
    with pytest.raises(ConfigError) as told:
        check_text_model(fields, 400)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("make", [
    lambda: check_dtype("bananas"), lambda: check_dtype("int8"), lambda: check_dtype("float8_e4m3fn"), lambda: check_dtype(None),
    lambda: made_by(ENCODERS, {"name": "precomputed", "path": "v.npy", "tensor": "a"}).fit([]),
    lambda: ThresholdConfig(q2q=1.5), lambda: RelevanceConfig(scale=0.0), lambda: RelevanceConfig(count=0),
    lambda: RelevanceConfig(band=-0.1),
])  # fmt: skip
def test_other_options(make):
    with pytest.raises(ConfigError):
        make()
