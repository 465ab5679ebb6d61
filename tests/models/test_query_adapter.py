"""The query-instructed adapter against torch's attention, the paper's formulas and hand-made one-hot vectors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from post_rank_stand_ins import D_Q, FIELDS
from torch.nn.functional import one_hot, scaled_dot_product_attention

from sidtune.core.errors import ConfigError, DataError
from sidtune.models.post_ranking.adapter import MLPAdapter, QueryInstructedAdapter
from sidtune.models.post_ranking.config import FieldSpec, PostRankConfig

ITEM = tuple(spec for spec in FIELDS if spec.side == "item")
PLAIN = tuple(FieldSpec(f"f{n}", "id_embedding", "item", dim) for n, dim in enumerate((4, 6, 3)))


def plain_inputs(rows: int = 5) -> tuple[torch.Tensor, dict]:
    return torch.randn(rows, 8), {spec.name: torch.randn(rows, spec.dim) for spec in PLAIN}


def item_inputs(rows: int = 6) -> tuple[torch.Tensor, dict]:
    fields = {spec.name: torch.randn(rows, spec.dim) for spec in ITEM}
    fields["genre"] = torch.randint(0, 5, (rows, 1)).float()
    fields["sid"] = torch.stack([torch.randint(0, size, (rows,)) for size in (4, 3, 5)], dim=1)
    return torch.randn(rows, D_Q), fields


def by_hand(adapter: QueryInstructedAdapter, x_q: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The paper's formulas on dense inputs (N, d_j), with torch's attention."""

    def matrix(head):
        return head.weight if isinstance(head, torch.nn.Embedding) else head.weight.T

    query = x_q @ adapter.query_head.weight.T
    keys = torch.stack([x @ matrix(h) for h, x in zip(adapter.key_heads, inputs, strict=True)], 1)
    values = torch.stack([x @ matrix(h) for h, x in zip(adapter.value_heads, inputs, strict=True)], 1)
    mixed = scaled_dot_product_attention(query[:, None], keys, values)[:, 0]
    return mixed @ adapter.out.weight.T + adapter.out.bias


def test_equals_torch_attention_on_stacked_heads():
    adapter = QueryInstructedAdapter(PLAIN, 8, 16, 12)
    x_q, fields = plain_inputs()
    torch.testing.assert_close(adapter(x_q, fields), by_hand(adapter, x_q, list(fields.values())), atol=1e-6, rtol=1e-5)


def test_codes_are_one_hot_and_numbers_one_standardised_field():
    adapter = QueryInstructedAdapter(ITEM, D_Q, 16, 12)
    x_q, fields = item_inputs()
    genre = one_hot(fields["genre"][:, 0].long(), 5).float()
    sid = torch.cat([one_hot(fields["sid"][:, n], size) for n, size in enumerate((4, 3, 5))], dim=1).float()
    numbers = torch.cat([(fields["price"] - 3.0) / 2.0, fields["score"]], dim=1)
    dense = [fields["iid"], genre, fields["words"], sid, numbers]
    torch.testing.assert_close(adapter(x_q, fields), by_hand(adapter, x_q, dense), atol=1e-6, rtol=1e-5)
    assert len(adapter.key_heads) == 5


@pytest.mark.parametrize(("fields", "total"), [(PLAIN, 13), (ITEM, 4 + 5 + 6 + 12 + 2)])
def test_parameter_count_is_the_formula(fields, total):
    d_q, d_h, d_llm = 8, 16, 12
    adapter = QueryInstructedAdapter(fields, d_q, d_h, d_llm)
    expected = d_q * d_h + 2 * d_h * total + d_h * d_llm + d_llm
    assert sum(p.numel() for p in adapter.parameters()) == expected


