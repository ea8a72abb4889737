# SPDX-License-Identifier: Apache-2.0
"""A folder of text files, or a single file."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from research.data.cache import files_hash, name_of
from research.data.sources.base import CorpusError, assign, check_fraction, check_split, unit_hash

FORMAT = 1
# Below this many files a split by file would be a lottery: the files are cut into sections instead.
FEW_FILES = 20
SECTIONS = 256
SECTION_CHARACTERS = (64, 4096)


@dataclasses.dataclass(frozen=True)
class TextFolder:
    """Text files below a folder; the split is by a hash of the relative path.

    A folder with 20 files or more gives one document a file. One with fewer (often a single file) has its
    files cut, at blank lines where there are some, into sections of a 256th of the whole (64 to 4096
    characters); each section is a document with the hash of its path and number. The sections of a file,
    put together, are the file.

    path: the folder; a single file counts as a folder that holds it.
    pattern: which files, as ``pathlib`` globs.
    encoding: of the files; a byte-order mark of UTF-8 is dropped.
    """

    path: str
    pattern: str = "**/*.txt"
    encoding: str = "utf-8"
    validation_fraction: float = 0.05

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)

    def fingerprint(self, cache_dir: Path) -> str:
        content = files_hash(self._files(), cache_dir=cache_dir)[0]
        return name_of("text_folder", FORMAT, self.encoding, self.validation_fraction, content)

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        check_split(split)
        files = self._files()
        if len(files) < FEW_FILES:
            return self._sections(files, split)
        splits = assign(
            [unit_hash(name) for name, _ in files],
            fraction=self.validation_fraction,
            what=f"The folder {self.path}",
        )
        return (self._read(path) for (_, path), chosen in zip(files, splits, strict=True) if chosen == split)

    def _sections(self, files: list[tuple[str, Path]], split: str) -> Iterator[str]:
        texts = [(name, self._read(path)) for name, path in files]
        low, high = SECTION_CHARACTERS
        size = min(max(sum(len(text) for _, text in texts) // SECTIONS, low), high)
        sections = [
            (f"{name}#{number}", section) for name, text in texts for number, section in enumerate(cut(text, size=size))
        ]
        hashes = [unit_hash(key) for key, _ in sections]
        splits = assign(hashes, fraction=self.validation_fraction, what=f"The text under {self.path}")
        return (text for (_, text), chosen in zip(sections, splits, strict=True) if chosen == split)

    def _files(self) -> list[tuple[str, Path]]:
        """Names and places of the files that hold something, sorted by name."""
        root = Path(self.path).expanduser()
        if root.is_file():
            found = [(root.name, root)]
        elif not root.is_dir():
            raise CorpusError(f"There is no folder {self.path!r} (looked at {root.absolute()}): check the path.")
        else:
            try:
                found = [(p.relative_to(root).as_posix(), p) for p in root.glob(self.pattern) if p.is_file()]
            except (ValueError, NotImplementedError) as error:
                raise CorpusError(
                    f"{self.pattern!r} is not a file pattern ({error}): write one such as '**/*.txt'."
                ) from error
        if not found:
            raise CorpusError(
                f"The folder {self.path!r} has no file that matches pattern={self.pattern!r}: change either."
            )
        held = sorted((name, path) for name, path in found if path.stat().st_size)
        if not held:
            raise CorpusError(
                f"All {len(found)} files in {self.path!r} that match {self.pattern!r} are empty: add text."
            )
        return held

    def _read(self, path: Path) -> str:
        try:
            return path.read_bytes().decode("utf-8-sig" if self.encoding == "utf-8" else self.encoding)
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{path} is not {self.encoding} text ({error.reason}, byte {error.start}): set encoding, or "
                "narrow the pattern to text files."
            ) from error
        except LookupError as error:
            raise CorpusError(
                f"{self.encoding!r} is not an encoding Python knows: use one such as 'utf-8' or 'latin-1'."
            ) from error


def cut(text: str, *, size: int) -> Iterator[str]:
    """Consecutive sections of about ``size`` characters, ended at a blank line, else a line, else a space."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > size * 3 // 2:
            end = start + size
            for boundary in ("\n\n", "\n", " "):
                at = text.find(boundary, start + size, start + 2 * size)
                if at >= 0:
                    end = at + len(boundary)
                    break
        yield text[start:end]
        start = end
