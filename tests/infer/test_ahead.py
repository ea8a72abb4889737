# SPDX-License-Identifier: Apache-2.0
"""Decoding compiled for TPUs that are not there reads weights and cache once; where libtpu is absent, skipped."""

import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from research.core import sharding
from research.core.sharding import MeshSpec
from research.core.types import Precision
from research.infer import ahead
from research.infer.generate import Settings
from research.infer.sampling import sampling
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from tests.conftest import ROOT

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not here: install libtpu"
)


@needs_compiler
@pytest.mark.parametrize("cache", ["int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_step_reads_weights_and_cache_once(cache):
    """A count below the floor would be one that has left something out."""
    command = [sys.executable, "-m", "benchmarks.decode_program", "--json", "--cache", cache]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    floor = found["weight_bytes"] + found["cache_bytes"]
    assert floor < found["hbm_bytes"] < 1.15 * floor
    assert found["unknown_loops"] == 0 and found["peak_bytes"] < 16e9


def test_programs_are_lowered_for_a_mesh():
    """Here for one that is there; a step writes into the cache that it is given."""
    model = Decoder(vocab_size=64, d_model=16, num_layers=2, attention=Attention(num_heads=2), mlp=Mlp(d_ff=32))
    mesh = sharding.make_mesh(MeshSpec(data=2, tensor=2), jax.devices()[:4])
    given = model, mesh, Precision(), Settings(sampling())
    step = ahead.lower_decode_step(*given, slots=4, length=32).compile()
    cache = 2 * model.num_layers * 4 * 32 * model.d_model * 4 // 4  # bytes on each of four devices
    assert step.memory_analysis().alias_size_in_bytes >= cache
    prefill = ahead.lower_prefill(*given, rows=4, width=16).compile()
    assert prefill.memory_analysis().output_size_in_bytes >= cache // 2
