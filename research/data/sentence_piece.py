# SPDX-License-Identifier: Apache-2.0
"""SentencePiece vocabularies (BPE or unigram) with byte fallback, made lossless for every text.

The library is imported only to train or to encode: decoding and counting bytes need the pieces alone.
"""

import dataclasses
import functools
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from research.data.tokenizer_base import BOS, EOS, PAD, Tokenizer, TokenizerError, utf8

UNK = 3
# SentencePiece writes a space as this character inside pieces, so a literal one would come back as a space.
SPACE_MARK = "\u2581"
# Its trainer skips lines that hold these (its own markers); encoding takes them.
UNTRAINABLE = re.compile("[\u2581\u2585\0]")
MAX_LINE = 2000
THREADS = 4  # fixed: the unigram trainer's sums, hence its vocabulary, depend on the number
SMALLEST = 4 + 256 + 2


class SentencePieceTokenizer(Tokenizer):
    """``model`` is the serialised SentencePiece model; ``pieces`` are the bytes of its ids."""

    kind = "sentencepiece"

    @functools.cached_property
    def _processor(self) -> Any:
        return _load(self.model)

    @functools.cached_property
    def _byte_ids(self) -> np.ndarray:
        ids = {self._processor.piece_to_id(f"<0x{value:02X}>"): value for value in range(256)}
        return np.array(sorted(ids, key=ids.__getitem__), np.int32)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The pieces that begin, end and pad a text and that stand for what is unknown, by kind."""
        ids = {kind: getattr(self._processor, f"{kind}_id")() for kind in ("bos", "eos", "pad", "unk")}
        return {kind: self._processor.id_to_piece(i) for kind, i in ids.items() if i >= 0}

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        sizes = [len(utf8(text)) for text in texts]
        plain = [i for i, text in enumerate(texts) if SPACE_MARK not in text]
        encoded: list[Any] = [None] * len(texts)
        threads = min(os.cpu_count() or 1, 16)
        for i, ids in zip(plain, self._processor.encode([texts[i] for i in plain], num_threads=threads), strict=True):
            encoded[i] = np.array(ids, np.int32)
        for i, text in enumerate(texts):
            if encoded[i] is None:
                encoded[i] = self._around_marks(text)
            if int(self.token_bytes[encoded[i]].sum()) != sizes[i]:
                encoded[i] = self._bytes(text)  # a text the library does not keep: its bytes always are kept
        return encoded

    def _around_marks(self, text: str) -> np.ndarray:
        """Encodes the stretches between literal space marks, and the marks as their three bytes."""
        mark = self._bytes(SPACE_MARK)
        found = []
        for ids in self._processor.encode(text.split(SPACE_MARK)):
            found += [np.array(ids, np.int32), mark]
        return np.concatenate(found[:-1])

    def _bytes(self, text: str) -> np.ndarray:
        return self._byte_ids[np.frombuffer(text.encode(), np.uint8)]


def _load(model: bytes) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)


@dataclasses.dataclass(frozen=True)
class SentencePiece:
    """A vocabulary of exactly ``vocab_size`` ids: 4 specials, the 256 bytes, the newline and learned pieces.

    Text is taken as is: no normalisation, no added or removed space; runs of spaces are learned like words.

    kind: ``"bpe"`` (Sennrich et al. 2016) or ``"unigram"`` (Kudo 2018; slower to train).
    character_coverage: share of the characters seen that become pieces; the rest are left to the bytes.
    sample_bytes: train on about this much text, lines picked by a fixed seed.
    """

    vocab_size: int
    kind: Literal["bpe", "unigram"] = "bpe"
    character_coverage: float = 0.9995
    sample_bytes: int = 2_000_000

    def __post_init__(self) -> None:
        if self.kind not in ("bpe", "unigram"):
            raise TokenizerError(f"A SentencePiece vocabulary is of the kind 'bpe' or 'unigram'; given {self.kind!r}.")
        if self.vocab_size < SMALLEST:
            raise TokenizerError(
                f"A SentencePiece vocabulary needs at least {SMALLEST} ids (specials and bytes: 260); given "
                f"vocab_size={self.vocab_size}: choose more, or use Bytes."
            )
        if not 0.98 <= self.character_coverage <= 1 or self.sample_bytes < 1000:
            raise TokenizerError(
                f"character_coverage must lie in 0.98 to 1 and sample_bytes be at least 1000; given "
                f"{self.character_coverage} and {self.sample_bytes}."
            )

    @property
    def size(self) -> int:
        return self.vocab_size

    @property
    def sample_limit(self) -> int:
        return self.sample_bytes

    def train(self, texts: Iterable[str]) -> SentencePieceTokenizer:
        model = self._train(texts)
        processor = _load(model)
        pieces = [_piece_bytes(processor, i) for i in range(processor.vocab_size())]
        return SentencePieceTokenizer(pieces, model=model)

    def _train(self, texts: Iterable[str]) -> bytes:
        import sentencepiece

        writer = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=training_lines(texts),
                model_writer=writer,
                model_type=self.kind,
                vocab_size=self.vocab_size,
                character_coverage=self.character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n"],
                pad_id=PAD,
                bos_id=BOS,
                eos_id=EOS,
                unk_id=UNK,
                num_threads=THREADS,
                minloglevel=4,
            )
        except RuntimeError as error:
            raise TokenizerError(self._explain(str(error))) from error
        return writer.getvalue()

    def _explain(self, message: str) -> str:
        most = re.search(r"too high.*<= *(\d+)", message)
        least = re.search(r"required_chars\. *\d+ vs (\d+)", message)
        if most and int(most[1]) >= SMALLEST:
            return (
                f"The text is too small for a {self.kind} vocabulary of {self.vocab_size}: set vocab_size to "
                f"{most[1]} or less, or add text."
            )
        if least:
            return (
                f"A vocabulary of {self.vocab_size} cannot hold the text's characters: set vocab_size to "
                f"{least[1]} or more, or lower character_coverage."
            )
        if most or "sentences_.empty()" in message:
            return "The train split holds too little text for a SentencePiece vocabulary: add text or use Bytes."
        return f"SentencePiece could not train this vocabulary ({message}): change its settings, or use Bytes."


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines as the trainer takes them: it ends a sentence at a newline and drops over-long ones."""
    for text in texts:
        for line in text.split("\n"):
            for stretch in UNTRAINABLE.split(line):
                for start in range(0, len(stretch), MAX_LINE):
                    yield stretch[start : start + MAX_LINE]


def _piece_bytes(processor: Any, i: int) -> bytes:
    if processor.is_control(i) or processor.is_unknown(i):
        return b""
    piece = processor.id_to_piece(i)
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(i) else piece.replace(SPACE_MARK, " ").encode()
