# SPDX-License-Identifier: Apache-2.0
"""The key-value cache: an argument and a result of the forward pass, with a length per row.

A cache is rolled back by lowering ``length``; slots beyond it are seen by nobody and overwritten next. A ring has fewer
slots than tokens, for layers that see a window: it can be rolled back by no more than its slack.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from research.core.sharding import constrain
from research.core.types import Array, UserError
from research.models import ring_attention
from research.models.tokens import Tokens

INT8_MAX = 127.0


@dataclass(frozen=True)
class CacheSpec:
    """How caches are stored. dtype: "compute" is that of the model's products; "int8" has a scale for each token and
    head. windows: layers with a window keep all tokens ("full") or the last ones ("ring"), those of the window and
    ``slack`` more, so that a ring may be rolled back by so many."""

    dtype: Literal["compute", "float32", "bfloat16", "int8"] = "compute"
    windows: Literal["full", "ring"] = "full"
    slack: int = 0

    def __post_init__(self) -> None:
        if self.slack < 0:
            raise UserError(f"A cache's slack is {self.slack}: it must be at least 0.")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v", "k_scale", "v_scale"),
    meta_fields=("wraps", "first_tokens", "fresh"),
)
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of a stack of layers alike: k [L, B, K, S, H], v [L, B, K, S, X], and for int8 their scales
    [L, B, K, S] in float32. Heads come before slots: the other way round each product would first turn the whole
    cache, which on a CPU takes four times as long as the product.

    wraps: a ring, of which the slots of the ``first_tokens`` are never given to others. fresh: nothing has been
    written, so that the tokens in hand see each other alone.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None
    wraps: bool = field(default=False)
    first_tokens: int = field(default=0)
    fresh: bool = field(default=False)


class Cache(NamedTuple):
    """The layers' caches by stack, as the parameters are, or a tuple with one for each repetition of a stack; and the
    number of tokens written of each row [B]."""

    layers: Mapping[str, Any]
    length: Array


class Keys(NamedTuple):
    """What queries look at: k [B, S, K, H] and v [B, S, K, X], scales [B, S, K] of whole numbers, places [B, S].
    aligned: they are the keys of the queries' own tokens, slot by slot."""

    k: Array
    v: Array
    positions: Array
    segments: Array
    scales: tuple[Array, Array] | None = None
    aligned: bool = False


def empty(
    spec: CacheSpec,
    *,
    layers: int,
    batch: int,
    slots: int,
    heads: int,
    widths: tuple[int, int],
    window: int,
    first_tokens: int,
    compute: str,
) -> LayerCache:
    """Of a stack of layers with so many kv heads, of these widths of keys and of values."""
    ring = window + first_tokens + spec.slack
    wraps = spec.windows == "ring" and bool(window) and ring < slots
    shape, axes = (layers, batch, heads, ring if wraps else slots), (None, "batch", "act_heads", None)
    dtype = compute if spec.dtype == "compute" else spec.dtype
    k, v = (constrain(jnp.zeros((*shape, width), dtype), *axes, None) for width in widths)
    scales: list[Array | None] = [None, None]
    if spec.dtype == "int8":
        scales = [constrain(jnp.zeros(shape, jnp.float32), *axes) for _ in range(2)]
    return LayerCache(k, v, *scales, wraps=wraps, first_tokens=first_tokens if wraps else 0, fresh=True)


