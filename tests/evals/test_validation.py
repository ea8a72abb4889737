# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from research.core import sharding
from research.core.sharding import MeshSpec
from research.core.types import Context, Precision
from tests import tiny


def test_means_are_over_all_batches_together(cache_dir):
    """The mean over batches of uneven weight is that of their tokens, not of the batches' means."""
    (validation,) = tiny.experiment().evals
    mesh = sharding.make_mesh(MeshSpec(data=1))
    with jax.set_mesh(mesh):
        context = Context(mesh=mesh, seed=0, cache_dir=cache_dir)
        params = jax.jit(lambda: tiny.MODEL.init_params(jax.random.key(0), Precision()))()
        policy = tiny.MODEL.bind(params, {}, Precision())
        found = validation.start(context)(policy, 1)
        nats = weight = size = 0.0
        stream = validation.source.start(context)
        for index in range(stream.num_batches):
            batch = stream.next(None, index)
            loss = jax.jit(lambda b: validation.objective(policy, {}, b, jax.random.key(0)))(batch)
            nats += float(loss.metrics["cross_entropy"].sum)
            weight += float(np.sum(batch["weights"]))
            size += float(np.sum(batch["target_bytes"]))
    assert found["validation/loss"] == pytest.approx(nats / weight, rel=1e-6)
    assert found["validation/bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-6)
