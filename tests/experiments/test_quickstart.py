# SPDX-License-Identifier: Apache-2.0
"""The quickstart as it is written: enough runs for a law, each within its budget, and a docstring that says all."""

import re
from itertools import pairwise

import pytest

from experiments import quickstart

RUNS = quickstart.sweep()


def test_enough_runs_over_enough_budgets_for_a_law():
    budgets = {experiment.length.count for experiment in RUNS.values()}
    assert len(RUNS) >= 16 and len(budgets) >= 4 and max(budgets) >= 16 * min(budgets)


@pytest.mark.parametrize("runs", [RUNS, quickstart.smallest()], ids=["sweep", "smallest"])
def test_names_and_runs_are_unique(runs):
    assert [experiment.name for experiment in runs.values()] == list(runs)
    assert len({experiment.hash for experiment in runs.values()}) == len(runs)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_costs_its_budget_within_one_percent(name):
    experiment = RUNS[name]
    assert experiment.flops == pytest.approx(experiment.length.count, rel=0.01)


@pytest.mark.parametrize("name", RUNS)
def test_the_learning_rate_ends_where_the_run_ends(name):
    experiment = RUNS[name]
    optimizer = experiment.optimizer
    rates = [optimizer.learning_rate(experiment.clock, step) for step in range(experiment.steps)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(optimizer.peak)
    assert rates[-1] == pytest.approx(optimizer.schedule.final * optimizer.peak) and rates[-1] < rates[top] / 2
    assert all(later <= earlier for earlier, later in pairwise(rates[top:])) and rates[-1] < rates[-2]


def test_the_smallest_study_costs_under_a_twentieth():
    small, whole = (sum(e.flops for e in runs.values()) for runs in (quickstart.smallest(), RUNS))
    assert small < 0.05 * whole


def test_the_docstring_names_question_command_hardware_and_expected_numbers():
    parts = dict(re.findall(r"^(\w+):\s+(.+(?:\n .+)*)", quickstart.__doc__, flags=re.MULTILINE))
    assert set(parts) >= {"Question", "Command", "Hardware", "Expect"}
    assert parts["Question"].split("(")[0].strip().endswith("?")
    assert parts["Command"].strip() == "lab sweep experiments/quickstart.py"
    assert "cores" in parts["Hardware"] and "minutes" in parts["Hardware"]
    assert re.search(r"loss \d\.\d+", parts["Expect"]) and re.search(r"within \d", parts["Expect"])
