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
from research.scaling.intervals import LEVEL, OPTIMUM, Bootstrap, Interval
from research.scaling.isoflop import IsoFlop, Minima, by_budget
from research.scaling.table import ParameterCount, Run

WITHIN = 0.03
SHARE_OF_CARRYING = 1 / 3
FEWEST_HELD_OUT = 3  # runs: where the largest budget has fewer, so are the budgets below it


@dataclass(frozen=True)
class Recommendation:
    """A budget's model (params), its tokens and expected loss (nats per token). reach: flops over the
    largest budget that was run; above 1 it extrapolates, and the sentence says so. intervals: 95%, of "params",
    "tokens" and "loss", where they are known."""

    flops: float
    params: float
    tokens: float
    loss: float
    reach: float
    source: str
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        subject = "the law recommends" if self.source == "law" else "the IsoFLOP minima recommend"
        params, tokens = self._with_interval("params"), self._with_interval("tokens")
        sentence = (
            f"For {self.flops:.3g} FLOPs ({self.reach:.3g}x the largest budget) {subject} a model of {params} "
            f"parameters trained on {tokens} tokens ({self.tokens / self.params:.3g} per parameter), with an "
            f"expected loss of {self._with_interval('loss')} nats per token"
        )
        if self.reach > 1.01:
            sentence += f"; this extrapolates {self.reach:.3g}x beyond the runs"
            sentence += "" if self.source == "law" else ", by a power law for the loss that has no floor"
        return sentence + "."

    def _with_interval(self, name: str) -> str:
        write = "{:.3f}".format if name == "loss" else count_words
        text, interval = write(getattr(self, name)), self.intervals.get(name)
        if interval is None:
            return text
        if not interval.closed:
            return f"{text} (95%: not identified)"
        return f"{text} (95%: {write(interval.low)} to {write(interval.high)})"


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
    """The test on the largest budget (flops). carried_loss: the previous budget's best loss.

    ratio: the law's absolute error on the best held-out run over that of the carried loss. mean_ratio: the
    same for the mean absolute errors over all held-out runs.
    """

    flops: float
    fit: Fit
    predictions: tuple[Prediction, ...]
    carried_flops: float
    carried_loss: float

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
        return (
            f"Fitted without the largest budget ({self.flops:.3g} FLOPs), the law predicts its "
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
    drawn: Bootstrap | None = None,
) -> Recommendation:
    """The law's compute-optimal model at a budget, with FLOPs per token as a function of params.

    largest_flops: the largest budget of the runs behind the law. drawn: laws of resampled runs, for intervals. Raises
    UserError where the law has no optimum.
    """
    best = optimum(law, flops=flops, flops_per_token=flops_per_token)
    intervals = {} if drawn is None else drawn.optimum(flops=flops, flops_per_token=flops_per_token)
    return Recommendation(flops, best.params, best.tokens, best.loss, flops / largest_flops, "law", intervals)


def recommend_from_isoflop(
    found: IsoFlop, *, flops: float, flops_per_token: FlopsPerToken, largest_flops: float, minima: Minima | None = None
) -> Recommendation:
    """The same from the power laws through the IsoFLOP minima: params from its law, tokens from the budget.

    minima: resampled ones, for intervals. Raises UserError where fewer than two budgets are bracketed.
    """
    if found.params_law is None or found.loss_law is None:
        raise UserError(
            f"The IsoFLOP curves recommend nothing: {len(found.bracketed)} of {len(found.curves)} budgets "
            "bracket their optimum and 2 are needed; run the sizes that the report names."
        )
    params = float(found.params_law(flops))
    tokens, loss = flops / flops_per_token(params), float(found.loss_law(flops))
    intervals = {} if minima is None else _isoflop_intervals(found, minima, flops, flops_per_token)
    return Recommendation(flops, params, float(tokens), loss, flops / largest_flops, "IsoFLOP", intervals)


def _isoflop_intervals(
    found: IsoFlop, minima: Minima, flops: float, flops_per_token: FlopsPerToken
) -> dict[str, Interval]:
    """Of the power laws through resampled minima, at a budget; tokens from the params and the budget."""
    good = minima.draws[np.all(np.isfinite(minima.draws), axis=(1, 2))]
    if len(good) < LEVEL * len(minima.draws):
        return {name: Interval(-math.inf, math.inf) for name in OPTIMUM}
    x = np.log([curve.flops for curve in found.bracketed])
    solve = np.linalg.pinv(np.stack([np.ones_like(x), x], axis=1))
    there = np.einsum("kc,rcq->rkq", solve, good)
    at = np.exp(there[:, 0] + there[:, 1] * math.log(flops))  # [resamples, (params, tokens, loss)]
    params, _, loss = (Interval.of(column) for column in at.T)
    ends = [float(flops / flops_per_token(end)) for end in (params.high, params.low)]
    return {"params": params, "tokens": Interval(*ends), "loss": loss}


def which_to_believe(
    law: Recommendation | None, isoflop: Recommendation | None, held_out: HeldOut | None, fit: Fit
) -> str | None:
    """Whether the two recommendations agree, and which to go by where they do not; None without any."""
    sound = fit.convergence.converged and not fit.not_identified
    if law is None or isoflop is None:
        return None
    ratio = max(law.params / isoflop.params, isoflop.params / law.params)
    inside = any(
        one.intervals["params"].holds(other.params)
        for one, other in ((law, isoflop), (isoflop, law))
        if "params" in one.intervals and one.intervals["params"].closed
    )
    if inside or (ratio < 1.1):
        return f"The two agree within their intervals on the model's size (they differ by a factor of {ratio:.2f})."
    believed = (
        "go by the law, which passes the held-out test and uses every run; a parabola's minimum is biased where sizes "
        "lie far to one side"
        if sound and held_out is not None and held_out.passed
        else "go by the IsoFLOP minima for the size, and by neither for the loss, for the law does not pass its tests"
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
    while len(last) < FEWEST_HELD_OUT and len(kept) > 2:
        last = kept.pop() + last
    fit = fit_law(Points.of([run for group in kept for run in group], parameters=parameters), delta=delta, form=form)
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
    return HeldOut(_mean_flops(last), fit, predictions, _mean_flops(kept[-1]), float(carried.loss))


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
