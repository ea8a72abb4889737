# SPDX-License-Identifier: Apache-2.0
"""Variable projection (Golub and Pereyra 1973): with a law's exponents fixed the loss is linear in its other numbers.

The best of those come from (non-negative) least squares of relative errors, and what is left is a search over one to
four numbers, which finds the right valley without a start. Used as the start of every fit, and as a fit of its own
(``fit.fit_projected``).
"""

import functools
from collections.abc import Mapping

import numpy as np
from scipy.optimize import minimize, nnls

from research.scaling.forms import CHINCHILLA, DATA_CONSTRAINED, SMALLEST_SHARE, Form

GRID = {1: 41, 2: 13, 3: 7}  # values of each number, by how many numbers are searched
APART = 0.3  # of two starts, in the log of a number at least
REPETITIONS = ((15.0, 5.0), (4.0, 4.0), (60.0, 20.0))  # R_D and R_N to begin at, around those of Muennighoff et al.


def project(
    form: Form, shape: np.ndarray, *, inputs: Mapping[str, np.ndarray], loss: np.ndarray, scale: np.ndarray
) -> tuple[float, np.ndarray]:
    """(sum of squared relative errors, theta) of the best levels at a given shape."""
    target = form.target(shape, loss)
    if form.signed:
        columns = form.columns(shape, inputs, scale)
        levels = np.linalg.lstsq(columns, target, rcond=None)[0]
        error = np.linalg.norm(columns @ levels - target)
        return float(error**2), form.theta(shape, levels)
    columns = form.columns(shape, inputs, scale) / target[:, None]
    if not np.all(np.isfinite(columns)):
        return np.inf, form.theta(shape, np.ones(columns.shape[1]))
    levels, error = nnls(columns, np.ones(len(loss)))
    floor = SMALLEST_SHARE * float(np.exp(np.log(target).mean()))
    return float(error**2), form.theta(shape, np.maximum(levels, floor))


def starts(
    form: Form, *, inputs: Mapping[str, np.ndarray], loss: np.ndarray, scale: np.ndarray, count: int
) -> list[np.ndarray]:
    """Coordinates to begin at: the projection's best, then the best of the grid around it, apart from one another."""
    at = functools.partial(project, form, inputs=inputs, loss=loss, scale=scale)
    if form == DATA_CONSTRAINED:
        fresh = starts(CHINCHILLA, inputs=inputs, loss=loss, scale=scale, count=-(-count // len(REPETITIONS)))
        pairs = [np.log(pair) for pair in REPETITIONS]
        return [np.concatenate([theta, pair]) for theta in fresh for pair in pairs][:count]
    low, high = (np.array([getattr(shape, end) for shape in form.shapes]) for end in ("low", "high"))
    axes = [shape.grid(GRID[len(form.shapes)]) for shape in form.shapes]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    ranked = points[np.argsort([at(point)[0] for point in points], kind="stable")]
    best = minimize(
        lambda log_shape: at(np.clip(np.exp(log_shape), low, high))[0],
        np.log(ranked[0]),
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-13, "maxiter": 200 * len(axes)},
    )
    chosen = [np.clip(np.exp(best.x), low, high)]
    for point in ranked:
        if len(chosen) >= count:
            break
        if all(np.max(np.abs(np.log(point / other))) > APART for other in chosen[1:]):
            chosen.append(point)
    return [at(shape)[1] for shape in chosen]
