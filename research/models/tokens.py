# SPDX-License-Identifier: Apache-2.0
"""What every layer may know of the tokens in hand."""

from typing import NamedTuple

from research.core.types import Array


class Tokens(NamedTuple):
    """The same for every layer.

    ids, positions and segments [B, T], segment 0 is padding; rotary: sines and cosines for each of ``Build.rotaries``;
    relative: a table of biases [buckets, N] or None; length [B]: tokens in the cache before these, or None; key: for
    random choices in training, or None; rows [B]: the number of each row in its batch.
    Without a cache, on a mesh that splits the sequence, tokens stand in balanced order (``ring_attention``).
    """

    ids: Array
    positions: Array
    segments: Array
    rotary: tuple[tuple[Array, Array], ...] = ()
    relative: Array | None = None
    length: Array | None = None
    key: Array | None = None
    rows: Array | None = None
