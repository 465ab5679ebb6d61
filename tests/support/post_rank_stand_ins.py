"""Tiny post-ranking models, fields and requests for the tests."""

from __future__ import annotations

import numpy as np
from lm_stand_ins import tiny_model, tiny_tokenizer

from sidtune.data_builders.post_ranking.schema import PostRankRequest
from sidtune.models.post_ranking.config import FieldSpec
from sidtune.models.post_ranking.model import PostRankForCausalLM
from sidtune.models.post_ranking.processor import PostRankProcessor, build_config

D_Q = 8
FIELDS = (
    FieldSpec("uid", "id_embedding", "user", 4),
    FieldSpec("activity", "numeric", "user", 2, mean=(1.0, 2.0), std=(2.0, 0.5)),
    FieldSpec("iid", "id_embedding", "item", 4),
    FieldSpec("genre", "categorical", "item", 1, size=5),
    FieldSpec("price", "numeric", "item", 1, mean=(3.0,), std=(2.0,)),
    FieldSpec("score", "numeric", "item", 1),
    FieldSpec("words", "text_vector", "item", 6),
    FieldSpec("sid", "sid", "item", 3, size=(4, 3, 5)),
)


def item(random: np.random.Generator) -> dict:
    return {
        "iid": random.normal(size=4),
        "genre": random.integers(0, 5),
        "price": random.normal() * 2 + 3,
        "score": random.normal(),
        "words": random.normal(size=6),
        "sid": [random.integers(0, size) for size in (4, 3, 5)],
    }


def request(
    random: np.random.Generator, count: int = 4, history: int = 2, query: str | None = "red pen"
) -> PostRankRequest:
    return PostRankRequest(
        request_id=f"r{random.integers(1 << 30)}",
        query=query,
        query_vector=random.normal(size=D_Q),
        user={"uid": random.normal(size=4), "activity": random.normal(size=2)},
        candidates=[item(random) for _ in range(count)],
        item_ids=[f"i{n}" for n in range(count)],
        relevance=random.integers(1, 6, count).astype(np.float32),
        history=[item(random) for _ in range(history)],
        user_text=[("gender", "f"), ("mean rating", "3.5")],
        item_texts=[[("genre", "drama"), ("price", f"{n}.5")] for n in range(count)],
        history_texts=[[("genre", "comedy")] for _ in range(history)],
    )


def requests(number: int = 3, seed: int = 0, **options) -> list[PostRankRequest]:
    random = np.random.default_rng(seed)
    return [request(random, **options) for _ in range(number)]


def ranker(kind: str = "qwen3", *, tied: bool = True, fields=FIELDS, seed: int = 0, **options):
    """(model, processor) with an untrained language model."""
    language_model, tokenizer = tiny_model(kind, tied, seed), tiny_tokenizer()
    options.setdefault("d_h", 16)
    config = build_config(language_model, tokenizer, fields, D_Q, **options)
    return PostRankForCausalLM.from_base(language_model, config).eval(), PostRankProcessor(tokenizer, config)


def tiny_training(steps: int) -> tuple[dict, dict]:
    """Arguments of one step, and options of `recipes.llm4pr.training.Training` that use them for both."""
    step = {"max_steps": steps, "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 4}
    scratch = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    whole = {"train": "all", "adaptation_trains": "all", "adaptation": step, "post_rank": step}
    return step, {"scratch": scratch, "vocab_size": 320, "d_h": 8, "max_history": 2, **whole}
