# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers: plain (ReLU, GELU) and gated (SwiGLU, GEGLU; Shazeer 2020)."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax

from research.core.sharding import constrain
from research.core.types import Array, Precision
from research.models.layers import Linear, WeightInit

GATES = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}
PLAIN = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}


@dataclass(frozen=True)
class Mlp:
    """d_ff: the inner width (of the gate and of the value each, where gated). GELU is the tanh form."""

    d_ff: int
    activation: Literal["swiglu", "geglu", "gelu", "relu"] = "swiglu"

    @property
    def gated(self) -> bool:
        return self.activation in GATES

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

        def up(name: str) -> Array:
            init = self.weight_init.matrix(d_model)
            layer = Linear((d_model,), (d_ff,), ("embed", "mlp"), init, self.precision, self.platform, name=name)
            return constrain(layer(x_BTD), "batch", "sequence", "act_mlp")

        if self.config.gated:
            hidden_BTF = GATES[self.config.activation](up("gate")) * up("up")
        else:
            hidden_BTF = PLAIN[self.config.activation](up("up"))
        init = self.weight_init.matrix(d_ff, residual_layers=self.num_layers)
        down = Linear((d_ff,), (d_model,), ("mlp", "embed"), init, self.precision, self.platform, name="down")
        return down(hidden_BTF)
