# SPDX-License-Identifier: Apache-2.0
"""The residual stack: one pre-norm block, scanned over layers, with a choice of what to recompute."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.core.sharding import constrain
from research.core.types import Array, Params
from research.models.attention import Attention
from research.models.cache import LayerCache
from research.models.layers import PRODUCT, Build, Norm
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.pipeline import WEIGHTS, Layer
from research.models.tokens import Tokens

Remat = Literal["none", "full", "save_matmuls", "save_weight_matmuls"]
_policies = jax.checkpoint_policies
_by_weights = _policies.save_only_these_names(PRODUCT)
POLICIES: dict[str, Any] = {
    "full": _policies.nothing_saveable,
    "save_matmuls": _policies.save_from_both_policies(_policies.dots_saveable, _by_weights),
    "save_weight_matmuls": _by_weights,
}


def stage_policy(remat: Remat) -> Any:
    """The same choice for a pipeline's stages, whose weights are never kept for a tick."""
    return _policies.save_anything_except_these_names(WEIGHTS) if remat == "none" else POLICIES[remat]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Xiong et al. 2020, pre-norm)."""

    attention: Attention
    mlp: Mlp | Moe
    norm: Norm
    build: Build

    @nn.compact
    def __call__(
        self, x_BTD: Array, cache: LayerCache | None, index: Array, tokens: Tokens
    ) -> tuple[Array, tuple[LayerCache | None, Params]]:
        def norm(name: str) -> nn.Module:
            return self.norm.build(self.build.d_model, self.build.precision, name=name)

        if tokens.key is not None:
            tokens = tokens._replace(key=jax.random.fold_in(tokens.key, index))
        y_BTD, cache = self.attention.build(self.build)(norm("attention_norm")(x_BTD), tokens, cache)
        x_BTD = constrain(x_BTD + y_BTD, "batch", "residual_sequence", "act_embed")
        y_BTD, found = self.mlp.build(self.build)(norm("mlp_norm")(x_BTD), tokens)
        return constrain(x_BTD + y_BTD, "batch", "residual_sequence", "act_embed"), (cache, found)


class Period(nn.Module):
    """Blocks that differ in their feed-forward, one after the other: what a mixed stack repeats."""

    blocks: tuple[Mlp | Moe, ...]
    shared: tuple[Attention, Norm, Build]
    remat: Remat
    prevent_cse: bool

    @nn.compact
    def __call__(
        self, x_BTD: Array, cache: LayerCache | None, index: Array, tokens: Tokens
    ) -> tuple[Array, tuple[LayerCache | None, Params]]:
        attention, norm, build = self.shared
        block, caches, found = rematerialised(self.remat, self.prevent_cse), [], {}
        for place, mlp in enumerate(self.blocks):
            mine = jax.tree.map(lambda x, place=place: x[place], cache)
            layer = block(attention, mlp, norm, build, name=block_name(place))
            x_BTD, (mine, found[block_name(place)]) = layer(x_BTD, mine, index + place, tokens)
            caches.append(mine)
        return x_BTD, (None if cache is None else jax.tree.map(lambda *x: jnp.stack(x), *caches), found)


def block_name(place: int) -> str:
    return f"block{place}"


def rematerialised(remat: Remat, prevent_cse: bool) -> Any:
    """``Block`` with a choice of what its backward pass recomputes."""
    return Block if remat == "none" else nn.remat(Block, policy=POLICIES[remat], prevent_cse=prevent_cse)


def stack(
    *,
    mlps: tuple[Mlp | Moe, ...],
    repeats: int,
    attention: Attention,
    norm: Norm,
    build: Build,
    layers: Literal["scanned", "unrolled"],
    remat: Remat,
) -> nn.Module:
    """A block for each of ``mlps``, the whole repeated: parameters [repeats, ...] whether scanned or unrolled.

    Called with (x [B, T, D], caches [repeats, ...] or None, layer indices [repeats], tokens) -> (x, (caches, router
    statistics [repeats, ...])). A single kind of block stands under its own names, several under block0, block1, ...
    """
    unrolled = layers == "unrolled"
    body, fields = _body(mlps, attention, norm, build, remat, prevent_cse=unrolled)
    return nn.scan(
        body,
        variable_axes={"params": 0, "buffers": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast),
        length=repeats,
        unroll=repeats if unrolled else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(**fields)


def one_of(mlps: tuple[Mlp | Moe, ...], attention: Attention, norm: Norm, build: Build) -> Layer:
    """One repetition of a stack as a function of its parameters and buffers, that recomputes nothing by itself."""
    body, fields = _body(mlps, attention, norm, build, "none", prevent_cse=False)
    module = body(**fields, parent=None)

    def layer(params: Params, buffers: Params, x_BTD: Array, index: Array, tokens: Tokens) -> tuple[Array, Params]:
        x_BTD, (_, found) = module.apply({"params": params, "buffers": buffers}, x_BTD, None, index, tokens)
        return x_BTD, found

    return layer


def _body(
    mlps: tuple[Mlp | Moe, ...], attention: Attention, norm: Norm, build: Build, remat: Remat, *, prevent_cse: bool
) -> tuple[Any, dict[str, Any]]:
    """The module that a stack repeats, and its fields."""
    if len(mlps) == 1:
        return rematerialised(remat, prevent_cse), dict(attention=attention, mlp=mlps[0], norm=norm, build=build)
    return Period, dict(blocks=mlps, shared=(attention, norm, build), remat=remat, prevent_cse=prevent_cse)
