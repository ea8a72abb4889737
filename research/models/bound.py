# SPDX-License-Identifier: Apache-2.0
"""A model bound to its parameters: what objectives, sources and evals are handed."""

from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.core.sharding import partition_spec
from research.core.types import Array, Batch, Output, Params, UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bound:
    """A pytree of parameters and buffers with the module that reads them (static)."""

    params: Params
    buffers: Params
    module: nn.Module = field(metadata={"static": True})

    def apart(self) -> "Bound":
        """The same with the layers' parameters one by one in tuples, where a model is to go through unrolled layers
        many times: taken out of the stacked arrays within a loop, they would be copied each time."""

        def taken(tree: Params) -> Params:
            return {
                name: jax.tree.map(lambda w: tuple(w), part) if name in self.module.config.stacks else part
                for name, part in tree.items()
            }

        return replace(self, params=taken(self.params), buffers=taken(self.buffers))

    def forward(self, batch: Batch, cache: Any = None, key: Array | None = None) -> Output:
        """batch: tokens, positions, segment_ids [B, T]. Hidden states come out after the final norm [B, T, D].

        key: for random choices that training makes; without one there are none.
        """
        variables = {"params": self.params, "buffers": self.buffers}
        return self.module.apply(variables, batch, cache, key, method="forward")

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> [..., V] in the logits dtype."""
        return self.head()(hidden)

    def values(self, hidden: Array) -> Array:
        """[..., D] -> [...] in float32: what the value head reads off. Raises UserError for a model without one."""
        if not self.module.config.value_head:
            raise UserError("This model has no value head: set model.value_head to True.")
        return self.module.apply({"params": self.params}, hidden, method="values")

    def head(self) -> "Head":
        return Head(self.module.head_params(self.params), self.module)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """The output head alone, differentiable by itself (``research.core.types.Head``)."""

    params: Params
    module: nn.Module = field(metadata={"static": True})

    def __call__(self, hidden: Array) -> Array:
        return self.module.apply({"params": self.params}, hidden, method="logits")

    def cast(self) -> "Head":
        dtype = jnp.dtype(self.module.precision.logits)
        return replace(self, params=jax.tree.map(lambda w: w.astype(dtype), self.params))

    def specs(self) -> "Head":
        axes = self.module.head_params(self.module.config.logical_axes())
        is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
        return replace(self, params=jax.tree.map(partition_spec, axes, is_leaf=is_axes))
