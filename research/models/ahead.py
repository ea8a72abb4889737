# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction: a block for each token further ahead, after the model's own (DeepSeek-V3, 2024, section 2.2).

Module k joins what module k - 1 made of token i (the model's own hidden state at first) with the embedding of token
i + k, and predicts token i + k + 1 through the model's head. It is trained with the model and left out of generation.
"""

import flax.linen as nn
import jax.numpy as jnp

from research.core.types import Array, Params
from research.models.layers import Build
from research.models.stack import Block, Kind, Wiring
from research.models.tokens import Tokens


class Ahead(nn.Module):
    """One module; ``ahead`` repeats it."""

    kind: Kind
    wiring: Wiring
    build: Build

    @nn.compact
    def __call__(
        self, hidden_BTD: Array, embedded_BTD: Array, index: Array, tokens: Tokens
    ) -> tuple[Array, tuple[Array, Params]]:
        """hidden: of the module before; embedded: the tokens ahead. The second result has what the head reads."""

        def norm(name: str, x_BTD: Array) -> Array:
            return self.wiring.norm.build(self.build.d_model, self.build.precision, name=name)(x_BTD)

        d_model = self.build.d_model
        both = jnp.stack([norm("token_norm", embedded_BTD), norm("hidden_norm", hidden_BTD)], axis=2)
        joined_BTD = self.build.linear("join", (2, d_model), (d_model,), (None, "embed", "latent"))(both)
        block = Block(self.kind, self.wiring, self.build, name="block")
        (hidden_BTD, _), found = block((joined_BTD, None), index, jnp.zeros((), jnp.int32), tokens)
        return hidden_BTD, (norm("norm", hidden_BTD), found)


def ahead(kind: Kind, wiring: Wiring, build: Build, depth: int) -> nn.Module:
    """Called with (hidden [B, T, D], embedded [depth, B, T, D], layer indices [depth], tokens) -> (hidden, (what the
    head reads [depth, B, T, D], router statistics [depth, ...]))."""
    repeated = nn.scan(
        Ahead,
        variable_axes={"params": 0, "buffers": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast),
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return repeated(kind, wiring, build)


def shifted(x_BT: Array, steps: int) -> Array:
    """[B, T]: what stands so many tokens further; zeros behind the end."""
    return jnp.pad(x_BT[:, steps:], ((0, 0), (0, min(steps, x_BT.shape[1]))))
