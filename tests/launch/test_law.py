# SPDX-License-Identifier: Apache-2.0
"""``lab fit``, ``lab recommend`` and ``lab next`` from a CSV and from a study; what cannot be done is one sentence."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from launch import collect, law, study
from launch.cli import main, parser
from research.scaling import buildable, columns, cost, report
from research.scaling.laws import Chinchilla
from research.scaling.table import read_csv
from research.train import loop, metrics

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
QUICK, ALONE = ["--resamples", "50"], ["--resamples", "0"]
NAMED = ["--params-column", "Size", "--flops-column", "Compute used", "--loss-column", "Final", *QUICK]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(
        report, "draw", lambda found, title: {name: {"svg": b"<svg></svg>"} for name in report.plots.pictures(found)}
    )


@pytest.fixture(scope="module")
def runs_csv(tmp_path_factory):
    """Thirty runs of a law with 0.3% noise, a copy, a repeat with another seed, and one that diverged."""
    path = tmp_path_factory.mktemp("csv") / "runs.csv"
    generator, lines = np.random.default_rng(0), ["Size,Compute used,Final"]
    for budget in np.geomspace(1e18, 1e20, 5):
        for factor in np.geomspace(0.3, 3, 6):
            params = factor * math.sqrt(budget / 120)
            loss = LAW.loss(params=params, tokens=budget / (6 * params)) * math.exp(0.003 * generator.standard_normal())
            lines.append(f"{params / 1e6:.4f}M,{budget:.6e},{loss:.5f}")
    size, budget, loss = lines[5].split(",")
    lines += [lines[3], f"{size},{budget},{float(loss) * 1.001:.5f}", f"{size},{2 * float(budget)},7.5"]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A study file, with results of a law on disk as its runs would have left them."""
    folder = tmp_path_factory.mktemp("study")
    path = folder / "own.py"
    path.write_text(STUDY)
    found = study.load(str(path))
    for name, experiment in found.experiments.items():
        run = folder / "runs" / found.name / name
        run.mkdir(parents=True)
        loss = float(LAW.loss(params=cost.params(experiment.model).total, tokens=experiment.tokens)) / 10
        (run / loop.RESULT).write_text(json.dumps({"hash": experiment.hash, "loss": loss, "data": {}}))
        shares = np.geomspace(0.01, 1, 20) * experiment.flops
        lines = [json.dumps({"step": i, "flops": flops, "loss": loss + 1 / (i + 1)}) for i, flops in enumerate(shares)]
        (run / metrics.FILE).write_text("\n".join(lines) + "\n")
    return SimpleNamespace(path=str(path), runs=str(folder / "runs"), study=found)


def loaded(own, *arguments: str) -> law.Loaded:
    return law.load(parser().parse_args(["--runs", own.runs, "next", own.path, "--budget", "1e12", *arguments]))


def test_fit_writes_the_law_and_its_intervals(runs_csv, tmp_path, capsys):
    assert main(["fit", str(runs_csv), *NAMED, "--out", str(tmp_path), "--flops", "1e21"]) == 0
    record = json.loads((tmp_path / "law.json").read_text())
    for name in ("A", "B", "E", "alpha", "beta"):
        assert record["intervals_95"][name]["low"] <= record["law"][name] <= record["intervals_95"][name]["high"]
    exponent = record["intervals_95"]["params_in_compute"]
    assert exponent["low"] < LAW.params_in_compute < exponent["high"]
    assert record["target_flops"] == 1e21
    assert any("6 params tokens" in note for note in record["notes"])
    assert {"report.html", "table.csv", "law.json", "isoflop.svg"} <= {path.name for path in tmp_path.iterdir()}
    printed = capsys.readouterr().out
    assert "For 1e+21 FLOPs" in printed and "(95%: " in printed and "report.html" in printed
    # every row is there, or said to be left out
    table = read_csv(tmp_path / "table.csv")
    assert len(table) == 32 and len(table.finished()) == 31 and "line-32 is left out: a copy of line-4" in printed
    assert "line-34 is taken to have diverged" in printed and "line-34" in record["excluded"]
    assert printed.count("all count (seeds): 1.") == 1


def test_recommend_writes_a_study_that_loads(runs_csv, tmp_path, capsys):
    out = tmp_path / "built.py"
    asked = ["--flops", "1e20", "--served", "100B", "--unique-tokens", "1e9", "--out", str(out)]
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
    assert f"{params:,} parameters." in printed and "lab run " in printed


