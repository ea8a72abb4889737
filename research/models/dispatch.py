# SPDX-License-Identifier: Apache-2.0
"""From tokens to experts and back: sorted rows without drops, or buffers of fixed capacity."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.core.types import Array
from research.models.routers import rank

# (rows sorted by expert [M, D], their gates [M], group sizes [E]) -> [M, D], and (buffers [G, E, C, D], their gates
# [G, E, C]) -> the same shape. Experts multiply by the gate within, before their last product: the gate's gradient
# then asks for none of their results, and a backward pass that recomputes need not form them.
Experts = Callable[[Array, Array, Array], Array]
Buffered = Callable[[Array, Array], Array]


class Assignments(NamedTuple):
    """Which token of a group goes to which expert, [G, A] each: gates in float32, kept False where it does not."""

    token: Array
    expert: Array
    gate: Array
    kept: Array


def flat(routing: Assignments, tokens: int) -> Assignments:
    """Assignments of all groups in one list [G * A], tokens counted over the groups of ``tokens`` each."""
    rows = routing.token + tokens * jnp.arange(routing.token.shape[0])[:, None]
    return Assignments(*(x.reshape(-1) for x in routing._replace(token=rows)))


def by_sorting(x_GTD: Array, routing: Assignments, experts: Experts, *, num_experts: int, align: int) -> Array:
    """Every kept assignment, in rows sorted by expert: nothing is dropped but what the router dropped.

    x [G, T, D]; routing [G, A]. ``experts`` gets M rows, each expert's padded to a multiple of ``align``.
    """
    groups, tokens, width = x_GTD.shape
    row, expert, gate, kept = flat(routing, tokens)
    expert = jnp.where(kept, expert, num_experts)
    sizes_E = jnp.sum(expert[:, None] == jnp.arange(num_experts)[None, :], axis=0)
    padded_E = -(-sizes_E // align) * align
    rows = -(-(expert.size + num_experts * (align - 1)) // align) * align
    order = jnp.argsort(expert, stable=True)
    expert_sorted = expert[order]
    shift_E = jnp.cumsum(padded_E) - padded_E - (jnp.cumsum(sizes_E) - sizes_E)
    kept = expert_sorted < num_experts
    place = jnp.where(
        kept, jnp.arange(expert.size) + shift_E[jnp.minimum(expert_sorted, num_experts - 1)], rows
    )  # the sorted assignment's row; beyond the rows where it is not kept
    source = jnp.full((rows,), groups * tokens).at[place].set(row[order], mode="drop")
    gate_M = jnp.zeros((rows,), jnp.float32).at[place].set(gate[order], mode="drop")
    x_MD = jnp.take(x_GTD.reshape(-1, width), source, axis=0, mode="fill", fill_value=0)
    y_MD = experts(x_MD, gate_M, padded_E)
    return jnp.zeros((groups * tokens, width), y_MD.dtype).at[source].add(y_MD, mode="drop").reshape(x_GTD.shape)


def by_buffers(x_GTD: Array, routing: Assignments, experts: Buffered, *, num_experts: int, capacity: int) -> Array:
    """Buffers [G, E, C, D] with one slot for each token that an expert takes of a group.

    An expert has no more than ``capacity`` kept assignments in a group.
    """
    groups, tokens, width = x_GTD.shape

    def slots(one: Assignments) -> tuple[Array, Array]:
        slot = one.expert * capacity + rank(one.expert, one.kept, num_experts=num_experts)
        place = jnp.where(one.kept, slot, num_experts * capacity)
        source = jnp.full((num_experts * capacity,), tokens).at[place].set(one.token, mode="drop")
        return source, jnp.zeros(source.shape, jnp.float32).at[place].set(one.gate, mode="drop")

    source, gate = jax.vmap(slots)(routing)
    take = jax.vmap(lambda x_TD, index: jnp.take(x_TD, index, axis=0, mode="fill", fill_value=0))
    x_GECD = take(x_GTD, source).reshape(groups, num_experts, capacity, width)
    y_GSD = experts(x_GECD, gate.reshape(groups, num_experts, capacity)).reshape(groups, -1, width)
    add = jax.vmap(lambda index, y_SD: jnp.zeros((tokens, width), y_SD.dtype).at[index].add(y_SD, mode="drop"))
    return add(source, y_GSD)
