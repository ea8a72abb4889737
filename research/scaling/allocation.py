# SPDX-License-Identifier: Apache-2.0
"""The best use of a compute budget under a law: how large a model, on how many tokens.

Compute-optimal by any cost of a token; with the tokens a model will serve in its life counted in (Sardana et al. 2024);
with a corpus that must be repeated (Muennighoff et al. 2023).
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import UserError
from research.scaling.laws import MUENNIGHOFF, Chinchilla, DataConstrained, fit_power_law, numbers
from research.scaling.table import ParameterCount, Run

FlopsPerToken = Callable[[Any], Any]  # training FLOPs of a token as a function of params; plain arithmetic
SMALLEST, LARGEST = 1.0, 1e16  # where an optimum is looked for, params
COARSE, FINE, ZOOMS = 129, 33, 4  # points of the search: over everything, then four times around the best
LIFETIME_REACH = math.log(1e4)  # how far below the compute-optimal size a model that serves is looked for
FORWARD = 1 / 3  # of a token's training FLOPs: what serving it costs, without its gradient


@dataclass(frozen=True)
class Allocation:
    """How a budget is spent: a model of ``params`` on ``tokens``, with the loss that a law expects (nats per
    token). Numbers, or arrays of one shape."""

    flops: Any
    params: Any
    tokens: Any
    loss: Any


def six_per_param(params: Any) -> Any:
    """6 FLOPs per parameter and training token (Kaplan et al. 2020, section 2.1)."""
    return 6.0 * params


@functools.partial(jax.tree_util.register_dataclass, data_fields=["terms"], meta_fields=["largest_error"])
@dataclass(frozen=True)
class CostModel:
    """Training FLOPs per token: a sum of coefficient * params^exponent. largest_error: the worst relative
    error over the runs it was made from."""

    terms: tuple[tuple[float, float], ...]
    largest_error: float

    def __call__(self, params: Any) -> Any:
        return sum(coefficient * params**exponent for coefficient, exponent in self.terms)


def cost_model(runs: Iterable[Run], *, parameters: ParameterCount = "total") -> CostModel:
    """FLOPs per token of models between and beyond the runs' sizes (attention and head included).

    Either one power law, or params + params^(2/3) + params^(1/3), whichever lies nearer: where depth grows
    with width these are the costs of weights, of attention scores and of the head. Raises UserError for
    fewer than two sizes.
    """
    from scipy.optimize import nnls

    good = [run for run in runs if run.problem is None]
    sizes = np.array([run.count(parameters) for run in good], float)
    per_token = np.array([run.flops / run.tokens for run in good], float)
    law = fit_power_law(sizes, y=per_token)
    exponents = (1.0, 2 / 3, 1 / 3)
    columns = np.stack([sizes**exponent / per_token for exponent in exponents], axis=1)
    scale = columns.max(axis=0)
    coefficients = nnls(columns / scale, np.ones_like(per_token))[0] / scale
    models = []
    for terms in (
        ((law.coefficient, law.exponent), (0.0, 1.0), (0.0, 1.0)),
        tuple(zip(coefficients.tolist(), exponents, strict=True)),
    ):
        errors = CostModel(terms, 0.0)(sizes) / per_token - 1
        models.append(CostModel(terms, float(np.max(np.abs(errors)))))
    return min(models, key=lambda model: model.largest_error)


def closed_form_optimum(law: Chinchilla, *, flops: float) -> Allocation:
    """The compute-optimal allocation under flops = 6 params tokens (Hoffmann et al. 2022, eq. 4)."""
    balance = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    params = balance * (flops / 6) ** (law.beta / (law.alpha + law.beta))
    tokens = flops / (6 * params)
    return Allocation(flops, params, tokens, law.loss(params=params, tokens=tokens))


def optimum(
    law: Any, *, flops: float, flops_per_token: FlopsPerToken = six_per_param, unique_tokens: float | None = None
) -> Allocation:
    """The params that minimise the law's loss when a budget is spent at ``flops_per_token(params)``.

    law: of params and tokens, and of unique_tokens where it is data-constrained. flops_per_token: any increasing
    function of params (attention and head included). Raises UserError for a budget that is not positive, or where
    the law sees no trade-off between params and tokens.
    """
    check_flops(flops)
    found = optima(law, flops=np.array([float(flops)]), flops_per_token=flops_per_token, unique_tokens=unique_tokens)
    if not math.isfinite(found.params[0]):
        side = "smaller" if _falls_towards_smaller(law, flops, flops_per_token, unique_tokens) else "larger"
        raise UserError(
            f"The law ({law}) has no compute-optimal model size at {flops:.3g} FLOPs: its loss only falls "
            f"towards {side} models, so fit it on runs that bracket the optimum."
        )
    return Allocation(float(flops), float(found.params[0]), float(found.tokens[0]), float(found.loss[0]))


def check_flops(flops: float) -> None:
    if not (math.isfinite(flops) and flops > 0):
        raise UserError(f"A budget must be a positive number of FLOPs; given {flops}.")


def optima(
    laws: Any,
    *,
    flops: np.ndarray,
    flops_per_token: FlopsPerToken = six_per_param,
    unique_tokens: float | None = None,
) -> Allocation:
    """The optimum at each budget [C] for one law, or for many whose numbers are arrays [R]: arrays [C], or [R, C].

    NaN where a law has no optimum.
    """
    others = {} if unique_tokens is None else {"unique_tokens": float(unique_tokens)}
    flops = np.atleast_1d(np.asarray(flops, float))
    costs = _on_arrays(flops_per_token)
    with jax.enable_x64(True):
        cost = as_tree(flops_per_token)
        leaves = [np.asarray(value, float) for value in numbers(laws).values()]
        many = any(value.ndim > 0 for value in leaves)
        count = max(np.size(value) for value in leaves)
        stacked = jax.tree.map(lambda value: np.broadcast_to(np.asarray(value, float), (count,)), laws)
        size = np.asarray(_optima(stacked, flops, cost, others))
        params = np.exp(size)
        tokens = flops / costs(params)
    columns = jax.tree.map(lambda value: value[:, None], stacked)
    loss = np.asarray(columns.loss(params=params, tokens=tokens, **others))
    pick = (lambda value: value) if many else (lambda value: value[0])
    return Allocation(np.broadcast_to(flops, params.shape) if many else flops, pick(params), pick(tokens), pick(loss))


def as_tree(flops_per_token: FlopsPerToken) -> Any:
    """A cost that can be handed to a compiled function: a CostModel's numbers, or a function as it is."""
    return flops_per_token if isinstance(flops_per_token, CostModel) else jax.tree_util.Partial(flops_per_token)


