# SPDX-License-Identifier: Apache-2.0
"""IsoFLOP parabolas: minima where they are known, and plain words where there is none."""

import math

import numpy as np
import pytest

from research.core.types import UserError
from research.scaling.allocation import closed_form_optimum
from research.scaling.fit import Points, fit_law
from research.scaling.isoflop import by_budget, fit_curve, fit_isoflop, resample
from research.scaling.table import Run


def runs_at(losses: dict[int, float], *, flops: float = 6e11) -> list[Run]:
    return [
        Run(f"c{flops}-n{n}", n, n, round(flops / (6 * n)), flops, loss, None, "finished") for n, loss in losses.items()
    ]


def parabola(vertex: float, *, sizes=(10_000, 30_000, 90_000, 270_000), bend: float = 0.1) -> dict[int, float]:
    return {n: 2.5 + bend * math.log(n / vertex) ** 2 for n in sizes}


def test_an_exact_parabola():
    curve = fit_curve(runs_at(parabola(50_000)))
    assert curve.bracketed and curve.params == pytest.approx(50_000) and curve.loss == pytest.approx(2.5)
    assert curve.tokens == pytest.approx(6e11 / (6 * 50_000), rel=1e-4)
    assert float(curve(50_000 * math.e)) == pytest.approx(2.6)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (parabola(5_000), "not bracketed: run sizes below 10,000 parameters"),
        (parabola(400_000), "not bracketed: run sizes above 270,000 parameters"),
        (parabola(50_000, bend=-0.1), "does not open upward"),
        ({10_000: 3.0, 30_000: 2.9, 90_000: 2.8}, "run sizes above 90,000 parameters"),
        ({10_000: 2.8, 30_000: 2.9, 90_000: 3.0}, "run sizes below 10,000 parameters"),
        ({10_000: 3.0, 30_000: 2.9}, "run sizes around 30,000 parameters, at least 3 in all"),
        ({10_000: 2.0, 30_000: 2.0, 90_000: 2.0}, "does not open upward"),
    ],
)
def test_what_is_not_an_optimum_is_said(losses, words):
    curve = fit_curve(runs_at(losses))
    assert curve.problem.startswith("not bracketed: run sizes") and words in curve.problem
    assert not curve.bracketed and curve.params is None and curve.loss is None


def test_exponents_of_a_known_law(make_study, true_law):
    budgets = (3e10, 1e11, 3e11, 1e12)
    found = fit_isoflop(make_study(budgets=budgets, spread=1.5))
    assert len(found.bracketed) == 4
    assert found.params_law.exponent == pytest.approx(0.38 / 0.73, abs=0.01)
    assert found.tokens_law.exponent == pytest.approx(0.35 / 0.73, abs=0.01)
    for curve, budget in zip(found.curves, budgets, strict=True):
        best = closed_form_optimum(true_law, flops=budget)
        assert curve.params == pytest.approx(best.params, rel=0.03)
        assert curve.loss == pytest.approx(best.loss, rel=1e-4)


def test_unbracketed_budgets_do_not_enter_the_power_laws():
    runs = [
        *runs_at(parabola(40_000)),
        *runs_at(parabola(60_000), flops=2e12),
        *runs_at(parabola(1e6), flops=6e12),
    ]
    found = fit_isoflop(runs)
    assert [curve.bracketed for curve in found.curves] == [True, True, False]
    exponent = math.log(60_000 / 40_000) / math.log(2e12 / 6e11)
    assert found.params_law.exponent == pytest.approx(exponent)
    alone = fit_isoflop(runs_at(parabola(40_000)))
    assert alone.params_law is None and alone.loss_law is None


def test_budgets_are_grouped_within_a_few_percent():
    generator = np.random.default_rng(0)
    budgets = np.repeat([1e10, 1.3e10, 1e12], 6)
    runs = [
        Run(f"r{i}", 10, 10, 10, float(c * (1 + generator.uniform(-0.01, 0.01))), 2.0, None, "finished")
        for i, c in enumerate(generator.permutation(budgets))
    ]
    assert [len(group) for group in by_budget(runs)] == [6, 6, 6]


def test_a_curve_without_a_parabola_cannot_be_read():
    with pytest.raises(UserError, match="No parabola"):
        fit_curve(runs_at({10_000: 3.0, 30_000: 2.9}))(20_000)


def test_minima_s_intervals_hold_the_truth_and_narrow_with_the_noise(make_study, true_law):
    widths = []
    for noise in (0.001, 0.004):
        found = fit_isoflop(make_study(noise=noise, seed=5, spread=2.0, sizes=7))
        minima = resample(found)
        for index, curve in enumerate(found.bracketed):
            best = closed_form_optimum(true_law, flops=curve.flops)
            span = minima.interval(index, "params")
            assert span.holds(curve.params) and minima.interval(index, "loss").holds(curve.loss)
            assert span.low / 1.1 < best.params < span.high * 1.1  # a parabola is biased by a few percent
        slope = minima.exponents["params"]
        assert slope.holds(found.params_law.exponent)
        low, high = minima.bands[found.bracketed[0].flops]
        assert low.shape == high.shape and (low < high).all()
        widths.append(slope.high - slope.low)
    assert 2 < widths[1] / widths[0] < 8


def test_noise_that_hides_the_minimum_leaves_no_interval(make_study):
    found = fit_isoflop(make_study(noise=0.05, seed=1, spread=1.3, sizes=5))
    minima = resample(found)
    assert any(not minima.interval(index, "params").closed for index in range(len(found.bracketed)))


def test_three_sizes_have_no_residuals(make_study):
    assert resample(fit_isoflop(make_study(sizes=3))) is None


def test_a_parabola_is_biased_even_without_noise_and_the_law_is_not(make_study, true_law):
    """The farther the sizes reach, the farther its vertex lies from the law's optimum, on which the fit stands."""
    best, off = closed_form_optimum(true_law, flops=1e12).params, []
    for spread in (2.0, 16.0):
        table = make_study(spread=spread, sizes=9)
        (curve,) = [curve for curve in fit_isoflop(table).curves if curve.flops > 9e11]
        off.append(abs(math.log(curve.params / best)))
        fitted = closed_form_optimum(fit_law(Points.of(table)).law, flops=1e12)
        assert fitted.params == pytest.approx(best, rel=1e-4)
    assert off[1] > 0.02 > 5 * off[0]
