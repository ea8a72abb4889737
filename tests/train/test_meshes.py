# SPDX-License-Identifier: Apache-2.0
"""Every mesh of eight devices equals one device: loss, gradients, SGD and AdamW, for a dense and an expert model.

Gradients are read off the real training step: after one step of AdamW from zero moments without clipping, the first
moment is (1 - b1) times the gradient.
"""

import functools
import math
import random
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import sharding
from research.core.sharding import MeshError, MeshSpec
from research.core.tree import named_leaves
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.pipeline import Pipeline
from research.models.positions import Learned
from research.models.routers import ExpertChoice, Gshard, Sigmoid, TopK, switch
from research.objectives.next_token import NextToken
from research.train.experiment import AdamW
from research.train.start import Program, check_fits
from tests import tiny
from tests.train.test_step import first_state

RATE, SGD_RATE, B1 = np.float32(1e-3), np.float32(0.5), 0.9
MARGIN = 1e-5  # between the scores of an expert chosen and one not: float32 moves them by a tenth of it
ONE = dict.fromkeys(MeshSpec.__dataclass_fields__, 1)
SHAPES = sharding.meshes(8)
DRAWN = random.Random(3).sample(SHAPES, 8)
GAPS = []


@dataclass(frozen=True)
class Watched(TopK):
    """Top-k that tells by how much its choices were made."""

    def __call__(self, group):
        scores = -jnp.sort(-group.logits, axis=-1)
        jax.debug.callback(lambda gap: GAPS.append(float(np.min(gap))), scores[:, self.k - 1] - scores[:, self.k])
        return super().__call__(group)


DENSE = Decoder(
    vocab_size=64, d_model=64, num_layers=8, attention=Attention(num_heads=16, num_kv_heads=8), mlp=Mlp(d_ff=32)
)
EXPERTS = replace(DENSE, mlp=Moe(8, 16, TopK(2), balance=0.01, z_loss=1e-3))
MODELS = {"dense": DENSE, "experts": EXPERTS}


def experiment(model):
    source = replace(tiny.experiment().source, sequence_length=32)
    # eps above the rounding of gradients: Adam's first update is g / (|g| + eps), a sign where g is far above eps
    optimizer = AdamW(b1=B1, clip=0.0, weight_decay=0.1, eps=1e-6)
    return tiny.experiment(model=model, objective=NextToken(z_loss=1e-3, chunk=16), optimizer=optimizer, source=source)


def batch():
    """Two documents a row, no token twice in a row (two that begin alike, or a document that begins with the same token
    twice, are ties to experts that choose tokens); the last row ends in padding."""
    found = {name: np.array(x) for name, x in tiny.batch(rows=8, length=32, vocab_size=64, documents=2).items()}
    found["tokens"] = np.random.default_rng(2).permuted(np.tile(np.arange(64, dtype=np.int32), (8, 1)), axis=1)[:, :32]
    found["segment_ids"][-1, 20:] = 0
    found["weights"][-1, 20:] = 0
    return found


def trained(experiment, spec):
    """(loss, gradients, parameters after three steps of SGD, AdamW's change of them, routers' biases after a step)."""
    mesh = sharding.make_mesh(spec)
    check_fits(experiment, mesh)
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        state = jax.device_get(first_state(program))
        uneven = lambda x: np.linspace(-0.1, 0.1, x.size, dtype=x.dtype).reshape(x.shape)  # noqa: E731
        state = state._replace(buffers=jax.tree.map(uneven, state.buffers))
        placed = {name: jax.device_put(x, sharding.batch_sharding(mesh)) for name, x in batch().items()}

        def gradient(params):
            after, metrics = program.step(
                jax.device_put(state._replace(params=params), program.layout), {}, placed, RATE
            )
            (adam,) = [part for part in after.opt_state if hasattr(part, "mu")]
            params, mu, buffers = jax.device_get((after.params, adam.mu, after.buffers))
            return float(metrics["loss"]), jax.tree.map(lambda m: m / (1 - B1), mu), params, buffers

        params, found = state.params, []
        for _ in range(3):
            found.append(gradient(params))
            params = jax.tree.map(lambda p, g: p - SGD_RATE * g, params, found[-1][1])
        loss, gradients, after, buffers = found[0]
        return loss, gradients, params, jax.tree.map(np.subtract, after, state.params), buffers


@pytest.fixture(scope="module")
def references():
    """One device's, computed once a model."""
    known = {}

    def reference(name):
        if name not in known:
            model = MODELS[name]
            if name == "experts":
                model = replace(model, mlp=replace(model.mlp, router=Watched(2)))
            known[name] = trained(experiment(model), MeshSpec(data=1))
            jax.effects_barrier()
            assert min(GAPS, default=1.0 if name == "dense" else 0.0) > MARGIN
        return known[name]

    return reference


def gaps(found, wanted):
    """||difference|| / ||reference|| by tensor."""
    pairs = zip(named_leaves(found).items(), jax.tree.leaves(wanted), strict=True)
    return {name: np.linalg.norm(got - want) / np.linalg.norm(want) for (name, got), want in pairs}


def compare(experiment, sizes, wanted, *, later_steps=True):
    loss, gradients, sgd, adam, buffers = trained(experiment, MeshSpec(**{**ONE, **sizes}))
    sizes = {**ONE, **sizes}
    far = sizes["context"] > 1 or sizes["stage"] > 1
    assert abs(loss - wanted[0]) <= 1e-6 * abs(wanted[0])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), buffers, wanted[4])  # moved by signs
    for what, found, want, limit in (
        ("gradient", gradients, wanted[1], 1e-4 if far else 1e-5),
        ("parameters after SGD", sgd, wanted[2], 1e-5),
        ("AdamW's update", adam, wanted[3], 1e-3),
    ):
        if what == "parameters after SGD" and not later_steps:
            continue
        worst = max(gaps(found, want).items(), key=lambda item: item[1])
        assert worst[1] < limit, (what, worst)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", DRAWN, ids=sharding.described)
