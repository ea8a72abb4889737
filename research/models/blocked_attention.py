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

MASKED = -1e30  # a finite stand-in for minus infinity: a row with nothing to see stays finite


def blocked_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array, *, window: int = 0, blocks: int = 4
) -> Array:
    """Causal attention within segments: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    Slot t of the queries and of the keys is the same token; T is a multiple of ``blocks``. window: at most so
    many slots back, the query's own included (0: no limit). q comes scaled.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    q_BKGTH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    out_BKGTH = _attention(length // blocks, window, q_BKGTH, k_BKTH, v_BKTH, segments_BT)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def _spans(length: int, size: int, window: int) -> list[tuple[int, int, int]]:
    """(first key, first query, end of both) of each block."""
    starts = range(0, length, size)
    return [(max(0, start - window + 1) if window else 0, start, start + size) for start in starts]


def _masked(scores: Array, segments_BT: Array, span: tuple[int, int, int], window: int) -> Array:
    """scores [B, K, G, queries, keys]."""
    first, start, end = span
    distance = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None, :]
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    same = segments_BT[:, start:end, None] == segments_BT[:, None, first:end]
    return jnp.where((seen[None] & same)[:, None, None], scores, MASKED)


def _rows(x: Array) -> Array:
    """[B, K, G, t, ...] -> [B, K, G t, ...]: the heads of a group share their keys."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _by_width(x: Array, y: Array) -> Array:
    """[B, K, m, H] and [B, K, n, H] -> [B, K, m, n]."""
    return lax.dot_general(x, y, (((3,), (3,)), ((0, 1), (0, 1))))


def _by_time(x: Array, y: Array) -> Array:
    """[B, K, t, m] and [B, K, t, n] -> [B, K, m, n]."""
    return lax.dot_general(x, y, (((2,), (2,)), ((0, 1), (0, 1))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(size: int, window: int, q: Array, k: Array, v: Array, segments: Array) -> Array:
    return _forward(size, window, q, k, v, segments)[0]


def _forward(size: int, window: int, q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple]:
    outputs, saved = [], []
    for span in _spans(q.shape[3], size, window):
        first, start, end = span
        q_block = q[:, :, :, start:end]
        scores = _by_width(_rows(q_block), k[:, :, first:end]).astype(jnp.float32)
        scores = _masked(scores.reshape(*q_block.shape[:4], end - first), segments, span, window)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(v.dtype)
        mixed = lax.dot_general(_rows(weights), v[:, :, first:end], (((3,), (2,)), ((0, 1), (0, 1))))
        outputs.append(mixed.reshape(q_block.shape) / total.astype(v.dtype))
        saved.append((weights, total))
    out = jnp.concatenate(outputs, axis=3)
    return out, (q, k, v, segments, out, saved)


def _backward(size: int, window: int, residuals: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, _, out, saved = residuals
    inner = jnp.sum((out * d_out).astype(jnp.float32), axis=-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32), jnp.zeros(v.swapaxes(2, 3).shape, jnp.float32)
    for (first, start, end), (weights, total) in zip(_spans(q.shape[3], size, window), saved, strict=True):
        q_block = _rows(q[:, :, :, start:end])
        d_block = _rows((d_out[:, :, :, start:end] / total).astype(v.dtype))
        d_weights = _by_width(d_block, v[:, :, first:end]).astype(jnp.float32).reshape(weights.shape)
        d_scores = _rows((weights * (d_weights - inner[:, :, :, start:end] / total)).astype(q.dtype))
        mixed = lax.dot_general(d_scores, k[:, :, first:end], (((3,), (2,)), ((0, 1), (0, 1))))
        d_q.append(mixed.reshape(*weights.shape[:4], q.shape[-1]))
        d_k = d_k.at[..., first:end].add(_by_time(q_block, d_scores).astype(jnp.float32))
        d_v = d_v.at[..., first:end].add(_by_time(d_block, _rows(weights)).astype(jnp.float32))
    return jnp.concatenate(d_q, axis=3), d_k.swapaxes(2, 3).astype(k.dtype), d_v.swapaxes(2, 3).astype(v.dtype), None


_attention.defvjp(_forward, _backward)
