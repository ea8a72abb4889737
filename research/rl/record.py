# SPDX-License-Identifier: Apache-2.0
"""What rollouts leave behind: sample responses in ``samples.jsonl``, and arrays as text within a checkpoint's JSON."""

import base64
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

FILE = "samples.jsonl"


class Samples:
    """Appends to a run's samples. What was written of steps that a resumed run does again is dropped first; one host
    writes."""

    def __init__(self, directory: Path | None) -> None:
        self._path = directory / FILE if directory is not None and jax.process_index() == 0 else None
        self._open = False

    def write(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Records of ``step``, after which none that was there of this or a later step stays."""
        if self._path is None:
            return
        if not self._open:
            kept = [line for line in read(self._path.parent) if line["step"] < step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self._path)
            self._open = True
        with self._path.open("a") as file:
            file.write("".join(json.dumps({"step": step, **record}) + "\n" for record in records))


def read(directory: Path) -> list[dict[str, Any]]:
    """A run's samples; lines that a crash cut short are left out."""
    try:
        lines = (directory / FILE).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(dict(json.loads(line)))
        except ValueError:
            continue
    return [record for record in found if isinstance(record.get("step"), int)]


def pack(arrays: Mapping[str, np.ndarray]) -> str:
    """Arrays as text, bit for bit."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return base64.b64encode(buffer.getvalue()).decode()


def unpack(text: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}
