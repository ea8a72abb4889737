# SPDX-License-Identifier: Apache-2.0
"""What counting and choosing runs otherwise does to the exponents (Porian et al. 2024; Pearce and Song 2024).

Kaplan et al. 2020 left embeddings and the output head out of params and compute, Hoffmann et al. 2022 counted them;
short runs may end inside their warm-up; the largest budget alone may carry the slope. Each can be switched on here, on
the same runs, to see what it does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from research.core.types import UserError
from research.scaling.fit import Fit, Points, fit_law
from research.scaling.intervals import Interval, bootstrap
from research.scaling.isoflop import by_budget
from research.scaling.table import ParameterCount, Run

FlopCount = Literal["exact", "six_per_param"]


@dataclass(frozen=True)
class Correction:
    """How runs are counted and chosen. flops: as the table has them, or 6 per counted param and token. max_warmup: the
    largest share of a run that its warm-up may take. drop_largest: budgets left out at the top."""

    parameters: ParameterCount = "total"
    flops: FlopCount = "exact"
    max_warmup: float | None = None
    drop_largest: int = 0

    def __post_init__(self) -> None:
        if self.max_warmup is not None and not 0 <= self.max_warmup <= 1:
            raise UserError(f"The largest share of warm-up is between 0 and 1; given {self.max_warmup}.")
        if self.drop_largest < 0:
            raise UserError(f"The number of budgets to leave out must be at least 0; given {self.drop_largest}.")

    def __call__(self, runs: Iterable[Run]) -> tuple[list[Run], tuple[str, ...]]:
        """(runs with their params and FLOPs recounted, what was left out and why). Params of every convention are the
        chosen count afterwards. Raises UserError for what the table does not know."""
        kept, notes = [run for run in runs if run.problem is None], []
        if self.drop_largest:
            groups = by_budget(kept)
            if self.drop_largest >= len(groups):
                raise UserError(f"{self.drop_largest} of {len(groups)} budgets cannot be left out.")
            cut = groups[-self.drop_largest][0].flops
            notes.append(f"The runs of {cut:.3g} FLOPs and above are left out.")
            kept = [run for group in groups[: -self.drop_largest] for run in group]
        if self.max_warmup is not None:
            unknown = next((run for run in kept if run.warmup_tokens is None), None)
            if unknown is not None:
                raise UserError(f"The table does not say how long the warm-up of {unknown.name} was.")
            long = [run for run in kept if run.warmup_tokens > self.max_warmup * run.tokens]
            notes += [f"{r.name} is left out: {r.warmup_tokens / r.tokens:.0%} of it is warm-up." for r in long]
            kept = [run for run in kept if run not in long]
        return [self._recounted(run) for run in kept], tuple(notes)

    def _recounted(self, run: Run) -> Run:
        params = run.count(self.parameters)
        flops = run.flops if self.flops == "exact" else 6.0 * params * run.tokens
        return replace(run, params=params, non_embedding_params=params, head_params=0, flops=flops)


@dataclass(frozen=True)
class Variant:
    """One way of counting: the exponent of optimal params in compute by the parametric law, with its interval."""

    name: str
    correction: Correction
    num_runs: int
    fit: Fit
    params_in_compute: float
    interval: Interval | None


LADDER: tuple[tuple[str, Correction], ...] = (
    ("as Kaplan et al. count: no embeddings, no head", Correction("non_embedding", "six_per_param")),
    ("the head counted, in params and FLOPs", Correction("with_head", "six_per_param")),
    ("embeddings counted too", Correction("total", "six_per_param")),
    ("without runs of which warm-up takes over a fifth", Correction("total", "six_per_param", max_warmup=0.2)),
    ("without the largest budget", Correction("total", "six_per_param", drop_largest=1)),
)


def compare(
    runs: Sequence[Run],
    *,
    delta: float = 1e-3,
    resamples: int = 1000,
    ladder: Sequence[tuple[str, Correction]] = LADDER,
) -> tuple[tuple[Variant, ...], tuple[str, ...]]:
    """Every correction that the runs allow, and a sentence for each that they do not. A correction that changes no run
    is left out."""
    variants, notes, seen = [], [], []
    if all(run.params == run.non_embedding_params for run in runs):
        ladder = [(name, correction) for name, correction in ladder if correction.parameters == "total"]
        ladder[0] = ("6 FLOPs for each parameter as counted and token", ladder[0][1])
        notes.append("The runs have one count of parameters: what it does to leave embeddings out cannot be shown.")
    for name, correction in ladder:
        try:
            counted, _ = correction(runs)
            if counted in seen:
                continue
            fit = fit_law(Points.of(counted), delta=delta)
        except UserError as error:
            notes.append(f"{name[0].upper()}{name[1:]}: {error}")
            continue
        seen.append(counted)
        drawn = bootstrap(fit, resamples=resamples)
        interval = None if drawn is None else drawn.interval(drawn.laws.params_in_compute)
        variants.append(Variant(name, correction, len(counted), fit, float(fit.law.params_in_compute), interval))
    return tuple(variants), tuple(notes)
