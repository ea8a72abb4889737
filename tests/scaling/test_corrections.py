# SPDX-License-Identifier: Apache-2.0
"""Counting runs otherwise: each switch by hand, and the direction in which the literature says the exponent moves."""

import math
from dataclasses import replace

import numpy as np
import pytest

from research.core.types import UserError
from research.scaling.corrections import LADDER, Correction, compare
from research.scaling.laws import Chinchilla
from research.scaling.table import Run

RUN = Run("a", 1000, 600, 50_000, 4e8, 3.0, status="finished", head_params=200, warmup_tokens=20_000)
LAW = Chinchilla(E=1.5, A=80.0, B=400.0, alpha=0.35, beta=0.35)


def counted(correction: Correction, run: Run = RUN) -> tuple[int, float]:
    (found,), notes = correction([run])
    assert {found.count(kind) for kind in ("total", "non_embedding", "with_head")} == {found.params}
    assert notes == () and (found.loss, found.tokens, found.name) == (run.loss, run.tokens, run.name)
    return found.params, found.flops


def test_each_count_by_hand():
    assert counted(Correction()) == (1000, 4e8)
    assert counted(Correction("non_embedding")) == (600, 4e8)
    assert counted(Correction("with_head")) == (800, 4e8)
    assert counted(Correction("total", "six_per_param")) == (1000, 6 * 1000 * 50_000)
    assert counted(Correction("non_embedding", "six_per_param")) == (600, 6 * 600 * 50_000)
    assert counted(Correction("with_head", "six_per_param")) == (800, 6 * 800 * 50_000)


def test_long_warm_ups_and_largest_budgets_are_left_out_and_said():
    short = replace(RUN, name="b", warmup_tokens=1000)
    kept, notes = Correction(max_warmup=0.2)([RUN, short])
    assert [run.name for run in kept] == ["b"] and notes == ("a is left out: 40% of it is warm-up.",)
    assert len(Correction(max_warmup=0.4)([RUN, short])[0]) == 2  # at most so much
    larger = replace(short, name="c", flops=4e9)
    kept, notes = Correction(drop_largest=1)([larger, RUN, short])
    assert [run.name for run in kept] == ["a", "b"] and "4e+09 FLOPs and above are left out" in notes[0]
    failed = replace(RUN, name="d", status="failed")
    assert [run.name for run in Correction()([RUN, failed])[0]] == ["a"]


def test_what_the_table_does_not_know_is_a_sentence():
    bare = replace(RUN, head_params=None, warmup_tokens=None)
    with pytest.raises(UserError, match="how many parameters the head of a has"):
        Correction("with_head")([bare])
    with pytest.raises(UserError, match="how long the warm-up of a was"):
        Correction(max_warmup=0.1)([bare])
    for count in (1, 2):
        with pytest.raises(UserError, match=f"{count} of 1 budgets cannot be left out"):
            Correction(drop_largest=count)([bare])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_warmup": -0.1}, "between 0 and 1; given -0.1"),
        ({"max_warmup": 20.0}, "between 0 and 1; given 20.0"),
        ({"max_warmup": math.nan}, "between 0 and 1; given nan"),
        ({"drop_largest": -1}, "must be at least 0; given -1"),
    ],
)
def test_choices_that_mean_nothing_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        Correction(**wrong)


@pytest.fixture(scope="module")
def runs():
    """A Chinchilla law of all parameters with equal exponents, on models whose embeddings are most of the small
    ones: 12 layers d^2 + 2 vocabulary d."""
    generator, found = np.random.default_rng(0), []
    for budget in np.geomspace(1e13, 1e17, 6):
        best = (budget / 120) ** 0.5
        for width in np.geomspace(16, 512, 24):
            body, head = round(12 * width**3 / 64), round(2000 * width)
            params = body + 2 * head
            if 0.1 < params / best < 10:
                tokens = round(budget / (6 * params))
                loss = float(LAW.loss(params=params, tokens=tokens)) * math.exp(0.001 * generator.standard_normal())
                found.append(
                    Run(f"r{len(found)}", params, body, tokens, budget, loss, status="finished", head_params=head)
                )
    return found


def test_leaving_embeddings_out_raises_the_exponent(runs):
    """Pearce and Song 2024: counted as Kaplan et al. did, runs of one law look as if size mattered more."""
    share = [1 - run.non_embedding_params / run.params for run in runs]
    assert max(share) > 0.9 and min(share) < 0.25
    variants, notes = compare(runs, resamples=50)
    exponents = [v.params_in_compute for v in variants]
    assert exponents[0] > exponents[1] > exponents[2] == pytest.approx(0.5, abs=0.02)
    assert variants[2].interval.holds(0.5) and exponents[0] > 0.55
    assert variants[0].interval.low > 0.5  # no matter of noise
    assert len(notes) == 1 and "how long the warm-up" in notes[0]  # not known here: said
    assert variants[-1].num_runs < variants[0].num_runs == len(runs)


def test_a_correction_that_changes_nothing_is_not_shown(runs):
    short = [replace(run, warmup_tokens=0) for run in runs]
    variants, notes = compare(short, resamples=0, ladder=LADDER[2:])
    assert [v.name for v in variants] == ["embeddings counted too", "without the largest budget"] and notes == ()
    assert all(v.interval is None for v in variants)


def test_runs_with_one_count_show_nothing_of_embeddings(runs):
    """Nothing is said to be counted as somebody counts it where the table does not know what that is."""
    same = [replace(run, non_embedding_params=run.params, head_params=None) for run in runs]
    variants, notes = compare(same, resamples=0)
    assert all(v.correction.parameters == "total" for v in variants) and len(variants) == 2
    assert any("one count of parameters" in note for note in notes) and not any("Kaplan" in v.name for v in variants)
