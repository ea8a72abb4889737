# SPDX-License-Identifier: Apache-2.0
"""The key-value cache: an argument and a result of the forward pass, with a length per row.

A cache is rolled back by lowering ``length``; slots beyond it are seen by nobody and overwritten next.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.core.types import Array


class LayerCache(NamedTuple):
    """One layer's keys and values [B, S, K, H]; stacked over layers inside ``Cache``."""

    k: Array
    v: Array


class Cache(NamedTuple):
    """Keys and values of every layer [L, B, S, K, H] and the number of filled slots of each row [B]."""

    layers: LayerCache
    length: Array


def empty(*, num_layers: int, batch: int, slots: int, num_kv_heads: int, head_dim: int, dtype: str) -> Cache:
    shape = (num_layers, batch, slots, num_kv_heads, head_dim)
    return Cache(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), jnp.zeros((batch,), jnp.int32))


def append(cache: LayerCache, k_BTKH: Array, v_BTKH: Array, length_B: Array) -> LayerCache:
    """Writes T new keys and values of each row behind its filled slots."""

    def row(slots: Array, new: Array, length: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), length, axis=0)

    write = jax.vmap(row)
    return LayerCache(write(cache.k, k_BTKH, length_B), write(cache.v, v_BTKH, length_B))
