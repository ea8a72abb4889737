# SPDX-License-Identifier: Apache-2.0
"""The study of experts as it is written: each run within its budget, kinds of equal cost; and once in small."""

import json
import re

import pytest

from experiments import moe_scaling
from launch import cli
from research.scaling import cost
from tests.conftest import ROOT

RUNS = moe_scaling.sweep()


def test_every_kind_at_every_size_of_three_budgets():
    budgets = {experiment.length.count for experiment in RUNS.values()}
    assert len(budgets) == 3 and max(budgets) >= 10 * min(budgets) and len(RUNS) == 27
    assert {cost.experts(experiment.model) for experiment in RUNS.values()} == {0, 8, 16}


@pytest.mark.parametrize("runs", [RUNS, moe_scaling.smallest()], ids=["sweep", "smallest"])
def test_names_and_runs_are_unique(runs):
    assert [experiment.name for experiment in runs.values()] == list(runs)
    assert len({experiment.hash for experiment in runs.values()}) == len(runs)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_costs_its_budget_within_one_percent(name):
    assert RUNS[name].flops == pytest.approx(RUNS[name].length.count, rel=0.01)


@pytest.mark.parametrize("width", sorted({experiment.model.d_model for experiment in RUNS.values()}))
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


@pytest.mark.slow
def test_the_smallest_study_runs_and_concludes(tmp_path, cache_dir, monkeypatch, capsys):
    monkeypatch.setenv("LAB_CACHE", str(cache_dir))
    monkeypatch.chdir(ROOT)
    assert cli.main(["--runs", str(tmp_path), "sweep", "experiments/moe_scaling.py:smallest"]) == 0
    out = tmp_path / "moe_scaling-smallest"
    record = json.loads((out / "effective.json").read_text())
    assert len(record["worth"]) == 12 and len(record["dense"]) == 6 and not record["excluded"]
    assert {run["experts"] for run in record["worth"]} == {8, 16}
    assert all(run["active_params"] < run["params"] for run in record["worth"])
    assert "At the largest budget" in capsys.readouterr().out
    assert all((out / name).stat().st_size for name in ("report.html", "moe_scaling.png", "table.csv"))
