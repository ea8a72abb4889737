# SPDX-License-Identifier: Apache-2.0
"""Counting runs otherwise: each switch by hand, and the direction in which the literature says the exponent moves."""

import math
from dataclasses import replace

import numpy as np
import pytest

from research.core.types import UserError
from research.scaling.corrections import Correction, compare
from research.scaling.laws import Chinchilla
from research.scaling.table import Run

RUN = Run("a", 1000, 600, 50_000, 4e8, 3.0, status="finished", head_params=200, warmup_tokens=20_000)


def counted(correction: Correction, run: Run = RUN) -> tuple[int, float]:
    (found,), _ = correction([run])
    assert {found.count(kind) for kind in ("total", "non_embedding", "with_head")} == {found.params}
    return found.params, found.flops


def test_each_count_by_hand():
    assert counted(Correction()) == (1000, 4e8)
    assert counted(Correction("non_embedding")) == (600, 4e8)
    assert counted(Correction("non_embedding", "six_per_param")) == (600, 6 * 600 * 50_000)
    assert counted(Correction("with_head", "six_per_param")) == (800, 6 * 800 * 50_000)


def test_long_warm_ups_and_largest_budgets_are_left_out_and_said():
    short = replace(RUN, name="b", warmup_tokens=1000)
    kept, notes = Correction(max_warmup=0.2)([RUN, short])
    assert [run.name for run in kept] == ["b"] and notes == ("a is left out: 40% of it is warm-up.",)
    larger = replace(short, name="c", flops=4e9)
    kept, notes = Correction(drop_largest=1)([RUN, short, larger])
    assert [run.name for run in kept] == ["a", "b"] and "4e+09 FLOPs and above are left out" in notes[0]


def test_what_the_table_does_not_know_is_a_sentence():
    bare = replace(RUN, head_params=None, warmup_tokens=None)
    with pytest.raises(UserError, match="how many parameters the head of a has"):
        Correction("with_head")([bare])
    with pytest.raises(UserError, match="how long the warm-up of a was"):
        Correction(max_warmup=0.1)([bare])
    with pytest.raises(UserError, match="2 of 1 budgets cannot be left out"):
        Correction(drop_largest=2)([bare])


def family(width: float) -> tuple[int, int]:
    """(parameters outside embeddings and head, those of the head) of decoders whose depth grows with width."""
    return round(12 * width**3 / 64), round(2000 * width)


@pytest.fixture(scope="module")
def runs():
    """A Chinchilla law of all parameters with equal exponents, on models whose embeddings are most of the small
    ones."""
    law, generator, found = Chinchilla(E=1.5, A=80.0, B=400.0, alpha=0.35, beta=0.35), np.random.default_rng(0), []
    for budget in np.geomspace(1e13, 1e17, 6):
        best = (budget / 120) ** 0.5
        for width in np.geomspace(16, 512, 24):
            body, head = family(width)
            params = body + 2 * head
            if 0.1 < params / best < 10:
                tokens = round(budget / (6 * params))
                loss = law.loss(params=params, tokens=tokens) * math.exp(0.001 * generator.standard_normal())
                found.append(
                    Run(f"r{len(found)}", params, body, tokens, budget, loss, status="finished", head_params=head)
                )
    return found


def test_leaving_embeddings_out_raises_the_exponent(runs):
    """Pearce and Song 2024: counted as Kaplan et al. did, runs of one law look as if size mattered more."""
    variants, notes = compare(runs, resamples=50)
    exponents = [v.params_in_compute for v in variants]
    assert exponents[0] > exponents[1] > exponents[2] == pytest.approx(0.5, abs=0.02)
    assert variants[2].interval.holds(0.5) and exponents[0] > 0.55
    assert any("warm-up" in note for note in notes)  # not known here: said
    assert variants[-1].num_runs < variants[0].num_runs == len(runs)


def test_a_correction_that_changes_nothing_is_not_shown(runs):
    same = [replace(run, non_embedding_params=run.params, head_params=0, warmup_tokens=0) for run in runs]
    variants, _ = compare(same, resamples=20)
    assert [v.name for v in variants] == [
        "as Kaplan et al. count: no embeddings, no head",
        "without the largest budget",
    ]
