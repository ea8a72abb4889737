# SPDX-License-Identifier: Apache-2.0
"""Many small robust regressions at once: damped Newton steps inside bounds, in float64, for thousands of lanes.

A lane is one fit: its own start, weights, losses and, for profile likelihoods, its own pull towards a value of some
quantity. Lanes are solved side by side in blocks (JAX's vmap), blocks on all cores; lanes that have not converged after
a round go on with those of other blocks, so that no block waits for its slowest.
"""

import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.scaling.forms import Form

BLOCK = 64  # lanes; their points fit a core's cache
ROUND = 8  # Newton steps between two looks at which lanes have ended
ROUNDS = 40
POINTS = 32  # the points are padded to a multiple, so that studies of like size share a program
STILL = 1e-11  # a gradient as small as this, as ``Solved.gradient`` measures it, ends a lane
FLAT = 1e-15  # so does a step that promises to lower the objective by less, relatively
MOST_DAMPING = 1e12
NO_HUBER = 1e100  # a delta that no residual reaches: least squares

Measure = Callable[[Any, Any], jax.Array]  # (law, at) -> the quantities, [M]


class Pull(NamedTuple):
    """weight * (chosen . measure(law, at) - target)^2 / 2, added to the objective. chosen: [lanes, M]; target,
    weight: [lanes]."""

    chosen: Any
    target: Any
    weight: Any


@dataclass(frozen=True)
class Solved:
    """The lanes' ends. theta: [lanes, K]. objective: [lanes], the pull left out. gradient: [lanes], the largest
    projected derivative over ``unit`` and the number of points. steps: all Newton steps that were tried."""

    theta: np.ndarray
    objective: np.ndarray
    gradient: np.ndarray
    steps: int


@dataclass(frozen=True)
class Problem:
    """What all lanes share. inputs: [points] each. scale: where the coordinates are centred (``Form.scale``).
    unit: the size of a residual that counts, which gradients are measured in."""

    form: Form
    inputs: Mapping[str, np.ndarray]
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    delta: float
    unit: float

    def solve(
        self,
        starts: np.ndarray,
        *,
        log_loss: np.ndarray,
        weights: np.ndarray | None = None,
        measure: Measure | None = None,
        at: Any = None,
        pull: Pull | None = None,
    ) -> Solved:
        """Minima of sum of weights * Huber(delta) of log(predicted / measured), [lanes].

        starts: [lanes, K]. log_loss, weights: [points] or [lanes, points].
        """
        lanes, points = len(starts), next(iter(self.inputs.values())).shape[0]
        padded = -(-points // POINTS) * POINTS
        weights = np.ones(points) if weights is None else weights
        shared = {
            "inputs": {name: _pad(value, padded, value[0]) for name, value in self.inputs.items()},
            "scale": self.scale,
            "low": self.low,
            "high": self.high,
            "delta": self.delta,
            "unit": self.unit * points,
            "at": at,
        }
        own = {
            "log_loss": np.broadcast_to(_pad(log_loss, padded, 0.0), (lanes, padded)),
            "weights": np.broadcast_to(_pad(weights, padded, 0.0), (lanes, padded)),
            "pull": pull if pull is not None else Pull(np.zeros((lanes, 1)), np.zeros(lanes), np.zeros(lanes)),
        }
        return _rounds(self.form, measure, np.clip(starts, self.low, self.high), shared, own)


def _pad(values: np.ndarray, length: int, filler: float) -> np.ndarray:
    widths = [(0, 0)] * (values.ndim - 1) + [(0, length - values.shape[-1])]
    return np.pad(np.asarray(values, float), widths, constant_values=filler)


def _rounds(form: Form, measure: Measure | None, starts: np.ndarray, shared: Any, own: Any) -> Solved:
    lanes = len(starts)
    theta, damping = np.array(starts, float), np.ones(lanes)
    objective, gradient, steps = np.zeros(lanes), np.zeros(lanes), 0
    left = np.arange(lanes)

    def work(chosen: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        lane = np.resize(chosen, BLOCK)  # a last, shorter block repeats its lanes
        mine = jax.tree.map(lambda value: np.asarray(value)[lane], own)
        with jax.enable_x64(True):
            solve = _block if measure is None else _pulled_block
            found = solve(form, measure, theta[lane], damping[lane], shared, mine)
            return chosen, [np.asarray(value)[: len(chosen)] for value in found]

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in range(ROUNDS):
            blocks = [left[start : start + BLOCK] for start in range(0, len(left), BLOCK)]
            steps += ROUND * len(left)
            ended = []
            for chosen, found in pool.map(work, blocks):
                theta[chosen], damping[chosen], objective[chosen], gradient[chosen] = found[:4]
                ended.append(found[4])
            left = left[~np.concatenate(ended)]
            if not len(left):
                break
    return Solved(theta, objective, gradient, steps)


# Compiled with care a profile's program takes longer to compile than it runs, in all the profiles of a report.
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _blocks(form: Form, measure: Measure | None, theta: Any, damping: Any, shared: Any, own: Any) -> Any:
    lane = functools.partial(_lane, form, measure, shared)
    return jax.vmap(lane)(theta, damping, own)


_block = jax.jit(_blocks, static_argnums=(0, 1))
_pulled_block = jax.jit(_blocks, static_argnums=(0, 1), compiler_options=QUICKLY_COMPILED)


class _At(NamedTuple):
    """The objective's value (pull included), gradient, Hessian and reweighted Gauss-Newton matrix at theta."""

    value: Any
    gradient: Any
    newton: Any
    reweighted: Any


def _lane(form: Form, measure: Measure | None, shared: Any, theta: Any, damping: Any, own: Any) -> Any:
    low, high = shared["low"], shared["high"]
    at = functools.partial(_derivatives, form, measure, shared, own)
    levels = (np.arange(form.size) < len(form.terms)) & (not form.signed)

    def free(theta: Any, gradient: Any) -> Any:
        return ~(((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0)))

    def step(_: int, state: Any) -> Any:
        theta, damping, here, ended = state
        moving = free(theta, here.gradient)
        # the curvature of a level's logarithm holds its gradient: left out where negative, or a small term that wants
        # to grow would need so much damping that everything else stands still
        matrix = (
            here.newton + damping * here.reweighted + jnp.diag(jnp.where(levels, jnp.maximum(-here.gradient, 0), 0))
        )
        matrix = jnp.where(moving[:, None] & moving[None, :], matrix, jnp.eye(len(theta)))
        downhill = jnp.where(moving, here.gradient, 0.0)
        change = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), downhill)
        sound = jnp.all(jnp.isfinite(change))  # Cholesky's factor of an indefinite matrix is NaN
        trial = jnp.clip(theta - jnp.where(sound, change, 0.0), low, high)
        there = at(trial)
        accepted = sound & (there.value < here.value)
        still = jnp.max(jnp.abs(downhill)) <= STILL * shared["unit"]
        flat = sound & (downhill @ change <= FLAT * here.value)
        new = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), (trial, there), (theta, here))
        softer = jnp.where(accepted, damping / 6, jnp.maximum(damping, 1e-10) * 4)
        finished = ended | still | flat | (softer > MOST_DAMPING)
        kept = jax.tree.map(
            lambda a, b: jnp.where(ended | still, a, b), (theta, damping, here), (new[0], softer, new[1])
        )
        return (*kept, finished)

    theta, damping, here, ended = jax.lax.fori_loop(0, ROUND, step, (theta, damping, at(theta), jnp.array(False)))
    gradient = jnp.max(jnp.abs(jnp.where(free(theta, here.gradient), here.gradient, 0.0))) / shared["unit"]
    return theta, damping, _objective(form, shared, own, theta), gradient, ended


