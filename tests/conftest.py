# SPDX-License-Identifier: Apache-2.0
"""Eight host devices for every test, set before JAX starts; and the paths that tests share.

Tests compile many small programs once each: quick compilation beats quick programs. Of a step's compilation for eight
devices, XLA's newer emitters of fusions take 40%.
"""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_use_fusion_emitters=false"
)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, where there is one."""
    folder = Path(os.environ.get("LAB_SHARED", ROOT / ".." / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real data sets, and there is no {folder} (set LAB_SHARED)")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
