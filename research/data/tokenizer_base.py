# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer is: pieces of bytes by id, and the interface of the settings that train one."""

import abc
import base64
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from research.core.types import UserError

FORMAT = 1
SPECIALS = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = 0, 1, 2


class TokenizerError(UserError):
    """A tokenizer that cannot be trained, or text or ids that it cannot take."""


class Tokenizer(abc.ABC):
    """Text to ids and back. Its behaviour is all in ``pieces`` and, for some kinds, ``model``.

    pieces: the UTF-8 bytes that each id stands for; empty for the special ids.
    """

    kind: ClassVar[str] = ""
    pad_id, bos_id, eos_id = PAD, BOS, EOS

    def __init__(self, pieces: Sequence[bytes], *, model: bytes = b"") -> None:
        self.pieces = tuple(pieces)
        self.model = model
        self.token_bytes = np.array([len(piece) for piece in self.pieces], np.int32)

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids that a text begins with."""
        return (self.bos_id,)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return (self.eos_id,)

    @property
    def specials(self) -> Mapping[str, int]:
        """The special tokens that have a text, such as ``<|im_start|>``: their ids."""
        return {}

    def special_id(self, text: str) -> int | None:
        """The id of a special token by its text; None where there is none. ``encode`` never gives it for that text,
        but for tokens that the tokenizer's library looks for in any text."""
        return self.specials.get(text)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides what the tokenizer does."""
        digest = hashlib.sha256(f"{self.kind} {FORMAT} ".encode())
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(4, "big") + piece)
        digest.update(self.model)
        return digest.hexdigest()[:24]

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids [tokens] int32 of a text, without special ids; whatever stands in the text is text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of each text; several cores where that helps."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids give nothing, bytes that are not UTF-8 U+FFFD."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self.pieces):
                raise TokenizerError(
                    f"The id {i} is not in the vocabulary: a tokenizer of {len(self.pieces)} has the ids 0 "
                    f"to {len(self.pieces) - 1}."
                )
        return b"".join([self.pieces[i] for i in ids]).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Writes ``tokenizer.json`` into an existing folder."""
        record = {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "pieces": [base64.b64encode(piece).decode() for piece in self.pieces],
            "model": base64.b64encode(self.model).decode(),
        }
        (Path(folder) / "tokenizer.json").write_text(json.dumps(record))


def utf8(text: str) -> bytes:
    """The text as UTF-8. Raises TokenizerError for half of a surrogate pair, which has no such form."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text has half of a surrogate pair at character {error.start}, which is not text: clean it."
        ) from error


@runtime_checkable
class TokenizerSpec(Protocol):
    """A frozen dataclass that trains a tokenizer on texts."""

    @property
    def size(self) -> int | None:
        """The vocabulary size where it is known before training, else None."""
        ...

    @property
    def sample_limit(self) -> int | None:
        """About how many bytes of text training looks at: 0 for none, None for all."""
        ...

    def train(self, texts: Iterable[str]) -> Tokenizer: ...
