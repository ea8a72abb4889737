# SPDX-License-Identifier: Apache-2.0
"""Pipeline stages: layers on different devices, microbatches one after the other through them.

The schedule is circular (Narayanan et al. 2021, section 2.2, interleaved): with R rounds, stage s holds the layers
r S + s, and a microbatch passes all stages R times, so that of M R + S - 1 ticks only S - 1 find a stage idle. One
``lax.scan`` over ticks; in each, all stages compute at once as one ``vmap`` whose axis is the mesh's "stage", and
hand on what they have by a rotation. Backward, the scan is walked in reverse: first in, last out (Huang et al. 2019).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research.core import sharding
from research.core.sharding import RULES, Split, constrain, microbatch
from research.core.types import Array, Params, UserError
from research.models.tokens import Tokens

AXIS = "stage"
WEIGHTS = "stage_weights"
Layer = Callable[[Params, Params, Array, Array, Tokens], tuple[Array, Params]]


@dataclass(frozen=True)
class Pipeline:
    """How stages work, on a mesh that has them. microbatches: a multiple of the stages (0: as many). rounds: how often
    each passes all stages (0: as often as there are layers for; 1 is GPipe)."""

    microbatches: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        if self.microbatches < 0 or self.rounds < 0:
            raise UserError(
                f"pipeline.microbatches and pipeline.rounds must be at least 0; given {self.microbatches} and "
                f"{self.rounds}."
            )

    def splits(self, *, rows: int, repeats: int) -> list[Split]:
        """What stages need of a microbatch of the optimizer's step and of the repeated layers."""
        layers = Split(f"the {repeats} repeated layers", repeats, (AXIS,), multiple=max(1, self.rounds))
        handed, count = f"the {rows} rows that stages hand on", self.microbatches
        if not count:
            return [layers, Split(handed, rows, (*RULES["batch"], AXIS))]
        return [
            layers,
            Split(f"the {count} microbatches of a pipeline", count, (AXIS,)),
            Split(handed, rows, RULES["batch"], multiple=count, wherever=AXIS),
        ]

    def schedule(self, *, rows: int, repeats: int) -> tuple[int, int] | None:
        """(microbatches, rounds) on the mesh in scope; None where there are no stages, or where the rows of an
        evaluation or the layers of a frozen model cannot be shared out: then all devices go through all layers. Of a
        model in training ``splits`` has refused such a mesh."""
        stages = sharding.ways(AXIS)
        count = self.microbatches or stages
        uneven = rows % (count * sharding.ways("batch")) or repeats % (stages * max(1, self.rounds)) or count % stages
        if stages == 1 or uneven:
            return None
        return count, self.rounds or repeats // stages


def pipelined(
    layer: Layer,
    params: Params,
    buffers: Params,
    axes: Any,
    x_BTD: Array,
    indices: Array,
    tokens: Tokens,
    *,
    schedule: tuple[int, int],
    policy: Any,
) -> tuple[Array, Params]:
    """x [B, T, D] through layers with params and buffers [L, ...] -> [B, T, D] and the layers' statistics [L, ...],
    summed over the microbatches.

    axes: logical axes of params, a tree of tuples. indices [L]. policy: what the backward pass need not form again
    (``jax.checkpoint``).
    """
    stages = sharding.ways(AXIS)
    count, rounds = schedule
    where = jnp.arange(stages)

    def staged(w: Array, names: tuple[str | None, ...] = ()) -> Array:
        """[L, ...] -> [S, R, layers of a stage, ...]: layer (r S + s) n + i at [s, r, i]."""
        w = w.reshape(rounds, stages, -1, *w.shape[1:]).swapaxes(0, 1)
        return constrain(w, "stage", None, None, *names) if names else w

    given = jax.tree.map(lambda w, names: staged(w, names[1:]), params, axes), jax.tree.map(staged, buffers)
    given = (*given, staged(indices))
    x_MBTD = microbatch(x_BTD, count)
    key, tokens = tokens.key, jax.tree.map(lambda x: microbatch(x, count), tokens._replace(key=None))
    spread = lambda x: constrain(x, "stage", "batch", "residual_sequence", "act_embed")  # noqa: E731

    @functools.partial(jax.checkpoint, policy=policy)
    def stage(given: Any, turn: Array, x_BTD: Array, tokens: Tokens) -> tuple[Array, Params]:
        mine = jax.tree.map(lambda w: checkpoint_name(jax.lax.dynamic_index_in_dim(w, turn, 0, False), WEIGHTS), given)

        def one(x_BTD: Array, mine: Any) -> tuple[Array, Params]:
            params, buffers, index = mine
            return layer(params, buffers, x_BTD, index, tokens._replace(key=key))

        return jax.lax.scan(one, x_BTD, mine)

    def tick(carry: tuple[Array, Array], now: Array) -> tuple[tuple[Array, Array], Params]:
        x_SBTD, waiting_SMBTD = carry
        entering = jax.lax.dynamic_index_in_dim(waiting_SMBTD, now % count, 1, False)
        x_SBTD = spread(jnp.where(_first(where, x_SBTD), entering, x_SBTD))
        done = now - where  # microbatches that each stage has finished, over all rounds
        busy = (done >= 0) & (done < count * rounds)
        turn = jnp.clip(done // count, 0, rounds - 1)
        theirs = jax.tree.map(lambda x: jnp.take(x, done % count, axis=0), tokens)
        y_SBTD, found = jax.vmap(stage, spmd_axis_name=AXIS)(given, turn, x_SBTD, theirs)
        found = jax.tree.map(lambda x: jnp.where(busy.reshape(-1, *[1] * (x.ndim - 1)), x, 0), found)
        y_SBTD = spread(jnp.roll(y_SBTD, 1, axis=0))  # the last stage's to the first, where it waits for its turn
        place = (now - stages + 1) % count
        kept = jax.lax.dynamic_index_in_dim(waiting_SMBTD, place, 1, False)
        leaving = jnp.where(now >= stages - 1, y_SBTD, kept)
        waiting = jax.lax.dynamic_update_index_in_dim(waiting_SMBTD, leaving, place, 1)
        return (y_SBTD, waiting), found

    waiting = jnp.where(_first(where, x_MBTD[None]), x_MBTD[None], 0)  # at the first stage
    waiting = constrain(waiting, "stage", None, "batch", "residual_sequence", "act_embed")
    start = spread(jnp.zeros((stages, *x_MBTD.shape[1:]), x_BTD.dtype)), waiting
    (_, waiting), found = jax.lax.scan(tick, start, jnp.arange(count * rounds + stages - 1))
    y_MBTD = jnp.sum(jnp.where(_first(where, waiting), waiting, 0), axis=0)
    y_BTD = constrain(y_MBTD.swapaxes(0, 1).reshape(x_BTD.shape), "batch", "residual_sequence", "act_embed")
    return y_BTD, jax.tree.map(lambda x: _by_layer(x, stages, count, rounds), found)


def _first(where: Array, like: Array) -> Array:
    return (where == 0).reshape(-1, *[1] * (like.ndim - 1))


def _by_layer(found: Array, stages: int, count: int, rounds: int) -> Array:
    """Statistics [ticks, S, layers of a stage, ...] -> [L, ...]: stage s did its work from tick s on."""
    each = [
        found[s : s + count * rounds, s].reshape(rounds, count, *found.shape[2:]).sum(axis=1) for s in range(stages)
    ]
    return jnp.stack(each, axis=1).reshape(-1, *found.shape[3:])
