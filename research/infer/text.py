# SPDX-License-Identifier: Apache-2.0
"""Text out of token ids as they come: what may be shown so far, and where a stop string ends it."""

from collections.abc import Callable, Sequence

import numpy as np

from research.infer.engine import Result

Decode = Callable[[Sequence[int]], str]
UNFINISHED = "\ufffd"  # what the beginning of a character decodes to
CONTEXT = 8  # tokens of a prompt that may change what the next one is


class Texts:
    """The text of sequences that end before the first of some strings.

    decode: ids to text, special ids to nothing. prompts: those of the requests, for what a token is in the middle of a
    text (SentencePiece's decoders drop a space at the beginning); without them sequences are decoded by themselves.
    """

    def __init__(
        self, decode: Decode, stops: Sequence[str] = (), prompts: Sequence[Sequence[int] | np.ndarray] = ()
    ) -> None:
        self.decode, self.stops = decode, [stop for stop in stops if stop]
        ends = ([int(token) for token in prompt[-CONTEXT:]] for prompt in prompts)
        self.before = [(end, decode(end).rstrip(UNFINISHED)) for end in ends]

    def ended(self, result: Result) -> bool:
        """Whether a stop string is in the text: what ``Engine.run`` asks."""
        return bool(self.stops) and self._cut(self._added(result)) is not None

    def text(self, result: Result) -> str:
        """All of it, without a stop string and what follows."""
        whole = self._added(result)
        return whole[: self._cut(whole)]

    def shown(self, result: Result) -> str:
        """What more tokens cannot change: of a sequence that goes on, not the beginning of a character or of a stop
        string."""
        whole = self.text(result)
        if result.finish is not None:
            return whole
        whole = whole.rstrip(UNFINISHED)
        held = max((n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n])), default=0)
        return whole[: len(whole) - held]

    def _added(self, result: Result) -> str:
        """What a sequence adds to its prompt."""
        before, known = self.before[result.request] if self.before else ([], "")
        whole = self.decode([*before, *result.tokens])
        return whole[len(known) :] if whole.startswith(known) else self.decode(result.tokens)

    def _cut(self, text: str) -> int | None:
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        return min(found) if found else None
