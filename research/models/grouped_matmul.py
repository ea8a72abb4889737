# SPDX-License-Identifier: Apache-2.0
"""Products of rows sorted by expert with each expert's own matrix: one signature, several implementations.

"plain" is the oracle: every row with every matrix, E times the work. "blocked", for CPUs, goes from expert to expert
and cuts its rows into as few blocks of the sizes ``BLOCKS`` as it can. "ragged" is ``jax.lax.ragged_dot``: on a TPU
just the needed products forward, and E times the work for the gradient of the matrices (on a CPU always). "megablox"
are JAX's kernels for TPUs (Gale et al. 2022): just the needed products in all three, on the arrays of one device.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from research.core.types import Array, UserError

GroupedMatmul = Literal["auto", "plain", "blocked", "ragged", "megablox"]
BLOCKS = (512, 256, 128, 64)  # rows of one product: large ones are fast, small ones leave little padding
BLOCK = BLOCKS[-1]
TILES = (512, 256, 128)  # rows of a kernel's tile: the largest that divides the rows
WIDEST_TILE = 1024  # its other two sides at most


def alignment(platform: str, implementation: GroupedMatmul = "auto") -> int:
    """What group sizes must be multiples of."""
    return BLOCK if _chosen(implementation, platform) == "blocked" else 1


def grouped_matmul(
    x_MD: Array, w_EDF: Array, sizes_E: Array, *, platform: str = "cpu", implementation: GroupedMatmul = "auto"
) -> Array:
    """x [M, D] times w [E, D, F] -> [M, F]: the first sizes[0] rows with w[0], the next sizes[1] with w[1], ...

    Rows beyond the sum of sizes give zeros. "blocked" needs sizes and M in multiples of ``BLOCK`` (``alignment``).
    "megablox" is for arrays of one device: on a mesh, inside a fully manual ``jax.shard_map``.
    """
    chosen = _chosen(implementation, platform)
    if chosen == "megablox":
        return _megablox(platform != "tpu", x_MD, w_EDF, sizes_E.astype(jnp.int32))
    if chosen == "ragged":
        return jax.lax.ragged_dot(x_MD, w_EDF, sizes_E.astype(jnp.int32))
    if chosen == "blocked":
        if x_MD.shape[0] % BLOCK:
            raise UserError(f"Blocked products need a multiple of {BLOCK} rows; given {x_MD.shape[0]}.")
        return _blocked(x_MD, w_EDF, sizes_E)
    expert_M = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_MD.shape[0]), side="right")
    mine = (expert_M[:, None] == jnp.arange(w_EDF.shape[0])[None, :]).astype(x_MD.dtype)
    return jnp.einsum("MD,EDF,ME->MF", x_MD, w_EDF, mine)


def _blocks(start: Array, rows: Array, carry: Any, body: Callable[[int, Array, Any], Any], *, most: int) -> Any:
    """``body(size, first row, carry)`` for each block of one expert, the largest first, none of over ``most`` rows."""
    for size in (size for size in BLOCKS if size <= most):
        count = rows // size

        def one(index: Array, carry: Any, size: int = size, start: Array = start) -> Any:
            return body(size, start + index * size, carry)

        carry = jax.lax.fori_loop(0, count, one, carry)
        start, rows = start + count * size, rows - count * size
    return carry


@jax.custom_vjp
def _blocked(x_MD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    """Expert by expert, block by block, each product on all cores."""

    def expert(y_MF: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        w_DF, start, rows = part

        def block(size: int, row: Array, y_MF: Array) -> Array:
            return _put(y_MF, _cut(x_MD, row, size) @ w_DF, row)

        return _blocks(start, rows, y_MF, block, most=x_MD.shape[0]), None

    y_MF = jnp.zeros((x_MD.shape[0], w_EDF.shape[2]), x_MD.dtype)
    return jax.lax.scan(expert, y_MF, (w_EDF, jnp.cumsum(sizes_E) - sizes_E, sizes_E))[0]


def _blocked_backward(saved: tuple[Array, Array, Array], d_y: Array) -> tuple[Array, Array, None]:
    x_MD, w_EDF, sizes_E = saved

    def expert(d_x: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        w_DF, start, rows = part

        def block(size: int, row: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            d_x, d_w = carry
            d_MF = _cut(d_y, row, size)
            d_w = d_w + _cut(x_MD, row, size).T @ d_MF
            return _put(d_x, jax.lax.dot_general(d_MF, w_DF, (((1,), (1,)), ((), ()))), row), d_w

        d_x, d_w = _blocks(start, rows, (d_x, jnp.zeros(w_DF.shape, jnp.float32)), block, most=x_MD.shape[0])
        return d_x, d_w.astype(w_DF.dtype)

    parts = (w_EDF, jnp.cumsum(sizes_E) - sizes_E, sizes_E)
    d_x, d_w = jax.lax.scan(expert, jnp.zeros_like(x_MD), parts)
    return d_x, d_w, None


_blocked.defvjp(lambda *saved: (_blocked(*saved), saved), _blocked_backward)


def _cut(x: Array, row: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, row, size)


def _put(x: Array, rows: Array, row: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, row, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _megablox(interpret: bool, x_MD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    return _kernel("gmm", interpret, x_MD, w_EDF, sizes_E)


def _megablox_backward(interpret: bool, saved: tuple[Array, Array, Array], d_y: Array) -> tuple[Array, Array, None]:
    x_MD, w_EDF, sizes_E = saved
    d_x = _kernel("gmm", interpret, d_y.astype(x_MD.dtype), w_EDF, sizes_E, transposed=True)
    return d_x, _kernel("tgmm", interpret, x_MD, d_y.astype(x_MD.dtype), sizes_E), None


_megablox.defvjp(lambda interpret, *saved: (_megablox(interpret, *saved), saved), _megablox_backward)


def _kernel(
    name: Literal["gmm", "tgmm"], interpret: bool, x: Array, y: Array, sizes_E: Array, transposed: bool = False
) -> Array:
    """One of the two kernels: "gmm" rows [M, D] by matrices [E, D, F] ([E, F, D] transposed), "tgmm" rows [M, D] by
    rows [M, F]."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm  # here: Pallas takes a while to import

    rows = x.shape[0]
    tile = next((size for size in TILES if rows % size == 0), TILES[-1])
    x, y = (jnp.pad(a, ((0, -rows % tile), (0, 0))) if a.ndim == 2 else a for a in (x, y))
    tiling = (tile, *(min(WIDEST_TILE, width) for width in (x.shape[1], y.shape[-2 if transposed else -1])))
    if name == "tgmm":
        return tgmm(x.T, y, sizes_E, x.dtype, tiling, interpret=interpret)
    out = gmm(x, y, sizes_E, x.dtype, tiling, transpose_rhs=transposed, interpret=interpret)[:rows]
    inside = jnp.arange(rows) < jnp.sum(sizes_E)  # the kernel leaves the other rows as it found them
    return jnp.where(inside[:, None], out, jnp.zeros((), out.dtype))


def _chosen(implementation: GroupedMatmul, platform: str) -> str:
    if implementation == "auto":
        return {"cpu": "blocked", "tpu": "megablox"}.get(platform, "ragged")
    return implementation
