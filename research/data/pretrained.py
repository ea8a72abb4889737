# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that came with a model: a folder with Hugging Face's tokenizer.json, or with a SentencePiece model.

They encode and decode as their own library does. Text that looks like a special token is text here too.
"""

import base64
import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from research.data.sentence_piece import SPACE_MARK
from research.data.tokenizer_base import Tokenizer, TokenizerError, utf8

JSON, SENTENCE_PIECE = "tokenizer.json", "tokenizer.model"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
FILES = (JSON, SENTENCE_PIECE, *SETTINGS[:3], "added_tokens.json", "chat_template.jinja")
FOLDER = "tokenizer"  # where an import has them


class PretrainedTokenizer(Tokenizer):
    """``model`` is a record of the file, what it is, and the special ids.

    prefix: the ids that a text begins with, often one, or none (Qwen, GPT-2). eos_ids: those that end a text; eos_id is
    the first. Where a library puts a space before a text, the bytes of its first token count that space.
    """

    kind = "pretrained"

    @functools.cached_property
    def _record(self) -> dict[str, Any]:
        return json.loads(self.model)

    @functools.cached_property
    def _library(self) -> "_Json | _SentencePiece":
        return _LIBRARIES[self._record["file"]](base64.b64decode(self._record["content"]))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return tuple(self._record["eos"])

    @property
    def eos_id(self) -> int:
        return self.eos_ids[0]

    @property
    def bos_id(self) -> int:
        """The id that begins a text, or where there is none the one that ends it."""
        return self._record["bos"] if self._record["bos"] is not None else self.eos_id

    @property
    def pad_id(self) -> int:
        return self._record["pad"]

    @property
    def prefix(self) -> tuple[int, ...]:
        return tuple(self._record["prefix"])

    @functools.cached_property
    def specials(self) -> Mapping[str, int]:
        return self._library.specials()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        return [np.array(ids, np.int32) for ids in self._library.encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        return self._library.decode([int(i) for i in ids if self.pieces[int(i)]])


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The tokenizer of a model's folder, or of an import's: nothing to train."""

    path: str
    sample_limit: ClassVar[int] = 0

    @property
    def size(self) -> int | None:
        return None

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return read(Path(self.path))


def place(folder: Path) -> Path | None:
    """Where a model's folder has its tokenizer, if it has one: in it, or in its own folder for that."""
    for place in (folder, folder / FOLDER):
        if any((place / name).exists() for name in (JSON, SENTENCE_PIECE)):
            return place
    return None


def read(folder: Path) -> PretrainedTokenizer:
    """Raises TokenizerError where a folder has no tokenizer that can be read."""
    found = place(folder)
    if found is None:
        raise TokenizerError(
            f"{folder} has no tokenizer: give a folder with {JSON} or {SENTENCE_PIECE}; a relative path begins where "
            "the command is given."
        )
    folder = found
    name = next(name for name in (JSON, SENTENCE_PIECE) if (folder / name).exists())
    content, settings = (folder / name).read_bytes(), _settings(folder)
    try:
        library = _LIBRARIES[name](content)
    except ImportError as error:
        raise TokenizerError(
            f"{folder / name} needs the library tokenizers: pip install -c constraints.txt -e '.[hf]'."
        ) from error
    except Exception as error:  # each library has its own
        raise TokenizerError(f"{folder / name} is no tokenizer that can be read ({error}): fetch it again.") from error
    ids = {name: _ids(settings, name, library) for name in ("bos", "eos", "pad")}
    eos = ids["eos"] or (library.default("eos") or 0,)
    record = {
        "file": name,
        "content": base64.b64encode(content).decode(),
        "bos": next(iter(ids["bos"]), library.default("bos")),
        "prefix": library.prefix(settings.get("add_bos_token"), ids["bos"] or (library.default("bos"),)),
        "eos": eos,
        "pad": (ids["pad"] or eos)[0],
    }
    return PretrainedTokenizer(library.pieces(), model=json.dumps(record).encode())


