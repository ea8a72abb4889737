# SPDX-License-Identifier: Apache-2.0
"""Effective dense sizes on runs whose answer is known: expert runs that follow the dense law at a larger size."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from research.core.types import UserError
from research.scaling.allocation import closed_form_optimum, six_per_param
from research.scaling.effective import compare, dense_compute, dense_size
from research.scaling.effective_report import write_effective
from research.scaling.table import Table

TIMES = {8: 2.0, 16: 3.0}


def with_experts(make_study, true_law, times=TIMES, **settings):
    """The dense runs, and for each number of experts the same with the loss of so many times their size."""
    dense, runs = make_study(**settings), []
    for run in dense:
        runs.append(replace(run, experts=0))
        for experts, factor in times.items():
            loss = float(true_law.loss(params=factor * run.params, tokens=run.tokens))
            more = {"params": 5 * run.params, "active_params": run.params, "experts": experts, "loss": loss}
            runs.append(replace(run, name=f"e{experts}-{run.name}", **more))
    return Table(tuple(runs))


@pytest.fixture(scope="module")
def found(make_study, true_law):
    return compare(with_experts(make_study, true_law))


def test_known_factors_are_found(found):
    assert len(found.worth) == 2 * len(found.dense) and len(found.rungs) == 4
    for worth in found.worth:
        assert worth.times == pytest.approx(TIMES[worth.run.experts], rel=1e-3)
        assert worth.dense_params == pytest.approx(TIMES[worth.run.experts] * worth.run.active_params, rel=1e-3)


def test_equal_compute_is_that_of_the_laws_optimum(true_law):
    best = closed_form_optimum(true_law, flops=3e12)
    equal = dense_compute(true_law, loss=best.loss, flops=1e12, flops_per_token=six_per_param)
    assert equal == pytest.approx(3e12, rel=1e-4)
    assert dense_compute(true_law, loss=1.0, flops=1e12, flops_per_token=six_per_param) is None


def test_a_loss_that_no_size_reaches_has_no_dense_size(true_law):
    floor = true_law.loss(params=math.inf, tokens=1e6)
    assert dense_size(true_law, loss=floor * 0.999, tokens=1e6) is None
    assert dense_size(true_law, loss=floor * 1.001, tokens=1e6) > 1e6


def test_who_wins_is_said_with_figures(found, make_study, true_law):
    assert found.experts_win
    last = found.rungs[-1]
    for experts in TIMES:
        assert (
            last.gain(experts) == pytest.approx(last.best[0].loss - last.best[experts].loss) and last.gain(experts) > 0
        )
    assert "2.00 times" in found.sentences[0] and "3.00 times" in found.sentences[1]
    assert "expert models beat the best dense one" in found.sentences[-1]
    worse = compare(with_experts(make_study, true_law, times={8: 0.5, 16: 2.0}))
    assert not worse.experts_win and "do not all beat" in worse.sentences[-1]


def test_noise_moves_the_factor_little(make_study, true_law):
    noisy = compare(with_experts(make_study, true_law, noise=0.003, seed=1))
    assert np.median([w.times for w in noisy.worth if w.run.experts == 8]) == pytest.approx(2.0, rel=0.15)


def test_the_report_holds_it_all(make_study, true_law, tmp_path):
    runs = list(with_experts(make_study, true_law))
    runs[-1] = replace(runs[-1], loss=0.9)  # no dense model is as good
    runs[0] = replace(runs[0], status="diverged")
    write_effective(Table(tuple(runs)), tmp_path, title="Experts & <dense>", notes=["Why."])
    record = json.loads((tmp_path / "effective.json").read_text())
    assert len(record["worth"]) == 40 and record["worth"][-1]["dense_params"] is None
    page = (tmp_path / "report.html").read_text()
    assert all(run.name in page for run in runs[1:]) and "Experts &amp; &lt;dense&gt;" in page
    assert f"Left out: {runs[0].name}: diverged" in page and "no dense" not in record["sentences"][0]
    assert (tmp_path / "moe_scaling.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "table.csv").exists()


def test_what_cannot_be_compared_is_said(make_study, true_law):
    runs = with_experts(make_study, true_law)
    with pytest.raises(UserError, match="None of the 20 finished runs has experts"):
        compare(make_study())
    largest = max(run.flops for run in runs)
    with pytest.raises(UserError, match="only dense have finished"):
        compare(run for run in runs if not run.experts or run.flops < largest / 2)
    with pytest.raises(UserError, match="only 8 experts and 16 experts have finished"):
        compare(run for run in runs if run.experts or run.flops < largest / 2)


def test_what_experts_are_worth_has_an_interval(make_study, true_law):
    found = compare(with_experts(make_study, true_law, noise=0.01, sizes=6))
    for worth in found.worth:
        span = worth.times_interval
        assert span.holds(worth.times) and span.high / span.low > 1.02
    largest = [found.of(found.rungs[-1].best[experts]) for experts in TIMES]
    assert all(worth.times_interval.holds(TIMES[worth.run.experts]) for worth in largest)
    assert all(f"(95%: {worth.times_interval.low:.2f} to" in " ".join(found.sentences) for worth in largest)
