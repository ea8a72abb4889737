# SPDX-License-Identifier: Apache-2.0
"""The report of a study: every file is there, stands alone, and says what was left out; messy tables end
plainly."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from research.core.types import UserError
from research.scaling import canvas, plots, report
from research.scaling.allocation import closed_form_optimum
from research.scaling.analysis import Settings, analyse
from research.scaling.fit import Points, fit_law
from research.scaling.laws import numbers
from research.scaling.report import write_report
from research.scaling.table import Run, Table, read_csv

PNG = b"\x89PNG\r\n\x1a\n"
QUICK = Settings(resamples=0, correct=False)


@pytest.fixture(scope="module")
def written(make_study, tmp_path_factory):
    """A study with every kind of trouble, reported once."""
    runs = list(make_study(noise=0.003))
    runs[0] = replace(runs[0], status="diverged", loss=float("nan"))
    runs[6] = replace(runs[6], status="failed", loss=None)
    runs.append(replace(runs[1], name="endless", loss=float("inf")))
    runs.append(Run("<planned>", 10, 5, 100, 6e3))
    runs.append(replace(runs[3], name="again"))
    shares = (0.01, 0.1, 0.3, 1)
    curves = {run.name: [(run.flops * s, run.loss * s**-0.1) for s in shares] for run in runs[1:20] if run.loss}
    out = tmp_path_factory.mktemp("report") / "deep" / "er"
    table = Table(tuple(runs))
    return (
        table,
        out,
        write_report(
            table, out, title="A <study>", notes=["Why & how."], curves=curves, settings=Settings(resamples=100)
        ),
    )


def test_every_file_is_written(written):
    _, out, conclusion = written
    names = {"overview", *plots.pictures(conclusion)}
    pictures = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == {"table.csv", "law.json", "report.html", *pictures}
    for path in out.iterdir():
        assert path.stat().st_size > 0 and (path.suffix != ".png" or path.read_bytes().startswith(PNG))
        assert path.suffix != ".svg" or path.read_text().startswith("<svg")


def test_the_table_is_kept_whole(written):
    table, out, _ = written
    back = read_csv(out / "table.csv")
    assert [run.name for run in back] == [run.name for run in table] and back.finished().runs == table.finished().runs


def test_law_json_is_strict_and_complete(written):
    table, out, conclusion = written

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    record = json.loads((out / "law.json").read_text(), parse_constant=refuse)
    assert record["law"]["alpha"] == conclusion.fit.law.alpha
    assert record["fit"]["num_runs"] == len(record["fit"]["residuals"]) == len(table.finished()) - 1  # a copy
    assert record["convergence"]["converged"] is True and record["convergence"]["restarts"] >= 2
    assert record["held_out"]["passed"] is True and len(record["held_out"]["predictions"]) == 5
    assert record["parameters"] == "total" and "embedding tables" in record["conventions"]["params"]
    assert record["corpora"] == [{"bytes": 1_115_394, "hash": "86c4e6aa9db7c042"}]
    numbers = {"E", "A", "B", "alpha", "beta", "params_in_compute", "tokens_in_compute"}
    assert set(record["intervals_95"]) == numbers and record["resamples"] == 100
    assert set(record["profile_intervals_95"]) == numbers | {"params", "tokens", "loss"}
    for name in ("E", "A", "B", "alpha", "beta"):
        span = record["intervals_95"][name]
        assert span["low"] <= record["law"][name] <= span["high"]
    assert set(record["recommendation"]["law"]["intervals"]) == {"params", "tokens", "loss"}
    assert record["envelope"]["params_law"]["exponent"] > 0 and record["variable_projection"]["law"]["alpha"] > 0
    assert record["conventions"]["tokenizer"] == "not recorded" and "warm-up" in " ".join(record["remarks"])
    assert [c["name"] for c in record["corrections"]] and record["corrections"][0]["interval_95"]
    assert record["recommendation"]["law"]["reach"] == pytest.approx(10)
    assert record["flops_per_token"]["largest_error"] < 1e-3
    assert len(record["isoflop"]["curves"]) == 4 and record["isoflop"]["params_law"]["exponent"] > 0


def test_exclusions_are_stated(written):
    _, out, conclusion = written
    page = (out / "report.html").read_text()
    assert "again is left out: a copy of " in " ".join(conclusion.remarks)
    for name, reason in conclusion.excluded.items():
        if name == "again":
            continue
        sentence = f"{name} is left out of every fit: {reason}."
        assert sentence in conclusion.remarks
        assert sentence.replace("<", "&lt;").replace(">", "&gt;") in page
    reasons = {"diverged", "failed", "its loss is inf", "never ran", "a copy of another run"}
    assert set(conclusion.excluded.values()) == reasons


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.sources, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_stands_alone(written):
    table, out, _ = written
    page = (out / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.tags.count("svg") == len(plots.pictures(written[2]))
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in links.sources)
    assert not {"script", "link", "iframe", "img"} & set(links.tags)
    spaces = r'(?:xmlns(?::\w+)?="http://www\.w3\.org/[^"]*"|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>)'
    assert "http" not in re.sub(spaces, "", page, flags=re.DOTALL)
    assert "A &lt;study&gt;" in page and "Why &amp; how." in page and "&lt;planned&gt;" in page
    for words in (
        "86c4e6aa9db7c042",
        "1,115,394 bytes",
        "delta = 0.001",
        "embedding tables and output head included",
    ):
        assert words in page
    assert all(run.name in page for run in table.finished())


def test_a_pointer_on_a_point_shows_its_run(written):
    """In every picture that has a point for each run, the run's words are inside that point."""
    table, out, conclusion = written
    page = (out / "report.html").read_text()
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "two things on the page have one id"
    for picture in ("loss_against_compute", "isoflop", "contours", "residuals", "law"):
        svg = (out / f"{picture}.svg").read_text()
        told = re.findall(r'<g id="[^"]+" class="run"><title>([^<]+)</title>', svg)
        assert {words.splitlines()[0] for words in told} >= {run.name for run in conclusion.runs}
        assert all("minimum" in words or "FLOPs, loss" in words for words in told)
        referred = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
        assert referred <= set(re.findall(r' id="([^"]+)"', svg))


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the drawing out, for tests that are not about pictures."""
    names = ("overview", *plots.pictures(None))
    monkeypatch.setattr(report, "draw", lambda *a, **k: {name: {"png": PNG, "svg": b"<svg></svg>"} for name in names})


@pytest.mark.usefixtures("undrawn")
def test_other_parameters_change_the_law_and_are_stated(make_study, tmp_path):
    table = make_study()
    settings = Settings(parameters="non_embedding", target_flops=5e11, resamples=0, correct=False)
    conclusion = write_report(table, tmp_path, settings=settings)
    record = json.loads((tmp_path / "law.json").read_text())
    assert "without embedding tables" in record["conventions"]["params"]
    assert conclusion.from_law.reach < 1 and "extrapolates" not in conclusion.from_law.sentence
    assert conclusion.from_law.params < 0.6 * closed_form(table)


def closed_form(table: Table) -> float:
    return closed_form_optimum(fit_law(Points.of(table)).law, flops=5e11).params


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_had_is_a_remark_not_a_failure(make_study, tmp_path):
    runs = [replace(run, corpus_hash=f"corpus{i % 2}") for i, run in enumerate(make_study(budgets=(3e10, 3e11)))]
    conclusion = write_report(Table(tuple(runs)), tmp_path, settings=QUICK)
    remarks = " ".join(conclusion.remarks)
    assert conclusion.held_out is None and "held-out test needs runs at 3 budgets" in remarks
    assert "not trained on one corpus but on 2" in remarks
    lopsided = [run for run in make_study(spread=6) if run.params < 0.06 * run.flops**0.5]
    conclusion = write_report(Table(tuple(lopsided)), tmp_path, settings=QUICK)
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
    found = analyse(make_study(sizes=2), settings=QUICK)
    drawn = canvas.panels(list(plots.pictures(found).values()), name="all", columns=2, width=8, height=12)
    assert found.minima is None and found.drawn is None and drawn["png"].startswith(PNG)


@pytest.mark.usefixtures("undrawn")
def test_runs_that_hide_something_are_remarked_upon(make_study, tmp_path):
    runs = [replace(run, tokenizer="a", schedule="cosine", unique_tokens=run.tokens) for run in make_study(noise=0.002)]
    runs[3] = replace(runs[3], loss=runs[3].loss * 1.08)
    runs[5] = replace(runs[5], unique_tokens=runs[5].tokens // 3, schedule="constant")
    larger = max(runs[:5], key=lambda run: run.params)
    runs.append(replace(larger, name="worse", tokens=runs[0].tokens * 2, loss=9.0))
    conclusion = write_report(Table(tuple(runs)), tmp_path, settings=QUICK)
    said = " ".join(conclusion.remarks)
    assert "worse is taken to have diverged" in said and conclusion.excluded["worse"] == "diverged"
    assert f"{runs[3].name} lies +" in said and "off the law" in said
    assert "1 of 20 runs see tokens again, up to 3 times" in said
    assert "not trained with one schedule but with 2" in said and "tokenizer" not in said
    assert json.loads((tmp_path / "law.json").read_text())["conventions"]["schedule"] == "constant; cosine"


def test_experts_do_not_stand_among_dense_models(make_study):
    dense = list(make_study(noise=0.002, sizes=6))
    routed = [
        replace(run, name=f"e-{run.name}", experts=8, params=5 * run.params, loss=run.loss * 0.97) for run in dense
    ]
    found, alone = (analyse(Table(tuple(runs)), settings=QUICK) for runs in ([*dense, *routed], dense))
    assert found.fit.law == alone.fit.law and len(found.runs) == len(dense)
    assert found.excluded["e-" + dense[0].name] == "a model with experts among dense ones"
    assert any("24 runs of models with experts are left out" in remark for remark in found.remarks)


def test_losses_that_nothing_moves_are_no_law_to_build_on(make_study):
    same = Table(tuple(replace(run, loss=2.5) for run in make_study(sizes=6)))
    found = analyse(same, settings=Settings(resamples=50, correct=False))
    draws = plots.pictures(found)
    assert canvas.panels([draws["contours"], draws["optimal_size"]], name="x", columns=1, width=4, height=6)
    assert found.from_law is None or ("build nothing on it" in found.from_law.sentence and found.drawn.lost == 50)


def test_a_band_without_ends_is_not_drawn_as_certain(make_study):
    found = analyse(make_study(noise=0.002, sizes=6), settings=Settings(resamples=50, correct=False))
    lost = replace(found.drawn, laws=replace(found.drawn.laws, E=np.full(50, np.nan)), lost=50)
    low, high = replace(found, drawn=lost).frontier.band("params")
    assert np.all(low < found.frontier.params / 100) and np.all(high > 100 * found.frontier.params)


def test_two_intervals_that_part_are_remarked_upon(make_study):
    """Least squares, whose profile it is, follows a few runs far off; Huber's loss does not."""
    runs = [
        replace(run, loss=run.loss * (1.08 if i < 2 else 1)) for i, run in enumerate(make_study(noise=0.001, sizes=6))
    ]
    for table, parted in ((make_study(noise=0.001, sizes=6), False), (Table(tuple(runs)), True)):
        found = analyse(table, settings=Settings(resamples=50, correct=False))
        assert any("go by the bootstrap" in remark for remark in found.remarks) == parted
        assert all(found.profiles[name].holds(value) for name, value in numbers(found.fit.law).items()) != parted


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["kaplan", "over-training"])
def test_other_laws_of_params_and_tokens(make_study, tmp_path, name):
    from research.scaling.forms import FORMS

    form = next(form for form in FORMS if form.name == name)
    write_report(make_study(noise=0.002), tmp_path, settings=Settings(form=form, resamples=50, correct=False))
    record = json.loads((tmp_path / "law.json").read_text())
    assert record["law"]["form"] == form.text and record["exponents"] is None
    assert set(record["intervals_95"]) == set(record["law"]) - {"form"}
