# SPDX-License-Identifier: Apache-2.0
"""Caches against the forward pass over the whole sequence: rings, whole numbers, rows of different length."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.types import Precision, UserError
from research.models import cache as caches
from research.models.attention import Attention
from research.models.cache import CacheSpec
from research.models.latent_attention import LatentAttention
from research.models.positions import Alibi, RelativeBias, Rotary, TransformerXL
from research.models.tokens import Tokens
from tests import tiny

WINDOW = replace(tiny.MODEL, num_layers=3, attention=(Attention(4, 2, window=6, first_tokens=2), Attention(4)))
LATENT = replace(tiny.MODEL, attention=LatentAttention(4, kv_rank=16, q_rank=0, nope_dim=8, rope_dim=4, v_dim=8))
RING = CacheSpec(windows="ring")


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, batch, cache=None):
    return model.bind(params, {}, Precision()).forward(batch, cache)


@functools.cache
def params_of(model):
    return jax.jit(lambda: model.init_params(jax.random.key(0), Precision()))()


def piece(batch, starts, count, real=None):
    """``count`` tokens of each row from its start; only the first ``real`` of them are no padding."""
    at = np.asarray(starts)[:, None] + np.arange(count)[None, :]
    found = {name: np.take_along_axis(x, np.minimum(at, x.shape[1] - 1), axis=1) for name, x in batch.items()}
    if real is not None:
        found["segment_ids"] = (np.arange(count)[None, :] < np.asarray(real)[:, None]).astype(np.int32)
    return found


@pytest.mark.parametrize(
    ("sizes", "position"),
    [
        ((1,) * 20, Rotary()),
        ((5, 1, 11, 3), Rotary()),
        ((20,), Rotary()),
        ((3, 17), Rotary()),
        ((5, 1, 11, 3), Alibi()),
        ((5, 1, 11, 3), RelativeBias(8, 20)),
        ((5, 1, 11, 3), TransformerXL()),
    ],
    ids=str,
)
def test_a_ring_is_the_whole_sequence_in_whatever_pieces(sizes, position):
    batch, model = tiny.batch(rows=2, length=20), replace(WINDOW, position=position)
    whole = forward(model, params_of(model), batch).hidden
    cache = model.empty_cache(batch=2, slots=20, precision=Precision(), spec=RING)
    slots = 20 if isinstance(position, TransformerXL) else 8  # the window and the first tokens
    assert cache.layers["layers"]["block0"].k.shape[3] == slots
    found, start = [], 0
    for size in sizes:
        output = forward(model, params_of(model), piece(batch, [start] * 2, size), cache)
        cache, start = output.cache, start + size
        found.append(output.hidden)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("model", [WINDOW, LATENT], ids=["window", "latent"])
def test_rows_of_different_length_behind_which_is_padding(model):
    """A padded prompt, then pieces of different length for each row: what is real is what each row gives alone."""
    batch = tiny.batch(rows=2, length=24)
    whole = np.asarray(forward(model, params_of(model), batch).hidden)
    cache = model.empty_cache(batch=2, slots=24, precision=Precision(), spec=RING)
    at = np.zeros(2, np.int64)
    for count, real in ((12, (3, 12)), (1, (1, 1)), (1, (1, 0)), (8, (8, 2)), (1, (1, 1))):
        output = forward(model, params_of(model), piece(batch, at, count, real), cache)
        cache = output.cache
        for row in range(2):
            wanted = whole[row, at[row] : at[row] + real[row]]
            np.testing.assert_allclose(output.hidden[row, : real[row]], wanted, rtol=2e-4, atol=2e-5)
        at += real
    np.testing.assert_array_equal(cache.length, at)


def test_a_ring_with_slack_is_rolled_back():
    batch = tiny.batch(rows=2, length=20)
    whole = forward(WINDOW, params_of(WINDOW), batch).hidden
    cache = WINDOW.empty_cache(batch=2, slots=20, precision=Precision(), spec=CacheSpec(windows="ring", slack=4))
    cache = forward(WINDOW, params_of(WINDOW), piece(batch, [0, 0], 18), cache).cache
    cache = cache._replace(length=jnp.array([14, 16]))
    output = forward(WINDOW, params_of(WINDOW), piece(batch, [14, 16], 3), cache)
    wanted = np.take_along_axis(np.asarray(whole), (np.array([[14], [16]]) + np.arange(3))[..., None], axis=1)
    np.testing.assert_allclose(output.hidden, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("model", [WINDOW, LATENT], ids=["window", "latent"])
def test_whole_numbers_take_a_byte_and_are_near(model):
    batch = tiny.batch(rows=2, length=24)
    whole = np.asarray(forward(model, params_of(model), batch).hidden)
    cache = model.empty_cache(batch=2, slots=24, precision=Precision(), spec=CacheSpec("int8", "ring"))
    leaves = {leaf.dtype.name for leaf in jax.tree.leaves(cache.layers)}
    assert leaves == {"int8", "float32"}
    found = []
    for start in (0, 12, 13, 14, 19):
        count = {0: 12, 14: 5, 19: 5}.get(start, 1)
        output = forward(model, params_of(model), piece(batch, [start] * 2, count), cache)
        cache = output.cache
        found.append(output.hidden)
    gap = np.linalg.norm(jnp.concatenate(found, axis=1) - whole, axis=-1) / np.linalg.norm(whole, axis=-1)
    assert gap[:, :12].max() < 1e-5  # a prompt sees its own keys, not the rounded ones
    assert 1e-5 < gap[:, 12:].max() < 0.02


@pytest.mark.parametrize("first", [0, 2])
def test_slots_of_a_ring_know_their_positions(first):
    """Against a ring filled by hand."""
    size, by_hand = 5, np.full(5, -1)
    cache = caches.empty(
        RING, layers=1, batch=1, slots=50, heads=1, widths=(1, 1), window=size - first, first_tokens=first,
        compute="float32",
    )  # fmt: skip
    cache = caches.used({"layers": cache})["layers"]
    for token in range(14):
        by_hand[token if token < first else first + (token - first) % (size - first)] = token
        one = jnp.full((1, 1, 1, 1), float(token))
        tokens = Tokens(jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), token), jnp.ones((1, 1), jnp.int32))
        cache = caches.write(cache, 0, one, one, tokens._replace(length=jnp.array([token])))
        keys = caches.read(cache, 0, jnp.array([token + 1]))
        np.testing.assert_array_equal(np.where(keys.segments[0] > 0, keys.positions[0], -1), by_hand)
        np.testing.assert_array_equal(np.where(by_hand >= 0, keys.k[0, :, 0, 0], -1), by_hand)


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(UserError, match="slack is -1"):
        CacheSpec(slack=-1)
