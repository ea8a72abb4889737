# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors: tensors read one at a time or in part, and written one at a time into shards.

The files are read by the library ``safetensors``. It writes a file from all of its tensors at once, which a large model
would not survive; the format is a length, a header in JSON and the bytes, which is written here.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from research.core.types import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INSTALL = "install the extra: pip install -c constraints.txt -e '.[hf]'"


class Store:
    """The tensors of a folder. shapes: shape and dtype of each by name, known without reading any."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where there is no whole set of readable files."""
        self.folder, self.shapes, self._file = folder, dict[str, tuple[tuple[int, ...], str]](), dict[str, Path]()
        self._open: tuple[Path, Any] | None = None
        listed = self._index()
        for path in dict.fromkeys(listed.values()) if listed else [folder / SINGLE]:
            for name, value in _header(path).items():
                if name in self._file:
                    raise UserError(f"{name} stands in {self._file[name].name} and in {path.name}: remove one of them.")
                self.shapes[name], self._file[name] = (tuple(value["shape"]), value["dtype"]), path
        if missing := [name for name, path in listed.items() if self._file.get(name) != path]:
            raise UserError(
                f"{folder / INDEX} names {missing[0]}, which its file does not have: fetch the files again."
            )

    def _index(self) -> dict[str, Path]:
        """Which file each tensor is in, where there are several."""
        path = self.folder / INDEX
        if not path.exists():
            if not (self.folder / SINGLE).exists():
                other = next(iter([*self.folder.glob("*.bin"), *self.folder.glob("*.pt")]), None)
                what = f"only {other.name}: save it as safetensors" if other else f"neither {SINGLE} nor {INDEX}"
                raise UserError(f"{self.folder} has no weights to read, but {what}." if other else
                                f"{self.folder} has {what}: give a folder with a model's safetensors.")  # fmt: skip
            return {}
        try:
            return {name: self.folder / file for name, file in json.loads(path.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is no index of safetensors ({error}): fetch it again.") from error

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or a part of it that alone is read."""
        path = self._file[name]
        if self._open is None or self._open[0] != path:
            self._open = (path, _opened(path))
        try:
            handle = self._open[1]
            return handle.get_tensor(name) if part is None else handle.get_slice(name)[part]
        except Exception as error:  # the library has several kinds
            raise UserError(f"{name} in {path} cannot be read ({error}): fetch the file again.") from error


def _opened(path: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f"Reading {path} needs safetensors: {INSTALL}.") from error
    try:
        return safe_open(str(path), framework="numpy")
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error}): fetch the file again.") from error


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, shapes and dtypes of a file, checked against its size."""
    if not path.exists():
        raise UserError(f"{path.parent} lacks {path.name}, which its index names: fetch all files of the model.")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            found = json.loads(file.read(length))
        found.pop("__metadata__", None)
        end = max((value["data_offsets"][1] for value in found.values()), default=0)
        if path.stat().st_size != 8 + length + end:
            raise ValueError(f"it has {path.stat().st_size} bytes and should have {8 + length + end}")
        return found
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): fetch it again.") from error


def check_empty(folder: Path) -> None:
    """Raises UserError where a folder to be written holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: name a new folder, or remove it.")


def shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, in groups of at most so many bytes (a larger tensor has one of its own)."""
    found: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if found[-1] and size > room:
            found.append([])
            room = most
        found[-1].append(name)
        room -= size
    return found


@contextlib.contextmanager
def writing(
    folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], *, shard_bytes: int = 5_000_000_000
) -> Iterator["Writer"]:
    """A writer of tensors with these shapes and dtypes into a new folder. Only when all are written do the files get
    their names; an interrupted one leaves nothing that looks whole."""
    check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writer = Writer(folder, shapes, shard_bytes)
    try:
        yield writer
        writer.finish()
    finally:
        writer.clear()


class Writer:
    """Takes tensors in the order in which they were announced."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], shard_bytes: int) -> None:
        self.folder, self.shapes = folder, dict(shapes)
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
        self.groups, self.total = shards(sizes, shard_bytes), sum(sizes.values())
        count = len(self.groups)
        self.files = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self.left = [name for group in self.groups for name in group]
        self.begun: dict[str, Path] = {}
        self._file: Any = None

    def write(self, name: str, array: np.ndarray) -> None:
        shape, dtype = self.shapes[name]
        if self.left[0] != name or array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{self.left[0]} was announced; given {name} {array.shape} {array.dtype}")
        number = next(i for i, group in enumerate(self.groups) if name in group)
        if name == self.groups[number][0]:
            self._begin(number)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        self.left.pop(0)

    def _begin(self, number: int) -> None:
        if self._file is not None:
            self._file.close()
        path, header, at = self.folder / f".{self.files[number]}.partial", {}, 0
        for name in self.groups[number]:
            shape, dtype = self.shapes[name]
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.begun[self.files[number]] = path
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def finish(self) -> None:
        if self.left:
            raise ValueError(f"{self.left[0]} was announced and not written")
        self._file.close()
        if len(self.files) > 1:
            where = {name: file for file, group in zip(self.files, self.groups, strict=True) for name in group}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(where.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for file, path in self.begun.items():
            path.rename(self.folder / file)
        self.begun = {}

    def clear(self) -> None:
        if self._file is not None:
            self._file.close()
        for path in self.begun.values():
            path.unlink(missing_ok=True)
