# SPDX-License-Identifier: Apache-2.0
"""The report of a study of experts: table.csv, effective.json, report.html and one picture."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from research.core.files import write_atomically
from research.scaling import canvas, effective_plots, page
from research.scaling.effective import Comparison, Worth, compare
from research.scaling.table import Table, write_csv

MEANING = {
    "law": "Dense loss: what the dense runs' law gives a dense model of the active parameters on the same tokens.",
    "dense_params": (
        "Effective dense size (Clark et al. 2022): parameters of the dense model that would have the run's loss on "
        "the run's tokens, by that law, and how many times the run's active parameters that is."
    ),
    "dense_flops": "Dense FLOPs: the compute at whose best size that law gives the run's loss, over the run's own.",
    "flops": "Budgets are training FLOPs of what a token goes through, the router included (research/scaling/cost.py).",
}


def write_effective(table: Table, out: Path, *, title: str, notes: Sequence[str] = ()) -> Comparison:
    """Compares a study's expert runs with its dense ones and writes what was found into ``out``.

    Raises UserError where there is too little to compare (``effective.compare``); table.csv is written first.
    """
    out = Path(out)
    write_csv(table, out / "table.csv")
    found = compare(table)
    draws = [
        lambda a: effective_plots.loss_by_kind(a, found=found),
        lambda a: effective_plots.effective_size(a, found=found),
    ]
    picture = canvas.panels(draws, name="moe_scaling", columns=2, width=13, height=4.8, title=title)
    record = page.finite(
        {
            "title": title,
            "notes": list(notes),
            "sentences": list(found.sentences),
            "experts_win": found.experts_win,
            "meaning": MEANING,
            "law": dataclasses.asdict(found.fit.law),
            "convergence": dataclasses.asdict(found.fit.convergence),
            "not_identified": list(found.fit.not_identified),
            "rms_residual": found.fit.rms_residual,
            "worth": [_plain(worth) for worth in found.worth],
            "dense": [dataclasses.asdict(run) for run in found.dense],
            "excluded": table.excluded(),
        }
    )
    for kind, data in picture.items():
        write_atomically(out / f"moe_scaling.{kind}", data)
    write_atomically(out / "effective.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    write_atomically(out / "report.html", page.effective_html(record, picture["svg"].decode()))
    return found


def _plain(worth: Worth) -> dict:
    numbers = {name: getattr(worth, name) for name in ("dense_loss", "dense_params", "times", "dense_flops")}
    span = worth.times_interval and dataclasses.asdict(worth.times_interval)
    return dataclasses.asdict(worth.run) | numbers | {"times_flops": worth.times_flops, "times_interval_95": span}
