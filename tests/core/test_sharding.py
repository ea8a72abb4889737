# SPDX-License-Identifier: Apache-2.0
import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from research.core import sharding
from research.core.sharding import MeshError, MeshSpec
from research.core.types import Precision
from tests import tiny


def test_data_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(MeshSpec(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert all(kind == AxisType.Auto for kind in mesh.axis_types)


def test_a_full_spec_may_use_fewer_devices():
    assert sharding.make_mesh(MeshSpec(data=1)).devices.size == 1


@pytest.mark.parametrize("spec", [MeshSpec(fsdp=3), MeshSpec(data=4, tensor=4), MeshSpec(data=0), MeshSpec(tensor=-1)])
def test_a_mesh_that_does_not_fit_is_one_sentence(spec):
    with pytest.raises(MeshError) as error:
        sharding.make_mesh(spec)
    assert "\n" not in str(error.value)


def test_rules_map_logical_to_mesh_axes():
    assert sharding.partition_spec(("embed", "mlp")) == PartitionSpec("fsdp", "tensor")
    assert sharding.partition_spec(("batch", "sequence", None)) == PartitionSpec(("data", "fsdp"), None, None)
    with pytest.raises(MeshError, match="did you mean 'embed'"):
        sharding.partition_spec(("embd",))


def test_a_batch_that_the_mesh_does_not_divide():
    mesh = sharding.make_mesh(MeshSpec())
    sharding.check_batch(mesh, 16, 2)
    with pytest.raises(MeshError, match="multiple of 8, such as 16"):
        sharding.check_batch(mesh, 12 + 2)
    with pytest.raises(MeshError, match="multiple of 3"):
        sharding.check_batch(mesh, 16, 3)


def test_a_parameter_that_the_mesh_does_not_divide_is_named():
    mesh = sharding.make_mesh(MeshSpec(tensor=8))
    with pytest.raises(MeshError, match="'heads' 8 ways.*the 4 of parameter layers/attention/"):
        shapes = tiny.MODEL.shapes(Precision())
        shapes["layers"] = {"attention": {"q": shapes["layers"]["attention"]["q"]}}
        sharding.tree_shardings(mesh, shapes, tiny.MODEL.logical_axes())


def test_parameters_are_really_sharded():
    """The largest parameter's shard on each device is one eighth of it, and so with every matrix under fsdp."""
    mesh = sharding.make_mesh(MeshSpec(fsdp=8))
    shapes = tiny.MODEL.shapes(Precision())
    layout = sharding.tree_shardings(mesh, shapes, tiny.MODEL.logical_axes())
    params = jax.jit(lambda: tiny.MODEL.init_params(jax.random.key(0), Precision()), out_shardings=layout)()
    for name, leaf in sharding.named_leaves(params).items():
        if "norm" not in name:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size, name
