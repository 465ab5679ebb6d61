"""A drill for a backbone built from scratch: sort lists of numbers, before it sees a feature.

LLM4PR asks its language model for something that every pre-trained one can do and a new one cannot: find the items of a list that
stand out, and say their labels in that order. A new transformer has to learn to compare and to copy at once, and neither pays
without the other, so post-ranking begins on a plateau. The drill is post-ranking of random numbers: each candidate is one number,
read by a throw-away adapter, and the answer is their falling order. It knows nothing of the data.

The throw-away adapter is linear, so the drilled model reads numbers on one line of its embedding space, `direction * value + bias`.
`start_on_the_line` lets new adapters begin there: at first the soft token of an item is a single number, and what the model has
learnt about numbers tells the adapter at once which way to move it. Our addition, for backbones from scratch only; the paper
starts from a 7 B model.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankRequest, PostRankTable
from sidtune.data_builders.post_ranking.text import table_from_requests

VALUE = "value"
FEWEST = 3


def number_lists(count: int, most: int, seed: int, d_q: int = 1) -> PostRankTable:
    """`count` requests of 3 to `most` candidates, each a standard normal number; relevance is the number's place from below."""
    draw = np.random.default_rng([seed, 17])
    requests = []
    for place in range(count):
        values = draw.normal(size=int(draw.integers(min(FEWEST, most), most + 1))).astype(np.float32)
        requests.append(
            PostRankRequest(
                request_id=f"drill-{place}",
                query="",
                query_vector=np.zeros(d_q, np.float32),
                user={},
                candidates=[{VALUE: np.array([value])} for value in values],
                item_ids=[str(n) for n in range(len(values))],
                relevance=np.argsort(np.argsort(values)).astype(np.float64),
                history=[],
            )
        )
    fields = (PostRankField(VALUE, "numeric", "item", 1, (VALUE,)),)
    return table_from_requests(requests, fields, d_q, ["train"] * count)


def drilled(language_model: Any, tokenizer: Any, most: int, folder: Path, seed: int, **changes: Any) -> dict:
    """Trains the language model, whole, in place; returns steps, last loss and the line of numbers (`direction`, `bias`).

    Args:
        most: longest list. folder: checkpoints. changes: arguments over `paper_arguments`, for example `max_steps`.
    """
    from sidtune.models.post_ranking.model import PostRankForCausalLM
    from sidtune.models.post_ranking.processor import PostRankProcessor, build_config
    from sidtune.trainers.post_ranking.data import field_specs
    from sidtune.trainers.post_ranking.trainer import learn_to_post_rank, paper_arguments

    table = number_lists(20_000, most, seed)
    rows = np.arange(len(table))
    config = build_config(language_model, tokenizer, field_specs(table, rows), table.d_q, d_h=16, adapter="qia")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one field only: that is what makes this adapter linear
        model = PostRankForCausalLM.from_base(language_model, config)
    model.requires_grad_(True)
    args = paper_arguments(folder, **{"seed": seed, **changes})
    trainer = learn_to_post_rank(
        model, PostRankProcessor(tokenizer, config, max_history=0), table, rows, args, aux=False, shuffle=0.0
    )
    last = next((entry for entry in reversed(trainer.state.log_history) if "main_loss" in entry), {})
    adapter = model.qia_item
    direction = (adapter.out.weight @ adapter.value_heads[0].weight)[:, 0] / adapter.reader._std[0]
    bias = adapter.out.bias - direction * adapter.reader._mean[0]
    line = {"direction": direction.tolist(), "bias": bias.tolist()}
    return {"steps": trainer.state.global_step, "main_loss": last.get("main_loss"), **line}


def start_on_the_line(model: Any, direction: list[float], bias: list[float]) -> None:
    """New adapters begin with soft tokens `direction * value + bias`, the value a small random function of the features.

    Args:
        model: `PostRankForCausalLM` with untrained adapters, changed in place. direction, bias: (d_llm,) of `drilled`.
    """
    import torch

    for adapter in (model.qia_user, model.qia_item):
        if adapter is None:
            continue
        with torch.no_grad():
            out = adapter.out
            value = torch.empty(out.in_features).uniform_(-0.1, 0.1) / out.in_features**0.5
            out.weight.copy_(torch.outer(torch.tensor(direction), value))
            out.bias.copy_(torch.tensor(bias))
