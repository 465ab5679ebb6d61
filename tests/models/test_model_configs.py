"""Configs that would train nonsense, or hold an option that changes nothing, are one sentence when they are made."""

import math

import pytest
from lm_stand_ins import tiny_tokenizer
from post_rank_stand_ins import ranker, requests

from sidtune.core.errors import ConfigError
from sidtune.models.next_item.network import NextItemConfig
from sidtune.models.post_ranking.files import add_lora
from sidtune.models.post_ranking.processor import PostRankProcessor
from sidtune.models.post_ranking.ranker import PostRanker
from sidtune.recipes.llm4pr.training import Training
from sidtune.recipes.next_item.config import System
from sidtune.tokenizers.base_models.from_scratch import build_model
from sidtune.trainers.next_item.data import NoiseConfig
from sidtune.trainers.next_item.loss import LossConfig
from sidtune.trainers.next_item.trainer import FitSettings

NAN = math.nan


def network(**fields):
    return NextItemConfig(**{"level_sizes": [4, 4], "num_items": 9, **fields})


def training(**fields):
    return Training(**{"train": "all", "adaptation_trains": "all", **fields})


def tuned(**fields):
    return add_lora(ranker()[0], **fields)


def processed(**fields):
    model, processor = ranker()
    return PostRankProcessor(processor.tokenizer, model.config, **fields)


def ranked(batch_size=4, **fields):
    return PostRanker(*ranker(), batch_size=batch_size).rank(requests(1), **fields)


def scratch(**fields):
    return build_model(fields, tiny_tokenizer())


WRONG = [
    *[(network, name, value) for name in ("width", "layers", "heads", "feed_forward") for value in (0, -1, 2.5, "8")],
    *[(network, "dropout", value) for value in (1.0, -0.1, NAN)],
    *[(network, "network", "t6"), (network, "heads", 3), (network, "tied", "no")],
    *[(lambda **f: network(network="t5", **f), "head_dim", value) for value in (0, -4)],
    (lambda **f: network(network="t5", **f), "heads", 3),
    *[(make, "dropout", value) for make in (tuned, lambda **f: Training(backbone="x", lora=f)) for value in (1.0, NAN)],
    *[(make, "r", value) for make in (tuned, lambda **f: Training(backbone="x", lora=f)) for value in (0, 1.5)],
    *[(tuned, "alpha", 0), (tuned, "targets", ["q_prj"])],
    *[
        (training, "aux_weight", NAN),
        (training, "d_h", 0),
        (training, "shuffle", NAN),
        (training, "max_candidates", 27),
    ],
    *[(training, "lora", {"r": 4}), (lambda **f: training(words=True, **f), "query", "personal")],
    *[(ranker, "aux_weight", value) for value in (NAN, -1.0, math.inf)],
    *[(ranker, "d_h", value) for value in (0, 1.5)],
    *[(processed, "max_history", -1), (processed, "max_history", 1.5), (processed, "max_chars", 0)],
    *[(ranked, "num_beams", 0), (ranked, "batch_size", 0), (ranked, "seed", -1)],
    *[(scratch, "hidden_size", 0), (scratch, "num_attention_heads", 3), (scratch, "attention_dropout", 1.0)],
    *[(FitSettings, "args", {name: -1}) for name in ("num_train_epochs", "learning_rate", "warmup_steps")],
    *[(FitSettings, "args", {"label_smoothing_factor": 0.1}), (FitSettings, "patience", 0)],
    *[(LossConfig, "ahead", NAN), (LossConfig, "softmax", "tree"), (LossConfig, "temperature", 0.5)],
    *[(NoiseConfig, "codes", NAN), (NoiseConfig, "shared_levels", 1)],
]


@pytest.mark.parametrize(("make", "name", "value"), WRONG, ids=[f"{n}={v}-{k}" for k, (_, n, v) in enumerate(WRONG)])
def test_nonsense_is_one_sentence_that_names_the_option(make, name, value):
    with pytest.raises(ConfigError) as told:
        make(**{name: value})
    said = str(told.value)
    assert said.endswith((".", "?")) and "\n" not in said
    assert (
        next(iter(value)) if isinstance(value, dict) and name == "args" else name if name != "targets" else "q_prj"
    ) in said


@pytest.mark.parametrize(
    "fields", [{"causal_encoder": False}, {"network": "tokens", "code_layers": 2}, {"network": "tokens", "head_dim": 8}]
)
def test_an_option_of_another_network_is_refused(fields):
    with pytest.raises(ConfigError, match=f"{list(fields)[-1]} is for"):
        System(network={"width": 16, "heads": 2, **fields}).check("systems.a")
