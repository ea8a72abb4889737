# SPDX-License-Identifier: Apache-2.0
"""Attention in chunks of queries and keys: no more than [chunk, chunk] scores of a head are ever formed.

The forward pass keeps a running maximum and sum (Rabe and Staats 2021); the backward pass forms the weights again
from the saved logarithm of the sum (Dao et al. 2022, algorithm 4). ``forward`` and ``backward`` also serve as the
block of a ring: their results for different keys merge by the logarithms.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.core.types import Array
from research.models.visibility import MASKED, Places, Visibility, capped, mask_BTS

CHUNK = 512


def chunked_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    places: Places,
    visibility: Visibility,
    *,
    aligned: bool = False,
    cap: float = 0.0,
) -> Array:
    """q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H]; a query that sees nothing gives zeros. q comes scaled.

    aligned: slot t of queries and keys is the same token and a causal query sees no later slot, so that chunks of
    later keys are left out. cap: of the scores (``visibility.capped``).
    """
    return _attention(visibility, aligned, cap, q_BTNH, k_BSKH, v_BSKH, places)


@dataclass(frozen=True)
class Block:
    """A block of a ring (``ring_attention.Block``), with a cap of the scores."""

    cap: float = 0.0

    def forward(self, visibility: Visibility, aligned: bool, *inputs: Any) -> tuple[Array, Array]:
        return forward(visibility, aligned, *inputs, cap=self.cap)

    def backward(self, visibility: Visibility, aligned: bool, *inputs: Any) -> tuple[Array, Array, Array]:
        return backward(visibility, aligned, *inputs, cap=self.cap)


def forward(
    visibility: Visibility,
    aligned: bool,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    places: Places,
    *,
    cap: float = 0.0,
) -> tuple[Array, Array]:
    """The output [B, T, N, H] in q's dtype, and the log of the sum of exponentials [B, T, N] in float32."""
    shapes = q_BTNH.shape, k_BSKH.shape
    q, k, v, places = _padded(q_BTNH, k_BSKH, v_BSKH, places)
    spans, size = _spans(visibility, aligned, q, k)
    heads = q.shape[2:]

    def queries(row: Array) -> tuple[Array, Array]:
        q_part = _take(q, row, size)

        def keys(column: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            part = _part(places, row, column, size)
            scores, mask = _scores(visibility, q_part, _take(k, column, size), part, cap)
            new_top = jnp.maximum(top, jnp.max(jnp.where(mask, scores, MASKED), axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
            scale = jnp.exp(top - new_top)
            more = _product("BKGTS,BSKH->BKGTH", weights.astype(v.dtype), _take(v, column, size))
            return new_top, total * scale + jnp.sum(weights, axis=-1), out * scale[..., None] + more

        batch, (kv_heads, group, width) = q.shape[0], heads
        shape = (batch, kv_heads, group, size)
        start = jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, width))
        top, total, out = lax.fori_loop(*spans.keys(row), keys, start)
        some = jnp.maximum(total, 1e-30)
        out = jnp.einsum("BKGTH->BTKGH", out / some[..., None]).astype(q.dtype)
        return out, jnp.einsum("BKGT->BTKG", jnp.where(total > 0, top + jnp.log(some), MASKED))

    out, log_sum = lax.map(queries, jnp.arange(q.shape[1] // size))
    (batch, length, num_heads, width), _ = shapes
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, num_heads, width)[:, :length]
    return out, jnp.moveaxis(log_sum, 0, 1).reshape(batch, -1, num_heads)[:, :length]


def backward(
    visibility: Visibility,
    aligned: bool,
    inputs: tuple[Array, Array, Array, Places],
    out_BTNH: Array,
    log_sum_BTN: Array,
    d_out_BTNH: Array,
    *,
    cap: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v in float32, for an output and a log sum that may be over more keys than these."""
    q_shape, k_shape = inputs[0].shape, inputs[1].shape
    q, k, v, places = _padded(*inputs)
    spans, size = _spans(visibility, aligned, q, k)
    inner_BTN = jnp.sum((out_BTNH * d_out_BTNH).astype(jnp.float32), axis=-1)
    d_out = _grouped(d_out_BTNH, q)
    inner, log_sum = (_grouped(x[..., None], q)[..., 0] for x in (inner_BTN, log_sum_BTN))
    by_row = lambda x, row: jnp.einsum("BTKG->BKGT", _take(x, row, size))[..., None]  # noqa: E731

    def keys(d_q: Array, column: Array) -> tuple[Array, tuple[Array, Array]]:
        k_part, v_part = _take(k, column, size), _take(v, column, size)

        def queries(row: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = carry
            q_part, d_part = _take(q, row, size), _take(d_out, row, size)
            scores, mask = _scores(visibility, q_part, k_part, _part(places, row, column, size), cap)
            weights = jnp.where(mask, jnp.exp(scores - by_row(log_sum, row)), 0.0)
            d_weights = _product("BTKGH,BSKH->BKGTS", d_part, v_part)
            d_scores = weights * (d_weights - by_row(inner, row))
            if cap:  # d tanh = 1 - tanh^2
                d_scores = d_scores * (1 - jnp.square(scores / cap))
            d_scores = d_scores.astype(q.dtype)
            d_v += _product("BKGTS,BTKGH->BSKH", weights.astype(v.dtype), d_part)
            d_k += _product("BKGTS,BTKGH->BSKH", d_scores, q_part)
            more = _take(d_q, row, size) + _product("BKGTS,BSKH->BTKGH", d_scores, k_part)
            return lax.dynamic_update_slice_in_dim(d_q, more, row * size, 1), d_k, d_v

        zeros = jnp.zeros(k_part.shape, jnp.float32)
        d_q, d_k, d_v = lax.fori_loop(*spans.queries(column), queries, (d_q, zeros, zeros))
        return d_q, (d_k, d_v)

    d_q, d_kv = lax.scan(keys, jnp.zeros(q.shape, jnp.float32), jnp.arange(k.shape[1] // size))
    d_q = d_q.reshape(q_shape[0], -1, *q_shape[2:])[:, : q_shape[1]]
    d_k, d_v = (jnp.moveaxis(d, 0, 1).reshape(k_shape[0], -1, *k_shape[2:])[:, : k_shape[1]] for d in d_kv)
    return d_q, d_k, d_v


class _Spans:
    """Which chunks see which: the range of key chunks of a chunk of queries, and the other way round."""

    def __init__(self, rows: int, columns: int, causal: bool, back: int | None) -> None:
        self.rows, self.columns, self.causal, self.back = rows, columns, causal, back

    def keys(self, row: Array) -> tuple[Array | int, Array | int]:
        first = jnp.maximum(row - self.back, 0) if self.back is not None else 0
        return first, row + 1 if self.causal else self.columns

    def queries(self, column: Array) -> tuple[Array | int, Array | int]:
        last = jnp.minimum(column + self.back + 1, self.rows) if self.back is not None else self.rows
        return column if self.causal else 0, last


def _spans(visibility: Visibility, aligned: bool, q: Array, k: Array) -> tuple[_Spans, int]:
    size = _size(q.shape[1], k.shape[1])
    causal = aligned and visibility.kind == "causal"
    windowed = causal and visibility.window and not visibility.first_tokens
    back = math.ceil((visibility.window - 1) / size) if windowed else None
    return _Spans(q.shape[1] // size, k.shape[1] // size, causal, back), size


def _size(queries: int, keys: int) -> int:
    return min(CHUNK, max(queries, keys))


def _padded(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, places: Places) -> tuple[Array, Array, Array, Places]:
    """Lengths brought to multiples of the chunk, the rest in segment 0, which nobody sees; heads by group."""
    size = _size(q_BTNH.shape[1], k_BSKH.shape[1])

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)))

    q = q_BTNH.reshape(*q_BTNH.shape[:2], k_BSKH.shape[2], -1, q_BTNH.shape[3])
    return pad(q), pad(k_BSKH), pad(v_BSKH), Places(*map(pad, places))


def _grouped(x_BTNX: Array, like: Array) -> Array:
    """[B, T, N, X] as ``_padded`` shapes queries: [B, padded T, K, G, X]."""
    x = x_BTNX.reshape(*x_BTNX.shape[:2], *like.shape[2:4], x_BTNX.shape[3])
    return jnp.pad(x, ((0, 0), (0, like.shape[1] - x.shape[1]), (0, 0), (0, 0), (0, 0)))


def _take(x: Array, index: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, 1)


def _part(places: Places, row: Array, column: Array, size: int) -> Places:
    return Places(*(_take(x, index, size) for x, index in zip(places, (row, column, row, column), strict=True)))


def _scores(visibility: Visibility, q: Array, k: Array, places: Places, cap: float) -> tuple[Array, Array]:
    """[B, K, G, T, S] float32 and what of it is seen."""
    scores = _product("BTKGH,BSKH->BKGTS", q, k)
    return capped(scores, cap) if cap else scores, mask_BTS(visibility, places)[:, None, None]


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(visibility: Visibility, aligned: bool, cap: float, q: Array, k: Array, v: Array, at: Places) -> Array:
    return forward(visibility, aligned, q, k, v, at, cap=cap)[0]


def _forward(
    visibility: Visibility, aligned: bool, cap: float, q: Array, k: Array, v: Array, at: Places
) -> tuple[Array, tuple]:
    out, log_sum = forward(visibility, aligned, q, k, v, at, cap=cap)
    return out, ((q, k, v, at), out, log_sum)


def _backward(visibility: Visibility, aligned: bool, cap: float, saved: tuple, d_out: Array) -> tuple:
    inputs, out, log_sum = saved
    gradients = backward(visibility, aligned, inputs, out, log_sum, d_out, cap=cap)
    return *(d.astype(x.dtype) for d, x in zip(gradients, inputs[:3], strict=True)), None


_attention.defvjp(_forward, _backward)
