# SPDX-License-Identifier: Apache-2.0
"""Intervals of anything that a law says: a bootstrap over runs, and profile likelihood as a second opinion.

The bootstrap refits the law to runs drawn with replacement, by the fit's own objective. The profile takes the log
losses' errors as normal and asks, of each quantity, how far it can be moved before the best fit that has it there is
worse than chance allows: no sampling, and an end that does not exist is found not to exist.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import UserError
from research.scaling import allocation
from research.scaling.allocation import Allocation, FlopsPerToken
from research.scaling.fit import FEWEST_VALUES, GRADIENT, Fit, as_law, fit_law, problem
from research.scaling.laws import numbers
from research.scaling.newton import BLOCK, QUICKLY_COMPILED, Measure, Problem, Pull, Solved

LEVEL = 0.95
TAIL = 100 * (1 - LEVEL) / 2  # percent
SPACING, FARTHEST = 0.35, 5.25  # of the profile's points, in standard errors of the quantity
WIDER = 5.0  # how much farther a second look goes, where the first did not find an end
MORE_RUNS = 2  # than a fit needs: with fewer a bootstrap's intervals hold the truth too seldom (.75 where .95 is said)
TRIES, MANY_LOST = 8, 0.25  # starts of a refit that did not converge; share of them beyond which none is begun again
LOOSE = 1e-4  # gradient of a profile's lane that does not count, in ``Solved.gradient``'s measure
STIFF = 100.0  # the pull's weight over what the quantity's own curve has


@dataclass(frozen=True)
class Interval:
    """A 95% interval. An end that the runs do not determine is infinite."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Any) -> "Interval":
        """Of a quantity with these values in resamples, plain percentiles; a NaN is a resample that does not have it,
        and where more than one tail's are, the interval has no ends."""
        values = np.asarray(values, float)
        if np.isnan(values).mean() > TAIL / 100:
            return cls(-math.inf, math.inf)
        return cls(*np.nanpercentile(values, [TAIL, 100 - TAIL]).tolist())

    @property
    def closed(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def told(self, write: Callable[[float], str]) -> str:
        """In words: "95%: 1.2 to 3.4", or what is known of it."""
        low, high = math.isfinite(self.low), math.isfinite(self.high)
        if low and high:
            return f"95%: {write(self.low)} to {write(self.high)}"
        if low or high:
            return f"95%: at least {write(self.low)}" if low else f"95%: at most {write(self.high)}"
        return "95%: not identified"


# --- what intervals are of


def all_numbers(law: Any, at: Any) -> jax.Array:
    """The law's numbers."""
    del at
    return jnp.stack([jnp.asarray(value, float) for value in numbers(law).values()])


def at_budget(law: Any, at: Any) -> jax.Array:
    """Numbers, then the optimum of a budget (params, tokens, loss). at: {"flops", "cost", "others"}."""
    size = allocation.log_optimal_params(law, at["flops"], cost=at["cost"], others=at["others"])
    params = jnp.exp(size)
    tokens = at["flops"] / at["cost"](params)
    loss = law.loss(params=params, tokens=tokens, **at["others"])
    return jnp.concatenate([all_numbers(law, at), jnp.stack([params, tokens, loss])])


def exponents_at_budget(law: Any, at: Any) -> jax.Array:
    """The Chinchilla law's: numbers, the exponents of params and tokens in compute, and the optimum of a budget."""
    a = law.params_in_compute
    found = at_budget(law, at)
    return jnp.concatenate([found[:-3], jnp.stack([a, 1 - a]), found[-3:]])


def at_point(law: Any, at: Any) -> jax.Array:
    """Numbers, then the loss at one point. at: the law's inputs."""
    return jnp.concatenate([all_numbers(law, at), jnp.asarray(law.loss(**at), float)[None]])


OPTIMUM = ("params", "tokens", "loss")
EXPONENTS = ("params_in_compute", "tokens_in_compute")


# --- the bootstrap


@dataclass(frozen=True)
class Bootstrap:
    """Laws fitted to resampled runs: one law whose numbers are arrays, [resamples]. lost: how many of them are NaN, for
    their refits did not converge. astray: which stand at a bound of the search, [resamples]."""

    laws: Any
    lost: int = 0
    astray: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(numbers(self.laws).values())))

    def interval(self, values: Any) -> Interval:
        """Of a quantity with these values [resamples]. An end that mostly rests on refits at a bound is left open."""
        found, values = Interval.of(values), np.asarray(values, float)
        if self.astray is None or not self.astray.any() or not found.closed:
            return found
        low, high = (self.astray[side].mean() > 0.5 for side in (values <= found.low, values >= found.high))
        return Interval(-math.inf if low else found.low, math.inf if high else found.high)

    def numbers(self) -> dict[str, Interval]:
        return {name: self.interval(values) for name, values in numbers(self.laws).items()}

    def optimum(self, *, flops: float, flops_per_token: FlopsPerToken, **others: Any) -> dict[str, Interval]:
        """Intervals of the optimal params and tokens of a budget, and of the loss there."""
        found = self.optima(flops=np.array([flops]), flops_per_token=flops_per_token, **others)
        return {name: self.interval(getattr(found, name)[:, 0]) for name in OPTIMUM}

    def optima(self, *, flops: np.ndarray, flops_per_token: FlopsPerToken, **others: Any) -> Allocation:
        """Arrays [resamples, budgets]."""
        return allocation.optima(self.laws, flops=flops, flops_per_token=flops_per_token, **others)


