# SPDX-License-Identifier: Apache-2.0
"""Real training steps compiled for TPU topologies: they fit, hold the kernels, and move what the mesh implies.

Each program is compiled in a process of its own; where libtpu is not installed these tests are skipped.
"""

import importlib.util
import math
import subprocess
import sys

import pytest

from benchmarks import tpu_programs
from benchmarks.tpu_programs import ALL, OTHER_MESHES, PROGRAMS
from research.core.chips import CHIPS
from research.core.tree import named_leaves
from research.core.types import Precision
from research.models.moe import Moe
from tests.conftest import ROOT

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not here: install libtpu"
)
# Peak GiB per chip of another library's programs at the same settings: MaxText, seen with libtpu 0.0.42.
TO_BEAT = {
    "llama2-7b-v5e-256": 2.71,
    "llama2-7b-v5p-128": 46.8,
    "llama3-8b-v6e-256": 10.5,
    "mixtral-8x7b-v5p-128": 23.5,
}


def in_layers(planned, weights):
    """Bytes that the strategy moves in the layers of one step, for one chip, everything recomputed.

    ZeRO-3: bfloat16 weights fetched for the forward pass and again for the backward pass, gradients, as large, added
    up once; of experts a chip fetches its own. A ring of c: keys and values sent on c - 1 times forward, again
    recomputed, and again backward, where their float32 gradients make c steps. Experts: the tokens chosen for them go
    and come back, go again to be recomputed, and their gradients go and come back; so do their gates (float32, each a
    row of 128 lanes), but for the results.
    """
    model, mesh, tokens = planned.model, planned.mesh, planned.tokens
    moved = 3 * 2 * sum(n / (mesh.expert if expert else 1) for n, expert in weights)
    keys, c = 2 * tokens * model.attention.kv_heads * model.attention.width(model.d_model), mesh.context
    if c > 1:
        moved += model.num_layers * (3 * (c - 1) * (2 * keys + 2 * 4 * tokens) + c * 4 * keys)
    if mesh.expert > 1:
        moved += model.num_layers * tokens * model.mlp.router.k * (5 * 2 * model.d_model + 3 * 4 * 128)
    return moved


def check(name):
    """What must hold of a program; gives its measurements.

    Outside the layers: the head fetched and its gradient added up once; of the table, the rows looked up (bfloat16)
    and their gradients (float32) exchanged, and as much to bring a split sequence into balance and back.
    """
    planned, found = ALL[name], tpu_programs.run(name)
    model, tokens, layers = planned.model, planned.tokens, planned.model.num_layers
    assert found["peak_bytes"] < CHIPS[planned.topology.split(":")[0]].hbm_bytes
    batch_bytes = 6 * 4 * tokens
    assert found["aliased_bytes"] >= 0.99 * (found["state_bytes"] - 2 * batch_bytes)  # the state is donated

    kernels = found["kernels"]
    parts = ("splash_mha_fwd_", "splash_mha_dq_", "splash_mha_dkv_", "gmm", "tgmm")
    runs = {part: sum(n for name, n in kernels.items() if name.startswith(part)) for part in parts}
    blocks = layers * planned.mesh.context  # of a ring, as many as devices; forward they are all formed again
    assert [runs[part] for part in parts[:3]] == [2 * blocks, blocks, blocks]
    if isinstance(model.mlp, Moe):  # three matrices forward, two recomputed, gradients of rows; and those of weights
        parts = layers * planned.mesh.expert
        assert (runs["gmm"], runs["tgmm"]) == ((3 + 2 + 3) * parts, 3 * parts)

    shapes = named_leaves(model.shapes(Precision()))
    weights = {name: math.prod(w.shape) for name, w in shapes.items()}
    stack = [
        (n, isinstance(model.mlp, Moe) and name.rsplit("/", 1)[1] in ("gate", "up", "down"))
        for name, n in weights.items()
        if name.startswith("layers")
    ]
    in_loops = [(size, runs) for _, size, runs in found["collectives"] if runs >= layers]
    outside = [size * runs for _, size, runs in found["collectives"] if runs < layers]
    # a tenth more: a product that fetches its matrix piece by piece takes one turn more than there are pieces
    assert sum(size * runs for size, runs in in_loops) < 1.1 * in_layers(planned, stack)
    # a layer's own weights at most, never the stack's
    assert max(size for size, _ in in_loops) <= 2 * sum(n for n, _ in stack) // layers
    head, times = weights["unembedding/w"], 2 if planned.mesh.context > 1 else 1
    hidden = times * (2 + 4) * tokens * model.d_model
    assert sum(outside) < 1.02 * ((2 + 2) * head + hidden + times * 4 * tokens * planned.chips)
    return found


