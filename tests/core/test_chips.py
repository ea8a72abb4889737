# SPDX-License-Identifier: Apache-2.0
"""Names of slices, as people and as gcloud write them."""

import math

import pytest

from research.core.chips import CHIPS, slice_of
from research.core.errors import UserError


@pytest.mark.parametrize(
    ("name", "chips", "topology", "hosts", "asked"),
    [
        ("v5e-256", 256, "16x16", 64, "v5litepod-256"),
        ("v5litepod-4", 4, "2x2", 1, "v5litepod-4"),
        ("V6e-8", 8, "2x4", 1, "v6e-8"),
        ("v5p-128", 64, "4x4x4", 16, "v5p-128"),  # names of v4 and v5p count TensorCores
        ("v4-8", 4, "2x2x1", 1, "v4-8"),
        ("v5p-12288", 6144, "16x16x24", 1536, "v5p-12288"),
    ],
)
def test_slices_by_name(name, chips, topology, hosts, asked):
    found = slice_of(name)
    assert (found.chips, found.topology, found.hosts, found.accelerator_type) == (chips, topology, hosts, asked)
    assert found.compiled_as == f"{found.chip.name}:{topology}"


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_shapes_have_as_many_chips_as_they_say(chip):
    for count, shape in chip.shapes.items():
        assert math.prod(int(n) for n in shape.split("x")) == count
        assert len(shape.split("x")) * 2 == chip.links  # one link each way along each side


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e-200", "no slice v5e-200: v5e slices count chips and come as 1, 4, .*near it: v5e-128 and v5e-256"),
        ("v5p-64x", "names no TPU slice"),
        ("v5p-4", "v5p slices count TensorCores"),
        ("a100-8", "names no TPU slice: give a chip of v4, v5e, v5p, v6e"),
    ],
)
def test_other_names_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        slice_of(name)
