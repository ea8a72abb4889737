# SPDX-License-Identifier: Apache-2.0
"""Everything that is concluded from a table of runs, with its intervals: what a report writes down.

Hoffmann et al. 2022's three approaches side by side (the envelope of training curves, IsoFLOP profiles, a parametric
law), the law's intervals by two methods, a held-out extrapolation, corrections, and recommendations.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from research.core.types import UserError
from research.scaling import allocation, columns, corrections, envelope, intervals, isoflop
from research.scaling.allocation import Allocation, CostModel, FlopsPerToken, cost_model
from research.scaling.corrections import Variant
from research.scaling.envelope import Curves, Envelope
from research.scaling.fit import Fit, Points, fit_law, fit_projected
from research.scaling.forms import CHINCHILLA, Form
from research.scaling.intervals import EXPONENTS, OPTIMUM, Bootstrap, Interval
from research.scaling.isoflop import IsoFlop, Minima, by_budget
from research.scaling.laws import numbers
from research.scaling.recommend import (
    HeldOut,
    Recommendation,
    hold_out,
    recommend,
    recommend_from_isoflop,
    which_to_believe,
)
from research.scaling.table import ParameterCount, Run, Table

FEWEST_BUDGETS = 2
BEYOND = 1e3  # times a value: outside any picture of it
BUDGETS = 30  # of the frontier
FEW_BUDGETS_NAMED = 8  # remarks on single IsoFLOP curves; more are summed up
FAR = 8.0  # times the typical residual (median absolute, times 1.4826): a run that far off is named
FLOPS_VARY = 0.1  # relative error of the cost model, from which on it is no function of size


@dataclass(frozen=True)
class Settings:
    """How to analyse. parameters: which count stands in the law: "total" (as Hoffmann et al. 2022), "non_embedding" (as
    Kaplan et al. 2020), which changes the exponents of small models, or "with_head". target_flops: the budget to
    recommend for; by default 10 times the largest. flops_per_token: training FLOPs per token as a function of params;
    by
    default ``cost_model`` of the runs. delta: of the Huber loss. resamples: bootstrap fits (0: none). seed_noise: see
    ``intervals.bootstrap``. form: the law, one of params and tokens. correct: whether to compare ways of counting."""

    parameters: ParameterCount = "total"
    target_flops: float | None = None
    flops_per_token: FlopsPerToken | None = None
    delta: float = 1e-3
    resamples: int = 4000
    seed_noise: float = 0.0
    form: Form = CHINCHILLA
    correct: bool = True


@dataclass(frozen=True)
class Frontier:
    """The law's optimum against compute, arrays [BUDGETS], and its resamples': [resamples, BUDGETS]; None without.
    bootstrap: where these are from."""

    flops: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    drawn: Allocation | None
    bootstrap: Bootstrap | None

    def band(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of the 95% interval, beyond any picture where it has no end; the line itself without draws."""
        line = getattr(self, what)
        if self.drawn is None or self.bootstrap is None:
            return line, line
        spans = [self.bootstrap.interval(column) for column in getattr(self.drawn, what).T]
        ends = [(max(span.low, at / BEYOND), min(span.high, at * BEYOND)) for span, at in zip(spans, line, strict=True)]
        return tuple(np.transpose(ends))


