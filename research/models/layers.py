# SPDX-License-Identifier: Apache-2.0
"""The leaves of every model: initialisers, ``Linear``, ``Norm``, ``Embedding``.

One ``Linear`` for the whole codebase: a parameter with logical axes, and one ``lax.dot_general``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research.core.sharding import Axes
from research.core.types import Array, Precision
from research.models import sharded
from research.models.positions import Position, Rotary

PRODUCT = "weight_product"  # what a choice of what to recompute knows products with weights by
Initializer = Callable[..., Array]


@dataclass(frozen=True)
class WeightInit:
    """Initial weights.

    scheme "fan_in": every matrix from a normal distribution cut at two deviations, of standard deviation
        1/sqrt(fan-in) (LeCun et al. 1998); embeddings 1/sqrt(d_model).
    scheme "gpt2": every matrix and embedding normal with standard deviation 0.02 (Radford et al. 2019).
    In both, the projections that write into the residual stream are divided by sqrt(2 num_layers)
    (Radford et al. 2019, section 2.3), norms start at one and biases at zero.
    """

    scheme: Literal["fan_in", "gpt2"] = "fan_in"

    def matrix(self, fan_in: int, *, residual_layers: int = 0) -> Initializer:
        scale = 1.0 / math.sqrt(2 * residual_layers) if residual_layers else 1.0
        if self.scheme == "gpt2":
            return nn.initializers.normal(0.02 * scale)
        return truncated_normal(scale / math.sqrt(fan_in))

    def embedding(self, d_model: int) -> Initializer:
        return nn.initializers.normal(0.02 if self.scheme == "gpt2" else 1.0 / math.sqrt(d_model))


def truncated_normal(stddev: float) -> Initializer:
    """Normal cut at two deviations, rescaled so that ``stddev`` is that of the draws."""
    return nn.initializers.truncated_normal(stddev / 0.87962566103423978)


def param(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: Axes, dtype: str) -> Array:
    """A parameter with its logical axes recorded beside it."""
    boxed = nn.with_logical_partitioning(init, axes)
    return module.param(name, boxed, shape, jnp.dtype(dtype))


class Linear(nn.Module):
    """A matrix product: contracts the last ``len(in_shape)`` dimensions of x, and adds a bias where there is one.

    x [..., *in_shape], w [*in_shape, *out_shape], b [*out_shape] -> [..., *out_shape], in the compute dtype.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: Axes
    initializer: Initializer
    precision: Precision
    platform: str = "cpu"
    taken: tuple[str, ...] = ()
    bias: bool = False

    def setup(self) -> None:
        self.w = param(self, "w", self.initializer, self.in_shape + self.out_shape, self.axes, self.precision.params)
        if self.bias:
            axes = tuple("norm" if name == "embed" else name for name in self.axes[len(self.in_shape) :])
            self.b = param(self, "b", nn.initializers.zeros, self.out_shape, axes, self.precision.params)

    def __call__(self, x: Array) -> Array:
        return project(x, self)[0]


def project(x: Array, *layers: Linear) -> list[Array]:
    """What each of several layers of one kind makes of one input, together."""
    first = layers[0]
    dtype = jnp.dtype(first.precision.compute)
    weights = [layer.w.astype(dtype) for layer in layers]
    axes = [layer.axes for layer in layers]
    contract = len(first.in_shape)
    found = sharded.linear(
        x.astype(dtype), weights, axes, contract=contract, platform=first.platform, taken=first.taken
    )
    found = [checkpoint_name(y, PRODUCT) for y in found]
    return [
        y + along_last(layer.b.astype(dtype), y) if layer.bias else y for y, layer in zip(found, layers, strict=True)
    ]


def along_last(x: Array, like: Array) -> Array:
    """x [*last] with leading dimensions of size 1, to go with an array [..., *last]."""
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)


@dataclass(frozen=True)
class Build:
    """What every part of a model is built with.

    taken: mesh axes that a ``vmap`` around it has taken. keep: whether products may be kept for the backward pass.
    position: the model's, for attention that has none of its own; rotaries: the kinds of rotary positions in use, each
    with the width of the heads that it turns, in the order of ``Tokens.rotary``.
    """

    d_model: int
    num_layers: int
    weight_init: WeightInit
    precision: Precision
    platform: str = "cpu"
    taken: tuple[str, ...] = ()
    keep: bool = True
    position: Position | None = None
    rotaries: tuple[tuple[Rotary, int], ...] = ()

    def linear(
        self,
        name: str,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axes: Axes,
        *,
        residual: bool = False,
        bias: bool = False,
    ) -> Linear:
        """residual: it writes into the residual stream, and is drawn smaller for it."""
        init = self.weight_init.matrix(math.prod(in_shape), residual_layers=self.num_layers if residual else 0)
        return Linear(in_shape, out_shape, axes, init, self.precision, self.platform, self.taken, bias, name=name)


@dataclass(frozen=True)
class Norm:
    """Normalisation of the hidden state, statistics in float32.

    kind "rms": x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich 2019).
    kind "layer": (x - mean) / sqrt(var + eps) * scale + bias (Ba et al. 2016); the bias may be left out.
    offset: added to the parameter to give the scale: 1 stores Gemma's (1 + w), so that decay draws the scale to 1.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bias: bool = True

    @property
    def has_bias(self) -> bool:
        return self.kind == "layer" and self.bias

    def build(self, d_model: int, precision: Precision, **kwargs: Any) -> nn.Module:
        return _Norm(config=self, d_model=d_model, precision=precision, **kwargs)


class _Norm(nn.Module):
    config: Norm
    d_model: int
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D], which may be heads [B, T, N, H]."""
        config, shape, dtype = self.config, (self.d_model,), self.precision.params
        init = nn.initializers.constant(1.0 - config.offset)
        scale_D = param(self, "scale", init, shape, ("norm",), dtype).astype(jnp.float32) + config.offset
        y = x.astype(jnp.float32)
        if config.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.eps)
        y = y * along_last(scale_D, y)
        if config.has_bias:
            bias_D = param(self, "bias", nn.initializers.zeros, shape, ("norm",), dtype)
            y = y + along_last(bias_D.astype(jnp.float32), y)
        return y.astype(self.precision.compute)


class Embedding(nn.Module):
    """A table of vectors: ids [B, T] -> [B, T, D] in the compute dtype. Its table may serve as a tied head."""

    rows: int
    d_model: int
    axes: Axes
    initializer: Initializer
    precision: Precision

    def setup(self) -> None:
        self.table_VD = param(
            self, "table", self.initializer, (self.rows, self.d_model), self.axes, self.precision.params
        )

    def __call__(self, ids_BT: Array) -> Array:
        return sharded.lookup(self.table_VD, self.axes, ids_BT, self.precision.compute)
