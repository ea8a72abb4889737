# SPDX-License-Identifier: Apache-2.0
"""The pictures of a scaling study, each drawn on axes from a conclusion: loss against compute with its envelope,
IsoFLOP curves, the optimum against compute, loss contours, residuals, the held-out test."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from research.scaling import allocation, canvas
from research.scaling.analysis import Conclusion
from research.scaling.canvas import BEYOND, BLACK, BLUE, GREEN, GREY, MARKERS, ORANGE, SKY, VERMILION, point
from research.scaling.isoflop import BAND_POINTS, by_budget
from research.scaling.ladder import short_count
from research.scaling.laws import BESIROGLU, HOFFMANN, KAPLAN_PARAMS
from research.scaling.recommend import WITHIN
from research.scaling.table import ParameterCount, Run

MINIMUM = {"color": VERMILION, "markerfacecolor": "none", "markeredgewidth": 1.6}  # hollow: it may lie upon a run
MOST_NAMED = 10  # budgets in a legend
CELLS = 90  # of a contour plot, each way
BAND = {"alpha": 0.18, "linewidth": 0}


def pictures(found: Conclusion) -> dict[str, Callable[[Any], None]]:
    """What to draw, by name."""
    return {
        "loss_against_compute": lambda axes: loss_against_compute(axes, found),
        "isoflop": lambda axes: isoflop_curves(axes, found),
        "optimal_size": lambda axes: optimal(axes, found, "params"),
        "optimal_tokens": lambda axes: optimal(axes, found, "tokens"),
        "contours": lambda axes: contours(axes, found),
        "residuals": lambda axes: residuals(axes, found),
        "extrapolation": lambda axes: extrapolation(axes, found),
        "law": lambda axes: law_against_runs(axes, found),
    }


def says(run: Run, parameters: ParameterCount) -> str:
    """What a point tells of its run."""
    return (
        f"{run.name}\n{run.count(parameters):,} parameters, {run.tokens:,} tokens\n{run.flops:.3g} FLOPs, "
        f"loss {run.loss:.4f} nats per token"
    )


def loss_against_compute(axes: Any, found: Conclusion) -> None:
    """Every run's training curve (where given) and final loss, coloured by model size; the envelope of the curves; the
    law's best loss at each budget with its interval, as far as the target."""
    import matplotlib
    from matplotlib.colors import LogNorm

    runs, parameters = found.runs, found.settings.parameters
    sizes = [run.count(parameters) for run in runs]
    low, high = min(sizes), max(sizes)
    norm = LogNorm(low / 1.05, high * (1.9 if high > low else 1.05))  # the last, yellow part is hard to see on white
    colours = matplotlib.colormaps["viridis"]
    for run in sorted(runs, key=lambda r: -r.count(parameters)):
        colour = colours(norm(run.count(parameters)))
        line = [(x, y) for x, y in found.curves.get(run.name, ()) if x > 0 and math.isfinite(y)]
        if line:
            axes.plot(*zip(*line, strict=True), color=colour, linewidth=0.9, alpha=0.6)
        style = {"color": colour, "markersize": 5, "markeredgecolor": "white", "zorder": 3}
        point(axes, run.flops, run.loss, "o", says=says(run, parameters), **style)
    best = found.frontier
    if best is not None:
        axes.fill_between(best.flops, *best.band("loss"), color=BLACK, **BAND)
        axes.plot(best.flops, best.loss, "--", color=BLACK, linewidth=1.4, label="law at its best size, 95%")
    if found.envelope is not None:
        line = found.envelope
        axes.plot(line.flops, line.loss, ":", color=VERMILION, linewidth=2.2, label="envelope of the training curves")
    axes.set_xscale("log")
    largest = max(run.flops for run in runs)
    right = max([largest * 1.5, *(best.flops[-1:] if best is not None else [])])
    axes.set_xlim(min(run.flops for run in runs) / 8, right)
    canvas.log_loss(axes, [run.loss for run in runs] + ([*best.loss] if best is not None else []))
    axes.set(xlabel="training compute (FLOPs)", ylabel="loss (nats per token)")
    axes.set_title("Loss against compute: held out at the end (dots)" + (", training (lines)" if found.curves else ""))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper right")
    bar = axes.figure.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=axes, pad=0.01, aspect=30)
    bar.ax.set_ylim(low, high if high > low else high * 1.01)
    ticks = sorted({float(f"{t:.1e}") for t in np.geomspace(low, high, 5)})
    bar.ax.minorticks_off()
    bar.set_ticks(ticks, labels=[short_count(t) for t in ticks])
    bar.outline.set_visible(False)
    bar.set_label(_name("params", parameters))


