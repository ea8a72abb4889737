# SPDX-License-Identifier: Apache-2.0
"""Files written whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from research.core.errors import UserError


def write_atomically(path: Path | str, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part. Makes the folder. A path that is
    not of this machine's file system (``gs://``, from etils) writes itself so."""
    if not isinstance(path, str | Path):
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_json(
    path: Path, *, mend: str = "remove it, and the run goes on from its last checkpoint"
) -> dict[str, Any] | None:
    """A JSON object; None where there is no file. Raises UserError where it is damaged; mend: what to do then."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged: {mend}.")
    return record


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")
