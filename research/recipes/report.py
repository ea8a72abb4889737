# SPDX-License-Identifier: Apache-2.0
"""The report of a study of post-training: what each run solves, how it came there, and what it says.

Writes solved.json (the record), training.png and .svg, and report.html with the table, the pictures and sample
responses with their rewards.
"""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.core.files import read_json, write_atomically
from research.rl import record as samples
from research.scaling import canvas, page
from research.scaling.table import Table, write_csv
from research.train import metrics
from research.train.checkpoint import RESULT

COLOURS = (canvas.BLUE, canvas.VERMILION, canvas.GREEN, canvas.ORANGE, canvas.SKY, canvas.BLACK)
LINES = ("-", "--", ":")
PANELS = (
    ("{name}/greedy", "held-out problems solved greedily", 1.0),
    ("reward", "mean reward of a rollout", None),
    ("response/length", "tokens of responses", None),
    ("response/length_wrong", "tokens of wrong responses", None),
    ("entropy", "entropy of a token (nats)", None),
)
SHOWN = 4  # responses of a run on the page


def write_report(
    runs: Table,
    out: Path,
    *,
    title: str,
    kinds: Mapping[str, Sequence[str]],
    sentences: Sequence[str] = (),
    name: str = "solve",
) -> dict[str, dict[str, Any]]:
    """Of the runs in ``out``, a folder for each. kinds: runs by what they are called in the pictures, seeds of one kind
    together. name: of the eval whose held-out shares count. Returns what each finished run solves."""
    found = {run: _outcome(out / run, name) for run in (one.name for one in runs.runs) if (out / run / RESULT).exists()}
    lines = {run: metrics.read(out / run) for run in found}
    unfinished = {one.name: one.status for one in runs.runs if one.name not in found}
    draws = [_shares(kinds, found)]
    draws += [_panel(kinds, lines, key.format(name=name), label, top) for key, label, top in PANELS]
    picture = canvas.panels(draws, name="training", columns=3, width=16, height=8, title=title)
    record = {"title": title, "notes": [], "sentences": list(sentences), "runs": found, "excluded": unfinished}
    write_csv(runs, out / "table.csv")
    for kind, data in picture.items():
        write_atomically(out / f"training.{kind}", data)
    write_atomically(out / "solved.json", json.dumps(page.finite(record), indent=2, allow_nan=False) + "\n")
    parts = [_solved(found), *(_said(run, samples.read(out / run)) for run in found)]
    write_atomically(out / "report.html", page.words_html(record, picture["svg"].decode(), *parts))
    return found


def _outcome(directory: Path, name: str) -> dict[str, Any]:
    result = read_json(directory / RESULT) or {}
    last = result.get("metrics", {})
    solved = {key.partition("/")[2]: value for key, value in last.items() if key.startswith(f"{name}/")}
    return {**solved, "params": result.get("params"), "seconds": result.get("seconds")}


def _shares(kinds: Mapping[str, Sequence[str]], found: Mapping[str, Any]) -> Callable[[Any], None]:
    """What each kind solves in the end, a mark for each seed; the first stands at the top."""

    def draw(axes: Any) -> None:
        for measure, marker, colour in (("greedy", "o", canvas.BLUE), ("pass@1", "|", canvas.VERMILION)):
            points = [
                (found[run][measure], place)
                for place, runs in enumerate(kinds.values())
                for run in runs
                if measure in found.get(run, {})
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, ms=8, label=measure, clip_on=False)
        axes.set(title="held-out problems solved in the end", xlim=(0, 1), ylim=(len(kinds) - 0.5, -0.5))
        axes.set_yticks(range(len(kinds)), list(kinds))
        if axes.get_legend_handles_labels()[0]:
            axes.legend()

    return draw


def _panel(
    kinds: Mapping[str, Sequence[str]], lines: Mapping[str, Any], key: str, label: str, top: float | None
) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for number, (kind, runs) in enumerate(kinds.items()):
            colour, line = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
            shown = kind
            for run in runs:
                points = [(line["seconds"], line[key]) for line in _timed(lines.get(run, ())) if key in line]
                if points:
                    x, y = zip(*points, strict=True)
                    axes.plot(
                        [s / 60 for s in x],
                        y,
                        color=colour,
                        ls=line,
                        alpha=0.75,
                        label=shown,
                        marker="." * (len(x) < 30),
                    )
                    shown = None
        axes.set(xlabel="minutes", title=label, ylim=(0, None) if top is None else (0, top))
        if axes.get_legend_handles_labels()[0]:
            axes.legend()

    return draw


def _timed(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics, evaluations too, each with the seconds of the run until then."""
    seconds, found = 0.0, []
    for line in lines:
        seconds = line.get("seconds", seconds)
        found.append({**line, "seconds": seconds})
    return found


def _solved(found: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    rows = [(run, *(page.number(one.get(name)) for name in names)) for run, one in found.items()]
    return f'<h2>What each solves</h2><div class="scroll">{page.table_of(("run", *names), rows)}</div>'


def _said(run: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The last responses that were recorded of a run."""
    last = [one for one in records if one["step"] == records[-1]["step"]][:SHOWN]
    if not last:
        return ""
    rows = [(str(one["prompt"]), str(one["response"]), page.number(one["reward"])) for one in last]
    table = page.table_of(("prompt", "response", "reward"), rows)
    return f'<h2>{html.escape(run)}, step {last[0]["step"]}</h2><div class="words">{table}</div>'
