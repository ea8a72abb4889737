# SPDX-License-Identifier: Apache-2.0
"""A sum tells of any flipped bit, and is the same by a program for any devices as by NumPy for arrays in memory."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.core import sharding
from research.core.sharding import MeshSpec
from research.train import checkpoint

PLACES = [((), P()), ((6,), P("tensor")), ((4, 6), P()), ((4, 6), P("data", "tensor")), ((0, 3), P())]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8"])
def test_in_memory_and_by_a_program(dtype):
    mesh = sharding.make_mesh(MeshSpec(data=2, tensor=2), jax.devices()[:4])
    rng = np.random.default_rng(0)
    arrays = [
        jax.device_put((100 * rng.normal(size=shape)).astype(dtype), NamedSharding(mesh, spec))
        for shape, spec in PLACES
    ]
    here = checkpoint.checksums(arrays)
    assert list(here.values()) == [int(total) for total in checkpoint._sums(arrays)]
    flipped = np.array(arrays[2])
    flipped.view(np.uint8)[0, 3] ^= 1 << 6
    with pytest.raises(ValueError, match="is not what was saved"):
        checkpoint.compare(here, checkpoint.checksums([*arrays[:2], jax.numpy.asarray(flipped), *arrays[3:]]))
