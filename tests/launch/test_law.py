# SPDX-License-Identifier: Apache-2.0
"""``lab fit``, ``lab recommend`` and ``lab next`` from a CSV and from a study; what cannot be done is one sentence."""

import json
import math

import numpy as np
import pytest

from launch import collect, study
from launch.cli import main
from research.scaling import cost, report
from research.scaling.laws import Chinchilla
from research.train import loop

LAW = Chinchilla(E=1.7, A=400.0, B=1500.0, alpha=0.34, beta=0.36)
STUDY = """
from dataclasses import replace
from experiments import quickstart
from research.scaling import ladder


def adjust(experiment):
    return replace(experiment, optimizer=replace(experiment.optimizer, peak=0.5 / experiment.model.d_model))


def sweep():
    models = [quickstart.model(width) for width in (16, 24, 32, 48, 64)]
    return ladder.isoflop(quickstart.base(), models=models, budgets=(1e11, 3e11, 1e12), adjust=adjust, min_steps=50)
"""


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(
        report, "draw", lambda found, title: {name: {"svg": b"<svg></svg>"} for name in report.plots.pictures(found)}
    )


@pytest.fixture(scope="module")
def runs_csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("csv") / "runs.csv"
    generator, lines = np.random.default_rng(0), ["Size,Compute used,Final"]
    for budget in np.geomspace(1e18, 1e20, 5):
        for factor in np.geomspace(0.3, 3, 6):
            params = factor * math.sqrt(budget / 120)
            loss = LAW.loss(params=params, tokens=budget / (6 * params)) * math.exp(0.003 * generator.standard_normal())
            lines.append(f"{params / 1e6:.4f}M,{budget:.6e},{loss:.5f}")
    path.write_text("\n".join(lines) + "\n")
    return path


NAMED = ["--params-column", "Size", "--flops-column", "Compute used", "--loss-column", "Final", "--resamples", "60"]


def test_fit_writes_the_law_and_its_intervals(runs_csv, tmp_path, capsys):
    assert main(["fit", str(runs_csv), *NAMED, "--out", str(tmp_path), "--flops", "1e21"]) == 0
    record = json.loads((tmp_path / "law.json").read_text())
    for name in ("A", "B", "E", "alpha", "beta"):
        assert record["intervals_95"][name]["low"] <= record["law"][name] <= record["intervals_95"][name]["high"]
    assert record["target_flops"] == 1e21 and "30 cells" not in record["notes"]
    assert any("6 params tokens" in note for note in record["notes"])
    assert {"report.html", "table.csv", "isoflop.svg"} <= {path.name for path in tmp_path.iterdir()}
    printed = capsys.readouterr().out
    assert "For 1e+21 FLOPs" in printed and "(95%: " in printed and "report.html" in printed


def test_recommend_writes_a_study_that_loads(runs_csv, tmp_path, capsys):
    out = tmp_path / "built.py"
    asked = ["--flops", "1e20", "--served", "1e11", "--unique-tokens", "1e9", "--out", str(out)]
    assert main(["recommend", str(runs_csv), *NAMED, *asked]) == 0
    printed = capsys.readouterr().out
    for words in (
        "served over its life",
        "unique tokens",
        "Experts",
        "To be built: the inference-aware",
        "llama family",
    ):
        assert words in printed
    experiment = study.load(str(out)).experiments["recommended"]
    params = cost.params(experiment.model).total
    assert 1e8 < params < LAW.frontier_params(3e10) and experiment.model.d_model % 128 == 0
    assert experiment.tokens > 20 * params  # smaller, and trained for longer


def test_next_stays_within_its_budget_and_narrows(runs_csv, tmp_path, capsys):
    assert main(["next", str(runs_csv), *NAMED, "--budget", "5e19", "--out", str(tmp_path), "--family", "gpt"]) == 0
    record = json.loads((tmp_path / "next.json").read_text())
    assert 0 < sum(run["flops"] for run in record["runs"]) <= 5e19 * 1.001
    before, after = record["before"], record["after"]
    assert before["low"] < after["low"] < record["optimal_params"] < after["high"] < before["high"]
    assert 0 < record["narrower"] < 1 and "Expected after them" in capsys.readouterr().out
    assert len(study.load(str(tmp_path / "next.py")).experiments) == len(record["runs"])


