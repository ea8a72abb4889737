# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: what a study names (``Bytes``, ``Characters``, ``SentencePiece``) and what training it gives.

Every tokenizer has the 256 bytes to fall back on, so that ``decode(encode(text)) == text`` for any text and
the bytes its tokens stand for add up exactly: bits per byte compare between tokenizers.
"""

import base64
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from research.core.config import to_json
from research.data.cache import cached_folder, name_of
from research.data.pretrained import Pretrained, PretrainedTokenizer
from research.data.sentence_piece import SentencePiece, SentencePieceTokenizer
from research.data.sources import Corpus, parts
from research.data.tokenizer_base import FORMAT, SPECIALS, Tokenizer, TokenizerError, TokenizerSpec, utf8

__all__ = [
    "Bytes",
    "Characters",
    "Pretrained",
    "SentencePiece",
    "Tokenizer",
    "TokenizerError",
    "TokenizerSpec",
    "load_tokenizer",
    "tokenizer_folder",
    "train_tokenizer",
]

BYTE_PIECES = tuple(bytes([value]) for value in range(256))
LONGEST_LINE = 2000


class ByteTokenizer(Tokenizer):
    kind = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32) + len(SPECIALS)


class CharacterTokenizer(Tokenizer):
    """Specials, then the 256 bytes, then characters."""

    kind = "characters"

    @functools.cached_property
    def _table(self) -> np.ndarray:
        first = len(SPECIALS) + 256
        codes = [ord(piece.decode()) for piece in self.pieces[first:]]
        table = np.full(0x110000, -1, np.int32)
        table[codes] = np.arange(first, first + len(codes))
        return table

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = self._table[codes]
        strange = np.flatnonzero(ids < 0)
        if not len(strange):
            return ids
        found, at = [], 0
        for i in strange.tolist():
            found += [
                ids[at:i],
                np.frombuffer(chr(codes[i]).encode(), np.uint8).astype(np.int32) + len(SPECIALS),
            ]
            at = i + 1
        return np.concatenate([*found, ids[at:]])


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One token a byte of UTF-8: 259 ids, nothing to train."""

    size: ClassVar[int] = len(SPECIALS) + 256
    sample_limit: ClassVar[int] = 0

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return ByteTokenizer((b"",) * len(SPECIALS) + BYTE_PIECES)


@dataclasses.dataclass(frozen=True)
class Characters:
    """One token a character seen in the train split; others fall back to their bytes.

    min_count: characters seen less often are left to the bytes.
    max_characters: only the most frequent this many become tokens.
    """

    min_count: int = 1
    max_characters: int = 4096
    size: ClassVar[None] = None
    sample_limit: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.min_count < 1 or self.max_characters < 1:
            raise TokenizerError(
                f"min_count and max_characters must be at least 1; given {self.min_count} and {self.max_characters}."
            )

    def train(self, texts: Iterable[str]) -> Tokenizer:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        often = [c for c, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])) if n >= self.min_count]
        kept = sorted(c for c in often[: self.max_characters] if not "\ud800" <= c <= "\udfff")
        return CharacterTokenizer((b"",) * len(SPECIALS) + BYTE_PIECES + tuple(c.encode() for c in kept))


# --- training and the cache ---------------------------------------------------------------------


def train_tokenizer(spec: TokenizerSpec, corpus: Corpus, *, cache_dir: Path) -> Tokenizer:
    """The tokenizer that ``spec`` gives on the train split of ``corpus``, cached by content."""
    if spec.sample_limit == 0:
        return spec.train(())

    def build(folder: Path) -> None:
        spec.train(sample(corpus, limit=spec.sample_limit, cache_dir=cache_dir)).save(folder)

    return cached_folder(tokenizer_folder(spec, corpus, cache_dir=cache_dir), build=build, load=load_tokenizer)


def tokenizer_folder(spec: TokenizerSpec, corpus: Corpus, *, cache_dir: Path) -> Path:
    """Where the trained tokenizer is kept: named by the spec's and the corpus's content."""
    key = name_of("tokenizer", FORMAT, to_json(spec), corpus.fingerprint(cache_dir))
    return Path(cache_dir) / "tokenizers" / key


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads what ``Tokenizer.save`` wrote. Raises one of ``cache.DAMAGE`` where it is damaged."""
    record = json.loads((Path(folder) / "tokenizer.json").read_text())
    kinds = {cls.kind: cls for cls in (ByteTokenizer, CharacterTokenizer, SentencePieceTokenizer, PretrainedTokenizer)}
    pieces = [base64.b64decode(piece) for piece in record["pieces"]]
    tokenizer = kinds[record["kind"]](pieces, model=base64.b64decode(record["model"]))
    if tokenizer.fingerprint != record["fingerprint"]:
        raise ValueError("its content does not match its fingerprint")
    return tokenizer


def sample(corpus: Corpus, *, limit: int | None, cache_dir: Path) -> Iterator[str]:
    """Train text of about ``limit`` bytes: whole documents where all fits, else lines picked by a fixed seed.

    A mixture's corpora share the limit by their weights.
    """
    for number, (part, weight) in enumerate(parts(corpus)):
        documents = functools.partial(part.documents, "train", cache_dir=cache_dir)
        share = 1.0
        if limit is not None:
            total = sum(len(utf8(text)) for text in documents())
            share = min(1.0, limit * weight / max(total, 1))
        rng = np.random.Generator(np.random.PCG64([FORMAT, number]))
        for text in documents():
            if share == 1.0:
                yield text
            else:
                lines = [
                    line[start : start + LONGEST_LINE]
                    for line in text.splitlines(keepends=True)
                    for start in range(0, len(line), LONGEST_LINE)
                ]
                yield "".join(lines[i] for i in np.flatnonzero(rng.random(len(lines)) < share).tolist())
