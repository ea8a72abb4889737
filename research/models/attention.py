# SPDX-License-Identifier: Apache-2.0
"""Self-attention: multi-head (MHA), grouped-query (GQA; Ainslie et al. 2023) and multi-query (MQA; Shazeer 2019)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from research.core.sharding import constrain
from research.core.types import Array, Precision, UserError
from research.models import cache as caches
from research.models import ops, positions
from research.models.cache import LayerCache
from research.models.layers import Build, Linear, Norm, along_last, param, project
from research.models.positions import Alibi, Position, RelativeBias, Rotary, TransformerXL, rotate
from research.models.tokens import Tokens


@dataclass(frozen=True)
class Attention:
    """num_kv_heads: None is one for each head (MHA), 1 is MQA. head_dim: None is d_model / num_heads.

    window: how many positions back a query sees, its own included (0: all); first_tokens: seen besides, from
        everywhere (Xiao et al. 2023, StreamingLLM).
    bias: of the projections of queries, keys and values ("qkv"), and of the one back too ("all").
    qk_norm: normalises each head's queries and keys (Henry et al. 2020; Qwen3, Gemma 3).
    scale: of the scores; None is 1 / sqrt(head_dim). cap: they become cap tanh(score / cap) (Gemma 2).
    clip: queries, keys and values are cut off there (DBRX); 0 for not at all.
    sinks: "learned" is a logit for each head that takes a share of the softmax and gives nothing (gpt-oss, 2025).
    position: where it is not the model's: local and global layers may turn at different rates (Gemma 3).
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int = 0
    implementation: ops.AttentionImplementation = "auto"
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: Norm | None = None
    scale: float | None = None
    cap: float = 0.0
    clip: float = 0.0
    sinks: Literal["none", "learned"] = "none"
    first_tokens: int = 0
    position: Position | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_heads", self.num_heads, 1),
            ("num_kv_heads", self.num_kv_heads, 1),
            ("head_dim", self.head_dim, 1),
            ("window", self.window, 0),
            ("cap", self.cap, 0),
            ("clip", self.clip, 0),
            ("first_tokens", self.first_tokens, 0),
        ):
            if value is not None and not value >= least:
                raise UserError(f"attention.{name} is {value}: it must be at least {least}.")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def width(self, d_model: int) -> int:
        """The width of one head. Raises UserError where heads do not divide."""
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"{self.num_heads} heads cannot share {self.kv_heads} kv heads evenly: choose num_kv_heads "
                f"among the divisors of {self.num_heads}."
            )
        if self.head_dim is None and d_model % self.num_heads:
            raise UserError(
                f"d_model {d_model} does not split into {self.num_heads} heads: choose num_heads among its "
                "divisors or set head_dim."
            )
        return self.head_dim or d_model // self.num_heads

    def turned(self, d_model: int) -> int:
        """The width of what rotary positions may turn."""
        return self.width(d_model)

    def stored(self, d_model: int) -> tuple[int, tuple[int, int]]:
        """What a cache holds of a token: heads, and the widths of keys and of values."""
        return self.kv_heads, (self.width(d_model),) * 2

    def build(self, build: Build) -> nn.Module:
        return _Attention(self, build, name="attention")


