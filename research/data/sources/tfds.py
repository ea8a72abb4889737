# SPDX-License-Identifier: Apache-2.0
"""Any TFDS data set that has been prepared as ArrayRecord, read without TensorFlow."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from research.data.cache import files_hash, name_of
from research.data.sources.base import CorpusError, assign, check_fraction, check_split, unit_hash

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Tfds:
    """The text of one feature of a prepared TFDS data set.

    name: as TFDS writes it: ``"name"``, ``"name/config"``, ``"name:1.0.0"`` or ``"name/config:1.0.0"``.
    text_field: the feature that holds the text.
    train_split, validation_split: TFDS splits, slices such as ``"train[:90%]"`` included. An empty
        validation_split takes ``validation_fraction`` of the train split, by a hash of the text.
    data_dir: where TFDS keeps prepared data sets; empty for its default (``TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``).
    """

    name: str
    text_field: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"
    data_dir: str = ""
    validation_fraction: float = 0.05

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)

    def fingerprint(self, cache_dir: Path) -> str:
        folder = self._folder()
        files = [(path.name, path) for path in sorted(folder.iterdir()) if path.is_file()]
        settings = [self.text_field, self.train_split, self.validation_split, self.validation_fraction]
        return name_of("tfds", FORMAT, settings, files_hash(files, cache_dir=cache_dir)[0])

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        check_split(split)
        if self.validation_split:
            source = self._open(self.train_split if split == "train" else self.validation_split)
            return (self._text(source, i) for i in range(len(source)))
        return self._carved(split)

    def _carved(self, split: str) -> Iterator[str]:
        source = self._open(self.train_split)
        hashes = [unit_hash(self._text(source, i)) for i in range(len(source))]
        splits = assign(hashes, fraction=self.validation_fraction, what=f"The TFDS split {self.train_split!r}")
        return (self._text(source, i) for i in np.flatnonzero(np.array(splits) == split).tolist())

    def _folder(self) -> Path:
        """The folder of the version asked for, or of the newest; found without importing TFDS."""
        root = Path(self.data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
        name, _, version = self.name.partition(":")
        found = [path.parent for path in (root / name).glob("*/dataset_info.json")]
        found = [path for path in found if not version or path.name == version]
        if not found:
            raise CorpusError(
                f"The TFDS data set {self.name!r} is not prepared under {root}: run `tfds build {name} "
                f"--file_format=array_record --data_dir={root}`, or in Python tfds.builder({name!r}, "
                f"data_dir={str(root)!r}, file_format='array_record').download_and_prepare()."
            )
        folder = max(found, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")])
        try:
            kind = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
        except ValueError as error:
            raise CorpusError(
                f"{folder / 'dataset_info.json'} is not JSON: prepare the data set {self.name!r} anew."
            ) from error
        if kind != "array_record":
            raise CorpusError(
                f"The TFDS data set {self.name!r} at {folder} is prepared as {kind}, and array_record is "
                f"needed: run `tfds build {name} --file_format=array_record --data_dir=FOLDER` with another "
                "FOLDER, and name that one as data_dir."
            )
        return folder

    def _open(self, split: str) -> Any:
        import tensorflow_datasets as tfds

        folder = self._folder()
        builder = tfds.builder_from_directory(str(folder))
        if self.text_field not in (builder.info.features or {}):
            raise CorpusError(
                f"The TFDS data set {self.name!r} has no feature {self.text_field!r}: set text_field to one "
                f"of {', '.join(sorted(builder.info.features or {}))}."
            )
        if split.split("[")[0] not in builder.info.splits:
            raise CorpusError(
                f"The TFDS data set {self.name!r} has no split {split!r}: it has "
                f"{', '.join(sorted(builder.info.splits))} (validation_split='' carves one from train)."
            )
        try:
            source = builder.as_data_source(split=split)
            empty = not len(source)
        except Exception as error:  # ArrayRecord and TFDS raise their own kinds for missing or damaged shards
            raise CorpusError(
                f"The split {split!r} of the TFDS data set {self.name!r} at {folder} cannot be opened "
                f"({str(error).splitlines()[0][:200]}): check the split's name or prepare the data set anew."
            ) from error
        if empty:
            raise CorpusError(f"The split {split!r} of the TFDS data set {self.name!r} is empty: choose another.")
        return source

    def _text(self, source: Any, index: int) -> str:
        value = source[index][self.text_field]
        if isinstance(value, str):
            return value
        if not isinstance(value, bytes):
            raise CorpusError(
                f"The feature {self.text_field!r} of {self.name!r} holds {type(value).__name__} values, not "
                "text: set text_field to a text feature."
            )
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"Example {index} of {self.name!r} is not UTF-8 in {self.text_field!r} ({error.reason} at "
                f"byte {error.start}): choose another text_field or clean the data set."
            ) from error
