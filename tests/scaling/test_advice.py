# SPDX-License-Identifier: Apache-2.0
"""What to build beyond compute-optimal: words, intervals, and which model is meant."""

import math

import pytest

from research.core.types import UserError
from research.scaling.advice import PAYS, advise, experts_that_pay
from research.scaling.analysis import Settings, analyse
from research.scaling.laws import CLARK_S_BASE


@pytest.fixture(scope="module")
def found(make_study):
    settings = Settings(target_flops=1e13, resamples=100, correct=False)
    return analyse(make_study(noise=0.003, sizes=6), settings=settings)


def test_the_model_to_build_is_the_one_asked_for(found):
    plain = advise(found)
    assert plain.params == found.from_law.params and "compute-optimal model" in plain.sentences[-1]
    scarce = advise(found, unique_tokens=found.from_law.tokens / 20)
    assert scarce.params == scarce.scarce.params < plain.params and "epochs" in scarce.sentences[0]
    served = advise(found, served=1e9, unique_tokens=found.from_law.tokens / 20)
    assert served.params == served.lifetime.best.params < plain.params and served.train_flops > plain.train_flops
    assert all("(95%: " in sentence for sentence in served.sentences[:2])
    assert "epochs of" in served.sentences[1] and "epochs of" not in advise(found, served=1e9).sentences[0]
    assert served.lifetime.compute_optimal == scarce.scarce
    with pytest.raises(UserError, match="unique tokens must be a positive number"):
        advise(found, unique_tokens=0)


def test_a_model_that_is_built_is_a_little_worse_than_the_best(found):
    advice = advise(found)
    words = advice.as_built(round(advice.params * 1.3))
    off = float(words.split("per token, ")[1].split(" ")[0])
    assert 0 < off < 0.02 and "(95%: " in words
    assert advice.tokens_of(round(advice.params)) == pytest.approx(found.from_law.tokens, rel=1e-3)


def test_what_is_built_is_judged_on_the_corpus_there_is(found):
    unique = found.from_law.tokens / 20
    advice = advise(found, unique_tokens=unique)
    expected = advice.as_built(round(advice.params)).split("expected ")[1].split(" ")[0]
    assert float(expected) == pytest.approx(advice.scarce.loss, abs=1e-3)
    assert advice.scarce.loss > found.from_law.loss + 0.01


def test_experts_pay_until_a_doubling_is_worth_too_little():
    experts = experts_that_pay(3e8)
    worth = dict(experts.worth)
    assert worth[experts.paying] >= PAYS * worth.get(experts.paying // 2, 1.0)
    if experts.paying < 512:
        assert worth[2 * experts.paying] < PAYS * worth[experts.paying]
    assert experts_that_pay(1e10).paying <= experts.paying  # larger models gain less (Clark et al. 2022)
    assert worth[64] == pytest.approx(CLARK_S_BASE.effective_params(params=3e8, experts=64.0) / 3e8)


def test_sizes_beyond_the_published_law_are_not_spoken_of(found):
    assert experts_that_pay(1e5).worth == () and "nothing is known of them" in " ".join(advise(found).sentences)
    assert not math.isnan(advise(found).params)