def _on_arrays(flops_per_token: FlopsPerToken) -> FlopsPerToken:
    """A study's own function may be of single numbers."""
    return flops_per_token if isinstance(flops_per_token, CostModel) else np.vectorize(flops_per_token, otypes=[float])


@jax.jit
def _optima(laws: Any, flops: Any, cost: Any, others: Any) -> Any:
    one = functools.partial(log_optimal_params, cost=cost, others=others)
    return jax.vmap(lambda law: jax.vmap(lambda budget: one(law, budget))(flops))(laws)


def log_optimal_params(law: Any, flops: Any, *, cost: FlopsPerToken, others: Any) -> Any:
    """Log of the compute-optimal params, under a JAX transformation; NaN where the best lies at an end of the search.

    A search, then one Newton step from where it stops, whose derivative by the law's numbers is the optimum's
    (implicit function theorem).
    """

    def loss(law: Any, size: Any) -> Any:
        params = jnp.exp(size)
        return law.loss(params=params, tokens=flops / cost(params), **others)

    still = jax.lax.stop_gradient(law)
    grid = jnp.linspace(math.log(SMALLEST), math.log(LARGEST), COARSE)
    best = jnp.argmin(loss(still, grid))
    inside = (best > 0) & (best < COARSE - 1)

    def zoom(_: int, state: Any) -> Any:
        at, half = state
        near = at + half * jnp.linspace(-1, 1, FINE)
        return near[jnp.argmin(loss(still, near))], half * 2 / (FINE - 1)

    at, _ = jax.lax.fori_loop(0, ZOOMS, zoom, (grid[best], grid[1] - grid[0]))
    at = jax.lax.stop_gradient(at)
    falls = jax.grad(loss, argnums=1)
    slope, bend = falls(law, at), jax.grad(falls, argnums=1)(law, at)
    step = jnp.where(bend > 0, -slope / jnp.where(bend > 0, bend, 1.0), 0.0)
    return jnp.where(inside, at + jnp.where(jnp.abs(step) < 1e-3, step, 0.0), jnp.nan)


