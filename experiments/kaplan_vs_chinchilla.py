# SPDX-License-Identifier: Apache-2.0
"""Why Kaplan et al. and Hoffmann et al. disagree on the best model size, on runs of our own.

Question:  Kaplan et al. 2020 found params ~ C^0.73, Hoffmann et al. 2022 C^0.5. Porian et al. 2024 go from one to the
           other in steps: count the output head's FLOPs, shorten the warm-up, let the learning rate decay by the end of
           each run, tune learning rate and batch. Does the exponent fall here as it does there?
Command:   lab sweep experiments/kaplan_vs_chinchilla.py
Hardware:  two CPU cores, 45 minutes.
Expect:    an exponent of 0.73 counted and trained as Kaplan et al. did, 0.47 at the end of the steps. LOG.md has each.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from experiments import chinchilla, quickstart
from research.evals.validation import Validation
from research.scaling import cost
from research.scaling.table import Table
from research.train.experiment import CheckpointPolicy, Experiment, Flops
from research.train.optimizers import Schedule, Tokens

WIDTHS = (16, 24, 32, 40, 48, 64, 80, 96)
LENGTH = 1.6e12  # FLOPs of every run at a constant rate: its curve is read at each smaller budget
ROWS, RATE = 32, 0.008  # of 32 tokens; untuned: the same for every size and length
LONG = 600_000  # tokens of warm-up, more than the smallest budget trains the best model for
EVALUATIONS = 60
BUDGETS = (1e11, 2.5e11, 6.3e11, 1.6e12)
CHOSEN = {budget: chinchilla.WIDTHS[budget] for budget in BUDGETS}


def untuned(experiment: Experiment) -> Experiment:
    return replace(
        experiment,
        source=replace(experiment.source, batch_size=ROWS),
        optimizer=replace(experiment.optimizer, peak=RATE),
        checkpoint=CheckpointPolicy(every=4000),
    )


def constant(widths: tuple[int, ...], *, flops: float, long: int) -> dict[str, Experiment]:
    """Each width once at a constant rate, after a long warm-up that is the same for all, and after one of as many
    tokens as the model has parameters; validated often, for its loss is read along the way."""
    found = {}
    for width in widths:
        base = untuned(replace(quickstart.base(), model=quickstart.model(width), length=Flops(flops)))
        params = cost.params(base.model)
        every = max(1, base.steps // EVALUATIONS)
        held_out = Validation(
            base.source.validation(num_batches=2, batch_size=256), base.evals[0].objective, every=every
        )
        for kind, tokens in (("long", long), ("short", params.total)):
            name = f"{kind}-w{width}"
            schedule = Schedule("constant", warmup=Tokens(tokens))
            optimizer = replace(base.optimizer, schedule=schedule)
            found[name] = replace(base, name=name, optimizer=optimizer, evals=(held_out,))
    return found


def decayed(widths: Mapping[float, tuple[int, ...]], *, min_steps: int) -> dict[str, Experiment]:
    """IsoFLOP runs whose rate decays by their own end: with the rate and batch of the constant ones, and with their
    own."""
    fixed = chinchilla.study(widths, min_steps=min_steps, adjust=untuned)
    tuned = chinchilla.study(widths, min_steps=min_steps)
    kinds = {"decayed": fixed, "tuned": tuned}
    return {f"{k}-{name}": replace(run, name=f"{k}-{name}") for k, runs in kinds.items() for name, run in runs.items()}


def sweep() -> dict[str, Experiment]:
    return constant(WIDTHS, flops=LENGTH, long=LONG) | decayed(CHOSEN, min_steps=80)


def smallest() -> dict[str, Experiment]:
    """The same study in a minute or two: it shows that all of it works, not what the exponents are."""
    budgets = {2e10: (8, 16, 24, 32), 4e10: (8, 16, 24, 32)}
    return constant((8, 16, 24, 32), flops=4e10, long=40_000) | decayed(budgets, min_steps=10)


def analyze(runs: Table, out: Path) -> None:
    from research.scaling.disagreement import write_disagreement  # here: training needs no drawing

    found = write_disagreement(runs, out, title=f"Kaplan and Chinchilla on {type(quickstart.CORPUS).__name__}")
    print("\n".join(found.sentences))
