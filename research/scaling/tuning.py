# SPDX-License-Identifier: Apache-2.0
"""Learning rate and batch size by power laws: the best of each model and budget, and how they move with compute.

At a model and budget the loss is a quadratic in the logs of both, whose minimum is the optimum (Bi et al. 2024,
section 3.1, and Porian et al. 2024, section 3.5, fit the same two laws). Two rules are given: by compute alone, as in
the former, and by params and tokens, which also says what to do away from the compute-optimal size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from research.core.types import UserError
from research.scaling.intervals import Interval, lines
from research.scaling.isoflop import by_budget
from research.scaling.table import Run

NEAR = 0.10  # of the best loss: runs farther above it say little about where the minimum lies
FEWEST_RUNS = 8  # two more than a quadratic in two variables has numbers
RESAMPLES = 2000
ONE_LINE = 0.05  # spread of (log params, log tokens) across their main direction, as a share of that along it


@dataclass(frozen=True)
class Best:
    """The optimum of a model at a budget. learning_rate, batch_tokens, loss: at the minimum of the surface; None where
    ``problem`` says why there is none. draws: log learning rate and log batch of resampled surfaces, [RESAMPLES, 2]."""

    flops: float
    params: int
    tokens: float
    runs: tuple[Run, ...]
    learning_rate: float | None = None
    batch_tokens: float | None = None
    loss: float | None = None
    rms_residual: float | None = None
    draws: np.ndarray | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Rule:
    """y = exp(constant) * product of variables^exponent. intervals: of the constant's exponential and each exponent."""

    coefficient: float
    exponents: Mapping[str, float]
    intervals: Mapping[str, Interval]

    def __call__(self, **variables: float) -> float:
        return self.coefficient * math.prod(variables[name] ** power for name, power in self.exponents.items())

    def __str__(self) -> str:
        return " ".join([f"{self.coefficient:.4g}", *(f"{name}^{power:.3f}" for name, power in self.exponents.items())])


@dataclass(frozen=True)
class Tuning:
    """rules: by the quantity ("learning_rate", "batch_tokens"), first by compute, then by params and tokens."""

    best: tuple[Best, ...]
    by_compute: Mapping[str, Rule]
    by_size: Mapping[str, Rule] | None

    @property
    def found(self) -> tuple[Best, ...]:
        return tuple(best for best in self.best if best.problem is None)

    @property
    def sentences(self) -> tuple[str, ...]:
        lines = [f"{_cell(b)}: {b.problem}" for b in self.best if b.problem is not None]
        for name, unit in (("learning_rate", ""), ("batch_tokens", " tokens")):
            for rules in (self.by_compute, self.by_size or {}):
                if name in rules:
                    rule = rules[name]
                    spans = "; ".join(f"{key} {i.told('{:.3g}'.format)}" for key, i in rule.intervals.items())
                    lines.append(f"The best {name.replace('_', ' ')} is {rule}{unit} ({spans}).")
        return tuple(lines)


def tune(runs: Iterable[Run], *, seed: int = 0) -> Tuning:
    """Fits every model's surface at its budget, then the rules. Runs that cannot be fitted are left out.

    Raises UserError where fewer than two budgets have an optimum inside the rates and batches that were tried.
    """
    cells: dict[tuple[int, int], list[Run]] = {}
    good = [run for run in runs if run.problem is None and run.learning_rate and run.batch_tokens]
    for budget, group in enumerate(by_budget(good)):
        for run in group:
            cells.setdefault((budget, run.params), []).append(run)
    generator = np.random.default_rng(seed)
    best = tuple(_best(cells[key], generator) for key in sorted(cells))
    found = [b for b in best if b.problem is None]
    budgets = {budget for (budget, _), b in zip(sorted(cells), best, strict=True) if b.problem is None}
    if len(budgets) < 2:
        problems = "; ".join(f"{_cell(b)}: {b.problem}" for b in best if b.problem is not None)
        raise UserError(
            f"Rules for learning rate and batch need an optimum at 2 budgets or more; there are {len(budgets)}"
            f"{f' ({problems})' if problems else ''}: try more learning rates and batches at more budgets."
        )
    compute = {"flops": [b.flops for b in found]}
    sizes = {"params": [b.params for b in found], "tokens": [b.tokens for b in found]}
    spread = len({b.params for b in found}) > 2 and len(found) > 3 and _apart(found)
    return Tuning(best, _rules(found, compute), _rules(found, sizes) if spread else None)


