# SPDX-License-Identifier: Apache-2.0
"""Folders by name, on this machine or in a bucket (``gs://BUCKET/FOLDER``, by the extra ``gcs``); without JAX."""

import importlib.util
import os
from pathlib import Path

from research.core.errors import UserError


def place(text: str | os.PathLike) -> Path:
    """A folder by its name. Raises UserError for a bucket that nothing here can read, or another scheme."""
    name = os.fspath(text)
    if "://" not in name:
        return Path(name)
    if not name.startswith("gs://") or len(name) < 6:
        raise UserError(f"{name} is no folder that can be used: give a path, or a bucket as gs://BUCKET/FOLDER.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"To use {name}, install the extra gcs: pip install -c constraints.txt -e '.[gcs]'.")
    from etils import epath
    from fsspec.config import conf

    for protocol in ("gs", "gcs"):  # what other processes write must be seen: listings and sizes are not remembered
        conf.setdefault(protocol, {})["use_listings_cache"] = False
    return epath.Path(name)  # type: ignore[return-value]  # a Path in all but its class


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def absolute(path: Path) -> Path:
    """As every process that can reach it knows it."""
    return path if is_remote(path) else path.absolute()