def bootstrap(fit: Fit, *, resamples: int = 4000, seed: int = 0, seed_noise: float = 0.0) -> Bootstrap | None:
    """Refits ``fit`` to runs drawn with replacement. None where the runs are too few to draw from.

    seed_noise: standard deviation of log loss between runs that differ in their seed alone, added to every drawn
    loss: for studies whose spread over runs understates it (few runs, or losses averaged over seeds).
    Intervals are plain percentiles (Efron and Tibshirani 1993, chapter 13); in simulated studies of 30 and 80 runs they
    hold the truth at least as often as they say. Draws with too few distinct runs or values for the law are drawn
    again. All is lost where ``fit`` itself has not converged or stands at a bound.
    """
    counts = draws(fit, resamples=resamples, seed=seed)
    if counts is None:
        return None
    task, log_loss = problem(fit.points, form=fit.form, delta=fit.delta), np.log(fit.points.loss)
    if not (math.isfinite(seed_noise) and seed_noise >= 0):
        raise UserError(f"seed_noise is a standard deviation of log loss, at least 0; given {seed_noise}.")
    if seed_noise:
        generator = np.random.default_rng([seed, 1])
        spread = seed_noise / np.sqrt(np.maximum(counts, 1))  # a run drawn k times carries k seeds' mean
        log_loss = log_loss + spread * generator.standard_normal(counts.shape)
    solved = task.solve(np.tile(fit.theta, (len(counts), 1)), log_loss=log_loss, weights=counts)
    solved = _again(task, solved, log_loss, counts, seed)
    lost, astray = solved.gradient > GRADIENT, fit.form.astray(solved.theta, task.low, task.high)
    if not fit.convergence.converged or fit.form.astray(fit.theta, task.low, task.high):
        lost[:] = True
    theta = np.where(lost[:, None], np.nan, solved.theta)
    return Bootstrap(as_law(fit.form, theta, task.scale), int(lost.sum()), astray)


def _again(task: Problem, solved: Solved, log_loss: np.ndarray, weights: np.ndarray, seed: int) -> Solved:
    """With the refits that crawled along a valley begun again from places around where they stopped; not where they
    are most of them, for then the valley is the data's."""
    lost = np.nonzero(solved.gradient > GRADIENT)[0]
    if not 0 < len(lost) <= MANY_LOST * len(weights):
        return solved
    lanes = lost.repeat(TRIES)
    jitter = 0.05 * np.random.default_rng([seed, 2]).standard_normal((len(lanes), solved.theta.shape[1]))
    losses = np.broadcast_to(log_loss, weights.shape)[lanes]
    tried = task.solve(solved.theta[lanes] + jitter, log_loss=losses, weights=weights[lanes])
    score = np.where(tried.gradient <= GRADIENT, tried.objective, np.inf).reshape(-1, TRIES)
    chosen = np.arange(len(lost)) * TRIES + np.argmin(score, axis=1)
    theta, objective, gradient = solved.theta.copy(), solved.objective.copy(), solved.gradient.copy()
    theta[lost], objective[lost], gradient[lost] = tried.theta[chosen], tried.objective[chosen], tried.gradient[chosen]
    return Solved(theta, objective, gradient, solved.steps + tried.steps)


def draws(fit: Fit, *, resamples: int, seed: int = 0) -> np.ndarray | None:
    """How often each run is drawn, [resamples, points]."""
    runs, needed = len(fit.points), fit.form.size + 1
    if runs < needed + MORE_RUNS or resamples < 1:  # nearly every draw would leave out one run and no more
        return None
    generator, kept, count = np.random.default_rng(seed), [], 0
    groups = [np.unique(value, return_inverse=True)[1] for value in fit.points.inputs(fit.form).values()]
    members = [np.arange(group.max() + 1)[:, None] == group for group in groups]
    for _ in range(1000):
        drawn = generator.multinomial(runs, np.full(runs, 1 / runs), size=resamples)
        seen = drawn > 0
        good = seen.sum(axis=1) >= needed
        for member in members:
            values = (seen.astype(np.float32) @ member.T.astype(np.float32) > 0).sum(axis=1)  # BLAS has no integers
            good &= values >= min(FEWEST_VALUES, len(member))
        kept.append(drawn[good])
        count += int(good.sum())
        if count >= resamples:
            return np.concatenate(kept)[:resamples].astype(float)
    return None


