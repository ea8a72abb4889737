# SPDX-License-Identifier: Apache-2.0
"""What to run next: the runs that most shrink the interval of the optimal size at a target, per FLOP spent.

Optimal design on the fitted law (c-optimality; Pukelsheim 2006, chapter 2): every run adds its Fisher information, and
the variance of log N* follows from the sum. Runs are chosen one at a time by variance removed per FLOP; the intervals
before and after are then measured by simulation, on refitted laws, not on the linear model that chose.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from research.core.types import UserError
from research.scaling import allocation, intervals, projection
from research.scaling.allocation import FlopsPerToken, optima, optimum
from research.scaling.fit import Fit, as_law, problem
from research.scaling.intervals import MORE_RUNS, TAIL, Bootstrap, Interval
from research.scaling.recommend import count_words

SIZES = 17  # candidate sizes of a budget, from an eighth to eight times its optimum
BUDGETS = 12  # candidate budgets, from the smallest run to what may be spent
REACH = 1.5  # how far beyond the runs' sizes and tokens per parameter a candidate may lie: the law is not known there
MOST_RUNS = 12
LEAST_SHARE = 0.02  # of the variance left: no run is worth its trouble that removes less
SIMULATIONS = 1000


@dataclass(frozen=True)
class Proposal:
    """A run to make. share: of the variance of log N* that was left, which it removes."""

    flops: float
    params: float
    tokens: float
    share: float


@dataclass(frozen=True)
class Design:
    """runs: in the order of choice. before: the 95% interval of the optimal params at ``target_flops``; after: the one
    to expect. narrower: the width of the second over that of the first, in log params, from simulated studies that were
    refitted: the runs as they are, and with the proposed ones. budget: what they might cost together."""

    target_flops: float
    optimal_params: float
    runs: tuple[Proposal, ...]
    before: Interval
    after: Interval
    narrower: float
    budget: float

    @property
    def flops(self) -> float:
        return sum(run.flops for run in self.runs)

    @property
    def _capped(self) -> tuple[str, ...]:
        """Says so where the number of runs, not the budget, has ended the choice."""
        if len(self.runs) < MOST_RUNS or self.flops > 0.9 * self.budget:
            return ()
        left = self.budget - self.flops
        return (f"No more than {MOST_RUNS} runs are proposed at a time; these leave {left:.3g} FLOPs of the budget.",)

    @property
    def sentences(self) -> tuple[str, ...]:
        lines = [
            f"{count_words(run.params)} parameters on {count_words(run.tokens)} tokens ({run.flops:.3g} FLOPs), "
            f"which removes "
            f"{run.share:.0%} of the variance left"
            for run in self.runs
        ]
        return (
            f"The optimal size at {self.target_flops:.3g} FLOPs is {count_words(self.optimal_params)} "
            f"parameters, between "
            f"{_ends(self.before)} (95%).",
            f"{len(self.runs)} runs, {self.flops:.3g} FLOPs together:",
            *lines,
            *self._capped,
            f"Expected after them: between {_ends(self.after)}, an interval {self.narrower:.2f} times as wide "
            f"(in logs).",
        )


def propose(
    fit: Fit,
    *,
    budget: float,
    target_flops: float,
    flops_per_token: FlopsPerToken = allocation.six_per_param,
    drawn: Bootstrap | None = None,
    seed: int = 0,
) -> Design:
    """Runs that cost at most ``budget`` FLOPs together, each from the smallest budget that was run up to all of it.

    drawn: the fit's bootstrap, for the interval before; without it that is simulated too. Residuals' spread is taken
    to stay as it is. Raises UserError for a budget below the smallest run, for runs that do
    not determine the law, or where it has no optimum at the target.
    """
    allocation.check_flops(budget)
    few = len(fit.points) < fit.form.size + 1 + MORE_RUNS
    if few or (drawn is not None and drawn.lost > TAIL / 100 * len(drawn)):
        raise UserError(
            f"These {len(fit.points)} runs do not determine the law yet, so no run can be said to narrow it: run at "
            "least 3 sizes around the best at each of 3 budgets first."
        )
    best = optimum(fit.law, flops=target_flops, flops_per_token=flops_per_token)
    candidates = _candidates(fit, budget, flops_per_token)
    task = problem(fit.points, form=fit.form, delta=math.inf)
    names = fit.form.inputs
    with jax.enable_x64(True):
        gradients = functools.partial(intervals.predicted, fit.form, fit.theta[None], task.scale)
        rows = gradients(dict(zip(names, candidates[:2], strict=True)))[1][0]
        done = gradients(dict(task.inputs))[1][0]
        cost = allocation.as_tree(flops_per_token)
        slope = _slope(fit.form, fit.theta, task.scale, target_flops, cost)
    rows, done, slope = (np.asarray(value) for value in (rows, done, slope))
    chosen, shares = _greedy(rows, done, slope, candidates[2], budget)
    if not chosen:
        raise UserError(
            f"No run like those there are that costs at most {budget:.3g} FLOPs would narrow the interval: give "
            f"a larger budget."
        )
    params, tokens, flops = (values[chosen] for values in candidates)
    runs = [Proposal(*map(float, run)) for run in zip(flops, params, tokens, shares, strict=True)]
    simulate = functools.partial(_simulated, fit, target_flops=target_flops, flops_per_token=flops_per_token, seed=seed)
    before, after = simulate(np.array([]), np.array([])), simulate(params, tokens)
    narrower = _width(after) / _width(before) if before.closed else float(not after.closed)
    if drawn is not None:
        before = drawn.optimum(flops=target_flops, flops_per_token=flops_per_token)["params"]
        ends = (best.params * (end / best.params) ** narrower for end in (before.low, before.high))
        after = Interval(*ends) if before.closed else after
    return Design(float(target_flops), best.params, tuple(runs), before, after, narrower, float(budget))


def _width(interval: Interval) -> float:
    return math.log(interval.high / interval.low) if interval.closed else math.inf


def _candidates(fit: Fit, budget: float, flops_per_token: FlopsPerToken) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(params, tokens, FLOPs) of runs that could be made: sizes about the optimum of each of some budgets."""
    points = fit.points
    cost = np.vectorize(flops_per_token, otypes=[float])
    smallest = float((cost(points.params) * points.tokens).min())
    if budget < smallest:
        raise UserError(
            f"{budget:.3g} FLOPs are less than the smallest run had ({smallest:.3g}): give a larger budget."
        )
    budgets = np.geomspace(smallest, budget, BUDGETS)
    best = optima(fit.law, flops=budgets, flops_per_token=flops_per_token).params
    best = np.where(np.isfinite(best), best, math.exp(np.log(points.params).mean()))
    params = (best[:, None] * np.geomspace(1 / 8, 8, SIZES)).ravel()
    flops = budgets.repeat(SIZES)
    tokens = flops / cost(params)
    known = np.ones(len(params), bool)
    for values, ran in ((params, points.params), (tokens / params, points.tokens / points.params)):
        known &= (values >= ran.min() / REACH) & (values <= ran.max() * REACH)
    return params[known], tokens[known], flops[known]


