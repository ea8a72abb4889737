# SPDX-License-Identifier: Apache-2.0
"""What to train next: the compute-optimal model and its tokens for a budget, and how far to believe it.

The held-out test leaves the largest budget out of the fit and predicts its runs. Its standard: every
held-out run is predicted within 3% of its loss, and the best of them, and their mean, within a third of the error of
carrying the previous budget's best loss forward, by a law whose numbers the runs determine.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from research.core.types import UserError
from research.scaling.allocation import FlopsPerToken, optimum
from research.scaling.fit import Fit, Points, fit_law
from research.scaling.forms import CHINCHILLA, Form
from research.scaling.intervals import Bootstrap, Interval, lines
from research.scaling.isoflop import IsoFlop, Minima, by_budget
from research.scaling.table import ParameterCount, Run

WITHIN = 0.03
WITHIN_RUNS = 1.01  # over the largest budget: no extrapolation yet
SHARE_OF_CARRYING = 1 / 3
NEARLY = 1.1  # two sizes that differ by less are as good as one
FEWEST_HELD_OUT = 3  # runs: where the largest budget has fewer, so are the budgets below it


@dataclass(frozen=True)
class Recommendation:
    """A budget's model (params), its tokens and expected loss (nats per token; None where it cannot be told). reach:
    flops over the largest budget that was run; above 1, or for less than smallest_flops, it extrapolates, and the
    sentence says so. intervals: 95%, of "params", "tokens" and "loss", where they are known. doubt: why it is not to
    be built on, None where nothing is against it."""

    flops: float
    params: float
    tokens: float
    loss: float | None
    reach: float
    source: str
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    smallest_flops: float = 0.0
    doubt: str | None = None

    @property
    def sentence(self) -> str:
        subject = "the law recommends" if self.source == "law" else "the IsoFLOP minima recommend"
        sentence = (
            f"For {self.flops:.3g} FLOPs ({self.reach:.3g}x the largest budget) {subject} a model of "
            f"{self._with_interval('params')} parameters trained on {self._with_interval('tokens')} tokens "
            f"({self.tokens / self.params:.3g} per parameter)"
        )
        if self.loss is not None:
            sentence += f", with an expected loss of {self._with_interval('loss')} nats per token"
        if self.reach > WITHIN_RUNS:
            sentence += f"; this extrapolates {self.reach:.3g}x beyond the runs"
        if self.flops * WITHIN_RUNS < self.smallest_flops:
            sentence += f"; this extrapolates to {self.flops / self.smallest_flops:.2g}x the smallest of the runs"
        if self.doubt is not None:
            sentence += f"; build nothing on it: {self.doubt}"
        return sentence + "."

    def _with_interval(self, name: str) -> str:
        write = "{:.3f}".format if name == "loss" else count_words
        text, interval = write(getattr(self, name)), self.intervals.get(name)
        return text if interval is None else f"{text} ({interval.told(write)})"


@dataclass(frozen=True)
class Prediction:
    """One held-out run: measured and predicted loss, nats per token; error = predicted - measured."""

    name: str
    params: float
    tokens: float
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted - self.measured

    @property
    def relative_error(self) -> float:
        return self.error / self.measured


@dataclass(frozen=True)
class HeldOut:
    """The test on the largest budget (flops), or on several where it has few runs (budgets: each). carried_loss: the
    best loss of the largest budget below.

    ratio: the law's absolute error on the best held-out run over that of the carried loss. mean_ratio: the
    same for the mean absolute errors over all held-out runs.
    """

    flops: float
    fit: Fit
    predictions: tuple[Prediction, ...]
    carried_flops: float
    carried_loss: float
    budgets: tuple[float, ...]

    @property
    def best(self) -> Prediction:
        return min(self.predictions, key=lambda p: p.measured)

    @property
    def carried_error(self) -> float:
        return self.carried_loss - self.best.measured

    @property
    def ratio(self) -> float:
        return _ratio(abs(self.best.error), abs(self.carried_error))

    @property
    def mean_ratio(self) -> float:
        errors = [abs(p.error) for p in self.predictions]
        carried = [abs(self.carried_loss - p.measured) for p in self.predictions]
        return _ratio(float(np.mean(errors)), float(np.mean(carried)))

    @property
    def largest_relative_error(self) -> float:
        return max(abs(p.relative_error) for p in self.predictions)

    @property
    def passed(self) -> bool:
        worst = max(self.ratio, self.mean_ratio)
        near = self.largest_relative_error <= WITHIN and worst <= SHARE_OF_CARRYING
        return near and self.fit.convergence.converged and not self.fit.not_identified

    @property
    def _doubt(self) -> str:
        if not self.fit.convergence.converged:
            return ", because the fit without them has not converged"
        return ", because the runs do not tell all of its law" if self.fit.not_identified else ""

    @property
    def sentence(self) -> str:
        best = self.best
        which = f"largest budget ({self.flops:.3g} FLOPs)"
        if len(self.budgets) > 1:
            which = f"{len(self.budgets)} largest budgets ({self.budgets[0]:.3g} to {self.budgets[-1]:.3g} FLOPs)"
        return (
            f"Fitted without the {which}, the law predicts its "
            f"{len(self.predictions)} runs within {self.largest_relative_error:.2%} of their loss (3% is "
            f"the standard) and the best of them ({best.name}: {best.measured:.4f}) as "
            f"{best.predicted:.4f}, an error {self.ratio:.2f} times that of carrying the previous budget's "
            f"best loss ({self.carried_loss:.4f}) forward, and {self.mean_ratio:.2f} times over all of them (a third "
            f"is the standard): the test is "
            f"{'passed' if self.passed else 'NOT passed'}"
            f"{self._doubt}."
        )


def recommend(
    law: Any,
    *,
    flops: float,
    flops_per_token: FlopsPerToken,
    largest_flops: float,
    smallest_flops: float = 0.0,
    drawn: Bootstrap | None = None,
    doubt: str | None = None,
) -> Recommendation:
    """The law's compute-optimal model at a budget, with FLOPs per token as a function of params.

    largest_flops, smallest_flops: budgets of the runs behind the law. drawn: laws of resampled runs, for intervals.
    Raises UserError where the law has no optimum.
    """
    best = optimum(law, flops=flops, flops_per_token=flops_per_token)
    intervals = {} if drawn is None else drawn.optimum(flops=flops, flops_per_token=flops_per_token)
    found = (flops, best.params, best.tokens, best.loss, flops / largest_flops, "law", intervals)
    return Recommendation(*found, smallest_flops=smallest_flops, doubt=doubt)


def recommend_from_isoflop(
    found: IsoFlop,
    *,
    flops: float,
    flops_per_token: FlopsPerToken,
    largest_flops: float,
    smallest_flops: float = 0.0,
    minima: Minima | None = None,
) -> Recommendation:
    """The same from the power laws through the IsoFLOP minima: params from its law, tokens from the budget. Beyond the
    runs no loss: a power law through a few minima has no floor, and lies below any loss that is reached.

    minima: resampled ones, for intervals. Raises UserError where fewer than two budgets are bracketed.
    """
    if found.params_law is None or found.loss_law is None:
        raise UserError(
            f"The IsoFLOP curves recommend nothing: {len(found.bracketed)} of {len(found.curves)} budgets "
            "bracket their optimum and 2 are needed; run the sizes that the report names."
        )
    params = float(found.params_law(flops))
    tokens, reach = flops / flops_per_token(params), flops / largest_flops
    loss = float(found.loss_law(flops)) if reach <= WITHIN_RUNS else None
    intervals = {} if minima is None else _isoflop_intervals(found, minima, flops, flops_per_token)
    given = (flops, params, float(tokens), loss, reach, "IsoFLOP", intervals)
    return Recommendation(*given, smallest_flops=smallest_flops)


def _isoflop_intervals(
    found: IsoFlop, minima: Minima, flops: float, flops_per_token: FlopsPerToken
) -> dict[str, Interval]:
    """Of the power laws through resampled minima, at a budget; tokens from the params and the budget."""
    x = np.log([curve.flops for curve in found.bracketed])
    columns, here = np.stack([np.ones_like(x), x], axis=1), np.array([1.0, math.log(flops)])
    params, loss = (Interval.of(np.exp(lines(columns, minima.draws[..., q]) @ here)) for q in (0, 2))
    ends = [float(flops / flops_per_token(end)) for end in (params.high, params.low)] if params.closed else params
    return {"params": params, "tokens": Interval(*ends) if params.closed else params, "loss": loss}


def which_to_believe(
    law: Recommendation | None, isoflop: Recommendation | None, held_out: HeldOut | None, fit: Fit
) -> str | None:
    """Whether the two recommendations agree, and which to go by where they do not; None without any."""
    sound = fit.convergence.converged and not fit.not_identified
    if law is None or isoflop is None:
        return None
    ratio = max(law.params / isoflop.params, isoflop.params / law.params)
    spans = [one.intervals["params"] for one in (law, isoflop) if "params" in one.intervals]
    closed = len(spans) == 2 and all(span.closed for span in spans)
    if closed and (spans[0].holds(isoflop.params) or spans[1].holds(law.params)):
        return f"The two agree within their intervals on the model's size (they differ by a factor of {ratio:.2f})."
    if ratio < NEARLY:
        return f"The two differ by a factor of {ratio:.2f} on the model's size."
    told = "params" not in law.intervals or law.intervals["params"].closed
    believed = (
        "go by the law, which passes the held-out test and uses every run; a parabola's minimum is biased where sizes "
        "lie far to one side"
        if sound and told and held_out is not None and held_out.passed
        else "go by the IsoFLOP minima for the size, and by neither for the loss, for the law does not pass its tests "
        "or is not determined"
    )
    return f"The two disagree on the model's size by a factor of {ratio:.2f}: {believed}."


def hold_out(
    runs: Iterable[Run], *, parameters: ParameterCount = "total", delta: float = 1e-3, form: Form = CHINCHILLA
) -> HeldOut:
    """Fits the law without the largest budget and predicts each of its runs.

    Where the largest budget has fewer than three runs, so are those below it held out until there are three. Raises
    UserError for fewer than three budgets, or too few runs below the largest.
    """
    groups = by_budget(run for run in runs if run.problem is None)
    if len(groups) < 3:
        raise UserError(
            f"The held-out test needs runs at 3 budgets or more, to fit without the largest; there are {len(groups)}."
        )
    *kept, last = groups
    held = [last]
    while sum(map(len, held)) < FEWEST_HELD_OUT and len(kept) > 2:
        held.insert(0, kept.pop())
    last = [run for group in held for run in group]
    try:
        points = Points.of([run for group in kept for run in group], parameters=parameters)
        fit = fit_law(points, delta=delta, form=form)
    except UserError as error:
        raise UserError(
            f"There is no held-out test, for without the largest budget too little is left: {error}"
        ) from None
    predictions = tuple(
        Prediction(
            run.name,
            run.count(parameters),
            run.tokens,
            float(run.loss),
            float(fit.law.loss(params=float(run.count(parameters)), tokens=float(run.tokens))),
        )
        for run in last
    )
    carried = min(kept[-1], key=lambda run: run.loss)
    budgets = tuple(_mean_flops(group) for group in held)
    return HeldOut(_mean_flops(last), fit, predictions, _mean_flops(kept[-1]), float(carried.loss), budgets)


def _mean_flops(runs: list[Run]) -> float:
    return float(np.mean([run.flops for run in runs]))


def _ratio(error: float, other: float) -> float:
    if other == 0:
        return 0.0 if error == 0 else math.inf
    return error / other


def count_words(value: float) -> str:
    """1.4e12 -> "1.4 trillion"."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{round(float(f'{value:.3g}')):,}"