def _settings(folder: Path) -> dict[str, Any]:
    """What the folder's files say of special tokens; of ids that end a text, what generation goes by."""
    found: dict[str, Any] = {}
    for name in reversed(SETTINGS):
        if not (folder / name).exists():
            continue
        try:
            values = json.loads((folder / name).read_text())
            if not isinstance(values, dict):
                raise ValueError("its settings have no names")
        except ValueError as error:
            raise TokenizerError(f"{folder / name} is not JSON of settings ({error}): fetch it again.") from error
        keys = [f"{kind}_token{end}" for kind in ("bos", "eos", "pad") for end in ("", "_id")] + ["add_bos_token"]
        found.update({key: values[key] for key in keys if values.get(key) is not None})
    return found


def _ids(settings: Mapping[str, Any], kind: str, library: "_Json | _SentencePiece") -> tuple[int, ...]:
    numbers, token = settings.get(f"{kind}_token_id"), settings.get(f"{kind}_token")
    given = [] if numbers is None else [numbers] if isinstance(numbers, int) else list(numbers)
    text = token["content"] if isinstance(token, Mapping) else token
    named = library.id_of(text) if text is not None else None
    if named is not None and (kind != "eos" or not given):
        given = [named]
    elif named is not None:  # what the tokenizer itself calls the end comes first
        given = [named, *(i for i in given if i != named)]
    return tuple(int(i) for i in given)


class _Json:
    """The library ``tokenizers``."""

    def __init__(self, content: bytes) -> None:
        from tokenizers import Tokenizer as Library

        self.library, self.record = Library.from_str(content.decode()), json.loads(content)
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self.library.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self.library.token_to_id(token)

    def default(self, kind: str) -> int | None:
        names = {"bos": ("<s>", "<bos>"), "eos": ("</s>", "<eos>", "<|endoftext|>")}[kind]
        return next((i for i in map(self.id_of, names) if i is not None), None)

    def prefix(self, asked: bool | None, bos: Sequence[int | None]) -> list[int | None]:
        """What the library itself puts first, unless the settings say."""
        if asked is not None:
            return list(bos[:1]) if asked else []
        whole, plain = (self.library.encode("a", add_special_tokens=add).ids for add in (True, False))
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:at]

    def specials(self) -> dict[str, int]:
        return {one["content"]: one["id"] for one in self.record.get("added_tokens", ())}

    def pieces(self) -> list[bytes]:
        special = {added["id"] for added in self.record.get("added_tokens", ()) if added.get("special")}
        added = {one["id"]: one["content"] for one in self.record.get("added_tokens", ())}
        by_id = {i: token for token, i in self.library.get_vocab(with_added_tokens=True).items()}
        to_bytes = _byte_level if "ByteLevel" in json.dumps(
            [self.record.get("pre_tokenizer"), self.record.get("decoder")]
        ) else _marked  # fmt: skip
        found = []
        for i in range(max(by_id) + 1):
            token = by_id.get(i, "")
            found.append(b"" if i in special else token.encode() if i in added else to_bytes(token))
        return found


class _SentencePiece:
    """The library ``sentencepiece``."""

    def __init__(self, content: bytes) -> None:
        import sentencepiece

        self.library = sentencepiece.SentencePieceProcessor(model_proto=content)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.library.encode(texts)

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids)

    def id_of(self, token: str) -> int | None:
        found = self.library.piece_to_id(token)
        return found if self.library.id_to_piece(found) == token else None

    def default(self, kind: str) -> int | None:
        found = getattr(self.library, f"{kind}_id")()
        return found if found >= 0 else None

    def prefix(self, asked: bool | None, bos: Sequence[int | None]) -> list[int | None]:
        return [] if asked is False or self.library.bos_id() < 0 else list(bos[:1])

    def specials(self) -> dict[str, int]:
        library = self.library
        return {library.id_to_piece(i): i for i in range(library.vocab_size()) if library.is_control(i)}

    def pieces(self) -> list[bytes]:
        library = self.library
        ids = range(library.vocab_size())
        return [b"" if library.is_control(i) or library.is_unknown(i) else _marked(library.id_to_piece(i)) for i in ids]


_LIBRARIES: dict[str, Any] = {JSON: _Json, SENTENCE_PIECE: _SentencePiece}


def _marked(token: str) -> bytes:
    """The bytes of a token in which a mark stands for a space, or of one that names a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE_MARK, " ").encode()


@functools.cache
def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE (Radford et al. 2019): printable ones for themselves, the
    others from 256 on, in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    alphabet = _alphabet()
    return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()
