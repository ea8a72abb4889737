# SPDX-License-Identifier: Apache-2.0
import math
import re
from dataclasses import dataclass, replace

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from research.core import sharding
from research.core.sharding import MeshError, MeshSpec
from research.core.types import Precision
from research.models.pipeline import Pipeline
from tests import tiny


def test_data_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(MeshSpec(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "stage": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert all(kind == AxisType.Auto for kind in mesh.axis_types)


def test_a_full_spec_may_use_fewer_devices():
    assert sharding.make_mesh(MeshSpec(data=1)).devices.size == 1


@pytest.mark.parametrize("spec", [MeshSpec(fsdp=3), MeshSpec(data=4, tensor=4), MeshSpec(data=0), MeshSpec(tensor=-1)])
def test_a_mesh_that_does_not_fit_is_one_sentence(spec):
    with pytest.raises(MeshError) as error:
        sharding.make_mesh(spec)
    assert "\n" not in str(error.value)


def test_rules_map_logical_to_mesh_axes():
    assert sharding.partition_spec(("heads", "mlp")) == PartitionSpec("tensor", None)
    assert sharding.partition_spec(("batch", "sequence", None)) == PartitionSpec(
        ("data", "fsdp", "expert"), "context", None
    )
    with pytest.raises(MeshError, match="did you mean 'embed'"):
        sharding.partition_spec(("embd",))


def test_a_mesh_axis_splits_the_first_dimension_that_asks_for_it():
    assert sharding.partition_spec(("embed", "mlp")) == PartitionSpec(("fsdp", "expert", "context", "stage"), "tensor")
    assert sharding.partition_spec(("expert", "embed", "mlp"), without=("stage",)) == PartitionSpec(
        "expert", ("fsdp", "context"), "tensor"
    )


def test_there_are_56_meshes_of_8_devices():
    found = sharding.meshes(8)
    assert len({tuple(sizes.values()) for sizes in found}) == len(found) == 56


ONE = dict.fromkeys(MeshSpec.__dataclass_fields__, 1)


@pytest.mark.parametrize(
    ("sizes", "batch", "says"),
    [
        (
            {"fsdp": 8},
            dict(batch_size=12, sequence_length=8),
            r"12 rows.*8 ways \(fsdp=8\) which.*12: the near",
        ),
        ({"context": 4, "data": 2}, dict(batch_size=8, sequence_length=12), "multiples of 2.*nearest.*data=4 x con"),
        ({"data": 4}, dict(batch_size=7, sequence_length=7), "7 rows of a batch 4 ways"),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide(sizes, batch, says):
    with pytest.raises(MeshError, match=says) as error:
        sharding.check_mesh({**ONE, **sizes}, sharding.batch_splits(**batch))
    assert "\n" not in str(error.value)


def test_microbatches_divide_the_batch():
    with pytest.raises(MeshError, match="multiple of 3"):
        sharding.batch_splits(16, 8, microbatches=3)


@pytest.mark.parametrize(
    ("sizes", "model", "says"),
    [
        ({"tensor": 8}, {}, "'kv_heads' of parameter layers/attention/.*8 ways.*does not divide 2.*tensor=2"),
        ({"stage": 4, "data": 2}, {}, "2 repeated layers 4 ways.*stage=2"),
        ({"stage": 2, "data": 4}, {"pipeline": Pipeline(rounds=2)}, "in multiples of 2"),
        (
            {"stage": 4, "data": 2},
            {"num_layers": 4, "pipeline": Pipeline(microbatches=2)},
            "2 microbatches of a pipeline 4 ways.*stage=2",
        ),
        ({"stage": 2, "data": 4}, {"pipeline": Pipeline(microbatches=4)}, "8 rows that stages hand on 4 ways.*of 4"),
        ({"stage": 2}, {"pipeline": Pipeline(microbatches=6)}, "8 rows that stages hand on 1 ways.*of 6"),
    ],
)
def test_a_model_that_the_mesh_does_not_divide(sizes, model, says):
    """Every refusal names the numbers, and a mesh that the same model then fits."""
    splits = replace(tiny.MODEL, **model).splits(rows=8)
    with pytest.raises(MeshError, match=says) as error:
        sharding.check_mesh({**ONE, **sizes}, splits)
    (advice,) = re.findall(r"that fits is ([^;]*);", str(error.value))
    near = {name: int(size) for name, size in (part.split("=") for part in advice.split(" x "))}
    assert math.prod(near.values()) == math.prod(sizes.values())
    sharding.check_mesh({**ONE, **near}, splits)


def test_a_pipeline_is_nothing_to_a_mesh_without_stages():
    model = replace(tiny.MODEL, pipeline=Pipeline(microbatches=3, rounds=5))
    sharding.check_mesh({**ONE, "data": 8}, model.splits(rows=8))


@dataclass(frozen=True)
class Chip:
    """What a mesh over slices asks of a device."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0


def chips(*slices, platform="tpu"):
    """So many chips of each slice, in rows of two."""
    each = [(index, i) for index, count in enumerate(slices) for i in range(count)]
    return [Chip(n, index, (i % 2, i // 2, 0), platform=platform) for n, (index, i) in enumerate(each)]


def test_slices_are_joined_along_data():
    """Neighbours along every other axis lie in one slice."""
    both = chips(4, 4)
    mesh = sharding.make_mesh(MeshSpec(data=4, tensor=2), both[::2] + both[1::2])
    kinds = [{chip.slice_index for chip in row.flat} for row in mesh.devices]
    assert kinds == [{0}, {0}, {1}, {1}]
    with pytest.raises(MeshError, match="data=1 is no multiple of 2.*data=2"):
        sharding.make_mesh(MeshSpec(data=1, tensor=8), both)


def test_a_mesh_of_fewer_devices_takes_as_many_of_each_slice():
    mesh = sharding.make_mesh(MeshSpec(data=2, tensor=2), chips(4, 4))
    assert [{chip.slice_index for chip in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(MeshError, match="needs 4 devices of each of 2 slices and one has 3"):
        sharding.make_mesh(MeshSpec(data=2, tensor=4), chips(3, 5))


def test_what_tells_hosts_of_gpus_apart_is_no_slice():
    assert sharding.make_mesh(MeshSpec(data=1, fsdp=8), chips(4, 4, platform="gpu")).shape["fsdp"] == 8


def test_parameters_are_really_sharded():
    """The largest parameter's shard on each device is one eighth of it, and so with every matrix under fsdp."""
    mesh = sharding.make_mesh(MeshSpec(fsdp=8))
    shapes = tiny.MODEL.shapes(Precision())
    layout = sharding.tree_shardings(mesh, shapes, tiny.MODEL.logical_axes())
    params = jax.jit(lambda: tiny.MODEL.init_params(jax.random.key(0), Precision()), out_shardings=layout)()
    for name, leaf in sharding.named_leaves(params).items():
        if "norm" not in name:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size, name
