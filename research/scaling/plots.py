# SPDX-License-Identifier: Apache-2.0
"""The pictures of a scaling study, as PNG bytes: loss against compute, IsoFLOP curves, the optimum, the law.

Compute budgets and model sizes are ordered, so they are told apart by one colour scale that stays readable to
colour-blind readers and in grey (viridis), and by markers; single series use the palette of Okabe and Ito
(2008). Figures are drawn without pyplot, so no display and no global state are touched.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from research.scaling.effective import Comparison, kind_name
from research.scaling.fit import Fit
from research.scaling.isoflop import IsoFlop, by_budget
from research.scaling.ladder import short_count
from research.scaling.allocation import FlopsPerToken, optimum
from research.scaling.recommend import HeldOut
from research.scaling.table import ParameterCount, Run

Curves = Mapping[str, Sequence[tuple[float, float]]]  # run's name -> [(training FLOPs, loss in nats per token), ...]
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
MINIMUM = {"color": VERMILION, "markerfacecolor": "none", "markeredgewidth": 1.6}  # hollow: it may lie upon a run
MOST_NAMED = 10  # budgets in a legend
MARKERS = "osD^vP*X<>"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
}
Draw = Callable[[Any], None]


def picture(draw: Draw, *, width: float = 7.2, height: float = 4.8) -> bytes:
    """One panel as a PNG; ``draw`` is handed the axes. Sizes in inches."""
    return panels([draw], columns=1, width=width, height=height)


def panels(draws: Sequence[Draw], *, columns: int, width: float, height: float, title: str = "") -> bytes:
    """Several panels in one PNG, row by row; width and height of the whole picture in inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        rows = math.ceil(len(draws) / columns)
        for index, draw in enumerate(draws):
            draw(figure.add_subplot(rows, columns, index + 1))
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def loss_against_compute(
    axes: Any,
    *,
    runs: Sequence[Run],
    curves: Curves | None = None,
    fit: Fit | None = None,
    flops_per_token: FlopsPerToken | None = None,
    reach: float = 1.0,
    parameters: ParameterCount = "total",
) -> None:
    """Every run's training curve (where given) and final loss, coloured by model size; the law's best loss
    at each budget as a dashed line, carried to ``reach`` times the largest budget."""
    import matplotlib
    from matplotlib.colors import LogNorm

    sizes = [run.count(parameters) for run in runs]
    low, high = min(sizes), max(sizes)
    norm = LogNorm(low / 1.05, high * (1.9 if high > low else 1.05))  # the last, yellow part is hard to see on white
    colours = matplotlib.colormaps["viridis"]
    for run in sorted(runs, key=lambda r: -r.count(parameters)):
        colour = colours(norm(run.count(parameters)))
        line = [(x, y) for x, y in (curves or {}).get(run.name, ()) if x > 0 and math.isfinite(y)]
        if line:
            axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.1, alpha=0.75)
        axes.plot([run.flops], [run.loss], "o", color=colour, markersize=5, markeredgecolor="white", zorder=3)
    frontier: list[float] = []
    if fit is not None and flops_per_token is not None:
        budgets = [run.flops for run in runs]
        grid = np.geomspace(min(budgets), max(budgets) * reach, 40)
        best = _frontier(fit, grid, flops_per_token)
        frontier = [b.loss for b in best]
        axes.plot(grid[: len(best)], frontier, "--", color=BLACK, linewidth=1.4, label="law at its best size")
        axes.legend(loc="upper right")
    axes.set_xscale("log")
    axes.set_xlim(min(run.flops for run in runs) / 8, max(run.flops for run in runs) * max(1.5, reach))
    _log_loss(axes, [run.loss for run in runs] + frontier)
    axes.set(xlabel="training compute (FLOPs)", ylabel="loss (nats per token)")
    axes.set_title("Loss against compute: held out at the end (dots)" + (", training (lines)" if curves else ""))
    bar = axes.figure.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=axes, pad=0.01, aspect=30)
    bar.ax.set_ylim(low, high if high > low else high * 1.01)
    ticks = sorted({float(f"{t:.1e}") for t in np.geomspace(low, high, 5)})
    bar.ax.minorticks_off()
    bar.set_ticks(ticks, labels=[short_count(t) for t in ticks])
    bar.outline.set_visible(False)
    bar.set_label("parameters" if parameters == "total" else "non-embedding parameters")


