# SPDX-License-Identifier: Apache-2.0
"""What a device can do at most, to say what share of it a run uses."""

import contextlib
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.core.chips import CHIPS
from research.core.files import write_atomically

# Peak dense bfloat16 FLOP/s of one device as JAX counts devices (a chip; on v4 and v5p both cores of a chip),
# by ``device_kind``. NVIDIA: the products' data sheets.
PEAK_FLOPS = {kind: chip.peak_flops for chip in CHIPS.values() for kind in chip.kinds} | {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
SIZE = 2048


def peak_flops(mesh: Mesh, cache_dir: Path) -> float | None:
    """Peak FLOP/s of the mesh: published for accelerators; for CPUs the float32 matmul rate
    measured on this host, times the hosts."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        hosts = len({device.process_index for device in mesh.devices.flat})
        return cpu_matmul_rate(jax.local_devices()[0], cache_dir) * hosts
    one = PEAK_FLOPS.get(device.device_kind)
    return one * mesh.devices.size if one else None


def cpu_matmul_rate(device: Any, cache_dir: Path) -> float:
    """FLOP/s of ``jnp.dot`` on 2048-cubed float32, measured once on a host and remembered.

    Host devices share the same cores, so that the rate is the host's however many there are.
    """
    host = f"{platform.node()}-{platform.machine()}-{os.cpu_count()}-jax{jax.__version__}"
    path = cache_dir / f"matmul-rate-{host}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        remembered = float(json.loads(path.read_text())["flops_per_second"])
        if 0 < remembered < math.inf:
            return remembered
    rate = measure_matmul_rate(device)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a measurement, not the run
        write_atomically(path, json.dumps({"flops_per_second": rate}))
    return rate


def measure_matmul_rate(device: Any, repeats: int = 5) -> float:
    """The best of several float32 products of 2048 x 2048 matrices, in FLOP/s."""
    x = jax.device_put(jnp.ones((SIZE, SIZE), jnp.float32), device)
    dot = jax.jit(jnp.dot)
    dot(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        dot(x, x).block_until_ready()
        best = min(best, time.perf_counter() - begun)
    return 2 * SIZE**3 / best
