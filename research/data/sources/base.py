# SPDX-License-Identifier: Apache-2.0
"""What a corpus is: documents in two splits, and a hash of their content."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from research.core.types import UserError
from research.data.chat import Conversation

SPLITS = ("train", "validation")


class CorpusError(UserError):
    """A corpus that is missing, empty or malformed."""


@runtime_checkable
class Corpus(Protocol):
    """A frozen dataclass that yields text. To add one, write one file in this folder.

    Both methods are functions of the corpus alone: every host and every later run gets the same answer.
    """

    def fingerprint(self, cache_dir: Path) -> str:
        """A hash of the content, found without preparing anything: it changes whenever a document would."""
        ...

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        """The documents of ``"train"`` or ``"validation"``, in a fixed order; the splits share none."""
        ...


@runtime_checkable
class ChatCorpus(Corpus, Protocol):
    """A corpus of conversations. ``documents`` are their texts without markers: what a tokenizer is trained on."""

    def conversations(self, split: str, *, cache_dir: Path) -> Iterator[Conversation]:
        """The conversations of a split, in a fixed order, each with an assistant's turn or of the role ``text``."""
        ...


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise CorpusError(f"A corpus has the splits {' and '.join(SPLITS)}; {split!r} is not one of them.")


def check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise CorpusError(f"validation_fraction must lie between 0 and 1; given {fraction}.")


def unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2.0**64


def assign(hashes: Sequence[float], *, fraction: float, what: str) -> list[str]:
    """The split of each document: validation where its hash lies below ``fraction``.

    Where chance leaves a split empty, the document with the smallest hash becomes the validation split, or
    the one with the largest the train split. Fewer than two documents is an error.
    """
    if len(hashes) < 2:
        raise CorpusError(
            f"{what} holds {len(hashes)} document{'s' * (len(hashes) != 1)}, and a train and a validation "
            "split need at least two: add text."
        )
    splits = ["validation" if value < fraction else "train" for value in hashes]
    if "validation" not in splits:
        splits[min(range(len(hashes)), key=hashes.__getitem__)] = "validation"
    if "train" not in splits:
        splits[max(range(len(hashes)), key=hashes.__getitem__)] = "train"
    return splits
