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

from research.core.types import Array

AttentionImplementation = Literal["auto", "plain", "blocked"]
NUM_BLOCKS = 4
MASKED = -1e30  # a finite stand-in for minus infinity: a row with nothing to see stays finite


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
    """x [..., *in] times w [*in, *out], contracting the last ``contract`` dimensions of x."""
    dims = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
    return jax.lax.dot_general(x, w, (dims, ((), ())))


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
    query and key positions to [B, N, T, S] added to the scores. ``aligned`` promises that slot t of the
    queries and slot t of the keys are the same token and that a later slot is never seen (packed
    training rows): only then may blocks of keys be left out.
    """
    keep = dict(q_positions=q_positions, kv_positions=kv_positions, q_segments=q_segments, kv_segments=kv_segments)
    if implementation == "auto":
        implementation = "blocked" if platform == "cpu" and aligned else "plain"
    blocks = NUM_BLOCKS if implementation == "blocked" and aligned and visibility.kind == "causal" else 1
    length = q_BTNH.shape[1]
    if length % blocks or length // blocks < 16:
        blocks = 1
    size, outputs = length // blocks, []
    for start in range(0, length, size):
        seen = start + size if blocks > 1 else k_BSKH.shape[1]
        first = max(0, start - visibility.window + 1) if visibility.window and blocks > 1 else 0
        part = {name: x[:, start : start + size] if name[0] == "q" else x[:, first:seen] for name, x in keep.items()}
        scores_bias = bias(part["q_positions"], part["kv_positions"]) if bias else None
        outputs.append(
            _attend(
                q_BTNH[:, start : start + size],
                k_BSKH[:, first:seen],
                v_BSKH[:, first:seen],
                mask_BTS(visibility, **part),
                scores_bias,
            )
        )
    return outputs[0] if blocks == 1 else jnp.concatenate(outputs, axis=1)


def _attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Array, bias: Array | None) -> Array:
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    group = heads // kv_heads
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, group, width) / math.sqrt(width)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH).astype(jnp.float32)
    if bias is not None:
        scores_BKGTS = scores_BKGTS + bias.reshape(scores_BKGTS.shape)
    scores_BKGTS = jnp.where(mask[:, None, None, :, :], scores_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(batch, length, heads, width)
