# SPDX-License-Identifier: Apache-2.0
"""Problems of reasoning-gym and their scores. Only worker processes import this (``research.evals.tasks.gym``).

Some of its scores evaluate the response as Python, or have sympy do so. Here lists are read as literals, and formulas
only where each name in them is a function of mathematics or a letter.
"""

import ast
import contextlib
import functools
import importlib
import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import reasoning_gym
from reasoning_gym.composite import DatasetSpec
from sympy.parsing import sympy_parser

LONGEST = 10_000  # characters of a list or formula that are read
# Where a score calls eval on the response (reasoning-gym 0.1.25; the tests look for others).
EVALUATE = (
    "algorithmic.binary_matrix",
    "algorithmic.spiral_matrix",
    "algorithmic.string_insertion",
    "games.n_queens",
)
NAMES = {"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh"}
NAMES |= {"atanh", "exp", "log", "ln", "sqrt", "cbrt", "Abs", "abs", "erf", "pi"}
FORMULA = re.compile(r"[0-9A-Za-z+\-*/^()., \t\r\n]*")
NAME = re.compile(r"[A-Za-z]+")
NAN = re.compile(r"(?<![a-z])nan[ij]?(?![a-z])", re.IGNORECASE)
MEMBER = re.compile(r"\.\s*[A-Za-z]")


def problem(name: str, settings: Mapping[str, Any], seed: int) -> dict[str, str]:
    """question and answer of a seed; the answer is "" where the library has none and only checks."""
    entry = _made(name, json.dumps(settings, sort_keys=True), seed)[1]
    answer = entry["answer"]
    return {"question": entry["question"], "answer": answer if isinstance(answer, str) else ""}


def score(name: str, settings: Mapping[str, Any], seed: int, question: str, answer: str) -> float | None:
    """The library's score of an answer; None where it asks another question of this seed by now."""
    dataset, entry = _made(name, json.dumps(settings, sort_keys=True), seed)
    if entry["question"] != question:
        return None
    if NAN.search(answer) and not NAN.search(str(entry["answer"])):  # complex_arithmetic takes min(1, nan), which is 1
        return 0.0
    if name == "game_of_life_halting":  # its own score takes every text for "True", by bool(text)
        return float(answer == str(entry["answer"]))
    _seed()
    with _formulas_are_plain():
        value = float(dataset.score_answer(answer, entry))
    return value if math.isfinite(value) else 0.0


def names() -> list[str]:
    """All that there are."""
    return sorted(reasoning_gym.factory.DATASETS)


@functools.lru_cache(maxsize=64)
def _made(name: str, settings: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The data set of a seed and its one entry: an index would give one question to many seeds."""
    given = json.loads(settings)
    if name == "composite":
        given["datasets"] = [DatasetSpec(**{"weight": 1.0, "config": {}, **part}) for part in given.get("datasets", [])]
    _seed()
    dataset = reasoning_gym.create_dataset(name, seed=seed, size=1, **given)
    return dataset, dataset[0]


def _seed() -> None:
    """Some of its data sets draw from the generators that a process shares."""
    random.seed(0)
    np.random.seed(0)


def literal(text: str) -> Any:
    if len(text) > LONGEST:
        raise ValueError("The text is too long.")
    return ast.literal_eval(text)


for _module in EVALUATE:
    importlib.import_module(f"reasoning_gym.{_module}").eval = literal  # type: ignore[attr-defined]


@contextlib.contextmanager
def _formulas_are_plain() -> Iterator[None]:
    """What sympy would evaluate is looked at first, however it comes to sympy."""
    plain = sympy_parser.stringify_expr

    def looked_at(text: str, *arguments: Any) -> str:
        if not is_formula(text):
            raise ValueError("The text is no formula.")
        return plain(text, *arguments)

    sympy_parser.stringify_expr = looked_at
    try:
        yield
    finally:
        sympy_parser.stringify_expr = plain


def is_formula(text: str) -> bool:
    """Whether a text is numbers, letters and functions of mathematics alone."""
    return (
        len(text) <= LONGEST
        and FORMULA.fullmatch(text) is not None
        and MEMBER.search(text) is None
        and all(len(name) == 1 or name in NAMES for name in NAME.findall(text))
    )
