# SPDX-License-Identifier: Apache-2.0
"""IsoFLOP curves: at each budget a parabola of loss in log params, and how its minimum moves with compute.

Hoffmann et al. 2022, approach 2. A parabola is the true curve only near its minimum: sizes far to one side
bend it, without any noise, so its minimum is an estimate and the parametric law (``fit``) is the other one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from research.core.types import UserError
from research.scaling.intervals import TAIL, Interval, lines
from research.scaling.laws import PowerLaw, fit_power_law
from research.scaling.table import ParameterCount, Run

FEWEST_SIZES = 3
MINIMUM = ("params", "tokens", "loss")  # what a curve has at its minimum
SAME_BUDGET = 0.05  # runs whose FLOPs lie within so much of one another share a budget


@dataclass(frozen=True)
class Curve:
    """One budget (the mean FLOPs of its runs): sizes, tokens and losses of its runs, smallest first; and
    what was found.

    coefficients: loss = c2 u^2 + c1 u + c0 with u = log(params) - log_centre. params, tokens, loss: at the
    minimum, None where there is none. problem: the sentence that says why, None for a curve that counts.
    """

    flops: float
    names: tuple[str, ...]
    sizes: tuple[float, ...]
    tokens_of_sizes: tuple[float, ...]
    losses: tuple[float, ...]
    log_centre: float = 0.0
    coefficients: tuple[float, float, float] | None = None
    params: float | None = None
    tokens: float | None = None
    loss: float | None = None
    problem: str | None = None

    @property
    def bracketed(self) -> bool:
        return self.problem is None

    def __call__(self, params: float) -> float:
        """The parabola's loss at a model size, nats per token. Raises UserError where none was fitted."""
        if self.coefficients is None:
            raise UserError(f"No parabola was fitted at {self.flops:.3g} FLOPs: {self.problem}")
        return np.polyval(self.coefficients, np.log(params) - self.log_centre)


@dataclass(frozen=True)
class IsoFlop:
    """All curves, and power laws through the minima of those that are bracketed (None with fewer than two).

    params_law: params = k C^a. tokens_law: tokens = k C^b. loss_law: loss = k C^-c, without a floor.
    """

    curves: tuple[Curve, ...]
    params_law: PowerLaw | None
    tokens_law: PowerLaw | None
    loss_law: PowerLaw | None

    @classmethod
    def of(cls, curves: Iterable[Curve]) -> "IsoFlop":
        """With the power laws through the curves' minima."""
        curves = tuple(curves)
        found = [curve for curve in curves if curve.bracketed]
        if len(found) < 2:
            return cls(curves, None, None, None)
        flops = [curve.flops for curve in found]
        return cls(curves, *(fit_power_law(flops, y=[getattr(c, name) for c in found]) for name in MINIMUM))

    @property
    def bracketed(self) -> tuple[Curve, ...]:
        return tuple(curve for curve in self.curves if curve.bracketed)


def by_budget(runs: Iterable[Run], *, tolerance: float = SAME_BUDGET) -> list[list[Run]]:
    """Runs grouped by FLOPs, smallest budget first: a group spans at most ``tolerance`` (relative)."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda r: r.flops):
        if groups and run.flops <= groups[-1][0].flops * (1 + tolerance):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def fit_isoflop(runs: Iterable[Run], *, parameters: ParameterCount = "total") -> IsoFlop:
    """Fits every budget's parabola and the power laws through their minima. Runs that cannot be fitted are
    left out."""
    good = [run for run in runs if run.problem is None]
    return IsoFlop.of(fit_curve(group, parameters=parameters) for group in by_budget(good))


def fit_curve(runs: Sequence[Run], *, parameters: ParameterCount = "total") -> Curve:
    """The parabola of one budget's runs (loss against log params), checked: at least 3 sizes, opening
    upward, its vertex strictly inside the sampled sizes. Otherwise ``problem`` says "not bracketed: run
    sizes ..."."""
    runs = sorted(runs, key=lambda run: run.count(parameters))
    sizes = np.array([run.count(parameters) for run in runs], float)
    losses = np.array([run.loss for run in runs], float)
    tokens = np.array([run.tokens for run in runs], float)
    flops = float(np.mean([run.flops for run in runs]))
    common = {
        "flops": flops,
        "names": tuple(run.name for run in runs),
        "sizes": tuple(sizes.tolist()),
        "tokens_of_sizes": tuple(tokens.tolist()),
        "losses": tuple(losses.tolist()),
    }
    distinct = len(np.unique(sizes))
    if distinct < FEWEST_SIZES:
        advice = f"run sizes around {sizes[np.argmin(losses)]:,.0f} parameters, at least {FEWEST_SIZES} in all"
        return Curve(**common, problem=f"not bracketed: {advice} (there are {distinct}).")
    centre = float(np.log(sizes).mean())
    u = np.log(sizes) - centre
    c2, c1, c0 = (float(c) for c in np.polyfit(u, losses, 2))
    common |= {"log_centre": centre, "coefficients": (c2, c1, c0)}
    vertex = -c1 / (2 * c2) if c2 else math.inf
    problem = _problem(c2, vertex, u, sizes, losses)
    if problem is not None:
        return Curve(**common, problem=problem)
    # Tokens at the vertex from the budget's own runs, so from the exact FLOPs of models of these shapes.
    unique, first = np.unique(u, return_index=True)
    tokens_there = math.exp(float(np.interp(vertex, unique, np.log(tokens[first]))))
    return Curve(
        **common,
        params=math.exp(vertex + centre),
        tokens=tokens_there,
        loss=float(np.polyval((c2, c1, c0), vertex)),
    )


