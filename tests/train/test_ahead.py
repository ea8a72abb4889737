# SPDX-License-Identifier: Apache-2.0
"""Real training steps compiled for TPU topologies: they fit, hold the kernels, and move what FSDP implies.

Each program is compiled in a process of its own; where libtpu is not installed these tests are skipped.
"""

import importlib.util
import math
import subprocess
import sys

import pytest

from benchmarks import tpu_programs
from benchmarks.tpu_programs import PROGRAMS, SMALL
from research.core.tree import named_leaves
from research.core.types import Precision
from research.train import ahead
from tests.conftest import ROOT

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not here: install libtpu"
)
# Peak GiB per chip of another library's programs at the same settings: MaxText, seen with libtpu 0.0.42.
TO_BEAT = {"llama2-7b-v5e-256": 2.71, "llama2-7b-v5p-128": 46.8, "llama3-8b-v6e-256": 10.5}


def check(name):
    """What must hold of a dense FSDP program; gives its measurements.

    FSDP implies: bfloat16 weights fetched for the forward pass and again for the backward pass, one layer at a time;
    their gradients, as large, added up once; the head fetched and its float32 gradient added up once; of the table,
    the rows looked up (bfloat16) and their gradients (float32) exchanged.
    """
    planned, found = (PROGRAMS | SMALL)[name], tpu_programs.run(name)
    model, tokens = planned.model, planned.rows * planned.length
    assert found["peak_bytes"] < ahead.HBM[planned.topology.split(":")[0]]
    batch_bytes = 6 * 4 * tokens
    assert found["aliased_bytes"] >= 0.99 * (found["state_bytes"] - 2 * batch_bytes)  # the state is donated

    kernels = found["kernels"]
    runs = {
        part: sum(n for name, n in kernels.items() if f"splash_mha_{part}_" in name) for part in ("fwd", "dq", "dkv")
    }
    assert runs == {"fwd": 2 * model.num_layers, "dq": model.num_layers, "dkv": model.num_layers}

    weights = {name: math.prod(w.shape) for name, w in named_leaves(model.shapes(Precision())).items()}
    one_layer = sum(n for name, n in weights.items() if name.startswith("layers")) // model.num_layers
    in_loops = [(size, runs) for _, size, runs in found["collectives"] if runs >= model.num_layers]
    outside = [size * runs for _, size, runs in found["collectives"] if runs < model.num_layers]
    # a tenth more: a product that fetches its matrix piece by piece takes one turn more than there are pieces
    assert sum(size * runs for size, runs in in_loops) < 1.1 * 3 * 2 * one_layer * model.num_layers
    assert max(size for size, _ in in_loops) <= 2 * one_layer  # a layer's own weights at most, never the stack's
    head = weights["unembedding/w"]
    assert sum(outside) < 1.02 * ((2 + 4) * head + (2 + 4) * tokens * model.d_model + 4 * tokens * planned.chips)
    return found


@needs_compiler
@pytest.mark.slow
def test_two_layers_on_sixteen_chips():
    assert check("llama2-7b-2-layers-v5e-16")["peak_bytes"] < 1.6 * 2**30


@needs_compiler
@pytest.mark.verify
@pytest.mark.parametrize("name", PROGRAMS)
def test_published_models_on_pods(name):
    assert check(name)["peak_bytes"] < TO_BEAT[name] * 2**30


def in_a_process(code):
    environment = dict(JAX_PLATFORMS="cpu", PYTHONPATH=":".join(sys.path))
    command = [sys.executable, "-c", f"from research.train import ahead\n{code}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stderr.splitlines()[-1]


@needs_compiler
def test_an_unknown_topology_is_one_sentence():
    assert "'v5e:3x5x7' is not a topology" in in_a_process("ahead.topology_devices('v5e:3x5x7')")


def test_without_the_compiler_it_is_said_what_to_install():
    hidden = "import importlib.util as u; u.find_spec = lambda name: None\nahead.topology_devices('v5e:4x4')"
    assert "install libtpu" in in_a_process(hidden)
