# SPDX-License-Identifier: Apache-2.0
"""Where a token stands: rotary, learned and sinusoidal positions.

``Rotary`` turns queries and keys inside attention; ``Learned`` and ``Sinusoidal`` add to the embeddings.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from research.core.types import Array


@dataclass(frozen=True)
class Rotary:
    """RoPE (Su et al. 2021), split-half layout: dimension i turns with i + H/2 at angle position * theta^(-2i/H)."""

    theta: float = 10_000.0


@dataclass(frozen=True)
class Learned:
    """A trained table of ``max_length`` vectors added to the embeddings (Radford et al. 2019)."""

    max_length: int


@dataclass(frozen=True)
class Sinusoidal:
    """Fixed sines and cosines added to the embeddings (Vaswani et al. 2017, section 3.5), sines first."""

    max_period: float = 10_000.0


Position = Rotary | Learned | Sinusoidal


def angles(positions_BT: Array, width: int, period: float) -> Array:
    """[B, T, width/2] float32 angles: position * period^(-2i/width)."""
    frequency = period ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions_BT.astype(jnp.float32)[:, :, None] * frequency[None, None, :]


def rotary_tables(config: Rotary, positions_BT: Array, head_dim: int) -> tuple[Array, Array]:
    """Sines and cosines [B, T, H/2] in float32, made once for all layers."""
    turn = angles(positions_BT, head_dim, config.theta)
    return jnp.sin(turn), jnp.cos(turn)


def rotate(x_BTNH: Array, tables: tuple[Array, Array]) -> Array:
    """Turns queries or keys [B, T, N, H] by their positions, in float32; the dtype stays."""
    sin, cos = (t[:, :, None, :] for t in tables)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def sinusoids(config: Sinusoidal, positions_BT: Array, d_model: int) -> Array:
    """[B, T, D] float32."""
    turn = angles(positions_BT, d_model, config.max_period)
    return jnp.concatenate([jnp.sin(turn), jnp.cos(turn)], axis=-1)
