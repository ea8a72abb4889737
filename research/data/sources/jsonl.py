# SPDX-License-Identifier: Apache-2.0
"""A file with one JSON record a line, one of whose fields is the text."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from research.data.cache import files_hash, name_of
from research.data.sources.base import CorpusError, assign, check_fraction, check_split, unit_hash

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Jsonl:
    """A document a line. The split is by a hash of the text, so that equal documents fall on the same side.

    Blank lines and empty texts are passed over; any other line that is not an object with the field is an
    error that names the line.
    """

    path: str
    text_field: str = "text"
    validation_fraction: float = 0.05

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)

    def fingerprint(self, cache_dir: Path) -> str:
        content = files_hash([("data", file_at(self.path))], cache_dir=cache_dir)[0]
        return name_of("jsonl", FORMAT, self.text_field, self.validation_fraction, content)

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        check_split(split)
        # Two passes: only the hashes of a large file fit in memory, and both splits must be non-empty.
        hashes = [unit_hash(text) for text in self._texts()]
        splits = assign(hashes, fraction=self.validation_fraction, what=f"The file {self.path}")
        return (text for text, chosen in zip(self._texts(), splits, strict=True) if chosen == split)

    def _texts(self) -> Iterator[str]:
        texts = (
            text_of(record, self.text_field, where=where, setting="text_field") for where, record in lines(self.path)
        )
        return (text for text in texts if text)


def file_at(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise CorpusError(f"There is no file {path!r} (looked at {found.absolute()}): check the path.")
    return found


def lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file, each with what to call it in an error: its line. Blank lines are passed over."""
    with open(file_at(path), "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"Line {number} of {path}"
                yield where, _record(line, where, encoding="utf-8-sig" if number == 1 else "utf-8")


def _record(line: bytes, where: str, *, encoding: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode(encoding))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where} is not UTF-8 ({error.reason}): write the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where} is not JSON ({error}): mend or remove that line.") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{where} is a JSON {type(record).__name__}, not an object: write one object a line.")
    return record


def value_of(record: Mapping[str, Any], field: str, *, where: str, setting: str) -> Any:
    """A field of a record. setting: what to change where the record has no such field."""
    if field not in record:
        fields = ", ".join(sorted(record)) or "none"
        raise CorpusError(f"{where} has no field {field!r} (its fields: {fields}): set {setting}.")
    return record[field]


def text_of(record: Mapping[str, Any], field: str, *, where: str, setting: str) -> str:
    """A field that holds text. Raises CorpusError where it holds anything else."""
    text = value_of(record, field, where=where, setting=setting)
    if not isinstance(text, str):
        raise CorpusError(
            f"{where} has {json.dumps(text)[:40]} in {field!r}, which is not text: write it as text, or set {setting}."
        )
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise CorpusError(f"{where} has half of a surrogate pair in {field!r}: mend that line.")
    return text