def isoflop_curves(axes: Any, *, found: IsoFlop, parameters: ParameterCount = "total") -> None:
    """Each budget's losses against size, its parabola, and its minimum (a star) where it is bracketed."""
    colours = _ordered(len(found.curves))
    every = math.ceil(len(found.curves) / MOST_NAMED)
    for index, (curve, colour) in enumerate(zip(found.curves, colours, strict=True)):
        marker = MARKERS[index % len(MARKERS)]
        face = colour if curve.bracketed else "white"
        label = f"{_power(curve.flops)} FLOPs" + ("" if curve.bracketed else " (not bracketed)")
        label = label if len(found.curves) <= MOST_NAMED or curve.bracketed and index % every == 0 else None
        axes.plot(curve.sizes, curve.losses, marker, color=colour, markerfacecolor=face, markersize=5.5, label=label)
        if curve.coefficients is not None:
            x = np.geomspace(curve.sizes[0], curve.sizes[-1], 100)
            axes.plot(x, curve(x), "-" if curve.bracketed else ":", color=colour, linewidth=1.3, alpha=0.85)
        if curve.bracketed:
            axes.plot([curve.params], [curve.loss], "*", **MINIMUM, markersize=14, zorder=4)
    if found.bracketed:
        axes.plot([], [], "*", **MINIMUM, markersize=11, label="minimum")
    axes.set_xscale("log")
    _log_loss(axes, [loss for curve in found.curves for loss in curve.losses])
    axes.set(xlabel=_size_label(parameters), ylabel="validation loss (nats per token)")
    axes.set_title("IsoFLOP curves and their parabolas")
    axes.legend(loc="best", ncols=1 if len(found.curves) <= 6 else 2)


def optimal_size(
    axes: Any,
    *,
    found: IsoFlop,
    fit: Fit,
    flops_per_token: FlopsPerToken,
    reach: float = 10.0,
    parameters: ParameterCount = "total",
) -> None:
    """Compute-optimal size against compute: the IsoFLOP minima, their power law, and the parametric law."""
    budgets = [curve.flops for curve in found.curves]
    grid = np.geomspace(min(budgets), max(budgets) * reach, 40)
    best = _frontier(fit, grid, flops_per_token)
    if len(best) > 1:
        slope = math.log(best[-1].params / best[0].params) / math.log(best[-1].flops / best[0].flops)
        text = f"law: compute$^{{{slope:.2f}}}$"
        axes.plot([b.flops for b in best], [b.params for b in best], "--", color=BLACK, linewidth=1.4, label=text)
    if found.params_law is not None:
        text = f"IsoFLOP: compute$^{{{found.params_law.exponent:.2f}}}$"
        axes.plot(grid, found.params_law(grid), "-", color=BLUE, linewidth=1.4, label=text)
    inside = found.bracketed
    axes.plot(
        [c.flops for c in inside],
        [c.params for c in inside],
        "*",
        **MINIMUM,
        markersize=12,
        zorder=3,
        label="IsoFLOP minimum",
    )
    axes.axvspan(max(budgets), grid[-1], color="#F1F1F1", zorder=0, label="beyond the runs")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="training compute (FLOPs)",
        ylabel=f"optimal {_size_label(parameters)}",
    )
    axes.set_xlim(grid[0] / 1.3, grid[-1])
    axes.set_title("Compute-optimal model size")
    _plain_sizes(axes.yaxis)
    axes.legend(loc="upper left")


