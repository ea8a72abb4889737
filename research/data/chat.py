# SPDX-License-Identifier: Apache-2.0
"""Conversations as token ids: a ``ChatTemplate`` says which turns stand where, and which tokens the assistant learns.

Markers and what people write are encoded apart, so that no token spans the two: what a model is asked with
(``prompt``) is the beginning of what it was trained on (``encode``), token for token.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from research.core.types import UserError
from research.data.tokenizer_base import Tokenizer

ROLES = ("system", "user", "assistant")
TEXT = "text"  # the role of ordinary text: bare, and all of it is trained


class ChatError(UserError):
    """A conversation that a template cannot say, or a template that a tokenizer cannot."""


class Message(NamedTuple):
    """role: ``system``, ``user`` or ``assistant``; or ``text``, alone, for a text that is no conversation."""

    role: str
    content: str


Conversation = tuple[Message, ...]
Part = tuple[np.ndarray | str, bool]


class Encoded(NamedTuple):
    """ids: [T] int32. trained: [T] bool, true for the tokens that the assistant is to say."""

    ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class ChatTemplate:
    """How turns are told apart.

    system, user, assistant: what stands before a turn of each role, in pieces. A piece that the tokenizer has as a
        special token is that token's id, any other is text. ``system=None``: there are no system turns. Turns without
        markers can be told apart only where user and assistant take turns.
    between: pieces that stand between two turns.
    end: the special token that ends every turn. "": an assistant's turn ends with the tokenizer's EOS, another one
        with its content.

    What a message says is always text: it never becomes a special token that is a marker, or begins or ends a text.
    Markers that are themselves text a user can write; what ends a turn nobody can.
    """

    system: tuple[str, ...] | None = None
    user: tuple[str, ...] = ()
    assistant: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    end: str = ""

    def __post_init__(self) -> None:
        for name in (*ROLES, "between"):
            pieces = getattr(self, name)
            if pieces is None and name == "system":
                continue
            if not isinstance(pieces, tuple | list) or not all(isinstance(p, str) and p for p in pieces):
                raise ChatError(
                    f"A template's {name} is a tuple of pieces, none of them empty; given {pieces!r}: write "
                    "('<|im_start|>', 'user\\n'), or () for no marker."
                )
            object.__setattr__(self, name, tuple(pieces))

    def prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
        """[T] int32: the messages, up to where the assistant goes on; the tokenizer's prefix (BOS) first."""
        self.check((*messages, Message("assistant", "")))
        bound = _bound(self, tokenizer)
        parts = bound.parts(messages) + [bound.between] * bool(messages) + [bound.markers["assistant"]]
        return bound.encoded([parts])[0].ids

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
        """A whole conversation. Trained are the assistant's tokens and the one that ends each of its turns.

        Raises ChatError for a conversation in which the assistant says nothing, or that the template cannot say.
        """
        return self.encode_batch(tokenizer, [messages])[0]

    def encode_batch(self, tokenizer: Tokenizer, conversations: Iterable[Sequence[Message]]) -> list[Encoded]:
        """``encode`` of each conversation; several cores where the tokenizer has them."""
        bound, found = _bound(self, tokenizer), []
        for messages in conversations:
            self.check(messages)
            if not any(message.role in ("assistant", TEXT) for message in messages):
                raise ChatError(
                    f"A conversation of {len(messages)} messages has no assistant's turn, so that there is nothing to "
                    "learn from it: add one, or leave the conversation out."
                )
            found.append(bound.parts(messages))
        return bound.encoded(found)

    def stop(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an assistant's turn: first the one that is trained, then others that end a text.

        Raises ChatError where the tokenizer has none that can be told from text.
        """
        ends = _ends(tokenizer)
        if self.end:
            marker = tokenizer.special_id(self.end)
            if marker is None:
                raise ChatError(
                    f"The template ends turns with {self.end!r}, which is no special token of this tokenizer, so that "
                    "where an answer stops cannot be told: use a tokenizer that has it, or PLAIN or TAGGED."
                )
            ends = [marker, *(i for i in ends if i != marker)]
        if not ends:
            raise ChatError(
                f"The tokenizer ends a text with the id {tokenizer.eos_id}, which is ordinary text, so that where an "
                "answer stops cannot be told: name its eos_token in tokenizer_config.json."
            )
        return tuple(ends)

    def check(self, messages: Sequence[Message]) -> None:
        """Raises ChatError for roles that are unknown, or that stand where the template cannot say them."""
        before = None
        for number, (role, content) in enumerate(messages, start=1):
            where = f"Message {number} of a conversation"
            if role not in (*ROLES, TEXT):
                raise ChatError(f"{where} is of the role {role!r}; roles are {', '.join(ROLES)} and {TEXT}.")
            if not isinstance(content, str):
                raise ChatError(f"{where} holds a {type(content).__name__}, not text: give its content as text.")
            if role == TEXT and len(messages) > 1:
                raise ChatError(
                    f"{where} is of the role {TEXT}, which stands alone: let it be a conversation of its own."
                )
            if role == "system" and self.system is None:
                raise ChatError(
                    f"{where} is of the role system, which this template has not: put it before the user's words, or "
                    "use TAGGED, CHATML or LLAMA3."
                )
            alternate = {"user": (None, "assistant"), "assistant": ("user",)}
            if role in alternate and not getattr(self, role) and before not in alternate[role]:
                after = f"follows the {before}'s" if before else "is the first"
                raise ChatError(
                    f"{where} is the {role}'s and {after}, which cannot be told without markers: let user and "
                    "assistant take turns, or use TAGGED, CHATML or LLAMA3."
                )
            before = role


class _Bound:
    """A template with its markers as a tokenizer's ids. A part of a conversation is (ids or a text, is it trained)."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop, self.ended = template.stop(tokenizer)[0], bool(template.end)
        self.eos = (*_ends(tokenizer), self.stop)[0]
        markers = {role: getattr(template, role) or () for role in ROLES}
        used = {piece for pieces in (*markers.values(), template.between) for piece in pieces if piece.strip()}
        never = {*tokenizer.eos_ids, *tokenizer.prefix, self.stop}
        # What no message may become. Other tokens that were added to a vocabulary (<think>, two newlines) are text.
        self.reserved = {text: i for text, i in tokenizer.specials.items() if text in used or i in never}
        self.markers = {role: self._marker(pieces) for role, pieces in markers.items()}
        self.between = self._marker(template.between)

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """All of a conversation, up to the end of its last turn."""
        found: list[Part] = [(_ids(self.tokenizer.prefix), False)]
        for number, (role, content) in enumerate(messages):
            if role == TEXT:
                return [*found, (content, True), (_ids([self.eos]), True)]
            said = role == "assistant"
            found += [self.between] * bool(number) + [self.markers[role], (content, said)]
            found += [(_ids([self.stop]), said)] * (said or self.ended)
        return found

    def encoded(self, conversations: Sequence[Sequence[Part]]) -> list[Encoded]:
        """All texts of all conversations at once: tokenizers have several cores for that."""
        parts = [part for conversation in conversations for part in conversation]
        texts = list(dict.fromkeys(part for part, _ in parts if isinstance(part, str)))
        ids_of = dict(zip(texts, self._texts(texts), strict=True))
        found = []
        for conversation in conversations:
            ids = [ids_of[part] if isinstance(part, str) else part for part, _ in conversation]
            trained = [np.full(len(some), said) for some, (_, said) in zip(ids, conversation, strict=True)]
            found.append(Encoded(np.concatenate(ids), np.concatenate(trained)))
        return found

    def _marker(self, pieces: Sequence[str]) -> Part:
        ids = [self.tokenizer.special_id(piece) for piece in pieces]
        found = [self.tokenizer.encode(p) if i is None else _ids([i]) for p, i in zip(pieces, ids, strict=True)]
        return np.concatenate([_ids(()), *found]), False

    def _texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        found, reserved = self.tokenizer.encode_batch(texts), np.array(list(self.reserved.values()), np.int32)
        if len(reserved) and texts and np.isin(np.concatenate(found), reserved).any():
            found = [self._cut(t) if np.isin(x, reserved).any() else x for t, x in zip(texts, found, strict=True)]
            if np.isin(np.concatenate(found), reserved).any():
                raise ChatError(
                    "This tokenizer makes special tokens of ordinary text, so that a message could end a turn: use "
                    "another tokenizer."
                )
        return found

    def _cut(self, text: str) -> np.ndarray:
        """A text in which the tokenizer finds special tokens, cut within each: some libraries look for them always."""
        starts = re.finditer("|".join(f"(?={re.escape(special)})" for special in self.reserved), text)
        cuts = [0, *sorted({start.start() + 1 for start in starts}), len(text)]
        pieces = [text[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True) if a < b]
        return np.concatenate(self.tokenizer.encode_batch(pieces))


@functools.lru_cache(maxsize=8)
def _bound(template: ChatTemplate, tokenizer: Tokenizer) -> _Bound:
    """Kept, as a prompt is asked for thousands of times."""
    return _Bound(template, tokenizer)


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)


