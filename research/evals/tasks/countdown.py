# SPDX-License-Identifier: Apache-2.0
"""Countdown: numbers are put together to make a target. What a response writes is parsed here, never evaluated."""

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

from research.core.types import UserError
from research.evals.tasks.base import TAGS, Draws, Marked, Problem, Procedural, Response, Reward

LONGEST = 200  # characters of an expression that are looked at
LARGEST = 10**6  # of what a worked solution comes to on its way
EXPRESSION = re.compile(r"[0-9+\-*/() ]*")
TOKEN = re.compile(r"[0-9]+|[-+*/()]")
RANK = {"+": 1, "-": 1, "*": 2, "/": 2}
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


@dataclass(frozen=True)
class Makes:
    """1 where the marked expression makes the problem's target out of its numbers, each at most once, or with
    ``use_all`` each once: numbers, + - * / and brackets, of at most 200 characters, reckoned exactly as fractions.
    There are no signs before numbers. data: numbers and target."""

    mark: Marked = TAGS
    use_all: bool = True

    def score(self, problem: Problem, response: Response) -> float:
        found = self.mark.find(response.text)
        if found is None or len(found) > LONGEST or not EXPRESSION.fullmatch(found):
            return 0.0
        tokens = TOKEN.findall(found)
        used = Counter(int(token) for token in tokens if token.isdigit())
        given = Counter(problem.data["numbers"])
        if not used <= given or self.use_all and used != given:
            return 0.0
        try:
            return float(value(tokens) == problem.data["target"])
        except ZeroDivisionError:
            return 0.0


def value(tokens: list[str]) -> Fraction | None:
    """What an expression comes to, None where it is none, by two stacks (Dijkstra's shunting yard). Raises
    ZeroDivisionError."""
    values: list[Fraction] = []
    waiting: list[str] = []
    due = True  # a number or an opening bracket

    def apply_from(rank: int) -> None:
        while waiting and RANK.get(waiting[-1], 0) >= rank:
            right, left = values.pop(), values.pop()
            values.append(OPERATIONS[waiting.pop()](left, right))

    for token in tokens:
        if due and token.isdigit():
            values.append(Fraction(int(token)))
            due = False
        elif due and token == "(":
            waiting.append(token)
        elif not due and token in RANK:
            apply_from(RANK[token])
            waiting.append(token)
            due = True
        elif not due and token == ")":
            apply_from(1)
            if not waiting:
                return None
            waiting.pop()
        else:
            return None
    if due:
        return None
    apply_from(1)
    return None if waiting else values[0]


@dataclass(frozen=True)
class Countdown(Procedural):
    """``count`` numbers from 1 to ``largest``, and a target that they make in whole numbers above 0 all the way.

    targets: the least and the greatest. use_all: whether each number must be used; else each may be. attempts: worked
    solutions miss the target up to so many times less one, then make it: they show a search and not its end alone
    (Gandhi et al. 2024, arXiv 2404.03683, section 3). prompt: what is asked, with {numbers} and {target}; "" for a
    sentence. mark: how responses mark their expression. held_out: the share of all problems that are for validation;
    the order of the numbers does not tell problems apart.
    """

    count: int = 4
    largest: int = 50
    targets: tuple[int, int] = (10, 100)
    use_all: bool = True
    attempts: int = 1
    prompt: str = ""
    mark: Marked = field(default=TAGS, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attempts < 1:
            raise UserError(f"Countdown.attempts is {self.attempts}: the last one makes the target, so give 1 or more.")
        if not 2 <= self.count <= 20 or not 2 <= self.largest <= LARGEST or not 1 <= self.targets[0] <= self.targets[1]:
            raise UserError(
                f"Countdown needs a count from 2 to 20, largest from 2 to {LARGEST:,} and targets from 1 in order; "
                f"given {self.count}, {self.largest} and {self.targets}."
            )

    @property
    def verifier(self) -> Reward:
        return Makes(self.mark, self.use_all)

    def draw(self, draws: Draws) -> tuple[str, Problem]:
        low, high = self.targets
        for _ in range(10_000):
            numbers = [draws.integer(1, self.largest) for _ in range(self.count)]
            used = self.count if self.use_all else draws.integer(2, self.count)
            chosen = numbers[:used]
            target, expression, steps = _solution(chosen, draws)
            if low <= target <= high and target not in numbers:
                break
        else:
            raise UserError(f"In 10,000 draws {self} made no target: give it more numbers or wider targets.")
        shown = [numbers.pop(draws.integer(0, len(numbers) - 1)) for _ in range(self.count)]
        how = "once" if self.use_all else "at most once"
        asked = (
            self.prompt or f"Use each of the numbers {{numbers}} {how}, with + - * / and brackets, to make {{target}}."
        )
        prompt = asked.replace("{numbers}", " ".join(map(str, shown))).replace("{target}", str(target))
        misses = _misses(chosen, target, draws.integer(0, self.attempts - 1), draws) if self.attempts > 1 else []
        worked = "|".join(";".join(one) for one in [*misses, steps]) + self.mark.write(expression)
        data = {"numbers": shown, "target": target}
        return f"{sorted(shown)} {target}", Problem(prompt, expression, worked, data)


def _misses(numbers: list[int], target: int, count: int, draws: Draws) -> list[list[str]]:
    """The steps of so many other ways, all different, that make something else; fewer where there are few."""
    found: list[list[str]] = []
    for _ in range(10 * count):
        made, _, steps = _solution(numbers, draws)
        if len(found) < count and made != target and steps not in found:
            found.append(steps)
    return found


def _solution(numbers: list[int], draws: Draws) -> tuple[int, str, list[str]]:
    """Numbers put together two at a time: what they make, as one expression, and step by step."""
    parts, steps = [(number, str(number)) for number in numbers], []
    while len(parts) > 1:
        (a, left), (b, right) = (parts.pop(draws.integer(0, len(parts) - 1)) for _ in range(2))
        fit = [sign for sign in RANK if sign != "-" or a > b]
        fit = [sign for sign in fit if sign != "/" or a % b == 0]
        sign = draws.one_of([sign for sign in fit if sign != "*" or a * b <= LARGEST])
        made = int(OPERATIONS[sign](Fraction(a), Fraction(b)))
        steps.append(f"{a}{sign}{b}={made}")
        parts.append((made, f"({left}{sign}{right})"))
    made, expression = parts[0]
    return made, expression[1:-1], steps
