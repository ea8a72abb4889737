# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy, in chunks of tokens from the final hidden state.

The logits [tokens, vocabulary] never stand in memory whole: each chunk's loss and its gradients (with respect
to the hidden state and to the head's parameters) are formed together in the forward pass, so that nothing is
computed twice and the backward pass only multiplies by its cotangent.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.core.sharding import constrain, ways
from research.core.types import Array, Batch, Loss, Policy, Term, UserError, WeightedSum

Head = Callable[[Array], Array]


class TokenSums(NamedTuple):
    """Weighted sums over tokens. Only ``loss`` carries a gradient."""

    loss: Array  # cross-entropy plus z_loss times squared log normaliser
    cross_entropy: Array  # nats
    z: Array  # squared log normaliser
    correct: Array  # the most likely token is the target


@dataclass(frozen=True)
class NextToken:
    """Mean cross-entropy of the next token over the tokens with a weight.

    z_loss: coefficient of log(Z)^2, which keeps the logits' normaliser near one (Chowdhery et al. 2022, section 5).
    chunk: tokens per chunk on one shard of the batch (0: all at once, the plain form).
    """

    z_loss: float = 0.0
    chunk: int = 512

    def __post_init__(self) -> None:
        if self.chunk < 0 or not self.z_loss >= 0:
            raise UserError(f"chunk and z_loss must be at least 0; given {self.chunk} and {self.z_loss}.")

    def __call__(self, policy: Policy, frozen: Mapping[str, Policy], batch: Batch, key: Array | None) -> Loss:
        del frozen
        output = policy.forward(batch, key=key)
        hidden_BTD = output.hidden
        weights_BT = batch["weights"].astype(jnp.float32)
        sums = token_sums(policy.head(), hidden_BTD, batch["targets"], weights_BT, z_loss=self.z_loss, chunk=self.chunk)
        total = jnp.sum(weights_BT)
        metrics = {
            "cross_entropy": WeightedSum(sums.cross_entropy, total),
            "accuracy": WeightedSum(sums.correct, total),
            "log_z_squared": WeightedSum(sums.z, total),
        }
        if "target_bytes" in batch:
            bits = sums.cross_entropy / jnp.log(2.0)
            metrics["bits_per_byte"] = WeightedSum(bits, jnp.sum(batch["target_bytes"]))
        terms = {"next_token": Term(1.0, WeightedSum(sums.loss, total)), **output.aux}
        return Loss(terms=terms, metrics=metrics, stats=output.stats)


def token_sums(
    head: Head,
    hidden_BTD: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    z_loss: float = 0.0,
    chunk: int = 512,
) -> TokenSums:
    """Sums over tokens of the loss and its companions, in float32.

    head: a pytree that maps hidden [..., D] to logits [..., V]; hidden [B, T, D]; targets and weights [B, T].
    The value and the gradients with respect to head and hidden equal those of the plain form.
    """
    columns, padding = _chunking(hidden_BTD.shape[0], hidden_BTD.shape[1], chunk)
    if padding:
        hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
        targets_BT, weights_BT = (jnp.pad(x, ((0, 0), (0, padding))) for x in (targets_BT, weights_BT))
    return _chunked(columns, z_loss, head, hidden_BTD, targets_BT, weights_BT)


