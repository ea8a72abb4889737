# SPDX-License-Identifier: Apache-2.0
"""Experts over a mesh: one ``shard_map`` in which tokens travel to their experts and back (Lepikhin et al. 2020).

Within it a device gathers its experts' matrices over the axes that only store them (fsdp), sends each token to the
devices of the "expert" axis that hold its experts, multiplies, sends the results back, and sums over "tensor".
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from research.core import sharding
from research.core.types import Array
from research.models import dispatch
from research.models.layers import PRODUCT
from research.models.routers import Routing

AXIS = "expert"
Weights = tuple[Array, ...]
Into, Out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")  # logical axes of the experts' matrices


class Layer(NamedTuple):
    """What an expert layer computes, on one device.

    sorted: (rows [M, D] sorted by expert, their gates [M], group sizes [E], weights) -> [M, D]. buffered: ([G, E, C,
    D], gates [G, E, C], weights) -> [G, E, C, D]. capacity: slots of an expert's buffer in a group, 0 for sorted rows.
    by_token: a routing's assignments are k for each token, in order. align: what group sizes are padded to. keep:
    whether the products may be kept for the backward pass.
    """

    num_experts: int
    sorted: Callable[[Array, Array, Array, Weights], Array]
    buffered: Callable[[Array, Array, Weights], Array]
    capacity: int
    by_token: bool
    align: int
    platform: str
    keep: bool = True


def run(layer: Layer, x_BTD: Array, routing: Routing, weights: Weights, *, taken: tuple[str, ...] = ()) -> Array:
    """x [B, T, D], routing [B, A] of whole rows, weights [E, D, F] ... [E, F, D] -> [B, T, D].

    taken: mesh axes that a surrounding ``vmap`` has taken.
    """
    mesh = sharding.current_shape()
    gate, where = routing.gate, (routing.token, routing.expert, routing.kept)
    if not mesh or max(mesh.values()) == 1:
        return _compute(layer, x_BTD, gate, where, weights)
    row = sharding.partition_spec(("batch", "residual_sequence", None), without=taken)
    row = sharding.fitting_spec(x_BTD.shape, row, mesh)
    context = [axis for axis in sharding.mesh_axes(row[1]) if axis != "tensor"]
    if layer.by_token:  # [B, k, T], each device its own tokens' choices
        gate, where = jax.tree.map(lambda a: a.reshape(a.shape[0], -1, x_BTD.shape[1]), (gate, where))
        each = PartitionSpec(row[0], None, tuple(context) or None)
    else:
        each = PartitionSpec(row[0], None)
    specs = [sharding.partition_spec(Into, without=taken)] * (len(weights) - 1)
    specs.append(sharding.partition_spec(Out, without=taken))

    def local(x_BTD: Array, gate: Array, where: tuple[Array, ...], *weights: Array) -> Array:
        whole = functools.partial(sharding.gathered, keep=(AXIS, "tensor"))
        weights = tuple(whole(w, spec) for w, spec in zip(weights, specs, strict=True))
        if "tensor" in sharding.mesh_axes(row[1]):
            x_BTD = lax.all_gather(x_BTD, "tensor", axis=1, tiled=True)
        if layer.by_token:
            flat = lambda a: a.reshape(a.shape[0], -1)  # noqa: E731
            token = jnp.broadcast_to(jnp.arange(x_BTD.shape[1])[None, None, :], gate.shape)
            gate, where = flat(gate), (flat(token), *map(flat, where[1:]))
        elif context:
            token = where[0] - lax.axis_index(context[0]) * x_BTD.shape[1]
            mine = (token >= 0) & (token < x_BTD.shape[1])
            where = (jnp.where(mine, token, 0), where[1], where[2] & mine)
        y_BTD = _compute(layer, x_BTD, gate, where, weights, whole_rows=not context)
        if mesh["tensor"] == 1:
            return y_BTD
        if "tensor" in sharding.mesh_axes(row[1]):
            return lax.psum_scatter(y_BTD, "tensor", scatter_dimension=1, tiled=True)
        return lax.psum(y_BTD, "tensor")

    # gathered weights are never kept for the backward pass, nor is anything of an exchange, for its arrays have room
    # for the worst case
    exchanged = mesh[AXIS] > 1 and not layer.capacity
    policy = jax.checkpoint_policies.save_only_these_names(*([] if exchanged or not layer.keep else [PRODUCT]))
    local = jax.checkpoint(local, policy=policy)
    in_specs = (row, each, (each,) * 3, *specs)
    return jax.shard_map(local, in_specs=in_specs, out_specs=row, check_vma=False)(x_BTD, gate, where, *weights)


def _compute(
    layer: Layer, x_BTD: Array, gate: Array, where: tuple[Array, ...], weights: Weights, *, whole_rows: bool = True
) -> Array:
    """The layer on this device's rows, with the devices of the expert axis."""
    token, expert, kept = where
    routing = dispatch.Assignments(token=token, expert=expert, gate=gate, kept=kept)
    devices = sharding.current_shape().get(AXIS, 1)
    if layer.capacity and whole_rows:  # else no device knows a whole buffer: sorted rows are the same sum
        experts = lambda x, gate: layer.buffered(x, gate, weights)  # noqa: E731
        if devices > 1:
            experts = _traded(experts)
        return dispatch.by_buffers(x_BTD, routing, experts, num_experts=layer.num_experts, capacity=layer.capacity)
    experts = lambda x, gate, sizes: layer.sorted(x, gate, sizes, weights)  # noqa: E731
    if devices == 1:
        return dispatch.by_sorting(x_BTD, routing, experts, num_experts=layer.num_experts, align=layer.align)
    return _by_exchange(layer, x_BTD, routing, experts, devices)