def test_the_query_instructs_only_with_two_fields():
    x_q, fields = plain_inputs()
    adapter = QueryInstructedAdapter(PLAIN[:2], 8, 16, 12)
    one, weights = adapter.attend(x_q, fields)
    other, other_weights = adapter.attend(x_q + 3.0, fields)
    assert (one - other).abs().max() > 1e-3 and (weights - other_weights).abs().max() > 1e-3
    with pytest.warns(UserWarning, match="query has no effect"):
        single = QueryInstructedAdapter(PLAIN[:1], 8, 16, 12)
    torch.testing.assert_close(single(x_q, fields), single(x_q + 3.0, fields), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QueryInstructedAdapter(PLAIN, 8, 16, 12)


@pytest.mark.parametrize("kind", [QueryInstructedAdapter, MLPAdapter])
def test_a_masked_field_has_no_influence(kind):
    adapter = kind(PLAIN, 8, 16, 12)
    x_q, fields = plain_inputs()
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[1, 0] = mask[2, 1] = False
    changed = {**fields, "f0": fields["f0"].clone(), "f1": fields["f1"].clone()}
    changed["f0"][1] = 99.0
    changed["f1"][2, 3] = torch.nan
    full = adapter(x_q, fields)
    out = adapter(x_q, fields, mask)
    torch.testing.assert_close(out, adapter(x_q, changed, mask), rtol=0, atol=0)
    assert (out - full).abs().amax(dim=1).gt(1e-4).tolist() == [False, True, True, False, False]
    # NaN alone says the same as the mask.
    marked = {**fields, "f0": fields["f0"].clone(), "f1": fields["f1"].clone()}
    marked["f0"][1, 2] = marked["f1"][2, 0] = torch.nan
    torch.testing.assert_close(adapter(x_q, marked), out, rtol=0, atol=0)


def test_weights_are_a_distribution_over_present_fields():
    adapter = QueryInstructedAdapter(ITEM, D_Q, 16, 12)
    x_q, fields = item_inputs()
    fields["genre"][0] = -1
    fields["sid"][1, 2] = -1
    fields["words"][2, 0] = torch.nan
    fields["price"][3] = fields["score"][3] = torch.nan
    weights = adapter.attend(x_q, fields)[1]
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    names = list(adapter.reader.names)
    hidden = [
        (0, names.index("genre")),
        (1, names.index("sid")),
        (2, names.index("words")),
        (3, names.index("numeric fields")),
    ]
    expected = torch.ones(6, 5, dtype=torch.bool)
    for row, column in hidden:
        expected[row, column] = False
    assert torch.equal(weights > 0, expected)


def test_one_missing_number_is_read_as_its_mean():
    adapter = QueryInstructedAdapter(ITEM, D_Q, 16, 12)
    x_q, fields = item_inputs()
    gap, mean = ({**fields, "price": fields["price"].clone()} for _ in range(2))
    gap["price"][2], mean["price"][2] = torch.nan, 3.0
    torch.testing.assert_close(adapter(x_q, gap), adapter(x_q, mean), rtol=0, atol=0)


def test_rows_do_not_see_each_other():
    adapter = QueryInstructedAdapter(ITEM, D_Q, 16, 12)
    x_q, fields = item_inputs()
    order = torch.randperm(6)
    out = adapter(x_q, fields)
    moved = adapter(x_q[order], {name: value[order] for name, value in fields.items()})
    torch.testing.assert_close(moved, out[order])
    changed = {name: value.clone() for name, value in fields.items()}
    changed["words"][4] += 1.0
    assert (adapter(x_q, changed) - out).abs().amax(dim=1).gt(0).tolist() == [n == 4 for n in range(6)]


@pytest.mark.parametrize("with_query", [False, True])
def test_mlp_is_one_hidden_layer_on_the_concatenation(with_query):
    adapter = MLPAdapter(PLAIN, 8, 16, 12, with_query=with_query)
    x_q, fields = plain_inputs()
    with torch.no_grad():
        adapter.hidden_bias.normal_()
    heads = [*adapter.field_heads, *([adapter.query_head] if with_query else [])]
    inputs = torch.cat([*fields.values(), *([x_q] if with_query else [])], dim=1)
    hidden = inputs @ torch.cat([head.weight for head in heads], dim=1).T + adapter.hidden_bias
    torch.testing.assert_close(adapter(x_q, fields), adapter.out(torch.nn.functional.gelu(hidden)))
    assert (adapter(x_q + 1, fields) - adapter(x_q, fields)).abs().max().gt(1e-4) == with_query


def test_float32_under_autocast_and_usable_in_bfloat16():
    adapter = QueryInstructedAdapter(ITEM, D_Q, 16, 12)
    x_q, fields = item_inputs()
    out = adapter(x_q, fields)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            adapter(x_q.bfloat16().float(), fields), adapter(x_q.bfloat16(), fields), rtol=0, atol=0
        )
        assert torch.equal(adapter(x_q, fields), out)
    half = adapter.bfloat16()(x_q, fields)
    assert half.dtype == torch.float32 and 0 < (half - out).abs().max() < 0.05


