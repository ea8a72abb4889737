# SPDX-License-Identifier: Apache-2.0
"""The step: microbatches equal the whole batch, every mesh equals one device, buffers and averages move."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import sharding
from research.core.sharding import MeshSpec
from research.core.tree import named_leaves
from research.core.types import Loss, Precision, Term, WeightedSum
from research.objectives.next_token import NextToken
from research.train.experiment import AdamW
from research.train.optimizers import Sgd
from research.train.start import Program
from tests import tiny

RATE = np.float32(1.0)


@functools.cache
def host_params(model):
    return jax.device_get(jax.jit(functools.partial(model.init_params, precision=Precision()))(jax.random.key(0)))


def first_state(program):
    """As ``program.fresh()``, without compiling an initialiser for every mesh."""
    params = host_params(program.experiment.model)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), program.shapes)
    state = zeros._replace(params=params, ema=params if program.experiment.ema else None)
    return jax.device_put(state, program.layout)


def one_step(experiment, mesh_spec=MeshSpec(data=1), batch=None, count=1):  # noqa: B008
    """(loss of the first step, parameters before, parameters after)."""
    mesh = sharding.make_mesh(mesh_spec)
    with jax.set_mesh(mesh):
        program = Program(experiment, mesh)
        state = first_state(program)
        before = jax.device_get(state.params)
        host = batch or tiny.batch()
        placed = {k: jax.device_put(v, sharding.batch_sharding(mesh)) for k, v in host.items()}
        losses = []
        for _ in range(count):
            state, metrics = program.step(state, {}, placed, RATE)
            losses.append(float(metrics["loss"]))
        return losses, before, jax.device_get(state), jax.device_get(metrics)


def gradients(experiment, mesh_spec=MeshSpec(data=1), batch=None):  # noqa: B008
    """Loss and gradient through the real step: what one step of plain descent at rate 1 takes away."""
    experiment = replace(experiment, optimizer=Sgd(peak=1.0))
    losses, before, state, _ = one_step(experiment, mesh_spec, batch)
    return losses[0], named_leaves(jax.tree.map(np.subtract, before, state.params))


def assert_same(found, wanted, *, loss, gradient):
    assert abs(found[0] - wanted[0]) <= loss * abs(wanted[0])
    for name, leaf in wanted[1].items():
        gap = np.linalg.norm(found[1][name] - leaf) / np.linalg.norm(leaf)
        assert gap < gradient, (name, gap)


# weights far from one and gradients far from zero, so that a difference of parameters holds the gradient well
MODEL = replace(tiny.MODEL, attention=replace(tiny.MODEL.attention, num_kv_heads=4))


def uneven():
    """Rows of very different weight: a mean of means would be far from the mean."""
    batch = tiny.batch()
    weights = np.array(batch["weights"])
    weights[1::2, 4:] = 0.0
    return dict(batch, weights=weights)


WHOLE = {}


def whole_batch(experiment):
    """The reference of several tests, computed once."""
    if experiment.hash not in WHOLE:
        WHOLE[experiment.hash] = gradients(experiment, batch=uneven())
    return WHOLE[experiment.hash]


@pytest.mark.parametrize(
    ("microbatches", "mesh"),
    [
        (4, MeshSpec(data=1)),
        pytest.param(2, MeshSpec(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
    ],
)
def test_microbatches_are_the_whole_batch(microbatches, mesh):
    experiment = tiny.experiment(model=MODEL)
    wanted = whole_batch(experiment)
    found = gradients(replace(experiment, accumulate=microbatches), mesh, batch=uneven())
    assert_same(found, wanted, loss=1e-6, gradient=2e-5)


@pytest.mark.slow
def test_summing_weights_first_costs_no_second_forward_pass():
    """The pass over microbatches that finds the denominators leaves no matrix product in the program."""

    def products(microbatches):
        experiment = tiny.experiment(accumulate=microbatches)
        mesh = sharding.make_mesh(MeshSpec(data=1))
        with jax.set_mesh(mesh):
            program = Program(experiment, mesh)
            text = program.step.lower(program.shapes, {}, tiny.batch(), RATE).compile().as_text()
        return sum(" dot(" in line or "custom-call" in line for line in text.splitlines())

    assert products(4) == products(1)


@dataclass(frozen=True)
class TwoTerms:
    """Cross-entropy over the weighted tokens and a second term over rows, each with its own denominator."""

    def __call__(self, policy, frozen, batch, key):
        loss = NextToken(chunk=0)(policy, frozen, batch, key)
        hidden = policy.forward(batch).hidden
        rows = batch["positions"].shape[0]
        second = WeightedSum(jnp.sum(jnp.square(hidden)) / hidden.shape[1], jnp.float32(rows))
        return Loss({**loss.terms, "rows": Term(0.5, second)}, loss.metrics, {"rows": jnp.float32(rows)})


@pytest.mark.slow
def test_each_term_keeps_its_own_denominator():
    experiment = tiny.experiment(model=MODEL, objective=TwoTerms())
    wanted = whole_batch(experiment)
    assert_same(gradients(replace(experiment, accumulate=4), batch=uneven()), wanted, loss=1e-6, gradient=2e-5)


@dataclass(frozen=True)
class Counting(type(tiny.MODEL)):
    """A decoder with a buffer that is told the statistics of the whole global batch, once a step."""

    def init_buffers(self):
        return {"rows": jnp.zeros(())}

    def update(self, buffers, stats):
        return {"rows": buffers["rows"] + stats["rows"]}


@pytest.mark.slow
def test_buffers_are_updated_once_a_step_from_the_whole_batch():
    fields = {name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__}
    experiment = tiny.experiment(model=Counting(**fields), objective=TwoTerms(), accumulate=4)
    _, _, state, metrics = one_step(experiment, count=3)
    assert state.buffers["rows"] == 3 * 8
    assert metrics["loss"] == pytest.approx(metrics["loss/next_token"] + metrics["loss/rows"], rel=1e-6)


@pytest.mark.slow
def test_moving_average_follows_the_parameters():
    _, before, state, _ = one_step(tiny.experiment(ema=0.75, optimizer=Sgd(peak=1.0)))
    for name, leaf in named_leaves(state.ema).items():
        wanted = 0.75 * named_leaves(before)[name] + 0.25 * named_leaves(state.params)[name]
        np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-7)


def test_norms_by_layer_add_up():
    _, _, state, metrics = one_step(tiny.experiment())
    for name in ("grad_norm", "param_norm"):
        parts = [value for key, value in metrics.items() if key.startswith(name + "/")]
        assert metrics[f"{name}/layers"].shape == (2,)
        assert np.sqrt(sum(np.sum(np.square(p)) for p in parts)) == pytest.approx(metrics[name], rel=1e-5)
    by_hand = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(state.params)))
    assert metrics["param_norm"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.slow
def test_clipping_bounds_the_moments_and_not_the_reported_norm():
    """After one step Adam's first moment is (1 - b1) times the clipped gradient."""
    _, _, state, metrics = one_step(tiny.experiment(optimizer=AdamW(clip=1e-3)))
    _, _, _, loose = one_step(tiny.experiment(optimizer=AdamW(clip=0.0)))
    assert metrics["grad_norm"] == pytest.approx(loose["grad_norm"], rel=1e-6)  # of two programs: but for rounding
    assert loose["grad_norm"] > 1e-3
    (adam,) = [part for part in state.opt_state if hasattr(part, "mu")]
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(adam.mu)))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_microbatches_are_spread_over_all_shards():
    x = jnp.arange(8)[:, None]
    parts = np.asarray(sharding.microbatch(x, 2))
    assert sorted(parts.ravel().tolist()) == list(range(8))
    assert parts[0, :, 0].tolist() == [0, 2, 4, 6]
