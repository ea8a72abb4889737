# SPDX-License-Identifier: Apache-2.0
"""Products of rows sorted by expert with each expert's own matrix: one signature, several implementations.

"plain" is the oracle: every row with every matrix, E times the work. "blocked", for CPUs, multiplies blocks of
``BLOCK`` rows, each with the one matrix that all of its rows belong to. "ragged" is ``jax.lax.ragged_dot``: on a TPU
just the needed products forward, and E times the work for the gradient of the matrices (on a CPU always). "megablox"
are JAX's kernels for TPUs (Gale et al. 2022): just the needed products in all three, on the arrays of one device.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from research.core.types import Array, UserError
from research.models.ops import on_one_device

GroupedMatmul = Literal["auto", "plain", "blocked", "ragged", "megablox"]
BLOCK = 128
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
    "megablox" is for arrays of one device: on a mesh, inside a fully manual ``jax.shard_map`` ("auto" is "ragged"
    elsewhere).
    """
    chosen = _chosen(implementation, platform)
    if chosen == "megablox" and (implementation != "auto" or on_one_device()):
        return _megablox(platform != "tpu", x_MD, w_EDF, sizes_E.astype(jnp.int32))
    chosen = "ragged" if chosen == "megablox" else chosen
    if chosen == "ragged":
        return jax.lax.ragged_dot(x_MD, w_EDF, sizes_E.astype(jnp.int32))
    size = BLOCK if chosen == "blocked" else 1
    if x_MD.shape[0] % size:
        raise UserError(f"Blocked products need a multiple of {size} rows; given {x_MD.shape[0]}.")
    ends = jnp.cumsum(sizes_E) // size
    expert_of = jnp.searchsorted(ends, jnp.arange(x_MD.shape[0] // size), side="right")
    inside = expert_of < w_EDF.shape[0]
    if chosen == "plain":
        mine = (expert_of[:, None] == jnp.arange(w_EDF.shape[0])[None, :]).astype(x_MD.dtype)
        return jnp.einsum("MD,EDF,ME->MF", x_MD, w_EDF, mine)
    blocks = x_MD.reshape(-1, size, x_MD.shape[1])
    return _blocked(jnp.where(inside, expert_of, -1), blocks, w_EDF).reshape(x_MD.shape[0], -1)


@jax.custom_vjp
def _blocked(expert_b: Array, x_bMD: Array, w_EDF: Array) -> Array:
    """Block by block, each product on all cores: x [b, M, D], the expert of each block (-1: nobody's) -> [b, M, F]."""

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        expert, x_MD = part
        return None, _own(expert, x_MD @ w_EDF[jnp.maximum(expert, 0)])

    return jax.lax.scan(one, None, (expert_b, x_bMD))[1]


def _own(expert: Array, x: Array) -> Array:
    return jnp.where(expert >= 0, x, jnp.zeros((), x.dtype))


def _blocked_backward(saved: tuple[Array, Array, Array], d_y: Array) -> tuple[None, Array, Array]:
    expert_b, x_bMD, w_EDF = saved

    def one(d_w: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        expert, x_MD, d_MF = part
        d_MF, at = _own(expert, d_MF), jnp.maximum(expert, 0)
        d_w = d_w.at[at].add((x_MD.T @ d_MF).astype(d_w.dtype))
        return d_w, jax.lax.dot_general(d_MF, w_EDF[at], (((1,), (1,)), ((), ())))

    d_w, d_x = jax.lax.scan(one, jnp.zeros(w_EDF.shape, jnp.float32), (expert_b, x_bMD, d_y))
    return None, d_x, d_w.astype(w_EDF.dtype)


_blocked.defvjp(lambda *saved: (_blocked(*saved), saved), _blocked_backward)


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
