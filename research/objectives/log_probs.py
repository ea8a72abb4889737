# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens, and the entropy of what they were drawn from, in chunks of tokens.

The logits [tokens, vocabulary] never stand in memory whole: the backward pass forms each chunk's again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.core.sharding import gathered, mesh_axes, partition_spec, ways
from research.core.types import Array, Head
from research.objectives.chunks import joined, split


class TokenLogProbs(NamedTuple):
    """Of each token, in float32: log_probs [B, C], in nats, and the entropy [B, C] of its distribution."""

    log_probs: Array
    entropy: Array


def token_log_probs(
    head: Head, hidden_BCD: Array, targets_BC: Array, temperature_BC: Array, *, chunk: int = 512
) -> TokenLogProbs:
    """Of the targets, under the softmax of the logits over each token's temperature: that of the sampler.

    chunk: tokens at a time on one device (0: all at once, the plain form). On a mesh every device takes its share of
    the tokens and fetches the head once.
    """
    arrays, mesh = (hidden_BCD, targets_BC, 1 / temperature_BC), jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or hidden_BCD.shape[0] % ways("batch"):
        return _in_chunks(chunk, head.cast(), *arrays)
    rows, columns = (mesh_axes(partition_spec((axis,))[0]) for axis in ("batch", "head_sequence"))
    length, specs, share = targets_BC.shape[1], head.specs(), PartitionSpec(rows, columns)
    padding = -length % ways("head_sequence")

    def local(head: Head, *arrays: Array) -> TokenLogProbs:
        return _in_chunks(chunk, jax.tree.map(gathered, head.cast(), specs), *arrays)

    padded = [jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in arrays]
    run = jax.shard_map(local, in_specs=(specs, share, share, share), out_specs=share, check_vma=False)
    found = run(head, *padded)
    return TokenLogProbs(*(x[:, :length] for x in found))


def _in_chunks(chunk: int, head: Head, hidden_BCD: Array, *tokens_BC: Array) -> TokenLogProbs:
    parts = split(chunk, hidden_BCD, *tokens_BC)
    if len(parts[0]) == 1:
        return _of_chunk(head, hidden_BCD, *tokens_BC)

    @jax.checkpoint
    def body(_: None, part: tuple[Array, ...]) -> tuple[None, TokenLogProbs]:
        return None, _of_chunk(head, *part)

    _, found = jax.lax.scan(body, None, parts)
    return TokenLogProbs(*(joined(x, *hidden_BCD.shape[:2]) for x in found))


def _of_chunk(head: Head, hidden: Array, targets: Array, sharpness: Array) -> TokenLogProbs:
    """sharpness: one over the temperature, so that padding with zeros does no harm."""
    logits = head(hidden).astype(jnp.float32) * sharpness[..., None]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    entropy = log_z - jnp.sum(jnp.exp(logits - log_z[..., None]) * logits, axis=-1)
    return TokenLogProbs(chosen - log_z, entropy)
