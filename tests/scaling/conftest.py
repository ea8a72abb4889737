# SPDX-License-Identifier: Apache-2.0
"""Synthetic studies: runs whose losses follow a known law, with or without noise."""

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from research.scaling.fit import Points
from research.scaling.laws import Chinchilla
from research.scaling.table import Run, Table

TRUE_LAW = Chinchilla(E=1.2, A=25.0, B=120.0, alpha=0.35, beta=0.38)


def study(
    *,
    law: Chinchilla = TRUE_LAW,
    noise: float = 0.0,
    seed: int = 0,
    budgets: tuple[float, ...] = (3e10, 1e11, 3e11, 1e12),
    sizes: int = 5,
    spread: float = 4.0,
) -> Table:
    """``sizes`` models at each budget, spread about the law's optimum, costing exactly 6 FLOPs per param and
    token."""
    generator, runs = np.random.default_rng(seed), []
    for budget in budgets:
        for factor in np.geomspace(1 / spread, spread, sizes):
            params = int(0.06 * math.sqrt(budget) * factor)
            tokens = int(budget / (6 * params))
            loss = law.loss(params=params, tokens=tokens) * math.exp(noise * generator.standard_normal())
            runs.append(
                Run(
                    name=f"c{budget:.0e}-n{params}",
                    params=params,
                    non_embedding_params=params // 2,
                    tokens=tokens,
                    flops=6.0 * params * tokens,
                    loss=float(loss),
                    bits_per_byte=float(loss / math.log(2)),
                    status="finished",
                    seconds=1.5,
                    corpus_bytes=1_115_394,
                    corpus_hash="86c4e6aa9db7c042",
                )
            )
    return Table(tuple(runs))


@pytest.fixture(scope="session")
def true_law() -> Chinchilla:
    return TRUE_LAW


@pytest.fixture(scope="session")
def make_study() -> Callable[..., Table]:
    return study


@pytest.fixture(scope="session")
def chinchilla_csv(shared_data: Path) -> Path:
    """245 points read off figure 4 of Hoffmann et al. 2022 (Besiroglu et al. 2024)."""
    path = shared_data / "chinchilla_figure4_epoch.csv"
    if not path.is_file():
        pytest.skip(f"needs the published points, and there is no {path}")
    return path


@pytest.fixture(scope="session")
def all_chinchilla_points(chinchilla_csv: Path) -> Points:
    with open(chinchilla_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    params, flops, loss = (np.array([float(r[c]) for r in rows]) for c in ("Model Size", "Training FLOP", "loss"))
    return Points(params, flops / (6 * params), loss)


@pytest.fixture(scope="session")
def chinchilla_points(all_chinchilla_points: Points) -> Points:
    """Without the five highest losses, as in Besiroglu et al. 2024."""
    return all_chinchilla_points.take(np.argsort(all_chinchilla_points.loss)[:-5])
