# SPDX-License-Identifier: Apache-2.0
"""Fits of a law to runs: variable projection for the starts, then a Huber loss on log loss, converged.

Default optimizer tolerances stop early on this problem and return a law that is not the minimum (Besiroglu
et al. 2024), so every fit carries a record of its convergence: restarts that agree and the size of the
gradient. What the runs do not determine (an exponent at its bound, a floor of zero) is named instead of being
reported as a finding.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np

from research.core.types import UserError
from research.scaling import projection
from research.scaling.forms import CHINCHILLA, Form
from research.scaling.laws import numbers
from research.scaling.newton import NO_HUBER, Problem
from research.scaling.table import ParameterCount, Run

AGREE = 1e-7  # restarts agree when their objectives do, relatively
GRADIENT = 1e-6  # the largest projected gradient of a converged fit, as Convergence defines it
FEWEST_VALUES = 3  # of each input
WORDS = {
    "params": "model sizes", "tokens": "lengths of training", "flops": "compute budgets", "experts": "expert counts",
    "granularity": "granularities", "unique_tokens": "amounts of unique data",
}  # fmt: skip


@dataclass(frozen=True)
class Points:
    """What a law is fitted to: arrays of loss (nats per token) and of what it is a function of, with the runs'
    names."""

    params: np.ndarray | None = None
    tokens: np.ndarray | None = None
    loss: np.ndarray = ()  # type: ignore[assignment]
    names: tuple[str, ...] = ()
    flops: np.ndarray | None = None
    unique_tokens: np.ndarray | None = None
    experts: np.ndarray | None = None
    granularity: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, value in self._arrays():
            object.__setattr__(self, name, np.asarray(value, float))
            found = getattr(self, name)
            if found.shape != np.shape(self.loss) or found.ndim != 1:
                raise UserError(f"{name} and loss must be two lists of the same length.")
            if not np.all(np.isfinite(found) & (found > 0)):
                raise UserError(f"A law is fitted to finite positive numbers, and some {name} are not: leave them out.")

    def _arrays(self) -> list[tuple[str, Any]]:
        values = [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "names"]
        return [(name, value) for name, value in values if value is not None]

    @classmethod
    def of(cls, runs: Iterable[Run], *, parameters: ParameterCount = "total") -> "Points":
        """The points of the runs that can stand in a fit (``Run.problem``), by parameter convention."""
        good = [run for run in runs if run.problem is None]
        return cls(
            params=np.array([run.count(parameters) for run in good], float),
            tokens=np.array([run.tokens for run in good], float),
            loss=np.array([run.loss for run in good], float),
            names=tuple(run.name for run in good),
            flops=np.array([run.flops for run in good], float),
        )

    def __len__(self) -> int:
        return len(self.loss)

    def inputs(self, form: Form) -> dict[str, np.ndarray]:
        """What the form's law is a function of. Raises UserError where the points lack it."""
        found = {name: getattr(self, name) for name in form.inputs}
        absent = [name for name, value in found.items() if value is None]
        if absent:
            raise UserError(f"The {form.name} law is a function of {', '.join(form.inputs)}; there is no {absent[0]}.")
        return found

    def take(self, index: Any) -> "Points":
        names = tuple(np.array(self.names, object)[index]) if self.names else ()
        return replace(self, names=names, **{name: value[index] for name, value in self._arrays()})


@dataclass(frozen=True)
class Convergence:
    """How the fit ended. gradient_norm: largest projected derivative of the objective (over the size of a
    residual that counts, and the number of points) over the law's coordinates. agreeing: restarts within
    ``AGREE`` of the best objective."""

    converged: bool
    restarts: int
    agreeing: int
    gradient_norm: float
    steps: int
    message: str


@dataclass(frozen=True)
class Fit:
    """A fitted law. objective: the sum of Huber(delta) losses of log residuals (half squares for an infinite
    delta). residuals: log(predicted / measured), in the order of the points. not_identified: a sentence for every
    number that the points do not determine. theta: the law in its form's coordinates."""

    law: Any
    form: Form
    points: Points
    objective: float
    delta: float
    residuals: tuple[float, ...]
    convergence: Convergence
    not_identified: tuple[str, ...]
    theta: np.ndarray

    @property
    def rms_residual(self) -> float:
        return float(np.sqrt(np.mean(np.square(self.residuals))))

    @property
    def largest_residual(self) -> float:
        return float(np.max(np.abs(self.residuals)))


def problem(points: Points, *, form: Form = CHINCHILLA, delta: float = 1e-3) -> Problem:
    """The minimisation behind a fit; an infinite delta is least squares of log residuals."""
    if not delta > 0:
        raise UserError(f"delta must be a positive number (inf: least squares); given {delta}.")
    inputs, log_loss = points.inputs(form), np.log(points.loss)
    low, high = form.bounds(log_loss)
    unit = min(delta, max(float(log_loss.std()), 1e-6))
    return Problem(form, inputs, form.scale(inputs), low, high, min(delta, NO_HUBER), unit)


