# SPDX-License-Identifier: Apache-2.0
"""The corpus that is always there: the source of the running Python's standard library, about 12 MB of text.

It is prepared as a TFDS data set in ArrayRecord files, without TensorFlow and without the network.
"""

import contextlib
import dataclasses
import functools
import io
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from research.data.cache import CacheError, cached_folder, files_hash, name_of
from research.data.sources.base import CorpusError, assign, check_fraction, check_split, unit_hash

# Bump when the same files would give other documents.
FORMAT = 2
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
DATASET = "python_standard_library"
SEAL = "content_hash"


class Inventory(NamedTuple):
    """What the corpus is made of: recorded with every result, because it differs between Python versions."""

    python: str
    files: int
    bytes: int
    content_hash: str


@dataclasses.dataclass(frozen=True)
class Stdlib:
    """The standard library's ``.py`` files, tests and installed packages left out; a document per module.

    Split by a hash of the path, as in ``Lib/json/decoder.py``. A file is decoded by its PEP 263 cookie, as
    Python reads it; one that does not decode so is read as Latin-1, which maps every byte to a character.
    """

    validation_fraction: float = 0.07

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)

    def inventory(self) -> Inventory:
        """Files, bytes and the content hash over sorted relative paths and raw contents."""
        files = _files()
        content_hash, total = files_hash(files)
        return Inventory(sys.version.split()[0], len(files), total, content_hash)

    def fingerprint(self, cache_dir: Path) -> str:
        return name_of("stdlib", FORMAT, self.validation_fraction, files_hash(_files())[0])

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        check_split(split)
        folder = Path(cache_dir) / "corpora" / f"stdlib-{self.fingerprint(cache_dir)}"
        source = cached_folder(folder, build=self._prepare, load=_open)[split]
        return (source[i]["text"].decode() for i in range(len(source)))

    def _prepare(self, folder: Path) -> None:
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        files = _files()
        splits = assign(
            [unit_hash(f"Lib/{name}") for name, _ in files],
            fraction=self.validation_fraction,
            what="The standard library",
        )
        builder = _builder_class()(data_dir=str(folder), file_format="array_record")
        builder.plan = {
            split: [pair for pair, chosen in zip(files, splits, strict=True) if chosen == split]
            for split in ("train", "validation")
        }
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces every data set it makes
                builder.download_and_prepare()
        except RuntimeError as error:  # as ArrayRecord reports a failed write
            raise CacheError(
                f"The standard library could not be written as a TFDS data set under {folder.parent} "
                f"({str(error).splitlines()[0][:200]}): free some space or choose another cache folder."
            ) from error
        (folder / SEAL).write_text(_seal(folder))


def _files() -> list[tuple[str, Path]]:
    """Relative path (with forward slashes) and place of every module, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and path.is_file():
                found.append((path.relative_to(root).as_posix(), path))
    if not found:
        raise CorpusError(
            f"The standard library at {root} has no .py files (a packed Python): use TextFolder or Jsonl."
        )
    return sorted(found)


def decode(raw: bytes) -> str:
    """A Python source file's text: by its byte-order mark or PEP 263 cookie, else UTF-8, else Latin-1."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return raw.decode("latin-1")


def _open(folder: Path) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    if (folder / SEAL).read_text() != _seal(folder):
        raise ValueError("its files are not those that were written")
    versions = [path for path in folder.glob(f"{DATASET}/*") if (path / "dataset_info.json").is_file()]
    if len(versions) != 1:
        raise ValueError("it holds no data set")
    builder = tfds.builder_from_directory(str(versions[0]))
    return {split: builder.as_data_source(split=split) for split in ("train", "validation")}


def _seal(folder: Path) -> str:
    """The content hash of a prepared folder, by which a damaged one is told from a whole one."""
    files = [(p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file() and p.name != SEAL]
    return files_hash(files)[0]


@functools.cache
def _builder_class() -> type:
    """The TFDS builder, defined on first use because importing TFDS takes a quarter of a second."""
    import tensorflow_datasets as tfds

    class StandardLibrary(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = DATASET
        VERSION = tfds.core.Version(f"{FORMAT}.0.0")
        plan: dict[str, list[tuple[str, Path]]] = {}
        # TFDS looks for download checksums beside the builder's code, through a package (importlib_resources)
        # that it does not itself require; nothing is downloaded here.
        code_path = None
        url_infos: dict[str, Any] = {}

        def _info(self):
            features = tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()})
            return tfds.core.DatasetInfo(
                builder=self, features=features, description="The Python standard library's source."
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(files) for split, files in self.plan.items()}

        def _generate_examples(self, files):
            for name, path in files:
                yield name, {"path": name, "text": decode(path.read_bytes())}

    return StandardLibrary