def used(layers: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same caches, no longer fresh."""
    is_cache = lambda x: isinstance(x, LayerCache)  # noqa: E731
    return jax.tree.map(lambda cache: replace(cache, fresh=False), layers, is_leaf=is_cache)


def extended(
    cache: LayerCache, place: Array, k_BTKH: Array, v_BTKX: Array, tokens: Tokens, *, window: int
) -> tuple[LayerCache, Keys]:
    """Layer ``place`` with the tokens in hand written behind its own, and what their queries look at.

    Of the tokens of a row the real ones (segment above 0) come first; the others are not written.
    """
    in_order = not ring_attention.applies(
        k_BTKH.shape[1]
    )  # a ring takes tokens in its own order, which a cache's are not
    new = Keys(k_BTKH, v_BTKX, tokens.positions, tokens.segments, aligned=in_order)
    if cache.fresh:
        return write(cache, place, k_BTKH, v_BTKX, tokens), new
    slots, count = cache.k.shape[3], k_BTKH.shape[1]
    if not cache.wraps or count <= slots - cache.first_tokens - window + 1:
        cache = write(cache, place, k_BTKH, v_BTKX, tokens)
        return cache, read(cache, place, tokens.length + real_tokens(tokens))
    old = read(cache, place, tokens.length)  # some of these would be overwritten by keys that not all may see
    if old.scales is not None:
        k, v = (x * scale[..., None] for x, scale in zip((old.k, old.v), old.scales, strict=True))
        old = old._replace(k=k.astype(k_BTKH.dtype), v=v.astype(v_BTKX.dtype), scales=None)
    both = [jnp.concatenate([x.astype(y.dtype), y], axis=1) for x, y in zip(old[:4], new[:4], strict=True)]
    return write(cache, place, k_BTKH, v_BTKX, tokens), Keys(*both)


def real_tokens(tokens: Tokens) -> Array:
    """[B]: how many tokens in hand are no padding."""
    return jnp.sum(tokens.segments > 0, axis=1, dtype=jnp.int32)


def write(cache: LayerCache, place: Array, k_BTKH: Array, v_BTKX: Array, tokens: Tokens) -> LayerCache:
    slots, (batch, count) = cache.k.shape[3], k_BTKH.shape[:2]
    arrays: dict[str, Array] = {"k": k_BTKH, "v": v_BTKX}
    if cache.k_scale is not None:
        (k, k_scale), (v, v_scale) = _whole(k_BTKH), _whole(v_BTKX)
        arrays = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
    if cache.fresh and count <= slots:  # whatever padding leaves behind lies beyond the length
        return replace(cache, **{
            name: getattr(cache, name).at[place, :, :, :count].set(x.swapaxes(1, 2).astype(getattr(cache, name).dtype))
            for name, x in arrays.items()
        })  # fmt: skip
    index = tokens.length[:, None] + jnp.arange(count)[None, :]
    end = (tokens.length + real_tokens(tokens))[:, None]
    slot, kept = index, tokens.segments > 0
    if cache.wraps:
        turning = slots - cache.first_tokens
        slot = jnp.where(index < cache.first_tokens, index, cache.first_tokens + (index - cache.first_tokens) % turning)
        kept &= (index >= end - turning) | (index < cache.first_tokens)
    slot = jnp.where(kept, slot, slots)  # beyond the end: dropped
    rows = jnp.arange(batch)[:, None]
    return replace(cache, **{
        name: getattr(cache, name).at[place, rows, :, slot].set(x.astype(getattr(cache, name).dtype), mode="drop")
        for name, x in arrays.items()
    })  # fmt: skip


def read(cache: LayerCache, place: Array, length_B: Array) -> Keys:
    """Layer ``place`` with ``length`` tokens written."""

    def take(x: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(x, place, 0, keepdims=False).swapaxes(1, 2)

    scales = None if cache.k_scale is None else (take(cache.k_scale), take(cache.v_scale))
    slot, length = jnp.arange(cache.k.shape[3])[None, :], length_B[:, None]
    positions = jnp.broadcast_to(slot, (length_B.shape[0], slot.shape[1]))
    filled = slot < length
    if cache.wraps:
        first = cache.first_tokens
        turning, last = slot.shape[1] - first, length - 1 - first
        latest = first + last - (last - (slot - first)) % turning
        positions = jnp.where(slot < first, slot, latest)
        filled = jnp.where(slot < first, filled, latest >= first)
    return Keys(take(cache.k), take(cache.v), positions, filled.astype(jnp.int32), scales)


def _whole(x: Array) -> tuple[Array, Array]:
    """x [..., H] as whole numbers of int8 and what they are to be multiplied by [...], in float32."""
    scale = jnp.maximum(jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1), 1e-30) / INT8_MAX
    return jnp.round(x.astype(jnp.float32) / scale[..., None]).astype(jnp.int8), scale