def test_next_stays_within_its_budget_and_narrows(runs_csv, tmp_path, capsys):
    assert main(["next", str(runs_csv), *NAMED, "--budget", "5e19", "--out", str(tmp_path), "--family", "gpt"]) == 0
    record = json.loads((tmp_path / "next.json").read_text())
    assert 0 < sum(run["flops"] for run in record["runs"]) <= 5e19 * (1 + 1e-9)
    before, after = record["before"], record["after"]
    assert before["low"] < after["low"] < record["optimal_params"] < after["high"] < before["high"]
    assert 0 < record["narrower"] < 1 and "Expected after them" in capsys.readouterr().out
    experiments = study.load(str(tmp_path / "next.py")).experiments
    assert list(experiments) == [f"next-{i + 1}" for i in range(len(record["runs"]))]
    for run, experiment in zip(record["runs"], experiments.values(), strict=True):
        params = cost.params(experiment.model).total  # of the model as built: its tokens are what its budget buys
        assert params == pytest.approx(run["params"], rel=0.06)
        assert 6 * params * experiment.tokens == pytest.approx(run["flops"], rel=0.01)
        assert experiment.model.mlp.activation == "gelu"


def test_a_study_s_own_models_and_settings_go_on(own, tmp_path, capsys):
    assert all(run.problem is None for run in loaded(own).table)
    out = tmp_path / "more.py"
    assert main(["--runs", own.runs, "recommend", own.path, "--flops", "3e12", *ALONE, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "study's family" in printed
    experiment = study.load(str(out)).experiments["recommended"]
    assert experiment.flops == pytest.approx(3e12, rel=0.01)
    assert experiment.optimizer.peak == pytest.approx(0.5 / experiment.model.d_model)  # the study's adjust
    assert experiment.model.d_model // experiment.model.attention.num_heads == 8
    assert f"{cost.params(experiment.model).total:,} parameters." in printed
    assert experiment.source == next(iter(own.study.experiments.values())).source


def test_next_of_a_study_stays_within_its_budget(own, tmp_path, capsys):
    assert main(["--runs", own.runs, "next", own.path, "--budget", "2e12", *ALONE, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "next.json").read_text())
    experiments = study.load(str(tmp_path / "next.py")).experiments.values()
    assert len(experiments) == len(record["runs"]) > 0
    assert sum(experiment.flops for experiment in experiments) <= 2e12 * 1.01  # whole steps
    for run, experiment in zip(record["runs"], experiments, strict=True):
        assert experiment.flops == pytest.approx(run["flops"], rel=0.02)
        assert experiment.optimizer.peak == pytest.approx(0.5 / experiment.model.d_model)
    assert "next.py" in capsys.readouterr().out


def test_counted_without_embeddings_the_model_has_that_size_without_them(own, tmp_path, capsys):
    out, counts = tmp_path / "more.py", ["--parameters", "non_embedding", "--count-flops", "six_per_param"]
    assert main(["--runs", own.runs, "recommend", own.path, "--flops", "1e12", *ALONE, *counts, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Counted as: non_embedding parameters, FLOPs six_per_param." in printed
    model = (experiment := study.load(str(out)).experiments["recommended"]).model
    asked = printed.split("To be built: the compute-optimal model, ")[1].split(" parameters")[0]
    asked = columns.number(asked)
    assert cost.params(model).non_embedding == pytest.approx(asked, rel=0.25)  # widths come in steps of 8
    assert 6 * cost.params(model).non_embedding * experiment.tokens == pytest.approx(1e12, rel=0.02)


def test_curves_are_counted_as_the_runs_are(own):
    plain, counted = loaded(own), loaded(own, "--count-flops", "six_per_param")
    for run in counted.table:
        assert run.flops == 6 * run.params * run.tokens != plain.table[run.name].flops
        assert plain.curves[run.name][-1][0] == pytest.approx(plain.table[run.name].flops, rel=0.2)
        ratios = [a[0] / b[0] for a, b in zip(counted.curves[run.name], plain.curves[run.name], strict=True)]
        assert ratios == pytest.approx([run.flops / plain.table[run.name].flops] * len(ratios))


def test_the_highest_losses_of_a_study_can_be_left_out(own):
    fewer = loaded(own, "--drop-highest-loss", "2")
    assert len(fewer.table) == len(loaded(own).table) - 2 and "Left out for the highest losses" in fewer.notes[0]
    largest = max(run.loss for run in fewer.table)
    assert sum(run.loss > largest for run in loaded(own).table) == 2


def test_another_family_has_the_study_s_layers(own):
    """gpt's shape, with the study's gated feed-forward: what is described is what the file builds."""
    family = law.chosen_family(loaded(own), "gpt")
    model = buildable.nearest(family, params=1e7)
    like = own.study.experiments[next(iter(own.study.experiments))].model
    assert model.mlp.activation == like.mlp.activation == "swiglu" and model.vocab_size == like.vocab_size
    assert model.d_model == 64 * model.attention.num_heads and model.layers == like.layers
    assert law.chosen_family(replace(loaded(own), like=None), None).name == "llama"


def test_results_of_other_settings_do_not_count(own, tmp_path):
    name = next(iter(own.study.experiments))
    (tmp_path / name).mkdir()
    (tmp_path / name / loop.RESULT).write_text(json.dumps({"hash": "another", "loss": 3.0}))
    assert collect.table(own.study, tmp_path).excluded()[name] == "run under other settings"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "absent.csv", "--out", "x"], "cannot be read as a CSV file"),
        (["fit", "absent.py", "--out", "x"], "There is no study absent.py"),
        (["fit", "CSV", *NAMED, "--loss-column", "Loss", "--out", "x"], "has no column 'Loss' for loss"),
        (["fit", "CSV", *NAMED, "--drop-highest-loss", "40", "--out", "x"], "would leave none of the 33 runs"),
        (["fit", "CSV", *NAMED, "--drop-highest-loss", "-1", "--out", "x"], "must be at least 0"),
        (["fit", "CSV", *NAMED, "--drop-budgets", "9", "--out", "x"], "9 of 5 budgets cannot be left out"),
        (["fit", "CSV", *NAMED, "--drop-budgets", "-1", "--out", "x"], "must be at least 0; given -1"),
        (["fit", "CSV", *NAMED, "--max-warmup", "0.1", "--out", "x"], "does not say how long the warm-up"),
        (["fit", "CSV", *NAMED, "--max-warmup", "20", "--out", "x"], "between 0 and 1; given 20"),
        (["fit", "CSV", *NAMED, "--parameters", "with_head", "--out", "x"], "how many parameters the head"),
        (["fit", "CSV", *NAMED, "--parameters", "non_embedding", "--out", "x"], "has one count of parameters"),
        (["fit", "CSV", *NAMED, "--delta", "0", "--out", "x"], "delta must be a positive number"),
        (["fit", "CSV", *NAMED, "--flops", "-3", "--out", "x"], "positive number of FLOPs"),
        (["fit", "CSV", *NAMED, "--resamples", "3", "--out", "x"], "--resamples must be at least 20"),
        (["fit", "CSV", *NAMED, "--resamples", "-1", "--out", "x"], "--resamples must be at least 20"),
        (["fit", "CSV", *NAMED, "--seed-noise", "-1", "--out", "x"], "seed_noise is a standard deviation"),
        (["fit", "OWN", "--loss-column", "Loss", "--out", "x"], "is a study, which has no columns to name"),
        (["fit", "OWN", "--out", "x"], "needs finished runs at 2 compute budgets or more; 0 of 15 runs"),
        (["recommend", "CSV", *NAMED, "--flops", "-3"], "positive number of FLOPs"),
        (["recommend", "CSV", *NAMED, "--flops", "nan"], "positive number of FLOPs"),
        (
            ["recommend", "CSV", *NAMED, "--flops", "1e20", "--served", "0", "--out", "x.py"],
            "--served must be a positive number of tokens, as 2T or 5e11; given 0",
        ),
        (
            ["recommend", "CSV", *NAMED, "--flops", "1e20", "--unique-tokens", "-5", "--out", "x.py"],
            "--unique-tokens must be a positive number of tokens, as 2T or 5e11; given -5",
        ),
        (["recommend", "CSV", *NAMED, "--flops", "1e20", "--family", "bert"], "no family 'bert': choose one of llama"),
        (["recommend", "CSV", *NAMED, "--flops", "1e20", "--out", "x.txt"], "does not end in .py"),
        (["next", "CSV", *NAMED, "--budget", "1e10"], "less than the smallest run"),
        (["next", "CSV", *NAMED, "--budget", "inf"], "positive number of FLOPs"),
        (["next", "CSV", *NAMED, "--budget", "1e19", "--flops", "0"], "positive number of FLOPs"),
        (["next", "CSV", *NAMED, "--budget", "1e19", "--family", "bert"], "no family 'bert'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(runs_csv, own, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    places = {"CSV": str(runs_csv), "OWN": own.path}
    assert main([places.get(part, part) for part in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lab: error: ") and words in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["1e8,2e9,3.0"] * 3, "needs finished runs at 2 compute budgets or more; 1 of 1 runs"),
        ([f"{i}e8,{12 / i:.6f}e9,3.{i}" for i in range(1, 8)], "at 1: run more of the ladder"),
        (["1e8,2e9,nan", "2e8,4e9,nan"], "0 of 2 runs are finished"),
        (["1e8,2e9,3.0", "2e8,4e9,2.9", "4e8,8e9,2.8"], "at least 6 finished runs; there are 3"),
        ([f"1e8,{i}e9,{3 - i / 20}" for i in range(1, 9)], "3 model sizes"),
        (["one,2e9,3.0", ",,"], "can be used: line 2: the params is 'one', which is not a number"),
        (["1,234,567,20,000,000,3.0"], "can be used: line 2: 7 cells for 3 columns"),
    ],
)
def test_too_few_runs_are_one_sentence(tmp_path, capsys, rows, words):
    path = tmp_path / "few.csv"
    path.write_text("params,tokens,loss\n" + "\n".join(rows) + "\n")
    assert main(["fit", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lab: error: ") and words in error and error.count("\n") == 1
