# SPDX-License-Identifier: Apache-2.0
"""The envelope of training curves: of a known law, and of runs whose rate decays."""

from dataclasses import replace

import numpy as np
import pytest

from research.core.types import UserError
from research.scaling.allocation import closed_form_optimum
from research.scaling.envelope import fit_envelope
from research.scaling.laws import Chinchilla
from research.scaling.table import Run

LAW = Chinchilla(E=1.2, A=25.0, B=120.0, alpha=0.35, beta=0.38)
BEST = LAW.params_in_compute
FLOPS = (3e9, 1e12)  # where the curves are: the smallest and the largest size are best far outside


@pytest.fixture(scope="module")
def constant():
    """Forty sizes at a constant rate, trained for the same compute, with a little noise for each run."""
    generator, runs, curves = np.random.default_rng(3), [], {}
    flops = np.geomspace(*FLOPS, 60)
    for params in np.geomspace(3e2, 3e6, 40).round():
        tokens, name = flops[-1] / (6 * params), f"n{params:.0f}"
        run = Run(name, int(params), int(params) // 2, round(tokens), flops[-1], 2.0, status="finished")
        runs.append(replace(run, schedule="constant, warm-up over 0.0001 of the run"))
        noise = np.exp(1e-3 * generator.standard_normal())
        curves[name] = list(zip(flops, noise * LAW.loss(params=params, tokens=flops / (6 * params)), strict=True))
    return runs, curves


@pytest.fixture(scope="module")
def found(constant):
    return fit_envelope(*constant, resamples=200)


def test_the_envelope_of_a_law_has_its_exponents(found):
    assert found.params_law.exponent == pytest.approx(BEST, abs=0.05)
    assert found.tokens_law.exponent == pytest.approx(1 - BEST, abs=0.05)
    assert found.params_law.exponent + found.tokens_law.exponent == pytest.approx(1)
    assert found.intervals["params_in_compute"].holds(BEST) and found.intervals["tokens_in_compute"].holds(1 - BEST)
    width = found.intervals["params_in_compute"].high - found.intervals["params_in_compute"].low
    assert 0 < width < 0.2
    best = [closed_form_optimum(LAW, flops=flops).params for flops in found.flops]
    assert np.all(np.abs(np.log(found.params / best)) < 0.5)


def test_no_curve_lies_below_the_envelope(constant, found):
    for line in constant[1].values():
        flops, losses = np.array(line).T
        assert np.all(losses >= np.interp(np.log(flops), np.log(found.flops), found.loss) - 1e-3)
    assert np.all(np.diff(found.loss) < 0)
    sizes = {run.name: run.params for run in constant[0]}
    assert [sizes[name] for name in found.names] == found.params.tolist()


def test_counted_otherwise_the_envelope_has_other_sizes(constant, found):
    half = fit_envelope(*constant, parameters="non_embedding", resamples=0)
    assert np.allclose(half.params, found.params / 2, rtol=0.01) and half.intervals == {}
    assert np.allclose(half.tokens, found.tokens)


def test_of_a_decaying_run_only_the_end_counts(constant):
    runs, curves = constant
    decaying = [replace(run, schedule="cosine to 0.1 of the peak") for run in runs]
    with pytest.raises(UserError, match=r"Only \d model sizes touch the envelope.*run a wider range of compute"):
        fit_envelope(decaying, curves, resamples=0)  # all end at one compute: neighbours are best there


def test_before_the_end_of_the_warm_up_nothing_counts(constant):
    runs, curves = constant
    late = [replace(run, warmup_tokens=run.tokens // 10) for run in runs]
    assert fit_envelope(late, curves, resamples=0).flops[0] == pytest.approx(FLOPS[1] / 10, rel=0.1)


def test_points_that_are_no_numbers_are_passed_over(constant, found):
    """A first point at no compute, and a loss that was no number for a moment."""
    runs, curves = constant
    spoilt = {name: [(0.0, 6.2), *line] for name, line in curves.items()}
    spoilt[runs[-1].name][30] = (curves[runs[-1].name][29][0], np.nan)  # of a run that is best nowhere
    again = fit_envelope(runs, spoilt, resamples=0)
    assert np.all(np.isfinite(again.loss)) and np.isfinite(again.params_law.exponent)
    assert again.params_law.exponent == pytest.approx(found.params_law.exponent) and again.names == found.names


def test_too_few_curves(constant):
    runs, curves = constant
    with pytest.raises(UserError, match="training curves of 3 model sizes; there are 2 runs with a curve, of 2 sizes"):
        fit_envelope(runs[:2], curves)
    copies = [replace(runs[0], name=run.name) for run in runs]
    with pytest.raises(UserError, match="there are 40 runs with a curve, of 1 sizes"):
        fit_envelope(copies, curves)
    with pytest.raises(UserError, match="there are 0 runs"):
        fit_envelope(runs, {})
    with pytest.raises(UserError, match="there are 0 runs"):
        fit_envelope([replace(run, status="failed") for run in runs], curves)
    apart = {run.name: [(10.0**i, 3.0), (2 * 10.0**i, 2.5)] for i, run in enumerate(runs[:6])}
    with pytest.raises(UserError, match="the envelope is empty"):
        fit_envelope(runs[:6], apart)
