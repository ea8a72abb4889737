# SPDX-License-Identifier: Apache-2.0
"""What experts are worth: the size of the dense model that would reach an expert model's loss.

Clark et al. 2022, section 4.2 (effective parameter count): a law is fitted to the dense runs, and the loss of an
expert model is read on it. Here at the run's own number of tokens, and besides as the compute that dense
models at their best size would need.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from research.core.types import UserError
from research.scaling.allocation import FlopsPerToken, cost_model, optimum
from research.scaling.fit import Fit, Points, fit_law
from research.scaling.intervals import TAIL, Bootstrap, Interval, bootstrap
from research.scaling.isoflop import by_budget
from research.scaling.laws import Chinchilla
from research.scaling.table import Run

RESAMPLES = 1000
FARTHEST = 1e4  # times the run's own compute: beyond it no equal dense compute is looked for


@dataclass(frozen=True)
class Worth:
    """One run of an expert model, read on the dense models' law. None: no dense model is as good.

    dense_loss: the law's, for a dense model of the run's active parameters on its tokens, nats per token.
    dense_params: those of a dense model with the run's loss on its tokens. dense_flops: the least training compute
    with which dense models reach the run's loss. times_interval: 95% of ``times``, from laws of resampled dense runs,
    infinite where by some of them no dense model is as good; None where the runs are too few to draw from.
    """

    run: Run
    dense_loss: float
    dense_params: float | None
    dense_flops: float | None
    times_interval: Interval | None = None

    @property
    def times(self) -> float | None:
        """Effective dense size over active parameters."""
        return None if self.dense_params is None else self.dense_params / self.run.active

    @property
    def times_flops(self) -> float | None:
        return None if self.dense_flops is None else self.dense_flops / self.run.flops


@dataclass(frozen=True)
class Rung:
    """One budget: the best run of each number of experts (0: dense) that has one."""

    flops: float
    best: dict[int, Run]

    def gain(self, experts: int) -> float:
        """By how many nats per token the best expert model's loss lies below the best dense one's."""
        return self.best[0].loss - self.best[experts].loss


@dataclass(frozen=True)
class Comparison:
    """fit: the law of the dense runs. worth: every expert run. rungs: the budgets, smallest first."""

    fit: Fit
    dense: tuple[Run, ...]
    flops_per_token: FlopsPerToken
    worth: tuple[Worth, ...]
    rungs: tuple[Rung, ...]

    def of(self, run: Run) -> Worth:
        return next(found for found in self.worth if found.run.name == run.name)

    @property
    def experts_win(self) -> bool:
        """Whether every kind of expert model is below the best dense one at the largest budget."""
        last = self.rungs[-1]
        return all(last.gain(experts) > 0 for experts in last.best if experts)

    @property
    def sentences(self) -> tuple[str, ...]:
        last = self.rungs[-1]
        found = [_sentence(last, self.of(last.best[experts])) for experts in sorted(last.best) if experts]
        verdict = "beat" if self.experts_win else "do not all beat"
        found.append(
            f"At the largest budget, {last.flops:.3g} FLOPs, expert models {verdict} the best dense one at equal "
            f"training compute; single dense runs lie {self.fit.rms_residual:.2%} off their own law."
        )
        return tuple(found)


def _sentence(rung: Rung, found: Worth) -> str:
    run, dense = found.run, rung.best[0]
    span = "" if found.times_interval is None else f" ({found.times_interval.told('{:.2f}'.format)})"
    times = f"{found.times or 0:.2f} times{span}"
    size = (
        f"worth a dense model of {found.dense_params:,.0f} parameters on the same tokens, {times} its {run.active:,} "
        "active ones"
        if found.dense_params is not None
        else "below what the dense law gives a model of any size on the same tokens"
    )
    compute = (
        "" if found.times_flops is None else f"; dense models would need {found.times_flops:.2f} times the compute"
    )
    gain = rung.gain(run.experts)
    return (
        f"At {rung.flops:.3g} FLOPs the best model with {run.experts} experts ({run.name}) ends at {run.loss:.4f}, "
        f"{abs(gain):.4f} {'below' if gain > 0 else 'above'} the best dense one ({dense.name}, {dense.loss:.4f}). "
        f"It is {size}{compute}."
    )


def compare(runs: Iterable[Run]) -> Comparison:
    """Reads every finished expert run on the law of the finished dense ones.

    Sizes are total parameters for dense models, and active ones for expert models. Raises UserError where the
    dense runs are too few for a law, there is no expert run, or the largest budget has no run of one of the two.
    """
    good = [run for run in runs if run.problem is None]
    dense, experts = ([run for run in good if bool(run.experts) == kind] for kind in (False, True))
    if not experts:
        raise UserError(f"None of the {len(good)} finished runs has experts: there is nothing to compare.")
    fit, cost = fit_law(Points.of(dense)), cost_model(dense)
    rungs = tuple(_rung(group) for group in by_budget(good))
    last = rungs[-1].best
    if 0 not in last or len(last) < 2:
        raise UserError(f"At {rungs[-1].flops:.3g} FLOPs only {_named(last)} have finished: run the others too.")
    drawn = bootstrap(fit, resamples=RESAMPLES)
    found = tuple(worth(run, law=fit.law, flops_per_token=cost, drawn=drawn) for run in experts)
    return Comparison(fit, tuple(dense), cost, found, rungs)


def _rung(group: Sequence[Run]) -> Rung:
    kinds = sorted({run.experts or 0 for run in group})
    best = {kind: min((r for r in group if (r.experts or 0) == kind), key=lambda r: r.loss) for kind in kinds}
    return Rung(sum(run.flops for run in group) / len(group), best)


def _named(kinds: Iterable[int]) -> str:
    return " and ".join(kind_name(kind) for kind in sorted(kinds))


def kind_name(experts: int) -> str:
    return f"{experts} experts" if experts else "dense"


def worth(run: Run, *, law: Chinchilla, flops_per_token: FlopsPerToken, drawn: Bootstrap | None = None) -> Worth:
    """One run's loss, read on a law of dense models, and on those of its resamples."""
    span = None
    if drawn is not None:
        times = _dense_sizes(drawn.laws, loss=run.loss, tokens=run.tokens) / run.active
        span = Interval(*np.percentile(times, [TAIL, 100 - TAIL], method="nearest").tolist())  # some may be infinite
    return Worth(
        times_interval=span,
        run=run,
        dense_loss=float(law.loss(params=run.active, tokens=run.tokens)),
        dense_params=dense_size(law, loss=run.loss, tokens=run.tokens),
        dense_flops=dense_compute(law, loss=run.loss, flops=run.flops, flops_per_token=flops_per_token),
    )