def law_against_runs(
    axes: Any,
    *,
    runs: Sequence[Run],
    fit: Fit,
    held_out: HeldOut | None = None,
    parameters: ParameterCount = "total",
) -> None:
    """Predicted against measured loss with a band of 3%; the held-out budget as the fit without it predicts
    it."""
    out = {p.name for p in held_out.predictions} if held_out is not None else set()
    groups = by_budget(runs)
    for index, (group, colour) in enumerate(zip(groups, _ordered(len(groups)), strict=True)):
        shown = [run for run in group if run.name not in out]
        predicted = [fit.law.loss(params=run.count(parameters), tokens=run.tokens) for run in shown]
        if shown:
            marker = MARKERS[index % len(MARKERS)]
            axes.plot([run.loss for run in shown], predicted, marker, color=colour, markersize=5.5, alpha=0.9)
    values = [run.loss for run in runs]
    ends = np.array([min(values) * 0.97, max(values) * 1.03])
    if held_out is not None:
        axes.plot(
            [p.measured for p in held_out.predictions],
            [p.predicted for p in held_out.predictions],
            "D",
            color=VERMILION,
            markersize=6.5,
            markeredgecolor="white",
            label=f"held out ({_power(held_out.flops)} FLOPs), predicted without it",
        )
    axes.plot(ends, ends, "-", color=BLACK, linewidth=1)
    axes.fill_between(ends, ends * 0.97, ends * 1.03, color=SKY, alpha=0.25, linewidth=0, label="within 3%")
    _log_loss(axes, values, both=True)
    axes.set(
        xlim=ends,
        ylim=ends,
        xlabel="measured loss (nats per token)",
        ylabel="predicted loss (nats per token)",
    )
    axes.set_title("The law against the runs")
    law = fit.law
    text = (
        f"$L = {law.E:.3g} + \\frac{{{_tex(law.A)}}}{{params^{{{law.alpha:.3f}}}}}"
        f" + \\frac{{{_tex(law.B)}}}{{tokens^{{{law.beta:.3f}}}}}$"
    )
    axes.text(0.97, 0.05, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=12)
    axes.legend(loc="upper left")


def loss_by_kind(axes: Any, *, found: Comparison) -> None:
    """Every run's loss against its compute, dense and expert models apart; lines join each kind's best."""
    for kind, colour, marker in _kinds(found):
        runs = found.dense if not kind else [w.run for w in found.worth if w.run.experts == kind]
        axes.plot([r.flops for r in runs], [r.loss for r in runs], marker, color=colour, markersize=4.5, alpha=0.45)
        best = [rung.best[kind] for rung in found.rungs if kind in rung.best]
        x, y = [run.flops for run in best], [run.loss for run in best]
        axes.plot(x, y, marker + "-", color=colour, linewidth=1.5, markersize=6.5, label=kind_name(kind))
    axes.set_xscale("log")
    _log_loss(axes, [run.loss for run in found.dense] + [w.run.loss for w in found.worth])
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
        axes.plot(ends, [times * end for end in ends], line, color=BLACK, linewidth=0.9)
        axes.annotate(f"{times}x" if times > 1 else "dense", (ends[1], times * ends[1]), ha="right", va="bottom")
    axes.set(
        xscale="log", yscale="log", xlim=ends, xlabel="active parameters", ylabel="effective dense size (parameters)"
    )
    axes.set_title("What a dense model of equal loss on the same tokens would have")
    _plain_sizes(axes.xaxis, axes.yaxis)
    axes.legend(loc="upper left")


def _kinds(found: Comparison) -> list[tuple[int, str, str]]:
    """(experts, colour, marker) of each kind in a comparison."""
    kinds = sorted({0} | {w.run.experts for w in found.worth})
    colours = (BLACK, BLUE, VERMILION, GREEN, ORANGE, SKY)
    return [(kind, colours[i % len(colours)], MARKERS[i % len(MARKERS)]) for i, kind in enumerate(kinds)]


def _frontier(fit: Fit, grid: np.ndarray, flops_per_token: FlopsPerToken) -> list[Any]:
    from research.core.types import UserError

    found = []
    for flops in grid:
        try:
            found.append(optimum(fit.law, flops=float(flops), flops_per_token=flops_per_token))
        except UserError:
            return []
    return found


def _ordered(count: int) -> list[Any]:
    import matplotlib

    return [matplotlib.colormaps["viridis"](position) for position in np.linspace(0.0, 0.82, max(1, count))][:count]


def _log_loss(axes: Any, losses: Sequence[float], *, both: bool = False) -> None:
    """Log scale for losses, with plain numbers at round steps."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(losses) * 0.985, max(losses) * 1.02
    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if (high - low) / s <= 9), 10)
    ticks = [step * k for k in range(1, int(high * 2 / step) + 2)]
    digits = 2 if step < 0.1 else 1
    for name in ("x", "y") if both else ("y",):
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{digits}f}"))
    if not both:
        axes.set_ylim(low, high)


def _plain_sizes(*sides: Any) -> None:
    """Counts as plain words, 1, 2 and 5 of each power of ten, on axes of sizes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in sides:
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axis.set_minor_formatter(NullFormatter())


def _size_label(parameters: ParameterCount) -> str:
    return "parameters" if parameters == "total" else "non-embedding parameters"


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _tex(value: float) -> str:
    if 0.01 <= value < 1e5:
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} \\times 10^{{{int(exponent)}}}"
