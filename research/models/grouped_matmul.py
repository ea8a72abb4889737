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
    x_bMD = x_MD.reshape(-1, size, x_MD.shape[1])
    x_bMD = jnp.where(inside[:, None, None], x_bMD, jnp.zeros((), x_MD.dtype))
    w_bDF = w_EDF[jnp.minimum(expert_of, w_EDF.shape[0] - 1)]
    return jax.lax.dot_general(x_bMD, w_bDF, (((2,), (1,)), ((0,), (0,)))).reshape(x_MD.shape[0], -1)


def _chosen(implementation: GroupedMatmul, platform: str) -> str:
    if implementation == "auto":
        return "blocked" if platform == "cpu" else "ragged"
    return implementation
