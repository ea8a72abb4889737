# SPDX-License-Identifier: Apache-2.0
"""Beam search: the sequences of the highest sum of log-probabilities over length^alpha that a beam of some width finds
(Wu et al. 2016, section 7, with the plain length in the place of (5 + length) / 6)."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import Array, UserError
from research.infer.engine import unrolled
from research.infer.generate import batch_of, bucket, check_prompt, logits_of
from research.infer.sampling import NEVER, Sampling
from research.models.bound import Bound
from research.models.cache import Cache, CacheSpec, LayerCache
from research.models.decoder import Decoder


@dataclass(frozen=True)
class Beam:
    """width: sequences kept at each step. length_penalty: alpha; 0 compares sums, 1 means. stop: ids that end a
    sequence, which without one is complete at ``max_tokens``."""

    width: int
    max_tokens: int
    length_penalty: float = 1.0
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.width < 1 or self.max_tokens < 1 or self.length_penalty < 0:
            raise UserError(
                f"A beam needs a width and max_tokens of at least 1 and a length_penalty of at least 0; given "
                f"{self.width}, {self.max_tokens} and {self.length_penalty}."
            )


class Found(NamedTuple):
    """A complete sequence: its tokens, a stop id included, the sum of their log-probabilities, and its score."""

    tokens: list[int]
    log_prob: float
    score: float


def beam_search(
    model: Decoder,
    policy: Bound,
    prompt: np.ndarray,
    beam: Beam,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008
) -> list[Found]:
    """The best complete sequences found, best first, at most ``width``. sampling: transforms of logits (no draw), but
    for those that remember. Raises UserError for a prompt that the model cannot go on from."""
    check_prompt(model, prompt, beam.max_tokens, "")
    if sampling.remembers:
        raise UserError("A beam search has no repetition_penalty: give transforms of the logits alone.")
    policy, width = unrolled(policy), beam.width
    model, length = policy.module.config, bucket(len(prompt) + beam.max_tokens)
    spec = CacheSpec(windows="ring").on(policy.module.platform)
    tokens = np.zeros((1, bucket(len(prompt))), np.int32)
    tokens[0, : len(prompt)] = prompt
    log_probs, cache = _first(model, policy, tokens, np.asarray([len(prompt)]), spec, sampling, (width, length))
    sums, sequences = np.zeros(1), [[]]
    done: list[Found] = []
    for step in range(beam.max_tokens):
        log_probs = np.asarray(log_probs, np.float64)[: len(sums)]
        total = sums[:, None] + np.where(log_probs > NEVER / 2, log_probs, -np.inf)
        order = np.argsort(-total.reshape(-1), kind="stable")[: (1 + len(beam.stop)) * width]  # enough to go on with
        rows, ids = np.unravel_index(order, total.shape)
        kept: list[tuple[float, int, int]] = []
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            value = float(total[row, token])
            if not np.isfinite(value) or len(kept) == width:
                continue
            if token in beam.stop or step + 1 == beam.max_tokens:
                grown = [*sequences[row], token]
                done.append(Found(grown, value, value / len(grown) ** beam.length_penalty))
            else:
                kept.append((value, row, token))
        done = sorted(done, key=lambda one: -one.score)[:width]
        if not kept or _settled(done, kept[0][0], step + 1, beam):
            break
        sequences = [[*sequences[row], token] for _, row, token in kept]
        sums = np.array([value for value, _, _ in kept])
        pad = [0] * (width - len(kept))
        parents, last = ([one[place] for one in kept] + pad for place in (1, 2))
        given = np.asarray(parents, np.int32), np.asarray(last, np.int32)
        log_probs, cache = _next(policy, cache, *given, sampling)
    return done


def _settled(done: list[Found], best: float, length: int, beam: Beam) -> bool:
    """Whether no live sequence, however long it becomes, can still be among the best: log-probabilities only fall."""
    longest = beam.max_tokens if beam.length_penalty else length + 1
    return len(done) == beam.width and best / longest**beam.length_penalty < done[-1].score


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _first(
    model: Decoder,
    policy: Bound,
    tokens_1T: Array,
    length_1: Array,
    spec: CacheSpec,
    sampling: Sampling,
    slots: tuple[int, int],
) -> tuple[Array, Cache]:
    """The prompt in every row of a cache, and the distribution of what follows it [1, V]."""
    width, length = slots
    cache = model.empty_cache(batch=1, slots=length, precision=policy.module.precision, spec=spec)
    real = jnp.arange(tokens_1T.shape[1])[None, :] < length_1[:, None]
    output = policy.forward(batch_of(tokens_1T, cache.length, real), cache)
    hidden = jnp.take_along_axis(output.hidden, length_1[:, None, None] - 1, axis=1)[:, 0]
    log_probs = sampling.distribution(logits_of(policy, hidden))
    return log_probs, _rows(output.cache, jnp.zeros((width,), jnp.int32))


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def _next(policy: Bound, cache: Cache, parent_W: Array, last_W: Array, sampling: Sampling) -> tuple[Array, Cache]:
    """The distribution [W, V] after each row's last token, of which row ``parent`` holds what came before."""
    cache = _rows(cache, parent_W)
    output = policy.forward(batch_of(last_W[:, None], cache.length, jnp.ones((len(last_W), 1), bool)), cache)
    return sampling.distribution(logits_of(policy, output.hidden[:, 0])), output.cache


def _rows(cache: Cache, rows: Array) -> Cache:
    is_cache = lambda x: isinstance(x, LayerCache)  # noqa: E731
    taken = jax.tree.map(lambda one: jax.tree.map(lambda x: x[:, rows], one), cache.layers, is_leaf=is_cache)
    return Cache(taken, cache.length[rows])
