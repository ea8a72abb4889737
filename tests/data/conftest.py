# SPDX-License-Identifier: Apache-2.0
"""Small corpora and contexts for the data tests."""

import random
from pathlib import Path

import pytest

from research.core.sharding import MeshSpec, make_mesh
from research.core.types import Context

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "said", "that", "every", "token", "counts", "once"]


def some_text(*, seed: int, words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", " ", "\n", "\n    "]) for _ in range(words))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 text files of unequal length."""
    root = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (root / f"{number:02}.txt").write_text(some_text(seed=number, words=5 + 7 * (number % 9)))
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def context(cache) -> Context:
    return Context(mesh=make_mesh(MeshSpec()), seed=3, cache_dir=cache)
