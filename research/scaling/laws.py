# SPDX-License-Identifier: Apache-2.0
"""Scaling laws as small pure functions: loss from params and tokens, and the best use of a compute budget."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from research.core.types import UserError

FlopsPerToken = Callable[[float], float]
SMALLEST, LARGEST = 1.0, 1e16  # where an optimum is looked for, params


@dataclass(frozen=True)
class Chinchilla:
    """loss = E + A / params^alpha + B / tokens^beta (Hoffmann et al. 2022, eq. 2), nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, *, params: Any, tokens: Any) -> Any:
        """Predicted loss, nats per token; numbers or arrays that broadcast."""
        return self.E + self.A / np.power(params, self.alpha) + self.B / np.power(tokens, self.beta)

    def __str__(self) -> str:
        size, data = f"{self.A:.4g} / params^{self.alpha:.4g}", f"{self.B:.4g} / tokens^{self.beta:.4g}"
        return f"loss = {self.E:.4g} + {size} + {data}"


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x: Any) -> Any:
        return self.coefficient * np.power(x, self.exponent)


@dataclass(frozen=True)
class Allocation:
    """How a budget is spent: a model of ``params`` on ``tokens``, with the loss that a law expects (nats per
    token)."""

    flops: float
    params: float
    tokens: float
    loss: float


def fit_power_law(x: Any, *, y: Any) -> PowerLaw:
    """Least squares in logs. Raises UserError for fewer than two distinct x or for values that are not
    positive."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y)) and np.all(x > 0) and np.all(y > 0)):
        raise UserError("A power law is fitted to finite positive numbers only: leave the other points out.")
    if len(np.unique(x)) < 2:
        raise UserError(f"A power law needs at least 2 distinct points; there are {len(np.unique(x))}.")
    log_x = np.log(x)
    centre = log_x.mean()
    exponent, level = np.polyfit(log_x - centre, np.log(y), 1)
    return PowerLaw(coefficient=float(np.exp(level - exponent * centre)), exponent=float(exponent))


def six_per_param(params: float) -> float:
    """6 FLOPs per parameter and training token (Kaplan et al. 2020, section 2.1)."""
    return 6.0 * params


def closed_form_optimum(law: Chinchilla, *, flops: float) -> Allocation:
    """The compute-optimal allocation under flops = 6 params tokens (Hoffmann et al. 2022, eq. 4)."""
    balance = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    params = balance * (flops / 6) ** (law.beta / (law.alpha + law.beta))
    tokens = flops / (6 * params)
    return Allocation(flops, params, tokens, float(law.loss(params=params, tokens=tokens)))


def optimum(law: Chinchilla, *, flops: float, flops_per_token: FlopsPerToken = six_per_param) -> Allocation:
    """The params that minimise the law's loss when a budget is spent at ``flops_per_token(params)``.

    ``flops_per_token`` may be any increasing function of params (attention and head included). Raises
    UserError for a budget that is not positive, or where the law sees no trade-off between params and tokens.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise UserError(f"A budget must be a positive number of FLOPs; given {flops}.")

    def loss(log_params: float) -> float:
        params = math.exp(log_params)
        return float(law.loss(params=params, tokens=flops / flops_per_token(params)))

    grid = np.linspace(math.log(SMALLEST), math.log(LARGEST), 257)
    best = int(np.argmin([loss(point) for point in grid]))
    if best in (0, len(grid) - 1):
        raise UserError(
            f"The law ({law}) has no compute-optimal model size at {flops:.3g} FLOPs: its loss only falls "
            f"towards {'smaller' if best == 0 else 'larger'} models, so fit it on runs that bracket the "
            "optimum."
        )
    params = math.exp(_golden_section(loss, low=grid[best - 1], high=grid[best + 1]))
    tokens = flops / flops_per_token(params)
    return Allocation(flops, params, tokens, float(law.loss(params=params, tokens=tokens)))


def _golden_section(function: Callable[[float], float], *, low: float, high: float) -> float:
    """The minimum of a function with one valley between low and high, to about 1e-8."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 1e-9:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return (low + high) / 2
