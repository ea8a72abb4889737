# SPDX-License-Identifier: Apache-2.0
"""The programs of generation: prefill prompts, put them into slots of a cache, and decode all slots together.

Each is a jitted function of the policy and of arrays; its shapes come in buckets, so that it compiles once for each.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.core.sharding import constrain
from research.core.types import Array, Batch, Precision, UserError
from research.infer.sampling import Sampling
from research.models.bound import Bound
from research.models.cache import Cache, CacheSpec, LayerCache, used
from research.models.decoder import Decoder
from research.models.positions import Learned


@dataclass(frozen=True)
class Settings:
    """What programs are compiled for. stop: ids that end a sequence. steps: the most tokens of a call of ``decode``."""

    sampling: Sampling
    stop: tuple[int, ...] = ()
    cache: CacheSpec = CacheSpec(windows="ring")
    steps: int = 16


class Slots(NamedTuple):
    """Sequences in the making, one for each of B slots. last: the token that comes next into the cache; made: tokens
    drawn so far, of at most ``limit``; live: whether it goes on; keys [B, ...]: the seeds' key data; seen [B, V]."""

    cache: Cache
    last: Array
    made: Array
    limit: Array
    live: Array
    keys: Array
    seen: Array | None


class Prefilled(NamedTuple):
    """Prompts of R rows: their cache, the logits after each [R, V], and the tokens they hold [R, V]."""

    cache: Cache
    logits: Array
    seen: Array | None


