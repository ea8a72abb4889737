# SPDX-License-Identifier: Apache-2.0
"""Collectives read off programs that are small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.core import hlo, sharding
from research.core.sharding import MeshSpec

ROWS = PartitionSpec("fsdp")


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", (0, 2)),
        ("replica_groups=[2,2]<=[4], to_apply=%add", (0, 1)),
        ("replica_groups=[4,2]<=[2,2,2]T(1,2,0), to_apply=%add", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'c'}, to_apply=%add", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, to_apply=%add", (0, 2, 4, 6)),
        ("source_target_pairs={{0,1},{1,2}}", (0, 1, 1, 2)),
        ("replica_groups={}, to_apply=%add", ()),
    ],
)
def test_groups_of_devices_however_they_are_written(written, group):
    assert hlo.first_group(written) == group


def program(function, *arrays):
    """The compiled program of a function of what each of 8 devices holds of float32 arrays (shape, spec)."""
    mesh = sharding.make_mesh(MeshSpec(data=1, fsdp=8))
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in arrays]
    specs = tuple(spec for _, spec in arrays)
    run = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return hlo.Program(jax.jit(run).lower(*shapes).compile().as_text())


def test_a_loop_counts_as_often_as_it_runs():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)), None), x, w)[0]

    (found,) = program(layers, ((32, 16), ROWS), ((5, 16, 16), PartitionSpec(None, "fsdp"))).collectives()
    assert (found.kind, found.bytes, found.runs) == ("all-gather", 16 * 16 * 4, 5)
    assert found.group == tuple(range(8))


def test_loops_in_loops_multiply_and_kinds_are_told_apart():
    def inner(x, _):
        x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)])
        return jnp.sin(x), None

    def outer(x, _):
        x = jax.lax.scan(inner, x, None, length=5)[0]
        part = jax.lax.psum_scatter(x, "fsdp", tiled=True)  # takes [8, 4], gives [1, 4]
        x = x + jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True) + part
        return x + jax.lax.psum(x[0, 0], "fsdp"), None

    found = program(lambda x: jax.lax.scan(outer, x, None, length=3)[0], ((64, 4), ROWS)).traffic()
    one = 8 * 4 * 4
    assert found["collective-permute"] == 3 * 5 * one
    assert found["all-to-all"] == 3 * one
    # on a CPU the sum may be an all-reduce of which a part is kept: the same bytes at its larger end
    assert found.get("reduce-scatter", 0) + found["all-reduce"] == 3 * one + 3 * 4


def test_a_loop_of_unknown_length_matters_only_if_it_communicates():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1.0, lambda x: x / 2, x)

    def halve_together(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1.0, lambda x: x / jax.lax.psum(1 + x, "fsdp"), x)

    assert program(halve, ((8, 4), ROWS)).collectives() == []
    with pytest.raises(ValueError, match="does not say how often"):
        program(halve_together, ((8, 4), ROWS)).collectives()


# As the TPU compiler writes it: a loop whose length stands in its condition (from 2 below 10 in steps of 4), a
# reduce-scatter as a fusion, an asynchronous pair, one all-gather spread over two fusions, a Pallas kernel.
TPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (param.1: bf16[64,128]) -> bf16[8,128] {
  %param.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.5 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%param.1), channel_id=3, to_apply=%add
  %c = s32[] constant(0)
  ROOT %slice = bf16[8,128]{1,0} dynamic-slice(%all-reduce.5, %c, %c), dynamic_slice_sizes={8,128}
}

%async_collective_fusion.1 (p: bf16[8,128]) -> (bf16[64,128], u32[]) {
  %p = bf16[8,128]{1,0} parameter(0)
  %all-gather.7 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=9, frontend_attributes={chain_id="0"}
  ROOT %t = (bf16[64,128]{1,0}, u32[]) custom-call(%all-gather.7), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p: bf16[8,128]) -> bf16[64,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.8 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=9, frontend_attributes={chain_id="0"}
}

%body (s: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %s = (s32[], bf16[64,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[64,128]{1,0} get-tuple-element(%s), index=1
  %four = s32[]{:T(128)} constant(4)
  %next = s32[]{:T(128)S(6)} add(%i, %four)
  %part = bf16[8,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  %first = (bf16[64,128]{1,0}, u32[]) fusion(%part), kind=kOutput, calls=%async_collective_fusion.1
  %second = bf16[64,128]{1,0} fusion(%part), kind=kOutput, calls=%async_collective_fusion.2
  %splash_fwd.2.clone.1 = (bf16[64,128]{1,0}, f32[64]{0}) custom-call(%second), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[], bf16[64,128]{1,0}) tuple(%next, %second)
}

%cond (s: (s32[], bf16[64,128])) -> pred[] {
  %s = (s32[], bf16[64,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %ten = s32[]{:T(128)} constant(10)
  ROOT %less = pred[]{:T(512)} compare(%i, %ten), direction=LT
}

ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %permute-start = (bf16[64,128]{1,0}, bf16[64,128]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1
  %moved = bf16[64,128]{1,0} collective-permute-done(%permute-start)
  %start = (s32[], bf16[64,128]{1,0}) tuple(%two, %moved)
  %loop = (s32[], bf16[64,128]{1,0}) while(%start), condition=%cond, body=%body
  ROOT %y = bf16[64,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_what_the_tpu_compiler_writes():
    found, whole = hlo.Program(TPU), 64 * 128 * 2
    assert {(c.kind, c.bytes, c.runs) for c in found.collectives()} == {
        ("collective-permute", whole, 1),
        ("reduce-scatter", whole, 2),
        ("all-gather", whole, 2),
    }
    assert found.traffic() == {"collective-permute": whole, "reduce-scatter": 2 * whole, "all-gather": 2 * whole}
    assert found.kernels() == {"splash_fwd": 2}


def test_sizes_of_types():
    assert hlo.size("bf16[1,256,32,128]{3,1,0,2:T(8,128)(2,1)S(1)}") == 256 * 32 * 128 * 2
    assert hlo.size("(f32[3]{0}, s8[2,2], pred[], u32[]{:S(2)})") == 12 + 4 + 1 + 4


BETWEEN_SLICES = """
ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[4,8]{1,0}, u32[], token[]) send(%p, %token), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send-done = token[] send-done(%send), channel_id=1, is_host_transfer=true
  %other = (bf16[4,8]{1,0}, u32[], token[]) send(%p, %token), channel_id=2, is_host_transfer=true
  ROOT %out = bf16[4,8]{1,0} copy(%p)
}
"""


def test_what_leaves_a_slice_is_counted_once_and_no_other_transfer_to_the_host():
    (found,) = hlo.Program(BETWEEN_SLICES).collectives()
    assert (found.kind, found.bytes, found.runs) == (hlo.BETWEEN, 4 * 8 * 2, 1)


LOOP = """
%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %sum = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %sum)
}
%condition (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}
ENTRY %main (p: s32[], x: f32[8]) -> f32[8] {
  %p = s32[] parameter(0)
  %x = f32[8]{0} parameter(1)
  %two = s32[] constant(2)
  %start = (s32[], f32[8]{0}) tuple(START, %x)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_that_starts_nobody_knows_where_is_not_guessed():
    (found,) = hlo.Program(LOOP.replace("START", "%two")).collectives()
    assert (found.kind, found.bytes, found.runs) == ("all-reduce", 32, 5)
    with pytest.raises(ValueError, match="does not say how often loop runs"):
        hlo.Program(LOOP.replace("START", "%p")).collectives()