def test_a_study_s_own_models_and_settings_go_on(tmp_path, capsys):
    path = tmp_path / "own.py"
    path.write_text(STUDY)
    found = study.load(str(path))
    for name, experiment in found.experiments.items():
        folder = tmp_path / "runs" / found.name / name
        folder.mkdir(parents=True)
        loss = float(LAW.loss(params=cost.params(experiment.model).total, tokens=experiment.tokens)) / 10
        (folder / loop.RESULT).write_text(json.dumps({"hash": experiment.hash, "loss": loss, "data": {}}))
    assert all(run.problem is None for run in collect.table(found, tmp_path / "runs" / found.name))
    where = ["--runs", str(tmp_path / "runs")]
    out = tmp_path / "more.py"
    assert main([*where, "recommend", str(path), "--flops", "3e12", "--resamples", "20", "--out", str(out)]) == 0
    assert "study's family" in capsys.readouterr().out
    experiment = study.load(str(out)).experiments["recommended"]
    assert experiment.flops == pytest.approx(3e12, rel=0.01)
    assert experiment.optimizer.peak == pytest.approx(0.5 / experiment.model.d_model)  # the study's adjust
    assert experiment.model.d_model // experiment.model.attention.num_heads == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "absent.csv", "--out", "x"], "cannot be read as a CSV file"),
        (["fit", "absent.py", "--out", "x"], "There is no study absent.py"),
        (["fit", "CSV", *NAMED, "--loss-column", "Loss", "--out", "x"], "has no column 'Loss' for loss"),
        (["fit", "CSV", *NAMED, "--drop-highest-loss", "40", "--out", "x"], "would leave none of the 30 runs"),
        (["fit", "CSV", *NAMED, "--drop-budgets", "9", "--out", "x"], "9 of 5 budgets cannot be left out"),
        (["fit", "CSV", *NAMED, "--max-warmup", "0.1", "--out", "x"], "does not say how long the warm-up"),
        (
            ["fit", "CSV", *NAMED, "--parameters", "with_head", "--out", "x"],
            "does not say how many parameters the head",
        ),
        (["fit", "CSV", *NAMED, "--delta", "0", "--out", "x"], "delta must be a positive number"),
        (["fit", "CSV", *NAMED, "--seed-noise", "-1", "--out", "x"], "seed_noise is a standard deviation"),
        (["recommend", "CSV", *NAMED, "--flops", "-3"], "positive number of FLOPs"),
        (
            ["recommend", "CSV", *NAMED, "--flops", "1e20", "--served", "0", "--out", "x.py"],
            "served over a model's life",
        ),
        (["recommend", "CSV", *NAMED, "--flops", "1e20", "--family", "bert"], "no family 'bert': choose one of llama"),
        (["recommend", "CSV", *NAMED, "--flops", "1e20", "--out", "x.txt"], "does not end in .py"),
        (["next", "CSV", *NAMED, "--budget", "1e10"], "less than the smallest run"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(runs_csv, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main([str(runs_csv) if part == "CSV" else part for part in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lab: error: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["1e8,2e9,3.0"] * 3, "needs finished runs at 2 compute budgets or more"),
        ([f"{i}e8,{12 / i:.6f}e9,3.{i}" for i in range(1, 8)], "at 1: run more of the ladder"),
        (["1e8,2e9,nan", "2e8,4e9,nan"], "0 of 2 runs are finished"),
        (["1e8,2e9,3.0", "2e8,4e9,2.9", "4e8,8e9,2.8"], "at least 6 finished runs; there are 3"),
    ],
)
def test_too_few_runs_are_one_sentence(tmp_path, capsys, rows, words):
    path = tmp_path / "few.csv"
    path.write_text("params,tokens,loss\n" + "\n".join(rows) + "\n")
    assert main(["fit", str(path), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
