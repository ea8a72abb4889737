# SPDX-License-Identifier: Apache-2.0
"""The report of a study: every file is there, stands alone, and says what was left out; messy tables end
plainly."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from research.core.types import UserError
from research.scaling import plots
from research.scaling.fit import Points, fit_law
from research.scaling.isoflop import fit_isoflop
from research.scaling.recommend import cost_model
from research.scaling.report import write_report
from research.scaling.table import Run, Table, read_csv

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def written(make_study, tmp_path_factory):
    """A study with every kind of trouble, reported once."""
    runs = list(make_study(noise=0.003))
    runs[0] = replace(runs[0], status="diverged", loss=float("nan"))
    runs[6] = replace(runs[6], status="failed", loss=None)
    runs.append(replace(runs[1], name="endless", loss=float("inf")))
    runs.append(Run("<planned>", 10, 5, 100, 6e3))
    curves = {run.name: [(run.flops * s, run.loss * (1 + 0.1 * (1 - s))) for s in (0.2, 0.5, 1)] for run in runs[1:5]}
    out = tmp_path_factory.mktemp("report") / "deep" / "er"
    table = Table(tuple(runs))
    return (
        table,
        out,
        write_report(table, out, title="A <study>", notes=["Why & how."], curves=curves, resamples=20),
    )


def test_every_file_is_written(written):
    _, out, conclusion = written
    assert {path.name for path in conclusion.files} == {path.name for path in out.iterdir()}
    assert {"table.csv", "law.json", "report.html", "overview.png"} <= {path.name for path in out.iterdir()}
    for path in conclusion.files:
        assert path.stat().st_size > 0 and (path.suffix != ".png" or path.read_bytes().startswith(PNG))


def test_the_table_is_kept_whole(written):
    table, out, _ = written
    back = read_csv(out / "table.csv")
    assert [run.name for run in back] == [run.name for run in table] and back.finished() == table.finished()


def test_law_json_is_strict_and_complete(written):
    table, out, conclusion = written

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    record = json.loads((out / "law.json").read_text(), parse_constant=refuse)
    assert record["law"]["alpha"] == conclusion.fit.law.alpha
    assert record["fit"]["num_runs"] == len(record["fit"]["residuals"]) == len(table.finished())
    assert record["convergence"]["converged"] is True and record["convergence"]["restarts"] >= 2
    assert record["held_out"]["passed"] is True and len(record["held_out"]["predictions"]) == 5
    assert record["parameters"] == "total" and "embedding tables" in record["conventions"]["params"]
    assert record["corpora"] == [{"bytes": 1_115_394, "hash": "86c4e6aa9db7c042"}]
    assert set(record["intervals_95"]) == {"E", "A", "B", "alpha", "beta"}
    assert record["recommendation"]["law"]["reach"] == pytest.approx(10)
    assert record["flops_per_token"]["largest_error"] < 1e-3
    assert len(record["isoflop"]["curves"]) == 4 and record["isoflop"]["params_law"]["exponent"] > 0


def test_exclusions_are_stated(written):
    _, out, conclusion = written
    page = (out / "report.html").read_text()
    for name, reason in conclusion.excluded.items():
        sentence = f"{name} is left out of every fit: {reason}."
        assert sentence in conclusion.remarks
        assert sentence.replace("<", "&lt;").replace(">", "&gt;") in page
    assert set(conclusion.excluded.values()) == {"diverged", "failed", "its loss is inf", "never ran"}


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_stands_alone(written):
    table, out, _ = written
    page = (out / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.sources) == 5 and all(s.startswith("data:image/png;base64,") for s in links.sources)
    assert not {"script", "link", "iframe"} & set(links.tags) and "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "A &lt;study&gt;" in page and "Why &amp; how." in page and "&lt;planned&gt;" in page
    for words in (
        "86c4e6aa9db7c042",
        "1,115,394 bytes",
        "delta = 0.001",
        "embedding tables and output head included",
    ):
        assert words in page
    assert all(run.name in page for run in table.finished())


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the drawing out, for tests that are not about pictures."""
    monkeypatch.setattr(plots, "panels", lambda *args, **kwargs: PNG)


@pytest.mark.usefixtures("undrawn")
def test_other_parameters_change_the_law_and_are_stated(make_study, tmp_path):
    table = make_study()
    conclusion = write_report(table, tmp_path, parameters="non_embedding", target_flops=5e11, resamples=0)
    record = json.loads((tmp_path / "law.json").read_text())
    assert "without embedding tables" in record["conventions"]["params"]
    assert conclusion.from_law.reach < 1 and "extrapolates" not in conclusion.from_law.sentence
    assert conclusion.from_law.params < 0.6 * closed_form(table)


def closed_form(table: Table) -> float:
    from research.scaling.laws import closed_form_optimum

    return closed_form_optimum(fit_law(Points.of(table)).law, flops=5e11).params


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_had_is_a_remark_not_a_failure(make_study, tmp_path):
    runs = [replace(run, corpus_hash=f"corpus{i % 2}") for i, run in enumerate(make_study(budgets=(3e10, 3e11)))]
    conclusion = write_report(Table(tuple(runs)), tmp_path, resamples=0)
    remarks = " ".join(conclusion.remarks)
    assert conclusion.held_out is None and "held-out test needs runs at 3 budgets" in remarks
    assert "not trained on one corpus but on 2" in remarks
    lopsided = [run for run in make_study(spread=6) if run.params < 0.06 * run.flops**0.5]
    conclusion = write_report(Table(tuple(lopsided)), tmp_path, resamples=0)
    assert conclusion.from_isoflop is None and "not bracketed: run sizes" in " ".join(conclusion.remarks)


def test_too_little_is_one_sentence(make_study, tmp_path):
    with pytest.raises(UserError, match="0 of 0 runs are finished"):
        write_report(Table(), tmp_path)
    with pytest.raises(UserError, match="2 compute budgets or more; 5 of 5 runs are finished, at 1"):
        write_report(make_study(budgets=(1e11,)), tmp_path)
    with pytest.raises(UserError, match="at least 6 finished runs; there are 4"):
        write_report(make_study(budgets=(1e11, 1e12), sizes=2), tmp_path)
    broken = Table(tuple(replace(run, loss=float("nan")) for run in make_study()))
    with pytest.raises(UserError, match="0 of 20 runs are finished"):
        write_report(broken, tmp_path)
    assert len(read_csv(tmp_path / "table.csv")) == 20  # the runs are kept even where nothing can be concluded


def test_pictures_without_curves_or_minima(make_study):
    runs = [run for run in make_study(sizes=2)]
    points = Points.of(runs)
    found, fit = fit_isoflop(runs), fit_law(points)
    cost = {"fit": fit, "flops_per_token": cost_model(runs)}
    png = plots.panels(
        [
            lambda a: plots.loss_against_compute(a, runs=runs, curves=None),
            lambda a: plots.isoflop_curves(a, found=found),
            lambda a: plots.optimal_size(a, found=found, **cost),
            lambda a: plots.law_against_runs(a, runs=runs[:1], fit=fit),
        ],
        columns=2,
        width=8,
        height=6,
    )
    assert png.startswith(PNG)
