# SPDX-License-Identifier: Apache-2.0
"""Folders that are either whole or absent: how cached corpora, tokenizers and token files are written."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from research.core.files import write_atomically
from research.core.types import UserError

T = TypeVar("T")

# Files below this many bytes in all are hashed by content at every start; above it the hash is kept beside
# their sizes and modification times, because reading a terabyte to name it would cost more than the run.
ALWAYS_HASH_BYTES = 64 << 20
CHECKSUM_BLOCK = 1 << 20
CHECKSUM_BLOCKS = 64
# What reading a folder raises when it does not hold what was written.
DAMAGE = (ValueError, KeyError, IndexError, TypeError, EOFError, FileNotFoundError)

_hashes: dict[str, str] = {}


class CacheError(UserError):
    """The cache folder cannot be written or read back."""


def cached_folder(folder: Path, *, build: Callable[[Path], None], load: Callable[[Path], T]) -> T:
    """``load(folder)``, after ``build`` has filled it where it is missing or damaged.

    build: fills an empty folder; it is handed a temporary one that gets its name only when it is complete,
        so that a killed process or a full disk leaves nothing that is later taken for whole.
    load: reads the folder and raises one of ``DAMAGE`` where it is not what was written.
    """
    if folder.exists():
        try:
            return load(folder)
        except DAMAGE as error:
            logging.warning("The cached %s is damaged (%s) and is made anew.", folder, error)
            _discard(folder)
        except OSError as error:
            raise CacheError(
                f"The cache folder {folder} cannot be read ({error.strerror}): mend its permissions or disk, "
                "or choose another cache folder."
            ) from error
    with _new_folder(folder) as temporary:
        build(temporary)
        _check(temporary, folder, load)
        try:
            os.rename(temporary, folder)
        except OSError as error:
            # Another process finished the same folder first; its content is the same by construction.
            if not folder.exists() or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    return _check(folder, folder, load)


def _check(place: Path, folder: Path, load: Callable[[Path], T]) -> T:
    """Loads what has just been written, which must succeed before it gets its name."""
    try:
        return load(place)
    except DAMAGE as error:
        raise CacheError(
            f"The cache folder {folder} does not read back as it was written ({error}): check that disk, "
            "or choose another cache folder."
        ) from error


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CacheError(
                f"The disk is full while writing {folder}: free some space or choose another cache folder."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST):
            raise CacheError(
                f"The cache folder {folder.parent} cannot be written ({error.strerror}): choose another one."
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _discard(folder: Path) -> None:
    # Renamed first: two processes that find the same damage must not delete each other's repair.
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.damaged"
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, aside)
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink()


def checksum(data: np.ndarray) -> str:
    """A hash of an array's bytes: all of them up to 64 MiB, 64 evenly spaced blocks of 1 MiB above."""
    flat = data.reshape(-1).view(np.uint8)
    digest = hashlib.sha256(str(flat.size).encode())
    if flat.size <= CHECKSUM_BLOCK * CHECKSUM_BLOCKS:
        digest.update(flat.data if flat.size else b"")
    else:
        for start in np.linspace(0, flat.size - CHECKSUM_BLOCK, CHECKSUM_BLOCKS).astype(np.int64):
            digest.update(np.ascontiguousarray(flat[start : start + CHECKSUM_BLOCK]).data)
    return digest.hexdigest()


def name_of(*parts: Any, length: int = 24) -> str:
    """A short name for JSON values: equal exactly where they are."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def files_hash(files: Sequence[tuple[str, Path]], *, cache_dir: Path | None = None) -> tuple[str, int]:
    """The content hash and byte count of named files: over names and contents, in the order of the names.

    The hash does not depend on where the files lie. Within a process, and for large corpora also between
    processes (under ``cache_dir``), it is remembered by the files' sizes and modification times.
    """
    files = sorted(files)
    stats = [(name, str(path), os.stat(path)) for name, path in files]
    total = sum(stat.st_size for _, _, stat in stats)
    key = name_of([(name, path, stat.st_size, stat.st_mtime_ns) for name, path, stat in stats], length=64)
    note = cache_dir / "hashes" / key if cache_dir is not None and total > ALWAYS_HASH_BYTES else None
    if key not in _hashes and note is not None:
        with contextlib.suppress(OSError):
            kept = note.read_text()
            if len(kept) == 64:
                _hashes[key] = kept
    if key not in _hashes:
        _hashes[key] = _hash_contents(files)
        if note is not None:
            with contextlib.suppress(OSError):  # a note that cannot be written only costs the next start time
                write_atomically(note, _hashes[key])
    return _hashes[key], total


def _hash_contents(files: Sequence[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(len(name.encode()).to_bytes(8, "big") + name.encode() + content)
    return digest.hexdigest()
