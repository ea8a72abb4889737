# SPDX-License-Identifier: Apache-2.0
"""Recommendations and the held-out test, on laws that are known."""

import dataclasses

import pytest

from research.core.types import UserError
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.scaling import cost, ladder
from research.scaling.allocation import closed_form_optimum, cost_model
from research.scaling.fit import Points, fit_law
from research.scaling.intervals import bootstrap
from research.scaling.isoflop import fit_isoflop, resample
from research.scaling.recommend import hold_out, recommend, recommend_from_isoflop, which_to_believe
from research.scaling.table import Run, Table


def test_held_out_budget_of_an_exact_law(make_study):
    test = hold_out(make_study())
    assert len(test.predictions) == 5 and test.flops == pytest.approx(1e12, rel=1e-3)
    assert test.largest_relative_error < 1e-5 and test.ratio < 1e-3 and test.mean_ratio < 1e-3 and test.passed
    assert "the test is passed" in test.sentence


def test_held_out_budget_with_noise(make_study):
    test = hold_out(make_study(noise=0.003, seed=3))
    assert test.passed and test.largest_relative_error < 0.03
    best = min(test.predictions, key=lambda p: p.measured)
    assert test.best == best
    assert test.ratio == pytest.approx(abs(best.predicted - best.measured) / abs(test.carried_loss - best.measured))


def test_held_out_runs_are_not_in_the_fit(make_study):
    """Runs that leave the law at the largest budget are seen to, instead of bending the law towards them."""
    table = make_study()
    largest = max(run.flops for run in table) * 0.9
    spoiled = [dataclasses.replace(r, loss=r.loss * 1.1) if r.flops > largest else r for r in table]
    test = hold_out(spoiled)
    assert not test.passed and "NOT passed" in test.sentence
    assert all(p.relative_error == pytest.approx(1 / 1.1 - 1, rel=1e-3) for p in test.predictions)


def test_too_few_budgets(make_study):
    with pytest.raises(UserError, match="3 budgets or more, to fit without the largest; there are 2"):
        hold_out(make_study(budgets=(1e10, 1e11)))


def test_recommendation_from_the_law(make_study, true_law):
    spend = cost_model(make_study())
    assert spend(1e5) == pytest.approx(6e5, rel=1e-3) and spend.largest_error < 1e-6
    found = recommend(true_law, flops=1e13, flops_per_token=spend, largest_flops=1e12)
    best = closed_form_optimum(true_law, flops=1e13)
    assert (found.params, found.tokens, found.loss) == pytest.approx((best.params, best.tokens, best.loss), rel=1e-3)
    assert found.sentence.startswith("For 1e+13 FLOPs (10x the largest budget) the law recommends a model of ")
    assert "with an expected loss of" in found.sentence and found.sentence.endswith("extrapolates 10x beyond the runs.")
    inside = recommend(true_law, flops=1e12, flops_per_token=spend, largest_flops=1e12)
    assert "extrapolates" not in inside.sentence


@pytest.mark.parametrize(("parameters", "within"), [("total", 0.08), ("non_embedding", 0.02)])
def test_cost_of_sizes_between_real_models(parameters, within):
    """Fitted to every other model of a grid, the cost function tells the FLOPs per token of the rest."""
    base = Decoder(vocab_size=256, d_model=32, num_layers=2, attention=Attention(2), mlp=Mlp(88))
    runs = []
    for model in ladder.grid(base, d_models=(32, 64, 96, 128, 160, 192, 224, 256)):
        counts, flops = cost.params(model), cost.training_flops_per_token(model, sequence_length=128)
        runs.append(Run(f"{model.d_model}", counts.total, counts.non_embedding, 1, flops, 2.0, status="finished"))
    guess = cost_model(runs[::2], parameters=parameters)
    for run in runs[1::2]:
        assert guess(run.count(parameters)) == pytest.approx(run.flops, rel=within)


def test_recommendation_from_isoflop(make_study, true_law):
    table = make_study(spread=1.5)
    found = recommend_from_isoflop(
        fit_isoflop(table), flops=3e12, flops_per_token=cost_model(table), largest_flops=1e12
    )
    assert found.params == pytest.approx(closed_form_optimum(true_law, flops=3e12).params, rel=0.05)
    with pytest.raises(UserError, match="2 are needed"):
        recommend_from_isoflop(
            fit_isoflop(Table(table.runs[:5])),
            flops=3e12,
            flops_per_token=cost_model(table),
            largest_flops=1e12,
        )


def test_intervals_are_said(make_study, true_law):
    table = make_study(noise=0.004, spread=2.0, sizes=7)
    fit = fit_law(Points.of(table))
    spend = {"flops": 3e12, "flops_per_token": cost_model(table), "largest_flops": 1e12}
    found, isoflop = recommend(fit.law, **spend, drawn=bootstrap(fit, resamples=300)), fit_isoflop(table)
    other = recommend_from_isoflop(isoflop, **spend, minima=resample(isoflop))
    for one, names in ((found, ("params", "tokens", "loss")), (other, ("params", "tokens"))):
        assert all(one.intervals[name].holds(getattr(one, name)) for name in names)
        assert one.sentence.count("(95%: ") == len(names)
    assert other.loss is None and "expected loss" not in other.sentence  # no floor: nothing is said beyond the runs
    near = recommend_from_isoflop(isoflop, **spend | {"flops": 1e12}, minima=resample(isoflop))
    assert near.intervals["loss"].holds(near.loss) and near.sentence.count("(95%: ") == 3
    assert found.intervals["params"].holds(closed_form_optimum(true_law, flops=3e12).params)
    assert "The two agree" in which_to_believe(found, other, None, fit)
    apart = dataclasses.replace(other, params=20 * other.params, intervals={})
    found = dataclasses.replace(found, intervals={})
    passed = hold_out(table)
    assert passed.passed and "go by the law" in which_to_believe(found, apart, passed, fit)
    close = dataclasses.replace(other, params=1.05 * found.params, intervals={})
    assert which_to_believe(found, close, passed, fit) == "The two differ by a factor of 1.05 on the model's size."
    assert "go by the IsoFLOP minima" in which_to_believe(found, apart, None, fit)
    assert which_to_believe(None, other, None, fit) is None


def test_few_runs_at_the_largest_budget_are_joined_by_those_below(make_study):
    runs = list(make_study())
    few = runs[:-4]  # one of the five at 1e12 is left
    test = hold_out(few)
    assert len(test.predictions) == 6 and test.largest_relative_error < 1e-3
    assert "Fitted without the 2 largest budgets (3e+11 to 1e+12 FLOPs)" in test.sentence
    assert "Fitted without the largest budget (1e+12 FLOPs)" in hold_out(runs).sentence


def test_a_budget_below_the_runs_is_said_to_be(make_study):
    table = make_study()
    spend = {"flops_per_token": cost_model(table), "largest_flops": 1e12, "smallest_flops": 3e10}
    fit = fit_law(Points.of(table))
    assert "extrapolates to 0.1x the smallest" in recommend(fit.law, flops=3e9, **spend).sentence
    assert "extrapolates" not in recommend(fit.law, flops=1e11, **spend).sentence
    doubted = recommend(fit.law, flops=1e11, **spend, doubt="the fit has not converged")
    assert doubted.sentence.endswith("; build nothing on it: the fit has not converged.")
