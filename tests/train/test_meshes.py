# SPDX-License-Identifier: Apache-2.0
"""Every mesh of eight devices equals one device: loss, gradients, SGD and AdamW, for a dense and an expert model.

Gradients are read off the real training step: after one step of AdamW from zero moments without clipping, the first
moment is (1 - b1) times the gradient.
"""

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
from research.models.routers import TopK
from research.objectives.next_token import NextToken
from research.train.experiment import AdamW
from research.train.start import Program, check_fits
from tests import tiny
from tests.train.test_step import first_state

RATE, SGD_RATE, B1 = np.float32(1e-3), np.float32(0.5), 0.9
MARGIN = 1e-5  # between the scores of an expert chosen and one not: float32 moves them by a tenth of it
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
    return tiny.batch(rows=8, length=32, vocab_size=64, documents=2)


def trained(experiment, spec):
    """(loss, gradients, parameters after three steps of SGD, AdamW's change of them)."""
    mesh = sharding.make_mesh(spec)
    check_fits(experiment, mesh)
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        state = jax.device_get(first_state(program))
        placed = {name: jax.device_put(x, sharding.batch_sharding(mesh)) for name, x in batch().items()}

        def gradient(params):
            after, metrics = program.step(
                jax.device_put(state._replace(params=params), program.layout), {}, placed, RATE
            )
            (adam,) = [part for part in after.opt_state if hasattr(part, "mu")]
            after, mu = jax.device_get((after.params, adam.mu))
            return float(metrics["loss"]), jax.tree.map(lambda m: m / (1 - B1), mu), after

        params, found = state.params, []
        for _ in range(3):
            found.append(gradient(params))
            params = jax.tree.map(lambda p, g: p - SGD_RATE * g, params, found[-1][1])
        loss, gradients, after = found[0]
        return loss, gradients, params, jax.tree.map(np.subtract, after, state.params)


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
            assert not GAPS or min(GAPS) > MARGIN
        return known[name]

    return reference


def gaps(found, wanted):
    """||difference|| / ||reference|| by tensor."""
    pairs = zip(named_leaves(found).items(), jax.tree.leaves(wanted), strict=True)
    return {name: np.linalg.norm(got - want) / np.linalg.norm(want) for (name, got), want in pairs}


def compare(name, sizes, references):
    loss, gradients, sgd, adam = trained(experiment(MODELS[name]), MeshSpec(**sizes))
    wanted = references(name)
    far = sizes["context"] > 1 or sizes["stage"] > 1
    assert abs(loss - wanted[0]) <= 1e-6 * abs(wanted[0])
    for what, found, want, limit in (
        ("gradient", gradients, wanted[1], 1e-4 if far else 1e-5),
        ("parameters after SGD", sgd, wanted[2], 1e-5),
        ("AdamW's update", adam, wanted[3], 1e-3),
    ):
        worst = max(gaps(found, want).items(), key=lambda item: item[1])
        assert worst[1] < limit, (what, worst)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", DRAWN, ids=sharding.described)
def test_every_mesh_is_one_device(name, sizes, references):
    compare(name, sizes, references)


@pytest.mark.verify
@pytest.mark.parametrize("name", MODELS)
def test_all_56_meshes_are_one_device(name, references, capsys):
    assert len(SHAPES) == 56
    refused, failed = [], []
    for sizes in SHAPES:
        try:
            compare(name, sizes, references)
        except MeshError as error:
            refused.append(str(error))
        except AssertionError as error:
            failed.append(f"{sharding.described(sizes)}: {error.args[0]}")
    with capsys.disabled():
        print(f"\n{name}: {len(SHAPES) - len(refused)} meshes ran, {len(refused)} were refused")
    assert not refused and not failed, (refused, failed)
