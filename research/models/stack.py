# SPDX-License-Identifier: Apache-2.0
"""The residual stack: blocks of attention and feed-forward, scanned over layers, with a choice of what to recompute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax

from research.core.sharding import constrain
from research.core.types import Array, Params
from research.models.attention import Attention
from research.models.latent_attention import LatentAttention
from research.models.layers import PRODUCT, Build, Norm
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.pipeline import WEIGHTS
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


AttentionKind = Attention | LatentAttention
Kind = tuple[AttentionKind, Mlp | Moe]  # of a layer
Carry = tuple[Array, Any]  # hidden states [B, T, D], and the caches of the stack by block, or None


@dataclass(frozen=True)
class Wiring:
    """How blocks are put together.

    residual "sequential": x + attention(norm(x)), then x + mlp(norm(x)) (Xiong et al. 2020, pre-norm). "parallel": both
        read x, each through its norm (GPT-NeoX); "parallel_shared": through one norm (PaLM).
    norms "pre", or "sandwich": what a sublayer gives is normalised too (Ding et al. 2021, CogView; Gemma 2).
    """

    norm: Norm
    residual: Literal["sequential", "parallel", "parallel_shared"] = "sequential"
    norms: Literal["pre", "sandwich"] = "pre"


class Block(nn.Module):
    """One layer: attention and a feed-forward around the residual stream."""

    kind: Kind
    wiring: Wiring
    build: Build

    @nn.compact
    def __call__(self, carry: Carry, index: Array, place: Array, tokens: Tokens) -> tuple[Carry, Params]:
        """index: which layer of the model it is; place: which of the stack's repetitions."""
        (x_BTD, cache), (attention, mlp), wiring = carry, self.kind, self.wiring

        def norm(name: str, x_BTD: Array) -> Array:
            return wiring.norm.build(self.build.d_model, self.build.precision, name=name)(x_BTD)

        def after(name: str, y_BTD: Array) -> Array:
            return norm(name, y_BTD) if wiring.norms == "sandwich" else y_BTD

        def add(x_BTD: Array, y_BTD: Array) -> Array:
            return constrain(x_BTD + y_BTD, "batch", "residual_sequence", "act_embed")

        if tokens.key is not None:
            tokens = tokens._replace(key=jax.random.fold_in(tokens.key, index))
        given_BTD = norm("attention_norm", x_BTD)
        y_BTD, cache = attention.build(self.build)(given_BTD, tokens, cache, place)
        y_BTD = after("post_attention_norm", y_BTD)
        if wiring.residual == "sequential":
            x_BTD = add(x_BTD, y_BTD)
        if wiring.residual != "parallel_shared":
            given_BTD = norm("mlp_norm", x_BTD)
        z_BTD, found = mlp.build(self.build)(given_BTD, tokens)
        z_BTD = after("post_mlp_norm", z_BTD)
        if wiring.residual != "sequential":
            z_BTD = y_BTD + z_BTD
        return (add(x_BTD, z_BTD), cache), found


class Period(nn.Module):
    """Blocks of several kinds, one after the other: what a mixed stack repeats."""

    kinds: tuple[Kind, ...]
    wiring: Wiring
    build: Build
    remat: Remat
    prevent_cse: bool

    @nn.compact
    def __call__(self, carry: Carry, index: Array, place: Array, tokens: Tokens) -> tuple[Carry, Params]:
        block, found = rematerialised(self.remat, self.prevent_cse), {}
        x_BTD, cache = carry
        for number, kind in enumerate(self.kinds):
            name = block_name(number)
            layer = block(kind, self.wiring, self.build, name=name)
            mine = None if cache is None else cache[name]
            (x_BTD, mine), found[name] = layer((x_BTD, mine), index + number, place, tokens)
            cache = None if cache is None else {**cache, name: mine}
        return (x_BTD, cache), found


def block_name(number: int) -> str:
    return f"block{number}"


def by_block(kinds: Sequence[Any]) -> dict[tuple[str, ...], Any]:
    """What stands for each kind of layer in a stack, by its path in trees of parameters, statistics or caches."""
    return {(): kinds[0]} if len(kinds) == 1 else {(block_name(i),): kind for i, kind in enumerate(kinds)}


def rematerialised(remat: Remat, prevent_cse: bool) -> Any:
    """``Block`` with a choice of what its backward pass recomputes."""
    return Block if remat == "none" else nn.remat(Block, policy=POLICIES[remat], prevent_cse=prevent_cse)


def stack(
    *,
    kinds: tuple[Kind, ...],
    repeats: int,
    wiring: Wiring,
    build: Build,
    layers: Literal["scanned", "unrolled"],
    remat: Remat,
) -> nn.Module:
    """A block for each of ``kinds``, the whole repeated: parameters [repeats, ...] whether scanned or unrolled.

    Called with ((x [B, T, D], caches or None), layer indices [repeats], 0 to repeats - 1, tokens) -> ((x, caches),
    router statistics [repeats, ...]). A single kind of block stands under its own names, several under block0, block1.
    Caches are carried, not scanned: a layer writes its few new tokens in place.
    """
    unrolled = layers == "unrolled"
    body, fields = _body(kinds, wiring, build, remat, prevent_cse=unrolled)
    return nn.scan(
        body,
        variable_axes={"params": 0, "buffers": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast),
        length=repeats,
        unroll=repeats if unrolled else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(**fields)


def one_of(kinds: tuple[Kind, ...], wiring: Wiring, build: Build) -> Callable[..., tuple[Carry, Params]]:
    """One repetition of a stack as a function of its parameters and buffers, a carry whose caches are of this one
    repetition, the layer's index and tokens. It recomputes nothing by itself."""
    body, fields = _body(kinds, wiring, build, "none", prevent_cse=False)
    module = body(**fields, parent=None)

    def layer(params: Params, buffers: Params, carry: Carry, index: Any, tokens: Tokens) -> tuple[Carry, Params]:
        return module.apply({"params": params, "buffers": buffers}, carry, index, 0, tokens)

    return layer


def _body(
    kinds: tuple[Kind, ...], wiring: Wiring, build: Build, remat: Remat, *, prevent_cse: bool
) -> tuple[Any, dict[str, Any]]:
    """The module that a stack repeats, and its fields."""
    fields: dict[str, Any] = dict(wiring=wiring, build=build)
    if len(kinds) == 1:
        return rematerialised(remat, prevent_cse), dict(kind=kinds[0], **fields)
    return Period, dict(kinds=kinds, remat=remat, prevent_cse=prevent_cse, **fields)
