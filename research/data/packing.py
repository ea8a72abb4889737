# SPDX-License-Identifier: Apache-2.0
"""Packing as a pure index: tokenised documents on disk, and rows that are functions of (corpus, seed, row).

Documents lie in one flat file, each as BOS, tokens, EOS. An epoch reads them as one stream in an order drawn
from the seed. Row j holds the stream's tokens j * T to j * T + T, so that consecutive rows share one token
and every transition of the stream is a target exactly once; those into another document weigh nothing.
"""

import dataclasses
import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from research.core.types import UserError
from research.data.cache import cached_folder, checksum, name_of
from research.data.sources import Corpus
from research.data.tokenizer_base import Tokenizer

T = TypeVar("T")

FORMAT = 1
BATCH_CHARACTERS = 4_000_000
KEPT_ORDERS = 3


class PackingError(UserError):
    """Documents that cannot be packed into rows."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokenised documents of one split, memory-mapped.

    flat: [tokens] ids of all documents, BOS and EOS included.
    offsets: [documents + 1] where each document starts in ``flat``.
    num_bytes: UTF-8 bytes of the text.
    """

    flat: np.ndarray
    offsets: np.ndarray
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


def tokenised(corpus: Corpus, *, tokenizer: Tokenizer, split: str, cache_dir: Path) -> Tokens:
    """A corpus's split as tokens, from the cache where it is there."""
    key = name_of("tokens", FORMAT, corpus.fingerprint(cache_dir), tokenizer.fingerprint, split)

    def build(folder: Path) -> None:
        write_tokens(folder, corpus.documents(split, cache_dir=cache_dir), tokenizer=tokenizer, split=split)

    return cached_folder(Path(cache_dir) / "tokens" / key, build=build, load=read_tokens)


def write_tokens(folder: Path, documents: Iterable[str], *, tokenizer: Tokenizer, split: str) -> None:
    """Tokenises documents into a folder. Raises PackingError where there is no text."""

    def encoded() -> Iterator[tuple[np.ndarray, int]]:
        for batch in batches(documents):
            for ids in tokenizer.encode_batch(batch):
                whole = np.concatenate([tokenizer.prefix, ids, [tokenizer.eos_id]])
                yield whole, int(tokenizer.token_bytes[ids].sum())

    write_flat(folder, encoded(), vocab_size=tokenizer.vocab_size, split=split)


def write_flat(folder: Path, documents: Iterable[tuple[np.ndarray, int]], *, vocab_size: int, split: str) -> None:
    """Writes documents, each its ids and how many bytes of text they are. Raises PackingError where all are empty."""
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    lengths, num_bytes = [], 0
    with open(folder / "tokens.bin", "wb") as file:
        for document, size in documents:
            file.write(document.astype(dtype).tobytes())  # ndarray.tofile does not report a full disk
            lengths.append(len(document))
            num_bytes += size
    if not num_bytes:
        raise PackingError(f"The {split} split holds no text: add text or change the split's share.")
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    write_array(folder / "offsets.npy", offsets)
    flat = np.memmap(folder / "tokens.bin", dtype, mode="r")
    record = {"dtype": dtype.str, "tokens": len(flat), "bytes": num_bytes, "checksum": checksum(flat)}
    record["offsets"] = checksum(offsets)
    (folder / "meta.json").write_text(json.dumps(record))


def write_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getvalue())


def read_tokens(folder: Path) -> Tokens:
    """Opens what ``write_tokens`` wrote. Raises one of ``cache.DAMAGE`` where it is damaged."""
    record = json.loads((folder / "meta.json").read_text())
    flat = np.memmap(folder / "tokens.bin", np.dtype(record["dtype"]), mode="r")
    offsets = np.load(folder / "offsets.npy")
    if len(flat) != record["tokens"] or offsets[-1] != len(flat):
        raise ValueError("its length is not what was written")
    if checksum(flat) != record["checksum"] or checksum(offsets) != record["offsets"]:
        raise ValueError("its checksum is not what was written")
    return Tokens(flat, offsets, int(record["bytes"]))


def batches(items: Iterable[T], *, size: Callable[[T], int] = len) -> Iterator[list[T]]:
    """Texts, or what ``size`` counts the characters of, some millions of characters at a time; empty ones left out."""
    batch: list[T] = []
    total = 0
    for item in items:
        if characters := size(item):
            batch.append(item)
            total += characters
        if total >= BATCH_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``count`` documents that depends on (seed, epoch) alone.

    Sorted raw words of a counter-based generator: those are fixed by its definition, while numpy may change
    how its own ``permutation`` draws.
    """
    words = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(count)
    return np.argsort(words, kind="stable")


class Rows:
    """Rows of ``sequence_length`` targets over tokenised documents. Safe to use from several threads.

    len(rows): rows of one epoch; the last is padded where the stream does not fill it.
    """

    def __init__(self, tokens: Tokens, *, sequence_length: int, seed: int, pad_id: int = 0) -> None:
        self.tokens, self.sequence_length, self.seed, self.pad_id = tokens, sequence_length, seed, pad_id
        self._lengths = np.diff(tokens.offsets)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return max(1, -(-(self.tokens.num_tokens - 1) // self.sequence_length))

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in order, and where each starts in the epoch's stream."""
        with self._lock:
            if epoch not in self._orders:
                documents = order(self.tokens.num_documents, seed=self.seed, epoch=epoch)
                starts = np.concatenate([[0], np.cumsum(self._lengths[documents])])
                self._orders[epoch] = (documents, starts)
                for old in list(self._orders)[:-KEPT_ORDERS]:
                    del self._orders[old]
            return self._orders[epoch]

    def fill(self, out: dict[str, np.ndarray], at: int, *, epoch: int, index: int) -> None:
        """Writes row ``index`` of an epoch into row ``at`` of zeroed arrays (as ``empty_rows`` makes)."""
        length = self.sequence_length
        documents, starts = self._order(epoch)
        first = index * length
        last = min(first + length + 1, self.tokens.num_tokens)
        stream = np.full(length + 1, self.pad_id, np.int32)
        piece = int(np.searchsorted(starts, first, side="right")) - 1
        segment = 0
        while piece < len(documents) and starts[piece] < last:
            begin, end = max(int(starts[piece]), first), min(int(starts[piece + 1]), last)
            source = int(self.tokens.offsets[documents[piece]]) + begin - int(starts[piece])
            low, high = begin - first, end - first
            stream[low:high] = self.tokens.flat[source : source + end - begin]
            segment += 1
            out["segment_ids"][at, low:high] = segment  # the slice ends at T where the piece is one longer
            out["positions"][at, low:high] = np.arange(min(high, length) - low)
            out["weights"][at, low : high - 1] = 1.0  # a piece's last token has its target in the next piece
            piece += 1
        out["tokens"][at] = stream[:-1]
        out["targets"][at] = stream[1:]


def empty_rows(count: int, *, sequence_length: int, pad_id: int = 0) -> dict[str, np.ndarray]:
    """``count`` rows of padding: segment 0, weight 0."""
    shape = (count, sequence_length)
    rows: dict[str, Any] = {name: np.full(shape, pad_id, np.int32) for name in ("tokens", "targets")}
    rows["weights"] = np.zeros(shape, np.float32)
    rows.update({name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")})
    return rows