def _ends(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text and that no text is encoded as."""
    specials = set(tokenizer.specials.values())
    return [i for i in tokenizer.eos_ids if i in specials or not tokenizer.pieces[i]]


# The user's words, then the assistant's, ended by EOS: for small tasks, such as "17+5-8=" -> "17+5=22;22-8=14#14".
PLAIN = ChatTemplate()
# Markers as text, for any tokenizer; an assistant's turn ends with EOS (Wang et al. 2023, Tulu).
TAGGED = ChatTemplate(
    system=("<|system|>", "\n"), user=("<|user|>", "\n"), assistant=("<|assistant|>", "\n"), between=("\n",)
)
# ChatML, as Qwen's models have it; without a system turn of its own accord.
CHATML = ChatTemplate(
    system=("<|im_start|>", "system\n"),
    user=("<|im_start|>", "user\n"),
    assistant=("<|im_start|>", "assistant\n"),
    between=("\n",),
    end="<|im_end|>",
)
# Llama 3's; its <|begin_of_text|> is its tokenizer's prefix. Nothing is stripped from what messages say.
LLAMA3 = ChatTemplate(
    system=("<|start_header_id|>", "system", "<|end_header_id|>", "\n\n"),
    user=("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"),
    assistant=("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"),
    end="<|eot_id|>",
)
