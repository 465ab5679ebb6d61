"""The drill of a backbone built from scratch: it learns to sort numbers, and new adapters begin where it reads them."""

import numpy as np
import pytest
import torch

from sidtune.data_builders.post_ranking.text import request_of
from sidtune.models.post_ranking.model import PostRankForCausalLM
from sidtune.models.post_ranking.processor import PostRankProcessor, build_config
from sidtune.models.post_ranking.ranker import PostRanker
from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
from sidtune.trainers.post_ranking.data import field_specs
from sidtune.trainers.post_ranking.drill import drilled, number_lists, start_on_the_line

pytestmark = pytest.mark.medium


@pytest.mark.slow
def test_a_new_backbone_learns_to_sort_in_the_drill(tmp_path):
    """The relevance of a number is its place; a drilled backbone sorts lists it has not seen far better than chance."""
    table = number_lists(500, 4, seed=1)
    for row in range(5):
        one = request_of(table, row, 0)
        values = [float(c["value"][0]) for c in one.candidates]
        assert 3 <= len(values) <= 4 and np.argsort(values).tolist() == np.argsort(one.relevance).tolist()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}
    scratch = {"model_type": "qwen3", "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, **heads}
    tokenizer = train_lm_tokenizer(
        ["Query: Candidates: Rank all candidates, best first:", " A B C D"] * 50, vocab_size=320
    )
    language_model = build_model(scratch, tokenizer, seed=0)
    steps = {"max_steps": 700, "learning_rate": 4e-3, "per_device_train_batch_size": 16}
    quiet = {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 100}
    told = drilled(language_model, tokenizer, 4, tmp_path / "work", 0, **steps, **quiet)
    chance = np.mean([sum(np.log(k) for k in range(2, n + 1)) / (n + 1) for n in (3, 4)])
    assert told["steps"] == 700 and told["main_loss"] < 0.5 * chance  # a model that cannot sort stays at chance
    _check_new_adapters_are_read(language_model, tokenizer, table, told)


def _check_new_adapters_are_read(language_model, tokenizer, table, told):
    """Adapters that start on the line say one number per item, and the drilled model sorts by that number."""
    rows = np.arange(len(table))
    config = build_config(language_model, tokenizer, field_specs(table, rows), table.d_q, d_h=8, adapter="mlp")
    model = PostRankForCausalLM.from_base(language_model, config).eval()
    start_on_the_line(model, told["direction"], told["bias"])
    direction, bias = torch.tensor(told["direction"]), torch.tensor(told["bias"])
    hidden = torch.randn(50, 8)
    soft = model.qia_item.out(hidden).detach() - bias
    numbers = soft @ direction / (direction @ direction)
    assert torch.allclose(soft, numbers[:, None] * direction, atol=1e-5) and numbers.std() > 0
    requests = [request_of(table, int(row), 0) for row in rows[:200]]
    with torch.no_grad():  # an adapter whose number is the value itself, up to the bend of its GELU
        model.qia_item.hidden_bias.fill_(10.0)
        weight = model.qia_item.field_heads[0].weight
        weight.fill_(table.statistics(rows)["item", "value"][1][0])
        model.qia_item.out.weight.copy_(direction[:, None].expand(-1, 8) / 8)
        model.qia_item.out.bias.copy_(bias - 10 * direction)
    found = PostRanker(model, PostRankProcessor(tokenizer, config, max_history=0)).rank(requests, "greedy")
    right = [np.argmax(r.relevance) == order[0] for r, order in zip(requests, found, strict=True)]
    assert np.mean(right) > 0.8
