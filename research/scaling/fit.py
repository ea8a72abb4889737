# SPDX-License-Identifier: Apache-2.0
"""Fits of the parametric law: variable projection for a start, then a Huber loss on log loss, converged.

Default optimizer tolerances stop early on this problem and return a law that is not the minimum (Besiroglu
et al. 2024), so every fit carries a record of its convergence: restarts that agree and the size of the
gradient. What the runs do not determine (an exponent at its bound, an E of zero) is named instead of being
reported as a finding.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize, nnls

from research.core.types import UserError
from research.scaling.laws import Chinchilla
from research.scaling.table import ParameterCount, Run

FEWEST_RUNS = 6  # one more than the law has numbers
EXPONENTS = (0.02, 2.0)  # where alpha and beta are looked for
SMALLEST_SHARE = 1e-5  # of the loss at the centre of the runs: a term as small as this is zero
AGREE = 1e-7  # restarts agree when their objectives do, relatively
GRADIENT = 1e-6  # the largest projected gradient of a converged fit, as Convergence defines it
ZERO_TERM = (
    "A and alpha are not identified: the fit puts the term of model size at zero, as if size had no effect.",
    "B and beta are not identified: the fit puts the term of tokens at zero, as if they had no effect.",
    "E is not identified: the fit puts it at zero, so these runs do not show where the loss levels off, and "
    "the law may not be carried far beyond them.",
)


@dataclass(frozen=True)
class Points:
    """What a law is fitted to: arrays of params, tokens and loss (nats per token), with the runs' names."""

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("params", "tokens", "loss"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), float))
        if not self.params.shape == self.tokens.shape == self.loss.shape or self.params.ndim != 1:
            raise UserError("params, tokens and loss must be three lists of the same length.")
        values = np.concatenate([self.params, self.tokens, self.loss])
        if not np.all(np.isfinite(values) & (values > 0)):
            raise UserError("A law is fitted to finite positive params, tokens and losses: leave other runs out.")

    @classmethod
    def of(cls, runs: Iterable[Run], *, parameters: ParameterCount = "total") -> "Points":
        """The points of the runs that can stand in a fit (``Run.problem``), by parameter convention."""
        good = [run for run in runs if run.problem is None]
        return cls(
            params=np.array([run.count(parameters) for run in good], float),
            tokens=np.array([run.tokens for run in good], float),
            loss=np.array([run.loss for run in good], float),
            names=tuple(run.name for run in good),
        )

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index: Any) -> "Points":
        names = tuple(np.array(self.names, object)[index]) if self.names else ()
        return Points(self.params[index], self.tokens[index], self.loss[index], names)


@dataclass(frozen=True)
class Convergence:
    """How the fit ended. gradient_norm: largest projected derivative of the objective (divided by delta and
    by the number of points) over the law's numbers, in logs. agreeing: restarts within ``AGREE`` of the best
    objective."""

    converged: bool
    restarts: int
    agreeing: int
    gradient_norm: float
    evaluations: int
    message: str


@dataclass(frozen=True)
class Fit:
    """A fitted law. objective: the sum of Huber losses of log residuals. residuals: log(predicted /
    measured), in the order of the points. not_identified: a sentence for every number that the points do not
    determine."""

    law: Chinchilla
    objective: float
    delta: float
    residuals: tuple[float, ...]
    convergence: Convergence
    not_identified: tuple[str, ...]

    @property
    def rms_residual(self) -> float:
        return float(np.sqrt(np.mean(np.square(self.residuals))))

    @property
    def largest_residual(self) -> float:
        return float(np.max(np.abs(self.residuals)))


def fit_law(points: Points, *, delta: float = 1e-3, restarts: int = 12) -> Fit:
    """Fits E, A, B, alpha and beta: the sum of Huber(delta) losses of log residuals (Hoffmann et al. 2022,
    eq. 3).

    The prediction is taken in log-sum-exp form. Raises UserError for fewer than six points, or fewer than three
    distinct params or tokens, with which the law cannot be told from others.
    """
    check_points(points)
    problem = _Problem(points, delta)
    results = [problem.solve(start) for start in problem.starts(restarts)]
    objectives = np.array([problem.objective(theta) for theta, _ in results])
    theta = results[int(np.argmin(objectives))][0]
    best = float(objectives.min())
    agreeing = int(np.sum(objectives <= best * (1 + AGREE) + 1e-18))
    gradient = problem.projected_gradient(theta)
    converged = gradient <= GRADIENT and (agreeing >= 2 or len(results) == 1)
    message = f"{agreeing} of {len(results)} starts reach the same minimum; projected gradient {gradient:.1e}"
    if not converged:
        message += f"; NOT CONVERGED (a gradient of at most {GRADIENT:.0e} and 2 agreeing starts are asked for)"
    evaluations = sum(count for _, count in results)
    return Fit(
        law=problem.law(theta),
        objective=best,
        delta=delta,
        residuals=tuple(float(r) for r in problem.residuals(theta)),
        convergence=Convergence(converged, len(results), agreeing, gradient, evaluations, message),
        not_identified=problem.not_identified(theta),
    )


