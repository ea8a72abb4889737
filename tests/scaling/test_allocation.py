# SPDX-License-Identifier: Apache-2.0
"""Spending a budget: the search against the closed form, costs that are not 6 FLOPs per parameter, serving, scarce
data."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.types import UserError
from research.scaling import allocation
from research.scaling.allocation import (
    closed_form_optimum,
    constrained,
    lifetime_optima,
    lifetime_optimum,
    optima,
    optimum,
    six_per_param,
)
from research.scaling.laws import HOFFMANN, Chinchilla


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0.5, 3),
    st.floats(5, 2000),
    st.floats(5, 2000),
    st.floats(0.2, 0.6),
    st.floats(0.2, 0.6),
    st.floats(10, 24),
)
def test_search_agrees_with_the_closed_form(E, A, B, alpha, beta, log_flops):
    law = Chinchilla(E=E, A=A, B=B, alpha=alpha, beta=beta)
    closed = closed_form_optimum(law, flops=10**log_flops)
    if not 10 < closed.params < 1e15:
        return
    found = optimum(law, flops=10**log_flops)
    assert found.params == pytest.approx(closed.params, rel=1e-6)
    assert found.loss == pytest.approx(closed.loss, rel=1e-9)


def dear(params):
    return 6 * params + 5e6  # a head and attention that small models cannot escape


def test_optimum_spends_the_budget_at_the_given_cost():
    best = optimum(HOFFMANN, flops=1e17, flops_per_token=dear)
    assert best.tokens * dear(best.params) == pytest.approx(1e17)
    assert best.params > closed_form_optimum(HOFFMANN, flops=1e17).params
    for factor in (0.97, 1.03):
        params = best.params * factor
        assert HOFFMANN.loss(params=params, tokens=1e17 / dear(params)) > best.loss


def test_no_trade_off_is_refused():
    with pytest.raises(UserError, match="no compute-optimal model size.*towards smaller"):
        optimum(Chinchilla(E=2, A=0.0, B=100, alpha=0.3, beta=0.3), flops=1e12)
    with pytest.raises(UserError, match="towards larger"):
        optimum(Chinchilla(E=2, A=100, B=0.0, alpha=0.3, beta=0.3), flops=1e12)
    for flops in (0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="positive number of FLOPs"):
            optimum(HOFFMANN, flops=flops)


def test_many_laws_at_many_budgets():
    many = Chinchilla(
        E=np.full(3, 1.7), A=np.array([300.0, 400, 0]), B=np.full(3, 410), alpha=np.full(3, 0.34), beta=np.full(3, 0.28)
    )
    found = optima(many, flops=np.array([1e18, 1e20]))
    assert found.params.shape == (3, 2) and np.isnan(found.params[2]).all()
    for row, A in enumerate((300.0, 400.0)):
        law = Chinchilla(E=1.7, A=A, B=410, alpha=0.34, beta=0.28)
        np.testing.assert_allclose(found.params[row, 1], closed_form_optimum(law, flops=1e20).params, rtol=1e-6)


def test_the_optimum_s_derivative_is_the_closed_form_s():
    """What profile likelihood goes by: how log N* moves with each of the law's numbers."""

    def searched(law):
        return allocation.log_optimal_params(law, 1e20, cost=six_per_param, others={})

    def closed(law):
        return jax.numpy.log(closed_form_optimum(law, flops=1e20).params)

    with jax.enable_x64(True):
        law = jax.tree.map(jax.numpy.float64, HOFFMANN)
        found, expected = jax.jit(jax.grad(searched))(law), jax.grad(closed)(law)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-5, abs=1e-9)


