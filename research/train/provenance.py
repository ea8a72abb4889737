# SPDX-License-Identifier: Apache-2.0
"""Where a run came from: commit and uncommitted diff, package versions, devices, topology, command."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "sentencepiece",
    "numpy",
)
FILE = "provenance.jsonl"
SOURCE = "source.json"  # at the root of a copy that was packed
ROOT = Path(__file__).resolve().parents[2]
MAX_DIFF = 200_000


def git(*arguments: str) -> str | None:
    """What git says of the code's own checkout; None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def source() -> dict[str, Any]:
    """Commit and uncommitted changes of the code; of a copy without git, those that were packed with it."""
    packed = ROOT / SOURCE
    if packed.exists():
        return json.loads(packed.read_text())
    commit = git("rev-parse", "HEAD")
    diff = git("diff", "HEAD") if commit else None
    return {
        "commit": commit.strip() if commit else None,
        "diff": diff[:MAX_DIFF] if diff else diff,
        "untracked": (git("ls-files", "--others", "--exclude-standard") or "").splitlines()[:100],
    }


def gather(mesh: Mesh) -> dict[str, Any]:
    """Everything needed to say what ran, as JSON."""
    device = mesh.devices.flat[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **source(),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "host": {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": mesh.devices.size},
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
    }


def record(directory: Path, mesh: Mesh, *, step: int, extra: dict[str, Any]) -> None:
    """Appends one line for this attempt at the run."""
    line = {"from_step": step, **gather(mesh), **extra}
    with (directory / FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")
