# SPDX-License-Identifier: Apache-2.0
"""Conversations as batches for supervised fine-tuning: only what the assistant says is learned."""

import dataclasses
from pathlib import Path
from typing import Any

from research.data import chat_packing, packing
from research.data.cache import name_of
from research.data.chat import ChatTemplate
from research.data.chat_packing import ChatRows
from research.data.pipeline import DataError, DataInfo, PackedSource
from research.data.sources import ChatCorpus, as_chat, parts
from research.data.tokenizer_base import Tokenizer, TokenizerSpec

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ChatInfo(DataInfo):
    """What a run was trained on; documents are conversations, bytes those of their turns and of markers that are text.

    trained: targets with weight in an epoch. rows: those of an epoch. filled: the share of rows' targets that are of a
    conversation, the rest being padding. cut, lost: conversations longer than a row, that were cut at its end; those of
    which nothing trained was left, and that are in no row.
    """

    train_trained: int
    train_rows: int
    train_filled: float
    train_cut: int
    train_lost: int
    validation_trained: int
    validation_rows: int
    validation_filled: float
    validation_cut: int
    validation_lost: int


@dataclasses.dataclass(frozen=True)
class ChatSource(PackedSource):
    """Rows of whole conversations; the settings are those of ``PackedSource``, and the template that renders them.

    Each is a segment of its own, with positions from 0; a target has weight 1 where the assistant is to say it, its
    turn's end among them. In a mixture the weights are shares of rows. Where no conversation of a corpus has anything
    trained within a row, starting is a DataError.
    """

    corpus: ChatCorpus
    tokenizer: TokenizerSpec
    template: ChatTemplate
    batch_size: int
    sequence_length: int
    split: str = "train"
    shuffle: bool = True
    num_batches: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for part, _ in parts(self.corpus):
            as_chat(part)

    def _held(self, part: Any, *, tokenizer: Tokenizer, split: str, cache_dir: Path) -> ChatRows:
        tokens = chat_packing.tokenised(
            part, tokenizer=tokenizer, template=self.template, split=split, cache_dir=cache_dir
        )
        return ChatRows(tokens, sequence_length=self.sequence_length)

    def _rows(self, held: ChatRows, *, seed: int, pad_id: int) -> ChatRows:
        if not len(held):
            least = int(held.tokens.notes[:, 0].min())
            raise DataError(
                f"In no conversation of the {self.split} split does the assistant speak within {self.sequence_length} "
                f"tokens; in one it does after {least}: set sequence_length to more than that."
            )
        return held

    def _load(self, cache_dir: Path) -> tuple[Tokenizer, dict[str, list[ChatRows]], ChatInfo]:
        tokenizer, held, info = super()._load(cache_dir)
        more: dict[str, Any] = {}
        for split, found in held.items():
            rows = sum(map(len, found))
            more[f"{split}_rows"] = rows
            more[f"{split}_filled"] = sum(part.filled * len(part) for part in found) / max(1, rows)
            for name in ("trained", "cut", "lost"):
                more[f"{split}_{name}"] = sum(getattr(part, name) for part in found)
        return tokenizer, held, ChatInfo(**dataclasses.asdict(info), **more)

    def _packing(self) -> dict[str, str]:
        settings = self.sequence_length, self.split, self.shuffle, self.num_batches
        return {
            "template": name_of(dataclasses.astuple(self.template)),
            "packing": name_of("chat", FORMAT, packing.FORMAT, chat_packing.FORMAT, *settings),
        }
