# SPDX-License-Identifier: Apache-2.0
"""The envelope of training curves: at each amount of compute the run with the lowest loss so far.

Hoffmann et al. 2022, approach 1. A point on a curve before its end was reached at a learning rate that has not decayed,
so it lies above the loss of a run that ends there. Of a run whose rate decays only the last part counts, therefore; of
one with a constant rate everything after its warm-up.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from research.core.types import UserError
from research.scaling.intervals import EXPONENTS, Interval
from research.scaling.laws import PowerLaw, fit_power_law
from research.scaling.table import ParameterCount, Run

Curves = Mapping[str, Sequence[tuple[float, float]]]  # run's name -> [(training FLOPs, loss in nats per token), ...]
GRID = 300  # amounts of compute, evenly spaced in logs
DECAYED = 0.85  # share of a run's compute from which on a decaying schedule is near its end
FEWEST_SIZES = 3  # on the envelope, for a power law through it


@dataclass(frozen=True)
class Envelope:
    """flops, loss, params, tokens: [points] of the envelope, with the run that is lowest at each (names).

    params_law, tokens_law: power laws through it. intervals: of their exponents, "params_in_compute" and
    "tokens_in_compute", from runs drawn with replacement.
    """

    flops: np.ndarray
    loss: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    names: tuple[str, ...]
    params_law: PowerLaw
    tokens_law: PowerLaw
    intervals: Mapping[str, Interval]


def fit_envelope(
    runs: Iterable[Run],
    curves: Curves,
    *,
    parameters: ParameterCount = "total",
    resamples: int = 500,
    seed: int = 0,
) -> Envelope:
    """The envelope of the runs' training curves and the power laws through it.

    Only amounts of compute that at least three sizes have reached count. Raises UserError for fewer than three
    runs with a curve, or fewer than three sizes on the envelope, which is then a matter of two models.
    """
    found = [(run, _counting(run, curves)) for run in runs if run.problem is None and len(curves.get(run.name, ())) > 1]
    found = [(run, line) for run, line in found if len(line) > 1]
    distinct = len({run.count(parameters) for run, _ in found})
    if distinct < FEWEST_SIZES:
        raise UserError(
            f"An envelope needs training curves of {FEWEST_SIZES} model sizes; there are {len(found)} runs with "
            f"a curve, of {distinct} sizes."
        )
    sizes = np.array([run.count(parameters) for run, _ in found], float)
    per_token = np.array([run.flops / run.tokens for run, _ in found])
    ends = [(line[0, 0], line[-1, 0]) for _, line in found]
    grid = np.geomspace(min(a for a, _ in ends), max(b for _, b in ends), GRID)
    losses = np.stack([_interpolated(grid, line) for _, line in found])
    reached = np.array([len(np.unique(sizes[np.isfinite(column)])) >= FEWEST_SIZES for column in losses.T])
    grid, losses = grid[reached], losses[:, reached]
    if not len(grid):
        raise UserError("No amount of compute is on the training curves of 3 model sizes: the envelope is empty.")
    best = np.argmin(losses, axis=0)
    if len(np.unique(sizes[best])) < FEWEST_SIZES:
        raise UserError(
            f"Only {len(np.unique(sizes[best]))} model sizes touch the envelope of the training curves and "
            f"{FEWEST_SIZES} "
            "are needed for a power law through it: run a wider range of compute."
        )
    laws = [fit_power_law(grid, y=values) for values in (sizes[best], grid / per_token[best])]
    return Envelope(
        flops=grid,
        loss=losses[best, np.arange(len(grid))],
        params=sizes[best],
        tokens=grid / per_token[best],
        names=tuple(found[index][0].name for index in best),
        params_law=laws[0],
        tokens_law=laws[1],
        intervals=_intervals(grid, losses, sizes, per_token, resamples, seed),
    )


def _counting(run: Run, curves: Curves) -> np.ndarray:
    """The part of a run's curve that counts, [points, (FLOPs, loss)], from one point before it on."""
    line = np.array(curves[run.name], float)
    line = line[np.all(np.isfinite(line), axis=1) & (line[:, 0] > 0)]
    if len(line) < 2:
        return line
    start = DECAYED * line[-1, 0]
    if run.schedule is not None and run.schedule.startswith("constant"):
        start = (run.warmup_tokens or 0) * run.flops / run.tokens
    first = int(np.searchsorted(line[:, 0], start))
    return line[max(0, min(first, len(line) - 2)) :]


def _interpolated(grid: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Loss at each compute, infinite outside what the curve covers."""
    inside = (grid >= line[0, 0]) & (grid <= line[-1, 0] * (1 + 1e-9))
    return np.where(inside, np.interp(np.log(grid), np.log(line[:, 0]), line[:, 1]), np.inf)


def _intervals(
    grid: np.ndarray, losses: np.ndarray, sizes: np.ndarray, per_token: np.ndarray, resamples: int, seed: int
) -> dict[str, Interval]:
    generator, slopes = np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = generator.integers(0, len(sizes), len(sizes))
        best = drawn[np.argmin(losses[drawn], axis=0)]
        there = np.isfinite(losses[best, np.arange(len(grid))])
        if len(np.unique(sizes[best[there]])) < FEWEST_SIZES:
            continue
        x = np.log(grid[there])
        slopes.append([np.polyfit(x, np.log(y[there]), 1)[0] for y in (sizes[best], grid / per_token[best])])
    if not slopes:
        return {}
    return {name: Interval.of(values) for name, values in zip(EXPONENTS, np.transpose(slopes), strict=True)}
