# SPDX-License-Identifier: Apache-2.0
"""What attention may see: from positions and segments, never from a dense mask that somebody hands down."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp

from research.core.types import Array

MASKED = -1e30  # a finite stand-in for minus infinity: a row with nothing to see stays finite


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may see, from positions and segments.

    kind "causal": keys at the query's position or before; "full": all. Always within one segment, and
    segment 0 (padding, empty cache slots) is seen by nobody.
    window: at most so many positions back, the query's own included (0: no limit). first_tokens: positions before it
    are seen however far back they lie (Xiao et al. 2023, StreamingLLM).
    """

    kind: Literal["causal", "full"] = "causal"
    window: int = 0
    first_tokens: int = 0


class Places(NamedTuple):
    """Positions and segments of the queries [B, T] and of the keys [B, S]."""

    q_positions: Array
    kv_positions: Array
    q_segments: Array
    kv_segments: Array


def mask_BTS(visibility: Visibility, places: Places) -> Array:
    """[B, T, S] booleans: which key each query may see."""
    allowed = places.q_segments[:, :, None] == places.kv_segments[:, None, :]
    allowed &= places.kv_segments[:, None, :] > 0
    distance = places.q_positions[:, :, None] - places.kv_positions[:, None, :]
    if visibility.kind == "causal":
        allowed &= distance >= 0
    if visibility.window:
        near = distance < visibility.window
        if visibility.first_tokens:
            near |= (places.kv_positions < visibility.first_tokens)[:, None, :]
        allowed &= near
    return allowed


def capped(scores: Array, cap: float) -> Array:
    """Scores or logits bent so that they stay within ``cap``: cap tanh(x / cap) (Gemma 2, 2024, section 2)."""
    return cap * jnp.tanh(scores / cap)
