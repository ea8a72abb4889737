# SPDX-License-Identifier: Apache-2.0
"""The one call of a study's ``analyze``: fits, tests, pictures, ``law.json`` and a report in one page."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.core.files import write_atomically
from research.scaling import canvas, page, plots
from research.scaling.analysis import Conclusion, Settings, analyse
from research.scaling.envelope import Curves
from research.scaling.fit import Fit
from research.scaling.intervals import Interval
from research.scaling.laws import numbers
from research.scaling.recommend import HeldOut, Recommendation
from research.scaling.table import Run, Table, write_csv
from research.train import metrics

OVERVIEW = ("loss_against_compute", "isoflop", "optimal_size", "optimal_tokens", "contours", "extrapolation")
CURVE_POINTS = 60
CONVENTIONS = {
    "loss": "validation loss at the end of the run, nats per token",
    "flops": (
        "training FLOPs of matrix products, a multiply and an add counted as two: forward and backward, "
        "attention over the full square of positions and the output head included; embedding look-ups, "
        "norms, softmax, activations and recomputation not (research/scaling/cost.py)"
    ),
    "exponents": (
        "of the optimum where FLOPs are proportional to params x tokens: beta / (alpha + beta) and alpha / (alpha + "
        "beta); the pictures and recommendations go by the models' exact FLOPs"
    ),
    "tokens": "training tokens: steps x rows x sequence length",
    "budget": "runs whose FLOPs lie within 5% of one another share a budget",
    "intervals": (
        "95%: a bootstrap over runs (percentiles), and profile likelihood with normal errors of log loss; both "
        "take the law's form for true, so they do not cover its being wrong: the held-out test looks at that"
    ),
}
PARAMETER_CONVENTION = {
    "total": "all parameters, embedding tables and output head included (a tied head counts once)",
    "non_embedding": "parameters without embedding tables and without the output head",
    "with_head": "parameters without embedding tables, the output head included",
}


def training_curves(table: Table, out: Path) -> dict[str, list[tuple[float, float]]]:
    """Each run's training loss against the FLOPs spent so far, read from its folder below the study's.

    A curve has at most ``CURVE_POINTS`` points, each the mean over a stretch of steps that grows with the compute spent
    (equal steps in its log): single steps are too noisy to see.
    """
    found = {}
    for run in table:
        lines = metrics.read(Path(out) / run.name)
        points = [(line["flops"], line["loss"]) for line in lines if isinstance(line.get("loss"), float)]
        if len(points) > 1:
            found[run.name] = _thinned(points)
    return found


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    edges = np.geomspace(points[0][0], points[-1][0] * (1 + 1e-9), CURVE_POINTS + 1)[1:]
    places = np.searchsorted(edges, [flops for flops, _ in points])
    values = np.array(points)
    return [tuple(values[places == place].mean(axis=0).tolist()) for place in np.unique(places)]


def write_report(
    table: Table,
    out: Path,
    *,
    title: str = "Scaling law",
    notes: Sequence[str] = (),
    curves: Curves | None = None,
    settings: Settings | None = None,
    conventions: Mapping[str, str] | None = None,
) -> Conclusion:
    """Analyses a study's runs (``analysis.analyse``) and writes table.csv, law.json, report.html and the pictures,
    each as PNG and SVG, into ``out``. table.csv is written first.

    conventions: what differs from ``CONVENTIONS``. Raises UserError where fewer than six runs, three sizes or two
    budgets are left.
    """
    out = Path(out)
    write_csv(table, out / "table.csv")
    found = analyse(table, settings=settings, curves=curves)
    for name, kinds in draw(found, title=title).items():
        for kind, data in kinds.items():
            write_atomically(out / f"{name}.{kind}", data)
    record = law_record(found, title=title, notes=notes, conventions=conventions)
    write_atomically(out / "law.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    svgs = {name: (out / f"{name}.svg").read_text("utf-8") for name in plots.pictures(found)}
    write_atomically(out / "report.html", page.html(record, table, svgs))
    return found


def draw(found: Conclusion, *, title: str) -> dict[str, canvas.Pictures]:
    """Every picture by name, and the overview of the chief ones."""
    draws = plots.pictures(found)
    drawn = {name: canvas.picture(one, name=name) for name, one in draws.items()}
    chosen = [draws[name] for name in OVERVIEW]
    whole = canvas.panels(chosen, name="overview", columns=2, width=14, height=14.4, title=title)
    return {"overview": whole, **drawn}


def law_record(
    found: Conclusion, *, title: str, notes: Sequence[str] = (), conventions: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The content of law.json: plain values, None for what is absent or not finite."""
    fit, parameters, runs = found.fit, found.settings.parameters, found.runs
    corpora = sorted({(r.corpus_bytes, r.corpus_hash) for r in runs}, key=str)
    record = {
        "title": title,
        "notes": list(notes),
        "law": {"form": fit.form.text, **numbers(fit.law)},
        "intervals_95": _plain(found.intervals),
        "profile_intervals_95": _plain(found.profiles),
        "resamples": 0 if found.drawn is None else len(found.drawn),
        "resamples_lost": 0 if found.drawn is None else found.drawn.lost,
        "exponents": None
        if fit.form.name != "chinchilla"
        else {
            "params_in_compute": fit.law.params_in_compute,
            "tokens_in_compute": 1 - fit.law.params_in_compute,
        },
        "fit": _fit_record(fit),
        "variable_projection": found.projected
        and {"law": numbers(found.projected.law), "objective": found.projected.objective},
        "convergence": dataclasses.asdict(fit.convergence),
        "held_out": found.held_out and _held_out_record(found.held_out),
        "isoflop": _isoflop_record(found),
        "envelope": found.envelope
        and {
            "params_law": numbers(found.envelope.params_law),
            "tokens_law": numbers(found.envelope.tokens_law),
            "intervals_95": _plain(found.envelope.intervals),
            "runs": sorted(set(found.envelope.names)),
        },
        "corrections": [
            {
                "name": v.name,
                "num_runs": v.num_runs,
                "params_in_compute": v.params_in_compute,
                "rms_residual": v.fit.rms_residual,
            }
            | {"interval_95": v.interval and dataclasses.asdict(v.interval)}
            for v in found.variants
        ],
        "target_flops": found.target_flops,
        "recommendation": {
            "law": found.from_law and _recommendation_record(found.from_law),
            "isoflop": found.from_isoflop and _recommendation_record(found.from_isoflop),
            "belief": found.belief,
        },
        "flops_per_token": found.cost and dataclasses.asdict(found.cost),
        "conventions": {
            "params": PARAMETER_CONVENTION[parameters],
            **CONVENTIONS,
            **(conventions or {}),
            **_settings(runs),
        },
        "parameters": parameters,
        "corpora": [{"bytes": size, "hash": digest} for size, digest in corpora],
        "excluded": dict(found.excluded),
        "remarks": list(found.remarks),
    }
    return page.finite(record)