def test_every_mesh_is_one_device(name, sizes, references):
    compare(experiment(MODELS[name]), sizes, references(name))


FIRST = replace(EXPERTS, first=(Mlp(32),) * 2, num_layers=10)
PERIOD = replace(EXPERTS, mlp=(Mlp(32), EXPERTS.mlp))
CAPACITY = {
    "switch": replace(EXPERTS.mlp, router=switch(0.75)),
    "expert choice": replace(EXPERTS.mlp, router=ExpertChoice(1.5)),
    "deepseek": replace(EXPERTS.mlp, router=Sigmoid(2, groups=4, top_groups=2, bias_rate=0.01), shared_d_ff=16),
    "gshard in buffers": replace(EXPERTS.mlp, router=Gshard(1.0), dispatch="buffers"),
    "gshard without a capacity": replace(EXPERTS.mlp, router=Gshard(0.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (replace(EXPERTS, mlp=CAPACITY["switch"]), {"context": 4, "expert": 2}),
        (replace(EXPERTS, mlp=CAPACITY["expert choice"]), {"context": 2, "expert": 2, "tensor": 2}),
        (replace(EXPERTS, mlp=CAPACITY["deepseek"]), {"stage": 2, "fsdp": 2, "expert": 2}),
        (replace(EXPERTS, mlp=CAPACITY["gshard without a capacity"]), {"context": 4, "data": 2}),
        (replace(EXPERTS, mlp=CAPACITY["gshard in buffers"]), {"expert": 4, "tensor": 2}),
        (replace(EXPERTS, mlp=CAPACITY["gshard in buffers"]), {"stage": 2, "context": 2, "expert": 2}),
        (replace(FIRST, remat="full"), {"stage": 4, "expert": 2}),
        (replace(PERIOD, remat="save_weight_matmuls", pipeline=Pipeline(rounds=1)), {"stage": 4, "context": 2}),
        (replace(DENSE, remat="save_matmuls", pipeline=Pipeline(microbatches=4, rounds=2)), {"stage": 2, "data": 2}),
        (replace(DENSE, head="tied", position=Learned(32)), {"stage": 2, "tensor": 2, "context": 2}),
    ],
    ids=lambda value: sharding.described(value) if isinstance(value, dict) else "",
)
def test_other_models_are_one_device(model, sizes):
    """Capacity, choice by experts and random second choices are of whole rows; stages hold patterns of layers."""
    ones = trained(experiment(model), MeshSpec(data=1))
    # an expert's last choice among tokens has no margin here: rounding may turn one in a later step
    by_token = not isinstance(model.mlp, Moe) or model.mlp.router.by_token
    compare(experiment(model), sizes, ones, later_steps=by_token)


def compiled(model, sizes):
    """The training step's program on a mesh, and what it was compiled for."""
    mesh = sharding.make_mesh(MeshSpec(**{**ONE, **sizes}))
    with jax.set_mesh(mesh):
        program = Program(experiment(model), mesh)
        place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
        state = jax.tree.map(place, program.shapes, program.layout)
        placed = {name: place(x, sharding.batch_sharding(mesh)) for name, x in batch().items()}
        return program, program.step.lower(state, {}, placed, RATE).compile()


def test_stages_share_the_work():
    """A tick computes one microbatch of one layer on each device; M R + S - 1 ticks, of which S - 1 are idle."""
    (_, one), (_, staged) = compiled(DENSE, {}), compiled(DENSE, {"stage": 8})
    # loop bodies are counted once: a layer on all eight rows against a layer on one row, and an eighth of the head
    assert staged.cost_analysis()["flops"] < 1.2 / 8 * one.cost_analysis()["flops"]
    assert 'known_trip_count":{"n":"15"}' in staged.as_text()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("dense", {"fsdp": 8}), ("experts", {"expert": 2, "fsdp": 2, "stage": 2}), ("dense", {"context": 4, "tensor": 2})],
    ids=str,
)
def test_sharding_really_shards(name, sizes):
    """As compiled: every device holds an eighth of every matrix and of its moments; only vectors are everywhere."""
    program, found = compiled(MODELS[name], sizes)
    (inputs, *_), outputs = found.input_shardings[0], found.output_shardings[0]
    for state in (inputs, outputs):
        (adam,) = [part for part in state.opt_state if hasattr(part, "mu")]
        for tree in (state.params, adam.mu, adam.nu):
            for (leaf, where), shape in zip(
                named_leaves(tree).items(), jax.tree.leaves(program.shapes.params), strict=True
            ):
                share = math.prod(where.shard_shape(shape.shape)) / math.prod(shape.shape)
                assert share == (1 if "norm" in leaf else 1 / 8), (leaf, share)


@pytest.mark.verify
@pytest.mark.parametrize("name", MODELS)
def test_all_56_meshes_are_one_device(name, references, capsys):
    assert len(SHAPES) == 56
    refused, failed = [], []
    for sizes in SHAPES:
        try:
            compare(experiment(MODELS[name]), sizes, references(name))
        except MeshError as error:
            refused.append(str(error))
        except AssertionError as error:
            failed.append(f"{sharding.described(sizes)}: {error.args[0]}")
    with capsys.disabled():
        print(f"\n{name}: {len(SHAPES) - len(refused)} meshes ran, {len(refused)} were refused")
    assert not refused and not failed, (refused, failed)
