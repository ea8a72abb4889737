# SPDX-License-Identifier: Apache-2.0
"""Self-attention: multi-head (MHA), grouped-query (GQA; Ainslie et al. 2023) and multi-query (MQA; Shazeer 2019)."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from research.core.sharding import constrain
from research.core.types import Array, UserError
from research.models import ops
from research.models.cache import LayerCache, append
from research.models.layers import Build, Linear, project
from research.models.positions import rotate
from research.models.tokens import Tokens


@dataclass(frozen=True)
class Attention:
    """num_kv_heads: None is one for each head (MHA), 1 is MQA. head_dim: None is d_model / num_heads."""

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int = 0
    implementation: ops.AttentionImplementation = "auto"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_heads", self.num_heads, 1),
            ("num_kv_heads", self.num_kv_heads, 1),
            ("head_dim", self.head_dim, 1),
            ("window", self.window, 0),
        ):
            if value is not None and value < least:
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

    def build(self, build: Build) -> nn.Module:
        return _Attention(self, build, name="attention")


class _Attention(nn.Module):
    config: Attention
    build: Build

    @nn.compact
    def __call__(self, x_BTD: Array, tokens: Tokens, cache: LayerCache | None) -> tuple[Array, LayerCache | None]:
        config, d_model = self.config, self.build.d_model
        head_dim = config.width(d_model)

        def head(name: str, heads: int, axis: str) -> Linear:
            return self.build.linear(name, (d_model,), (heads, head_dim), ("embed", axis, "head_dim"))

        q = head("q", config.num_heads, "heads")
        k, v = (head(name, config.kv_heads, "kv_heads") for name in "kv")
        heads = [constrain(y, "batch", "sequence", "act_heads", None) for y in project(x_BTD, q, k, v)]
        q_BTNH, k_BTKH, v_BTKH = heads[0] * head_dim**-0.5, *heads[1:]  # eq. 1's scale, fused with the rotation
        if tokens.rotary is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, tokens.rotary), rotate(k_BTKH, tokens.rotary)
        kv_positions, kv_segments = tokens.positions, tokens.segments
        if cache is not None and tokens.length is not None:
            cache = append(cache, k_BTKH, v_BTKH, tokens.length)
            k_BTKH, v_BTKH = cache.k.astype(q_BTNH.dtype), cache.v.astype(q_BTNH.dtype)
            slots_BS = jnp.broadcast_to(jnp.arange(cache.k.shape[1])[None, :], cache.k.shape[:2])
            kv_positions = slots_BS
            kv_segments = (slots_BS < (tokens.length + x_BTD.shape[1])[:, None]).astype(jnp.int32)
        out_BTNH = ops.attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            q_positions=tokens.positions,
            kv_positions=kv_positions,
            q_segments=tokens.segments,
            kv_segments=kv_segments,
            visibility=ops.Visibility("causal", config.window),
            aligned=cache is None,
            implementation=config.implementation,
            platform=self.build.platform,
        )
        axes = ("heads", "head_dim", "embed")
        return self.build.linear("out", (config.num_heads, head_dim), (d_model,), axes, residual=True)(out_BTNH), cache
