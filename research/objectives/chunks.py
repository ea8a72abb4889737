# SPDX-License-Identifier: Apache-2.0
"""Tokens in chunks: what the output head is applied to some at a time, so that no logits of all of them ever stand."""

import jax.numpy as jnp

from research.core.types import Array


def split(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """Each of the arrays [B, T, ...] as [chunks, about ``chunk`` tokens, ...], padded with zeros; 0: all at once."""
    batch, length = arrays[0].shape[:2]
    wanted = min(length, max(1, chunk // batch)) if chunk else length
    chunks = -(-length // wanted)
    columns = -(-length // chunks)

    def one(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * columns - length)) + ((0, 0),) * (x.ndim - 2))
        parts = jnp.moveaxis(x.reshape(batch, chunks, columns, *x.shape[2:]), 1, 0)
        return parts.reshape(chunks, batch * columns, *x.shape[2:])

    return tuple(one(x) for x in arrays)


def joined(parts: Array, batch: int, length: int) -> Array:
    """The inverse, without the padding: [chunks, tokens, ...] -> [B, T, ...]."""
    by_row = jnp.moveaxis(parts.reshape(parts.shape[0], batch, -1, *parts.shape[2:]), 0, 1)
    return by_row.reshape(batch, -1, *parts.shape[2:])[:, :length]
