# SPDX-License-Identifier: Apache-2.0
"""Which models and batches go through stages, and which through all layers on every device."""

import jax
import pytest

from research.core import sharding
from research.core.sharding import MeshSpec
from research.models.pipeline import Pipeline


@pytest.mark.parametrize(
    ("pipeline", "rows", "repeats", "schedule"),
    [
        (Pipeline(), 8, 4, (2, 2)),
        (Pipeline(microbatches=4, rounds=1), 8, 4, (4, 1)),
        (Pipeline(), 8, 3, None),  # the layers of a teacher
        (Pipeline(), 1, 4, None),  # a row to generate from
        (Pipeline(rounds=4), 8, 4, None),
        (Pipeline(microbatches=3), 12, 4, None),
    ],
)
def test_what_cannot_be_shared_out_goes_through_all_layers_everywhere(pipeline, rows, repeats, schedule):
    with jax.set_mesh(sharding.make_mesh(MeshSpec(data=2, stage=2, tensor=2))):
        assert pipeline.schedule(rows=rows, repeats=repeats) == schedule
    with jax.set_mesh(sharding.make_mesh(MeshSpec(data=8))):
        assert pipeline.schedule(rows=rows, repeats=repeats) is None
