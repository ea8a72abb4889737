# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy, in chunks of tokens from the final hidden state.

The logits [tokens, vocabulary] never stand in memory whole: each chunk's loss and its gradients (with respect
to the hidden state and to the head's parameters) are formed together in the forward pass, so that nothing is
computed twice and the backward pass only multiplies by its cotangent.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from research.core.sharding import gathered, mesh_axes, partition_spec, ways
from research.core.types import Array, Batch, Head, Loss, Policy, Term, UserError, WeightedSum
from research.objectives.chunks import joined, split


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
    ahead: weight of the mean cross-entropy of the tokens further ahead that the model predicts (DeepSeek-V3, 2024,
        eq. 25), where it predicts any. Such a token counts where the token in hand does, in its own document alone.
    """

    z_loss: float = 0.0
    chunk: int = 512
    ahead: float = 0.3

    def __post_init__(self) -> None:
        if self.chunk < 0 or not self.z_loss >= 0 or not self.ahead >= 0:
            raise UserError(
                f"chunk, z_loss and ahead must be at least 0; given {self.chunk}, {self.z_loss} and {self.ahead}."
            )

    def check(self, experiment: Any) -> None:
        """Raises UserError where the experiment's source has no target for each token."""
        source, shapes = experiment.source, experiment.source.batch_shapes()
        if "targets" not in shapes or shapes["targets"].shape != shapes["tokens"].shape:
            raise UserError(
                f"NextToken needs a target for each token of a row, and {type(source).__name__} has none, or for "
                "responses alone: set objective to Grpo(...) or Ppo(...)."
            )

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
        for steps, further_BTD in enumerate(output.ahead, start=1):
            targets_BT, mine_BT = further(batch, weights_BT, steps)
            more = token_sums(policy.head(), further_BTD, targets_BT, mine_BT, z_loss=self.z_loss, chunk=self.chunk)
            total = jnp.sum(mine_BT)
            terms[f"ahead{steps}"] = Term(self.ahead / len(output.ahead), WeightedSum(more.loss, total))
            metrics[f"cross_entropy_ahead{steps}"] = WeightedSum(more.cross_entropy, total)
        return Loss(terms=terms, metrics=metrics, stats=output.stats)


