# SPDX-License-Identifier: Apache-2.0
"""Laws as functions: the optimum against its closed form, and with costs that are not 6 FLOPs per
parameter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.types import UserError
from research.scaling.laws import Chinchilla, PowerLaw, closed_form_optimum, fit_power_law, optimum

HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)


def test_loss_of_the_published_law():
    # Chinchilla itself, 70e9 parameters on 1.4e12 tokens: 1.69 + 0.0837 + 0.1631.
    assert HOFFMANN.loss(params=70e9, tokens=1.4e12) == pytest.approx(1.9366, abs=2e-4)


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
    assert found.params == pytest.approx(closed.params, rel=1e-4)
    assert found.loss == pytest.approx(closed.loss, rel=1e-9)


def test_optimum_spends_the_budget_at_the_given_cost():
    def cost(params):
        return 6 * params + 5e6  # a head and attention that small models cannot escape

    best = optimum(HOFFMANN, flops=1e17, flops_per_token=cost)
    assert best.tokens * cost(best.params) == pytest.approx(1e17)
    assert best.params > closed_form_optimum(HOFFMANN, flops=1e17).params
    for factor in (0.97, 1.03):
        params = best.params * factor
        assert HOFFMANN.loss(params=params, tokens=1e17 / cost(params)) > best.loss


def test_no_trade_off_is_refused():
    with pytest.raises(UserError, match="no compute-optimal model size"):
        optimum(Chinchilla(E=2, A=0.0, B=100, alpha=0.3, beta=0.3), flops=1e12)
    with pytest.raises(UserError, match="positive number of FLOPs"):
        optimum(HOFFMANN, flops=0)


def test_power_law_recovered_and_refused():
    x = np.geomspace(1e10, 1e14, 5)
    found = fit_power_law(x, y=3.5 * x**0.47)
    assert found.exponent == pytest.approx(0.47) and found.coefficient == pytest.approx(3.5)
    assert PowerLaw(2.0, 0.5)(16.0) == 8.0
    with pytest.raises(UserError, match="at least 2 distinct"):
        fit_power_law([1.0, 1.0], y=[2.0, 3.0])
    with pytest.raises(UserError, match="positive"):
        fit_power_law([1.0, 2.0], y=[-2.0, 3.0])
