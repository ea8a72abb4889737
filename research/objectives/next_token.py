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

from research.core.types import Array, Batch, Loss, Policy, Term, WeightedSum
from research.models import ops

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

    def __call__(self, policy: Policy, frozen: Mapping[str, Policy], batch: Batch, key: Array) -> Loss:
        del frozen, key
        hidden_BTD = policy.forward(batch).hidden
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
        return Loss(terms={"next_token": Term(1.0, WeightedSum(sums.loss, total))}, metrics=metrics, stats={})


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
    columns = _columns_per_chunk(hidden_BTD.shape[0], hidden_BTD.shape[1], chunk)
    return _chunked(columns, z_loss, head, hidden_BTD, targets_BT, weights_BT)


def _columns_per_chunk(batch: int, length: int, chunk: int) -> int:
    """How many of the T columns go into one chunk: a divisor of T, so that B stays split over the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    wanted = chunk * ways // batch if chunk else length
    return max(c for c in range(1, length + 1) if length % c == 0 and c <= max(1, wanted))


def _chunk_sums(head: Head, z_loss: float, hidden: Array, targets: Array, weights: Array) -> tuple[Array, TokenSums]:
    logits = ops.settled(head(hidden)).astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum((log_z - chosen) * weights)
    z = jnp.sum(jnp.square(log_z) * weights)
    # the target is the most likely token where no logit is above its own: a pass over logits, not an argmax
    correct = jnp.sum((chosen >= jnp.max(logits, axis=-1)) * weights)
    loss = cross_entropy + z_loss * z if z_loss else cross_entropy
    return loss, TokenSums(loss, cross_entropy, z, correct)


def _split(x: Array, columns: int) -> Array:
    """[B, T, ...] -> [chunks, B, columns, ...]."""
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, length // columns, columns, *x.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(columns: int, z_loss: float, head: Head, hidden: Array, targets: Array, weights: Array) -> TokenSums:
    def body(total: TokenSums, part: tuple[Array, Array, Array]) -> tuple[TokenSums, None]:
        return jax.tree.map(jnp.add, total, _chunk_sums(head, z_loss, *part)[1]), None

    parts = tuple(_split(x, columns) for x in (hidden, targets, weights))
    return jax.lax.scan(body, TokenSums(*[jnp.zeros(())] * 4), parts)[0]


def _chunked_forward(
    columns: int, z_loss: float, head: Head, hidden: Array, targets: Array, weights: Array
) -> tuple[TokenSums, tuple]:
    def body(carry: tuple, part: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
        total, head_gradient = carry
        part_hidden, part_targets, part_weights = part
        gradients, sums = jax.grad(
            lambda head, x: _chunk_sums(head, z_loss, x, part_targets, part_weights),
            argnums=(0, 1),
            has_aux=True,
        )(head, part_hidden)
        accumulated = jax.tree.map(lambda a, g: a + g.astype(a.dtype), head_gradient, gradients[0])
        return (jax.tree.map(jnp.add, total, sums), accumulated), gradients[1]

    parts = tuple(_split(x, columns) for x in (hidden, targets, weights))
    start = TokenSums(*[jnp.zeros(())] * 4), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), head)
    (sums, head_gradient), hidden_gradient = jax.lax.scan(body, start, parts)
    hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1).reshape(hidden.shape)
    dtypes = jax.tree.map(lambda p: jnp.zeros((), p.dtype), head)
    return sums, (head_gradient, hidden_gradient, dtypes)


def _chunked_backward(columns: int, z_loss: float, saved: tuple, cotangent: TokenSums) -> tuple:
    del columns, z_loss
    head_gradient, hidden_gradient, dtypes = saved
    scale = cotangent.loss
    head = jax.tree.map(lambda g, like: (g * scale).astype(like.dtype), head_gradient, dtypes)
    return head, hidden_gradient * scale.astype(hidden_gradient.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
