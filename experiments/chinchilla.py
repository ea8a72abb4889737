# SPDX-License-Identifier: Apache-2.0
"""An IsoFLOP study: how the best size and the best number of tokens grow with compute.

Question:  Which model, trained on how many tokens, is best for a budget, and how sure can one be of it? (Hoffmann et
           al. 2022, all three approaches, on the Python standard library's source.) Six budgets, six sizes around the
           best of each; learning rate and batch by the rules that experiments/lr_batch.py found.
Command:   lab sweep experiments/chinchilla.py
Hardware:  two CPU cores, 45 minutes.
Expect:    on the text with the content hash b5d113dbea4700018f5ca73d (Python 3.11.7): all six budgets bracketed; params
           grow as compute^0.45 by the IsoFLOP minima and by the law, compute^0.41 by the envelope; the held-out runs of
           1e13 FLOPs predicted within 0.9% of their loss, the best of them (2.023) to 0.4%. LOG.md has the intervals.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from experiments import quickstart
from research.scaling import cost, ladder
from research.scaling.table import Table
from research.train.experiment import CheckpointPolicy, Experiment

WIDTHS = {
    1e11: (16, 24, 32, 40, 48, 64),
    2.5e11: (24, 32, 40, 48, 64, 80),
    6.3e11: (32, 40, 48, 64, 80, 96),
    1.6e12: (40, 48, 64, 80, 96, 128),
    4e12: (48, 64, 80, 96, 128, 160),
    1e13: (64, 80, 96, 128, 160, 192),
}
SMALLEST = {2e10: (8, 16, 24, 32), 4e10: (8, 16, 24, 32), 8e10: (16, 24, 32, 48)}


def learning_rate(params: float, tokens: float) -> float:
    """The peak that experiments/lr_batch.py found best, by size and length of training."""
    return 2.28 * params**-0.663 * tokens**0.162


def batch_tokens(params: float, tokens: float) -> float:
    """The tokens of a step that it found best."""
    return 0.295 * params**-0.364 * tokens**0.842


def adjust(experiment: Experiment) -> Experiment:
    """Learning rate and batch by the model's size and the run's tokens; rows come in fours."""
    params, tokens = cost.params(experiment.model).total, experiment.tokens
    rows = max(4, 4 * round(batch_tokens(params, tokens) / experiment.source.sequence_length / 4))
    return replace(
        experiment,
        source=replace(experiment.source, batch_size=rows),
        optimizer=replace(experiment.optimizer, peak=learning_rate(params, tokens)),
    )


def study(
    widths: Mapping[float, tuple[int, ...]],
    *,
    min_steps: int,
    adjust: Callable[[Experiment], Experiment] = adjust,
) -> dict[str, Experiment]:
    """Every width at its budget (FLOPs), with the learning rate and batch that ``adjust`` gives it."""
    base = replace(quickstart.base(), checkpoint=CheckpointPolicy(every=2000))
    found = {}
    for budget, sizes in widths.items():
        models = [quickstart.model(width) for width in sizes]
        found |= ladder.isoflop(base, models=models, budgets=(budget,), adjust=adjust, min_steps=min_steps)
    return found


def sweep() -> dict[str, Experiment]:
    return study(WIDTHS, min_steps=400)


def smallest() -> dict[str, Experiment]:
    """The same study in a minute or two: it shows that all of it works, not what the law is."""
    return study(SMALLEST, min_steps=100)


def analyze(runs: Table, out: Path) -> None:
    from research.scaling.report import training_curves, write_report  # here: training needs no drawing

    title = f"Chinchilla's three approaches on {type(quickstart.CORPUS).__name__}"
    found = write_report(runs, out, title=title, curves=training_curves(runs, out))
    print("\n".join(found.sentences))
