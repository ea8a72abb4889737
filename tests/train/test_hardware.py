# SPDX-License-Identifier: Apache-2.0
"""The peak that a run's speed is held against: published for accelerators, measured once for a CPU."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from research.core import sharding
from research.core.sharding import MeshSpec
from research.train import hardware


def accelerators(kind, count):
    devices = [SimpleNamespace(platform="tpu", device_kind=kind) for _ in range(count)]
    return SimpleNamespace(devices=np.array(devices, dtype=object))


@pytest.mark.parametrize(
    ("kind", "one"), [("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12)]
)
def test_the_peak_of_a_slice_is_the_published_one_times_its_chips(tmp_path, kind, one):
    assert hardware.peak_flops(accelerators(kind, 8), tmp_path) == 8 * one
    assert not list(tmp_path.iterdir())


def test_an_unknown_accelerator_has_no_peak(tmp_path):
    assert hardware.peak_flops(accelerators("TPU v99", 8), tmp_path) is None


@pytest.fixture
def small(monkeypatch):
    """Products of a size that takes no time."""
    monkeypatch.setattr(hardware, "SIZE", 128)


def test_a_cpu_is_measured_once_and_remembered(tmp_path, small):
    """What is remembered is the host's rate: eight host devices have no more of it than one."""
    rate = hardware.peak_flops(sharding.make_mesh(MeshSpec(data=1)), tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    assert json.loads(path.read_text()) == {"flops_per_second": rate} and rate > 0
    path.write_text(json.dumps({"flops_per_second": 2 * rate}))
    assert hardware.peak_flops(sharding.make_mesh(MeshSpec(data=8)), tmp_path / "cache") == 2 * rate


def test_the_rate_counts_two_operations_for_each_multiply_and_add(small, monkeypatch):
    """Products of half a second each, on a clock that the test turns."""
    ticks = iter(np.arange(0, 10, 0.5))
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert hardware.measure_matmul_rate(jax.devices()[0]) == 2 * 128**3 / 0.5


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"flops_per_second": "fast"}', '{"flops_per_second": -1}'])
def test_a_damaged_memory_is_measured_anew(tmp_path, small, text):
    mesh = sharding.make_mesh(MeshSpec(data=1))
    hardware.peak_flops(mesh, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    rate = hardware.peak_flops(mesh, tmp_path)
    assert rate > 0 and json.loads(path.read_text()) == {"flops_per_second": rate}


def test_a_cache_that_cannot_be_written_costs_no_more_than_a_measurement(tmp_path, small):
    (tmp_path / "file").write_text("")
    assert hardware.peak_flops(sharding.make_mesh(MeshSpec(data=1)), tmp_path / "file" / "cache") > 0
