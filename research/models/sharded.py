# SPDX-License-Identifier: Apache-2.0
"""Products with parameters that lie spread over a mesh, and what moves for them, said in so many words.

A matrix is gathered over the axes that only store it (ZeRO-3; Rajbhandari et al. 2019), in the dtype of the product,
where it is used and nowhere else; its gradient is summed and scattered back in one step. "tensor" splits the outputs
of one product and the inputs of the next; between them the residual stream is split by sequence (Korthikanti et al.
2022): it is gathered before the first and summed and scattered after the second. Left to the compiler, products on
meshes of several axes were seen to gather activations and to sum a gradient once for each axis.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from research.core import sharding
from research.core.sharding import Axes, mesh_axes
from research.core.types import Array
from research.models import ops


def linear(
    x: Array,
    weights: Sequence[Array],
    axes: Sequence[Axes],
    *,
    contract: int = 1,
    platform: str = "cpu",
    taken: tuple[str, ...] = (),
    precision: str | None = None,
) -> list[Array]:
    """``ops.linear``: x [B, T, *in] times each of weights [*in, *out], which have the logical ``axes``.

    taken: mesh axes that a surrounding ``vmap`` has taken. Activations that are not [B, T, ...] are left to the
    compiler.
    """
    if not sharding.partitioned() or x.ndim - contract != 2:
        return list(ops.linear(x, *weights, contract=contract, platform=platform, precision=precision))
    return list(_linear(_Plan.make(x, axes, contract, platform, taken, precision), x, tuple(weights)))


@dataclass(frozen=True)
class _Plan:
    """Where the arrays of one product lie. stored: the weights at rest; used: what stays split of them in use.

    rows, results: rows and sequence of the input and of the outputs. gathered: mesh axes over which the input's
    sequence is gathered; summed: those over which the products are summed, of which ``scattered`` also split the
    sequence of the result.
    """

    contract: int
    platform: str
    precision: str | None
    stored: tuple[PartitionSpec, ...]
    used: tuple[PartitionSpec, ...]
    rows: PartitionSpec
    results: PartitionSpec
    gathered: tuple[str, ...]
    scattered: tuple[str, ...]
    summed: tuple[str, ...]

    @staticmethod
    def make(
        x: Array, axes: Sequence[Axes], contract: int, platform: str, taken: tuple[str, ...], precision: str | None
    ) -> "_Plan":
        sizes = sharding.current_shape()
        stored = tuple(sharding.partition_spec(names, without=taken) for names in axes)
        used = tuple(
            PartitionSpec(*[None if name == "embed" else entry for name, entry in zip(names, spec, strict=True)])
            for names, spec in zip(axes, stored, strict=True)
        )
        whole, spread = (
            sharding.fitting_spec(x.shape[:2], sharding.partition_spec(("batch", name), without=taken), sizes)
            for name in ("sequence", "residual_sequence")
        )
        by_tensor = tuple(axis for axis in mesh_axes(spread[1]) if axis not in mesh_axes(whole[1]))
        summed = tuple(axis for entry in used[0][:contract] for axis in mesh_axes(entry))
        split_out = any(any(spec[contract:]) for spec in used)
        return _Plan(
            contract=contract,
            platform=platform,
            precision=precision,
            stored=stored,
            used=used,
            rows=whole if summed else spread,
            results=whole if split_out else spread,
            gathered=by_tensor if split_out else (),
            scattered=by_tensor if summed else (),
            summed=summed,
        )

    @property
    def inputs(self) -> PartitionSpec:
        return PartitionSpec(*self.rows, *self.used[0][: self.contract])

    @property
    def outputs(self) -> tuple[PartitionSpec, ...]:
        return tuple(PartitionSpec(*self.results, *spec[self.contract :]) for spec in self.used)

    def product(self, x: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
        how = dict(contract=self.contract, platform=self.platform, precision=self.precision)
        return ops.linear(x, *weights, **how)

    def whole(self, x: Array, weights: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        """A device's operands: the input's sequence and the weights as they are used."""
        x = lax.all_gather(x, self.gathered, axis=1, tiled=True) if self.gathered else x
        specs = zip(weights, self.stored, self.used, strict=True)
        axes = lambda spec: [axis for entry in spec for axis in mesh_axes(entry)]  # noqa: E731
        return x, tuple(sharding.gathered(w, stored, keep=axes(used)) for w, stored, used in specs)

    def forward(self, x: Array, *weights: Array) -> tuple[Array, ...]:
        found = self.product(*self.whole(x, weights))
        return tuple(_summed(y, self.scattered, self.summed) for y in found)

    def backward(self, x: Array, weights: tuple[Array, ...], d_outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        if self.scattered:
            d_outputs = tuple(lax.all_gather(d, self.scattered, axis=1, tiled=True) for d in d_outputs)
        x, weights = self.whole(x, weights)
        (d_x,) = jax.vjp(lambda x: self.product(x, weights), x)[1](d_outputs)
        parts = {axis for spec in self.used for entry in spec[self.contract :] for axis in mesh_axes(entry)}
        found = [_summed(d_x, self.gathered, tuple(parts))]
        tokens = [axis for entry in self.rows for axis in mesh_axes(entry) if axis not in self.gathered]
        # the barriers: first what needs the whole weights, then one weight's gradient after the other, each scattered
        # before the next is formed, else all of them may wait in memory
        for index, weight in enumerate(weights):
            d_outputs, found = lax.optimization_barrier((d_outputs, found))
            (d_w,) = jax.vjp(lambda w: self.product(x, (w,))[0], weight)[1](d_outputs[index])
            found.append(self._scattered(d_w, index, tokens))
        return tuple(lax.optimization_barrier(found))

    def _scattered(self, d_w: Array, index: int, tokens: list[str]) -> Array:
        """The sum over all devices that saw other tokens; each keeps the part that it stores."""
        stored, used = self.stored[index], self.used[index]
        for dim, (entry, stay) in enumerate(zip(stored, used, strict=True)):
            axes = tuple(axis for axis in mesh_axes(entry) if axis not in mesh_axes(stay))
            mine = tuple(axis for axis in axes if axis in tokens)
            if lax.axis_size(axes) > lax.axis_size(mine):  # where some of the devices saw the same tokens
                rest = tuple(axis for axis in axes if axis not in tokens)
                d_w = d_w / lax.axis_size(rest)
            if axes and lax.axis_size(axes) > 1:
                d_w = lax.psum_scatter(d_w, axes, scatter_dimension=dim, tiled=True)
        rest = tuple(axis for axis in tokens if not any(axis in mesh_axes(entry) for entry in stored))
        return lax.psum(d_w, rest) if rest else d_w


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(plan: _Plan, x: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
    specs = (plan.inputs, *plan.stored)
    return jax.shard_map(plan.forward, in_specs=specs, out_specs=plan.outputs, check_vma=False)(x, *weights)


def _linear_backward(
    plan: _Plan, saved: tuple[Array, tuple[Array, ...]], d_outputs: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    specs = (plan.inputs, plan.stored)
    run = jax.shard_map(
        plan.backward, in_specs=(*specs, plan.outputs), out_specs=(plan.inputs, *plan.stored), check_vma=False
    )
    d_x, *d_weights = run(*saved, d_outputs)
    return d_x, tuple(d_weights)


_linear.defvjp(lambda plan, x, weights: (_linear(plan, x, weights), (x, weights)), _linear_backward)


def _summed(y: Array, scattered: tuple[str, ...], axes: tuple[str, ...]) -> Array:
    """The sum over devices that each had a part of what was contracted, each keeping its part of the sequence."""
    if scattered:
        y = lax.psum_scatter(y, scattered, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in axes if axis not in scattered)
    return lax.psum(y, rest) if rest else y


def lookup(table_VD: Array, axes: Axes, ids_BT: Array, dtype: str) -> Array:
    """Rows of a table [V, D] by ids [B, T] -> [B, T, D] in ``dtype``.

    Every device looks up its columns of the table for all tokens of those that hold the other columns, and then they
    exchange: what moves is ids and hidden states, never the table, and its gradient adds up where it is stored.
    """
    if not sharding.partitioned():
        return jnp.take(table_VD, ids_BT, axis=0).astype(dtype)
    sizes = sharding.current_shape()
    stored = sharding.partition_spec(axes)
    row_axes, column_axes = (mesh_axes(entry) for entry in stored)
    tokens = sharding.fitting_spec(ids_BT.shape, sharding.partition_spec(("batch", "sequence")), sizes)

    def local(table_VD: Array, ids_BT: Array) -> Array:
        ids = lax.all_gather(ids_BT, column_axes)
        if math.prod(sizes[axis] for axis in row_axes) > 1:
            ids = ids - lax.axis_index(row_axes) * table_VD.shape[0]
            mine = (ids >= 0) & (ids < table_VD.shape[0])
            x = jnp.take(table_VD, jnp.where(mine, ids, 0), axis=0).astype(dtype)
            x = lax.psum(jnp.where(mine[..., None], x, 0), row_axes)
        else:
            x = jnp.take(table_VD, ids, axis=0).astype(dtype)
        return lax.all_to_all(x, column_axes, split_axis=0, concat_axis=3, tiled=True)[0]

    out = PartitionSpec(*tokens, None)
    return jax.shard_map(local, in_specs=(stored, tokens), out_specs=out, check_vma=False)(table_VD, ids_BT)
