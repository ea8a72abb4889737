# SPDX-License-Identifier: Apache-2.0
"""The study of experts as it is written: each run within its budget, kinds of equal cost; what it concludes."""

import json
import re
from dataclasses import replace

import pytest

from experiments import moe_scaling
from launch import collect
from launch.study import Study
from research.scaling import cost
from research.scaling.laws import Chinchilla
from research.scaling.table import Table

RUNS = moe_scaling.sweep()
LAW = Chinchilla(E=1.2, A=25.0, B=120.0, alpha=0.35, beta=0.38)


def test_every_kind_at_every_size_of_three_budgets():
    budgets = {experiment.length.count for experiment in RUNS.values()}
    assert len(budgets) == 3 and max(budgets) >= 10 * min(budgets) and len(RUNS) == 33
    assert {cost.experts(experiment.model) for experiment in RUNS.values()} == {0, 8, 16}


@pytest.mark.parametrize("runs", [RUNS, moe_scaling.smallest()], ids=["sweep", "smallest"])
def test_names_and_runs_are_unique(runs):
    assert [experiment.name for experiment in runs.values()] == list(runs)
    assert len({experiment.hash for experiment in runs.values()}) == len(runs)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_costs_its_budget_within_one_percent(name):
    assert RUNS[name].flops == pytest.approx(RUNS[name].length.count, rel=0.01)


@pytest.mark.parametrize("width", sorted(set().union(*moe_scaling.WIDTHS.values())))
def test_a_token_costs_the_same_in_every_kind_but_for_the_router(width):
    dense, *others = (moe_scaling.model(width, experts=kind) for kind in moe_scaling.KINDS)
    for other in others:
        assert 1 < cost.params(other).active / cost.params(dense).active < 1.03
        flops = [cost.training_flops_per_token(model, sequence_length=32) for model in (dense, other)]
        assert 1 < flops[1] / flops[0] < 1.03 and cost.params(other).total > 1.6 * cost.params(dense).total


def test_the_docstring_names_question_command_hardware_and_expected_numbers():
    parts = dict(re.findall(r"^(\w+):\s+(.+(?:\n .+)*)", moe_scaling.__doc__, flags=re.MULTILINE))
    assert set(parts) >= {"Question", "Command", "Hardware", "Expect"}
    assert parts["Question"].split("(")[0].strip().endswith("?")
    assert parts["Command"].strip() == "lab sweep experiments/moe_scaling.py"
    assert "cores" in parts["Hardware"] and "minutes" in parts["Hardware"]
    assert re.search(r"loss \d\.\d+", parts["Expect"])


def test_the_smallest_study_costs_under_a_twentieth():
    small, whole = (sum(e.flops for e in runs.values()) for runs in (moe_scaling.smallest(), RUNS))
    assert small < 0.05 * whole


@pytest.mark.parametrize("study", [moe_scaling.sweep, moe_scaling.smallest])
def test_finished_runs_lead_to_a_conclusion(study, tmp_path, capsys):
    """Runs as the launcher gathers them, with losses as if an expert model were worth twice its active size."""
    found = []
    for run in collect.table(Study("moe", "moe_scaling", study(), None), tmp_path):
        size = run.active * (2 if run.experts else 1)
        loss = float(LAW.loss(params=size, tokens=run.tokens))
        found.append(replace(run, status="finished", loss=loss, bits_per_byte=loss))
    moe_scaling.analyze(Table(tuple(found)), tmp_path)
    record = json.loads((tmp_path / "effective.json").read_text())
    assert len(record["worth"]) + len(record["dense"]) == len(found) and record["experts_win"]
    assert all(run["times"] == pytest.approx(2, rel=0.02) for run in record["worth"])
    assert "At the largest budget" in capsys.readouterr().out
    assert all((tmp_path / name).stat().st_size for name in ("report.html", "moe_scaling.png", "table.csv"))
