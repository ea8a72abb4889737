# SPDX-License-Identifier: Apache-2.0
"""Laws as functions: published values, what one law has in common with another, numbers that may be arrays."""

import jax
import numpy as np
import pytest

from research.core.types import UserError
from research.scaling import laws
from research.scaling.laws import CLARK_S_BASE, HOFFMANN, KAPLAN, KRAJEWSKI, MUENNIGHOFF, PowerLaw, fit_power_law


def test_loss_of_the_published_law():
    # Chinchilla itself, 70e9 parameters on 1.4e12 tokens: 1.69 + 0.0837 + 0.1631.
    assert HOFFMANN.loss(params=70e9, tokens=1.4e12) == pytest.approx(1.9366, abs=2e-4)


@pytest.mark.parametrize(("params", "tokens", "loss"), [(6.34e9, 242e9, 2.2256440890), (8.67e9, 178e9, 2.2269634075)])
def test_data_constrained_vectors(params, tokens, loss):
    assert MUENNIGHOFF.loss(params=params, tokens=tokens, unique_tokens=25e9) == pytest.approx(loss, abs=1e-9)


def test_tokens_that_do_not_repeat_are_worth_themselves():
    params, tokens = 1e9, 20e9
    law = MUENNIGHOFF.fresh
    assert MUENNIGHOFF.loss(params=1e8, tokens=tokens, unique_tokens=1e12) == pytest.approx(
        law.loss(params=1e8, tokens=tokens), rel=1e-12
    )
    losses = [MUENNIGHOFF.loss(params=params, tokens=tokens, unique_tokens=u) for u in (1e9, 4e9, 2e10, 4e10)]
    assert losses[0] > losses[1] > losses[2] == losses[3]


def test_repetition_saturates():
    """However often, a corpus is worth at most 1 + R_D times its size."""
    _, tokens = MUENNIGHOFF.effective(params=1e9, tokens=1e15, unique_tokens=1e9)
    assert tokens == pytest.approx(1e9 * (1 + MUENNIGHOFF.R_D), rel=1e-6)


def test_kaplan_s_limits():
    """Without a limit on tokens the loss is (N_c / N)^alpha_N, without one on params (D_c / D)^alpha_D."""
    assert KAPLAN.loss(params=1e8, tokens=1e30) == pytest.approx((6.4e13 / 1e8) ** 0.076, rel=1e-6)
    assert KAPLAN.loss(params=1e40, tokens=1e10) == pytest.approx((1.8e13 / 1e10) ** 0.103, rel=1e-6)


def test_over_training_is_chinchilla_s_law_with_equal_exponents():
    law = laws.OverTraining(E=1.8, a=150.0, b=200.0, eta=0.14)
    for params, tokens in ((1e8, 1e9), (1e9, 3e11)):
        expected = law.as_chinchilla().loss(params=params, tokens=tokens)
        assert law.loss(params=params, tokens=tokens) == pytest.approx(expected, rel=1e-12)
    # at a constant ratio of tokens to params the reducible loss is a power law in compute: its exponent is eta
    ratio = [law.loss(params=p, tokens=50 * p) - law.E for p in (1e7, 1e9)]
    assert np.log(ratio[0] / ratio[1]) / np.log(1e4) == pytest.approx(law.eta)


def test_experts_of_clark():
    assert CLARK_S_BASE.effective_experts(1.0) == pytest.approx(1.847)
    assert CLARK_S_BASE.effective_experts(1e12) == pytest.approx(314.478, rel=1e-3)
    assert CLARK_S_BASE.loss(params=1e9, experts=64.0) < CLARK_S_BASE.loss(params=1e9, experts=1.0)
    worth = CLARK_S_BASE.effective_params(params=1e9, experts=64.0)
    assert CLARK_S_BASE.loss(params=worth, experts=1.0) == pytest.approx(CLARK_S_BASE.loss(params=1e9, experts=64.0))
    # the gain ends where log10 N = -b / c, a trillion
    last = 10 ** (0.108 / 0.009)
    assert CLARK_S_BASE.effective_params(params=last, experts=64.0) == pytest.approx(last)


def test_finer_experts_help_and_saturate():
    losses = [KRAJEWSKI.loss(params=1e9, tokens=16e9, granularity=g) for g in (1.0, 4.0, 16.0, 1e9)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0.47 + 18.1 / 1e9**0.115 + 30.8 / 16e9**0.147, rel=1e-4)


def test_frontier_params_are_those_whose_optimum_has_the_tokens():
    from research.scaling.allocation import closed_form_optimum

    best = closed_form_optimum(HOFFMANN, flops=1e21)
    assert HOFFMANN.frontier_params(best.tokens) == pytest.approx(best.params)


@pytest.mark.parametrize(
    "law", [HOFFMANN, KAPLAN, MUENNIGHOFF, CLARK_S_BASE, KRAJEWSKI], ids=lambda law: type(law).__name__
)
def test_numbers_may_be_arrays_and_jax_agrees(law):
    inputs = {"params": 1e9, "tokens": 2e10, "unique_tokens": 1e9, "experts": 8.0, "granularity": 4.0}
    inputs = {name: inputs[name] for name in law.INPUTS}
    many = type(law)(**{name: np.full(3, value) for name, value in laws.numbers(law).items()})
    np.testing.assert_allclose(many.loss(**inputs), law.loss(**inputs), rtol=1e-14)
    with jax.enable_x64(True):
        mapped = jax.jit(jax.vmap(lambda one: one.loss(**inputs)))(many)
    np.testing.assert_allclose(mapped, law.loss(**inputs), rtol=1e-12)


def test_power_law_recovered_and_refused():
    x = np.geomspace(1e10, 1e14, 5)
    found = fit_power_law(x, y=3.5 * x**0.47)
    assert found.exponent == pytest.approx(0.47) and found.coefficient == pytest.approx(3.5)
    assert PowerLaw(2.0, 0.5)(16.0) == 8.0
    # DeepSeek LLM at 1e20 FLOPs: about a thousandth, and about a million tokens
    assert laws.DEEPSEEK_LEARNING_RATE(1e20) == pytest.approx(9.86e-4, rel=0.01)
    assert laws.DEEPSEEK_BATCH_TOKENS(1e20) == pytest.approx(1.02e6, rel=0.01)
    with pytest.raises(UserError, match="at least 2 distinct"):
        fit_power_law([1.0, 1.0], y=[2.0, 3.0])
    with pytest.raises(UserError, match="positive"):
        fit_power_law([1.0, 2.0], y=[-2.0, 3.0])


def test_a_law_prints_as_its_numbers():
    assert str(laws.HOFFMANN) == "loss = 1.69 + 406.4 / params^0.34 + 410.7 / tokens^0.28"
    kaplan = laws.Kaplan(N_c=8.8e13, D_c=5.4e13, alpha_N=0.076, alpha_D=0.095)
    assert str(kaplan) == "Kaplan: N_c = 8.8e+13, D_c = 5.4e+13, alpha_N = 0.076, alpha_D = 0.095"
    assert "N_c = [1. 1.]" in str(laws.Kaplan(N_c=np.ones(2), D_c=1.0, alpha_N=0.1, alpha_D=0.1))
