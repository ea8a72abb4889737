# SPDX-License-Identifier: Apache-2.0
"""Costs against the programs themselves: the jaxpr's matrix products exactly, and XLA's own count within
2%."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex_core

from research.core import sharding, tree
from research.core.sharding import MeshSpec
from research.core.types import Precision
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.latent_attention import LatentAttention
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.positions import Learned, RelativeBias, Rotary, Sinusoidal, TransformerXL
from research.models.routers import TopK
from research.objectives.next_token import NextToken
from research.scaling import cost
from research.train.start import Program
from tests import tiny

BATCH, LENGTH = 2, 16


def attention(num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None) -> Attention:
    return Attention(num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, implementation="plain")


MODELS = {
    "mha-swiglu-untied-rotary": Decoder(97, 32, 3, attention(4), Mlp(56)),
    "mha-gelu-tied-learned": Decoder(
        50,
        24,
        2,
        attention(3),
        Mlp(96, activation="gelu"),
        norm=Norm("layer"),
        position=Learned(20),
        head="tied",
    ),
    "gqa-geglu-tied-rotary-unrolled": Decoder(
        61, 32, 4, attention(4, 2), Mlp(40, activation="geglu"), head="tied", layers="unrolled"
    ),
    "mqa-relu-untied-sinusoidal": Decoder(
        33, 16, 1, attention(4, 1), Mlp(64, activation="relu"), position=Sinusoidal()
    ),
    "gqa-wide-heads": Decoder(40, 16, 2, attention(6, 3, head_dim=10), Mlp(24), position=Rotary(theta=500.0)),
    "sandwich-biases-qk-norm-parallel": Decoder(
        61,
        32,
        5,
        (attention(4, 2), replace(attention(4), bias="all", qk_norm=Norm(), sinks="learned")),
        (Mlp(40, bias=True), Mlp(24, "relu", bias=True)),
        norm=Norm("layer"),
        norms="sandwich",
        residual="parallel",
        head_bias=True,
    ),
    "one-norm-relative-biases": Decoder(
        61,
        32,
        2,
        attention(4, 2),
        Mlp(40),
        norm=Norm("layer", bias=False),
        residual="parallel_shared",
        position=RelativeBias(8, 20),
    ),
    "relative-biases-of-each-layer": Decoder(
        61, 32, 2, replace(attention(4), bias="qkv"), Mlp(40), position=RelativeBias(8, 20, per_layer=True)
    ),
    "latent": Decoder(
        61, 32, 3, LatentAttention(4, 12, 20, 8, 4, 10, implementation="plain"), Mlp(40), first=(Mlp(48),), ahead=2
    ),
    "latent-one-rank": Decoder(61, 32, 2, LatentAttention(4, 12, 0, 8, 4, 10, implementation="plain"), Mlp(40)),
}


def training_loss(model: Decoder) -> Any:
    """Mean cross-entropy through the plain head."""

    def loss(params, batch):
        policy = model.bind(params, {}, Precision())
        output = policy.forward(batch)
        log_probs = [jax.nn.log_softmax(policy.logits(hidden)) for hidden in (output.hidden, *output.ahead)]
        return -sum(jnp.mean(jnp.take_along_axis(x, batch["targets"][..., None], axis=-1)) for x in log_probs)

    return loss


def batch_shapes(batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return {"tokens": ids, "positions": ids, "segment_ids": ids, "targets": ids}


def matmul_flops(jaxpr: Any) -> int:
    """FLOPs of every dot_general in a jaxpr, those of inner jaxprs included, scan bodies times their
    length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)
        assert equation.primitive.name not in ("while", "cond", "conv_general_dilated"), "not counted here"
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, jex_core.ClosedJaxpr):
                    total += times * matmul_flops(inner.jaxpr)
                elif isinstance(inner, jex_core.Jaxpr):
                    total += times * matmul_flops(inner)
    return total


def test_the_counter_counts_a_known_program():
    def program(x):
        return jax.lax.scan(lambda c, _: (jax.jit(jnp.dot)(c, x), None), x, length=5)[0]

    jaxpr = jax.make_jaxpr(program)(jnp.zeros((3, 3)))
    assert matmul_flops(jaxpr.jaxpr) == 5 * 2 * 27


@pytest.mark.parametrize("name", MODELS)
def test_training_flops_are_the_gradient_s_matrix_products(name):
    model = MODELS[name]
    shapes, batch = model.shapes(Precision()), batch_shapes(BATCH, LENGTH)
    forward = matmul_flops(jax.make_jaxpr(training_loss(model))(shapes, batch).jaxpr)
    assert forward == BATCH * LENGTH * cost.forward_flops_per_token(model, sequence_length=LENGTH).total
    step = matmul_flops(jax.make_jaxpr(jax.value_and_grad(training_loss(model)))(shapes, batch).jaxpr)
    assert step == BATCH * LENGTH * cost.training_flops_per_token(model, sequence_length=LENGTH)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_tree_s(name):
    model = MODELS[name]
    shapes, counts = model.shapes(Precision()), cost.params(model)
    assert counts.total == tree.size(shapes)
    outside = sum(tree.size(shapes[part]) for part in ("embedding", "position", "unembedding") if part in shapes)
    assert counts.non_embedding == tree.size(shapes) - outside
    assert counts.ahead == (tree.size(shapes["ahead"]) if model.ahead else 0)
    assert counts.head == (tree.size(shapes["unembedding"]) if "unembedding" in shapes else 0)


def test_parameters_of_positions_that_project_and_of_shared_experts():
    """What the products of a program do not show: W, u and v of Transformer-XL, the gate of shared experts."""
    base = Decoder(61, 32, 2, attention(4), Moe(4, 16, TopK(2), shared_d_ff=24, shared_gate=True))
    model = replace(base, position=TransformerXL())
    counts, plain = cost.params(model), cost.params(base)
    assert counts.total == tree.size(model.shapes(Precision())) == plain.total + 2 * (32 * 32 + 2 * 32)
    assert counts.total - counts.active == 2 * 2 * 3 * 32 * 16


@pytest.mark.slow
def test_xla_counts_the_whole_training_step_within_two_percent():
    """XLA also counts what is not a matrix product (softmax, norms, the optimizer), so its count lies a little
    above."""
    model = Decoder(8192, 256, 4, attention(4), Mlp(688), layers="unrolled")
    source = replace(tiny.experiment().source, batch_size=8, sequence_length=512)
    objective = NextToken(chunk=0)
    experiment = tiny.experiment(model=model, objective=objective, source=source, mesh=MeshSpec(data=1), evals=())
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        state, batch = placed(program.shapes, program.layout), tiny.batch(rows=8, length=512, vocab_size=8192)
        batch = placed(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
        compiled = program.step.lower(state, {}, batch, np.float32(1e-3)).compile()
    expected = experiment.tokens_per_step * experiment.flops_per_token
    assert expected <= compiled.cost_analysis()["flops"] <= 1.02 * expected


def placed(arrays, layout):
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arrays, layout)
