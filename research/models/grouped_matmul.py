# SPDX-License-Identifier: Apache-2.0
"""Products of rows sorted by expert with each expert's own matrix: one signature, several implementations.

"plain" is the oracle: every row with every matrix, E times the work. "blocked", for CPUs, multiplies blocks of
``BLOCK`` rows, each with the one matrix that all of its rows belong to. "ragged" is ``jax.lax.ragged_dot``, which
the TPU compiler turns into just the needed products (on a CPU it does E times the work).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from research.core.types import Array, UserError

GroupedMatmul = Literal["auto", "plain", "blocked", "ragged"]
BLOCK = 128


def alignment(platform: str, implementation: GroupedMatmul = "auto") -> int:
    """What group sizes must be multiples of."""
    return BLOCK if _chosen(implementation, platform) == "blocked" else 1


def grouped_matmul(
    x_MD: Array, w_EDF: Array, sizes_E: Array, *, platform: str = "cpu", implementation: GroupedMatmul = "auto"
) -> Array:
    """x [M, D] times w [E, D, F] -> [M, F]: the first sizes[0] rows with w[0], the next sizes[1] with w[1], ...

    Rows beyond the sum of sizes give zeros. "blocked" needs sizes and M in multiples of ``BLOCK`` (``alignment``).
    """
    chosen = _chosen(implementation, platform)
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


def _chosen(implementation: GroupedMatmul, platform: str) -> str:
    if implementation == "auto":
        return "blocked" if platform == "cpu" else "ragged"
    return implementation
