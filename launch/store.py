# SPDX-License-Identifier: Apache-2.0
"""Folders of runs and journals: on this machine, or in a bucket (``gs://...``), with the same few operations.

A bucket needs the extra ``gcs``. Objects there are whole or not at all; files here are written beside and renamed.
"""

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.files import write_atomically


def place(text: str | os.PathLike) -> Path:
    """A folder by its name. Raises UserError for a bucket that nothing here can read, or another scheme."""
    name = os.fspath(text)
    if "://" not in name:
        return Path(name)
    if not name.startswith("gs://"):
        raise UserError(f"{name} is no folder that can be used: give a path, or a bucket as gs://BUCKET/FOLDER.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"To use {name}, install the extra gcs: pip install -c constraints.txt -e '.[gcs]'.")
    from etils import epath

    return epath.Path(name)  # type: ignore[return-value]  # a Path in all but its class


def is_remote(path: Path) -> bool:
    return "://" in os.fspath(path)


def absolute(path: Path) -> Path:
    """As every machine that can reach it knows it."""
    return path if is_remote(path) else path.absolute()


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
    write_atomically(path, content)


def read(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises UserError for one that is damaged."""
    text = read(path)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it must be JSON; remove it, or put an older copy there.")
    return found


def names(folder: Path) -> list[str]:
    """Of what lies in a folder, sorted; empty where there is none."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