@dataclass(frozen=True)
class Conclusion:
    """What the runs say. held_out, envelope, minima, drawn, from_law and from_isoflop are None where they cannot be
    had; ``remarks`` says why.

    projected: variable projection's own fit. intervals: 95% bootstrap, by name of the law's numbers and of
    ``EXPONENTS``. profiles: the same by profile likelihood, and of the optimum at target_flops. excluded: runs left
    out of every fit, with the reason. remarks: what a reader must know.
    """

    settings: Settings
    runs: tuple[Run, ...]
    table: Table
    fit: Fit
    projected: Fit | None
    drawn: Bootstrap | None
    intervals: Mapping[str, Interval]
    profiles: Mapping[str, Interval]
    isoflop: IsoFlop
    minima: Minima | None
    envelope: Envelope | None
    held_out: HeldOut | None
    target_flops: float
    from_law: Recommendation | None
    from_isoflop: Recommendation | None
    variants: tuple[Variant, ...]
    flops_per_token: FlopsPerToken
    excluded: Mapping[str, str]
    remarks: tuple[str, ...]
    belief: str | None = None
    curves: Curves = field(default_factory=dict)

    @property
    def cost(self) -> CostModel | None:
        """FLOPs per token as the recommendations have it, None where the study gave its own."""
        return self.flops_per_token if isinstance(self.flops_per_token, CostModel) else None

    @property
    def largest_flops(self) -> float:
        return max(curve.flops for curve in self.isoflop.curves)

    @functools.cached_property
    def frontier(self) -> Frontier | None:
        """From the smallest budget to the target; None where the law has no optimum."""
        smallest = min(curve.flops for curve in self.isoflop.curves)
        flops = np.geomspace(smallest, max(self.largest_flops, self.target_flops), BUDGETS)
        best = allocation.optima(self.fit.law, flops=flops, flops_per_token=self.flops_per_token)
        if not np.all(np.isfinite(best.params)):
            return None
        drawn = self.drawn and self.drawn.optima(flops=flops, flops_per_token=self.flops_per_token)
        return Frontier(flops, best.params, best.tokens, best.loss, drawn, self.drawn)

    @property
    def sentences(self) -> tuple[str, ...]:
        """The findings in words: recommendations, which to believe, held-out test, remarks."""
        parts = [part.sentence for part in (self.from_law, self.from_isoflop) if part is not None]
        parts += [text for text in (self.belief, self.held_out and self.held_out.sentence) if text]
        return (*parts, *self.remarks)


def analyse(table: Table, *, settings: Settings | None = None, curves: Curves | None = None) -> Conclusion:
    """Fits, intervals, tests and recommendations.

    Runs that failed, diverged, are unfinished, copies or without a finite loss are left out, and named. curves:
    training curves by run's name. Raises UserError where fewer than six runs, three sizes or two budgets are left.
    """
    settings = settings or Settings()
    parameters, curves = settings.parameters, curves or {}
    cleaned, notes = columns.clean(table)
    runs, routed = _dense(list(cleaned.finished()))
    check(runs, table, parameters)
    fit = fit_law(Points.of(runs, parameters=parameters), form=settings.form, delta=settings.delta)
    found = isoflop.fit_isoflop(runs, parameters=parameters)
    remarks = [*notes, *_remarks(cleaned, runs, fit, found)]
    if routed:
        remarks.append(
            f"{len(routed)} runs of models with experts are left out: a law of params and tokens is of dense models "
            "(what experts are worth: research.scaling.effective)."
        )
    held_out = attempt(lambda: hold_out(runs, parameters=parameters, delta=settings.delta, form=settings.form), remarks)
    largest = max(curve.flops for curve in found.curves)
    target = 10 * largest if settings.target_flops is None else float(settings.target_flops)
    cost = settings.flops_per_token or _cost(runs, parameters, remarks)
    drawn = intervals.bootstrap(fit, resamples=settings.resamples, seed_noise=settings.seed_noise)
    if drawn is None and settings.resamples:
        remarks.append(f"{len(runs)} runs are too few for a bootstrap: the only intervals are the profile's.")
    minima = isoflop.resample(found) if settings.resamples else None
    smallest = min(curve.flops for curve in found.curves)
    spend = {"flops": target, "flops_per_token": cost, "largest_flops": largest, "smallest_flops": smallest}
    from_law = attempt(lambda: recommend(fit.law, **spend, drawn=drawn, doubt=_doubt(fit)), remarks)
    from_isoflop = attempt(lambda: recommend_from_isoflop(found, **spend, minima=minima), remarks)
    profiles = _profiles(fit, target, cost) if settings.resamples else {}
    remarks += _second_opinion(profiles, fit, drawn)
    variants, said = corrections.compare(runs, delta=settings.delta) if settings.correct else ((), ())
    return Conclusion(
        settings=settings,
        runs=tuple(runs),
        table=table,
        fit=fit,
        projected=attempt(lambda: fit_projected(fit.points, form=settings.form), remarks),
        drawn=drawn,
        intervals={} if drawn is None else _intervals(fit, drawn),
        profiles=profiles,
        isoflop=found,
        minima=minima,
        envelope=attempt(lambda: envelope.fit_envelope(runs, curves, parameters=parameters), remarks)
        if curves
        else None,
        held_out=held_out,
        target_flops=target,
        from_law=from_law,
        from_isoflop=from_isoflop,
        variants=variants,
        flops_per_token=cost,
        excluded=_excluded(table, cleaned) | dict.fromkeys(routed, "a model with experts among dense ones"),
        remarks=(*remarks, *said),
        belief=which_to_believe(from_law, from_isoflop, held_out, fit),
        curves=curves,
    )


