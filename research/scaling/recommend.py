# SPDX-License-Identifier: Apache-2.0
"""What to train next: the compute-optimal model and its tokens for a budget, and how far to believe it.

The held-out test leaves the largest budget out of the fit and predicts its runs. Its standard: every
held-out run is predicted within 3% of its loss, and the best of them, and their mean, within a third of the error of
carrying the previous budget's best loss forward, by a law whose numbers the runs determine.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from research.core.types import UserError
from research.scaling.fit import Fit, Points, fit_law
from research.scaling.isoflop import IsoFlop, by_budget
from research.scaling.allocation import FlopsPerToken, optimum
from research.scaling.laws import Chinchilla
from research.scaling.table import ParameterCount, Run

WITHIN = 0.03
SHARE_OF_CARRYING = 1 / 3


@dataclass(frozen=True)
class Recommendation:
    """A budget's model (params), its tokens and expected loss (nats per token). reach: flops over the
    largest budget that was run; above 1 it extrapolates, and the sentence says so."""

    flops: float
    params: float
    tokens: float
    loss: float
    reach: float
    source: str
    sentence: str


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


def recommend(law: Chinchilla, *, flops: float, flops_per_token: FlopsPerToken, largest_flops: float) -> Recommendation:
    """The law's compute-optimal model at a budget, with FLOPs per token as a function of params.

    largest_flops: the largest budget of the runs behind the law. Raises UserError where the law has no
    optimum.
    """
    best = optimum(law, flops=flops, flops_per_token=flops_per_token)
    return _recommendation(flops, best.params, best.tokens, best.loss, largest_flops, "law")


def recommend_from_isoflop(
    found: IsoFlop, *, flops: float, flops_per_token: FlopsPerToken, largest_flops: float
) -> Recommendation:
    """The same from the power laws through the IsoFLOP minima: params from its law, tokens from the budget.

    Raises UserError where fewer than two budgets are bracketed.
    """
    if found.params_law is None or found.loss_law is None:
        raise UserError(
            f"The IsoFLOP curves recommend nothing: {len(found.bracketed)} of {len(found.curves)} budgets "
            "bracket their optimum and 2 are needed; run the sizes that the report names."
        )
    params = float(found.params_law(flops))
    tokens, loss = flops / flops_per_token(params), float(found.loss_law(flops))
    return _recommendation(flops, params, tokens, loss, largest_flops, "IsoFLOP")


def _recommendation(
    flops: float, params: float, tokens: float, loss: float, largest: float, source: str
) -> Recommendation:
    reach = flops / largest
    subject = "the law recommends" if source == "law" else "the IsoFLOP minima recommend"
    sentence = (
        f"For {flops:.3g} FLOPs ({reach:.3g}x the largest budget) {subject} a model of {_count(params)} "
        f"parameters trained on {_count(tokens)} tokens ({tokens / params:.3g} per parameter), with an "
        f"expected loss of {loss:.3f} nats per token"
    )
    if reach > 1.01:
        sentence += f"; this extrapolates {reach:.3g}x beyond the runs"
        sentence += "" if source == "law" else ", by a power law for the loss that has no floor"
    return Recommendation(flops, params, tokens, loss, reach, source, sentence + ".")


def hold_out(runs: Iterable[Run], *, parameters: ParameterCount = "total", delta: float = 1e-3) -> HeldOut:
    """Fits the law without the largest budget and predicts each of its runs.

    Raises UserError for fewer than three budgets, or too few runs below the largest.
    """
    groups = by_budget(run for run in runs if run.problem is None)
    if len(groups) < 3:
        raise UserError(
            f"The held-out test needs runs at 3 budgets or more, to fit without the largest; there are {len(groups)}."
        )
    *kept, last = groups
    fit = fit_law(Points.of([run for group in kept for run in group], parameters=parameters), delta=delta)
    predictions = tuple(
        Prediction(
            run.name,
            run.count(parameters),
            run.tokens,
            float(run.loss),
            float(fit.law.loss(params=run.count(parameters), tokens=run.tokens)),
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


def _count(value: float) -> str:
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{round(float(f'{value:.3g}')):,}"
