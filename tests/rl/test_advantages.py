# SPDX-License-Identifier: Apache-2.0
# Advantages against their papers' formulas, and what must never happen: groups mixed, residues of equal rewards.

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.core.types import UserError
from research.evals.solve import pass_at
from research.rl.advantages import BatchNormalised, Gae, GroupRelative, LeaveOneOut, Rewarded


def rewarded(rewards, lengths=None, penalties=None, values=None, tokens=5):
    rewards = np.asarray(rewards, np.float64)
    lengths = np.full(rewards.shape, tokens) if lengths is None else np.asarray(lengths)
    mask = (np.arange(tokens) < lengths[..., None]).astype(np.float32)
    return Rewarded(rewards, mask, np.zeros(mask.shape) if penalties is None else penalties, values)


def test_a_group_is_compared_with_itself_alone():
    given = rewarded([[0, 0, 1, 1], [5, 5, 9, 5]])
    std = np.std([0, 0, 1, 1], ddof=1)
    np.testing.assert_allclose(GroupRelative()(given)[0, :, 0], np.array([-0.5, -0.5, 0.5, 0.5]) / (std + 1e-4))
    np.testing.assert_allclose(GroupRelative(std=False)(given)[1, :, 0], [-1, -1, 3, -1])
    np.testing.assert_allclose(LeaveOneOut()(given)[1, :, 0], [5 - 19 / 3, 5 - 19 / 3, 4, 5 - 19 / 3], rtol=1e-6)
    moved = given._replace(rewards=given.rewards + np.array([[0.0], [100.0]]))
    np.testing.assert_allclose(GroupRelative()(moved), GroupRelative()(given), atol=1e-5)


@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_equal_rewards_give_exactly_nothing(value, size):
    """0.1 seven times has a mean that is not 0.1, and over a tiny standard deviation that is not nothing."""
    for advantage in (GroupRelative(), GroupRelative(std=False), LeaveOneOut(), BatchNormalised(baseline=False)):
        assert not advantage(rewarded([[value] * size])).any()


def test_tokens_that_were_not_drawn_have_none():
    given = rewarded([[1, 0], [0, 1]], lengths=[[2, 5], [0, 3]], values=np.ones((2, 2, 5)))
    for advantage in (GroupRelative(), LeaveOneOut(), BatchNormalised(), Gae()):
        found = advantage(given)
        assert found.dtype == np.float32 and not found[given.mask == 0].any() and np.isfinite(found).all()


def test_penalties_lower_the_return_and_count_from_their_token_on():
    penalties = np.zeros((1, 2, 5))
    penalties[0, 0] = [0.1, 0.2, 0.0, 9.0, 9.0]  # the last two are of no token
    given = rewarded([[1.0, 1.0]], lengths=[[3, 5]], penalties=penalties)
    np.testing.assert_allclose(given.returns, [[0.7, 1.0]])
    np.testing.assert_allclose(given.returns_to_go[0, 0], [0.7, 0.8, 1.0, 0, 0])
    np.testing.assert_allclose(GroupRelative(std=False)(given)[0, :, 0], [-0.15, 0.15], rtol=1e-5)
    tokens = given.returns_to_go[given.mask > 0]
    found = BatchNormalised()(given)[given.mask > 0]
    np.testing.assert_allclose(found, (tokens - tokens.mean()) / np.sqrt(tokens.var() + 1e-8), rtol=1e-5)


def test_generalised_advantages_are_the_sums_of_the_paper():
    """Schulman et al. 2016, eq. 16, summed term by term."""
    rng = np.random.default_rng(0)
    lengths, values, penalties = [[5, 2]], rng.normal(size=(1, 2, 5)), rng.normal(size=(1, 2, 5)) / 10
    given = rewarded([[1.0, -2.0]], lengths=lengths, values=values, penalties=penalties)
    gamma, lam = 0.9, 0.8
    found = Gae(gamma, lam).plain(given)
    for sample, length in enumerate(lengths[0]):
        rewards = -penalties[0, sample, :length]
        rewards[-1] += given.rewards[0, sample]
        after = np.append(values[0, sample, 1:length], 0.0)
        delta = rewards + gamma * after - values[0, sample, :length]
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]
        np.testing.assert_allclose(found[0, sample, :length], expected, rtol=1e-5)
    monte_carlo = Gae(1.0, 1.0).plain(given)  # the returns to go, less the values
    np.testing.assert_allclose(monte_carlo, (given.returns_to_go - values) * given.mask, atol=1e-6)
    whitened = Gae(gamma, lam)(given)[given.mask > 0]
    assert abs(whitened.mean()) < 1e-6 and abs(whitened.std() - 1) < 1e-5


def test_pass_at_k_is_the_chance_among_draws_without_replacement():
    """Against all subsets."""
    from itertools import combinations

    for right in range(6):
        draws = [1] * right + [0] * (5 - right)
        for k in (1, 2, 5):
            subsets = list(combinations(draws, k))
            assert abs(pass_at(k, np.array([right]), 5) - np.mean([max(s) for s in subsets])) < 1e-12


def test_mistakes_are_told():
    with pytest.raises(UserError, match="samples to at least 2"):
        LeaveOneOut()(rewarded([[1.0]]))
    with pytest.raises(UserError, match="between 0 and 1"):
        Gae(gamma=2)
    assert not GroupRelative()(rewarded([[1.0]])).any()
