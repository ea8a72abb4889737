# SPDX-License-Identifier: Apache-2.0
"""Expert models in the training step: microbatches and recomputation change neither losses nor loads."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import sharding
from research.core.sharding import MeshSpec
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.routers import Sigmoid
from research.train.start import Program
from research.train.step import make_gradient
from tests import tiny
from tests.train.test_step import assert_same, first_state, gradients, one_step

EXPERTS = Moe(4, 32, Sigmoid(k=2, bias_rate=0.01), balance=0.01, z_loss=1e-3)
MODEL = replace(tiny.MODEL, num_layers=4, mlp=(Mlp(64), EXPERTS))


def experiment(*, balance=0.01, **changes):
    model = replace(MODEL, mlp=(Mlp(64), replace(EXPERTS, balance=balance)), **changes.pop("model", {}))
    return tiny.experiment(model=model, **changes)


@pytest.fixture(scope="module")
def whole():
    return gradients(experiment(balance=0.0))


@pytest.fixture(scope="module")
def after_one_step():
    return one_step(experiment(balance=0.0))


@pytest.mark.slow
def test_microbatches_are_the_whole_batch_but_for_the_balance_loss(whole, after_one_step):
    """Loads are summed over the microbatches before the bias moves, once."""
    split = experiment(balance=0.0, accumulate=4)
    assert_same(gradients(split), whole, loss=1e-6, gradient=2e-5)
    buffers = one_step(split)[2].buffers
    jax.tree.map(np.testing.assert_array_equal, buffers, after_one_step[2].buffers)
    assert np.abs(buffers["layers"]["block1"]["mlp"]["bias"]).max() > 0


@pytest.mark.slow
def test_a_balance_loss_is_of_one_microbatch():
    """A product of means: of microbatches it is the mean of theirs, not that of the whole batch."""
    batch = tiny.batch()

    def balance(experiment, rows=slice(None)):
        return float(one_step(experiment, batch={name: x[rows] for name, x in batch.items()})[3]["loss/balance"])

    found, each = balance(experiment(accumulate=4)), [balance(experiment(), slice(i, None, 4)) for i in range(4)]
    assert found == pytest.approx(np.mean(each), rel=1e-6)
    assert abs(balance(experiment()) - found) > 1e-3 * found


@pytest.mark.parametrize("remat", ["none", "full"])
def test_recomputation_counts_a_load_once(remat):
    """Every token of the batch, twice: its two experts."""
    spec = experiment(model={"remat": remat})
    state = first_state(Program(spec, sharding.make_mesh(MeshSpec(data=1))))
    gradient = jax.jit(make_gradient(spec, platform="cpu"))
    batch = tiny.batch()
    stats = gradient(state, {}, jax.tree.map(jnp.asarray, batch), jax.random.key(0))[1].stats["layers"]["block1"]
    assert np.asarray(stats["load"]).sum(axis=1).tolist() == [2 * batch["tokens"].size] * 2
    assert np.asarray(stats["tokens"]).tolist() == [batch["tokens"].size] * 2


def test_the_record_says_how_each_router_does(after_one_step):
    metrics = after_one_step[3]
    for name in ("load_entropy", "max_load", "dropped", "confidence"):
        assert metrics[f"router/{name}"].shape == (2,)
    assert metrics["loss"] == pytest.approx(metrics["loss/next_token"] + metrics["loss/router_z"], rel=1e-6)
