# SPDX-License-Identifier: Apache-2.0
"""What attention may see: from positions and segments, never from a dense mask that somebody hands down."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from research.core.types import Array

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
        allowed &= distance < visibility.window
    return allowed
