# SPDX-License-Identifier: Apache-2.0
"""Equality of formulas by math-verify. Only worker processes import this (``research.rl.rewards.symbolic``)."""

import logging
import re
import unicodedata

from math_verify import parse, verify

logging.disable(logging.CRITICAL)  # it warns that nobody else keeps the time: we do
RAISED = re.compile("[⁰¹²³⁴-⁹]+")
MATHS = ("$", "\\(", "\\[", "\\boxed")


def equal(reference: str, answer: str, whole: bool) -> bool:
    """Whether two answers are the same by mathematics. whole: ``answer`` is a text in which one has to be found."""
    gold, given = _parsed(_as_formula(reference)), _parsed(answer if whole else _as_formula(answer))
    return bool(verify(gold, given, timeout_seconds=None))


def _as_formula(text: str) -> str:
    return text if any(mark in text for mark in MATHS) else f"${text}$"


def _parsed(text: str) -> list:
    text = RAISED.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)  # 5² would be read as 5
    return parse(text, parsing_timeout=None)  # type: ignore[arg-type]
