# SPDX-License-Identifier: Apache-2.0
"""Operations with one signature and several implementations, chosen by the platform of the mesh's devices.

``attention``: "plain" is the oracle and forms [B, N, T, S] scores; "blocked" goes through blocks of queries and
leaves out the keys that no query of the block may see, which on a CPU takes about half the time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from research.core.types import Array, UserError
from research.models.blocked_attention import MASKED, blocked_attention

AttentionImplementation = Literal["auto", "plain", "blocked"]
BLOCKS = 4  # of queries; 2 leaves a quarter of the square more, 8 gains nothing (measured at 512)
SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may see, from positions and segments.

    kind "causal": keys at the query's position or before; "full": all. Always within one segment, and
    segment 0 (padding, empty cache slots) is seen by nobody.
    window: at most so many positions back, the query's own included (0: no limit).
    """

    kind: Literal["causal", "full"] = "causal"
    window: int = 0


def linear(x: Array, w: Array, *, contract: int = 1, platform: str = "cpu") -> Array:
    """x [..., *in] times w [*in, *out], contracting the last ``contract`` dimensions of x.

    On a CPU as a product of two matrices: contracting the leading dimensions of x apart, as the gradient of w
    does, is a third slower there.
    """
    if platform != "cpu":
        dims = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
        return jax.lax.dot_general(x, w, (dims, ((), ())))
    leading, width = x.shape[: x.ndim - contract], math.prod(w.shape[:contract])
    rows, matrix = x.reshape(-1, width), w.reshape(width, -1)
    y = _wide_product(rows, matrix) if rows.shape[0] < matrix.shape[1] else _product(rows, matrix)
    return y.reshape(*leading, *w.shape[contract:])


def _product(x: Array, w: Array) -> Array:
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())))


@jax.custom_vjp
def _wide_product(x: Array, w: Array) -> Array:
    """x [n, in] times w [in, out] where n < out: the gradient of w transposes x first, which costs less than
    a product with its long side transposed."""
    return _product(x, w)


def _wide_product_backward(saved: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, w = saved
    d_x = jax.lax.dot_general(d_y, w, (((1,), (1,)), ((), ())))
    return d_x, _product(jax.lax.optimization_barrier(x.T), d_y)


_wide_product.defvjp(lambda x, w: (_product(x, w), (x, w)), _wide_product_backward)


def mask_BTS(
    visibility: Visibility, *, q_positions: Array, kv_positions: Array, q_segments: Array, kv_segments: Array
) -> Array:
    """[B, T, S] booleans: which key each query may see. Positions and segments are [B, T] and [B, S]."""
    allowed = (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments[:, None, :] > 0)
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    if visibility.kind == "causal":
        allowed &= distance >= 0
    if visibility.window:
        allowed &= distance < visibility.window
    return allowed


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    q_positions: Array,
    kv_positions: Array,
    q_segments: Array,
    kv_segments: Array,
    visibility: Visibility = Visibility(),  # noqa: B008 - a frozen value
    bias: Callable[[Array, Array], Array] | None = None,
    aligned: bool = False,
    implementation: AttentionImplementation = "auto",
    platform: str = "cpu",
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) with grouped kv heads (Ainslie et al. 2023).

    q [B, T, N, H], k and v [B, S, K, H] with N a multiple of K -> [B, T, N, H] in q's dtype; softmax in
    float32. positions and segments [B, T] and [B, S] decide what is seen (``Visibility``); ``bias`` maps
    query and key positions to [B, N, T, S] added to the scores. ``aligned`` promises packed training rows:
    slot t of the queries and of the keys is the same token, and positions count the slots since the
    segment began. Only then may blocks of keys be left out ("blocked" else falls back to "plain").
    """
    if bias is not None and implementation == "blocked":
        raise UserError("Blocked attention takes no bias: choose attention.implementation=plain, or auto.")
    fits = aligned and bias is None and visibility.kind == "causal" and q_BTNH.shape[1] % BLOCKS == 0
    wanted = implementation == "blocked" or (implementation == "auto" and platform == "cpu")
    q_BTNH = q_BTNH / math.sqrt(q_BTNH.shape[-1])
    if wanted and fits and q_BTNH.shape[1] >= BLOCKS * SMALLEST_BLOCK:
        return blocked_attention(q_BTNH, k_BSKH, v_BSKH, q_positions, window=visibility.window, blocks=BLOCKS)
    mask = mask_BTS(
        visibility,
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segments=q_segments,
        kv_segments=kv_segments,
    )
    return _attend(q_BTNH, k_BSKH, v_BSKH, mask, bias(q_positions, kv_positions) if bias else None)


def _attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Array, bias: Array | None) -> Array:
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    group = heads // kv_heads
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, group, width)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH).astype(jnp.float32)
    if bias is not None:
        scores_BKGTS = scores_BKGTS + bias.reshape(scores_BKGTS.shape)
    scores_BKGTS = jnp.where(mask[:, None, None, :, :], scores_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(batch, length, heads, width)
