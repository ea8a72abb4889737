# SPDX-License-Identifier: Apache-2.0
"""Whole conversations in rows: tokenised on disk with what is trained of them, and packed as a pure index.

Each conversation lies in one row, as a segment of its own. Which share a row is found once for a corpus and a length,
by best-fit decreasing: the longest first, each into the fullest row that it fits (Ding et al. 2024, Fewer Truncations
Improve Language Modeling, section 3). A row is thus a function of the corpus and its number; streams shuffle rows.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from research.data import packing
from research.data.cache import cached_folder, checksum, name_of
from research.data.chat import ChatTemplate, Conversation
from research.data.packing import Tokens, read_tokens, write_array, write_flat
from research.data.sources import ChatCorpus
from research.data.tokenizer_base import Tokenizer

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ChatTokens(Tokens):
    """The tokenised conversations of one split, memory-mapped.

    trained: [tokens] bool. notes: [conversations, 4] int64: where the first and the last trained target stand, how many
    there are, and whether all is trained, as it is of a text.
    """

    trained: np.ndarray
    notes: np.ndarray


def tokenised(
    corpus: ChatCorpus, *, tokenizer: Tokenizer, template: ChatTemplate, split: str, cache_dir: Path
) -> ChatTokens:
    """A corpus's split as tokens, from the cache where it is there."""
    rendering = FORMAT, packing.FORMAT, dataclasses.astuple(template)
    key = name_of("chat", rendering, corpus.fingerprint(cache_dir), tokenizer.fingerprint, split)

    def build(folder: Path) -> None:
        conversations = corpus.conversations(split, cache_dir=cache_dir)
        write(folder, conversations, tokenizer=tokenizer, template=template, split=split)

    return cached_folder(Path(cache_dir) / "tokens" / key, build=build, load=read)


def write(
    folder: Path, conversations: Iterable[Conversation], *, tokenizer: Tokenizer, template: ChatTemplate, split: str
) -> None:
    """Tokenises conversations into a folder. Raises PackingError where none says anything."""
    notes = []
    with open(folder / "trained.bin", "wb") as file:

        def encoded() -> Iterator[tuple[np.ndarray, int]]:
            for batch in packing.batches(conversations, size=_characters):
                for ids, trained in template.encode_batch(tokenizer, batch):
                    file.write(trained.tobytes())
                    targets = 1 + np.flatnonzero(trained[1:])
                    whole = bool(trained[len(tokenizer.prefix) :].all())
                    notes.append((targets[0], targets[-1], len(targets), whole))
                    yield ids, int(tokenizer.token_bytes[ids].sum())

        write_flat(folder, encoded(), vocab_size=tokenizer.vocab_size, split=split)
    write_array(folder / "notes.npy", np.array(notes, np.int64))
    trained = np.memmap(folder / "trained.bin", bool, mode="r")
    record = {"trained": checksum(trained), "notes": checksum(np.array(notes, np.int64))}
    (folder / "chat.json").write_text(json.dumps(record))


def read(folder: Path) -> ChatTokens:
    """Opens what ``write`` wrote. Raises one of ``cache.DAMAGE`` where it is damaged."""
    tokens, record = read_tokens(folder), json.loads((folder / "chat.json").read_text())
    trained, notes = np.memmap(folder / "trained.bin", bool, mode="r"), np.load(folder / "notes.npy")
    if len(trained) != tokens.num_tokens or len(notes) != tokens.num_documents:
        raise ValueError("its length is not what was written")
    if checksum(trained) != record["trained"] or checksum(notes) != record["notes"]:
        raise ValueError("its checksum is not what was written")
    return ChatTokens(tokens.flat, tokens.offsets, tokens.num_bytes, trained, notes)


def _characters(conversation: Conversation) -> int:
    return sum(len(content) for _, content in conversation)


class ChatRows:
    """Rows of ``sequence_length`` targets over conversations. Safe to use from several threads.

    A conversation ends with its last trained target. One that is longer than a row is cut at the row's end, and where
    no trained target is left, it is in no row; a text goes on in another piece instead, so that nothing is lost.

    len(rows): rows of one epoch; none where no conversation fits.
    trained: targets with weight in an epoch. cut, lost: conversations that were cut, and those that are in no row.
    filled: the share of an epoch's targets that are of a conversation, trained or not; the rest is padding.
    """

    def __init__(self, tokens: ChatTokens, *, sequence_length: int) -> None:
        self.tokens, self.sequence_length = tokens, sequence_length
        first, last, count, whole = tokens.notes.T.copy()
        lost = first > sequence_length
        cut = (last > sequence_length) & (whole == 0) & ~lost
        for number in np.flatnonzero(cut).tolist():
            start = int(tokens.offsets[number])
            left = 1 + np.flatnonzero(tokens.trained[start + 1 : start + sequence_length + 1])
            last[number], count[number] = left[-1], len(left)
        # Of n targets each piece has its own, and one more token before them.
        pieces = np.where(lost, 0, -(-last // sequence_length))
        owner = np.repeat(np.arange(len(pieces)), pieces)
        begins = (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * sequence_length
        starts, sizes = tokens.offsets[owner] + begins, np.minimum(last[owner] - begins, sequence_length)
        rows = best_fit(sizes, capacity=sequence_length)
        order = np.argsort(rows, kind="stable")
        self._starts, self._sizes = starts[order], sizes[order]
        self._rows = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
        self.cut, self.lost, self.trained = int(cut.sum()), int(lost.sum()), int(count[~lost].sum())
        self.filled = float(sizes.sum() / max(1, len(self) * sequence_length))

    num_bytes = property(lambda self: self.tokens.num_bytes)
    num_documents = property(lambda self: self.tokens.num_documents)
    num_tokens = property(lambda self: self.tokens.num_tokens)

    def __len__(self) -> int:
        return len(self._rows) - 1

    def fill(self, out: dict[str, np.ndarray], at: int, *, epoch: int, index: int) -> None:
        """Writes row ``index``, the same in every epoch, into row ``at`` of arrays (as ``empty_rows`` makes)."""
        del epoch
        low = 0
        for segment, piece in enumerate(range(self._rows[index], self._rows[index + 1]), start=1):
            start, size = int(self._starts[piece]), int(self._sizes[piece])
            ids, where = self.tokens.flat[start : start + size + 1], slice(low, low + size)
            out["tokens"][at, where], out["targets"][at, where] = ids[:-1], ids[1:]
            out["weights"][at, where] = self.tokens.trained[start + 1 : start + size + 1]
            out["segment_ids"][at, where], out["positions"][at, where] = segment, np.arange(size)
            low += size


def best_fit(sizes: np.ndarray, *, capacity: int) -> np.ndarray:
    """The row of each piece: longest first, each into the row with the least room that is enough, else a new one.

    sizes: [pieces], from 1 to ``capacity``.
    """
    rows = np.zeros(len(sizes), np.int64)
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    held, count = 0, 0  # the bits of `held` say which of these lists hold any
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        enough = held >> size
        if enough:
            left = size + (enough & -enough).bit_length() - 1
            row = room[left].pop()
            if not room[left]:
                held &= ~(1 << left)
        else:
            left, row, count = capacity, count, count + 1
        rows[piece] = row
        if left > size:
            room[left - size].append(row)
            held |= 1 << (left - size)
    return rows
