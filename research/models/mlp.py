# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers: plain (ReLU, GELU) and gated (SwiGLU, GEGLU; Shazeer 2020)."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax

from research.core.sharding import constrain
from research.core.types import Array, Precision
from research.models.layers import Linear, WeightInit, project

GATED = ("swiglu", "geglu")
ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}


@dataclass(frozen=True)
class Mlp:
    """d_ff: the inner width (of the gate and of the value each, where gated). GELU is the tanh form."""

    d_ff: int
    activation: Literal["swiglu", "geglu", "gelu", "relu"] = "swiglu"

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    def build(
        self, d_model: int, num_layers: int, weight_init: WeightInit, precision: Precision, platform: str
    ) -> nn.Module:
        return _Mlp(self, d_model, num_layers, weight_init, precision, platform, name="mlp")


class _Mlp(nn.Module):
    config: Mlp
    d_model: int
    num_layers: int
    weight_init: WeightInit
    precision: Precision
    platform: str

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        d_model, d_ff = self.d_model, self.config.d_ff

        def up(name: str) -> Linear:
            init = self.weight_init.matrix(d_model)
            return Linear((d_model,), (d_ff,), ("embed", "mlp"), init, self.precision, self.platform, name=name)

        names = ("gate", "up") if self.config.gated else ("up",)
        inner = [constrain(y, "batch", "sequence", "act_mlp") for y in project(x_BTD, *map(up, names))]
        activation = ACTIVATIONS[self.config.activation]
        hidden_BTF = activation(inner[0]) * inner[1] if self.config.gated else activation(inner[0])
        init = self.weight_init.matrix(d_ff, residual_layers=self.num_layers)
        down = Linear((d_ff,), (d_model,), ("mlp", "embed"), init, self.precision, self.platform, name="down")
        return down(hidden_BTF)
