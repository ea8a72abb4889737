# SPDX-License-Identifier: Apache-2.0
"""The one call of a study's ``analyze``: fits, the held-out test, pictures, ``law.json`` and a report in one
page."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.core.files import write_atomically
from research.core.types import UserError
from research.scaling import page, plots
from research.scaling.fit import Fit, Interval, Points, bootstrap, fit_law
from research.scaling.isoflop import IsoFlop, by_budget, fit_isoflop
from research.scaling.laws import FlopsPerToken
from research.scaling.recommend import (
    CostModel,
    HeldOut,
    Recommendation,
    cost_model,
    hold_out,
    recommend,
    recommend_from_isoflop,
)
from research.scaling.table import ParameterCount, Run, Table, write_csv
from research.train import metrics

FEWEST_BUDGETS = 2
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
}
PARAMETER_CONVENTION = {
    "total": "all parameters, embedding tables and output head included (a tied head counts once)",
    "non_embedding": "parameters without embedding tables and without the output head",
}


@dataclass(frozen=True)
class Conclusion:
    """What a study found. held_out, from_law and from_isoflop are None where ``remarks`` says why not.

    cost: FLOPs per token as the recommendations have it, None where the study gave its own.
    from_law, from_isoflop: recommendations for ``target_flops``. intervals: 95% bootstrap, by name of the
    law's numbers. excluded: runs left out of every fit, with the reason. remarks: what a reader must know.
    """

    fit: Fit
    intervals: Mapping[str, Interval]
    isoflop: IsoFlop
    held_out: HeldOut | None
    from_law: Recommendation | None
    from_isoflop: Recommendation | None
    excluded: Mapping[str, str]
    remarks: tuple[str, ...]
    cost: CostModel | None
    parameters: ParameterCount
    num_runs: int
    files: tuple[Path, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """The findings in words: recommendation, held-out test, remarks."""
        found = [part.sentence for part in (self.from_law, self.from_isoflop, self.held_out) if part is not None]
        return (*found, *self.remarks)


CURVE_POINTS = 40


def training_curves(table: Table, out: Path) -> dict[str, list[tuple[float, float]]]:
    """Each run's training loss against the FLOPs spent so far, read from its folder below the study's.

    A curve has at most ``CURVE_POINTS`` points, each the mean of as many steps: single steps are too noisy to see.
    """
    found = {}
    for run in table:
        lines = metrics.read(Path(out) / run.name)
        points = [(line["flops"], line["loss"]) for line in lines if isinstance(line.get("loss"), float)]
        size = -(-len(points) // CURVE_POINTS)
        if points:
            groups = [points[start : start + size] for start in range(0, len(points), size)]
            found[run.name] = [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
    return found


def write_report(
    table: Table,
    out: Path,
    *,
    title: str = "Scaling law",
    notes: Sequence[str] = (),
    curves: plots.Curves | None = None,
    parameters: ParameterCount = "total",
    target_flops: float | None = None,
    flops_per_token: FlopsPerToken | None = None,
    delta: float = 1e-3,
    resamples: int = 200,
) -> Conclusion:
    """Fits a study's runs and writes table.csv, law.json, report.html and the pictures into ``out``.

    curves: training curves by run's name, [(training FLOPs, loss), ...]. parameters: which count stands in
    the law: "total" (as Hoffmann et al. 2022), or "non_embedding" (as Kaplan et al. 2020), which changes the
    exponents of small models. target_flops: the budget to recommend for; by default 10 times the largest.
    flops_per_token: training FLOPs per token as a function of params; by default ``cost_model`` of the runs.
    delta: of the Huber loss. resamples: bootstrap fits behind the intervals (0: none).

    Runs that failed, diverged, are unfinished or have no finite loss are left out, and named. table.csv is
    written first. Raises UserError where fewer than six runs, three sizes or two budgets are left.
    """
    out = Path(out)
    write_csv(table, out / "table.csv")
    runs = list(table.finished())
    _check(runs, table, parameters)
    points = Points.of(runs, parameters=parameters)
    fit = fit_law(points, delta=delta)
    found = fit_isoflop(runs, parameters=parameters)
    remarks = _remarks(table, fit, found)
    held_out = _try(lambda: hold_out(runs, parameters=parameters, delta=delta), remarks)
    largest = found.curves[-1].flops
    target = 10 * largest if target_flops is None else float(target_flops)
    if flops_per_token is None:
        flops_per_token = cost_model(runs, parameters=parameters)
        if flops_per_token.largest_error > 0.1:
            remarks.append(
                f"FLOPs per token are not a simple function of the size of these models (off by up to "
                f"{flops_per_token.largest_error:.0%}): give flops_per_token for a recommendation to rely on."
            )
    spend = {"flops": target, "flops_per_token": flops_per_token, "largest_flops": largest}
    conclusion = Conclusion(
        fit=fit,
        intervals=bootstrap(points, fit=fit, resamples=resamples) if resamples else {},
        isoflop=found,
        held_out=held_out,
        from_law=_try(lambda: recommend(fit.law, **spend), remarks),
        from_isoflop=_try(lambda: recommend_from_isoflop(found, **spend), remarks),
        excluded=table.excluded(),
        remarks=tuple(remarks),
        cost=flops_per_token if isinstance(flops_per_token, CostModel) else None,
        parameters=parameters,
        num_runs=len(runs),
        files=(),
    )
    pictures = _pictures(conclusion, runs, curves, flops_per_token, title, max(1.0, target / largest))
    for name, png in pictures.items():
        write_atomically(out / name, png)
    record = law_record(conclusion, table, title=title, notes=notes)
    write_atomically(out / "law.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_atomically(out / "report.html", page.html(record, table, pictures))
    names = ("table.csv", "law.json", "report.html", *pictures)
    return dataclasses.replace(conclusion, files=tuple(out / name for name in names))


def _check(runs: list[Run], table: Table, parameters: ParameterCount) -> None:
    budgets = len(by_budget(runs))
    if budgets < FEWEST_BUDGETS:
        raise UserError(
            f"A law needs finished runs at {FEWEST_BUDGETS} compute budgets or more; {len(runs)} of "
            f"{len(table)} runs are finished, at {budgets}: run more of the ladder."
        )
    bad = next((run for run in runs if run.count(parameters) <= 0), None)
    if bad is not None:
        raise UserError(f"The run {bad.name} has {bad.count(parameters)} {parameters} parameters: a law needs some.")


def _try(make: Callable[[], Any], remarks: list[str]) -> Any:
    """What ``make`` returns; where it cannot be had, None, and its sentence among the remarks."""
    try:
        return make()
    except UserError as error:
        remarks.append(str(error))
        return None


def _remarks(table: Table, fit: Fit, found: IsoFlop) -> list[str]:
    remarks = [f"{name} is left out of every fit: {reason}." for name, reason in table.excluded().items()]
    remarks += fit.not_identified
    if not fit.convergence.converged:
        remarks.append(f"The fit has not converged: {fit.convergence.message}.")
    remarks += [f"{curve.flops:.3g} FLOPs: {curve.problem}" for curve in found.curves if not curve.bracketed]
    corpora = {(run.corpus_bytes, run.corpus_hash) for run in table.finished()}
    if len(corpora) > 1:
        remarks.append(f"The runs were not trained on one corpus but on {len(corpora)}: their losses may not compare.")
    return remarks


def _pictures(
    conclusion: Conclusion,
    runs: list[Run],
    curves: plots.Curves | None,
    flops_per_token: FlopsPerToken,
    title: str,
    reach: float,
) -> dict[str, bytes]:
    fit, parameters = conclusion.fit, conclusion.parameters
    cost = {"fit": fit, "flops_per_token": flops_per_token, "reach": reach, "parameters": parameters}
    draws: dict[str, plots.Draw] = {
        "loss_against_compute.png": lambda a: plots.loss_against_compute(a, runs=runs, curves=curves, **cost),
        "isoflop.png": lambda a: plots.isoflop_curves(a, found=conclusion.isoflop, parameters=parameters),
        "optimal_size.png": lambda a: plots.optimal_size(a, found=conclusion.isoflop, **cost),
        "law.png": lambda a: plots.law_against_runs(
            a, runs=runs, fit=fit, held_out=conclusion.held_out, parameters=parameters
        ),
    }
    pictures = {"overview.png": plots.panels(list(draws.values()), columns=2, width=14, height=9.6, title=title)}
    return pictures | {name: plots.picture(draw) for name, draw in draws.items()}


def law_record(conclusion: Conclusion, table: Table, *, title: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The content of law.json: plain values, None for what is absent or not finite."""
    fit, held_out = conclusion.fit, conclusion.held_out
    names = Points.of(table, parameters=conclusion.parameters).names
    corpora = sorted({(r.corpus_bytes, r.corpus_hash) for r in table.finished()}, key=str)
    record = {
        "title": title,
        "notes": list(notes),
        "law": {"form": "loss = E + A / params^alpha + B / tokens^beta", **dataclasses.asdict(fit.law)},
        "intervals_95": {name: dataclasses.asdict(interval) for name, interval in conclusion.intervals.items()},
        "exponents": {
            "params_in_compute": fit.law.beta / (fit.law.alpha + fit.law.beta),
            "tokens_in_compute": fit.law.alpha / (fit.law.alpha + fit.law.beta),
        },
        "fit": {
            "objective": fit.objective,
            "objective_form": "sum of Huber losses of log(predicted / measured)",
            "delta": fit.delta,
            "num_runs": conclusion.num_runs,
            "rms_residual": fit.rms_residual,
            "largest_residual": fit.largest_residual,
            "residuals": dict(zip(names, fit.residuals, strict=True)),
            "not_identified": list(fit.not_identified),
        },
        "convergence": dataclasses.asdict(fit.convergence),
        "held_out": held_out
        and {
            "flops": held_out.flops,
            "law": dataclasses.asdict(held_out.fit.law),
            "convergence": dataclasses.asdict(held_out.fit.convergence),
            "num_runs": len(held_out.fit.residuals),
            "predictions": [
                dataclasses.asdict(p) | {"error": p.error, "relative_error": p.relative_error}
                for p in held_out.predictions
            ],
            "largest_relative_error": held_out.largest_relative_error,
            "carried_flops": held_out.carried_flops,
            "carried_loss": held_out.carried_loss,
            "carried_error": held_out.carried_error,
            "best_error": held_out.best.error,
            "ratio": held_out.ratio,
            "mean_ratio": held_out.mean_ratio,
            "passed": held_out.passed,
            "sentence": held_out.sentence,
        },
        "isoflop": {
            "curves": [dataclasses.asdict(curve) for curve in conclusion.isoflop.curves],
            **{
                name: law and dataclasses.asdict(law)
                for name in ("params_law", "tokens_law", "loss_law")
                for law in [getattr(conclusion.isoflop, name)]
            },
        },
        "recommendation": {
            name: found and dataclasses.asdict(found)
            for name, found in (("law", conclusion.from_law), ("isoflop", conclusion.from_isoflop))
        },
        "flops_per_token": conclusion.cost and dataclasses.asdict(conclusion.cost),
        "conventions": {"params": PARAMETER_CONVENTION[conclusion.parameters], **CONVENTIONS},
        "parameters": conclusion.parameters,
        "corpora": [{"bytes": size, "hash": digest} for size, digest in corpora],
        "excluded": dict(conclusion.excluded),
        "remarks": list(conclusion.remarks),
    }
    return page.finite(record)
