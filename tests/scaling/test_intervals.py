# SPDX-License-Identifier: Apache-2.0
"""Intervals: the published bootstrap as the outside oracle, linear theory where it is exact, and open ends named."""

import math

import numpy as np
import pytest
from scipy import stats

from research.core.types import UserError
from research.scaling import forms, intervals, laws
from research.scaling.allocation import as_tree, six_per_param
from research.scaling.fit import Points, fit_law
from research.scaling.intervals import OPTIMUM, Bootstrap, Interval, bootstrap, draws, profile

BUDGET = {"flops": 1e21, "cost": as_tree(six_per_param), "others": {}}


@pytest.fixture(scope="module")
def published(chinchilla_points):
    return bootstrap(fit_law(chinchilla_points), resamples=4000)


def test_published_intervals(published):
    expected = {
        "A": (285, 744),
        "B": (1042, 5810),
        "E": (1.769, 1.871),
        "alpha": (0.317, 0.373),
        "beta": (0.331, 0.415),
    }
    found = published.numbers()
    for name, (low, high) in expected.items():
        assert found[name].low == pytest.approx(low, abs=(high - low) / 10)
        assert found[name].high == pytest.approx(high, abs=(high - low) / 10)


def test_every_refit_is_a_minimum(chinchilla_points, published):
    """No refit stops early: from another start none finds a lower objective."""
    from research.scaling.fit import problem

    fit = fit_law(chinchilla_points)
    counts = draws(fit, resamples=4000)[:64]
    task, log_loss = problem(chinchilla_points), np.log(chinchilla_points.loss)
    other = np.tile(fit.theta + np.array([0.3, -0.3, -0.05, 0.05, -0.05]), (64, 1))
    again = task.solve(other, log_loss=log_loss, weights=counts)
    np.testing.assert_allclose(published.laws.alpha[:64], again.theta[:, 3], rtol=1e-5)


def test_optimum_of_resampled_laws(published, chinchilla_points):
    found = published.optimum(flops=5.76e23, flops_per_token=six_per_param)
    assert found["params"].holds(73.2e9) and found["tokens"].holds(1.31e12) and found["loss"].holds(1.974)
    assert found["params"].high / found["params"].low < 4
    slopes = Interval.of(published.laws.params_in_compute)
    assert slopes.holds(0.3672 / (0.3473 + 0.3672)) and slopes.high - slopes.low < 0.08


def test_profile_is_the_t_interval_where_the_law_is_linear_enough(chinchilla_points):
    """For the loss at a point among many runs the profile has to give what linear regression gives."""
    fit = fit_law(chinchilla_points, delta=math.inf)
    at = {"params": 1e9, "tokens": 2e10}
    found = profile(fit, measure=intervals.at_point, names=(*laws.numbers(fit.law), "loss"), at=at)["loss"]
    law, points = fit.law, chinchilla_points

    def gradient(theta):
        step = 1e-6
        base = np.array([math.log(law.E), math.log(law.A), math.log(law.B), law.alpha, law.beta])
        rows = []
        for k in range(5):
            moved = [
                laws.Chinchilla(*np.exp((base + s * step * np.eye(5)[k])[:3]), *(base + s * step * np.eye(5)[k])[3:])
                for s in (1, -1)
            ]
            rows.append((np.log(moved[0].loss(**theta)) - np.log(moved[1].loss(**theta))) / (2 * step))
        return np.stack(rows, axis=-1)

    jacobian = gradient({"params": points.params, "tokens": points.tokens})
    there = gradient(at)
    free = len(points) - 5
    variance = float(np.sum(np.square(fit.residuals))) / free
    error = math.sqrt(variance * there @ np.linalg.solve(jacobian.T @ jacobian, there))
    half = stats.t.ppf(0.975, free) * error
    centre = math.log(law.loss(**at))
    assert math.log(found.low) == pytest.approx(centre - half, abs=0.05 * half)
    assert math.log(found.high) == pytest.approx(centre + half, abs=0.05 * half)


def test_what_the_runs_do_not_tell_has_no_end():
    """Where E is all that most runs would show, but none lies near it, the profile of E has no lower end."""
    generator = np.random.default_rng(0)
    flops = np.geomspace(1e18, 1e20, 12)
    law = laws.SaturatingPowerLaw(E=0.5, k=60.0, gamma=0.06)
    loss = law.loss(flops=flops) * np.exp(0.01 * generator.standard_normal(12))
    found = profile(fit_law(Points(loss=loss, flops=flops), form=forms.SATURATING))
    assert not found["E"].closed
    sharp = law.loss(flops=flops) * np.exp(1e-5 * generator.standard_normal(12))
    found = profile(fit_law(Points(loss=sharp, flops=flops), form=forms.SATURATING))
    assert found["E"].closed and found["E"].holds(0.5)