def bucket(count: int, *, least: int = 16) -> int:
    """The length that arrays of ``count`` are padded to: a power of two or three quarters of one, up to 512, then a
    multiple of 256."""
    if count > 512:
        return -(-count // 256) * 256
    power = 1 << (count - 1).bit_length()
    return max(least, power * 3 // 4 if power >= 64 and count <= power * 3 // 4 else power)


def batch_of(tokens_BT: Array, length_B: Array, real_BT: Array) -> Batch:
    """Tokens that follow ``length`` others of their row. Padding stands at 0: beyond a table of positions there is
    nothing, which would spread from there."""
    positions = length_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None, :]
    real_BT = real_BT.astype(jnp.int32)
    return {"tokens": tokens_BT, "positions": positions * real_BT, "segment_ids": real_BT}


def check_prompt(model: Decoder, prompt: Sequence[int] | np.ndarray, more: int, what: str) -> None:
    """Raises UserError for a prompt that the model cannot go on from with so many ``more`` tokens."""
    if not len(prompt):
        raise UserError(f"The prompt{what} is empty: give at least one token.")
    low, high = int(np.min(prompt)), int(np.max(prompt))
    if not 0 <= low <= high < model.vocab_size:
        raise UserError(
            f"The prompt{what} has ids from {low} to {high} and the model's go from 0 to {model.vocab_size - 1}: use "
            "the model's own tokenizer."
        )
    if isinstance(model.position, Learned) and len(prompt) + more > model.position.max_length:
        raise UserError(
            f"A prompt of {len(prompt)} tokens and {more} more do not fit the model's table of "
            f"{model.position.max_length} positions: ask for fewer."
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty(model: Decoder, precision: Precision, settings: Settings, slots: int, length: int) -> Slots:
    """So many slots, each of so many tokens."""
    count = slots
    cache = model.empty_cache(batch=count, slots=length, precision=precision, spec=settings.cache)
    zeros = jnp.zeros((count,), jnp.int32)
    keys = jnp.tile(jax.random.key_data(jax.random.key(0))[None], (count, 1))
    seen = jnp.zeros((count, model.vocab_size), bool) if settings.sampling.remembers else None
    return Slots(Cache(used(cache.layers), cache.length), zeros, zeros, zeros, zeros > 0, keys, seen)


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(model: Decoder, policy: Bound, tokens_RT: Array, length_R: Array, settings: Settings) -> Prefilled:
    """Prompts [R, T] of ``length`` tokens each, the rest padding."""
    rows, width = tokens_RT.shape
    cache = model.empty_cache(batch=rows, slots=width, precision=policy.module.precision, spec=settings.cache)
    real = jnp.arange(width)[None, :] < length_R[:, None]
    output = policy.forward(batch_of(tokens_RT, cache.length, real), cache)
    last = jnp.maximum(length_R - 1, 0)[:, None, None]
    hidden_RD = jnp.take_along_axis(output.hidden, last, axis=1)[:, 0]
    seen = None
    if settings.sampling.remembers:
        seen = jnp.zeros((rows, model.vocab_size), bool).at[jnp.arange(rows)[:, None], tokens_RT].max(real)
    return Prefilled(output.cache, logits_of(policy, hidden_RD), seen)


def logits_of(policy: Bound, hidden_BD: Array) -> Array:
    """[B, V], whole on every device: as one token each, so that a head that lies split is multiplied as it lies."""
    return constrain(policy.logits(hidden_BD[:, None])[:, 0], "batch", None)


@functools.partial(jax.jit, static_argnums=6, donate_argnums=0)
def admit(
    slots: Slots, prompts: Prefilled, row_N: Array, slot_N: Array, limit_N: Array, keys_N: Array, settings: Settings
) -> tuple[Slots, Array, Array]:
    """Puts prefilled rows into slots (those beyond the last slot are dropped) and draws a first token of each [N], with
    its log-probability. A row may go into several slots."""

    is_cache = lambda x: isinstance(x, LayerCache)  # noqa: E731
    layers = jax.tree.map(
        lambda mine, theirs: mine.with_rows(theirs, row_N, slot_N),
        slots.cache.layers,
        prompts.cache.layers,
        is_leaf=is_cache,
    )
    seen_NV = None if prompts.seen is None else prompts.seen[row_N]
    first, log_probs = settings.sampling.draw(
        prompts.logits[row_N], jax.random.wrap_key_data(keys_N), jnp.zeros_like(row_N), seen_NV
    )
    live = (limit_N > 1) & ~_in(first, settings.stop)

    def put(to: Array, values: Array) -> Array:
        return to.at[slot_N].set(values, mode="drop")

    seen = slots.seen
    if seen is not None and seen_NV is not None:
        seen = put(seen, seen_NV.at[jnp.arange(len(first)), first].set(True))
    slots = Slots(
        cache=Cache(layers, put(slots.cache.length, prompts.cache.length[row_N])),
        last=put(slots.last, first),
        made=put(slots.made, jnp.ones_like(first)),
        limit=put(slots.limit, limit_N),
        live=put(slots.live, live),
        keys=put(slots.keys, keys_N),
        seen=seen,
    )
    return slots, constrain(first, None), constrain(log_probs, None)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
def decode(policy: Bound, slots: Slots, waiting: Array, settings: Settings) -> tuple[Slots, Array, Array, Array]:
    """Up to ``settings.steps`` tokens of every live slot: tokens [B, steps], -1 where there is none, their
    log-probabilities, and which slots are live. With others waiting it returns as soon as a slot is free."""
    count = slots.last.shape[0]
    tokens = jnp.full((settings.steps, count), -1, jnp.int32)
    log_probs = jnp.zeros((settings.steps, count), jnp.float32)
    before = jnp.sum(slots.live)

    def going(carry: tuple) -> Array:
        slots, index, _, _ = carry
        live = jnp.sum(slots.live)
        return (index < settings.steps) & (live > 0) & ~(waiting & (live < before))

    def step(carry: tuple) -> tuple:
        slots, index, tokens, log_probs = carry
        slots, token_B, log_prob_B = one_step(policy, slots, settings)
        return slots, index + 1, tokens.at[index].set(token_B), log_probs.at[index].set(log_prob_B)

    slots, _, tokens, log_probs = jax.lax.while_loop(going, step, (slots, jnp.zeros((), jnp.int32), tokens, log_probs))
    return slots, constrain(tokens.T, None, None), constrain(log_probs.T, None, None)


def one_step(policy: Bound, slots: Slots, settings: Settings) -> tuple[Slots, Array, Array]:
    """The next token of each slot [B] (-1 where it is not live) and its log-probability."""
    output = policy.forward(batch_of(slots.last[:, None], slots.cache.length, slots.live[:, None]), slots.cache)
    logits_BV = logits_of(policy, output.hidden[:, 0])
    keys = jax.random.wrap_key_data(slots.keys)
    token_B, log_prob_B = settings.sampling.draw(logits_BV, keys, slots.made, slots.seen)
    made = slots.made + slots.live
    live = slots.live & (made < slots.limit) & ~_in(token_B, settings.stop)
    seen = slots.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token_B)), token_B].max(slots.live)
    after = Slots(output.cache, jnp.where(slots.live, token_B, slots.last), made, slots.limit, live, slots.keys, seen)
    return after, jnp.where(slots.live, token_B, -1), jnp.where(slots.live, log_prob_B, 0.0)


@functools.partial(jax.jit, donate_argnums=0)
def stopped(slots: Slots, ended_B: Array) -> Slots:
    """Ends slots: text that comes out of them has met a stop string."""
    return slots._replace(live=slots.live & ~ended_B)


def _in(token_B: Array, ids: tuple[int, ...]) -> Array:
    return jnp.any(token_B[:, None] == jnp.asarray(ids or (-1,), jnp.int32)[None, :], axis=1)