def isoflop_curves(axes: Any, found: Conclusion) -> None:
    """Each budget's losses against size, its parabola with its band, and its minimum (a star) where it is bracketed."""
    curves, minima, parameters = found.isoflop.curves, found.minima, found.settings.parameters
    shown = [curve for curve in curves if len(curve.sizes) > 2 or curve.bracketed] or list(curves)
    by_name = {run.name: run for run in found.runs}
    every = math.ceil(len(shown) / MOST_NAMED)
    for index, (curve, colour) in enumerate(zip(shown, canvas.ordered(len(shown)), strict=True)):
        marker = MARKERS[index % len(MARKERS)]
        label = f"{canvas.power(curve.flops)} FLOPs" + ("" if curve.bracketed else " (not bracketed)")
        label = label if len(shown) <= MOST_NAMED or (curve.bracketed and index % every == 0) else None
        style = {"color": colour, "markerfacecolor": colour if curve.bracketed else "white", "markersize": 5.5}
        axes.plot([], [], marker, label=label, **style)
        for name, size, loss in zip(curve.names, curve.sizes, curve.losses, strict=True):
            point(axes, size, loss, marker, says=says(by_name[name], parameters), **style)
        if curve.coefficients is not None:
            x = np.geomspace(curve.sizes[0], curve.sizes[-1], BAND_POINTS)
            axes.plot(x, curve(x), "-" if curve.bracketed else ":", color=colour, linewidth=1.3, alpha=0.85)
            if minima is not None and curve.flops in minima.bands:
                axes.fill_between(x, *minima.bands[curve.flops], color=colour, **BAND)
        if curve.bracketed:
            told = f"minimum at {curve.flops:.3g} FLOPs: {curve.params:,.0f} parameters, loss {curve.loss:.4f}"
            point(axes, curve.params, curve.loss, "*", says=told, **MINIMUM, markersize=14, zorder=4)
    if found.isoflop.bracketed:
        axes.plot([], [], "*", **MINIMUM, markersize=11, label="minimum")
    axes.set_xscale("log")
    canvas.log_loss(axes, [loss for curve in shown for loss in curve.losses])
    canvas.plain_counts(axes.xaxis)
    axes.set(xlabel=_name("params", parameters), ylabel="validation loss (nats per token)")
    axes.set_title("IsoFLOP curves and their parabolas (bands: 95%)")
    if shown:
        axes.legend(loc="best", ncols=1 if len(shown) <= 6 else 2)


def optimal(axes: Any, found: Conclusion, what: str) -> None:
    """Compute-optimal params or tokens against compute: the law with its interval, the IsoFLOP minima with theirs and
    their power law, the envelope, and the literature's lines."""
    best = found.frontier
    flops = [curve.flops for curve in found.isoflop.curves]
    grid = np.geomspace(min(flops), max(max(flops) * 1.5, found.target_flops), 40)
    values: list[float] = []
    if best is not None:
        line = getattr(best, what)
        values += [*line]
        slope = math.log(line[-1] / line[0]) / math.log(best.flops[-1] / best.flops[0])
        axes.fill_between(best.flops, *best.band(what), color=BLACK, **BAND)
        axes.plot(best.flops, line, "--", color=BLACK, linewidth=1.5, label=f"law, 95%: compute$^{{{slope:.2f}}}$")
    power = getattr(found.isoflop, f"{what}_law")
    if power is not None:
        line = power(grid)
        axes.plot(grid, line, "-", color=BLUE, linewidth=1.4, label=f"IsoFLOP: compute$^{{{power.exponent:.2f}}}$")
    if found.envelope is not None:
        power = getattr(found.envelope, f"{what}_law")
        line = power(grid)
        axes.plot(grid, line, ":", color=GREEN, linewidth=2, label=f"envelope: compute$^{{{power.exponent:.2f}}}$")
    for index, curve in enumerate(found.isoflop.bracketed):
        value = getattr(curve, what)
        values.append(value)
        if found.minima is not None:
            span = found.minima.interval(index, what)
            if span.closed:
                axes.plot([curve.flops] * 2, [span.low, span.high], "-", color=VERMILION, linewidth=1)
            else:
                axes.axvline(curve.flops, linestyle=":", color=VERMILION, linewidth=1)
        told = f"IsoFLOP minimum at {curve.flops:.3g} FLOPs: {value:,.0f} {what}"
        point(axes, curve.flops, value, "*", says=told, **MINIMUM, markersize=12, zorder=3)
    axes.plot([], [], "*", **MINIMUM, markersize=10, label="IsoFLOP minimum, 95% (dotted: no ends)")
    axes.set(xscale="log", yscale="log", xlabel="training compute (FLOPs)")
    limits = (min(values) / 2, max(values) * 2) if values else axes.get_ylim()
    _literature(axes, grid, what)
    axes.axvspan(max(flops), grid[-1], color=BEYOND, zorder=0, label="beyond the runs")
    axes.set(ylabel=f"optimal {_name(what, found.settings.parameters)}", xlim=(grid[0] / 1.3, grid[-1]), ylim=limits)
    axes.set_title(f"Compute-optimal {'model size' if what == 'params' else 'training tokens'}")
    canvas.plain_counts(axes.yaxis)
    axes.legend(loc="upper left")


