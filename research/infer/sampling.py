# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens: pure transforms of logits, one after the other, and a draw with a key for each sequence.

A transform masks or moves logits; what is drawn, and the log-probability that is returned, are those of the softmax of
the result. Each row is transformed and drawn by itself, so that a sequence does not depend on its neighbours.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import Array, UserError

BLOCK = 128  # of a vocabulary, for draws
NEVER = -1e30  # a finite stand-in for minus infinity, as in attention


class Transform(Protocol):
    """logits [B, V] float32 -> the same, of the distribution to draw from. remembers: it needs to know which tokens a
    sequence has seen, prompt included: ``seen`` [B, V] booleans, None where no transform remembers."""

    remembers: ClassVar[bool] = False

    def __call__(self, logits_BV: Array, seen_BV: Array | None) -> Array: ...


@dataclass(frozen=True)
class Temperature(Transform):
    """Logits divided by ``value``."""

    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise UserError(
                f"A temperature must be above 0; given {self.value}: for the likeliest token choose greedy."
            )

    def __call__(self, logits_BV: Array, seen_BV: Array | None) -> Array:
        return logits_BV / self.value


@dataclass(frozen=True)
class TopK(Transform):
    """The k likeliest tokens, and those that tie with the last of them (Fan et al. 2018)."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"top_k must be at least 1; given {self.k}.")

    def __call__(self, logits_BV: Array, seen_BV: Array | None) -> Array:
        least = jax.lax.top_k(logits_BV, min(self.k, logits_BV.shape[-1]))[0][:, -1:]
        return jnp.where(logits_BV >= least, logits_BV, NEVER)


@dataclass(frozen=True)
class TopP(Transform):
    """The likeliest tokens that together reach the probability p (nucleus; Holtzman et al. 2020, eqs. 2 and 3)."""

    p: float

    def __post_init__(self) -> None:
        _check_share("top_p", self.p)

    def __call__(self, logits_BV: Array, seen_BV: Array | None) -> Array:
        order = jnp.argsort(-logits_BV, axis=-1, stable=True)
        sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order, axis=-1), axis=-1)
        before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
        rank = jnp.argsort(order, axis=-1)
        kept = jnp.take_along_axis(before_BV, rank, axis=-1) < self.p
        return jnp.where(kept | (rank == 0), logits_BV, NEVER)


@dataclass(frozen=True)
class MinP(Transform):
    """Tokens at least p times as likely as the likeliest (Nguyen et al. 2024, section 3)."""

    p: float

    def __post_init__(self) -> None:
        _check_share("min_p", self.p)

    def __call__(self, logits_BV: Array, seen_BV: Array | None) -> Array:
        top = jnp.max(logits_BV, axis=-1, keepdims=True)
        return jnp.where(logits_BV >= top + math.log(self.p), logits_BV, NEVER)


@dataclass(frozen=True)
class RepetitionPenalty(Transform):
    """Logits of tokens already seen, prompt included, divided by the penalty where positive, multiplied where negative
    (Keskar et al. 2019, section 4.1, with the sign taken into account as in common use)."""

    penalty: float
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.penalty) and self.penalty > 0):
            raise UserError(f"A repetition penalty must be above 0; given {self.penalty} (1 is none).")

    def __call__(self, logits_BV: Array, seen_BV: Array | None) -> Array:
        assert seen_BV is not None
        lowered = jnp.where(logits_BV > 0, logits_BV / self.penalty, logits_BV * self.penalty)
        return jnp.where(seen_BV, lowered, logits_BV)


@dataclass(frozen=True)
class Allowed(Transform):
    """No token but these."""

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids or min(self.ids) < 0:
            raise UserError(f"The allowed tokens must be at least one id from 0 on; given {self.ids}.")

    def __call__(self, logits_BV: Array, seen_BV: Array | None) -> Array:
        if max(self.ids) >= logits_BV.shape[-1]:
            raise UserError(f"The id {max(self.ids)} is allowed and the model has {logits_BV.shape[-1]}: leave it out.")
        mask_V = np.zeros(logits_BV.shape[-1], bool)
        mask_V[list(self.ids)] = True
        return jnp.where(jnp.asarray(mask_V)[None, :], logits_BV, NEVER)


@dataclass(frozen=True)
class Below(Transform):
    """No token from ``size`` on: those of a padded vocabulary have no text."""

    size: int

    def __call__(self, logits_BV: Array, seen_BV: Array | None) -> Array:
        return jnp.where((jnp.arange(logits_BV.shape[-1]) < self.size)[None, :], logits_BV, NEVER)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: transforms in order, then a draw, or with ``greedy`` the likeliest token. Of a greedy
    choice the log-probability is that of the softmax it is the maximum of."""

    transforms: tuple[Transform, ...] = ()
    greedy: bool = False

    @property
    def remembers(self) -> bool:
        return any(transform.remembers for transform in self.transforms)

    def distribution(self, logits_BV: Array, seen_BV: Array | None = None) -> Array:
        """Log-probabilities [B, V] in float32 of what is drawn."""
        logits_BV = logits_BV.astype(jnp.float32)
        for transform in self.transforms:
            logits_BV = transform(logits_BV, seen_BV)
        return jax.nn.log_softmax(logits_BV, axis=-1)

    def draw(
        self, logits_BV: Array, keys_B: Array, index_B: Array, seen_BV: Array | None = None
    ) -> tuple[Array, Array]:
        """Tokens [B] and their log-probabilities [B]. keys: of the sequences; index: how many tokens each has drawn."""
        log_probs_BV = self.distribution(logits_BV, seen_BV)
        if self.greedy:
            tokens_B = jnp.argmax(log_probs_BV, axis=-1)
        else:
            tokens_B = drawn(jax.vmap(jax.random.fold_in)(keys_B, index_B), log_probs_BV)
        tokens_B = tokens_B.astype(jnp.int32)
        return tokens_B, jnp.take_along_axis(log_probs_BV, tokens_B[:, None], axis=-1)[:, 0]


