# SPDX-License-Identifier: Apache-2.0
"""Proximal policy optimisation with a value head: the policy's loss is that of ``Grpo``, the values learn the returns.

Its batches have values and returns [B, C] besides, from a source whose advantage is ``Gae``.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from research.core.types import Array, Batch, Loss, Policy, Term, UserError, WeightedSum
from research.objectives.grpo import Grpo, response_log_probs, response_part


@dataclass(frozen=True)
class Ppo:
    """policy: the loss of the policy (Schulman et al. 2017, eq. 7). value_coefficient: of half the squared error of the
    values, averaged over tokens (eq. 9); value_clip: the larger error counts of the values, and of them kept so near to
    what they were when the responses were sampled (0: no such bound)."""

    policy: Grpo = field(default_factory=lambda: Grpo(normaliser="tokens"))
    value_coefficient: float = 0.5
    value_clip: float = 0.2

    def __post_init__(self) -> None:
        if not (self.value_coefficient >= 0 and self.value_clip >= 0):
            raise UserError(
                f"Ppo's value_coefficient and value_clip must be at least 0; given {self.value_coefficient} and "
                f"{self.value_clip}."
            )

    def check(self, experiment: Any) -> None:
        """Raises UserError where the experiment's source or model lacks what the loss takes."""
        self.policy.check(experiment)
        _check_returns(experiment.source.batch_shapes())
        if not experiment.model.value_head:
            raise UserError(
                "Ppo learns values, and the model has no value head: set model.value_head to True, and where it begins "
                "from the weights of a model without one, init to Init(..., model=that model)."
            )

    def __call__(self, policy: Policy, frozen: Mapping[str, Policy], batch: Batch, key: Array | None) -> Loss:
        _check_returns(batch)
        output = policy.forward(batch, key=key)
        loss = self.policy.loss(output, response_log_probs(policy, output, batch, self.policy.chunk), frozen, batch)
        mask_BC, before_BC, returns_BC = (batch[name] for name in ("weights", "values", "returns"))
        values_BC = response_part(policy.values(output.hidden), batch)
        errors_BC = jnp.square(values_BC - returns_BC)
        if self.value_clip:
            near_BC = jnp.clip(values_BC, before_BC - self.value_clip, before_BC + self.value_clip)
            errors_BC = jnp.maximum(errors_BC, jnp.square(near_BC - returns_BC))
        value = WeightedSum(jnp.sum(errors_BC * mask_BC) / 2, jnp.sum(mask_BC))
        expected = WeightedSum(jnp.sum(values_BC * mask_BC), jnp.sum(mask_BC))
        return loss._replace(
            terms={**loss.terms, "value": Term(self.value_coefficient, value)},
            metrics={**loss.metrics, "value": expected},
        )


def _check_returns(given: Container[str]) -> None:
    if "returns" not in given:
        raise UserError("Ppo learns values, and its batches have none: set the source's advantage to Gae().")
