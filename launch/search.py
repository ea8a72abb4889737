# SPDX-License-Identifier: Apache-2.0
"""The fastest mesh, recomputation and microbatches of a training step that fit a chip's memory, with few compilations.

Every candidate has an estimate by arithmetic (``research.train.estimate``). The most promising is compiled; where it is
too large, so is the next smaller microbatch, for memory is affine in its rows: a part for state and weights, and so
much for each row. The line says which is the largest microbatch that fits, and that one is compiled too. What was
compiled scales the estimates of the rest. The search ends when none of them promises to be faster than what was found
to fit, or after ``limit`` compilations.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from launch.compiler import Compiled, Failed, TooLarge
from research.core.chips import Slice
from research.core.config import override
from research.core.roofline import Roofline
from research.core.sharding import MeshSpec, meshes
from research.core.types import UserError
from research.models.stack import POLICIES
from research.train.estimate import Estimate, estimate
from research.train.experiment import Experiment

LIMIT = 8  # compilations of one search
OVERLAP = 0.05  # of what a perfect overlap would hide; it orders what the longest part alone does not tell apart
LONG = 16_384  # tokens of a sequence from which splitting it over chips is tried
REMATS = ("none", "save_matmuls", "save_weight_matmuls", "full")  # from what keeps most
assert {"none", *POLICIES} == set(REMATS)

Measure = Callable[[Sequence[str]], Compiled]


@dataclass(frozen=True)
class Candidate:
    """One way to run the step. rows: of a microbatch on one chip."""

    mesh: MeshSpec
    remat: str
    accumulate: int
    rows: int
    guess: Estimate

    @property
    def change(self) -> tuple[str, ...]:
        return changes(self.mesh, self.remat, self.accumulate)


@dataclass(frozen=True)
class Choice:
    """change: assignments as --set has them; problem: where nothing fits, that. told: the choice in words."""

    change: tuple[str, ...] = ()
    problem: str = ""
    told: str = ""


@dataclass
class Search:
    """measure: compiles the experiment after a change, or raises Failed; None where there is no compiler: then the
    estimates decide."""

    experiment: Experiment
    where: Slice
    slices: int
    measure: Measure | None
    limit: int = LIMIT
    _compiled: dict[Candidate, Compiled] = field(default_factory=dict)
    _failed: set[Candidate] = field(default_factory=set)
    _large: dict[Candidate, float] = field(default_factory=dict)

    def fastest(self) -> Choice:
        """Over all meshes."""
        best = self._best(list(self._candidates(self._meshes(), REMATS)))
        return Choice(problem=self._nothing()) if best is None else Choice(best.change, told=self._words(best))

    def fitting(self) -> Choice:
        """The fastest that fits of those that keep the experiment's mesh and recompute and split no less than it; of
        all, where there is none."""
        experiment = self.experiment
        more = REMATS[REMATS.index(experiment.model.remat) :]
        for specs, remats in (([experiment.mesh], more), (self._meshes(), REMATS)):
            candidates = [c for c in self._candidates(specs, remats) if c.accumulate >= experiment.accumulate]
            if (best := self._best(candidates)) is not None:
                return Choice(best.change, told=f"with {self._words(best)}")
        return Choice(problem=self._nothing())

    # --- candidates ------------------------------------------------------------------------------

    def _meshes(self) -> list[MeshSpec]:
        """Those worth a look: tensor within what kv heads allow, context for long sequences, experts where there are
        some, stages as the experiment has them."""
        model = self.experiment.model
        widest = {
            "tensor": min(16, *(attention.kv_heads for attention in model.attentions)),
            "context": 64 if self.experiment.source.sequence_length >= LONG else 1,
            "expert": max((moe.num_experts for moe in model.moes().values()), default=1),
        }
        return [
            MeshSpec(**sizes)
            for sizes in meshes(self.where.chips * self.slices)
            if sizes["data"] % self.slices == 0
            and sizes["stage"] == self.experiment.mesh.stage
            and all(sizes[axis] <= most for axis, most in widest.items())
        ]

    def _candidates(self, specs: Iterable[MeshSpec], remats: Sequence[str]) -> Iterator[Candidate]:
        batch = self.experiment.source.batch_size
        for spec, accumulate in itertools.product(specs, range(1, batch + 1)):
            size = spec.shape(self.where.chips * self.slices)
            share = accumulate * size["data"] * size["fsdp"] * size["expert"]
            if batch % share:
                continue
            for remat in remats:
                try:
                    changed = override(self.experiment, *changes(spec, remat, accumulate))
                    guess = estimate(changed, self.where, self.slices)
                except UserError:  # the mesh does not divide the model
                    break
                yield Candidate(spec, remat, accumulate, batch // share, guess)

    # --- the search ------------------------------------------------------------------------------

    def _best(self, candidates: list[Candidate]) -> Candidate | None:
        while promising := [c for c in candidates if c not in self._failed and self._peak(c) <= self._hbm]:
            first = min(promising, key=lambda c: (self._seconds(c), c.accumulate))
            if self.measure is None or first in self._compiled:
                return first
            if len(self._compiled) + len(self._failed) >= self.limit:
                return min((c for c in promising if c in self._compiled), key=self._seconds, default=None)
            self._compile(first)
            smaller = [c for c in candidates if (c.mesh, c.remat) == (first.mesh, first.remat) and c.rows < first.rows]
            large = first in self._large or (first not in self._failed and self._peak(first) > self._hbm)
            if large and smaller and self._line(first) is None:
                self._compile(max(smaller, key=lambda c: c.rows))
        return None

    def _compile(self, candidate: Candidate) -> None:
        assert self.measure is not None
        if candidate not in self._compiled and candidate not in self._failed:
            try:
                self._compiled[candidate] = self.measure(candidate.change)
            except TooLarge as large:  # it tells of memory, if not of time
                self._large[candidate] = large.peak
                self._failed.add(candidate)
            except Failed:
                self._failed.add(candidate)

    @property
    def _hbm(self) -> float:
        return self.where.chip.hbm_bytes

    def _peak(self, candidate: Candidate) -> float:
        """As compiled; else on the line through what was compiled with its mesh and recomputation; else the estimate,
        scaled as those of what was compiled turned out."""
        if candidate in self._peaks:
            return self._peaks[candidate]
        if (line := self._line(candidate)) is not None:
            return line[0] + line[1] * candidate.rows
        ratios = sorted(peak / c.guess.peak for c, peak in self._peaks.items())
        return candidate.guess.peak * (ratios[len(ratios) // 2] if ratios else 1.0)

    @property
    def _peaks(self) -> dict[Candidate, float]:
        """Of all whose memory the compiler has told."""
        return {**self._large, **{candidate: found.peak for candidate, found in self._compiled.items()}}

    def _line(self, like: Candidate) -> tuple[float, float] | None:
        """a and b of peak = a + b rows, through those compiled of a mesh and recomputation whose rows differ most."""
        shape = like.mesh, like.remat
        points = sorted((c.rows, peak) for c, peak in self._peaks.items() if (c.mesh, c.remat) == shape)
        if not points or points[0][0] == points[-1][0]:
            return None
        slope = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
        return points[0][1] - slope * points[0][0], slope

    def _seconds(self, candidate: Candidate) -> float:
        """Of a step: compiled, or the estimate scaled."""
        if (found := self._compiled.get(candidate)) is not None:
            return _seconds(Roofline(*found.roofline.values()))
        ratios = sorted(
            _seconds(Roofline(*done.roofline.values())) / _seconds(c.guess.roofline)
            for c, done in self._compiled.items()
        )
        return _seconds(candidate.guess.roofline) * (ratios[len(ratios) // 2] if ratios else 1.0)

    # --- words -----------------------------------------------------------------------------------

    def _words(self, candidate: Candidate) -> str:
        new = [one for one in candidate.change if override(self.experiment, one) != self.experiment]
        how = "compiled" if candidate in self._compiled else "by estimate"
        words = " ".join(f"--set {one}" for one in new) or "what it has"
        return f"{words} it takes {self._peak(candidate) / 1e9:.2f} GB ({how})"

    def _nothing(self) -> str:
        tried = f" ({len(self._compiled) + len(self._failed)} compiled)" if self._compiled or self._failed else ""
        return (
            f"no mesh, recomputation or microbatch that was tried{tried} makes it fit {self.where.name}: take a larger "
            "slice, a chip with more memory, or a smaller model"
        )


def changes(mesh: MeshSpec, remat: str, accumulate: int) -> tuple[str, ...]:
    """As assignments."""
    axes = (f"mesh.{name}={size}" for name, size in vars(mesh).items())
    return (*axes, f"model.remat={remat}", f"accumulate={accumulate}")


def _seconds(roofline: Roofline) -> float:
    return roofline.seconds + OVERLAP * (roofline.one_by_one - roofline.seconds)
