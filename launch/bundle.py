# SPDX-License-Identifier: Apache-2.0
"""The code as one archive: what a machine needs to run a study as it is here, named by its content."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

from research.train import provenance

ROOT = Path(__file__).resolve().parents[1]
TOP = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
ROOMS = {"research": ("*.py",), "launch": ("*.py", "*.toml", "*.sh"), "experiments": ("*.py",)}
STUDIES = "studies"  # where a study's own files go that lie outside the checkout


def files(study: str, others: list[Path]) -> tuple[dict[str, Path], str]:
    """Files by their place in the archive, and the study's reference there. others: modules that the study loaded."""
    found = {name: ROOT / name for name in TOP if (ROOT / name).exists()}
    for room, patterns in ROOMS.items():
        for pattern in patterns:
            found |= {path.relative_to(ROOT).as_posix(): path for path in (ROOT / room).rglob(pattern)}
    path, _, function = study.partition(":")
    own, here = Path(path).resolve(), Path.cwd()

    def place(file: Path) -> str:
        for base in (here, ROOT):  # as the study's imports find them
            if file.is_relative_to(base):
                return file.relative_to(base).as_posix()
        return f"{STUDIES}/{file.name}"

    for file in (own, *(path.resolve() for path in others)):
        if not file.is_relative_to(ROOT) or place(file) not in found:
            found[place(file)] = file
    return found, place(own) + (f":{function}" if function else "")


def archive(content: dict[str, Path]) -> bytes:
    """A tar file, compressed, with where the code came from: the same bytes for the same content."""
    raw = io.BytesIO()
    commit = provenance.source()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        texts = {name: path.read_bytes() for name, path in content.items()}
        for name, text in sorted({**texts, provenance.SOURCE: json.dumps(commit).encode()}.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text), 0o644
            tar.addfile(info, io.BytesIO(text))
    return gzip.compress(raw.getvalue(), mtime=0)


def name_of(content: bytes) -> str:
    return f"code-{hashlib.sha256(content).hexdigest()[:16]}.tar.gz"
