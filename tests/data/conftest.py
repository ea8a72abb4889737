# SPDX-License-Identifier: Apache-2.0
"""Small corpora and contexts for the data tests."""

import os

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # As the repository's own conftest does; here so that this folder also runs alone.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import random  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

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
