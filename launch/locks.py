# SPDX-License-Identifier: Apache-2.0
"""Locks on folders of this machine, that go with the process that holds them, however it ends."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from research.core.errors import UserError

LOCK = ".lock"


class Busy(UserError):
    """Another process is at it."""


def is_locked(folder: Path) -> bool:
    """Whether a process of this machine holds the folder now."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second process away from a folder. Makes it. Raises Busy where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"Another process is running {folder}: wait for it, or end it.") from None
        yield