def _problem(c2: float, vertex: float, u: np.ndarray, sizes: np.ndarray, losses: np.ndarray) -> str | None:
    least_bend = max(1e-6 * float(losses.max() - losses.min()), 1e-9 * float(losses.mean()))
    if c2 * float(u.max() - u.min()) ** 2 < least_bend:
        where = int(np.argmin(losses))
        if where == 0:
            advice = f"below {sizes[0]:,.0f} parameters"
        elif where == len(sizes) - 1:
            advice = f"above {sizes[-1]:,.0f} parameters"
        else:
            advice = f"around {sizes[where]:,.0f} parameters"
        return f"not bracketed: run sizes {advice}, for the parabola does not open upward."
    if vertex <= float(u.min()):
        return f"not bracketed: run sizes below {sizes[0]:,.0f} parameters, where the parabola has its vertex."
    if vertex >= float(u.max()):
        return f"not bracketed: run sizes above {sizes[-1]:,.0f} parameters, where the parabola has its vertex."
    return None


@dataclass(frozen=True)
class Minima:
    """Intervals of the IsoFLOP minima. draws: [resamples, bracketed curves, 3], log of params, tokens and loss at the
    minima of parabolas fitted to resampled losses, NaN where one has none. bands: of each curve's parabola over its
    sizes, (low, high) by the curve's FLOPs. exponents: of params, tokens and loss in compute, of each resample through
    the minima that it has."""

    draws: np.ndarray
    bands: Mapping[float, tuple[np.ndarray, np.ndarray]]
    exponents: Mapping[str, Interval]

    def interval(self, index: int, name: str) -> Interval:
        """Of one bracketed curve's params, tokens or loss. Infinite ends where more than a tail has no minimum."""
        return Interval.of(np.exp(self.draws[:, index, MINIMUM.index(name)]))


BAND_POINTS = 100


def resample(found: IsoFlop, *, resamples: int = 2000, seed: int = 0) -> Minima | None:
    """Intervals from parabolas refitted to their own values plus residuals drawn with replacement from all bracketed
    curves, each stretched for the three numbers of its parabola. None where no curve has a residual."""
    curves = [curve for curve in found.bracketed if len(curve.sizes) > FEWEST_SIZES]
    if not curves:
        return None
    generator = np.random.default_rng(seed)
    stretched = [_residuals(c) * math.sqrt(len(c.sizes) / (len(c.sizes) - FEWEST_SIZES)) for c in curves]
    pool = np.concatenate(stretched)
    draws, bands = [], {}
    for curve in found.bracketed:
        u = np.log(curve.sizes) - curve.log_centre
        columns = np.stack([u**2, u, np.ones_like(u)], axis=1)
        noise = pool[generator.integers(0, len(pool), (resamples, len(u)))]
        fits = (curve(np.array(curve.sizes)) * np.exp(noise)) @ np.linalg.pinv(columns).T
        grid = np.linspace(u[0], u[-1], BAND_POINTS)
        curves_drawn = fits @ np.stack([grid**2, grid, np.ones_like(grid)])
        bands[curve.flops] = tuple(np.percentile(curves_drawn, [TAIL, 100 - TAIL], axis=0))
        draws.append(_resampled_minima(curve, fits, u))
    stacked = np.stack(draws, axis=1)
    exponents = {}
    if len(found.bracketed) >= 2:
        x = np.log([curve.flops for curve in found.bracketed])
        columns = np.stack([np.ones_like(x), x], axis=1)
        exponents = {name: Interval.of(lines(columns, stacked[..., q])[:, 1]) for q, name in enumerate(MINIMUM)}
    return Minima(stacked, bands, exponents)


def _residuals(curve: Curve) -> np.ndarray:
    return np.log(curve.losses) - np.log(curve(np.array(curve.sizes)))


def _resampled_minima(curve: Curve, fits: np.ndarray, u: np.ndarray) -> np.ndarray:
    """[resamples, 3]: log params, log tokens and log loss at each parabola's vertex; NaN for one that opens downward
    or lies far outside the sizes."""
    c2, c1, c0 = fits.T
    opens = c2 > 0
    vertex = np.where(opens, -c1 / (2 * np.where(opens, c2, 1.0)), np.nan)
    width = u[-1] - u[0]
    vertex = np.where((vertex > u[0] - width) & (vertex < u[-1] + width), vertex, np.nan)
    tokens = np.log(curve.tokens_of_sizes)
    slope = np.polyfit(u, tokens, 1)
    at = np.interp(vertex, u, tokens) + slope[0] * (np.minimum(vertex - u[0], 0) + np.maximum(vertex - u[-1], 0))
    with np.errstate(invalid="ignore"):
        loss = np.log(np.maximum(c0 + c1 * vertex + c2 * vertex**2, 1e-300))
    return np.stack([vertex + curve.log_centre, at, loss], axis=1)