def _falls_towards_smaller(law: Any, flops: float, flops_per_token: FlopsPerToken, unique: float | None) -> bool:
    others = {} if unique is None else {"unique_tokens": unique}
    ends = [law.loss(params=p, tokens=flops / flops_per_token(p), **others) for p in (SMALLEST, LARGEST)]
    return bool(ends[0] < ends[1])


@dataclass(frozen=True)
class Lifetime:
    """A model for a whole life: as good as ``compute_optimal``, for the least training and serving together.

    served: tokens over its life. flops: training and serving; compute_optimal_flops: the same for the compute-optimal
    model.
    """

    compute_optimal: Allocation
    best: Allocation
    served: float
    flops: float
    compute_optimal_flops: float

    @property
    def saved(self) -> float:
        """Share of the compute-optimal model's lifetime FLOPs."""
        return 1 - self.flops / self.compute_optimal_flops


def lifetime_optimum(
    law: Any,
    *,
    flops: float,
    served: float,
    flops_per_token: FlopsPerToken = six_per_param,
    unique_tokens: float | None = None,
) -> Lifetime:
    """The model that reaches the loss of compute-optimal training on ``flops`` with the least training and serving
    (Sardana et al. 2024, section 2): smaller, on more tokens. A served token costs a third of a trained one.

    law: of params and tokens, and of unique_tokens where it is data-constrained. Raises UserError for a count of tokens
    that is not positive, or where the law has no optimum.
    """
    if not (math.isfinite(served) and served > 0):
        raise UserError(f"The tokens served over a model's life must be a positive number; given {served}.")
    spend = {"flops_per_token": flops_per_token, "unique_tokens": unique_tokens}
    start = optimum(law, flops=flops, **spend)
    found = lifetime_optima(law, flops=flops, served=served, **spend)
    best = Allocation(*(float(value) for value in (found.flops, found.params, found.tokens, found.loss)))
    whole = [one.flops + FORWARD * served * float(flops_per_token(one.params)) for one in (best, start)]
    return Lifetime(start, best, served, *whole)


def lifetime_optima(
    laws: Any,
    *,
    flops: float,
    served: float,
    flops_per_token: FlopsPerToken = six_per_param,
    unique_tokens: float | None = None,
) -> Allocation:
    """``lifetime_optimum``'s model for one law, or for many whose numbers are arrays [R]; NaN where a law has none."""
    others = {} if unique_tokens is None else {"unique_tokens": float(unique_tokens)}
    starts = optima(laws, flops=np.array([flops]), flops_per_token=flops_per_token, unique_tokens=unique_tokens)
    laws = jax.tree.map(lambda value: np.asarray(value, float)[..., None], laws)
    cost = _on_arrays(flops_per_token)

    def spent(size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of training, FLOPs of the whole life) for log params."""
        tokens = laws.tokens_to_reach(starts.loss, params=np.exp(size), **others)
        return tokens, cost(np.exp(size)) * (tokens + FORWARD * served)

    size = most = np.log(starts.params)
    half = LIFETIME_REACH
    for points in (COARSE, FINE, FINE, FINE):
        grid = np.minimum(size + np.linspace(-half, half, points), most)
        size = np.take_along_axis(grid, np.argmin(spent(grid)[1], axis=-1)[..., None], axis=-1)
        half *= 2 / (points - 1)
    params, tokens = np.exp(size), spent(size)[0]
    found = (cost(params) * tokens, params, tokens, starts.loss)
    return Allocation(*(np.asarray(values)[..., 0] for values in found))


def constrained(law: Chinchilla, *, R_D: float = MUENNIGHOFF.R_D, R_N: float = MUENNIGHOFF.R_N) -> DataConstrained:
    """The law where a corpus is repeated; what repetition is worth is by default what Muennighoff et al. 2023 found."""
    return DataConstrained(**numbers(law), R_D=R_D, R_N=R_N)