def _traded(experts: dispatch.Buffered) -> dispatch.Buffered:
    """Each device's buffers [G, E, C, D] to the devices that hold the experts, and back."""

    def trade(x_GECD: Array, gate_GEC: Array) -> Array:
        given = (lax.all_to_all(x, AXIS, split_axis=1, concat_axis=0, tiled=True) for x in (x_GECD, gate_GEC))
        y = experts(*given)
        return lax.all_to_all(y, AXIS, split_axis=0, concat_axis=1, tiled=True)

    return trade


def _by_exchange(
    layer: Layer, x_BTD: Array, routing: dispatch.Assignments, experts: dispatch.Experts, devices: int
) -> Array:
    """Dropless over several devices, in as many parts of the tokens as there are devices.

    Any device may be asked for all tokens: a part's worst case takes the memory that the whole takes when the load
    is even. Each part is formed again in the backward pass, so that only one is held at a time.
    """
    batch, length, width = x_BTD.shape
    parts = devices if layer.by_token and length % devices == 0 else 1

    @jax.checkpoint
    def one(_: None, part: tuple[Array, dispatch.Assignments]) -> tuple[None, Array]:
        x, mine = part
        return None, _exchanged(layer, x, mine, experts, devices)

    if parts == 1:
        return one(None, (x_BTD, routing))[1]
    columns = length // parts

    def split(x: Array) -> Array:
        """[B, k * T, ...] -> [parts, B, k * columns, ...]."""
        y = x.reshape(batch, x.shape[1] // length, parts, columns, *x.shape[2:])
        return jnp.moveaxis(y, 2, 0).reshape(parts, batch, -1, *x.shape[2:])

    routing = jax.tree.map(split, routing)._replace(token=split(routing.token) % columns)
    _, y = lax.scan(one, None, (split(x_BTD), routing))
    return jnp.moveaxis(y, 0, 1).reshape(x_BTD.shape)


def _exchanged(
    layer: Layer, x_BTD: Array, routing: dispatch.Assignments, experts: dispatch.Experts, devices: int
) -> Array:
    here = layer.num_experts // devices
    width = x_BTD.shape[-1]
    row, expert, gate, kept = dispatch.flat(routing, x_BTD.shape[1])
    expert = jnp.where(kept, expert, layer.num_experts)
    order = jnp.argsort(expert, stable=True)
    counts_E = jnp.sum(expert[:, None] == jnp.arange(layer.num_experts)[None, :], axis=0, dtype=jnp.int32)
    counts_SDE = lax.all_gather(counts_E.reshape(devices, here), AXIS)  # sender, receiver, its experts
    sent_AD = jnp.take(x_BTD.reshape(-1, width), row[order], axis=0)
    exchange = Exchange.make(counts_SDE, rows=order.size, platform=layer.platform)
    x_RD, gate_R = exchange.send(sent_AD), exchange.send(gate[order])
    expert_R = exchange.experts(here)
    arrived = dispatch.Assignments(
        token=jnp.arange(x_RD.shape[0])[None],
        expert=jnp.minimum(expert_R, here - 1)[None],
        gate=gate_R[None],
        kept=(expert_R < here)[None],
    )
    y_RD = dispatch.by_sorting(x_RD[None], arrived, experts, num_experts=here, align=layer.align)[0]
    y_AD = exchange.back(y_RD, sent_AD.shape)
    mine = jnp.arange(order.size) < jnp.sum(counts_E)
    y_AD = jnp.where(mine[:, None], y_AD, 0)
    y = jnp.zeros((x_BTD.shape[0] * x_BTD.shape[1], width), y_AD.dtype).at[row[order]].add(y_AD)
    return y.reshape(x_BTD.shape)


class Exchange(NamedTuple):
    """Rows to the devices of the expert axis and back; rows are sorted by receiver, then by its expert.

    counts [S, D, E]: rows from each sender to each receiver by the receiver's expert. starts [S]: where on this
    device the rows of each sender lie. On TPUs only the rows that exist travel (``ragged_all_to_all``); elsewhere a
    sender's rows travel in a space for the worst case.
    """

    counts: Array
    starts: Array
    rows: int
    ragged: bool

    @staticmethod
    def make(counts_SDE: Array, *, rows: int, platform: str) -> "Exchange":
        ragged = platform == "tpu"
        devices = counts_SDE.shape[0]
        received = jnp.sum(counts_SDE, axis=2)[:, lax.axis_index(AXIS)]
        starts = jnp.cumsum(received) - received if ragged else rows * jnp.arange(devices)
        return Exchange(counts_SDE, starts.astype(jnp.int32), rows, ragged)

    @property
    def _offsets(self) -> tuple[Array, Array, Array]:
        """Rows [S, D] from each sender to each receiver; where they start at the sender, and at the receiver."""
        sizes = jnp.sum(self.counts, axis=2)
        return sizes, jnp.cumsum(sizes, axis=1) - sizes, jnp.cumsum(sizes, axis=0) - sizes

    def send(self, x: Array) -> Array:
        """[A, ...], in the order of receivers, to where each row belongs: [R, ...]."""
        devices, me = self.counts.shape[0], lax.axis_index(AXIS)
        sizes, at_sender, at_receiver = self._offsets
        if self.ragged:
            space = jnp.zeros((devices * self.rows, *x.shape[1:]), x.dtype)
            plan = (at_sender[me], sizes[me], at_receiver[me], sizes[:, me])
            return lax.ragged_all_to_all(x, space, *plan, axis_name=AXIS)
        source = at_sender[me][:, None] + jnp.arange(self.rows)[None, :]
        exists = jnp.arange(self.rows)[None, :] < sizes[me][:, None]
        source = jnp.where(exists, source, x.shape[0])
        out = jnp.take(x, source, axis=0, mode="fill", fill_value=0)
        return lax.all_to_all(out, AXIS, split_axis=0, concat_axis=0, tiled=True).reshape(-1, *x.shape[1:])

    def experts(self, here: int) -> Array:
        """[R]: which of this device's experts each arrived row is for; ``here``, their number, for no row."""
        counts_SE = self.counts[:, lax.axis_index(AXIS)]
        ends_SE = self.starts[:, None] + jnp.cumsum(counts_SE, axis=1)
        begins_SE = ends_SE - counts_SE
        slots = jnp.arange(self.counts.shape[0] * self.rows)
        inside = (slots[:, None] >= begins_SE.reshape(1, -1)) & (slots[:, None] < ends_SE.reshape(1, -1))
        found = jnp.sum(inside * jnp.tile(jnp.arange(here), self.counts.shape[0])[None, :], axis=1)
        return jnp.where(jnp.any(inside, axis=1), found, here)

    def back(self, y_RD: Array, shape: tuple[int, ...]) -> Array:
        devices, me = self.counts.shape[0], lax.axis_index(AXIS)
        sizes, at_sender, at_receiver = self._offsets
        if self.ragged:
            plan = (at_receiver[:, me], sizes[:, me], at_sender[:, me], sizes[me])
            return lax.ragged_all_to_all(y_RD, jnp.zeros(shape, y_RD.dtype), *plan, axis_name=AXIS)
        y_DAD = y_RD.reshape(devices, self.rows, -1)
        y_DAD = lax.all_to_all(y_DAD, AXIS, split_axis=0, concat_axis=0, tiled=True)
        rows = jnp.arange(shape[0])
        receiver = jnp.searchsorted(jnp.cumsum(sizes[me]), rows, side="right")
        receiver = jnp.minimum(receiver, devices - 1)
        return y_DAD[receiver, jnp.clip(rows - at_sender[me][receiver], 0, self.rows - 1)]


def in_order(routing: Routing, order: np.ndarray, *, by_token: bool) -> Routing:
    """A routing of rows in order as one of rows whose slot i holds token ``order[i]``."""
    if not by_token:
        return routing._replace(token=jnp.asarray(np.argsort(order))[routing.token])
    length = order.size

    def moved(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, length)[:, :, order].reshape(x.shape)

    names = ("expert", "gate", "kept", "wanted")
    return routing._replace(**{name: moved(getattr(routing, name)) for name in names})