def drawn(keys_B: Array, log_probs_BV: Array) -> Array:
    """An index of each row [B], as likely as it says: a block of the row by one uniform number, a place in it by one.

    Random numbers are dear: Gumbel's trick takes one for each of the V, which here costs more than the model does.
    """
    rows, size = log_probs_BV.shape
    width = BLOCK if size > 4 * BLOCK else size
    padded_BV = jnp.pad(log_probs_BV, ((0, 0), (0, -size % width)), constant_values=-jnp.inf)
    parts_BNW = padded_BV.reshape(rows, -1, width)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_B = _inverted(jnp.sum(jnp.exp(parts_BNW), axis=-1), uniform_B2[:, 0])
    part_BW = jnp.take_along_axis(parts_BNW, block_B[:, None, None], axis=1)[:, 0]
    return block_B * width + _inverted(jnp.exp(part_BW), uniform_B2[:, 1])


def _inverted(weights_BN: Array, uniform_B: Array) -> Array:
    """The first place [B] where the running sum of weights is beyond ``uniform`` of their sum: of weight 0, never.

    Sums that are formed in parallel may step up where there is no weight, or down where there is.
    """
    some_BN = weights_BN > 0
    sums_BN = jnp.cumsum(weights_BN, axis=-1)
    total_B = sums_BN[:, -1]
    target_B = jnp.minimum(uniform_B * total_B, jnp.nextafter(total_B, jnp.zeros_like(total_B)))
    beyond_BN = (sums_BN > target_B[:, None]) & some_BN
    last_B = weights_BN.shape[-1] - 1 - jnp.argmax(some_BN[:, ::-1], axis=-1)
    return jnp.where(jnp.any(beyond_BN, axis=-1), jnp.argmax(beyond_BN, axis=-1), last_B)


def sampling(
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    allowed: tuple[int, ...] = (),
    vocab_size: int | None = None,
) -> Sampling:
    """The usual settings in the usual order: penalty, allowed ids, temperature, top-k, top-p, min-p. temperature 0 is
    greedy; vocab_size: ids from there on are never drawn."""
    found: list[Transform] = []
    if repetition_penalty != 1.0:
        found.append(RepetitionPenalty(repetition_penalty))
    if vocab_size is not None:
        found.append(Below(vocab_size))
    if allowed:
        found.append(Allowed(allowed))
    if temperature not in (0.0, 1.0):
        found.append(Temperature(temperature))
    if top_k:
        found.append(TopK(top_k))
    if top_p != 1.0:
        found.append(TopP(top_p))
    if min_p:
        found.append(MinP(min_p))
    return Sampling(tuple(found), greedy=temperature == 0)


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{name} must lie above 0 and at most at 1; given {value}.")
