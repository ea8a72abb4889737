# SPDX-License-Identifier: Apache-2.0
"""Text of known entropy: a Markov chain, so that a test can check what loss training should come down to."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from research.data.cache import name_of
from research.data.sources.base import SPLITS, CorpusError, check_split

FORMAT = 1
PRINTABLE = 94  # "!" to "~": one byte a symbol, so that the Bytes tokenizer has one token a symbol
IDEOGRAPHS = 0x4E00
LANES = 512


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Documents drawn from a first-order Markov chain with a seeded transition matrix.

    A document starts in the chain's stationary distribution and ends after any symbol with probability
    1 / document_length, so that its end is no more predictable late than early and the expected loss is
    exact at every position. Use it with ``Bytes`` (up to 94 symbols) or ``Characters``: one token a symbol.

    vocab_size: symbols of the chain (2 to 20000).
    concentration: of the Dirichlet distribution each row of the matrix is drawn from; small is predictable.
    num_symbols: expected symbols of the train split; the validation split has a tenth of it.
    """

    vocab_size: int = 32
    concentration: float = 0.3
    num_symbols: int = 200_000
    document_length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.vocab_size <= 20000:
            raise CorpusError(f"Synthetic text has 2 to 20000 symbols; given vocab_size={self.vocab_size}.")
        if not self.concentration > 0 or not math.isfinite(self.concentration):
            raise CorpusError(f"concentration must be positive; given {self.concentration}.")
        if self.document_length < 2 or self.num_symbols < self.document_length:
            raise CorpusError(
                f"Synthetic text needs document_length >= 2 and num_symbols >= document_length; given "
                f"{self.document_length} and {self.num_symbols}."
            )

    def fingerprint(self, cache_dir: Path) -> str:
        return name_of("synthetic", FORMAT, {k: repr(v) for k, v in dataclasses.asdict(self).items()})

    def transitions(self) -> np.ndarray:
        """The transition matrix [vocab_size, vocab_size]; rows add up to 1."""
        rng = np.random.Generator(np.random.PCG64([self.seed, 1]))
        # A floor keeps the chain irreducible where a small concentration rounds entries to zero.
        rows = rng.standard_gamma(self.concentration, size=(self.vocab_size, self.vocab_size)) + 1e-6
        return rows / rows.sum(axis=1, keepdims=True)

    def stationary(self) -> np.ndarray:
        """The distribution [vocab_size] that the transitions leave unchanged."""
        matrix = self.transitions().T - np.eye(self.vocab_size)
        matrix[-1] = 1.0  # one equation is redundant; in its place: the probabilities add up to 1
        return np.linalg.solve(matrix, np.eye(self.vocab_size)[-1])

    def chain_entropy(self) -> float:
        """Nats per symbol of the endless chain."""
        rows = self.transitions()
        return float(self.stationary() @ -np.sum(rows * np.log(rows), axis=1))

    def entropy_rate(self) -> float:
        """Exact nats per target token, first symbols and ends of documents included.

        This is the loss of a perfect model over packed rows: a document of n symbols has n + 1 targets, the
        n symbols and the end.
        """
        start, end = self.stationary(), 1.0 / self.document_length
        first = -float(np.sum(start * np.log(start)))
        stop = -(end * math.log(end) + (1 - end) * math.log(1 - end))
        document = first + self.document_length * (stop + (1 - end) * self.chain_entropy())
        return document / (self.document_length + 1)

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        check_split(split)
        count = max(1, round(self.num_symbols / (10 if split == "validation" else 1) / self.document_length))
        rng = np.random.Generator(np.random.PCG64([self.seed, 2 + SPLITS.index(split)]))
        steps, start = np.cumsum(self.transitions(), axis=1), np.cumsum(self.stationary())
        for first in range(0, count, LANES):
            yield from self._draw(rng, min(LANES, count - first), steps, start)

    def _draw(self, rng: np.random.Generator, lanes: int, steps: np.ndarray, start: np.ndarray) -> list[str]:
        """``lanes`` documents, drawn side by side."""
        lengths = rng.geometric(1.0 / self.document_length, size=lanes)
        symbols = np.zeros((lanes, int(lengths.max())), np.uint32)
        last = self.vocab_size - 1
        symbols[:, 0] = np.minimum(np.searchsorted(start, rng.random(lanes)), last)
        for step in range(1, symbols.shape[1]):
            going = np.flatnonzero(lengths > step)
            rows = steps[symbols[going, step - 1]]
            symbols[going, step] = np.minimum((rows < rng.random(len(going))[:, None]).sum(axis=1), last)
        symbols += ord("!") if self.vocab_size <= PRINTABLE else IDEOGRAPHS
        return [row[:n].astype("<u4").tobytes().decode("utf-32-le") for row, n in zip(symbols, lengths, strict=True)]
