# SPDX-License-Identifier: Apache-2.0
"""What to build for a budget, beyond compute-optimal training: a model that will serve, a corpus that is too small,
experts that pay. Each with the interval of the resampled laws."""

import math
from dataclasses import dataclass, replace

import numpy as np

from research.core.types import UserError
from research.scaling.allocation import (
    Allocation,
    Lifetime,
    constrained,
    lifetime_optima,
    lifetime_optimum,
    optimum,
)
from research.scaling.analysis import Conclusion
from research.scaling.fit import Fit, Points, fit_law
from research.scaling.forms import ROUTED
from research.scaling.intervals import Interval
from research.scaling.laws import CLARK_S_BASE, RoutedExperts
from research.scaling.recommend import count_words
from research.scaling.table import Run

COUNTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
CLARK_SIZES, CLARK_REACH = (1.5e7, 1.3e9), 4.0  # params of Clark et al.'s models, and how far it is carried below
SAME_TOKENS = 1.05
PAYS = 1.10  # a doubling of experts pays while it is worth at least so much more of a dense model


@dataclass(frozen=True)
class Experts:
    """worth: (count of experts, times the dense size) by the law; paying: the last count whose doubling from the one
    before was worth ``PAYS``, 1 where none is. source: whose law."""

    worth: tuple[tuple[int, float], ...]
    paying: int
    source: str


@dataclass(frozen=True)
class Advice:
    """params, train_flops: of the model to build. sentences: every recommendation and which one that is."""

    params: float
    train_flops: float
    sentences: tuple[str, ...]
    lifetime: Lifetime | None
    scarce: Allocation | None
    experts: Experts
    found: Conclusion
    unique_tokens: float | None = None

    def tokens_of(self, params: int) -> float:
        """What the training FLOPs buy a model of so many params."""
        return self.train_flops / float(self.found.flops_per_token(float(params)))

    def as_built(self, params: int) -> str:
        """What the law expects of a model that can be built, on the same budget, against the best size."""
        bound, others = constrained, {"unique_tokens": self.unique_tokens}
        if self.unique_tokens is None:
            bound, others = lambda law: law, {}
        law, cost = bound(self.found.fit.law), self.found.flops_per_token
        tokens = self.tokens_of(params)
        loss = float(law.loss(params=float(params), tokens=tokens, **others))
        best = float(law.loss(params=self.params, tokens=self.train_flops / float(cost(self.params)), **others))
        text = (
            f"Built so, {self.train_flops:.3g} FLOPs train it on {count_words(tokens)} tokens to an expected {loss:.3f}"
        )
        if self.found.drawn is not None:
            drawn = self.found.drawn
            span = drawn.interval(bound(drawn.laws).loss(params=float(params), tokens=tokens, **others))
            text += f" ({span.told('{:.3f}'.format)})"
        return f"{text} nats per token, {loss - best:+.4f} against the size asked for."


def advise(found: Conclusion, *, served: float | None = None, unique_tokens: float | None = None) -> Advice:
    """Recommendations for the conclusion's target budget. served: tokens over the model's life; unique_tokens: what
    there is to train on. The model to build is the one for serving where that is asked for, else for the corpus, else
    the compute-optimal one. Raises UserError where the law has no optimum."""
    law, flops, cost = found.fit.law, found.target_flops, found.flops_per_token
    best = optimum(law, flops=flops, flops_per_token=cost)
    params, train, built = best.params, flops, "compute-optimal"
    sentences, scarce, lifetime = [], None, None
    if unique_tokens is not None:
        scarce, words = _scarce(found, best, unique_tokens)
        sentences.append(words)
        params, built = scarce.params, "data-constrained"
    if served is not None:
        lifetime, words = _served(found, served, unique_tokens)
        sentences.append(words)
        params, train, built = lifetime.best.params, lifetime.best.flops, "inference-aware"
    experts = experts_that_pay(params, _own_experts(tuple(found.table)))
    sentences.append(_expert_words(experts, params))
    if train > 1.01 * flops:
        sentences.append(f"That is {train / flops:.3g} times the budget in training, for less in serving.")
    sentences.append(
        f"To be built: the {built} model, {count_words(params)} parameters for {train:.3g} training FLOPs."
    )
    return Advice(params, train, tuple(sentences), lifetime, scarce, experts, found, unique_tokens)


