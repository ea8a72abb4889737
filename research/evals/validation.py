# SPDX-License-Identifier: Apache-2.0
"""Loss on held-out text: nats per token, and bits per byte, which compare across tokenizers."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from research.core.types import (
    Array,
    Batch,
    Context,
    EvalRun,
    Metrics,
    Objective,
    Policy,
    Source,
    UserError,
    WeightedSum,
)


@dataclass(frozen=True)
class Validation:
    """An objective's means over all batches of a source, each divided by its weight over all of them.

    source: batches in a fixed order, with an end (``TextSource.validation``). every: steps between evaluations
    (0: at the end only). Results: ``validation/NAME`` for each of the objective's metrics, and ``validation/loss``
    where the loss is of one term (a router's losses are for training, and products of means besides).
    """

    source: Source
    objective: Objective
    every: int = 0
    name: str = "validation"

    def start(self, context: Context) -> EvalRun:
        stream = self.source.start(context)
        if not stream.num_batches:
            raise UserError("Validation needs a source with an end: use source.validation(num_batches=...).")
        num_batches = stream.num_batches

        def run(policy: Policy, step: int) -> Metrics:
            totals: dict[str, tuple[float, float]] = {}
            for index in range(num_batches):
                sums = _sums(self.objective, policy, stream.next(None, index))
                for name, (amount, weight) in jax.device_get(sums).items():
                    before = totals.get(name, (0.0, 0.0))
                    totals[name] = (before[0] + float(amount), before[1] + float(weight))
            return {f"{self.name}/{name}": a / w if w else float("nan") for name, (a, w) in totals.items()}

        return run

    def lower(self, policy: Policy, batch: Batch) -> jax.stages.Lowered:
        """The program of one batch, for a policy and a batch of shapes alone, on the mesh in scope."""
        return _sums.lower(self.objective, policy, batch)


@functools.partial(jax.jit, static_argnums=0)
def _sums(objective: Objective, policy: Policy, batch: Batch) -> Mapping[str, tuple[Array, Array]]:
    loss = objective(policy, {}, batch, None)
    whole = {"loss": _combined(loss.terms)} if len(loss.terms) == 1 else {}
    return {name: tuple(value) for name, value in {**whole, **loss.metrics}.items()}


def _combined(terms: Mapping[str, tuple[float | Array, WeightedSum]]) -> WeightedSum:
    ((coefficient, value),) = terms.values()
    return WeightedSum(coefficient * value.sum, value.weight)
