# SPDX-License-Identifier: Apache-2.0
"""Text from a trained decoder: prefill the prompt, then one token at a time through the key-value cache."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import Array, UserError
from research.models.bound import Bound
from research.models.cache import Cache
from research.models.decoder import Decoder
from research.models.positions import Learned


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the most likely token. max_tokens: tokens to add at most. stop: ids that end the text."""

    temperature: float = 1.0
    max_tokens: int = 128
    stop: tuple[int, ...] = ()


def generate(
    policy: Bound, model: Decoder, prompt: np.ndarray, *, sampling: Sampling, key: Array, vocab_size: int
) -> np.ndarray:
    """Token ids that follow ``prompt`` [T], up to and without a stop id.

    vocab_size: ids from there on have no text (a padded head) and are never drawn. Raises UserError where
    prompt and tokens do not fit the model's position table.
    """
    slots = len(prompt) + sampling.max_tokens
    if not len(prompt):
        raise UserError("The prompt is empty: give at least one token.")
    if isinstance(model.position, Learned) and slots > model.position.max_length:
        raise UserError(
            f"A prompt of {len(prompt)} tokens and {sampling.max_tokens} more do not fit the model's table of "
            f"{model.position.max_length} positions: ask for fewer."
        )
    cache = model.empty_cache(batch=1, slots=slots, precision=policy.module.precision)
    logits, cache = _extend(policy, jnp.asarray(prompt, jnp.int32)[None, :], cache)
    found: list[int] = []
    for index in range(sampling.max_tokens):
        token = int(_draw(logits, jax.random.fold_in(key, index), sampling.temperature, vocab_size))
        if token in sampling.stop:
            break
        found.append(token)
        logits, cache = _extend(policy, jnp.full((1, 1), token, jnp.int32), cache)
    return np.asarray(found, np.int32)


@functools.partial(jax.jit, donate_argnums=2)
def _extend(policy: Bound, tokens_BT: Array, cache: Cache) -> tuple[Array, Cache]:
    """Logits [B, V] after the last of the tokens, and the cache with them in it."""
    offsets = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    batch = {
        "tokens": tokens_BT,
        "positions": cache.length[:, None] + offsets[None, :],
        "segment_ids": jnp.ones_like(tokens_BT),
    }
    output = policy.forward(batch, cache)
    return policy.logits(output.hidden[:, -1]), output.cache


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(logits_BV: Array, key: Array, temperature: float, vocab_size: int) -> Array:
    logits_V = logits_BV[0, :vocab_size].astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits_V)
    return jax.random.categorical(key, logits_V / temperature)
