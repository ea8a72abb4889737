# SPDX-License-Identifier: Apache-2.0
"""Bootstrap refits of the Chinchilla law: this project's batched solver against a loop of scipy's, in one run.

    python -m benchmarks.bootstrap [CSV] [--refits 4000] [--loop 40]

Both refit the same 240 points (Hoffmann et al. 2022's figure 4 as extracted by Besiroglu et al. 2024; points drawn from
their law where the file is absent), drawn with the same weights, from the same start, by the same objective: the sum of
Huber losses of log residuals in log-sum-exp form, on as well-scaled coordinates. The loop is scipy's L-BFGS-B, once
with the exact gradient and once with scipy's own finite differences, as it is mostly used; its figures are means of
``--loop`` refits, and the batch's includes drawing the weights. The first call, with its compilation, is given apart.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from research.scaling import columns
from research.scaling.fit import Fit, Points, fit_law, problem
from research.scaling.intervals import bootstrap, draws
from research.scaling.laws import BESIROGLU

DATA = Path(os.environ.get("LAB_SHARED", "../shared")) / "data" / "chinchilla_figure4_epoch.csv"
TOLERANCES = {"ftol": 1e-14, "gtol": 1e-12, "maxiter": 5000, "maxfun": 10_000}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bootstrap refits against a loop of scipy's optimizer.")
    parser.add_argument("csv", nargs="?", type=Path, default=DATA)
    parser.add_argument("--refits", type=int, default=4000)
    parser.add_argument("--loop", type=int, default=40, help="how many of them the loop makes")
    options = parser.parse_args()
    points = published(options.csv)
    fit = fit_law(points)
    counts = draws(fit, resamples=options.refits)
    first = seconds(lambda: bootstrap(fit, resamples=options.refits))
    times = [seconds(lambda: bootstrap(fit, resamples=options.refits)) for _ in range(3)]
    batched = float(np.median(times))
    task, log_loss = problem(points), np.log(points.loss)
    solved = task.solve(np.tile(fit.theta, (options.loop, 1)), log_loss=log_loss, weights=counts[: options.loop])
    print(
        f"{len(points)} points, {options.refits:,} refits: {batched:.2f} s (the first call, with compilation: "
        f"{first:.2f} s)"
    )
    for exact, name in ((True, "the exact gradient"), (False, "finite differences")):
        start = time.perf_counter()
        loop = np.array([by_scipy(points, fit, row, exact=exact) for row in counts[: options.loop]])
        each = (time.perf_counter() - start) / options.loop
        excess = loop / solved.objective - 1
        print(
            f"scipy L-BFGS-B with {name}: {1000 * each:.1f} ms a refit, {each * options.refits:.0f} s for as many; "
            f"ratio {each * options.refits / batched:.0f}; its objective over the batch's, minus 1: median "
            f"{np.median(excess):.1e}, largest {excess.max():.1e}"
        )


def published(path: Path) -> Points:
    if path.is_file():
        named = {"params": "Model Size", "flops": "Training FLOP", "loss": "loss"}
        return Points.of(columns.read(path, columns=named, drop_highest=5).table)
    generator = np.random.default_rng(0)
    params, tokens = np.exp(generator.uniform(np.log([5e7, 1e9]), np.log([1e10, 3e11]), (240, 2))).T
    loss = BESIROGLU.loss(params=params, tokens=tokens) * np.exp(0.005 * generator.standard_normal(240))
    return Points(params, tokens, loss)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def by_scipy(points: Points, fit: Fit, weights: np.ndarray, *, exact: bool) -> float:
    """The objective that scipy's L-BFGS-B ends at. exact: whether it is handed the gradient."""
    n, d = np.log(points.params), np.log(points.tokens)
    centres, log_loss, delta = (n.mean(), d.mean()), np.log(points.loss), fit.delta
    n, d = n - centres[0], d - centres[1]

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray] | float:
        a, b, e, alpha, beta = theta
        parts = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
        top = parts.max(axis=0)
        share = np.exp(parts - top)
        total = share.sum(axis=0)
        residual = top + np.log(total) - log_loss
        size = np.abs(residual)
        value = weights @ np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
        if not exact:
            return value / delta
        pull = weights * np.clip(residual, -delta, delta) * (share / total)
        gradient = np.array([pull[0].sum(), pull[1].sum(), pull[2].sum(), -pull[0] @ n, -pull[1] @ d])
        return value / delta, gradient / delta

    return minimize(objective, fit.theta, jac=exact, method="L-BFGS-B", options=TOLERANCES).fun * delta


if __name__ == "__main__":
    main()