def _scarce(found: Conclusion, best: Allocation, unique_tokens: float) -> tuple[Allocation, str]:
    if not (math.isfinite(unique_tokens) and unique_tokens > 0):
        raise UserError(f"The unique tokens must be a positive number; given {unique_tokens}.")
    spend = {"flops_per_token": found.flops_per_token, "unique_tokens": unique_tokens}
    law = constrained(found.fit.law)
    scarce = optimum(law, flops=found.target_flops, **spend)
    loss_of_best = float(law.loss(params=best.params, tokens=best.tokens, unique_tokens=unique_tokens))
    spans = {}
    if found.drawn is not None:
        laws = replace(found.drawn, laws=constrained(found.drawn.laws))
        spans = laws.optimum(flops=found.target_flops, **spend)
    return scarce, (
        f"With {count_words(unique_tokens)} unique tokens: {_with(scarce.params, spans.get('params'))} parameters on "
        f"{_with(scarce.tokens, spans.get('tokens'))} tokens ({scarce.tokens / unique_tokens:.2g} epochs), "
        f"expected loss "
        f"{_with(scarce.loss, spans.get('loss'), loss=True)}; the compute-optimal size would end at "
        f"{loss_of_best:.3f} (repetition "
        "is worth what Muennighoff et al. 2023 found, not what these runs tell)."
    )


def _served(found: Conclusion, served: float, unique_tokens: float | None) -> tuple[Lifetime, str]:
    """The model for serving, on the unique tokens where they are few."""
    spend = {"flops_per_token": found.flops_per_token, "unique_tokens": unique_tokens}
    bound = constrained if unique_tokens is not None else lambda law: law
    lifetime = lifetime_optimum(bound(found.fit.law), flops=found.target_flops, served=served, **spend)
    best, span, epochs, reached = lifetime.best, None, "", "the compute-optimal model's loss"
    if found.drawn is not None:
        laws = bound(found.drawn.laws)
        served_by = lifetime_optima(laws, flops=found.target_flops, served=served, **spend)
        span = found.drawn.interval(served_by.params)
    if unique_tokens is not None:
        epochs = f" ({best.tokens / unique_tokens:.2g} epochs of {count_words(unique_tokens)})"
        reached = "the loss of the best model for that corpus"
    return lifetime, (
        f"With {count_words(served)} tokens served over its life: {_with(best.params, span)} parameters on "
        f"{count_words(best.tokens)} tokens{epochs} reach {reached} ({best.loss:.3f}); training takes "
        f"{best.flops:.3g} FLOPs, and training and serving together {lifetime.saved:.1%} fewer than with that model "
        f"({lifetime.flops:.3g} against {lifetime.compute_optimal_flops:.3g})."
    )


def _own_experts(runs: tuple[Run, ...]) -> Fit | None:
    """The law of experts of the runs' own, where they have enough experts and sizes to tell it, all on as many tokens
    (the law is a function of size and experts alone), and it is identified."""
    good = [run for run in runs if run.experts is not None and run.problem is None]
    tokens = [run.tokens for run in good]
    if len({run.experts for run in good}) < 3 or max(tokens) > SAME_TOKENS * min(tokens):
        return None
    points = Points(
        params=np.array([run.active for run in good], float),
        loss=np.array([run.loss for run in good], float),
        experts=np.array([max(1, run.experts) for run in good], float),
    )
    try:
        fit = fit_law(points, form=ROUTED, delta=math.inf)
    except UserError:
        return None
    return fit if fit.convergence.converged and not fit.not_identified else None


def experts_that_pay(params: float, own: Fit | None = None) -> Experts:
    """How many experts a model of so many (active) params should have in every other layer, by Clark et al. 2022's
    law for their text, or by the law of one's own runs. Theirs has the gain end near 1e12 params (log10 N = -b / c)."""
    law: RoutedExperts = CLARK_S_BASE if own is None else own.law
    low, high = CLARK_SIZES if own is None else (own.points.params.min(), own.points.params.max())
    if not low / CLARK_REACH <= params <= high * CLARK_REACH**2:
        return Experts((), 1, "none")
    worth = [(count, float(law.effective_params(params=params, experts=float(count))) / params) for count in COUNTS]
    paying, before = 1, 1.0
    for count, times in worth:
        if times < before * PAYS:
            break
        paying, before = count, times
    return Experts(
        tuple(worth), paying, "Clark et al. 2022 (for their text and setting)" if own is None else "these runs"
    )


def _expert_words(experts: Experts, params: float) -> str:
    if not experts.worth:
        low, high = (count_words(end) for end in CLARK_SIZES)
        return (
            f"Experts: nothing is known of them at {count_words(params)} parameters: the published law (Clark et "
            f"al. 2022) is of {low} to {high} and these runs tell none."
        )
    told = ", ".join(f"{count}: {times:.2g}x" for count, times in experts.worth if count in (8, 64, 512))
    if experts.paying == 1:
        return f"By the law of {experts.source} experts do not pay at {count_words(params)} active parameters ({told})."
    times = dict(experts.worth)[experts.paying]
    most = "all that were considered, " if experts.paying == COUNTS[-1] else ""
    return (
        f"Experts: by the law of {experts.source} up to {experts.paying} experts ({most}each doubling worth at "
        f"least {PAYS - 1:.0%}) "
        f"pay at this size, for a loss as of a dense model {times:.2g} times as large ({told})."
    )


def _with(value: float, span: Interval | None, *, loss: bool = False) -> str:
    write = "{:.3f}".format if loss else count_words
    return write(value) if span is None else f"{write(value)} ({span.told(write)})"