def test_a_model_that_serves_is_smaller_and_costs_less_in_all():
    found = lifetime_optimum(HOFFMANN, flops=1e21, served=1e12)
    start, best = found.compute_optimal, found.best
    assert best.params < start.params and best.tokens > start.tokens
    assert HOFFMANN.loss(params=best.params, tokens=best.tokens) == pytest.approx(start.loss, rel=1e-9)
    assert found.flops == pytest.approx(6 * best.params * best.tokens + 2 * best.params * 1e12)
    assert 0 < found.saved == 1 - found.flops / found.compute_optimal_flops
    for factor in (0.97, 1.03):  # no other size of the same loss costs less
        params = best.params * factor
        tokens = (410.7 / (start.loss - 1.69 - 406.4 / params**0.34)) ** (1 / 0.28)
        assert 6 * params * tokens + 2 * params * 1e12 > found.flops
    little = lifetime_optimum(HOFFMANN, flops=1e21, served=1e6)
    assert little.best.params == pytest.approx(start.params, rel=1e-3) and little.saved < 1e-6
    with pytest.raises(UserError, match="served over a model's life"):
        lifetime_optimum(HOFFMANN, flops=1e21, served=-1)


def test_scarce_tokens_call_for_a_smaller_model_and_some_epochs():
    law = constrained(HOFFMANN)
    plenty = optimum(law, flops=1e21, unique_tokens=1e15)
    assert plenty.params == pytest.approx(closed_form_optimum(HOFFMANN, flops=1e21).params, rel=1e-3)
    scarce = optimum(law, flops=1e21, unique_tokens=2e9)
    assert scarce.params < plenty.params and scarce.loss > plenty.loss and scarce.tokens > 2e9
    for factor in (0.9, 1.1):
        params = scarce.params * factor
        assert law.loss(params=params, tokens=1e21 / (6 * params), unique_tokens=2e9) >= scarce.loss


def test_a_model_that_serves_is_chosen_for_the_corpus_there_is():
    law, unique = constrained(HOFFMANN), 4e9
    found = lifetime_optimum(law, flops=1e21, served=1e12, unique_tokens=unique)
    start, best = found.compute_optimal, found.best
    assert start.tokens > unique and best.params < start.params and best.tokens > start.tokens
    assert law.loss(params=best.params, tokens=best.tokens, unique_tokens=unique) == pytest.approx(start.loss, rel=1e-9)
    fresh = lifetime_optimum(HOFFMANN, flops=1e21, served=1e12)
    assert start.loss > fresh.best.loss  # as good as this corpus allows, not as all new tokens would
    for factor in (0.97, 1.03):  # no other size of the same loss costs less
        tokens = law.tokens_to_reach(start.loss, params=best.params * factor, unique_tokens=unique)
        assert 6 * best.params * factor * (tokens + 1e12 / 3) > found.flops
    plenty = lifetime_optimum(law, flops=1e21, served=1e12, unique_tokens=1e15)
    assert plenty.best.params == pytest.approx(fresh.best.params, rel=1e-3)


def test_tokens_to_reach_a_loss_are_infinite_where_none_are_enough():
    assert HOFFMANN.tokens_to_reach(1.7, params=1e9) == math.inf
    law = constrained(HOFFMANN)
    assert law.tokens_to_reach(2.2, params=1e9, unique_tokens=1e8) == math.inf
    few = law.tokens_to_reach(3.0, params=1e9, unique_tokens=1e12)
    assert few == pytest.approx(HOFFMANN.tokens_to_reach(3.0, params=1e9)) and few < 1e12


def test_many_laws_serve_as_each_alone():
    many = Chinchilla(E=np.full(2, 1.7), A=np.array([300.0, 400]), B=np.full(2, 410), alpha=np.full(2, 0.34), beta=0.28)
    found = lifetime_optima(many, flops=1e20, served=1e11)
    for row, A in enumerate((300.0, 400.0)):
        alone = lifetime_optimum(Chinchilla(E=1.7, A=A, B=410, alpha=0.34, beta=0.28), flops=1e20, served=1e11)
        assert found.params[row] == pytest.approx(alone.best.params, rel=1e-9)
