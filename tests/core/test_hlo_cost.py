# SPDX-License-Identifier: Apache-2.0
"""FLOPs and bytes of programs that are small enough to count by hand, and of what the TPU compiler writes."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core import hlo_cost
from research.core.hlo import Program


def counts(function, *arrays):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arrays]
    return hlo_cost.count(Program(jax.jit(function).lower(*shapes).compile().as_text()))


def test_products_in_loops_count_as_often_as_they_run():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = counts(layers, (32, 16), (5, 16, 16))
    assert found.flops == 5 * 2 * 32 * 16 * 16 and found.kernels == {} and found.unknown == ()


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    found = counts(lambda x: jax.lax.while_loop(lambda x: jnp.max(x) > 1.0, lambda x: x @ x / 100, x), (8, 8))
    assert found.flops == 2 * 8 * 8 * 8 and len(found.unknown) == 1


# As the TPU compiler writes it: [4096, 4096] x [4096, 32, 128] as a convolution over 32 heads of which one meets each
# output, an operand that is sliced inside the fusion, a result in VMEM, a copy to HBM, a kernel.
TPU = """
%fused (a: bf16[4096,4096,1], w: bf16[8,4096,32,128], i: s32[]) -> bf16[4096,32,128] {
  %a = bf16[4096,4096,1]{1,0,2} parameter(0)
  %w = bf16[8,4096,32,128]{3,2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %slice = bf16[1,4096,32,128]{3,2,1,0} dynamic-slice(%w, %i, %i, %i, %i), dynamic_slice_sizes={1,4096,32,128}
  %one = bf16[4096,32,128]{2,1,0} bitcast(%slice)
  ROOT %convolution.1 = bf16[4096,32,128]{2,0,1:T(8,128)} convolution(%a, %one), \
window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_i0o->b0f
}

ENTRY %main (a: bf16[4096,4096,1], w: bf16[8,4096,32,128], i: s32[]) -> bf16[4096,32,128] {
  %a = bf16[4096,4096,1]{1,0,2:T(8,128)S(1)} parameter(0)
  %w = bf16[8,4096,32,128]{3,2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %q = bf16[4096,32,128]{2,0,1:T(8,128)S(1)} fusion(%a, %w, %i), kind=kOutput, calls=%fused
  %k = bf16[32,4096,128]{2,1,0} bitcast(%q)
  %splash_mha_fwd_residuals.2 = (f32[512,128]{1,0}, bf16[32,4096,128]{2,1,0}) custom-call(%k, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={ "block_q\\": 512 }}
  ROOT %out = bf16[4096,32,128]{2,0,1} copy(%q)
}
"""


def test_what_the_tpu_compiler_writes():
    found = hlo_cost.count(Program(TPU))
    assert found.flops == 2 * 4096 * 4096 * 32 * 128
    square = 2 * 2 * 32 * 4096 * 4096 * 128
    assert found.kernels == {"splash_mha_fwd_residuals": pytest.approx(square * (0.5 + 0.5 * 512 / 4096))}
    array = 2 * 4096 * 32 * 128
    kernel = 3 * array + array + 4 * 512 * 128  # its operands and results
    assert found.hbm_bytes == array + 4 + kernel + array  # the slice of w and its index, the kernel, the copy's result
    assert found.all_flops == found.flops + sum(found.kernels.values())


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 6), kernel=st.integers(1, 5), out=st.integers(1, 8), stride=st.integers(1, 3),
    low=st.integers(-1, 5), gaps=st.integers(1, 3), spread=st.integers(1, 2),
)  # fmt: skip
def test_positions_that_meet_an_input(size, kernel, out, stride, low, gaps, spread):
    window = {"stride": str(stride), "pad": f"{low}_0", "lhs_dilate": str(gaps), "rhs_dilate": str(spread)}
    places = {position * gaps for position in range(size)}
    met = sum(o * stride + k * spread - low in places for o, k in itertools.product(range(out), range(kernel)))
    assert hlo_cost._valid(size, kernel, out, window) == met


GROUPED = """
ENTRY %main (x: bf16[256,64], w: bf16[8,64,32]) -> bf16[256,32] {
  %x = bf16[256,64]{1,0} parameter(0)
  %w = bf16[8,64,32]{2,1,0} parameter(1)
  %d = bf16[256,32]{1,0} parameter(2)
  %tgmm.1 = bf16[8,64,32]{2,1,0} custom-call(%x, %d), custom_call_target="tpu_custom_call"
  %other.3 = bf16[256,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %gmm.2 = bf16[256,32]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call"
}
"""


def test_grouped_products_count_every_row_once():
    assert hlo_cost.count(Program(GROUPED)).kernels == {
        "gmm": 2.0 * 256 * 64 * 32,
        "tgmm": 2.0 * 256 * 64 * 32,
        "other": 0,
    }
    assert hlo_cost.count(Program(GROUPED), grouped_rows=32).kernels["gmm"] == 2.0 * 32 * 64 * 32
