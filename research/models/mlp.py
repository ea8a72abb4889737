# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers: plain (ReLU, GELU) and gated (SwiGLU, GEGLU; Shazeer 2020)."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax

from research.core.sharding import constrain
from research.core.types import Array, Params
from research.models.layers import Build, project
from research.models.tokens import Tokens

Activation = Literal["swiglu", "geglu", "gelu", "gelu_exact", "relu"]
ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


def is_gated(activation: Activation) -> bool:
    return activation in ("swiglu", "geglu")


def activated(activation: Activation, inner: Sequence[Array]) -> Array:
    """inner: what the gate and the up projection give, or the up projection alone."""
    first = ACTIVATIONS[activation](inner[0])
    return first * inner[1] if is_gated(activation) else first


@dataclass(frozen=True)
class Mlp:
    """d_ff: the inner width (of the gate and of the value each, where gated). GELU is the tanh form, but for
    "gelu_exact"."""

    d_ff: int
    activation: Activation = "swiglu"
    bias: bool = False

    @property
    def gated(self) -> bool:
        return is_gated(self.activation)

    def build(self, build: Build, *, name: str = "mlp") -> nn.Module:
        return _Mlp(self, build, name=name)


class _Mlp(nn.Module):
    config: Mlp
    build: Build

    @nn.compact
    def __call__(self, x_BTD: Array, tokens: Tokens) -> tuple[Array, Params]:
        """The second result is a router's statistics: of a dense layer there are none."""
        del tokens
        sizes, axes = ((self.build.d_model,), (self.config.d_ff,)), ("embed", "mlp")
        names = ("gate", "up") if self.config.gated else ("up",)
        bias = self.config.bias
        layers = [self.build.linear(name, *sizes, axes, bias=bias) for name in names]
        inner = [constrain(y, "batch", "sequence", "act_mlp") for y in project(x_BTD, *layers)]
        hidden_BTF = activated(self.config.activation, inner)
        return self.build.linear("down", *sizes[::-1], axes[::-1], residual=True, bias=bias)(hidden_BTF), {}
