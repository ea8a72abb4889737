# SPDX-License-Identifier: Apache-2.0
"""This host: settings of the process to be made before JAX is loaded, and what its file system says."""

import ctypes
import errno
import hashlib
import importlib.util
import os
import sys
from pathlib import Path

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ACCELERATORS = ("accel*", "vfio/*", "nvidia[0-9]*")
# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def cache_dir() -> Path:
    """Prepared corpora, tokenizers, compiled programs and plans: $LAB_CACHE, or the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("LAB_CACHE", base / "scaling-lab"))


def mirrored(directory: Path) -> Path:
    """Where this machine keeps what it has of a bucket's folder."""
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    return cache_dir() / "mirrors" / name / directory.name


def computes_on_cpu() -> bool:
    """Whether no accelerator shows among the devices of a Linux machine."""
    return sys.platform == "linux" and not any(any(Path("/dev").glob(pattern)) for pattern in ACCELERATORS)


def expect_no_tpu() -> None:
    """Keeps libtpu, where it is installed for its compiler alone, from looking for a TPU when JAX is loaded, and from
    warning that it found none."""
    if computes_on_cpu() and importlib.util.find_spec("libtpu") is not None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def keep_memory() -> bool:
    """Keeps freed memory in the process, where the CPU computes. Returns whether that was done.

    XLA on a CPU takes its scratch memory from malloc at every step; glibc maps it anew each time and gives it
    back after, so that every step pays a page fault for each 4 KiB (a tenth to a third of a step's time). With
    one arena, no maps and no trimming the pages stay. The price: the process keeps its peak memory.
    """
    if not computes_on_cpu():
        return False
    try:
        libc = ctypes.CDLL(None)
        return all(libc.mallopt(*pair) for pair in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))
    except (OSError, AttributeError):  # not glibc
        return False