def _settings(runs: Sequence[Run]) -> dict[str, str]:
    """Tokenizer and schedule of the runs, in words."""
    found = {}
    for name in ("tokenizer", "schedule"):
        values = sorted({getattr(run, name) or "not recorded" for run in runs})
        found[name] = "; ".join(values)
    return found


def _plain(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: dataclasses.asdict(interval) for name, interval in intervals.items()}


def _fit_record(fit: Fit) -> dict[str, Any]:
    return {
        "objective": fit.objective,
        "objective_form": "sum of Huber losses of log(predicted / measured)",
        "delta": fit.delta,
        "num_runs": len(fit.points),
        "rms_residual": fit.rms_residual,
        "largest_residual": fit.largest_residual,
        "residuals": dict(zip(fit.points.names, fit.residuals, strict=True)),
        "not_identified": list(fit.not_identified),
    }


def _held_out_record(test: HeldOut) -> dict[str, Any]:
    return {
        "flops": test.flops,
        "budgets": list(test.budgets),
        "law": numbers(test.fit.law),
        "convergence": dataclasses.asdict(test.fit.convergence),
        "num_runs": len(test.fit.residuals),
        "predictions": [
            dataclasses.asdict(p) | {"error": p.error, "relative_error": p.relative_error} for p in test.predictions
        ],
        "largest_relative_error": test.largest_relative_error,
        "carried_flops": test.carried_flops,
        "carried_loss": test.carried_loss,
        "carried_error": test.carried_error,
        "best_error": test.best.error,
        "ratio": test.ratio,
        "mean_ratio": test.mean_ratio,
        "passed": test.passed,
        "sentence": test.sentence,
    }


def _isoflop_record(found: Conclusion) -> dict[str, Any]:
    curves, minima = [], found.minima
    for curve in found.isoflop.curves:
        known = found.isoflop.bracketed.index(curve) if curve.bracketed and minima is not None else None
        spans = {} if known is None else {n: minima.interval(known, n) for n in ("params", "tokens", "loss")}
        curves.append(dataclasses.asdict(curve) | {"intervals_95": _plain(spans)})
    laws = {name: getattr(found.isoflop, name) for name in ("params_law", "tokens_law", "loss_law")}
    return {
        "curves": curves,
        **{name: law and numbers(law) for name, law in laws.items()},
        "exponent_intervals_95": {} if minima is None else _plain(minima.exponents),
    }


def _recommendation_record(found: Recommendation) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"sentence": found.sentence}