def _residuals(form: Form, shared: Any, own: Any, theta: Any) -> Any:
    return form.log_loss(theta, shared["scale"], shared["inputs"]) - own["log_loss"]


def _huber(residuals: Any, delta: Any) -> Any:
    size = jnp.abs(residuals)
    return jnp.where(size <= delta, 0.5 * size**2, delta * (jnp.minimum(size, 1e100) - 0.5 * delta))


def _objective(form: Form, shared: Any, own: Any, theta: Any) -> Any:
    return own["weights"] @ _huber(_residuals(form, shared, own, theta), shared["delta"])


def _derivatives(form: Form, measure: Measure | None, shared: Any, own: Any, theta: Any) -> _At:
    """Damping adds a multiple of the reweighted Gauss-Newton matrix, which lies above the Huber loss's curvature: a
    large multiple gives a short step of reweighted least squares, none gives Newton's."""
    residual = functools.partial(_residuals, form, shared, own)
    delta, weights = shared["delta"], own["weights"]
    residuals, back = jax.vjp(residual, theta)
    jacobian = jax.jacfwd(residual)(theta)
    size = jnp.abs(residuals)
    slope = weights * jnp.clip(residuals, -delta, delta)
    bent = jax.jacfwd(lambda t: jax.vjp(residual, t)[1](slope)[0])(theta)
    inside = jacobian.T @ (jacobian * (weights * (size <= delta))[:, None])
    falling = jnp.minimum(1.0, delta / jnp.maximum(size, 1e-300))
    reweighted = jacobian.T @ (jacobian * (weights * falling)[:, None])
    value, gradient, newton = weights @ _huber(residuals, delta), back(slope)[0], inside + bent
    if measure is not None:
        pull = own["pull"]

        def quantity(theta: Any) -> Any:
            return pull.chosen @ measure(form.law(theta, shared["scale"]), shared["at"])

        off = quantity(theta) - pull.target
        slopes = jax.grad(quantity)(theta)
        outer = pull.weight * slopes[:, None] * slopes[None, :]
        value += 0.5 * pull.weight * off**2
        gradient += pull.weight * off * slopes
        newton, reweighted = newton + outer, reweighted + outer
    ridge = 1e-12 * jnp.maximum(jnp.trace(reweighted), 1e-300)
    return _At(value, gradient, newton, reweighted + ridge * jnp.eye(len(theta)))