def _greedy(
    rows: np.ndarray, done: np.ndarray, slope: np.ndarray, flops: np.ndarray, budget: float
) -> tuple[list[int], list[float]]:
    """Indices of the runs, each the one that removes most of the variance left for what it costs, and the share that it
    removes."""
    precision = done.T @ done
    precision = precision + 1e-9 * np.trace(precision) * np.eye(len(precision))

    def covariance(chosen: Sequence[int]) -> np.ndarray:
        return np.linalg.inv(precision + rows[list(chosen)].T @ rows[list(chosen)])

    def removed(inverse: np.ndarray) -> np.ndarray:
        """Variance that each candidate would remove (Sherman and Morrison 1950)."""
        moved = rows @ inverse
        return (moved @ slope) ** 2 / (1 + np.einsum("ck,ck->c", moved, rows))

    chosen: list[int] = []
    shares: list[float] = []
    left = budget
    while len(chosen) < MOST_RUNS:
        inverse = covariance(chosen)
        gain = np.where(flops <= left * (1 + 1e-9), removed(inverse), -1.0)
        variance = slope @ inverse @ slope
        if gain.max() < LEAST_SHARE * variance:
            break
        # of the runs that do at least half of what the best does: the very cheapest would be repeated without end
        strong = np.nonzero(gain >= 0.5 * gain.max())[0]
        pick = int(strong[np.argmax(gain[strong] / flops[strong])])
        chosen.append(pick)
        shares.append(float(gain[pick] / variance))
        left -= flops[pick]
    return chosen, shares


@functools.partial(jax.jit, static_argnums=0)
def _slope(form: Any, theta: Any, scale: Any, flops: Any, cost: Any) -> jax.Array:
    return jax.grad(lambda t: allocation.log_optimal_params(form.law(t, scale), flops, cost=cost, others={}))(theta)


def _simulated(
    fit: Fit,
    params: np.ndarray,
    tokens: np.ndarray,
    *,
    target_flops: float,
    flops_per_token: FlopsPerToken,
    seed: int,
) -> Interval:
    """The interval of the optimal params over studies drawn from the law: its own runs and these, with residuals drawn
    from the fit's, stretched for the numbers that were fitted to them."""
    points, size = fit.points, fit.form.size
    joined = {
        "params": np.concatenate([points.params, params]),
        "tokens": np.concatenate([points.tokens, tokens]),
    }
    residuals = np.array(fit.residuals) * math.sqrt(len(points) / (len(points) - size))
    generator = np.random.default_rng(seed)
    predicted = np.log(fit.law.loss(**joined))
    drawn = residuals[generator.integers(0, len(residuals), (SIMULATIONS, len(predicted)))]
    bigger = problem(type(points)(**joined, loss=np.exp(predicted)), form=fit.form, delta=fit.delta)
    exact = {"inputs": bigger.inputs, "loss": np.exp(predicted), "scale": bigger.scale}
    start = np.stack(projection.starts(fit.form, **exact, count=1))
    solved = bigger.solve(np.tile(start, (SIMULATIONS, 1)), log_loss=predicted + drawn)
    drawn = Bootstrap(as_law(fit.form, solved.theta, bigger.scale))
    return drawn.optimum(flops=target_flops, flops_per_token=flops_per_token)["params"]


def _ends(interval: Interval) -> str:
    if not interval.closed:
        return "bounds that the runs do not determine"
    return f"{count_words(interval.low)} and {count_words(interval.high)}"
