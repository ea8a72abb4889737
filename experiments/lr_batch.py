# SPDX-License-Identifier: Apache-2.0
"""Learning rate and batch size against compute: the rules that the Chinchilla study trains by.

Question:  Which peak learning rate, and how many tokens a step, are best at a budget? (DeepSeek LLM, Bi et al. 2024,
           section 3.1: both follow power laws in compute; Porian et al. 2024 show what happens where they do not.)
           At three budgets, four learning rates by five batches for a model below and one above the best size;
           a quadratic in their logs finds each optimum.
Command:   lab sweep experiments/lr_batch.py
Hardware:  two CPU cores, 35 minutes.
Expect:    learning rate 2.28 params^-0.66 tokens^0.16 and 0.295 params^-0.36 tokens^0.84 tokens a step; by compute
           alone the best rate falls as compute^-0.24 and the best batch grows as compute^0.23. Rate and batch trade off
           along a ridge: together they are known better than either.
"""

from dataclasses import replace
from pathlib import Path

from experiments import quickstart
from research.scaling import ladder
from research.scaling.table import Table
from research.train.experiment import CheckpointPolicy, Experiment

WIDTHS = {6e10: (16, 32), 2.4e11: (24, 48), 9.6e11: (40, 80)}  # about half and about twice the best size
RATES = (0.004, 0.008, 0.016, 0.032)
ROWS = (4, 8, 16, 32, 64)  # of 32 tokens


def grid(
    widths: dict[float, tuple[int, ...]], *, rates: tuple[float, ...], rows: tuple[int, ...]
) -> dict[str, Experiment]:
    """Every width at every rate and batch, each for its whole budget."""
    base = replace(quickstart.base(), checkpoint=CheckpointPolicy(every=4000))
    found = {}
    for budget, sizes in widths.items():
        for rate in rates:
            for count in rows:
                tried = replace(
                    base,
                    source=replace(base.source, batch_size=count),
                    optimizer=replace(base.optimizer, peak=rate),
                )
                models = {f"w{width}-b{count * 32}-lr{rate:g}": quickstart.model(width) for width in sizes}
                found |= ladder.isoflop(tried, models=models, budgets=(budget,), min_steps=50)
    return found


def sweep() -> dict[str, Experiment]:
    return grid(WIDTHS, rates=RATES, rows=ROWS)


def smallest() -> dict[str, Experiment]:
    """The same study in a minute: it shows that all of it works, not what the rules are."""
    return grid({6e9: (8, 16)}, rates=(0.004, 0.012, 0.036), rows=(4, 8, 16))


def analyze(runs: Table, out: Path) -> None:
    from research.scaling.tuning_report import write_tuning  # here: training needs no drawing

    found = write_tuning(runs, out, title=f"Learning rate and batch on {type(quickstart.CORPUS).__name__}")
    print("\n".join(found.sentences))
