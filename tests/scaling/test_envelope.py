# SPDX-License-Identifier: Apache-2.0
"""The envelope of training curves: of a known law, and of runs whose rate decays."""

from dataclasses import replace

import numpy as np
import pytest

from research.core.types import UserError
from research.scaling.envelope import fit_envelope
from research.scaling.laws import Chinchilla
from research.scaling.table import Run

LAW = Chinchilla(E=1.2, A=25.0, B=120.0, alpha=0.35, beta=0.38)


@pytest.fixture(scope="module")
def constant():
    """Thirty sizes at a constant rate, each trained for the same compute."""
    runs, curves = [], {}
    for params in np.geomspace(1e3, 1e6, 30):
        tokens, name = 3e12 / (6 * params), f"n{params:.0f}"
        seen = np.geomspace(tokens / 1e5, tokens, 80)
        runs.append(
            Run(
                name,
                round(params),
                round(params),
                round(tokens),
                3e12,
                2.0,
                status="finished",
                schedule="constant, ...",
            )
        )
        curves[name] = list(zip(6 * params * seen, LAW.loss(params=params, tokens=seen), strict=True))
    return runs, curves


def test_the_envelope_of_a_law_has_its_exponent(constant):
    runs, curves = constant
    found = fit_envelope(runs, curves, resamples=100)
    # thirty sizes are steps, and the smallest and largest are best for longer than their share
    assert found.params_law.exponent == pytest.approx(LAW.params_in_compute, abs=0.06)
    assert found.tokens_law.exponent == pytest.approx(1 - LAW.params_in_compute, abs=0.06)
    for name, interval in found.intervals.items():
        assert interval.low < getattr(found, name.split("_")[0] + "_law").exponent + 0.02 < interval.high + 0.1
    # no curve lies below it
    for line in curves.values():
        flops, losses = np.array(line).T
        inside = (flops >= found.flops[0]) & (flops <= found.flops[-1])
        assert np.all(losses[inside] >= np.interp(np.log(flops[inside]), np.log(found.flops), found.loss) - 2e-3)


def test_of_a_decaying_run_only_the_end_counts(constant):
    runs, curves = constant
    decaying = [replace(run, schedule="cosine to 0.1 of the peak") for run in runs]
    found = fit_envelope(runs, curves, resamples=0), None
    assert found[0].flops[0] < 1e10
    with pytest.raises(UserError, match="Only 1 model sizes touch the envelope|Only 2 model sizes"):
        fit_envelope(decaying, curves, resamples=0)  # all end at one compute: one size is best there


def test_too_few_curves(constant):
    runs, curves = constant
    with pytest.raises(UserError, match="training curves of 3 model sizes; there are 2 runs"):
        fit_envelope(runs[:2], curves)
    with pytest.raises(UserError, match="there are 0 runs"):
        fit_envelope(runs, {})
