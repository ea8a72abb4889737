# SPDX-License-Identifier: Apache-2.0
"""Rules for learning rate and batch: recovered from grids with known optima, refused where there is no optimum."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from research.core.types import UserError
from research.scaling import tuning_report
from research.scaling.table import Run, Table
from research.scaling.tuning import tune

BUDGETS = (1.25e12, 5e12, 2e13, 8e13)
NOISE = 0.002
RATE = {"params": -0.4, "tokens": 0.15}  # exponents of the truth
BATCH = {"params": 0.1, "tokens": 0.45}


def best_rate(params: float, tokens: float) -> float:
    return 0.3 * params ** RATE["params"] * tokens ** RATE["tokens"]


def best_batch(params: float, tokens: float) -> float:
    return 0.8 * params ** BATCH["params"] * tokens ** BATCH["tokens"]


def grid(
    *, budgets: tuple[float, ...] = BUDGETS, factors: tuple[float, ...] = (0.5, 1, 2), noise: float = NOISE,
    shift: float = 1.4, seed: int = 0, vary: float = 0.01,
) -> list[Run]:  # fmt: skip
    """Five rates by five batches, off centre about the optimum of each size at each budget, whose FLOPs vary as whole
    steps make them."""
    generator, runs = np.random.default_rng(seed), []
    for budget, factor in itertools.product(budgets, factors):
        params = round(math.sqrt(budget / 120) * factor)
        rate, batch = best_rate(params, budget / (6 * params)), best_batch(params, budget / (6 * params))
        for a, b in itertools.product(np.geomspace(0.25, 4, 5), np.geomspace(0.25, 4, 5)):
            x, y = math.log(a * shift), math.log(b / 1.5)
            surface = 0.012 * x * x + 0.006 * y * y - 0.004 * x * y
            flops = budget * (1 + vary * generator.uniform(-1, 1))
            run = Run(
                name=f"r{len(runs)}",
                params=params,
                non_embedding_params=params,
                tokens=round(flops / (6 * params)),
                flops=flops,
                loss=3.0 * math.exp(surface + noise * generator.standard_normal()),
                status="finished",
            )
            runs.append(replace(run, learning_rate=rate * a * shift, batch_tokens=round(batch * b / 1.5)))
    return runs


def outside(budget: float, shift: float) -> list[Run]:
    """A size whose rates all lie on one side of the optimum, with a flat surface, so that all of them count."""
    far = grid(budgets=(budget,), factors=(1,), shift=shift, noise=0.0)
    return [replace(run, name=f"far-{run.name}", loss=3 * (run.loss / 3) ** 0.3) for run in far]


@pytest.fixture(scope="module")
def runs():
    return grid()


@pytest.fixture(scope="module")
def found(runs):
    return tune(runs)


def test_every_optimum_is_found(found):
    assert len(found.best) == len(found.found) == 12  # runs of one budget stay together though their FLOPs vary
    for best in found.found:
        assert len(best.runs) == 25
        assert best.learning_rate == pytest.approx(best_rate(best.params, best.tokens), rel=0.15)
        assert best.batch_tokens == pytest.approx(best_batch(best.params, best.tokens), rel=0.25)
        assert best.loss == pytest.approx(3.0, rel=2 * NOISE) and best.rms_residual < 2 * NOISE


def test_the_rules_are_recovered_and_intervals_hold_the_truth(found):
    for name, truth, constant in (("learning_rate", RATE, 0.3), ("batch_tokens", BATCH, 0.8)):
        by_size, by_compute = found.by_size[name], found.by_compute[name]
        for variable, exponent in truth.items():
            assert by_size.exponents[variable] == pytest.approx(exponent, abs=0.08)
            assert by_size.intervals[variable].holds(exponent)
            assert 0 < by_size.intervals[variable].high - by_size.intervals[variable].low < 0.3
        assert by_size.intervals["coefficient"].holds(constant)
        slope = (truth["params"] + truth["tokens"]) / 2  # both grow with the square root of compute here
        assert by_compute.exponents["flops"] == pytest.approx(slope, abs=0.03)
        assert by_compute.intervals["flops"].holds(slope)
    params, tokens = 3e6, 6e7
    assert found.by_size["learning_rate"](params=params, tokens=tokens) == pytest.approx(
        best_rate(params, tokens), rel=0.2
    )


def test_over_many_grids_intervals_hold_the_truth_about_as_often_as_they_say():
    held = [
        tune(grid(budgets=BUDGETS[:2], seed=seed)).by_compute[name].intervals["flops"].holds(slope)
        for seed in range(20)
        for name, slope in (("learning_rate", -0.125), ("batch_tokens", 0.275))
    ]
    assert np.mean(held) > 0.8


def test_without_noise_the_rules_are_exact():
    exact = tune(grid(noise=0.0, vary=0.0)).by_size["learning_rate"]
    assert exact.exponents == pytest.approx(RATE, abs=1e-3) and exact.coefficient == pytest.approx(0.3, rel=0.02)
    assert str(exact).startswith("0.3 params^-0.400 tokens^0.150")


def test_rules_in_words(found):
    rate, sized, batch, _ = found.sentences
    assert rate.startswith("The best learning rate is ") and " flops^-0.1" in rate and "(coefficient 95%: " in rate
    assert " params^-0." in sized and " tokens^0." in sized and " tokens (coefficient 95%: " in batch


@pytest.mark.parametrize(
    ("shift", "words"), [(20.0, "run smaller learning rates"), (0.05, "run larger learning rates")]
)
def test_an_optimum_outside_is_said_with_its_direction(runs, shift, words):
    """At the largest budget all rates were too large, or too small."""
    found = tune([*runs, *outside(3.2e14, shift)])
    (problem,) = [best.problem for best in found.best if best.problem is not None]
    assert problem.startswith("not bracketed: ") and words in problem and "batches" not in problem
    assert found.sentences[0].startswith("3.2e+14 FLOPs, ") and found.sentences[0].endswith(problem)
    assert len(found.found) == 12  # and it stands in no rule


def test_too_few_runs_in_a_cell_are_said(runs):
    few = [run for run in runs if run.params != runs[0].params] + runs[:7]
    problems = [best.problem for best in tune(few).best if best.problem is not None]
    assert len(problems) == 1 and "only 7 runs lie within 10% of the best loss" in problems[0]


def test_fewer_than_two_budgets_are_refused(runs):
    one = [run for run in runs if run.flops < 2e12]
    with pytest.raises(UserError, match="an optimum at 2 budgets or more; there are 1: try more learning rates"):
        tune(one)
    with pytest.raises(UserError, match="there are 0: try"):
        tune([replace(run, learning_rate=None) for run in runs])
    with pytest.raises(UserError, match="there are 0: try"):
        tune([replace(run, status="failed") for run in runs])
    with pytest.raises(UserError, match=r"there are 1 \(3.2e\+14 FLOPs, .* parameters: not bracketed: "):
        tune([*one, *outside(3.2e14, 20.0)])


def test_on_one_line_params_and_tokens_cannot_be_told_apart():
    """Twenty tokens for each parameter at every budget: exponents of both would be made up."""
    assert tune(grid(factors=(1,))).by_size is None


class Axes:
    """What was drawn, without a picture."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_the_report_is_written_once_and_says_what_was_found(found, runs, tmp_path, monkeypatch):
    told, written = [], []
    monkeypatch.setattr(tuning_report, "point", lambda axes, x, y, marker, says, **style: told.append(says))
    monkeypatch.setattr(tuning_report.canvas, "log_loss", lambda axes, losses: None)

    def panels(draws, **options):
        for draw in draws:
            draw(Axes())
        return {"svg": b"<svg></svg>", "png": b"png"}

    monkeypatch.setattr(tuning_report.canvas, "panels", panels)
    write = tuning_report.write_atomically
    monkeypatch.setattr(
        tuning_report, "write_atomically", lambda path, data: (written.append(path.name), write(path, data))
    )
    failed = replace(runs[0], name="failed one", status="failed")
    again = tuning_report.write_tuning(Table((*runs, failed)), tmp_path, title="A study", notes=["Why."])
    assert again.by_compute == found.by_compute
    files = ["report.html", "table.csv", "tuning.json", "tuning.png", "tuning.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert sorted(written) == [name for name in files if name != "table.csv"]
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert record["by_size"]["batch_tokens"]["exponents"] == found.by_size["batch_tokens"].exponents
    assert len(record["best"]) == 12 and record["excluded"] == {"failed one": "failed"} and record["notes"] == ["Why."]
    html = (tmp_path / "report.html").read_text()
    assert "A study" in html and all(sentence.split(" (95%")[0] in html for sentence in found.sentences)
    assert sum(" tokens a step, loss " in words for words in told) == len(runs)  # every run says its loss
    assert sum(words.startswith("optimum: learning rate ") for words in told) == 12


def test_the_table_is_kept_where_no_rule_can_be_found(runs, tmp_path):
    with pytest.raises(UserError, match="2 budgets or more"):
        tuning_report.write_tuning(Table(tuple(runs[:25])), tmp_path, title="One budget")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