def lines(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares of each resample's values [resamples, C] on columns [C, K] over those that are finite: numbers
    [resamples, K], NaN where too few are."""
    there = np.isfinite(values)
    used = np.where(there[..., None], columns, 0.0)
    found = np.einsum("rkc,rc->rk", np.linalg.pinv(used), np.where(there, values, 0.0))
    return np.where((np.linalg.matrix_rank(used) == columns.shape[1])[:, None], found, np.nan)


# --- profile likelihood


def profile(
    fit: Fit, *, measure: Measure = all_numbers, names: Sequence[str] | None = None, at: Any = None
) -> dict[str, Interval]:
    """Profile-likelihood intervals of the quantities that ``measure(law, at)`` gives, by ``names``.

    Errors of log loss are taken as normal with an unknown spread, so the optimum is that of least squares, and an
    interval holds the values that some law has whose sum of squares exceeds the least by no more than F / (n - size)
    of it, with F the 95% quantile of F(1, n - size): exact where the law is linear in its numbers (Bates and Watts
    1988, section 6.1). An end is infinite where no value is that bad before the law stands at a bound of its search:
    the runs do not determine it.
    """
    names = tuple(numbers(fit.law)) if names is None else tuple(names)
    best = fit if math.isinf(fit.delta) and fit.convergence.restarts > 1 else fit_law(
        fit.points, form=fit.form, delta=math.inf
    )  # fmt: skip
    task = problem(fit.points, form=fit.form, delta=math.inf)
    lanes = Profiles(task, np.log(fit.points.loss)[None], best.theta[None], measure, at)
    low, high = lanes.ends()
    return {name: Interval(float(low[0, i]), float(high[0, i])) for i, name in enumerate(names)}


class Profiles:
    """Profiles of all quantities of many data sets on the same design at once: log_loss [S, points], theta [S, K]."""

    def __init__(self, task: Problem, log_loss: np.ndarray, theta: np.ndarray, measure: Measure, at: Any) -> None:
        from scipy import stats

        self.task, self.log_loss, self.theta, self.measure, self.at = task, log_loss, theta, measure, at
        points = log_loss.shape[1]
        free = points - task.form.size
        self.value, self.slope = self.measured(theta)
        self.logs = np.all(self.value > 0, axis=0)  # quantities that are positive are profiled in their logs
        self.centre, slope = self.transformed(self.value), self.slope / np.where(self.logs, self.value, 1.0)[..., None]
        residuals, jacobian = self.residuals(theta)
        self.least = np.maximum(0.5 * (residuals**2).sum(axis=1), 0.5 * points * 1e-24)
        self.allowed = self.least * stats.f.ppf(LEVEL, 1, free) / free
        precision = np.einsum("spk,spl->skl", jacobian, jacobian)
        ridge = 1e-10 * np.trace(precision, axis1=1, axis2=2)[:, None, None] * np.eye(theta.shape[1])
        covariance = np.linalg.inv(precision + ridge)  # for a residual of unit size
        self.direction = np.einsum("skl,sml->smk", covariance, slope)
        self.variance = np.maximum(np.einsum("smk,smk->sm", self.direction, slope), 1e-300)
        self.error = np.sqrt(self.variance * 2 * self.allowed[:, None])  # half an interval, were the law linear

    def transformed(self, value: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.where(self.logs, np.log(np.where(self.logs, value, 1.0)), value)

    def measured(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The quantities and their derivatives by theta, in blocks of one size: one program."""
        blocks = []
        with jax.enable_x64(True):
            for start in range(0, len(theta), BLOCK):
                block = theta[start : start + BLOCK]
                found = _measured(
                    self.task.form, self.measure, np.resize(block, (BLOCK, theta.shape[1])), self.task.scale, self.at
                )
                blocks.append([np.asarray(value)[: len(block)] for value in found])
        return tuple(np.concatenate(values) for values in zip(*blocks, strict=True))

    def residuals(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with jax.enable_x64(True):
            log_predicted, jacobian = predicted(self.task.form, theta, self.task.scale, dict(self.task.inputs))
            return np.asarray(log_predicted) - self.log_loss, np.asarray(jacobian)

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each [S, M]: first near, then farther for the ends that were not found."""
        found = self.search(np.ones_like(self.error, bool), FARTHEST, SPACING)
        for reach in (WIDER, WIDER**2):
            missing = ~np.isfinite(found)
            if not missing.any():
                break
            again = self.search(missing.any(axis=0), FARTHEST * reach, SPACING * reach)
            found = np.where(missing, again, found)
        with np.errstate(over="ignore"):
            low, high = np.where(self.logs & np.isfinite(found), np.exp(found), found)
        return low, high

    def search(self, which: np.ndarray, farthest: float, spacing: float) -> np.ndarray:
        """Where the profile crosses what is allowed, in transformed values: [2, S, M], infinite where it does not."""
        ladder = np.arange(spacing, farthest + spacing / 2, spacing) / 2.0  # of ``error``, which is about two errors
        offsets = np.concatenate([-ladder[::-1], ladder])
        sets, kinds = np.nonzero(which)
        lane_set, lane_kind = sets.repeat(len(offsets)), kinds.repeat(len(offsets))
        asked = np.tile(offsets, len(sets)) * self.error[lane_set, lane_kind]
        # start where the linear model would go; pull hard, for any minimum of the sum lies on the profile
        move = (asked / self.variance[lane_set, lane_kind])[:, None] * self.direction[lane_set, lane_kind]
        chosen = np.eye(self.value.shape[1])[lane_kind]
        pull = Pull(chosen, self.centre[lane_set, lane_kind] + asked, STIFF / self.variance[lane_set, lane_kind])
        solved = self.task.solve(
            self.theta[lane_set] + move,
            log_loss=self.log_loss[lane_set],
            measure=_Logged(self.measure, tuple(self.logs.tolist())),
            at=self.at,
            pull=pull,
        )
        reached = self.transformed(self.measured(solved.theta)[0])[np.arange(len(lane_kind)), lane_kind]
        sound = (solved.gradient <= LOOSE) & ~self.task.form.astray(solved.theta, self.task.low, self.task.high)
        excess = np.where(sound, solved.objective - self.least[lane_set], np.nan)
        found = np.stack([np.full(self.error.shape, -np.inf), np.full(self.error.shape, np.inf)])
        rows = (len(sets), len(offsets))
        for s, m, q, e in zip(sets, kinds, reached.reshape(rows), excess.reshape(rows), strict=True):
            half = len(ladder)
            found[0, s, m] = _crossing(q[:half][::-1], e[:half][::-1], self.centre[s, m], self.allowed[s], -1)
            found[1, s, m] = _crossing(q[half:], e[half:], self.centre[s, m], self.allowed[s], 1)
        return found


def _crossing(reached: np.ndarray, excess: np.ndarray, centre: float, allowed: float, side: int) -> float:
    """The first value away from the centre at which the excess passes what is allowed, by its square root, which is
    nearly a straight line."""
    good = np.isfinite(reached) & np.isfinite(excess) & ((reached - centre) * side > 0)
    away, root = np.abs(reached[good] - centre), np.sqrt(np.maximum(excess[good], 0.0))
    order = np.argsort(away)
    away, root = np.concatenate([[0.0], away[order]]), np.concatenate([[0.0], root[order]])
    passed = np.nonzero(root > math.sqrt(allowed))[0]
    if not len(passed):
        return side * math.inf
    right, left = passed[0], passed[0] - 1
    share = (math.sqrt(allowed) - root[left]) / (root[right] - root[left])
    return centre + side * (away[left] + share * (away[right] - away[left]))


@dataclass(frozen=True)
class _Logged:
    """A measure with the quantities of ``logs`` in logs. A value, so that it is a key of compiled programs."""

    measure: Measure
    logs: tuple[bool, ...]

    def __call__(self, law: Any, at: Any) -> jax.Array:
        value, mask = self.measure(law, at), jnp.array(self.logs)
        return jnp.where(mask, jnp.log(jnp.where(mask, value, 1.0)), value)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICKLY_COMPILED)
def _measured(form: Any, measure: Measure, theta: Any, scale: Any, at: Any) -> Any:
    def one(theta: Any) -> Any:
        return measure(form.law(theta, scale), at)

    return jax.vmap(lambda t: (one(t), jax.jacrev(one)(t)))(theta)


@functools.partial(jax.jit, static_argnums=0)
def predicted(form: Any, theta: Any, scale: Any, inputs: Mapping[str, Any]) -> Any:
    """Log of the predicted loss of each theta [S, K] at each point, [S, points], and its derivatives by theta,
    [S, points, K]."""

    def one(theta: Any) -> Any:
        return jnp.log(form.law(theta, scale).loss(**inputs))

    return jax.vmap(lambda t: (one(t), jax.jacfwd(one)(t)))(theta)
