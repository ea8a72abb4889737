# SPDX-License-Identifier: Apache-2.0
"""From Kaplan et al. 2020's exponent to Hoffmann et al. 2022's in steps, on one study's runs (Porian et al. 2024).

Runs at a constant rate are read along their validation curves, at any compute; runs whose rate decays are read at their
ends. Each step finds the best size at several budgets by IsoFLOP parabolas and the power law through the minima.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research.core.files import write_atomically
from research.core.types import UserError
from research.scaling import canvas, page
from research.scaling.canvas import MARKERS, point
from research.scaling.corrections import Correction
from research.scaling.intervals import Interval
from research.scaling.isoflop import IsoFlop, fit_isoflop, resample
from research.scaling.laws import HOFFMANN_PARAMS
from research.scaling.table import ParameterCount, Run, Table, write_csv
from research.train import metrics

BUDGETS = 5  # at which curves are read
FEWEST_SIZES = 5  # whose curves reach a budget, and bracket it
INSIDE = 0.97  # of the way through the curves, the ends left out
PORIAN = (0.835, 0.706, 0.602, 0.571, 0.497)  # their exponents after each step
Curve = Sequence[tuple[float, float]]  # (tokens, validation loss)


@dataclass(frozen=True)
class Step:
    """What is changed from the step before. kind: the runs that are read, by the beginning of their names. published:
    the exponent of Porian et al. 2024 after it."""

    name: str
    kind: str
    count: ParameterCount
    published: float


STEPS = (
    Step("Kaplan's way: no head, long warm-up, constant rate", "long", "non_embedding", PORIAN[0]),
    Step("the head's FLOPs and parameters counted", "long", "with_head", PORIAN[1]),
    Step("a short warm-up", "short", "with_head", PORIAN[2]),
    Step("a rate that decays by the end of each run", "decayed", "with_head", PORIAN[3]),
    Step("learning rate and batch tuned", "tuned", "with_head", PORIAN[4]),
)


@dataclass(frozen=True)
class Found:
    """A step's IsoFLOP minima. exponent: of the best params in compute, with its interval; None where fewer than two
    budgets are bracketed."""

    step: Step
    isoflop: IsoFlop
    exponent: float | None
    interval: Interval | None

    @property
    def sentence(self) -> str:
        bracketed = f"{len(self.isoflop.bracketed)} of {len(self.isoflop.curves)} budgets bracketed"
        if self.exponent is None:
            return f"{self.step.name}: no exponent ({bracketed})."
        span = "" if self.interval is None else f" ({self.interval.told('{:.3f}'.format)})"
        return (
            f"{self.step.name}: params ~ compute^{self.exponent:.3f}{span}, {bracketed}; Porian et al. found "
            f"{self.step.published}."
        )


@dataclass(frozen=True)
class Disagreement:
    """found: the steps, in order. sentences: what they say, and by how much the exponent fell in all."""

    found: tuple[Found, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        lines = [one.sentence for one in self.found]
        known = [one for one in self.found if one.exponent is not None]
        if len(known) > 1:
            lines.append(
                f"From the first step to the last the exponent goes from {known[0].exponent:.3f} to "
                f"{known[-1].exponent:.3f}; in "
                f"Porian et al. from {PORIAN[0]} to {PORIAN[-1]}, and Hoffmann et al. found "
                f"{HOFFMANN_PARAMS[1]} by this method."
            )
        return tuple(lines)


def validation_curves(table: Table, out: Path) -> dict[str, Curve]:
    """Each run's validation loss by tokens seen, read from its folder below the study's."""
    found = {}
    for run in table:
        lines = metrics.read(Path(out) / run.name)
        points = [
            (line["step"] * run.batch_tokens, line["validation/loss"]) for line in lines if "validation/loss" in line
        ]
        if points:
            found[run.name] = points
    return found


def compare_steps(runs: Sequence[Run], curves: Mapping[str, Curve], *, steps: Sequence[Step] = STEPS) -> Disagreement:
    """Every step's exponent. Raises UserError where a step has fewer than three runs."""
    return Disagreement(tuple(_step(step, runs, curves) for step in steps))


def _step(step: Step, runs: Sequence[Run], curves: Mapping[str, Curve]) -> Found:
    mine = [run for run in runs if run.name.startswith(f"{step.kind}-") and run.problem is None]
    if len(mine) < 3:
        raise UserError(f"The step {step.name!r} needs 3 finished runs named {step.kind}-...; there are {len(mine)}.")
    counted, _ = Correction(step.count, "six_per_param")(mine)
    if step.kind in ("long", "short"):
        counted = slices(counted, curves)
        isoflop = fit_isoflop(counted)
    else:  # their budgets are exact FLOPs; counted otherwise they are no longer equal, but their groups are
        isoflop = _regrouped(mine, counted)
    if isoflop.params_law is None:
        return Found(step, isoflop, None, None)
    minima = resample(isoflop)
    interval = None if minima is None else minima.exponents.get("params")
    return Found(step, isoflop, float(isoflop.params_law.exponent), interval)


