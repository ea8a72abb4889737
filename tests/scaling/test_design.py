# SPDX-License-Identifier: Apache-2.0
"""The next runs: within the budget, narrowing what they are asked to narrow, and as much as they promise."""

import math
from dataclasses import replace

import numpy as np
import pytest

from research.core.types import UserError
from research.scaling.allocation import optima
from research.scaling.design import propose
from research.scaling.fit import Points, as_law, fit_law, problem
from research.scaling.intervals import bootstrap


@pytest.fixture(scope="module")
def fit(make_study):
    return fit_law(Points.of(make_study(noise=0.005, seed=2, sizes=6)))


@pytest.fixture(scope="module")
def design(fit):
    return propose(fit, budget=3e12, target_flops=1e13, drawn=bootstrap(fit, resamples=300))


def test_proposals_keep_to_the_budget_and_to_what_is_known(fit, design):
    assert 0 < design.flops <= 3e12 * 1.001 and len(design.runs) <= 12
    for run in design.runs:
        assert run.flops == pytest.approx(6 * run.params * run.tokens)
        assert fit.points.params.min() / 1.6 < run.params < fit.points.params.max() * 1.6
    assert design.before.low < design.after.low < design.optimal_params < design.after.high < design.before.high
    assert 0.2 < design.narrower < 0.95 and f"{design.narrower:.2f} times as wide" in design.sentences[-1]


def test_the_promise_is_kept_by_runs_that_are_made(fit, design, true_law):
    """Studies drawn from the true law, with and without the proposed runs: the spread of the best size shrinks as
    said."""
    generator, spreads = np.random.default_rng(0), []
    more = [[run.params for run in design.runs], [run.tokens for run in design.runs]]
    for extra in (False, True):
        params, tokens = (
            np.concatenate([one, two]) if extra else one
            for one, two in zip((fit.points.params, fit.points.tokens), more, strict=True)
        )
        exact = fit_law(Points(params, tokens, true_law.loss(params=params, tokens=tokens)), restarts=2)
        task = problem(exact.points)
        noisy = np.log(exact.points.loss) + 0.005 * generator.standard_normal((400, len(params)))
        theta = task.solve(np.tile(exact.theta, (400, 1)), log_loss=noisy).theta
        best = optima(as_law(exact.form, theta, task.scale), flops=np.array([1e13]))
        spreads.append(np.subtract(*np.percentile(np.log(best.params), [84, 16])))
    # what was promised is from one study's own residuals: right to a fourth of the interval
    assert spreads[1] / spreads[0] == pytest.approx(design.narrower, abs=0.25)


def test_a_larger_budget_narrows_more(fit, design):
    assert propose(fit, budget=1e13, target_flops=1e13).narrower < design.narrower + 0.05


def test_a_budget_that_is_too_small_is_refused(fit):
    with pytest.raises(UserError, match="less than the smallest run had"):
        propose(fit, budget=1e9, target_flops=1e13)
    with pytest.raises(UserError, match="positive number of FLOPs"):
        propose(fit, budget=math.nan, target_flops=1e13)


def test_a_law_without_an_optimum_is_refused(fit):
    flat = replace(fit, law=replace(fit.law, A=0.0))
    with pytest.raises(UserError, match="no compute-optimal model size"):
        propose(flat, budget=3e12, target_flops=1e13)


def test_runs_that_do_not_determine_the_law_are_refused(fit):
    few = fit_law(fit.points.take(np.arange(0, 24, 3)[:7]))
    with pytest.raises(UserError, match="These 7 runs do not determine the law yet"):
        propose(few, budget=3e12, target_flops=1e13)
    lost = replace(bootstrap(fit, resamples=100), lost=10)
    with pytest.raises(UserError, match="do not determine the law yet"):
        propose(fit, budget=3e12, target_flops=1e13, drawn=lost)