class _Attention(nn.Module):
    config: Attention
    build: Build

    @nn.compact
    def __call__(
        self, x_BTD: Array, tokens: Tokens, cache: LayerCache | None, place: Array
    ) -> tuple[Array, LayerCache | None]:
        config, position = self.config, self.config.position or self.build.position
        q_BTNH, k_BTKH, v_BTKH = self._projected(x_BTD)
        scale = config.scale if config.scale is not None else q_BTNH.shape[-1] ** -0.5  # that of eq. 1
        if isinstance(position, Rotary):
            tables = tokens.rotary[self.build.rotaries.index((position, q_BTNH.shape[-1]))]
            q_BTNH = rotate(q_BTNH * (scale * position.score_factor), tables)  # scaling is fused with the rotation
            k_BTKH = rotate(k_BTKH, tables)
        elif isinstance(position, TransformerXL):
            u_NH, v_NH = (self._vector(name, (config.num_heads, q_BTNH.shape[-1])) for name in ("u", "v_bias"))
            q_BTNH, from_v_BTNH = ((q_BTNH + along_last(x, q_BTNH)) * scale for x in (u_NH, v_NH))
        else:
            q_BTNH = q_BTNH * scale
        keys = caches.Keys(k_BTKH, v_BTKH, tokens.positions, tokens.segments, aligned=True)
        if cache is not None:
            cache, keys = caches.extended(cache, place, k_BTKH, v_BTKH, tokens, window=config.window)
        bias = self._bias(position, tokens)
        if isinstance(position, TransformerXL):
            bias = self._relative(position, from_v_BTNH, keys.k.shape[1])
        sinks = self._vector("sinks", (config.num_heads,)) if config.sinks == "learned" else None
        out_BTNH = ops.attention(
            q_BTNH,
            keys.k,
            keys.v,
            q_positions=tokens.positions,
            kv_positions=keys.positions,
            q_segments=tokens.segments,
            kv_segments=keys.segments,
            visibility=ops.Visibility("causal", config.window, config.first_tokens),
            bias=bias,
            cap=config.cap,
            sinks=sinks,
            kv_scales=keys.scales,
            aligned=keys.aligned,
            implementation=config.implementation,
            platform=self.build.platform,
        )
        axes, shape = ("heads", "head_dim", "embed"), (config.num_heads, q_BTNH.shape[-1])
        out = self.build.linear("out", shape, (x_BTD.shape[-1],), axes, residual=True, bias=config.bias == "all")
        return out(out_BTNH), cache

    def _projected(self, x_BTD: Array) -> list[Array]:
        """Queries, keys and values of each head, clipped and normalised where asked for."""
        config, d_model = self.config, self.build.d_model
        head_dim = config.width(d_model)

        def head(name: str, heads: int, axis: str) -> Linear:
            axes = ("embed", axis, "head_dim")
            return self.build.linear(name, (d_model,), (heads, head_dim), axes, bias=config.bias != "none")

        q = head("q", config.num_heads, "heads")
        k, v = (head(name, config.kv_heads, "kv_heads") for name in "kv")
        found = [constrain(y, "batch", "sequence", "act_heads", None) for y in project(x_BTD, q, k, v)]
        if config.clip:
            found = [jnp.clip(y, -config.clip, config.clip) for y in found]
        if config.qk_norm is not None:
            norm = functools.partial(config.qk_norm.build, head_dim, self.build.precision)
            found = [norm(name="q_norm")(found[0]), norm(name="k_norm")(found[1]), found[2]]
        return found

    def _vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """A parameter of each head, zero at first."""
        axes = ("heads", "head_dim")[: len(shape)]
        found = param(self, name, nn.initializers.zeros, shape, axes, self.build.precision.params)
        return found.astype(self.build.precision.compute)

    def _bias(self, position: Position | None, tokens: Tokens) -> Callable[[Array, Array], Array] | None:
        """What positions add to the scores, as a function of the places of queries and keys."""
        if isinstance(position, Alibi):
            return functools.partial(positions.alibi_bias, position, self.config.num_heads)
        if isinstance(position, RelativeBias):
            table_KN = tokens.relative
            if position.per_layer:
                table_KN = RelativeTable(position, self.config.num_heads, self.build.precision, name="relative_bias")()
            return functools.partial(positions.relative_bias, position, table_KN)
        return None

    def _relative(self, position: TransformerXL, q_BTNH: Array, reach: int) -> Callable[[Array, Array], Array]:
        """The scores of the queries with the distances below ``reach``."""
        d_model, shape = self.build.d_model, q_BTNH.shape[2:]
        waves_RD = positions.sinusoids(jnp.arange(reach), d_model, position.max_period)
        project_r = self.build.linear("relative", (d_model,), shape, ("embed", "heads", "head_dim"))
        r_RNH = project_r(waves_RD[None])[0]
        return functools.partial(positions.relative_scores, q_BTNH, r_RNH)


class RelativeTable(nn.Module):
    """Biases of the scores by bucket of distance and head [buckets, N]."""

    config: RelativeBias
    num_heads: int
    precision: Precision

    @nn.compact
    def __call__(self) -> Array:
        shape, axes = (self.config.buckets, self.num_heads), ("position", "heads")
        return param(self, "table", nn.initializers.zeros, shape, axes, self.precision.params)