def check_points(points: Points) -> None:
    """Raises UserError where there are too few points for five numbers."""
    params, tokens = len(np.unique(points.params)), len(np.unique(points.tokens))
    if len(points) < FEWEST_RUNS:
        raise UserError(
            f"The law has 5 numbers and needs at least {FEWEST_RUNS} finished runs; there are {len(points)}: "
            "run more of the ladder."
        )
    if min(params, tokens) < 3:
        raise UserError(
            f"The law needs at least 3 model sizes and 3 lengths of training; the {len(points)} finished "
            f"runs have {params} and {tokens}: run more sizes at more budgets."
        )


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval of a quantity: 2.5th and 97.5th percentile."""

    low: float
    high: float


def bootstrap(points: Points, *, fit: Fit, resamples: int = 200, seed: int = 0) -> dict[str, Interval]:
    """95% percentile intervals of the law's numbers, from fits to runs drawn with replacement, started at
    ``fit``.

    Draws with too few distinct runs are drawn again. Few runs make such intervals too narrow, not too wide.
    """
    check_points(points)
    generator, laws = np.random.default_rng(seed), []
    while len(laws) < resamples:
        index = generator.integers(0, len(points), len(points))
        drawn = points.take(index)
        if len(np.unique(index)) < FEWEST_RUNS or min(len(set(drawn.params)), len(set(drawn.tokens))) < 3:
            if len(points) == FEWEST_RUNS:  # every draw repeats a run: leave-out is all there is
                return {}
            continue
        problem = _Problem(drawn, fit.delta)
        laws.append(problem.law(problem.solve(problem.theta(fit.law), iterations=60)[0]))
    return {
        name: Interval(*(float(v) for v in np.percentile([getattr(law, name) for law in laws], [2.5, 97.5])))
        for name in ("E", "A", "B", "alpha", "beta")
    }


class _Problem:
    """The fit in well-scaled coordinates: theta = (log of each term at the centre of the runs, alpha, beta).

    terms = exp(a - alpha n), exp(b - beta d), exp(e), with n and d the centred logs of params and tokens, so
    that levels and exponents are nearly independent of one another.
    """

    def __init__(self, points: Points, delta: float) -> None:
        self.delta = delta
        self.log_loss = np.log(points.loss)
        self.centre_n, self.centre_d = np.log(points.params).mean(), np.log(points.tokens).mean()
        self.n, self.d = np.log(points.params) - self.centre_n, np.log(points.tokens) - self.centre_d
        level = float(self.log_loss.mean())
        least = level + math.log(SMALLEST_SHARE)
        most = float(self.log_loss.max()) + 1.0
        self.low = np.array([least, least, least, EXPONENTS[0], EXPONENTS[0]])
        self.high = np.array([most, most, float(self.log_loss.min()), EXPONENTS[1], EXPONENTS[1]])

    # --- coordinates

    def law(self, theta: np.ndarray) -> Chinchilla:
        a, b, e, alpha, beta = (float(t) for t in theta)
        return Chinchilla(
            E=math.exp(e),
            A=math.exp(a + alpha * self.centre_n),
            B=math.exp(b + beta * self.centre_d),
            alpha=alpha,
            beta=beta,
        )

    def theta(self, law: Chinchilla) -> np.ndarray:
        a = math.log(max(law.A, 1e-300)) - law.alpha * self.centre_n
        b = math.log(max(law.B, 1e-300)) - law.beta * self.centre_d
        return self.clip(np.array([a, b, math.log(max(law.E, 1e-300)), law.alpha, law.beta]))

    def clip(self, theta: np.ndarray) -> np.ndarray:
        return np.clip(theta, self.low, self.high)

    # --- residuals and objective

    def parts(self, theta: np.ndarray) -> np.ndarray:
        a, b, e, alpha, beta = theta
        return np.stack([a - alpha * self.n, b - beta * self.d, np.full_like(self.n, e)])

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        parts = self.parts(theta)
        top = parts.max(axis=0)
        return top + np.log(np.exp(parts - top).sum(axis=0)) - self.log_loss

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        share = self.shares(theta)
        return np.stack([share[0], share[1], share[2], -share[0] * self.n, -share[1] * self.d], axis=1)

    def shares(self, theta: np.ndarray) -> np.ndarray:
        """Each term's share of the predicted loss, [3, points]."""
        parts = self.parts(theta)
        share = np.exp(parts - parts.max(axis=0))
        return share / share.sum(axis=0)

    def objective(self, theta: np.ndarray) -> float:
        size = np.abs(self.residuals(theta))
        huber = np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))
        return float(huber.sum())

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        return self.jacobian(theta).T @ np.clip(self.residuals(theta), -self.delta, self.delta)

    def projected_gradient(self, theta: np.ndarray) -> float:
        """The largest derivative that bounds do not stop, over delta and the number of points."""
        gradient = self.gradient(theta)
        stopped = ((theta <= self.low + 1e-6) & (gradient > 0)) | ((theta >= self.high - 1e-6) & (gradient < 0))
        return float(np.max(np.abs(np.where(stopped, 0.0, gradient)))) / (self.delta * len(self.log_loss))

    # --- search

    def solve(self, start: np.ndarray, *, iterations: int = 400) -> tuple[np.ndarray, int]:
        """A minimum near ``start`` and the evaluations it took: damped Newton steps inside the bounds.

        The damping adds a multiple of the reweighted Gauss-Newton matrix, which lies above the Huber loss's
        curvature: a large multiple gives a short step of reweighted least squares, none gives Newton's.
        """
        theta, damping, evaluations = self.clip(start), 1.0, 0
        value = self.objective(theta)
        for _ in range(iterations):
            gradient, newton, reweighted = self.derivatives(theta)
            free = ~(((theta <= self.low) & (gradient > 0)) | ((theta >= self.high) & (gradient < 0)))
            if not free.any() or np.max(np.abs(gradient[free])) < 1e-13 * self.delta * len(self.log_loss):
                break
            accepted = False
            while not accepted and damping < 1e12:
                matrix = (newton + damping * reweighted)[np.ix_(free, free)]
                evaluations += 1
                if np.linalg.eigvalsh(matrix)[0] > 0:
                    trial = theta.copy()
                    trial[free] -= np.linalg.solve(matrix, gradient[free])
                    trial = np.clip(trial, self.low, self.high)
                    trial_value = self.objective(trial)
                    accepted = trial_value < value
                damping = damping / 6 if accepted else max(damping, 1e-10) * 4
            if not accepted:
                break
            theta, value = trial, trial_value
        return theta, evaluations

    def derivatives(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradient, Hessian and reweighted Gauss-Newton matrix of the objective."""
        residuals, jacobian, shares = self.residuals(theta), self.jacobian(theta), self.shares(theta)
        clipped = np.clip(residuals, -self.delta, self.delta)
        weight = np.minimum(1.0, self.delta / np.maximum(np.abs(residuals), 1e-300))
        gauss_newton = jacobian.T @ (jacobian * (np.abs(residuals) <= self.delta)[:, None])
        zero, one = np.zeros_like(self.n), np.ones_like(self.n)
        curvature = -jacobian.T @ (jacobian * clipped[:, None])
        for share, row in zip(
            shares,
            (
                (one, zero, zero, -self.n, zero),
                (zero, one, zero, zero, -self.d),
                (zero, zero, one, zero, zero),
            ),
            strict=True,
        ):
            direction = np.stack(row, axis=1)
            curvature += direction.T @ (direction * (clipped * share)[:, None])
        reweighted = jacobian.T @ (jacobian * weight[:, None])
        reweighted += 1e-12 * max(np.trace(reweighted), 1e-300) * np.eye(5)
        return jacobian.T @ clipped, gauss_newton + curvature, reweighted

    def starts(self, count: int) -> list[np.ndarray]:
        """Variable projection's best, then the best of the exponents around it, apart from one another."""
        best = minimize(
            lambda exponents: self.project(*np.clip(exponents, *EXPONENTS))[0],
            self.coarse()[0][1],
            method="Nelder-Mead",
            options={"xatol": 1e-6, "fatol": 1e-12, "maxiter": 300},
        )
        chosen = [np.clip(best.x, *EXPONENTS)]
        for _, exponents in self.coarse():
            if len(chosen) >= count:
                break
            if all(np.max(np.abs(np.log(exponents / other))) > 0.3 for other in chosen[1:]):
                chosen.append(exponents)
        return [self.project(*exponents)[1] for exponents in chosen]

    def coarse(self) -> list[tuple[float, np.ndarray]]:
        """(squared error, exponents) over a grid of alpha and beta, best first."""
        values = np.geomspace(0.05, 1.5, 13)
        grid = [np.array([alpha, beta]) for alpha in values for beta in values]
        return sorted(((self.project(*point)[0], point) for point in grid), key=lambda pair: pair[0])

    def project(self, alpha: float, beta: float) -> tuple[float, np.ndarray]:
        """With alpha and beta fixed the loss is linear in E, A and B: the best non-negative ones, by
        relative error."""
        weight = np.exp(-self.log_loss)
        columns = np.stack([np.exp(-alpha * self.n), np.exp(-beta * self.d), np.ones_like(self.n)], axis=1)
        levels, error = nnls(columns * weight[:, None], np.ones_like(weight))
        floor = np.exp(self.low[:3])
        return float(error**2), self.clip(np.concatenate([np.log(np.maximum(levels, floor)), [alpha, beta]]))

    # --- what the points do not say

    def not_identified(self, theta: np.ndarray) -> tuple[str, ...]:
        zero = np.exp(theta[:3] - self.log_loss.mean()) < 1e-3
        found = [sentence for is_zero, sentence in zip(zero, ZERO_TERM, strict=True) if is_zero]
        for name, value, term_is_zero in zip(("alpha", "beta"), theta[3:], zero[:2], strict=True):
            if not term_is_zero and not EXPONENTS[0] * 1.01 < value < EXPONENTS[1] * 0.99:
                found.append(f"{name} is not identified: it stands at the bound {value:.3g} of its search.")
        return tuple(found)
