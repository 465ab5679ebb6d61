"""Constrained samples against exact enumeration of every SID's probability."""

import itertools
import math

import numpy as np
import pytest
import torch
from decoding_oracles import (
    LEVEL_SIZES,
    MODELS,
    Oracle,
    make_model,
    prompts_of,
    random_codes,
    random_prompts,
    random_token_ids,
)
from scipy.stats import chi2

from sidtune.core.errors import ConfigError, SidtuneError
from sidtune.decoding.sampling import sid_sample
from sidtune.decoding.trie import SidTrie

pytestmark = pytest.mark.medium

CODES, TOKENS = random_codes(1), random_token_ids(2)
TRIE = SidTrie.from_codes(CODES, LEVEL_SIZES).bind(TOKENS)
IDS, MASK = random_prompts(3)
FEW = random_codes(4, items=6)
FEW_TRIE = SidTrie.from_codes(FEW, LEVEL_SIZES).bind(TOKENS)
# A flat model, so that several leaves have a real chance.
HEAT = 6.0


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def exact(model, codes, temperature=1.0):
    """(prompts, leaves) log-probabilities by teacher forcing, leaf order of the trie."""
    oracle = Oracle(model, codes, TOKENS, True, temperature)
    rows = [oracle.exhaustive(prompt) for prompt in prompts_of(IDS, MASK)]
    return np.array([[score for score, _ in sorted(row, key=lambda pair: pair[1])] for row in rows])


def fits(counts, probabilities):
    """Chi-square test of counts; the seeds are fixed, so this either holds or does not."""
    expected = counts.sum() * probabilities
    pooled = expected < 5
    counts = np.append(counts[~pooled], counts[pooled].sum())
    expected = np.append(expected[~pooled], expected[pooled].sum())
    used = expected > 0
    statistic = (((counts - expected) ** 2)[used] / expected[used]).sum()
    return statistic < chi2.ppf(0.999, used.sum() - 1)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_exact(name, temperature, replacement):
    model = make_model(name)
    truth = exact(model, CODES, temperature)
    options = {"num_samples": 12, "temperature": temperature, "replacement": replacement, "generator": seeded()}
    drawn = sid_sample(model, IDS, MASK, trie=TRIE, **options)
    assert drawn.leaves.shape == drawn.log_probs.shape == (len(IDS), 12) and (drawn.leaves >= 0).all()
    np.testing.assert_allclose(
        drawn.log_probs, np.take_along_axis(truth, drawn.leaves.numpy(), 1), atol=3e-5, rtol=3e-6
    )
    np.testing.assert_allclose(drawn.code_log_probs.sum(-1), drawn.log_probs, atol=1e-5)
    oracle = Oracle(model, CODES, TOKENS, True, temperature)
    prompt, path = prompts_of(IDS, MASK)[0], tuple(TRIE.leaf_codes(drawn.leaves[0, 0]).tolist())
    parts = [oracle.children(prompt, path[:level])[path[level]] for level in range(3)]
    np.testing.assert_allclose(drawn.code_log_probs[0, 0], parts, atol=3e-5, rtol=3e-6)


def test_independent_samples_follow_the_distribution():
    model = make_model("qwen3")
    truth = np.exp(exact(model, CODES, HEAT))
    counts = np.zeros_like(truth)
    for seed in range(10):
        options = {"num_samples": 300, "temperature": HEAT, "generator": seeded(seed)}
        leaves = sid_sample(model, IDS, MASK, trie=TRIE, **options).leaves
        counts += np.stack([np.bincount(row, minlength=TRIE.num_leaves) for row in leaves.numpy()])
    assert all(fits(row, p) for row, p in zip(counts, truth, strict=True))
    assert not fits(counts[0], np.roll(truth[0], 1))  # the test can fail


def test_independent_samples_do_not_depend_on_chunks_or_neighbours():
    model = make_model("gpt2")
    whole = sid_sample(model, IDS, MASK, trie=TRIE, num_samples=7, generator=seeded(3))
    chunked = sid_sample(model, IDS, MASK, trie=TRIE, num_samples=7, generator=seeded(3), max_rows=7)
    assert torch.equal(whole.leaves, chunked.leaves)
    other = sid_sample(model, IDS, MASK, trie=TRIE, num_samples=7, generator=seeded(4))
    assert not torch.equal(whole.leaves, other.leaves)


@pytest.fixture(scope="module")
def without():
    """Many samples of 3 of 6 leaves, one prompt per row, and the exact probabilities."""
    model = make_model("qwen3")
    prompt = torch.tensor([prompts_of(IDS, MASK)[0]]).expand(2000, -1)
    drawn = [
        sid_sample(
            model, prompt, trie=FEW_TRIE, num_samples=3, replacement=False, temperature=HEAT, generator=seeded(n)
        )
        for n in range(3)
    ]
    truth = np.exp(exact(model, FEW, HEAT)[0])
    return drawn, truth


