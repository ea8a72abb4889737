# SPDX-License-Identifier: Apache-2.0
"""Times on links, of groups small enough to count by hand."""

import itertools

import pytest

from research.core import roofline
from research.core.chips import slice_of
from research.core.hlo import Collective, Program
from research.core.hlo_cost import count
from research.core.roofline import Roofline, on_links

GB = 10**9


def places(where):
    """Of all chips of a slice, the first axis running fastest, as the compiler numbers them."""
    sides = [*where.sides, 1, 1][:3]
    return [(x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(sides)))]


def time(kind, slice_name, group, size=GB):
    where = slice_of(slice_name)
    return on_links(Collective(kind, size, 1, kind, tuple(group)), where, places(where))


def test_an_all_gather_uses_every_link_of_a_torus():
    # v5e-256: 16 x 16, wrapped around: four links of 50 GB/s bring 255 / 256 of the whole
    assert time("all-gather", "v5e-256", range(256)) == pytest.approx(255 / 256 / 4 / 50)
    assert time("reduce-scatter", "v5e-256", range(256)) == pytest.approx(255 / 256 / 4 / 50)
    assert time("all-reduce", "v5e-256", range(256)) == pytest.approx(2 * 255 / 256 / 4 / 50)
    # v5e-16: 4 x 4, no way around: a corner chip has two links
    assert time("all-gather", "v5e-16", range(16)) == pytest.approx(15 / 16 / 2 / 50)
    # v5p-128: a cube of 4 x 4 x 4 chips is a torus
    assert time("all-gather", "v5p-128", range(64)) == pytest.approx(63 / 64 / 6 / 100)


def test_a_part_of_an_axis_is_a_line_and_strides_share_its_links():
    row = range(16)  # one whole axis of v5e-256
    assert time("all-gather", "v5e-256", row) == pytest.approx(15 / 16 / 2 / 50)
    assert time("all-gather", "v5e-256", range(8)) == pytest.approx(7 / 8 / 1 / 50)
    assert time("all-gather", "v5e-256", range(0, 16, 2)) == pytest.approx(7 / 8 / 1 / 50)  # a ring, shared by two
    assert time("all-gather", "v5e-256", [0, 1, 16, 18]) == pytest.approx(3 / 4 / 50)  # no box: one path


def test_an_exchange_between_all_crowds_the_middle():
    # a ring of n: half of what n / 2 chips have crosses two links; a line: one
    assert time("all-to-all", "v5e-256", range(16)) == pytest.approx(16 / 8 / 50)
    assert time("all-to-all", "v5e-16", range(4)) == pytest.approx(4 / 4 / 50)
    assert time("ragged-all-to-all", "v5e-256", range(256)) == pytest.approx(16 / 8 / 50)  # both axes at once


def test_a_permute_takes_as_long_as_its_longest_way():
    ring = [n for i in range(16) for n in (i, (i + 1) % 16)]
    assert time("collective-permute", "v5e-256", ring) == pytest.approx(1 / 50)
    assert time("collective-permute", "v5e-16", [0, 1, 1, 2, 2, 3, 3, 0]) == pytest.approx(3 / 50)  # back over all
    assert time("all-gather", "v5e-16", [3]) == 0


SENT = """
ENTRY %main (x: bf16[1024,1024], y: bf16[1024,512]) -> f32[1024,512] {
  %x = bf16[1024,1024]{1,0} parameter(0)
  %y = bf16[1024,512]{1,0} parameter(1)
  %all = bf16[1024,1024]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %send = (bf16[1024,1024]{1,0}, u32[]) send(%all), frontend_attributes={_xla_megascale_runtime="x"}
  ROOT %z = f32[1024,512]{1,0} dot(%all, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_each_part_over_its_rate_and_the_longest_counts():
    program, where = Program(SENT.replace("_xla_megascale", "xla_megascale")), slice_of("v5e-4")
    found = roofline.seconds(program, count(program), where, places(where))
    x = 2 * 1024 * 1024
    assert found.compute == pytest.approx(2 * 1024 * 1024 * 512 / 197e12)
    assert found.ici == pytest.approx(2 * x * 3 / 4 / (2 * 50e9))
    assert found.dcn == pytest.approx(x / 3.125e9) and found.bound == "DCN" and found.seconds == found.dcn
    assert Roofline(1.0, 2.0, 0.5, 0.0).one_by_one == 3.5
