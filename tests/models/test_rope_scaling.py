# SPDX-License-Identifier: Apache-2.0
"""Stretched rotary frequencies by their definitions; against transformers they are held by tests/hf/test_golden.py."""

import numpy as np
import pytest

from research.core.types import UserError
from research.models.rope_scaling import Linear, Llama3, Ntk, Yarn

THETA, WIDTH = 10_000.0, 64
PLAIN = THETA ** (-np.arange(0, WIDTH, 2) / WIDTH)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_ntk_leaves_the_fastest_and_stretches_the_slowest_by_the_factor(factor):
    """Between them the stretch grows by the same ratio from one frequency to the next."""
    found = Ntk(factor).frequencies(PLAIN, THETA)
    stretch = PLAIN / found
    assert stretch[0] == pytest.approx(1) and stretch[-1] == pytest.approx(factor)
    np.testing.assert_allclose(stretch[1:] / stretch[:-1], factor ** (1 / (WIDTH // 2 - 1)))


@pytest.mark.parametrize("scaling", [Linear(8.0), Ntk(8.0), Yarn(8.0, 64), Llama3(8.0, 1.0, 4.0, 64)], ids=str)
def test_none_is_faster_than_plain_or_slower_than_the_factor(scaling):
    found = scaling.frequencies(PLAIN, THETA)
    assert np.all(found <= PLAIN * (1 + 1e-12)) and np.all(found >= PLAIN / 8 * (1 - 1e-12))
    assert found[-1] == pytest.approx(PLAIN[-1] / 8)


def test_a_factor_below_one_is_refused():
    for make in (Linear, Ntk, lambda factor: Yarn(factor, 64)):
        with pytest.raises(UserError, match="factor is 0.5: it must be a number of at least 1"):
            make(0.5)
