# SPDX-License-Identifier: Apache-2.0
"""Whether a response has the form that was asked for, such as thoughts and then an answer, each in its tags."""

import functools
import re
from dataclasses import dataclass

from research.core.types import UserError
from research.evals.tasks.base import Problem, Response

ANY, SPACE = "...", " "


@dataclass(frozen=True)
class Format:
    """1 where a response is like the template from its first letter to its last, but for space at its ends.

    template: ``...`` stands for any text, a space for any space or none, all else for itself, exactly once in the
    response: it is not a regular expression, so that no text takes more than one pass for each part. The default is
    that of DeepSeek-R1 (arXiv 2501.12948, table 1).
    """

    template: str = "<think>...</think> <answer>...</answer>"

    def __post_init__(self) -> None:
        parts = [part for part in _parts(self.template) if part not in (ANY, SPACE)]
        inside = [a for i, a in enumerate(parts) for j, b in enumerate(parts) if i != j and a in b]
        if not parts or inside:
            what = f"{inside[0]!r} stands in it more than once" if inside else "it has no letters of its own"
            raise UserError(
                f"The template {self.template!r} names no form that can be checked ({what}): give parts that differ, "
                "with ... where any text may stand, as in <think>...</think> <answer>...</answer>."
            )

    def score(self, problem: Problem, response: Response) -> float:
        text, at, gap = response.text.strip(), 0, ""
        for part in _parts(self.template):
            if part in (ANY, SPACE):
                gap = ANY if ANY in (gap, part) else SPACE
                continue
            found = text.find(part)
            if text.count(part) != 1 or found < at or not _fits(gap, text[at:found]):
                return 0.0
            at, gap = found + len(part), ""
        return float(_fits(gap, text[at:]))


@functools.cache
def _parts(template: str) -> tuple[str, ...]:
    found = re.split(r"(\.\.\.|\s+)", template.strip())
    return tuple(SPACE if part.isspace() else part for part in found if part)


def _fits(gap: str, text: str) -> bool:
    return gap == ANY or not (text.strip() if gap == SPACE else text)