def _dense(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """(the dense runs, the names of the others), where there are both kinds; else (all, none)."""
    dense = [run for run in runs if not run.experts]
    if not dense:
        return runs, []
    return dense, [run.name for run in runs if run.experts]


def check(runs: list[Run], table: Table, parameters: ParameterCount) -> None:
    """Raises UserError where the runs are too few for any law."""
    budgets = len(by_budget(runs))
    if budgets < FEWEST_BUDGETS:
        raise UserError(
            f"A law needs finished runs at {FEWEST_BUDGETS} compute budgets or more; {len(runs)} of "
            f"{len(table)} runs are finished, at {budgets}: run more of the ladder."
        )
    bad = next((run for run in runs if run.count(parameters) <= 0), None)
    if bad is not None:
        raise UserError(f"The run {bad.name} has {bad.count(parameters)} {parameters} parameters: a law needs some.")


def attempt(make: Callable[[], Any], remarks: list[str]) -> Any:
    """What ``make`` returns; where it cannot be had, None, and its sentence among the remarks."""
    try:
        return make()
    except UserError as error:
        remarks.append(str(error))
        return None


def _cost(runs: list[Run], parameters: ParameterCount, remarks: list[str]) -> CostModel:
    cost = cost_model(runs, parameters=parameters)
    if cost.largest_error > FLOPS_VARY:
        remarks.append(
            f"FLOPs per token are not a simple function of the size of these models (off by up to "
            f"{cost.largest_error:.0%}): a recommendation does not rely on them (a study's analyze may "
            "give its own flops_per_token)."
        )
    return cost


def _intervals(fit: Fit, drawn: Bootstrap) -> dict[str, Interval]:
    found = drawn.numbers()
    if fit.form == CHINCHILLA:
        slope = drawn.laws.params_in_compute
        found |= dict(zip(EXPONENTS, (drawn.interval(slope), drawn.interval(1 - slope)), strict=True))
    return found


def _profiles(fit: Fit, target: float, cost: FlopsPerToken) -> dict[str, Interval]:
    """By profile likelihood: the law's numbers, exponents where it has them, and the optimum at the target."""
    chinchilla = fit.form == CHINCHILLA
    measure = intervals.exponents_at_budget if chinchilla else intervals.at_budget
    names = (*numbers(fit.law), *(EXPONENTS if chinchilla else ()), *OPTIMUM)
    at = {"flops": target, "cost": allocation.as_tree(cost), "others": {}}
    return intervals.profile(fit, measure=measure, names=names, at=at)


def _doubt(fit: Fit) -> str | None:
    if not fit.convergence.converged:
        return "the fit has not converged"
    away = fit.form.astray(fit.theta, *fit.form.bounds(np.log(fit.points.loss)))
    return "the runs do not determine the law" if away else None


def _second_opinion(profiles: Mapping[str, Interval], fit: Fit, drawn: Bootstrap | None) -> list[str]:
    """What is open in the profiles, and which of the law's numbers they do not hold; refits that were lost."""
    said = [
        f"{name} is not identified: no value of it is bad enough on one side."
        for name, interval in profiles.items()
        if not interval.closed
    ]
    outside = [name for name, value in numbers(fit.law).items() if name in profiles and not profiles[name].holds(value)]
    if drawn is not None and drawn.lost > len(drawn) * intervals.TAIL / 100:
        said.append(
            f"{drawn.lost / len(drawn):.0%} of the bootstrap's refits did not converge: these runs do not determine "
            "the law, and its intervals have no ends."
        )
    elif drawn is not None and drawn.astray is not None and drawn.astray.mean() > intervals.TAIL / 100:
        said.append(
            f"{drawn.astray.mean():.0%} of the bootstrap's refits ended at a bound of their search: an interval's end "
            "that rests on them is left open."
        )
    elif outside and fit.convergence.converged:
        said.append(
            f"The profile's intervals do not hold the fitted {', '.join(outside)}: they are of least squares, which "
            "runs far off the law move more than the fit's Huber loss; go by the bootstrap, and look at those runs."
        )
    return said


def _excluded(table: Table, cleaned: Table) -> dict[str, str]:
    kept = {run.name for run in cleaned}
    copies = {run.name: "a copy of another run" for run in table if run.name not in kept}
    return {**cleaned.excluded(), **copies}


def _remarks(table: Table, runs: list[Run], fit: Fit, found: IsoFlop) -> list[str]:
    remarks = [f"{name} is left out of every fit: {reason}." for name, reason in table.excluded().items()]
    remarks += fit.not_identified
    if not fit.convergence.converged:
        remarks.append(f"The fit has not converged: {fit.convergence.message}.")
    loose = [curve for curve in found.curves if not curve.bracketed]
    if len(loose) <= FEW_BUDGETS_NAMED:
        remarks += [f"{curve.flops:.3g} FLOPs: {curve.problem}" for curve in loose]
    else:
        few = sum("(there " in curve.problem for curve in loose)
        remarks.append(
            f"{len(loose)} of {len(found.curves)} IsoFLOP budgets are not bracketed and left out of the IsoFLOP fit "
            f"({few} of them have too few sizes for a parabola); the table of minima names each."
        )
    residuals = np.abs(fit.residuals)
    typical = 1.4826 * float(np.median(residuals))
    for index in np.nonzero(residuals > max(FAR * typical, 0.01))[0][:10]:
        off = -fit.residuals[index]
        name = fit.points.names[index] if fit.points.names else f"point {index + 1}"
        remarks.append(
            f"{name} lies {off:+.1%} off the law, {residuals[index] / typical:.0f} times the typical residual."
        )
    for what, values in (
        ("corpus", {(run.corpus_bytes, run.corpus_hash) for run in runs}),
        ("tokenizer", {run.tokenizer for run in runs}),
        ("schedule", {run.schedule for run in runs}),
    ):
        if len(values) > 1:
            verb = "on" if what == "corpus" else "with"
            told = (
                f"The runs were not trained {verb} one {what} but {verb} {len(values)}: their losses may not compare."
            )
            remarks.append(told)
    repeated = [run for run in runs if run.unique_tokens is not None and run.tokens > 1.001 * run.unique_tokens]
    if repeated:
        most = max(run.tokens / run.unique_tokens for run in repeated)
        remarks.append(
            f"{len(repeated)} of {len(runs)} runs see tokens again, up to {most:.2g} times: the law takes them for new "
            "ones (up to 4 times costs little; Muennighoff et al. 2023)."
        )
    return remarks
