# SPDX-License-Identifier: Apache-2.0
"""Attention around a ring: equal to one device's, in value and gradient, with the same work everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import sharding
from research.core.sharding import MeshSpec
from research.models import ops, ring_attention
from tests.models.test_ops import inputs

MESHES = {2: MeshSpec(data=2, context=2, tensor=2), 4: MeshSpec(data=1, context=4, tensor=2), 8: MeshSpec(context=8)}


@pytest.mark.parametrize(
    ("ring", "window", "block"), [(2, 40, "chunked"), (4, 0, "chunked"), (8, 0, "chunked"), (2, 0, "splash")]
)
def test_a_ring_is_one_device(ring, window, block):
    """The blocks of TPUs, splash kernels, are interpreted."""
    arrays, where = inputs(length=512 if block == "splash" else 128)
    real = (where["q_segments"] > 0)[:, :, None, None]

    def run(arrays, where, real, order):
        def loss(arrays):
            q, k, v = (order(x) for x in arrays)
            out = ops.attention(
                q, k, v, **{name: order(x) for name, x in where.items()},
                visibility=ops.Visibility("causal", window), aligned=True, implementation=block,
            )  # fmt: skip
            out = jnp.where(real, order(out, inverse=True), 0.0)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, has_aux=True)(arrays)

    wanted, wanted_out = jax.jit(run, static_argnums=3)(arrays, where, real, lambda x, inverse=False: x)
    with jax.set_mesh(sharding.make_mesh(MESHES[ring])):
        found, out = jax.jit(run, static_argnums=3)(arrays, where, real, ring_attention.balance)
    np.testing.assert_allclose(out, wanted_out, rtol=1e-5, atol=1e-6)
    for got, want in zip(found, wanted, strict=True):
        assert jnp.linalg.norm(got - want) < 1e-5 * jnp.linalg.norm(want)


def test_every_device_holds_an_early_and_a_late_piece():
    with jax.set_mesh(sharding.make_mesh(MESHES[4])):
        x = jnp.arange(16)[None]
        balanced = jax.jit(ring_attention.balance)(x)
        back = jax.jit(lambda x: ring_attention.balance(x, inverse=True))(balanced)
    assert balanced[0].tolist() == [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    np.testing.assert_array_equal(back, x)


def test_a_sequence_that_the_ring_does_not_divide_is_left_to_the_compiler():
    arrays, where = inputs(length=24)
    run = jax.jit(lambda arrays: ops.attention(*arrays, **where, aligned=True))
    wanted = run(arrays)
    with jax.set_mesh(sharding.make_mesh(MESHES[8])):
        assert ring_attention.applies(32) and not ring_attention.applies(24)
        found = jax.jit(lambda arrays: ops.attention(*arrays, **where, aligned=True))(arrays)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
