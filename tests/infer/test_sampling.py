# SPDX-License-Identifier: Apache-2.0
"""Transforms of logits by their definitions, and draws from what they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from research.core.types import UserError
from research.infer import sampling
from research.infer.sampling import (
    NEVER,
    Allowed,
    Below,
    MinP,
    RepetitionPenalty,
    Sampling,
    Temperature,
    TopK,
    TopP,
    drawn,
)

LOGITS = np.array([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0], [0.0, 0.0, 3.0, -2.0, 1.0, 1.0]], np.float32)


def kept(transform, logits=LOGITS, seen=None):
    return np.asarray(transform(jnp.asarray(logits), seen)) > sampling.NEVER / 2


def test_each_transform_keeps_what_its_definition_says():
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(LOGITS), axis=-1))
    np.testing.assert_array_equal(kept(TopK(2)), [[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1]])  # a tie stays whole
    np.testing.assert_array_equal(kept(TopK(99)), np.ones((2, 6)))
    np.testing.assert_array_equal(
        kept(MinP(0.3)), probabilities >= 0.3 * probabilities.max(axis=1, keepdims=True) - 1e-7
    )
    np.testing.assert_array_equal(kept(Allowed((0, 3))), np.tile([1, 0, 0, 1, 0, 0], (2, 1)))
    np.testing.assert_array_equal(kept(Below(4)), np.tile([1, 1, 1, 1, 0, 0], (2, 1)))
    for p in (0.05, 0.5, 0.8, 0.97, 1.0):
        for row, found in zip(probabilities, kept(TopP(p)), strict=True):
            order = np.argsort(-row, kind="stable")
            count = 1 + int(np.sum(np.cumsum(row[order])[:-1] < p))
            assert set(np.flatnonzero(found)) == set(order[:count]), p
    np.testing.assert_allclose(Temperature(0.5)(LOGITS, None), 2 * LOGITS)
    seen = np.zeros((2, 6), bool)
    seen[0, [0, 4]] = True
    wanted = LOGITS.copy()
    wanted[0, [0, 4]] = [2.0 / 1.5, -1.0 * 1.5]
    np.testing.assert_allclose(RepetitionPenalty(1.5)(LOGITS, seen), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        sampling.sampling(),
        sampling.sampling(temperature=0.6, top_k=4, top_p=0.9),
        sampling.sampling(temperature=1.7, min_p=0.1, allowed=(0, 1, 2, 4)),
    ],
    ids=["plain", "temperature, top-k, top-p", "temperature, min-p, allowed"],
)
def test_frequencies_are_those_of_the_distribution(settings):
    """Chi-squared over 20,000 draws, a key for each; nothing is drawn that was left out."""
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.tile(LOGITS[:1], (count, 1))
    tokens, log_probs = jax.jit(settings.draw)(logits, keys, jnp.arange(count))
    expected = np.exp(np.asarray(settings.distribution(jnp.asarray(LOGITS[:1])), np.float64)[0])
    expected /= expected.sum()
    found = np.bincount(np.asarray(tokens), minlength=6)
    possible = expected > 1e-12
    assert found[~possible].sum() == 0
    assert stats.chisquare(found[possible], count * expected[possible]).pvalue > 0.01
    np.testing.assert_allclose(np.exp(log_probs), expected[np.asarray(tokens)], rtol=1e-5)


def test_a_row_is_drawn_by_its_own_key_alone():
    settings = sampling.sampling(temperature=0.9, top_p=0.95)
    keys, index = jax.random.split(jax.random.key(3), 2), jnp.array([4, 7])
    both, _ = settings.draw(jnp.asarray(LOGITS), keys, index)
    for row in range(2):
        alone, _ = settings.draw(jnp.asarray(LOGITS[row : row + 1]), keys[row : row + 1], index[row : row + 1])
        assert alone[0] == both[row]


def test_the_usual_settings_in_the_usual_order():
    found = sampling.sampling(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.1, allowed=(1, 2), vocab_size=6
    )
    kinds = [type(transform) for transform in found.transforms]
    assert kinds == [RepetitionPenalty, Below, Allowed, Temperature, TopK, TopP, MinP] and found.remembers
    assert sampling.sampling(temperature=0) == Sampling(greedy=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Temperature(0.0), "above 0; given 0.0: for the likeliest token choose greedy"),
        (lambda: TopK(0), "top_k must be at least 1"),
        (lambda: TopP(1.5), "top_p must lie above 0 and at most at 1; given 1.5"),
        (lambda: MinP(0.0), "min_p must lie above 0"),
        (lambda: RepetitionPenalty(-1.0), "penalty must be above 0"),
        (lambda: Allowed(()), "at least one id"),
        (lambda: Allowed((9,))(jnp.asarray(LOGITS), None), "id 9 is allowed and the model has 6"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize("size", [2, 264, 400, 511, 1000, 50_000])
def test_what_has_no_weight_is_never_drawn(size):
    """Running sums formed in parallel may step up where there is none: three ids have weight, at ends and inside."""
    rows, ids = 2000, sorted({0, size // 3, size - 1})
    log_probs = np.full((rows, size), NEVER, np.float32)
    log_probs[:, ids] = -np.log(len(ids))
    keys = jax.random.split(jax.random.key(size), rows)
    found = np.bincount(np.asarray(jax.jit(drawn)(keys, log_probs)), minlength=size)
    assert found.sum() == rows == found[ids].sum() and found[ids].min() > rows / len(ids) * 0.85
    rng = np.random.default_rng(size)
    spread = jax.nn.log_softmax(jnp.where(rng.random((rows, size)) < 0.5, rng.normal(size=(rows, size)), NEVER))
    chosen = np.asarray(jax.jit(drawn)(keys, spread))
    assert np.asarray(spread)[np.arange(rows), chosen].min() > -100
