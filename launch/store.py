# SPDX-License-Identifier: Apache-2.0
"""Folders of runs and journals: on this machine, or in a bucket (``gs://...``), with the same few operations.

A bucket needs the extra ``gcs``. Objects there are whole or not at all; files here are written beside and renamed.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from research.core import files
from research.core.errors import UserError
from research.train.places import absolute, is_remote, place

__all__ = [
    "absolute",
    "create",
    "is_remote",
    "names",
    "of_a_bucket",
    "passes",
    "place",
    "read",
    "read_json",
    "text",
    "write",
]


def create(path: Path, content: str) -> bool:
    """Writes a file that is not there; says whether it was this call that did. Of several callers one is told so."""
    if is_remote(path):
        import fsspec

        try:
            fsspec.filesystem("gs").pipe_file(os.fspath(path), content.encode(), mode="create")
        except FileExistsError:
            return False
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(content)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True


def text(record: Any) -> str:
    return json.dumps(record)


def write(path: Path, content: str | bytes) -> None:
    files.write_atomically(path, content)


def read(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises UserError for one that is damaged.

    What is replaced in a bucket while it is read, first its size and then its bytes, comes out cut off: so read again.
    """
    mend = "put an older copy there, or remove it if nothing of it runs"
    for pause in (0.1, 0.5, 2.0) if is_remote(path) else ():
        try:
            return files.read_json(path, mend=mend)
        except UserError:
            time.sleep(pause)
    return files.read_json(path, mend=mend)


def of_a_bucket(error: Exception) -> bool:
    """Whether an error comes from what reads buckets."""
    rooms = ("aiohttp", "gcsfs", "google", "requests", "urllib3")
    return any(kind.__module__.split(".")[0] in rooms for kind in type(error).__mro__)


def passes(error: Exception) -> bool:
    """Whether an error is the network's or the bucket's, and may pass by itself."""
    return isinstance(error, OSError | TimeoutError) or of_a_bucket(error)


def names(folder: Path) -> list[str]:
    """Of what lies in a folder, sorted; empty where there is none."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