def fit_law(points: Points, *, form: Form = CHINCHILLA, delta: float = 1e-3, restarts: int = 12) -> Fit:
    """Fits a law: the sum of Huber(delta) losses of log residuals (Hoffmann et al. 2022, eq. 3), from several starts.

    Raises UserError for no more points than the law has numbers, or fewer than three distinct values of an input,
    with which the law cannot be told from others.
    """
    check_points(points, form=form)
    task = problem(points, form=form, delta=delta)
    starts = projection.starts(form, inputs=task.inputs, loss=points.loss, scale=task.scale, count=restarts)
    solved = task.solve(np.stack(starts), log_loss=np.log(points.loss))
    objectives = np.where(np.isfinite(solved.objective), solved.objective, np.inf)
    best = int(np.argmin(objectives))
    agreeing = int(np.sum(objectives <= objectives[best] * (1 + AGREE) + 1e-18))
    gradient = float(solved.gradient[best])
    converged = gradient <= GRADIENT and (agreeing >= 2 or len(starts) == 1)
    message = f"{agreeing} of {len(starts)} starts reach the same minimum; projected gradient {gradient:.1e}"
    if not converged:
        message += f"; NOT CONVERGED (a gradient of at most {GRADIENT:.0e} and 2 agreeing starts are asked for)"
    convergence = Convergence(converged, len(starts), agreeing, gradient, solved.steps, message)
    return _fit(points, task, solved.theta[best], float(objectives[best]), delta, convergence)


def fit_projected(points: Points, *, form: Form = CHINCHILLA) -> Fit:
    """The fit of variable projection alone: least squares of relative errors. Its objective is half the sum of
    their squares, and its residuals are those of log loss as everywhere."""
    check_points(points, form=form)
    task = problem(points, form=form, delta=float("inf"))
    found = projection.starts(form, inputs=task.inputs, loss=points.loss, scale=task.scale, count=1)[0]
    theta = np.clip(found, task.low, task.high)
    residuals = np.expm1(_residuals(points, task, theta))
    message = "a search over the exponents alone; the other numbers are the best for them"
    convergence = Convergence(True, 1, 1, float("nan"), 0, message)
    return _fit(points, task, theta, float(0.5 * residuals @ residuals), float("inf"), convergence)


def _fit(
    points: Points, task: Problem, theta: np.ndarray, objective: float, delta: float, convergence: Convergence
) -> Fit:
    return Fit(
        law=as_law(task.form, theta, task.scale),
        form=task.form,
        points=points,
        objective=objective,
        delta=delta,
        residuals=tuple(_residuals(points, task, theta).tolist()),
        convergence=convergence,
        not_identified=task.form.not_identified(theta, np.log(points.loss)),
        theta=theta,
    )


def as_law(form: Form, theta: np.ndarray, scale: np.ndarray) -> Any:
    """The law of one theta [K] (numbers are floats), or of many, [..., K] (numbers are arrays)."""
    with jax.enable_x64(True):
        found = _law(form, np.moveaxis(np.asarray(theta, float), -1, 0), scale)
        plain = {name: np.asarray(value)[()] for name, value in numbers(found).items()}
    if np.ndim(theta) == 1:
        plain = {name: float(value) for name, value in plain.items()}
    return form.law_type(**plain)


@functools.partial(jax.jit, static_argnums=0)
def _law(form: Form, theta: Any, scale: Any) -> Any:
    return form.law(theta, scale)


def _residuals(points: Points, task: Problem, theta: np.ndarray) -> np.ndarray:
    law = as_law(task.form, theta, task.scale)
    return np.log(law.loss(**task.inputs)) - np.log(points.loss)


def check_points(points: Points, *, form: Form = CHINCHILLA) -> None:
    """Raises UserError where there are too few points for the law's numbers."""
    inputs = points.inputs(form)
    if len(points) <= form.size:
        raise UserError(
            f"The law has {form.size} numbers and needs at least {form.size + 1} finished runs; there are "
            f"{len(points)}: run more of the ladder."
        )
    distinct = {name: len(np.unique(value)) for name, value in inputs.items()}
    if any(count < FEWEST_VALUES for name, count in distinct.items() if name != "unique_tokens"):
        needed = " and ".join(f"{FEWEST_VALUES} {WORDS[name]}" for name in inputs if name != "unique_tokens")
        found = " and ".join(str(count) for name, count in distinct.items() if name != "unique_tokens")
        raise UserError(
            f"The law needs at least {needed}; the {len(points)} finished runs have {found}: run more sizes at more "
            "budgets."
        )
