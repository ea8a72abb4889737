# SPDX-License-Identifier: Apache-2.0
"""Whether the marked answer is the reference as a number: 0.50, 1/2 and 50% are one."""

import re
from dataclasses import dataclass
from fractions import Fraction

from research.evals.tasks.base import Marked, Problem, Response

LONGEST = 200  # characters of an answer that are looked at; of its exponent, three digits
NUMBER = re.compile(r"([-+]?)[$€£]?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE]([-+]?\d{1,3}))?(%?)", re.ASCII)
FRACTION = re.compile(r"([-+]?\d+)\s*/\s*(\d+)", re.ASCII)


@dataclass(frozen=True)
class Numeric:
    """1 where the marked answer and the reference are one number, exactly: as fractions, so that no digit is lost.

    Digits are those of ASCII; thousands may be apart by commas, a currency sign may stand before, a percent sign or a
    full stop after. Of an answer of over 200 characters, or with an exponent of over 3 digits, nothing is formed.
    """

    mark: Marked = Marked()

    def score(self, problem: Problem, response: Response) -> float:
        found = self.mark.find(response.text)
        if found is None:
            return 0.0
        value = number(found)
        return float(value is not None and value == number(problem.reference))


def number(text: str) -> Fraction | None:
    """A text's number, None where it is none."""
    text = text.strip()
    if len(text) > LONGEST:
        return None
    text = text.removesuffix(".")  # a sentence's
    if over := FRACTION.fullmatch(text):
        top, bottom = int(over[1]), int(over[2])
        return Fraction(top, bottom) if bottom else None
    if not (found := NUMBER.fullmatch(text)):
        return None
    sign, digits, exponent, percent = found.groups()
    whole, _, decimals = digits.replace(",", "").partition(".")
    value = int(whole + decimals) * Fraction(10) ** (int(exponent or 0) - len(decimals))
    return (-value if sign == "-" else value) / (100 if percent else 1)
