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
from jax.sharding import Mesh, NamedSharding

from research.core.sharding import Axes, constrain, fitting_spec, partition_spec
from research.core.types import Array, UserError
from research.models import ring_attention
from research.models.tokens import Tokens

INT8_MAX = 127.0
AXES: Mapping[str, Axes] = {  # of a scale, by order; keys and values have one more
    "heads": (None, "batch", "act_heads", None),
    "slots": (None, "batch", None, "act_heads"),
}


@dataclass(frozen=True)
class CacheSpec:
    """How caches are stored. dtype: "compute" is that of the model's products; "int8" has a scale for each token and
    head. windows: layers with a window keep all tokens ("full") or the last ones ("ring"), those of the window and
    ``slack`` more, so that a ring may be rolled back by so many.

    order: which comes first in memory, heads or slots. On a CPU products of slots-first arrays first turn the whole
    cache, which takes four times as long as they do; on a TPU it is the writing of tokens into heads-first ones that
    turns it.
    """

    dtype: Literal["compute", "float32", "bfloat16", "int8"] = "compute"
    windows: Literal["full", "ring"] = "full"
    slack: int = 0
    order: Literal["heads", "slots"] = "heads"

    def __post_init__(self) -> None:
        if self.slack < 0:
            raise UserError(f"A cache's slack is {self.slack}: it must be at least 0.")

    def on(self, platform: str) -> "CacheSpec":
        """The same in the order that suits a platform."""
        return replace(self, order="heads" if platform == "cpu" else "slots")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v", "k_scale", "v_scale"),
    meta_fields=("wraps", "first_tokens", "fresh", "heads_first"),
)
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of a stack of layers alike: k [L, B, K, S, H], v [L, B, K, S, X], and for int8 their scales
    [L, B, K, S] in float32; or with K and S in the other order.

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
    heads_first: bool = field(default=True)

    @property
    def slots(self) -> int:
        return self.k.shape[3 if self.heads_first else 2]

    def layout(self, mesh: Mesh) -> "LayerCache":
        """Where its arrays lie on a mesh, for each of them a sharding."""
        axes = AXES["heads" if self.heads_first else "slots"]

        def place(x: Array) -> NamedSharding:
            spec = partition_spec(axes if x.ndim == len(axes) else (*axes, None))
            return NamedSharding(mesh, fitting_spec(x.shape, spec, dict(mesh.shape)))

        return jax.tree.map(place, self)

    def with_rows(self, other: "LayerCache", take: Array, put: Array) -> "LayerCache":
        """Rows ``take`` of another cache in the rows ``put`` of this one; beyond the last row they are dropped."""
        width = slice(min(self.slots, other.slots))
        part = (slice(None), width) if self.heads_first else (width,)
        arrays = {}
        for name in ("k", "v", "k_scale", "v_scale"):
            to, rows = getattr(self, name), getattr(other, name)
            if to is not None:
                arrays[name] = to.at[:, put, *part].set(rows[:, take, *part], mode="drop")
        return replace(self, **arrays)


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
    shape, axes = (layers, batch, heads, ring if wraps else slots), AXES[spec.order]
    if spec.order == "slots":
        shape = (*shape[:2], shape[3], heads)
    dtype = compute if spec.dtype == "compute" else spec.dtype
    k, v = (constrain(jnp.zeros((*shape, width), dtype), *axes, None) for width in widths)
    scales: list[Array | None] = [None, None]
    if spec.dtype == "int8":
        scales = [constrain(jnp.zeros(shape, jnp.float32), *axes) for _ in range(2)]
    kept = first_tokens if wraps else 0
    return LayerCache(k, v, *scales, wraps=wraps, first_tokens=kept, fresh=True, heads_first=spec.order == "heads")


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
    slots, count = cache.slots, k_BTKH.shape[1]
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
    slots, (batch, count) = cache.slots, k_BTKH.shape[:2]
    arrays: dict[str, Array] = {"k": k_BTKH, "v": v_BTKX}
    if cache.k_scale is not None:
        (k, k_scale), (v, v_scale) = _whole(k_BTKH), _whole(v_BTKX)
        arrays = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
    if cache.fresh and count <= slots:  # whatever padding leaves behind lies beyond the length

        def put(to: Array, x: Array) -> Array:
            x = x.astype(to.dtype)
            if cache.heads_first:
                return to.at[place, :, :, :count].set(x.swapaxes(1, 2))
            return to.at[place, :, :count].set(x)
    else:
        rows, slot = jnp.arange(batch)[:, None], _slots_of(cache, tokens, count)

        def put(to: Array, x: Array) -> Array:
            index = (place, rows, slice(None), slot) if cache.heads_first else (place, rows, slot)
            return to.at[index].set(x.astype(to.dtype), mode="drop")

    return replace(cache, **{name: put(getattr(cache, name), x) for name, x in arrays.items()})


def _slots_of(cache: LayerCache, tokens: Tokens, count: int) -> Array:
    """[B, T]: where each of the tokens in hand goes; beyond the end where nowhere."""
    index = tokens.length[:, None] + jnp.arange(count)[None, :]
    slot, kept = index, tokens.segments > 0
    if cache.wraps:
        end, first = (tokens.length + real_tokens(tokens))[:, None], cache.first_tokens
        turning = cache.slots - first
        slot = jnp.where(index < first, index, first + (index - first) % turning)
        kept &= (index >= end - turning) | (index < first)
    return jnp.where(kept, slot, cache.slots)


def read(cache: LayerCache, place: Array, length_B: Array) -> Keys:
    """Layer ``place`` with ``length`` tokens written."""

    def take(x: Array) -> Array:
        x = jax.lax.dynamic_index_in_dim(x, place, 0, keepdims=False)
        return x.swapaxes(1, 2) if cache.heads_first else x

    scales = None if cache.k_scale is None else (take(cache.k_scale), take(cache.v_scale))
    slot, length = jnp.arange(cache.slots)[None, :], length_B[:, None]
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