def _chunking(batch: int, length: int, chunk: int) -> tuple[int, int]:
    """How many of the T columns go into one chunk, so that B and T stay split over the mesh, and how many to add."""
    spread = ways("sequence")
    shards = ways("batch") * spread
    wanted = min(length, max(1, chunk * shards // batch)) if chunk else length
    chunks = -(-length // wanted)
    columns = -(-length // (chunks * spread)) * spread
    return columns, chunks * columns - length


def _chunk_sums(
    z_loss: float, logits: Array, targets: Array, weights: Array, *, gradient: bool
) -> tuple[TokenSums, Array | None]:
    """Sums over one chunk and, where asked for, the gradient of the loss with respect to its logits [..., V]."""
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    log_z = (top + jnp.log(total))[..., 0]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    cross_entropy = jnp.sum((log_z - chosen[..., 0]) * weights)
    z = jnp.sum(jnp.square(log_z) * weights)
    correct = jnp.sum((chosen >= top)[..., 0] * weights)
    sums = TokenSums(cross_entropy + z_loss * z, cross_entropy, z, correct)
    if not gradient:
        return sums, None
    scale = weights * (1 + 2 * z_loss * log_z) if z_loss else weights
    hit = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,)) == targets[..., None]
    d_logits = exponentials * (scale[..., None] / total) - jnp.where(hit, weights[..., None], 0.0)
    return sums, jax.lax.optimization_barrier(d_logits)  # else each product that reads it would form it again


def _split(x: Array, columns: int) -> Array:
    """[B, T, ...] -> [chunks, B, columns, ...], each chunk spread over all shards of the sequence."""
    spread = ways("sequence")
    parts = x.reshape(x.shape[0], spread, -1, columns // spread, *x.shape[2:])
    parts = jnp.moveaxis(parts, 2, 0).reshape(-1, x.shape[0], columns, *x.shape[2:])
    return constrain(parts, None, "batch", "sequence", *[None] * (x.ndim - 2))


def _join(parts: Array) -> Array:
    """``_split``'s inverse: [chunks, B, columns, D] -> [B, T, D]."""
    spread = ways("sequence")
    chunks, batch, columns, width = parts.shape
    x = jnp.moveaxis(parts.reshape(chunks, batch, spread, columns // spread, width), 0, 2)
    return constrain(x.reshape(batch, -1, width), "batch", "sequence", "act_embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(columns: int, z_loss: float, head: Head, hidden: Array, targets: Array, weights: Array) -> TokenSums:
    def body(total: TokenSums, part: tuple[Array, Array, Array]) -> tuple[TokenSums, None]:
        part_hidden, part_targets, part_weights = part
        sums, _ = _chunk_sums(z_loss, head(part_hidden), part_targets, part_weights, gradient=False)
        return jax.tree.map(jnp.add, total, sums), None

    parts = tuple(_split(x, columns) for x in (hidden, targets, weights))
    return jax.lax.scan(body, TokenSums(*[jnp.zeros(())] * 4), parts)[0]


def _chunked_forward(
    columns: int, z_loss: float, head: Head, hidden: Array, targets: Array, weights: Array
) -> tuple[TokenSums, tuple]:
    def body(carry: tuple, part: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
        total, d_head = carry
        part_hidden, part_targets, part_weights = part
        logits, pull_back = jax.vjp(lambda head, x: head(x), head, part_hidden)
        sums, d_logits = _chunk_sums(z_loss, logits, part_targets, part_weights, gradient=True)
        d_part, d_hidden = pull_back(d_logits.astype(logits.dtype))
        d_head = jax.tree.map(lambda total, d: total + d.astype(total.dtype), d_head, d_part)
        return (jax.tree.map(jnp.add, total, sums), d_head), d_hidden

    parts = tuple(_split(x, columns) for x in (hidden, targets, weights))
    start = TokenSums(*[jnp.zeros(())] * 4), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), head)
    (sums, head_gradient), hidden_gradient = jax.lax.scan(body, start, parts)
    hidden_gradient = _join(hidden_gradient)
    dtypes = jax.tree.map(lambda p: jnp.zeros((), p.dtype), head)
    return sums, (head_gradient, hidden_gradient, dtypes)


def _chunked_backward(columns: int, z_loss: float, saved: tuple, cotangent: TokenSums) -> tuple:
    del columns, z_loss
    head_gradient, hidden_gradient, dtypes = saved
    scale = cotangent.loss
    head = jax.tree.map(lambda g, like: (g * scale).astype(like.dtype), head_gradient, dtypes)
    return head, hidden_gradient * scale.astype(hidden_gradient.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
