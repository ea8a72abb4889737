# SPDX-License-Identifier: Apache-2.0
"""Products with parameters that lie spread over a mesh, and what moves for them, said in so many words.

A matrix is gathered over the axes that only store it (ZeRO-3; Rajbhandari et al. 2019), in the dtype of the product,
where it is used and nowhere else; its gradient is summed and scattered back in one step. "tensor" splits the outputs
of one product and the inputs of the next; between them the residual stream is split by sequence (Korthikanti et al.
2022): it is gathered before the first and summed and scattered after the second. Left to the compiler, products on
meshes of several axes were seen to gather activations and to sum a gradient once for each axis.
"""

import math
from collections.abc import Sequence

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
) -> list[Array]:
    """``ops.linear``: x [B, T, *in] times each of weights [*in, *out], which have the logical ``axes``.

    taken: mesh axes that a surrounding ``vmap`` has taken. Activations that are not [B, T, ...] are left to the
    compiler.
    """
    if not sharding.partitioned() or x.ndim - contract != 2:
        return list(ops.linear(x, *weights, contract=contract, platform=platform))
    stored = [sharding.partition_spec(names, without=taken) for names in axes]
    used = [
        [None if name == "embed" else entry for name, entry in zip(names, spec, strict=True)]
        for names, spec in zip(axes, stored, strict=True)
    ]
    sizes = sharding.current_shape()
    inputs, outputs = used[0][:contract], [names[contract:] for names in used]
    split_in, split_out = any(inputs), any(any(names) for names in outputs)
    whole = sharding.partition_spec(("batch", "sequence"), without=taken)
    spread = sharding.partition_spec(("batch", "residual_sequence"), without=taken)
    whole, spread = (sharding.fitting_spec(x.shape[:2], spec, sizes) for spec in (whole, spread))
    by_tensor = tuple(axis for axis in mesh_axes(spread[1]) if axis not in mesh_axes(whole[1]))
    summed = tuple(axis for entry in inputs for axis in mesh_axes(entry))

    def local(x: Array, *weights: Array) -> tuple[Array, ...]:
        if split_out and by_tensor:
            x = lax.all_gather(x, by_tensor, axis=1, tiled=True)
        gathered = [_gathered(w, spec, kept) for w, spec, kept in zip(weights, stored, used, strict=True)]
        found = ops.linear(x, *gathered, contract=contract, platform=platform)
        return tuple(_summed(y, summed, by_tensor) for y in found)

    rows = spread if not split_in else whole
    results = whole if split_out else spread
    run = jax.shard_map(
        local,
        in_specs=(PartitionSpec(*rows, *inputs), *stored),
        out_specs=tuple(PartitionSpec(*results, *names) for names in outputs),
        check_vma=False,
    )
    return list(run(x, *weights))


def _summed(y: Array, axes: tuple[str, ...], by_sequence: tuple[str, ...]) -> Array:
    """The sum over devices that each had a part of what was contracted, each keeping its part of the sequence."""
    if not axes:
        return y
    if by_sequence:
        y = lax.psum_scatter(y, by_sequence, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in axes if axis not in by_sequence)
    return lax.psum(y, rest) if rest else y


def whole(w: Array, spec: PartitionSpec, *, keep: tuple[str, ...]) -> Array:
    """A device's part of a parameter, gathered over all mesh axes but those to keep. In a ``shard_map``."""
    kept = [tuple(axis for axis in mesh_axes(entry) if axis in keep) for entry in spec]
    return _gathered(w, spec, kept)


def _gathered(w: Array, spec: PartitionSpec, kept: Sequence) -> Array:
    for dim, (entry, stay) in enumerate(zip(spec, kept, strict=True)):
        axes = tuple(axis for axis in mesh_axes(entry) if axis not in mesh_axes(stay))
        if axes and lax.axis_size(axes) > 1:
            w = lax.all_gather(w, axes, axis=dim, tiled=True)
    return w


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
