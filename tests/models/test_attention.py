# SPDX-License-Identifier: Apache-2.0
"""The attention layer against JAX's own attention, an outside oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.types import Precision
from research.models.attention import Attention
from research.models.layers import Build, WeightInit
from research.models.tokens import Tokens


@pytest.mark.parametrize(("kv_heads", "length"), [(1, 48), (2, 128), (4, 128)])  # plain, and in blocks
def test_the_layer_is_scaled_attention_between_its_projections(kv_heads, length):
    layer = Attention(num_heads=4, num_kv_heads=kv_heads).build(Build(32, 2, WeightInit(), Precision()))
    x_BTD = jax.random.normal(jax.random.key(0), (2, length, 32))
    positions = jnp.broadcast_to(jnp.arange(length)[None, :], (2, length))
    tokens = Tokens(positions, positions, jnp.ones_like(positions))
    params = jax.jit(layer.init)(jax.random.key(1), x_BTD, tokens, None, 0)
    found, _ = jax.jit(lambda params: layer.apply(params, x_BTD, tokens, None, 0))(params)

    w = jax.tree.map(lambda box: box.value, params["params"], is_leaf=lambda x: hasattr(x, "value"))

    @jax.jit
    def by_jax(w):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x_BTD, w[name]["w"]) for name in "qkv")
        return jnp.einsum("btnh,nhd->btd", jax.nn.dot_product_attention(q, k, v, is_causal=True), w["out"]["w"])

    np.testing.assert_allclose(found, by_jax(w), rtol=1e-4, atol=1e-5)