def dense_size(law: Chinchilla, *, loss: float, tokens: float) -> float | None:
    """Parameters with which the law gives ``loss`` on ``tokens``; None where no size does."""
    size = float(_dense_sizes(law, loss=loss, tokens=tokens))
    return None if math.isinf(size) else size


def _dense_sizes(laws: Chinchilla, *, loss: float, tokens: float) -> np.ndarray:
    """For laws of arrays; infinite where no size does."""
    left = np.asarray(loss - laws.E - laws.B * tokens**-laws.beta)
    return np.where(left > 0, (laws.A / np.where(left > 0, left, 1.0)) ** (1 / laws.alpha), np.inf)


def dense_compute(law: Chinchilla, *, loss: float, flops: float, flops_per_token: FlopsPerToken) -> float | None:
    """Compute at whose best size the law gives ``loss``, looked for within ``FARTHEST`` of ``flops``; None beyond."""

    def best(log_flops: float) -> float:
        return optimum(law, flops=math.exp(log_flops), flops_per_token=flops_per_token).loss

    low, high = (math.log(flops) + sign * math.log(FARTHEST) for sign in (-1, 1))
    try:
        if not best(high) <= loss <= best(low):
            return None
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if best(middle) <= loss else (middle, high)
    except UserError:  # a law without an optimum
        return None
    return math.exp(high)