def _literature(axes: Any, grid: np.ndarray, what: str) -> None:
    """The published frontiers, carried to these budgets: other text, other tokenizers, much larger models."""
    hoffmann = [allocation.closed_form_optimum(law, flops=grid) for law in (HOFFMANN, BESIROGLU)]
    kaplan = KAPLAN_PARAMS(grid)
    lines = [
        ("Hoffmann et al. 2022", getattr(hoffmann[0], what), (0, (1, 1))),
        ("Besiroglu et al. 2024", getattr(hoffmann[1], what), (0, (5, 1, 1, 1))),
        ("Kaplan et al. 2020", kaplan if what == "params" else grid / (6 * kaplan), (0, (3, 3))),
    ]
    for (name, line, dashes), colour in zip(lines, (GREY, ORANGE, SKY), strict=True):
        axes.plot(grid, line, color=colour, linestyle=dashes, linewidth=1.2, label=name)


def contours(axes: Any, found: Conclusion) -> None:
    """The law's loss over params and tokens, the runs upon it, lines of equal compute, and the efficient frontier."""
    import matplotlib

    parameters, law = found.settings.parameters, found.fit.law
    sizes, tokens = found.fit.points.params, found.fit.points.tokens
    x, y = (
        np.geomspace(sizes.min() / 2, sizes.max() * 3, CELLS),
        np.geomspace(tokens.min() / 2, tokens.max() * 3, CELLS),
    )
    loss = law.loss(params=x[None], tokens=y[:, None])
    levels = np.geomspace(loss.min() * 1.001, loss.max(), 16)
    if levels[-1] > levels[0]:  # not where nothing has an effect
        axes.contourf(x, y, loss, levels=levels, cmap="viridis_r", alpha=0.55, norm=matplotlib.colors.LogNorm())
        lines = axes.contour(x, y, loss, levels=levels, colors="white", linewidths=0.7)
        axes.clabel(lines, fmt="%.2f", fontsize=7.5, colors=BLACK)
    per_token = np.vectorize(found.flops_per_token, otypes=[float])(x)
    shown = [curve for curve in found.isoflop.curves if len(curve.sizes) > 2]
    for curve in shown[:: -(-len(shown) // MOST_NAMED) or 1]:
        axes.plot(x, curve.flops / per_token, ":", color=GREY, linewidth=0.9)
    if shown:
        axes.plot([], [], ":", color=GREY, linewidth=0.9, label="equal compute")
    for run in found.runs:
        style = {"color": BLACK, "markersize": 3.6, "markerfacecolor": "white", "markeredgewidth": 0.9}
        point(axes, run.count(parameters), run.tokens, "o", says=says(run, parameters), **style)
    best = found.frontier
    if best is not None:
        axes.plot(best.params, best.tokens, "-", color=VERMILION, linewidth=2, label="efficient frontier")
        axes.legend(loc="upper left", framealpha=0.8, frameon=True)
    axes.set(xscale="log", yscale="log", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), ylabel="training tokens")
    axes.set(xlabel=_name("params", parameters))
    canvas.plain_counts(axes.xaxis, axes.yaxis)
    axes.set_title("The law's loss (nats per token) and the runs")


def residuals(axes: Any, found: Conclusion) -> None:
    """How far each run lies off the law, against its compute; markers by tokens per parameter."""
    parameters = found.settings.parameters
    ratios = np.log([run.tokens / run.count(parameters) for run in found.runs])
    edges = np.quantile(ratios, [1 / 3, 2 / 3])
    low, high = (f"{math.exp(edge):.2g}" for edge in edges)
    names = [f"under {low}", f"{low} to {high}", f"over {high}"]
    styles = [("v", BLUE), ("o", BLACK), ("^", VERMILION)]
    for run, ratio, residual in zip(found.runs, ratios, found.fit.residuals, strict=True):
        marker, colour = styles[int(np.searchsorted(edges, ratio))]
        told = f"{says(run, parameters)}\n{-residual:+.2%} off the law"
        point(axes, run.flops, -100 * residual, marker, says=told, color=colour, markersize=5, alpha=0.8)
    for name, (marker, colour) in zip(names, styles, strict=True):
        axes.plot([], [], marker, color=colour, markersize=5, label=f"{name} tokens per parameter")
    axes.axhline(0, color=BLACK, linewidth=1)
    rms = 100 * found.fit.rms_residual
    axes.axhspan(-rms, rms, color=SKY, alpha=0.2, linewidth=0, label=f"root mean square, {rms:.2f}%")
    axes.set(xscale="log", xlabel="training compute (FLOPs)", ylabel="measured loss above the law (%)")
    axes.set_title("Residuals")
    axes.legend(loc="best")


def extrapolation(axes: Any, found: Conclusion) -> None:
    """The held-out budget: losses against size as measured, as the fit without it predicts, and the loss that was
    carried forward."""
    axes.set_title("Extrapolation: held out of the fit")
    test, parameters = found.held_out, found.settings.parameters
    if test is None:
        axes.text(0.5, 0.5, "no held-out test (the remarks say why)", transform=axes.transAxes, ha="center")
        return
    by_name = {run.name: run for run in found.runs}
    ends = dict.fromkeys(canvas.power(flops) for flops in (test.budgets[0], test.budgets[-1]))
    ordered = sorted(test.predictions, key=lambda p: p.params)
    x = [p.params for p in ordered]
    single = len(test.budgets) == 1  # of several budgets a line would join what does not belong together
    style, predicted = {"color": VERMILION, "markersize": 5.5}, np.array([p.predicted for p in ordered])
    axes.plot(x, predicted, "D--" if single else "D", label="predicted without them, within 3%", **style)
    if single:
        axes.fill_between(x, predicted * (1 - WITHIN), predicted * (1 + WITHIN), color=VERMILION, **BAND)
    else:
        axes.errorbar(x, predicted, predicted * WITHIN, fmt="none", ecolor=VERMILION, elinewidth=1, capsize=3)
    for p in ordered:
        told = f"{says(by_name[p.name], parameters)}\npredicted {p.predicted:.4f} ({p.relative_error:+.2%})"
        point(axes, p.params, p.measured, "o", says=told, color=BLACK, markersize=6, zorder=4)
    axes.plot([], [], "o", color=BLACK, label="measured, " + " to ".join(ends) + " FLOPs")
    text = f"best of {canvas.power(test.carried_flops)} FLOPs"
    axes.axhline(test.carried_loss, linestyle=":", color=BLUE, linewidth=1.6, label=text)
    axes.set_xscale("log")
    canvas.log_loss(axes, [v for p in ordered for v in (p.measured, p.predicted)] + [test.carried_loss])
    canvas.plain_counts(axes.xaxis)
    axes.set(xlabel=_name("params", parameters), ylabel="validation loss (nats per token)")
    axes.legend(loc="best")


def law_against_runs(axes: Any, found: Conclusion) -> None:
    """Predicted against measured loss with a band of 3%."""
    fit, parameters = found.fit, found.settings.parameters
    groups = by_budget(found.runs)
    for index, (group, colour) in enumerate(zip(groups, canvas.ordered(len(groups)), strict=True)):
        for run in group:
            predicted = fit.law.loss(params=float(run.count(parameters)), tokens=float(run.tokens))
            style = {"color": colour, "markersize": 5.5, "alpha": 0.9}
            told = f"{says(run, parameters)}\npredicted {predicted:.4f}"
            point(axes, run.loss, predicted, MARKERS[index % len(MARKERS)], says=told, **style)
    values = [run.loss for run in found.runs]
    ends = np.array([min(values) * 0.97, max(values) * 1.03])
    axes.plot(ends, ends, "-", color=BLACK, linewidth=1)
    axes.fill_between(ends, ends * 0.97, ends * 1.03, color=SKY, alpha=0.25, linewidth=0, label="within 3%")
    canvas.log_loss(axes, values, both=True)
    axes.set(xlim=ends, ylim=ends, xlabel="measured loss (nats per token)", ylabel="predicted loss (nats per token)")
    axes.set_title("The law against the runs")
    if fit.form.name == "chinchilla":
        law = fit.law
        text = (
            f"$L = {law.E:.3g} + \\frac{{{canvas.tex(law.A)}}}{{params^{{{law.alpha:.3f}}}}}"
            f" + \\frac{{{canvas.tex(law.B)}}}{{tokens^{{{law.beta:.3f}}}}}$"
        )
        axes.text(0.97, 0.05, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=12)
    axes.legend(loc="upper left")


def _name(what: str, parameters: ParameterCount) -> str:
    if what == "tokens":
        return "training tokens"
    return {"total": "parameters", "non_embedding": "non-embedding parameters"}.get(parameters, "parameters with head")