@needs_compiler
@pytest.mark.slow
def test_two_layers_on_sixteen_chips():
    assert check("llama2-7b-2-layers-v5e-16")["peak_bytes"] < 1.75 * 2**30


@needs_compiler
@pytest.mark.slow
def test_between_slices_go_sums_of_gradients_alone():
    """Each chip sends what it stores: bfloat16 gradients of matrices, the float32 one of the table."""
    name = "llama2-7b-2-layers-two-v5e-16"
    planned, found = ALL[name], tpu_programs.run(name)
    weights = {name: math.prod(w.shape) for name, w in named_leaves(planned.model.shapes(Precision())).items()}
    table = weights.pop("embedding/table")
    expected = (2 * sum(weights.values()) + 4 * table) / planned.mesh.fsdp
    assert expected < found["traffic"]["between-slices"] < 1.01 * expected


@needs_compiler
@pytest.mark.verify
@pytest.mark.parametrize("name", PROGRAMS)
def test_published_models_on_pods(name):
    assert check(name)["peak_bytes"] < TO_BEAT[name] * 2**30


@needs_compiler
@pytest.mark.verify
@pytest.mark.parametrize("name", OTHER_MESHES)
def test_experts_and_long_sequences_on_pods(name):
    check(name)


def in_a_process(code):
    environment = dict(JAX_PLATFORMS="cpu", PYTHONPATH=":".join(sys.path))
    command = [sys.executable, "-c", f"from research.train import ahead\n{code}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stderr.splitlines()[-1]


@needs_compiler
def test_an_unknown_topology_is_one_sentence():
    assert "'v5e:3x5x7' is not a topology" in in_a_process("ahead.topology_devices('v5e:3x5x7')")


@needs_compiler
@pytest.mark.slow
def test_every_slice_that_can_be_asked_for_can_be_compiled_for():
    """As many devices as it has chips (of v4 too, whose cores could be devices of their own), where they should lie."""
    code = (
        "from research.core.chips import CHIPS, Slice\n"
        "import math, sys\n"
        "for chip in CHIPS.values():\n"
        "    for chips in chip.shapes:\n"
        "        one = Slice('x', chip, chips)\n"
        "        found = ahead.topology_devices(one.compiled_as)\n"
        "        far = [max(d.coords[axis] for d in found) + 1 for axis in range(3)]\n"
        "        assert len(found) == chips and far == [*one.sides, 1][:3], (one, len(found), far)\n"
        "        assert found[0].device_kind in chip.kinds, found[0].device_kind\n"
        "print('all', file=sys.stderr)"
    )
    assert in_a_process(code) == "all"


@needs_compiler
@pytest.mark.verify
def test_loops_count_as_often_as_their_layers_written_out():
    """The calibration of what is read off a scanned program: the same model unrolled."""
    code = (
        "import sys; from dataclasses import replace\n"
        "from benchmarks.tpu_programs import ALL\n"
        "from research.core import hlo_cost\nfrom research.core.hlo import Program\n"
        "planned = ALL['llama2-7b-2-layers-v5e-16']\n"
        "model = replace(planned.model, num_layers=4, d_model=1024, mlp=replace(planned.model.mlp, d_ff=2816))\n"
        "model = replace(model, attention=replace(model.attention, num_heads=8))\n"
        "counts = []\n"
        "for layers in ('scanned', 'unrolled'):\n"
        "    e = replace(planned, model=replace(model, layers=layers)).experiment('x')\n"
        "    program = Program(ahead.compile_step(e, 'v5e:4x4').as_text())\n"
        "    found = hlo_cost.count(program)\n"
        "    counts.append([found.flops, sum(found.kernels.values()), found.hbm_bytes])\n"
        "print(*[scanned / unrolled for scanned, unrolled in zip(*counts)], file=sys.stderr)"
    )
    products, kernels, moved = (float(ratio) for ratio in in_a_process(code).split())
    assert products == pytest.approx(1, abs=0.02) and kernels == pytest.approx(1, abs=1e-6)
    assert moved == pytest.approx(1, abs=0.35)  # what lies in VMEM is chosen anew


def test_without_the_compiler_it_is_said_what_to_install():
    hidden = "import importlib.util as u; u.find_spec = lambda name: None\nahead.topology_devices('v5e:4x4')"
    assert "install libtpu" in in_a_process(hidden)
