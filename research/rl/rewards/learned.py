# SPDX-License-Identifier: Apache-2.0
"""Rewards that a model gives: to whole batches of tokens, on the device, where verifiers score text on the host."""

import functools
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from research.core.sharding import constrain
from research.core.types import Array, Batch
from research.models.bound import Bound


@runtime_checkable
class LearnedReward(Protocol):
    """A frozen dataclass. name: of its part in the record. model: of the experiment's frozen models the one that it
    asks. weight: of its rewards in the sum."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def weight(self) -> float: ...

    def rewards(self, model: Bound, batch: Batch) -> Array:
        """Of the responses of a batch (``research.objectives.grpo``) [B], in float32, whole on every host. It is called
        within a jitted function, on the training's mesh."""
        ...


@dataclass(frozen=True)
class ValueAtEnd:
    """What a reward model's value head reads off the last token of a response (Ouyang et al. 2022, section 3.5). The
    model reads the policy's own tokens."""

    model: str = "reward"
    weight: float = 1.0
    name: str = "learned"

    def rewards(self, model: Bound, batch: Batch) -> Array:
        values_BT = model.values(model.forward(batch).hidden)
        length = batch["targets"].shape[1]
        drawn_B = jnp.sum(batch["weights"] > 0, axis=1).astype(jnp.int32)
        last_B = values_BT.shape[1] - length + drawn_B - 1
        return jnp.take_along_axis(values_BT, last_B[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def learned(reward: LearnedReward, model: Bound, batch: Batch) -> Array:
    """A batch's rewards [B]."""
    return constrain(reward.rewards(model, batch).astype(jnp.float32), None)