def test_samples_without_replacement_are_drawn_one_after_another(without):
    """The sequence of leaves has the probabilities of drawing without putting back (Plackett-Luce)."""
    drawn, p = without
    orders = list(itertools.permutations(range(FEW_TRIE.num_leaves), 3))
    chance = np.array([p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in orders])
    place = {order: n for n, order in enumerate(orders)}
    counts = np.zeros(len(orders))
    for part in drawn:
        for row in part.leaves.tolist():
            counts[place[tuple(row)]] += 1
    assert math.isclose(chance.sum(), 1.0, abs_tol=1e-5)
    assert fits(counts, chance / chance.sum()) and not fits(counts, np.full(len(orders), 1 / len(orders)))


def test_inclusion_probabilities_make_the_estimator_unbiased(without):
    drawn, p = without
    value = 10 * p + np.random.default_rng(0).normal(size=len(p)) / 10
    estimates = []
    for part in drawn:
        weight = np.exp(part.log_probs.double().numpy() - part.inclusion_log_probs().numpy())
        assert (weight > 0).all() and (part.inclusion_log_probs() <= 0).all()
        estimates.append((weight * value[part.leaves.numpy()]).sum(axis=1))
    estimates = np.concatenate(estimates)
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - (p * value).sum()) < 3.5 * error < 0.1
    naive = np.concatenate([value[part.leaves.numpy()].mean(axis=1) for part in drawn])
    # Equal weights are biased, by many of their own standard errors: the test can fail.
    assert abs(naive.mean() - (p * value).sum()) > 8 * naive.std() / math.sqrt(len(naive))


def test_keys_are_gumbel_numbers_and_fall(without):
    drawn, _ = without
    first = torch.cat([part.keys[:, 0] for part in drawn])
    # The largest of all keys is a standard Gumbel number, whatever the model: mean 0.5772, variance pi^2 / 6.
    assert abs(float(first.mean()) - 0.57722) < 4 * math.pi / math.sqrt(6 * len(first))
    assert abs(float(first.var()) - math.pi**2 / 6) < 0.2
    for part in drawn:
        assert (part.keys.diff(dim=1) < 0).all() and (part.threshold < part.keys[:, -1]).all()


@pytest.mark.parametrize("samples", [6, 11])
def test_more_samples_than_leaves_give_every_leaf_once(samples):
    model = make_model("t5")
    leaves = FEW_TRIE.num_leaves
    options = {"num_samples": samples, "replacement": False, "generator": seeded()}
    drawn = sid_sample(model, IDS, MASK, trie=FEW_TRIE, **options)
    assert (drawn.leaves[:, :leaves].sort(dim=1).values == torch.arange(leaves)).all()
    assert (drawn.leaves[:, leaves:] == -1).all() and (drawn.log_probs[:, leaves:] == -torch.inf).all()
    assert (drawn.threshold == -torch.inf).all() and (drawn.inclusion_log_probs()[:, :leaves] == 0).all()
    np.testing.assert_allclose(drawn.log_probs.exp().sum(dim=1), 1.0, atol=1e-5)


def test_an_unlikely_code_is_never_drawn_instead_of_a_likely_one():
    """Far below the float32 resolution of a sum of exponentials the order of the codes must still not matter."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 40
    drawn = sid_sample(model, IDS, MASK, trie=TRIE, num_samples=200, generator=seeded())
    assert (drawn.log_probs > -25).all()
    without = sid_sample(model, IDS, MASK, trie=TRIE, num_samples=30, replacement=False, generator=seeded())
    for row in without.leaves.tolist():
        found = [leaf for leaf in row if leaf >= 0]
        assert len(set(found)) == len(found) == TRIE.num_leaves


def _nan():
    model = make_model("llama")
    model.lm_head.weight.data[TOKENS[3]] = float("nan")
    return model


@pytest.mark.parametrize("replacement", [True, False])
def test_weights_that_are_no_numbers_are_reported(replacement):
    with pytest.raises(SidtuneError, match="NaN"):
        sid_sample(_nan(), IDS, MASK, trie=TRIE, replacement=replacement, num_samples=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"max_rows": 0}, "max_rows"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"num_beams": 3}, "knows no argument 'num_beams'"),
    ],
)
def test_bad_options_end_in_one_sentence(options, words):
    with pytest.raises(ConfigError, match=words):
        sid_sample(make_model("qwen3"), IDS, MASK, trie=TRIE, **options)
    drawn = sid_sample(make_model("qwen3"), IDS, MASK, trie=TRIE, num_samples=1)
    with pytest.raises(ConfigError, match="without replacement"):
        drawn.inclusion_log_probs()
