# SPDX-License-Identifier: Apache-2.0
"""Decoding compiled for TPUs that are not there reads weights and cache once; where libtpu is absent, skipped."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not here: install libtpu"
)


@needs_compiler
@pytest.mark.parametrize("cache", ["int8", "bfloat16"])
def test_a_step_reads_weights_and_cache_once(cache):
    """A count below the floor would be one that has left something out."""
    command = [sys.executable, "-m", "benchmarks.decode_program", "--json", "--cache", cache]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    floor = found["weight_bytes"] + found["cache_bytes"]
    assert floor < found["hbm_bytes"] < 1.15 * floor
    assert found["unknown_loops"] == 0 and found["peak_bytes"] < 16e9
