# SPDX-License-Identifier: Apache-2.0
"""The studies of scaling as they are written: runs within budgets, rules applied, what is concluded."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import chinchilla, kaplan_vs_chinchilla, lr_batch
from launch import collect
from launch.study import Study
from research.scaling import cost, disagreement
from research.scaling.laws import Chinchilla
from research.scaling.table import Run, Table

STUDIES = (chinchilla, kaplan_vs_chinchilla, lr_batch)
LAW = Chinchilla(E=1.2, A=25.0, B=120.0, alpha=0.35, beta=0.38)


def named(module):
    return module.__name__.split(".")[-1]


def finished(runs, loss) -> Table:
    """Runs as the launcher gathers them, with losses as ``loss(run)`` has them."""
    found = []
    for run in collect.table(Study("study", "study", runs, None), Path("no-such-folder")):
        value = float(loss(run))
        found.append(replace(run, status="finished", loss=value, bits_per_byte=value, unique_tokens=6_000_000))
    return Table(tuple(found))


@pytest.mark.parametrize("module", STUDIES, ids=named)
@pytest.mark.parametrize("function", ["sweep", "smallest"])
def test_names_and_runs_are_unique_and_within_budget(module, function):
    runs = getattr(module, function)()
    assert [experiment.name for experiment in runs.values()] == list(runs)
    assert len({experiment.hash for experiment in runs.values()}) == len(runs)
    for experiment in runs.values():
        assert experiment.flops == pytest.approx(experiment.length.count, rel=0.01)


@pytest.mark.parametrize("module", STUDIES, ids=named)
def test_the_docstring_names_question_command_hardware_and_expected_numbers(module):
    parts = dict(re.findall(r"^(\w+):\s+(.+(?:\n .+)*)", module.__doc__, flags=re.MULTILINE))
    assert set(parts) >= {"Question", "Command", "Hardware", "Expect"}
    assert parts["Command"].strip() == f"lab sweep experiments/{named(module)}.py"
    assert "cores" in parts["Hardware"] and "minutes" in parts["Hardware"]
    assert re.search(r"\d\.\d+", parts["Expect"])


@pytest.mark.parametrize("module", STUDIES, ids=named)
def test_the_smallest_study_costs_under_a_twentieth(module):
    small, whole = (sum(e.flops for e in runs.values()) for runs in (module.smallest(), module.sweep()))
    assert small < 0.05 * whole


def test_chinchilla_has_six_sizes_at_each_of_six_budgets_around_the_best():
    runs = chinchilla.sweep()
    by_budget = {}
    for experiment in runs.values():
        ratio = experiment.tokens / cost.params(experiment.model).total
        by_budget.setdefault(experiment.length.count, []).append(ratio)
    assert len(by_budget) == 6 and all(len(ratios) == 6 for ratios in by_budget.values())
    assert all(min(ratios) < 5 and max(ratios) > 35 for ratios in by_budget.values())


def test_learning_rate_and_batch_follow_the_rules():
    for experiment in chinchilla.sweep().values():
        params, tokens = cost.params(experiment.model).total, experiment.tokens
        assert experiment.optimizer.peak == pytest.approx(chinchilla.learning_rate(params, tokens), rel=0.01)
        wanted = chinchilla.batch_tokens(params, tokens)
        assert (
            abs(experiment.tokens_per_step - wanted) <= max(2.1 * 32, 0.02 * wanted)
            or experiment.tokens_per_step == 128
        )


@pytest.mark.slow
def test_chinchilla_concludes_from_finished_runs(tmp_path, capsys):
    noise = iter(0.003 * np.random.default_rng(0).standard_normal(36))
    table = finished(chinchilla.sweep(), lambda r: LAW.loss(params=r.params, tokens=r.tokens) * math.exp(next(noise)))
    chinchilla.analyze(table, tmp_path)
    record = json.loads((tmp_path / "law.json").read_text())
    assert record["held_out"]["passed"] and len(record["corrections"]) >= 4
    assert "cosine" in record["conventions"]["schedule"] and "512" in record["conventions"]["tokenizer"]
    assert "The two agree" in capsys.readouterr().out


def test_lr_batch_finds_the_rules_of_its_runs(tmp_path):
    def loss(run: Run) -> float:
        best = LAW.loss(params=run.params, tokens=run.tokens)
        rate = math.log(run.learning_rate / (20 * run.params**-0.7))
        batch = math.log(run.batch_tokens / (0.01 * run.tokens**0.75))
        return best * (1 + 0.01 * rate**2 + 0.01 * batch**2 - 0.01 * rate * batch)

    lr_batch.analyze(finished(lr_batch.sweep(), loss), tmp_path)
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert record["by_size"]["learning_rate"]["exponents"]["params"] == pytest.approx(-0.7, abs=0.1)
    assert record["by_size"]["batch_tokens"]["exponents"]["tokens"] == pytest.approx(0.75, abs=0.1)
    assert all((tmp_path / name).stat().st_size for name in ("report.html", "tuning.png", "tuning.svg", "table.csv"))


def test_counting_the_head_alone_lowers_kaplan_s_exponent():
    """Runs whose loss follows one law of the multiplied parameters: read along curves, counted in two ways."""
    experiments = kaplan_vs_chinchilla.sweep()
    table = finished(
        experiments, lambda run: LAW.loss(params=run.non_embedding_params + run.head_params, tokens=run.tokens)
    )
    curves = {}
    for run in table:
        seen = np.geomspace(run.tokens / 100, run.tokens, 60)
        losses = LAW.loss(params=float(run.non_embedding_params + run.head_params), tokens=seen)
        curves[run.name] = list(zip(seen, losses, strict=True))
    found = disagreement.compare_steps(list(table), curves)
    kaplan, head, *_ = (one.exponent for one in found.found)
    assert head == pytest.approx(LAW.params_in_compute, abs=0.06)  # parabolas are biased
    assert kaplan > head + 0.05
    assert found.found[1].exponent == pytest.approx(found.found[2].exponent, abs=0.01)  # one law, so warm-up is nothing
    assert "Porian et al." in found.sentences[-1]
