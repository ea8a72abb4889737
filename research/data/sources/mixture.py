# SPDX-License-Identifier: Apache-2.0
"""A mixture of corpora by weight."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from research.data.cache import name_of
from research.data.chat import Conversation
from research.data.sources.base import ChatCorpus, Corpus, CorpusError, check_split


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows from several corpora in fixed proportions: ``weights[i]`` of every batch's rows, on average.

    The proportions hold for rows, hence for tokens, whatever the corpora's sizes: each is packed apart and
    starts its own next epoch when it has been read through. Mixtures may hold mixtures.
    """

    sources: tuple[Corpus, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sources or len(self.sources) != len(self.weights):
            raise CorpusError(
                f"A mixture needs one weight for each corpus; given {len(self.sources)} corpora and "
                f"{len(self.weights)} weights."
            )
        if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise CorpusError(f"The weights of a mixture must be positive; given {list(self.weights)}: drop a corpus.")
        object.__setattr__(self, "sources", tuple(self.sources))
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))

    def fingerprint(self, cache_dir: Path) -> str:
        return name_of("mixture", [(part.fingerprint(cache_dir), weight) for part, weight in parts(self)])

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        """All documents, one corpus after the other: the weights are for rows, not documents."""
        check_split(split)
        for source in self.sources:
            yield from source.documents(split, cache_dir=cache_dir)

    def conversations(self, split: str, *, cache_dir: Path) -> Iterator[Conversation]:
        """All conversations, as ``documents``."""
        check_split(split)
        for source in self.sources:
            yield from as_chat(source).conversations(split, cache_dir=cache_dir)


def as_chat(corpus: Corpus) -> ChatCorpus:
    """The corpus itself. Raises CorpusError where it has no conversations."""
    if not isinstance(corpus, ChatCorpus):
        raise CorpusError(
            f"{type(corpus).__name__} is a corpus of text, not of conversations: write "
            f"PlainText({type(corpus).__name__}(...)) to have it among them."
        )
    return corpus


def parts(corpus: Corpus) -> list[tuple[Corpus, float]]:
    """The corpora of a mixture with weights that add up to 1; a corpus that is no mixture, alone."""
    if not isinstance(corpus, Mixture):
        return [(corpus, 1.0)]
    total = math.fsum(corpus.weights)
    return [
        (part, weight / total * share)
        for source, weight in zip(corpus.sources, corpus.weights, strict=True)
        for part, share in parts(source)
    ]
