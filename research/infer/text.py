# SPDX-License-Identifier: Apache-2.0
"""Text out of token ids as they come: what may be shown so far, and where a stop string ends it."""

from collections.abc import Callable, Sequence

from research.infer.engine import Result

Decode = Callable[[Sequence[int]], str]
UNFINISHED = "\ufffd"  # what the beginning of a character decodes to


class Texts:
    """The text of sequences that end before the first of some strings. decode: ids to text, special ids to nothing."""

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self.decode, self.stops = decode, [stop for stop in stops if stop]

    def ended(self, result: Result) -> bool:
        """Whether a stop string is in the text: what ``Engine.run`` asks."""
        return bool(self.stops) and self._cut(self.decode(result.tokens)) is not None

    def text(self, result: Result) -> str:
        """All of it, without a stop string and what follows."""
        whole = self.decode(result.tokens)
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

    def _cut(self, text: str) -> int | None:
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        return min(found) if found else None
