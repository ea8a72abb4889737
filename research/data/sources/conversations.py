# SPDX-License-Identifier: Apache-2.0
"""Conversations: a file with one a line, and ordinary text among them."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from research.data.cache import files_hash, name_of
from research.data.chat import ROLES, TEXT, Conversation, Message
from research.data.sources.base import Corpus, CorpusError, assign, check_fraction, check_split, unit_hash
from research.data.sources.jsonl import file_at, lines, text_of, value_of

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Conversations:
    """A conversation a line of JSON: a list of messages with ``role`` and ``content``, or a prompt with its response.

    messages_field: the field with the messages; passed over where the two below are given.
    prompt_field, response_field: the fields of a prompt and a response, such as ``question`` and ``answer``.
    system: what a system turn before each conversation says; "" for none.
    validation_path: a file with the validation split; the first is then all for training. "": the validation split is
        ``validation_fraction`` of the file, by a hash of what the user says before the assistant's first turn, so that
        equal questions fall on the same side.

    Blank lines, and conversations in which all that the assistant says is empty, are passed over; any other line that
    is no conversation is an error that names it.
    """

    path: str
    messages_field: str = "messages"
    prompt_field: str = ""
    response_field: str = ""
    system: str = ""
    validation_path: str = ""
    validation_fraction: float = 0.05

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)
        if bool(self.prompt_field) != bool(self.response_field):
            raise CorpusError(
                f"prompt_field and response_field go together; given {self.prompt_field!r} and "
                f"{self.response_field!r}: set both, or neither to read messages."
            )

    def fingerprint(self, cache_dir: Path) -> str:
        paths = [self.path, self.validation_path] if self.validation_path else [self.path]
        content = [files_hash([("data", file_at(path))], cache_dir=cache_dir)[0] for path in paths]
        fields = [self.prompt_field, self.response_field] if self.prompt_field else [self.messages_field]
        split = [] if self.validation_path else [self.validation_fraction]
        return name_of("conversations", FORMAT, fields, self.system, split, content)

    def conversations(self, split: str, *, cache_dir: Path) -> Iterator[Conversation]:
        check_split(split)
        if self.validation_path:
            return self._read(self.path if split == "train" else self.validation_path)
        hashes = [unit_hash(_question(conversation)) for conversation in self._read(self.path)]
        splits = assign(hashes, fraction=self.validation_fraction, what=f"The file {self.path}")
        return (found for found, chosen in zip(self._read(self.path), splits, strict=True) if chosen == split)

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        return texts(self.conversations(split, cache_dir=cache_dir))

    def _read(self, path: str) -> Iterator[Conversation]:
        first = (Message("system", self.system),) if self.system else ()
        for where, record in lines(path):
            found = self._pair(record, where) if self.prompt_field else self._messages(record, where)
            if any(content for role, content in found if role == "assistant"):
                yield (*first, *found)

    def _pair(self, record: Mapping[str, Any], where: str) -> Conversation:
        return (
            Message("user", text_of(record, self.prompt_field, where=where, setting="prompt_field")),
            Message("assistant", text_of(record, self.response_field, where=where, setting="response_field")),
        )

    def _messages(self, record: Mapping[str, Any], where: str) -> Conversation:
        listed = value_of(
            record, self.messages_field, where=where, setting="messages_field, or prompt_field and response_field"
        )
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise CorpusError(
                f"{where} has in {self.messages_field!r} no list of messages: write "
                '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
            )
        found = []
        for number, one in enumerate(listed, start=1):
            here = f"Message {number} of line {where.removeprefix('Line ')}"
            role, content = (
                text_of(one, name, where=here, setting="the message's role and content") for name in ("role", "content")
            )
            if role not in ROLES:
                raise CorpusError(f"{here} is of the role {role!r}; roles are {', '.join(ROLES)}: mend that line.")
            found.append(Message(role, content))
        if not any(message.role == "assistant" for message in found):
            raise CorpusError(f"{where} has no assistant's message, so that there is nothing to learn: remove it.")
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class PlainText:
    """A corpus of text among conversations: each document is one, of the role ``text``, and all of it is trained."""

    corpus: Corpus

    def fingerprint(self, cache_dir: Path) -> str:
        return name_of("plain_text", FORMAT, self.corpus.fingerprint(cache_dir))

    def conversations(self, split: str, *, cache_dir: Path) -> Iterator[Conversation]:
        return ((Message(TEXT, text),) for text in self.documents(split, cache_dir=cache_dir) if text)

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        return self.corpus.documents(split, cache_dir=cache_dir)


def texts(conversations: Iterator[Conversation]) -> Iterator[str]:
    """What each conversation says, a line a message."""
    return ("\n".join(content for _, content in conversation) for conversation in conversations)


def _question(conversation: Conversation) -> str:
    """What is said before the assistant's first turn, system turns apart; where there is nothing, all that is said."""
    first = [role for role, _ in conversation].index("assistant")
    asked = [content for role, content in conversation[:first] if role != "system"]
    return "\n".join(asked or [content for _, content in conversation])