def test_no_rows_give_no_soft_tokens():
    adapter = QueryInstructedAdapter(PLAIN, 8, 16, 12)
    out = adapter(torch.zeros(0, 8), {spec.name: torch.zeros(0, spec.dim) for spec in PLAIN})
    assert out.shape == (0, 12)
    out.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, f: f.pop("words"), "'words' is absent"),
        (lambda q, f: f.update(words=torch.zeros(6, 5)), r"must be \(N, 6\), got \(6, 5\)"),
        (lambda q, f: f["genre"].fill_(5), "code of 5, but its sizes are"),
        (lambda q, f: q.fill_(torch.nan), "holds NaN"),
        (lambda q, f: [f[n][2:3].fill_(-1 if n in ("genre", "sid") else torch.nan) for n in f], r"rows \[2\] have all"),
    ],
)
def test_bad_input_is_one_sentence(change, message):
    x_q, fields = item_inputs()
    change(x_q, fields)
    with pytest.raises(DataError, match=message):
        QueryInstructedAdapter(ITEM, D_Q, 16, 12)(x_q, fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "numerc"}, "did you mean 'numeric'"),
        ({"side": "itm"}, "did you mean 'item'"),
        ({"dim": 0}, "dim of at least 1"),
        ({"size": 3}, "which has no size"),
        ({"kind": "sid", "dim": 2, "size": (4,)}, "one size of at least 1 for each"),
        ({"mean": (1.0, 2.0)}, "one for each number"),
        ({"std": (-1.0,)}, "std not negative"),
        ({"mean": (float("nan"),)}, "must be finite"),
    ],
)
def test_a_wrong_field_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FieldSpec(**{"name": "x", "kind": "numeric", "side": "item", "dim": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user_token_id": 5}, "outside the vocabulary of 50 tokens"),
        ({"user_token_id": 60, "item_token_id": 60}, "must differ"),
        ({"label_token_ids": [3, 3]}, "distinct ids"),
        ({"label_token_ids": [50]}, "distinct ids"),
        ({"adapter": "qiaa"}, "did you mean 'qia'"),
        ({"fields": [{"name": "a", "kind": "numeric", "side": "user"}]}, "no item field"),
        ({"fields": [PLAIN[0], PLAIN[0]]}, "must differ on one side"),
        ({"fields": [{"name": "a", "kind": "numeric", "sid": "user"}]}, "did you mean 'side'"),
        ({"end_token_id": 3}, "a token that is no label"),
    ],
)
def test_a_wrong_config_is_refused(options, message):
    text = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2}
    good = {"text_config": text, "fields": PLAIN, "label_token_ids": [3, 4], "end_token_id": 1}
    assert PostRankConfig(**good).user_token_id == 50
    with pytest.raises(ConfigError, match=message):
        PostRankConfig(**{**good, **options})


def test_config_round_trip_keeps_fields_and_statistics(tmp_path):
    text = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2}
    fields = [FieldSpec("n", "numeric", "item", 2, mean=np.array([0.1, 2]), std=np.array([1.0, 0.0])), ITEM[-1]]
    PostRankConfig(text_config=text, fields=fields, label_token_ids=[3]).save_pretrained(tmp_path)
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, PostRankConfig) and loaded.field_specs == tuple(fields)