def further(batch: Batch, weights_BT: Array, steps: int) -> tuple[Array, Array]:
    """The targets so many tokens further, and their weights: those of the targets themselves and of the tokens that
    predict them, zero where these are of two documents."""

    def shifted(x_BT: Array) -> Array:
        return jnp.pad(x_BT[:, steps:], ((0, 0), (0, min(steps, x_BT.shape[1]))))

    together = shifted(batch["segment_ids"]) == batch["segment_ids"]
    return shifted(batch["targets"]), weights_BT * shifted(weights_BT) * together


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

    head: maps hidden [..., D] to logits [..., V]; hidden [B, T, D]; targets and weights [B, T].
    The value and the gradients with respect to head and hidden equal those of the plain form.

    On a mesh every device takes its share of the tokens, fetches the head once, and adds up its gradient over all of
    its chunks before the devices add up theirs: left to the compiler, both would be done for every chunk.
    """
    return _sums(z_loss, chunk, head, hidden_BTD, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(z_loss: float, chunk: int, head: Head, hidden: Array, targets: Array, weights: Array) -> TokenSums:
    return _over_mesh(functools.partial(_values, z_loss, chunk), head, hidden, targets, weights)


def _forward(
    z_loss: float, chunk: int, head: Head, hidden: Array, targets: Array, weights: Array
) -> tuple[TokenSums, tuple]:
    run = functools.partial(_values_and_gradients, z_loss, chunk)
    sums, head_gradient, hidden_gradient = _over_mesh(run, head, hidden, targets, weights, gradient=True)
    return sums, (head_gradient, hidden_gradient, jax.tree.map(lambda p: jnp.zeros((), p.dtype), head))


def _backward(z_loss: float, chunk: int, saved: tuple, cotangent: TokenSums) -> tuple:
    del z_loss, chunk
    head_gradient, hidden_gradient, dtypes = saved
    scale = cotangent.loss
    head = jax.tree.map(lambda g, like: (g * scale).astype(like.dtype), head_gradient, dtypes)
    return head, hidden_gradient * scale.astype(hidden_gradient.dtype), None, None


_sums.defvjp(_forward, _backward)


def _over_mesh(run: Callable[..., Any], head: Head, hidden: Array, *tokens: Array, gradient: bool = False) -> Any:
    """``run`` on all tokens, or on each device's share of them: rows as the batch lies, columns over the other axes.

    It gives sums, and with ``gradient`` the gradients of head and hidden too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, columns = (mesh_axes(partition_spec((axis,))[0]) for axis in ("batch", "head_sequence"))
    if mesh.empty or mesh.size == 1 or hidden.shape[0] % ways("batch"):
        return run(head.cast(), hidden, *tokens)
    length = hidden.shape[1]
    padding = -length % ways("head_sequence")
    specs, share = head.specs(), PartitionSpec(rows, columns)

    def local(head: Head, *arrays: Array) -> Any:
        used = head.cast()
        found = run(jax.tree.map(gathered, used, specs), *arrays)
        if not gradient:
            return jax.lax.psum(found, mesh.axis_names)
        sums, d_head, d_hidden = found
        # summed over chunks in float32, over devices in the dtype of the product, as every gradient of a weight is
        d_head = jax.tree.map(lambda d, w, spec: scattered(d.astype(w.dtype), spec), d_head, used, specs)
        # the barrier: else the whole head's gradient may wait in memory until the rest of the model is done
        return jax.lax.psum(sums, mesh.axis_names), *jax.lax.optimization_barrier((d_head, d_hidden))

    def scattered(d_w: Array, spec: PartitionSpec) -> Array:
        """The sum over all devices, of which each keeps the part that it holds of the parameter."""
        for dim, names in enumerate(spec):
            if names is not None:
                d_w = jax.lax.psum_scatter(d_w, names, scatter_dimension=dim, tiled=True)
        named = {name for entry in spec for name in mesh_axes(entry)}
        return jax.lax.psum(d_w, tuple(name for name in mesh.axis_names if name not in named))

    padded = [jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, *tokens)]
    out = (PartitionSpec(), specs, share) if gradient else PartitionSpec()
    found = jax.shard_map(local, in_specs=(specs, share, share, share), out_specs=out, check_vma=False)(head, *padded)
    return (*found[:2], found[2][:, :length]) if gradient else found


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


def _values(z_loss: float, chunk: int, head: Head, *arrays: Array) -> TokenSums:
    def body(total: TokenSums, part: tuple[Array, ...]) -> tuple[TokenSums, None]:
        hidden, targets, weights = part
        sums, _ = _chunk_sums(z_loss, head(hidden), targets, weights, gradient=False)
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(body, TokenSums(*[jnp.zeros(())] * 4), split(chunk, *arrays))[0]


def _values_and_gradients(
    z_loss: float, chunk: int, head: Head, hidden: Array, *tokens: Array
) -> tuple[TokenSums, Any, Array]:
    """The sums, and the loss's gradients with respect to the head's parameters (float32) and to hidden."""

    def body(carry: tuple, part: tuple[Array, ...]) -> tuple[tuple, Array]:
        total, d_head = carry
        part_hidden, part_targets, part_weights = part
        logits, pull_back = jax.vjp(lambda head, x: head(x), head, part_hidden)
        sums, d_logits = _chunk_sums(z_loss, logits, part_targets, part_weights, gradient=True)
        d_part, d_hidden = pull_back(d_logits.astype(logits.dtype))
        d_head = jax.tree.map(lambda total, d: total + d.astype(total.dtype), d_head, d_part)
        return (jax.tree.map(jnp.add, total, sums), d_head), d_hidden

    start = TokenSums(*[jnp.zeros(())] * 4), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), head)
    parts = split(chunk, hidden, *tokens)
    (sums, d_head), d_parts = jax.lax.scan(body, start, parts)
    return sums, d_head, joined(d_parts, *hidden.shape[:2])
