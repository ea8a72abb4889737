# SPDX-License-Identifier: Apache-2.0
"""The pictures of a study of experts: loss against compute by kind, and effective dense sizes."""

from typing import Any

from research.scaling import canvas
from research.scaling.effective import Comparison, kind_name


def loss_by_kind(axes: Any, *, found: Comparison) -> None:
    """Every run's loss against its compute, dense and expert models apart; lines join each kind's best."""
    for kind, colour, marker in _kinds(found):
        runs = found.dense if not kind else [w.run for w in found.worth if w.run.experts == kind]
        axes.plot([r.flops for r in runs], [r.loss for r in runs], marker, color=colour, markersize=4.5, alpha=0.45)
        best = [rung.best[kind] for rung in found.rungs if kind in rung.best]
        x, y = [run.flops for run in best], [run.loss for run in best]
        axes.plot(x, y, marker + "-", color=colour, linewidth=1.5, markersize=6.5, label=kind_name(kind))
    axes.set_xscale("log")
    canvas.log_loss(axes, [run.loss for run in found.dense] + [w.run.loss for w in found.worth])
    axes.set(xlabel="training compute (FLOPs)", ylabel="validation loss (nats per token)")
    axes.set_title("Loss against compute (lines: the best of each kind)")
    axes.legend(loc="upper right")


def effective_size(axes: Any, *, found: Comparison) -> None:
    """Each expert run's effective dense size against its active parameters; dense models lie on the diagonal."""
    shown = [w for w in found.worth if w.dense_params is not None]
    for kind, colour, marker in _kinds(found):
        mine = [w for w in shown if w.run.experts == kind]
        if mine:
            x, y = [w.run.active for w in mine], [w.dense_params for w in mine]
            axes.plot(x, y, marker, color=colour, markersize=6, label=kind_name(kind))
    ends = [min(w.run.active for w in found.worth) / 1.2, max(w.run.active for w in found.worth) * 1.2]
    for times in (1, 2, 4):
        line = "-" if times == 1 else ":"
        axes.plot(ends, [times * end for end in ends], line, color=canvas.BLACK, linewidth=0.9)
        axes.annotate(f"{times}x" if times > 1 else "dense", (ends[1], times * ends[1]), ha="right", va="bottom")
    axes.set(
        xscale="log", yscale="log", xlim=ends, xlabel="active parameters", ylabel="effective dense size (parameters)"
    )
    axes.set_title("What a dense model of equal loss on the same tokens would have")
    canvas.plain_counts(axes.xaxis, axes.yaxis)
    axes.legend(loc="upper left")


def _kinds(found: Comparison) -> list[tuple[int, str, str]]:
    """(experts, colour, marker) of each kind in a comparison."""
    kinds = sorted({0} | {w.run.experts for w in found.worth})
    colours = (canvas.BLACK, canvas.BLUE, canvas.VERMILION, canvas.GREEN, canvas.ORANGE, canvas.SKY)
    return [(kind, colours[i % len(colours)], canvas.MARKERS[i % len(canvas.MARKERS)]) for i, kind in enumerate(kinds)]
