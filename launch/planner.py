# SPDX-License-Identifier: Apache-2.0
"""Makes the rows of a plan: programs of each run, their memory and time, what would make a run fit, what is fastest."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from launch.compiler import Compiled, Failed, TooLarge
from launch.plan import NO_COMPILER, Programs, Request, Row, has_compiler, size
from launch.search import Choice, Search
from launch.study import Study
from research.core.config import override
from research.core.roofline import Roofline
from research.core.sharding import described
from research.core.types import UserError
from research.rl.rollout import Rollouts
from research.scaling import cost
from research.train.ahead import program_record
from research.train.estimate import Estimate, estimate
from research.train.experiment import Experiment

SMALL = 1e-3  # seconds: below, what starting a program takes outweighs what it does


class Planner:
    def __init__(self, request: Request, study: Study, programs: Programs, say: Callable[[str], None]) -> None:
        self.request, self.study, self.programs, self.say = request, study, programs, say
        self.notes: list[str] = []
        self.compiles = has_compiler() and not request.estimate
        self._choices: dict[str, Choice] = {}

    def rows(self) -> list[Row]:
        if not has_compiler() and not self.request.estimate:
            self._note(NO_COMPILER)
        rows = [self._row(experiment) for experiment in self.study.experiments.values()]
        if self.request.generate and not self.compiles:
            self._note("Generation is left out: there is no estimate of it without compiled programs.")
        if self.request.search and not self.compiles:
            self._note(
                "Without compiled programs the search goes by estimates: verify its choice before relying on it."
            )
        if any(row.parts and row.step_seconds < SMALL for row in rows):
            self._note(
                "Steps below a millisecond are bound by what starting a program and feeding it take, which no roofline "
                "counts: they will be slower than said."
            )
        return rows

    def _row(self, experiment: Experiment) -> Row:
        change, problem = self.request.mesh, ""
        changed = override(experiment, *change)
        try:
            experiment.check()
            if isinstance(source := changed.source, Rollouts) and not self.request.generate:
                slots = source.slots or source.prompts * source.samples
                self._note(
                    "Time and memory of runs that learn from rollouts leave out their sampling: "
                    f"--generate {slots}x{source.sequence_length} gives both."
                )
            if self.request.search:
                choice = self._chosen(experiment, change)
                change, problem = choice.change, choice.problem
            changed = override(experiment, *change)
            guess = estimate(changed, self.request.where, self.request.slices)
            row = self._estimated(changed, guess)
            if self.compiles:
                row = self._compiled(experiment, changed, change, row)
                row = replace(row, generation=self._generation(experiment, change))
        except UserError as error:
            return self._empty(changed, str(error))
        except Failed as failure:
            return self._empty(changed, f"The compiler gives no program: {failure}.")
        hbm = self.request.where.chip.hbm_bytes
        if not problem and row.memory["peak"] > hbm:
            problem = self._too_large(experiment, change, row.memory["peak"], hbm)
        new = tuple(one for one in change if override(experiment, one) != experiment) if self.request.search else ()
        return replace(row, change=new, problem=problem)

    # --- one row ---------------------------------------------------------------------------------

    def _compiled(self, experiment: Experiment, changed: Experiment, change: Sequence[str], guess: Row) -> Row:
        try:
            program = self.programs.get(experiment, change)
        except TooLarge as large:  # there is no program: the rest of the row is by arithmetic
            return replace(guess, memory={"peak": large.peak})
        peak, seconds = float(program.peak), 0.0
        for index, evaluation in enumerate(changed.evals):
            times, source = evaluations(changed, evaluation), getattr(evaluation, "source", None)
            if source is None or not hasattr(evaluation, "lower"):
                self._note(f"The evaluation {evaluation.name} has no one program: its time and memory are left out.")
                continue
            found = self.programs.get(experiment, change, evaluation=index)
            # beside the evaluation's own the whole training state stays where it is, not the parameters alone
            peak = max(peak, found.peak - found.arguments + program.arguments)
            batches = getattr(source, "num_batches", 0)
            if not batches:
                self._note(
                    f"{evaluation.name} takes all of its split, whose size is not known here: its time is left out."
                )
            seconds += times * batches * Roofline(*found.roofline.values()).seconds
        if program.unknown:
            self._note(f"{changed.name}: loops of unknown length ({len(program.unknown)}) are counted once.")
        memory = {name: float(getattr(program, name)) for name in ("arguments", "temporaries", "output", "aliased")}
        roofline = Roofline(*program.roofline.values())
        return self._made(
            changed, {**memory, "step": float(program.peak), "peak": peak}, roofline, seconds, compiled=True
        )

    def _generation(self, experiment: Experiment, change: Sequence[str]) -> dict[str, dict[str, float]]:
        made: dict[str, dict[str, float]] = {}
        for name in ("prefill", "decode") if self.request.generate else ():
            try:
                found = self.programs.get(experiment, change, generation=name)
                made[name] = {"peak": float(found.peak), "seconds": Roofline(*found.roofline.values()).seconds}
            except TooLarge as large:
                made[name] = {"peak": large.peak}
            except (UserError, Failed) as failure:
                self._note(f"{experiment.name}: there is no program of {name} ({failure}).")
        return made

    def _estimated(self, changed: Experiment, guess: Estimate) -> Row:
        seconds = 0.0
        for evaluation in changed.evals:
            source = getattr(evaluation, "source", None)
            if source is not None:
                tokens = source.batch_size * source.sequence_length * getattr(source, "num_batches", 0)
                forward = tokens * changed.flops_per_token / 3 / self.request.chips
                seconds += evaluations(changed, evaluation) * forward / self.request.where.chip.peak_flops
        memory = {"arguments": guess.state, "temporaries": guess.peak - guess.state, "peak": guess.peak}
        return self._made(changed, memory, guess.roofline, seconds, compiled=False)

    def _made(
        self, experiment: Experiment, memory: dict[str, float], step: Roofline, evaluation: float, *, compiled: bool
    ) -> Row:
        where, chips = self.request.where, self.request.chips
        hours = (experiment.steps * step.seconds + evaluation) / 3600
        rate = experiment.flops_per_token * experiment.tokens_per_step / step.seconds
        return replace(
            self._empty(experiment, ""),
            memory=memory,
            parts=step.parts,
            step_seconds=step.seconds,
            bound=step.bound,
            share_of_peak=rate / (chips * where.chip.peak_flops),
            evaluation_seconds=evaluation,
            hours=hours,
            chip_hours=hours * chips,
            compiled=compiled,
        )

    def _empty(self, experiment: Experiment, problem: str) -> Row:
        params = cost.params(experiment.model)
        try:
            mesh = described(experiment.mesh.shape(self.request.chips))
        except UserError:
            mesh = described({k: v for k, v in vars(experiment.mesh).items() if v > 1})
        extra = [f"remat={experiment.model.remat}"] if experiment.model.remat != "none" else []
        extra += [f"accumulate={experiment.accumulate}"] if experiment.accumulate > 1 else []
        return Row(
            name=experiment.name, params=params.total, active_params=params.active, tokens=experiment.tokens,
            flops=experiment.flops, steps=experiment.steps, mesh=", ".join([mesh, *extra]), memory={}, parts={},
            step_seconds=0.0, bound="", share_of_peak=0.0, evaluation_seconds=0.0, hours=0.0, chip_hours=0.0,
            compiled=False, problem=problem,
        )  # fmt: skip

    # --- what fits, what is fastest ----------------------------------------------------------------

    def _search(self, experiment: Experiment, start: tuple[str, ...]) -> Search:
        def measure(change: Sequence[str]) -> Compiled:
            return self.programs.get(experiment, (*start, *change))

        return Search(
            override(experiment, *start), self.request.where, self.request.slices, measure if self.compiles else None
        )

    def _chosen(self, experiment: Experiment, start: tuple[str, ...]) -> Choice:
        """The search's choice: one for all runs that differ in length, rate or seed alone."""
        key = repr(program_record(override(experiment, *start)))
        if key not in self._choices:
            self._choices[key] = self._search(experiment, start).fastest()
        return self._choices[key]

    def _too_large(self, experiment: Experiment, change: tuple[str, ...], peak: float, hbm: float) -> str:
        key = "fit" + repr(program_record(override(experiment, *change)))
        if key not in self._choices:
            self._choices[key] = self._search(experiment, change).fitting()
        over = f"It needs {size(peak)} of a chip's {size(hbm)}, {size(peak - hbm)} too much"
        return f"{over}: {self._choices[key].problem or self._choices[key].told}."

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def evaluations(experiment: Experiment, evaluation: Any) -> int:
    """How often it runs: at multiples of ``every`` and at the end."""
    return math.ceil(experiment.steps / evaluation.every) if evaluation.every else 1
