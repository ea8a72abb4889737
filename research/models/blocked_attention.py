# SPDX-License-Identifier: Apache-2.0
"""Causal attention in blocks of queries, for CPUs: a block reads the keys up to its own end and no further.

Half of the T x T square is never computed, and the backward pass is written out (Dao et al. 2022, section 3.1,
without the recomputation): the products keep their narrow operand on the transposed side, and the division by
the softmax's denominator is done on [T, H] rather than on [T, T].
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from research.core.types import Array
from research.models.visibility import MASKED


def blocked_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, positions_BT: Array, *, window: int = 0, blocks: int = 4
) -> Array:
    """Causal attention within segments: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    Slot t of the queries and of the keys is the same token, and its position [B, T] counts the slots since its
    segment began: that alone says how far back it sees. T is a multiple of ``blocks``. window: at most so many
    slots back, the query's own included (0: no limit). q comes scaled.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    group = heads // kv_heads  # heads that share keys: their queries are rows of one product
    rows = q_BTNH.reshape(batch, length, kv_heads, group, width).swapaxes(1, 2).reshape(batch, kv_heads, -1, width)
    reach_BT = jnp.minimum(positions_BT, window - 1) if window else positions_BT
    spans = tuple(
        (max(0, start - window + 1) if window else 0, start, start + length // blocks)
        for start in range(0, length, length // blocks)
    )
    out = _attention(spans, group, rows, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), reach_BT)
    out_BKTGH = out.reshape(batch, kv_heads, length, group, width)
    return out_BKTGH.swapaxes(1, 2).reshape(batch, length, heads, width)


# Below, r counts rows: query slot times group plus head in the group. s counts keys of one block.

Spans = tuple[tuple[int, int, int], ...]  # (first key, first query, end of both) of each block


def _product(x: Array, y: Array, x_dim: int, y_dim: int) -> Array:
    """Contracts one of the last two dimensions of x and y [B, K, ., .]."""
    return lax.dot_general(x, y, (((x_dim,), (y_dim,)), ((0, 1), (0, 1))))


def _masked(scores_BKrs: Array, reach_BT: Array, span: tuple[int, int, int], group: int) -> Array:
    first, start, end = span
    slots = jnp.arange(start * group, end * group) // group
    # as unsigned numbers, keys that come later lie further off than any reach: one comparison does for both
    distance = (slots[:, None] - jnp.arange(first, end)[None, :]).astype(jnp.uint32)
    reach = jnp.repeat(reach_BT[:, start:end], group, axis=1).astype(jnp.uint32)
    return jnp.where((distance[None] <= reach[:, :, None])[:, None], scores_BKrs, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(spans: Spans, group: int, q: Array, k: Array, v: Array, reach: Array) -> Array:
    return _forward(spans, group, q, k, v, reach)[0]


def _forward(spans: Spans, group: int, q: Array, k: Array, v: Array, reach: Array) -> tuple[Array, tuple]:
    outputs, saved = [], []
    for span in spans:
        first, start, end = span
        scores = _product(q[:, :, start * group : end * group], k[:, :, first:end], 3, 3).astype(jnp.float32)
        scores = _masked(scores, reach, span, group)
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(v.dtype)
        outputs.append(_product(weights, v[:, :, first:end], 3, 2) / total.astype(v.dtype))
        saved.append((weights, total))
    out = jnp.concatenate(outputs, axis=2)
    return out, (q, k, v, out, saved)


def _backward(spans: Spans, group: int, residuals: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, out, saved = residuals
    inner = jnp.sum((out * d_out).astype(jnp.float32), axis=-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32), jnp.zeros(v.swapaxes(2, 3).shape, jnp.float32)
    for (first, start, end), (weights, total) in zip(spans, saved, strict=True):
        rows = slice(start * group, end * group)
        d_block = (d_out[:, :, rows] / total).astype(v.dtype)
        d_weights = _product(d_block, v[:, :, first:end], 3, 3).astype(jnp.float32)
        d_scores = (weights * (d_weights - inner[:, :, rows] / total)).astype(q.dtype)
        d_q.append(_product(d_scores, k[:, :, first:end], 3, 2))
        d_k = d_k.at[..., first:end].add(_product(q[:, :, rows], d_scores, 2, 2).astype(jnp.float32))
        d_v = d_v.at[..., first:end].add(_product(d_block, weights, 2, 2).astype(jnp.float32))
    return jnp.concatenate(d_q, axis=2), d_k.swapaxes(2, 3).astype(k.dtype), d_v.swapaxes(2, 3).astype(v.dtype), None


_attention.defvjp(_forward, _backward)
