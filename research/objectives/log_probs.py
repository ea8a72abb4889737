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
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or hidden_BCD.shape[0] % ways("batch"):
        return _in_chunks(chunk, head.cast(), hidden_BCD, targets_BC, temperature_BC)
    rows, columns = (mesh_axes(partition_spec((axis,))[0]) for axis in ("batch", "head_sequence"))
    length, specs, share = targets_BC.shape[1], head.specs(), PartitionSpec(rows, columns)
    padding = ((0, 0), (0, -length % ways("head_sequence")))

    def local(head: Head, *arrays: Array) -> TokenLogProbs:
        return _in_chunks(chunk, jax.tree.map(gathered, head.cast(), specs), *arrays)

    hidden_BCD = jnp.pad(hidden_BCD, (*padding, (0, 0)))
    targets_BC, temperature_BC = jnp.pad(targets_BC, padding), jnp.pad(temperature_BC, padding, constant_values=1.0)
    found = jax.shard_map(local, in_specs=(specs, share, share, share), out_specs=share, check_vma=False)(
        head, hidden_BCD, targets_BC, temperature_BC
    )
    return TokenLogProbs(*(x[:, :length] for x in found))


def _in_chunks(chunk: int, head: Head, hidden_BCD: Array, targets_BC: Array, temperature_BC: Array) -> TokenLogProbs:
    batch, length = targets_BC.shape
    wanted = min(length, max(1, chunk // batch)) if chunk else length
    count = -(-length // wanted)
    if count == 1:
        return _of_chunk(head, hidden_BCD, targets_BC, temperature_BC)

    def parts(x: Array, fill: float = 0) -> Array:
        """[B, C, ...] -> [chunks, B, tokens, ...]"""
        padding = ((0, 0), (0, count * wanted - length)) + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, count, wanted, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(_: None, part: tuple[Array, Array, Array]) -> tuple[None, TokenLogProbs]:
        return None, _of_chunk(head, *part)

    given = parts(hidden_BCD), parts(targets_BC), parts(temperature_BC, 1.0)
    _, found = jax.lax.scan(body, None, given)
    return TokenLogProbs(*(jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in found))


def _of_chunk(head: Head, hidden: Array, targets: Array, temperature: Array) -> TokenLogProbs:
    logits = head(hidden).astype(jnp.float32) / temperature[..., None]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    entropy = log_z - jnp.sum(jnp.exp(logits - log_z[..., None]) * logits, axis=-1)
    return TokenLogProbs(chosen - log_z, entropy)