def _apart(found: Sequence[Best]) -> bool:
    """Whether params and tokens vary in more than one direction: on one line their exponents cannot be told apart."""
    both = np.log([[b.params, b.tokens] for b in found])
    large, small = np.linalg.svd(both - both.mean(axis=0), compute_uv=False)
    return bool(small > ONE_LINE * large)


def _best(runs: Sequence[Run], generator: np.random.Generator) -> Best:
    lowest = min(runs, key=lambda run: run.loss)
    common = {
        "flops": float(np.mean([run.flops for run in runs])),
        "params": runs[0].params,
        "tokens": float(np.mean([run.tokens for run in runs])),
        "runs": tuple(runs),
    }
    near = [run for run in runs if run.loss <= lowest.loss * (1 + NEAR)]
    rate, batch = (np.log([getattr(run, name) for run in near]) for name in ("learning_rate", "batch_tokens"))
    if len(near) < FEWEST_RUNS or min(len(np.unique(rate)), len(np.unique(batch))) < 3:
        return Best(**common, problem=f"only {len(near)} runs lie within {NEAR:.0%} of the best loss; try more.")
    x, y = rate - rate.mean(), batch - batch.mean()
    columns = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    losses = np.log([run.loss for run in near])
    solve = np.linalg.pinv(columns)
    numbers = solve @ losses
    residuals = losses - columns @ numbers
    stretch = math.sqrt(len(near) / max(1, len(near) - columns.shape[1]))
    picks = generator.integers(0, len(near), (RESAMPLES, len(near)))
    resampled = (columns @ numbers + stretch * (residuals - residuals.mean())[picks]) @ solve.T
    places = _minima(np.concatenate([numbers[None], resampled]))
    place = places[0]
    within = np.all(np.isfinite(place)) and x.min() < place[0] < x.max() and y.min() < place[1] < y.max()
    if not within:
        return Best(**common, problem=_advice(lowest, place, (x, y)))
    there = np.array([1, *place, place[0] ** 2, place[1] ** 2, place[0] * place[1]])
    return Best(
        **common,
        learning_rate=float(np.exp(place[0] + rate.mean())),
        batch_tokens=float(np.exp(place[1] + batch.mean())),
        loss=float(np.exp(there @ numbers)),
        rms_residual=float(np.sqrt(np.mean(residuals**2))),
        draws=places[1:] + np.array([rate.mean(), batch.mean()]),
    )


def _minima(numbers: np.ndarray) -> np.ndarray:
    """Where each quadratic (rows of 1, x, y, xx, yy, xy) has its minimum, [rows, 2]; NaN where it has none."""
    _, b, c, d, e, f = numbers.T
    determinant = 4 * d * e - f * f
    good = (determinant > 0) & (d > 0)
    safe = np.where(good, determinant, 1.0)
    place = np.stack([(f * c - 2 * e * b) / safe, (f * b - 2 * d * c) / safe], axis=1)
    return np.where(good[:, None], place, np.nan)


def _advice(lowest: Run, place: np.ndarray, tried: tuple[np.ndarray, np.ndarray]) -> str:
    if not np.all(np.isfinite(place)):
        around = f"learning rate {lowest.learning_rate:g} and {lowest.batch_tokens} tokens a step"
        return f"not bracketed: run more around {around}, for the surface has no minimum."
    words = []
    for name, at, values in zip(("learning rates", "batches"), place, tried, strict=True):
        if at <= values.min():
            words.append(f"smaller {name}")
        if at >= values.max():
            words.append(f"larger {name}")
    return f"not bracketed: run {' and '.join(words)}, where the surface has its minimum."


def _rules(found: Sequence[Best], variables: Mapping[str, Sequence[float]]) -> dict[str, Rule]:
    columns = np.stack([np.ones(len(found)), *(np.log(values) for values in variables.values())], axis=1)
    solve = np.linalg.pinv(columns)
    rules = {}
    for index, name in enumerate(("learning_rate", "batch_tokens")):
        values = np.log([getattr(b, name) for b in found])
        numbers = solve @ values
        draws = lines(columns, np.stack([b.draws[:, index] for b in found], axis=1))
        first, *others = (Interval.of(column) for column in draws.T)
        spans = [Interval(math.exp(first.low), math.exp(first.high)) if first.closed else first, *others]
        names = ("coefficient", *variables)
        exponents = dict(zip(variables, numbers[1:].tolist(), strict=True))
        rules[name] = Rule(float(np.exp(numbers[0])), exponents, dict(zip(names, spans, strict=True)))
    return rules


def _cell(best: Best) -> str:
    return f"{best.flops:.2g} FLOPs, {best.params:,} parameters"
