# SPDX-License-Identifier: Apache-2.0
"""The report of a study of learning rates and batches: table.csv, tuning.json, report.html and one picture."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.core.files import write_atomically
from research.scaling import canvas, page
from research.scaling.canvas import BLACK, BLUE, GREY, VERMILION, point
from research.scaling.intervals import Interval
from research.scaling.laws import DEEPSEEK_BATCH_TOKENS, DEEPSEEK_LEARNING_RATE
from research.scaling.table import Table, write_csv
from research.scaling.tuning import Best, Tuning, tune

COLUMNS = 2
LITERATURE = {"learning_rate": DEEPSEEK_LEARNING_RATE, "batch_tokens": DEEPSEEK_BATCH_TOKENS}
WORDS = {"learning_rate": "peak learning rate", "batch_tokens": "tokens a step"}


def write_tuning(table: Table, out: Path, *, title: str, notes: Sequence[str] = ()) -> Tuning:
    """Fits the rules and writes what was found into ``out``; table.csv first. Raises UserError as ``tuning.tune``."""
    out = Path(out)
    write_csv(table, out / "table.csv")
    found = tune(table)
    draws = [lambda a, b=best: surface(a, b) for best in found.best]
    draws += [lambda a, n=name: rule(a, found, n) for name in LITERATURE]
    rows = -(-len(draws) // COLUMNS)
    pictures = canvas.panels(draws, name="tuning", columns=COLUMNS, width=13, height=4.2 * rows, title=title)
    record = page.finite(
        {
            "title": title,
            "notes": list(notes),
            "sentences": list(found.sentences),
            "best": [_plain(best) for best in found.best],
            "by_compute": {name: dataclasses.asdict(one) for name, one in found.by_compute.items()},
            "by_size": found.by_size and {name: dataclasses.asdict(one) for name, one in found.by_size.items()},
            "excluded": table.excluded(),
        }
    )
    for kind, data in pictures.items():
        write_atomically(out / f"tuning.{kind}", data)
    write_atomically(out / "tuning.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_atomically(out / "report.html", page.tuning_html(record, pictures["svg"].decode()))
    return found


def _plain(best: Best) -> dict[str, Any]:
    names = ("flops", "params", "tokens", "learning_rate", "batch_tokens", "loss", "rms_residual", "problem")
    return {name: getattr(best, name) for name in names} | {"runs": [run.name for run in best.runs]}


def surface(axes: Any, best: Best) -> None:
    """Loss against learning rate, a line for each batch, and the optimum of the surface."""
    batches = sorted({run.batch_tokens for run in best.runs})
    for index, (batch, colour) in enumerate(zip(batches, canvas.ordered(len(batches)), strict=True)):
        runs = sorted((run for run in best.runs if run.batch_tokens == batch), key=lambda run: run.learning_rate)
        marker = canvas.MARKERS[index % len(canvas.MARKERS)]
        x, y = [run.learning_rate for run in runs], [run.loss for run in runs]
        axes.plot(x, y, "-", color=colour, linewidth=1)
        for run in runs:
            told = f"{run.name}\nlearning rate {run.learning_rate:g}, {run.batch_tokens:,} tokens a step, "
            told += f"loss {run.loss:.4f}"
            point(axes, run.learning_rate, run.loss, marker, says=told, color=colour, markersize=5)
        axes.plot([], [], marker + "-", color=colour, label=f"{batch:,} tokens a step")
    if best.problem is None:
        told = (
            f"optimum: learning rate {best.learning_rate:.3g}, {best.batch_tokens:,.0f} tokens a step, {best.loss:.4f}"
        )
        style = {"color": VERMILION, "markerfacecolor": "none", "markeredgewidth": 1.6, "markersize": 13}
        point(axes, best.learning_rate, best.loss, "*", says=told, **style)
    axes.set_xscale("log")
    canvas.log_loss(axes, [run.loss for run in best.runs])
    axes.set(xlabel="peak learning rate", ylabel="validation loss (nats per token)")
    axes.set_title(
        f"{canvas.power(best.flops)} FLOPs, {best.params:,} parameters" + ("" if best.problem is None else ": open")
    )
    axes.legend(loc="best")


def rule(axes: Any, found: Tuning, name: str) -> None:
    """The optima against compute, the rule through them, and DeepSeek's."""
    for best in found.found:
        told = f"{best.params:,} parameters, {best.tokens:,.0f} tokens: {getattr(best, name):.4g}"
        index = ("learning_rate", "batch_tokens").index(name)
        span = Interval.of(np.exp(best.draws[:, index]))
        if span.closed:
            axes.plot([best.flops] * 2, [span.low, span.high], "-", color=GREY, linewidth=1)
        point(axes, best.flops, getattr(best, name), "o", says=told, color=BLACK, markersize=6)
    grid = np.geomspace(min(b.flops for b in found.best) / 1.5, max(b.flops for b in found.best) * 15, 30)
    line = found.by_compute[name]
    label = f"compute$^{{{line.exponents['flops']:.2f}}}$"
    axes.plot(grid, [line(flops=x) for x in grid], "-", color=BLUE, linewidth=1.5, label=label)
    axes.plot(grid, LITERATURE[name](grid), ":", color=GREY, linewidth=1.2, label="DeepSeek LLM, carried here")
    axes.set(xscale="log", yscale="log", xlabel="training compute (FLOPs)", ylabel=f"best {WORDS[name]}")
    axes.set_title(f"The rule for the {WORDS[name]}")
    axes.legend(loc="best")
