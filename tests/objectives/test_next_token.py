# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import hlo, sharding
from research.core.sharding import MeshSpec
from research.core.tree import named_leaves
from research.core.types import Precision
from research.objectives.next_token import NextToken, token_sums
from tests import tiny

PRECISION = Precision()


def plain(policy, batch, z_loss):
    """The textbook form: all logits at once."""
    logits = policy.logits(policy.forward(batch).hidden).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    weights = batch["weights"]
    return jnp.sum((log_z - chosen + z_loss * log_z**2) * weights) / jnp.sum(weights)


def mean_loss(params, model, batch, objective):
    policy = model.bind(params, {}, PRECISION)
    loss = objective(policy, {}, batch, jax.random.key(0))
    return sum(c * v.mean for c, v in loss.terms.values()), loss


@pytest.mark.parametrize(
    ("head", "z_loss", "chunk"),
    [
        ("tied", 1e-2, 100),
        pytest.param("untied", 0.0, 64, marks=pytest.mark.slow),
        pytest.param("untied", 1e-2, 0, marks=pytest.mark.slow),
    ],
)
def test_chunked_is_plain_in_value_and_gradient(head, z_loss, chunk):
    model, batch = replace(tiny.MODEL, head=head, num_layers=1), tiny.batch(rows=4)
    params = model.init_params(jax.random.key(0), PRECISION)
    want_value, want = jax.jit(jax.value_and_grad(lambda p: plain(model.bind(p, {}, PRECISION), batch, z_loss)))(params)
    (value, loss), gradient = jax.jit(
        jax.value_and_grad(lambda p: mean_loss(p, model, batch, NextToken(z_loss=z_loss, chunk=chunk)), has_aux=True)
    )(params)
    assert float(value) == pytest.approx(float(want_value), rel=1e-6)
    for name, leaf in named_leaves(want).items():
        assert jnp.linalg.norm(named_leaves(gradient)[name] - leaf) < 1e-5 * jnp.linalg.norm(leaf), name
    assert loss.metrics["cross_entropy"].weight == np.sum(batch["weights"])


@pytest.mark.slow
def test_without_a_gradient_the_value_is_the_same():
    batch = tiny.batch(rows=4)
    params = tiny.MODEL.init_params(jax.random.key(0), PRECISION)
    value, _ = jax.jit(lambda p: mean_loss(p, tiny.MODEL, batch, NextToken(chunk=64)))(params)
    both, _ = jax.jit(jax.value_and_grad(lambda p: mean_loss(p, tiny.MODEL, batch, NextToken(chunk=64))[0]))(params)
    assert float(value) == pytest.approx(float(both), rel=1e-6)


def test_logits_never_stand_whole():
    """No array of [tokens, vocabulary] elements in the compiled program's own text, nor memory for one."""
    model, batch = replace(tiny.MODEL, vocab_size=4096, num_layers=1), tiny.batch(rows=8, vocab_size=4096)

    def program(objective):
        shapes = model.shapes(PRECISION)
        grad = jax.jit(jax.grad(lambda p: mean_loss(p, model, batch, objective)[0]))
        return grad.lower(shapes).compile()

    chunked, whole = program(NextToken(chunk=64)), program(NextToken(chunk=0))
    logits = 8 * 64 * 4096 * 4
    assert "[512,4096]" not in chunked.as_text() and "[8,64,4096]" not in chunked.as_text()
    assert "[512,4096]" in whole.as_text() or "[8,64,4096]" in whole.as_text()
    saved = whole.memory_analysis().temp_size_in_bytes - chunked.memory_analysis().temp_size_in_bytes
    assert saved > 0.5 * logits


def test_on_a_mesh_the_head_is_fetched_once_and_its_gradient_added_up_once():
    """Not once for each of the four chunks of a device: no collective is run in a loop."""
    mesh = sharding.make_mesh(MeshSpec(data=1, fsdp=4, tensor=2))
    model, batch = tiny.MODEL, tiny.batch(rows=8, length=63)  # a length that the devices do not divide
    params = model.shapes(PRECISION)
    layout = sharding.tree_shardings(mesh, params, model.logical_axes())
    params = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), params, layout)
    hidden = jax.ShapeDtypeStruct(
        (8, 63, model.d_model), jnp.float32, sharding=sharding.named_sharding(mesh, ("batch", "sequence", None))
    )

    def loss(params, hidden):
        head = model.bind(params, {}, PRECISION).head()
        return token_sums(head, hidden, batch["targets"], batch["weights"], chunk=16).loss

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden).compile().as_text()
    found = hlo.Program(text).collectives()
    assert all(c.runs == 1 for c in found)
    head_bytes, hidden_bytes = 4 * model.d_model * model.vocab_size, 4 * 2 * 64 * model.d_model
    assert sum(c.bytes for c in found if c.kind == "all-gather") <= 1.5 * head_bytes + 2 * hidden_bytes
    assert sum(c.bytes for c in found if c.kind in ("all-reduce", "reduce-scatter")) < 1.6 * head_bytes


def test_tokens_without_weight_do_not_count():
    model, batch = tiny.MODEL, tiny.batch(rows=4)
    other = dict(batch, targets=np.where(batch["weights"] > 0, batch["targets"], 7))
    params = model.init_params(jax.random.key(0), PRECISION)
    run = jax.jit(lambda b: mean_loss(params, model, b, NextToken(chunk=64))[0])
    assert run(batch) == run(other)


def test_bits_per_byte_has_the_bytes_for_denominator():
    batch = dict(tiny.batch(rows=4), target_bytes=np.full((4, 64), 2.0, np.float32))
    params = tiny.MODEL.init_params(jax.random.key(0), PRECISION)
    _, loss = jax.jit(lambda p: mean_loss(p, tiny.MODEL, batch, NextToken()))(params)
    bits, nats = loss.metrics["bits_per_byte"], loss.metrics["cross_entropy"]
    assert float(bits.mean) == pytest.approx(float(nats.sum) / np.log(2) / (2 * 4 * 64), rel=1e-5)