def test_profiles_of_exponents_and_optimum_agree_with_the_bootstrap(make_study, true_law):
    points = Points.of(make_study(noise=0.004, sizes=7, budgets=(1e10, 3e10, 1e11, 3e11, 1e12)))
    fit = fit_law(points, delta=math.inf)
    at = {**BUDGET, "flops": 3e12}
    names = (*laws.numbers(fit.law), *intervals.EXPONENTS, *OPTIMUM)
    first = profile(fit, measure=intervals.exponents_at_budget, names=names, at=at)
    second = bootstrap(fit, resamples=1000).optimum(flops=3e12, flops_per_token=six_per_param)
    for name in OPTIMUM:
        assert first[name].low < second[name].high and second[name].low < first[name].high
        widths = [math.log(one[name].high / one[name].low) for one in (first, second)]
        assert 0.5 < widths[0] / widths[1] < 2


def test_seed_noise_widens(chinchilla_points):
    fit = fit_law(chinchilla_points)
    narrow, wide = (bootstrap(fit, resamples=300, seed_noise=noise).numbers()["alpha"] for noise in (0.0, 0.02))
    assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)
    with pytest.raises(UserError, match="seed_noise is a standard deviation"):
        bootstrap(fit, resamples=10, seed_noise=-1)


def test_draws_hold_enough_to_fit(make_study):
    fit = fit_law(Points.of(make_study(budgets=(1e11, 1e12), sizes=4)))
    counts = draws(fit, resamples=500)
    assert counts.shape == (500, 8) and (counts.sum(axis=1) == 8).all() and ((counts > 0).sum(axis=1) >= 6).all()
    least = fit_law(Points.of(make_study(budgets=(1e11, 1e12), sizes=3)))
    assert draws(least, resamples=10) is None and bootstrap(least) is None


def test_a_quantity_that_many_draws_lack_has_no_interval():
    values = np.linspace(1, 2, 100)
    assert Interval.of(values).closed
    values[:10] = np.nan
    assert not Interval.of(values).closed and Interval(1.0, math.inf).holds(5.0)


def one_ratio(seed: int):
    """Twelve runs of 20 tokens for each parameter: size and tokens cannot be told apart."""
    params = np.geomspace(1e7, 1e9, 12)
    noise = 0.002 * np.random.default_rng(seed).standard_normal(12)
    return Points(params, 20 * params, laws.HOFFMANN.loss(params=params, tokens=20 * params) * np.exp(noise))


@pytest.mark.parametrize("seed", [0, 1])
def test_runs_of_one_ratio_give_no_tight_interval(seed):
    fit = fit_law(one_ratio(seed))
    drawn = bootstrap(fit, resamples=200)
    span = drawn.optimum(flops=1e21, flops_per_token=six_per_param)["params"]
    truth = 3.5e9  # of this law at 1e21
    assert not span.closed or (span.holds(truth) and span.high > 3 * span.low)
    assert not all(interval.closed for interval in profile(fit).values())


def test_few_runs_are_not_drawn_from(make_study):
    points = Points.of(make_study(noise=0.003, sizes=6))
    seven, eight = (fit_law(points.take(np.arange(0, 24, 3)[:n])) for n in (7, 8))
    assert bootstrap(seven, resamples=10) is None and len(bootstrap(eight, resamples=10)) == 10


def test_a_floor_of_zero_is_no_loss_of_a_refit():
    params = np.geomspace(1e6, 1e9, 8).repeat(4)
    tokens = params * np.tile([5, 20, 80, 320], 8)
    loss = laws.Chinchilla(E=0.0, A=20.0, B=40.0, alpha=0.15, beta=0.15).loss(params=params, tokens=tokens)
    loss = loss * np.exp(0.003 * np.random.default_rng(0).standard_normal(32))
    assert bootstrap(fit_law(Points(params, tokens, loss)), resamples=200).lost <= 5


def test_an_end_that_rests_on_refits_at_a_bound_is_open():
    values, astray = np.linspace(1, 2, 100), np.arange(100) < 8
    drawn = Bootstrap(laws.Chinchilla(*np.ones((5, 100))), astray=astray)
    assert drawn.interval(values).low == -math.inf and drawn.interval(values).high == Interval.of(values).high
    assert drawn.interval(-values).high == math.inf
    scattered = Bootstrap(drawn.laws, astray=np.arange(100) % 12 == 0)
    assert scattered.interval(values) == Interval.of(values)


def test_refits_of_few_runs_converge(make_study):
    """Eighteen runs with 1% of noise: a tenth of the refits would crawl along a valley of the Huber loss."""
    points = Points.of(make_study(noise=0.01, seed=4, budgets=(3e10, 1e11, 3e11), sizes=6))
    drawn = bootstrap(fit_law(points), resamples=500)
    assert drawn.lost <= 5
