# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (MLA): keys and values of all heads are made of one small vector of each token, which is
all that a cache holds besides one rotated key (DeepSeek-V2, 2024, section 2.1)."""

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from research.core.sharding import constrain
from research.core.types import Array, UserError
from research.models import cache as caches
from research.models import ops
from research.models.cache import Keys, LayerCache
from research.models.layers import Build, Norm, project
from research.models.positions import Position, Rotary, rotate
from research.models.tokens import Tokens


@dataclass(frozen=True)
class LatentAttention:
    """kv_rank: width of the vector that keys and values are made of (d_c in the paper); q_rank: of that for queries
    (d_c'), 0 for queries straight from the hidden state (V2-Lite).

    A head's query and key have ``nope_dim`` dimensions without and ``rope_dim`` with rotary positions, of which the
    key's are the same for all heads; its value has ``v_dim``. scale: of the scores; None is 1 / sqrt(nope_dim +
    rope_dim).
    norm: of both small vectors. position: rotary, where it is not the model's.

    A cache holds the small vector as its keys and the rotated key as its values, one head of each. Tokens that follow
    look at these: what makes keys of small vectors is applied to the queries instead, and what makes values to the
    result (the paper's appendix C, "absorbed").
    """

    num_heads: int
    kv_rank: int = 512
    q_rank: int = 1536
    nope_dim: int = 128
    rope_dim: int = 64
    v_dim: int = 128
    norm: Norm = field(default_factory=Norm)
    scale: float | None = None
    position: Position | None = None
    implementation: ops.AttentionImplementation = "auto"
    window: ClassVar[int] = 0
    first_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for name in ("num_heads", "kv_rank", "nope_dim", "rope_dim", "v_dim", "q_rank"):
            least = 0 if name == "q_rank" else 1
            if getattr(self, name) < least:
                raise UserError(f"attention.{name} is {getattr(self, name)}: it must be at least {least}.")

    @property
    def kv_heads(self) -> int:
        """As many as heads where keys are formed; a cache has one."""
        return self.num_heads

    def width(self, d_model: int) -> int:
        del d_model
        return self.nope_dim + self.rope_dim

    def turned(self, d_model: int) -> int:
        del d_model
        return self.rope_dim

    def stored(self, d_model: int) -> tuple[int, tuple[int, int]]:
        del d_model
        return 1, (self.kv_rank, self.rope_dim)

    def build(self, build: Build) -> nn.Module:
        return _LatentAttention(self, build, name="attention")


class _LatentAttention(nn.Module):
    config: LatentAttention
    build: Build

    @nn.compact
    def __call__(
        self, x_BTD: Array, tokens: Tokens, cache: LayerCache | None, place: Array
    ) -> tuple[Array, LayerCache | None]:
        config, build = self.config, self.build
        position = config.position or build.position
        if not isinstance(position, Rotary):
            raise UserError(f"Latent attention needs rotary positions; given {position!r}.")
        tables = tokens.rotary[build.rotaries.index((position, config.rope_dim))]
        q_BTNH, latent_BTR, turned_BTH = self._projected(x_BTD)
        scale = config.scale if config.scale is not None else config.width(build.d_model) ** -0.5
        q_BTNH = q_BTNH * (scale * position.score_factor)
        q_nope_BTNH, q_rope_BTNH = jnp.split(q_BTNH, [config.nope_dim], axis=-1)
        q_rope_BTNH = rotate(q_rope_BTNH, tables)
        turned_BT1H = rotate(turned_BTH[:, :, None], tables)
        latent_BT1R = latent_BTR[:, :, None]
        keys = Keys(latent_BT1R, turned_BT1H, tokens.positions, tokens.segments, aligned=True)
        if cache is not None:
            cache, keys = caches.extended(cache, place, latent_BT1R, turned_BT1H, tokens, window=0)
        up = dict(in_shape=(config.kv_rank,), axes=("embed", "heads", "head_dim"))
        k_up = build.linear("k_up", out_shape=(config.num_heads, config.nope_dim), **up)
        v_up = build.linear("v_up", out_shape=(config.num_heads, config.v_dim), **up)
        attend = functools.partial(
            ops.attention,
            q_positions=tokens.positions,
            kv_positions=keys.positions,
            q_segments=tokens.segments,
            kv_segments=keys.segments,
            aligned=keys.aligned,
            implementation=config.implementation if keys.aligned else "plain",
            platform=build.platform,
        )
        if keys.aligned:
            k_BTNH, v_BTNH = (
                constrain(y, "batch", "sequence", "act_heads", None) for y in project(latent_BTR, k_up, v_up)
            )
            shape = (*k_BTNH.shape[:3], config.rope_dim)
            k_BTNH = jnp.concatenate([k_BTNH, jnp.broadcast_to(turned_BT1H, shape)], axis=-1)
            q_BTNH = jnp.concatenate([q_nope_BTNH, q_rope_BTNH], axis=-1)
            out_BTNH = attend(q_BTNH, k_BTNH, v_BTNH)
        else:
            dtype = q_BTNH.dtype
            latent_BSR, turned_BSH = _numbers(keys, dtype)
            q_BTNR = jnp.einsum("BTNH,RNH->BTNR", q_nope_BTNH, k_up.w.astype(dtype))
            q_BTNH = jnp.concatenate([q_BTNR, q_rope_BTNH], axis=-1)
            out_BTNR = attend(q_BTNH, jnp.concatenate([latent_BSR, turned_BSH], axis=-1), latent_BSR)
            out_BTNH = jnp.einsum("BTNR,RNH->BTNH", out_BTNR, v_up.w.astype(dtype))
        axes, shape = ("heads", "head_dim", "embed"), (config.num_heads, config.v_dim)
        return build.linear("out", shape, (build.d_model,), axes, residual=True)(out_BTNH), cache

    def _projected(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H], the normalised small vector [B, T, R] and the key to be rotated [B, T, H]."""
        config, build = self.config, self.build
        norm = functools.partial(config.norm.build, precision=build.precision)
        down = dict(in_shape=(build.d_model,), axes=("embed", "latent"))
        heads = dict(out_shape=(config.num_heads, config.width(build.d_model)), axes=("embed", "heads", "head_dim"))
        small = [
            build.linear("kv_down", out_shape=(config.kv_rank,), **down),
            build.linear("k_rope", out_shape=(config.rope_dim,), **down),
        ]
        if config.q_rank:
            small.append(build.linear("q_down", out_shape=(config.q_rank,), **down))
        latent, turned, *rest = project(x_BTD, *small)
        if config.q_rank:
            given = norm(config.q_rank, name="q_norm")(rest[0])
            q_BTNH = build.linear("q_up", in_shape=(config.q_rank,), **heads)(given)
        else:
            q_BTNH = build.linear("q", in_shape=(build.d_model,), **heads)(x_BTD)
        q_BTNH = constrain(q_BTNH, "batch", "sequence", "act_heads", None)
        return q_BTNH, norm(config.kv_rank, name="kv_norm")(latent), turned


def _numbers(keys: Keys, dtype: jnp.dtype) -> list[Array]:
    """Small vectors and rotated keys in the dtype of products, whatever a cache stores."""
    found = keys.k, keys.v
    if keys.scales is not None:
        found = tuple(x * scale[..., None] for x, scale in zip(found, keys.scales, strict=True))
    return [x.astype(dtype) for x in found]
