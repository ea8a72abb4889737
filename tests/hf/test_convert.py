# SPDX-License-Identifier: Apache-2.0
"""An import: what it refuses, and what it holds in memory: each array once, and the tensor that is put into it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.core import sharding
from research.core.sharding import MeshSpec
from research.core.types import Precision, UserError
from research.hf import convert
from research.hf.tables import shape
from tests import tiny


class Unread:
    """Files of which nothing may be read."""

    def __init__(self, shapes):
        self.shapes = shapes

    def read(self, name):
        raise AssertionError(f"{name} was read")


def test_a_number_format_that_is_not_supported_is_named_before_anything_is_read():
    family, _ = convert.fitting(tiny.MODEL, 64)
    ours = convert.shapes_of(tiny.MODEL)
    shapes = {tensor.name: (shape(tensor, ours), "F32") for tensor in convert.plan(family, tiny.MODEL)}
    last = [*shapes][-1]
    shapes[last] = (shapes[last][0], "F8_E4M3")
    mesh = sharding.make_mesh(MeshSpec(data=1), jax.devices()[:1])
    with pytest.raises(
        UserError, match=f"{last} is stored as F8_E4M3, which is not supported: it must be F32, F16, BF16"
    ):
        convert.load(family, tiny.MODEL, Unread(shapes), mesh=mesh, precision=Precision())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [P(None, None, None, "tensor"), P(None, "expert", None, "tensor")])
def test_a_tensor_is_put_in_its_place_without_a_copy_of_the_whole(dtype, spec):
    mesh = sharding.make_mesh(MeshSpec(data=1, expert=2, tensor=2), jax.devices()[:4])
    values = np.random.default_rng(0).normal(size=(3, 4, 8, 6)).astype(dtype)
    with jax.set_mesh(mesh):
        whole = convert._zeros(values.shape, jnp.dtype(dtype), NamedSharding(mesh, spec))
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P(*spec[2:])))  # noqa: E731
        index = np.asarray([2, 1], np.int32)
        memory = convert._put.lower(whole, index, place(values[2, 1])).compile().memory_analysis()
        assert memory.alias_size_in_bytes == whole.nbytes // (4 if spec[1] else 2)
        assert memory.temp_size_in_bytes <= values[2, 1].nbytes
        for i, j in np.ndindex(3, 4):
            whole = convert._put(whole, np.asarray([i, j], np.int32), place(values[i, j]))
    assert whole.sharding.spec == spec
    np.testing.assert_array_equal(np.asarray(whole), values)