def slices(runs: Sequence[Run], curves: Mapping[str, Curve]) -> list[Run]:
    """Runs that ended at each of several budgets, made of the curves of longer ones; FLOPs are 6 per param and
    token."""
    lines = {run.name: np.array(curves[run.name]) for run in runs if len(curves.get(run.name, ())) > 2}
    kept = [run for run in runs if run.name in lines]
    if len(kept) < FEWEST_SIZES:
        raise UserError(f"Curves of {FEWEST_SIZES} runs are needed to read budgets off them; there are {len(kept)}.")
    starts = sorted(6 * run.params * lines[run.name][0, 0] for run in kept)
    ends = sorted((6 * run.params * lines[run.name][-1, 0] for run in kept), reverse=True)
    low, high = starts[FEWEST_SIZES - 1], ends[FEWEST_SIZES - 1] * INSIDE
    made = []
    for budget in np.geomspace(low, high, BUDGETS):
        for run in kept:
            line, tokens = lines[run.name], budget / (6 * run.params)
            if line[0, 0] <= tokens <= line[-1, 0]:
                loss = float(np.interp(math.log(tokens), np.log(line[:, 0]), line[:, 1]))
                name = f"{run.name} at {budget:.3g}"
                made.append(dataclasses.replace(run, name=name, tokens=round(tokens), flops=float(budget), loss=loss))
    return made


def _regrouped(runs: Sequence[Run], counted: Sequence[Run]) -> IsoFlop:
    """IsoFLOP minima of recounted runs: the sizes of each budget as the exact FLOPs group them, its compute that of the
    best size by the new count."""
    exact = fit_isoflop(runs)
    by_name = {run.name: run for run in counted}
    curves = []
    for curve in exact.curves:
        group = [by_name[name] for name in curve.names]
        found = fit_isoflop([dataclasses.replace(run, flops=curve.flops) for run in group]).curves[0]
        flops = 6 * found.params * found.tokens if found.bracketed else curve.flops
        curves.append(dataclasses.replace(found, flops=flops))
    return IsoFlop.of(curves)


def write_disagreement(table: Table, out: Path, *, title: str, notes: Sequence[str] = ()) -> Disagreement:
    """Compares the steps and writes table.csv, disagreement.json, report.html and a picture into ``out``."""
    out = Path(out)
    write_csv(table, out / "table.csv")
    found = compare_steps(list(table.finished()), validation_curves(table, out))
    draws = [lambda a: exponents(a, found), *(lambda a, f=one: isoflops(a, f) for one in found.found)]
    pictures = canvas.panels(draws, name="disagreement", columns=2, width=13, height=4.2 * 3, title=title)
    record = page.finite(
        {
            "title": title,
            "notes": list(notes),
            "sentences": list(found.sentences),
            "steps": [_plain(one) for one in found.found],
            "excluded": table.excluded(),
        }
    )
    for kind, data in pictures.items():
        write_atomically(out / f"disagreement.{kind}", data)
    write_atomically(out / "disagreement.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_atomically(out / "report.html", page.words_html(record, pictures["svg"].decode()))
    return found


def _plain(found: Found) -> dict[str, Any]:
    minima = [(curve.flops, curve.params, curve.loss) for curve in found.isoflop.bracketed]
    problems = {f"{curve.flops:.3g}": curve.problem for curve in found.isoflop.curves if not curve.bracketed}
    interval = found.interval and dataclasses.asdict(found.interval)
    step = dataclasses.asdict(found.step)
    return step | {"exponent": found.exponent, "interval_95": interval, "minima": minima, "problems": problems}


def exponents(axes: Any, found: Disagreement) -> None:
    """The exponent after each step, and Porian et al.'s."""
    for index, one in enumerate(found.found):
        if one.exponent is None:
            continue
        if one.interval is not None:
            axes.plot([index, index], [one.interval.low, one.interval.high], "-", color=canvas.BLACK, linewidth=1.2)
        point(axes, index, one.exponent, "o", says=one.sentence, color=canvas.BLACK, markersize=7)
    axes.plot([], [], "o", color=canvas.BLACK, label="these runs, 95%")
    x = range(len(found.found))
    axes.plot(x, [one.step.published for one in found.found], "D:", color=canvas.VERMILION, label="Porian et al. 2024")
    labels = ["Kaplan's\nway", "+ head", "+ short\nwarm-up", "+ decay", "+ tuned"]
    axes.set_xticks(list(x), labels[: len(found.found)])
    axes.set(ylabel="exponent of best params in compute", ylim=(0, 1.2))
    axes.set_title("From Kaplan's exponent to Chinchilla's")
    axes.legend(loc="upper right")


def isoflops(axes: Any, found: Found) -> None:
    """A step's losses, parabolas and minima."""
    curves = found.isoflop.curves
    for index, (curve, colour) in enumerate(zip(curves, canvas.ordered(len(curves)), strict=True)):
        style = {"color": colour, "markersize": 4.5, "markerfacecolor": colour if curve.bracketed else "white"}
        for name, size, loss in zip(curve.names, curve.sizes, curve.losses, strict=True):
            told = f"{name}\n{size:,.0f} parameters, loss {loss:.4f}"
            point(axes, size, loss, MARKERS[index % len(MARKERS)], says=told, **style)
        if curve.coefficients is not None:
            x = np.geomspace(curve.sizes[0], curve.sizes[-1], 60)
            axes.plot(x, curve(x), "-" if curve.bracketed else ":", color=colour, linewidth=1.1)
        if curve.bracketed:
            axes.plot([curve.params], [curve.loss], "*", color=canvas.VERMILION, markerfacecolor="none", markersize=12)
    axes.set_xscale("log")
    canvas.log_loss(axes, [loss for curve in curves for loss in curve.losses])
    canvas.plain_counts(axes.xaxis)
    axes.set(xlabel=f"parameters ({found.step.count.replace('_', ' ')})", ylabel="validation loss")
    axes.set_title(found.step.name[0].upper() + found.step.name[1:])
