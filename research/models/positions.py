# SPDX-License-Identifier: Apache-2.0
"""Where a token stands: rotary, learned, sinusoidal and relative positions.

``Rotary`` turns queries and keys inside attention; ``Learned`` and ``Sinusoidal`` add to the embeddings; ``Alibi``,
``RelativeBias`` and ``TransformerXL`` add to the scores of attention.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import Array, UserError
from research.models.rope_scaling import Scaling, Yarn


@dataclass(frozen=True)
class Rotary:
    """RoPE (Su et al. 2021), split-half layout: dimension i turns with i + R/2 at angle position * theta^(-2i/R).

    fraction: R is this share of the head's width, its first dimensions; the others do not turn (Black et al. 2022).
    scaling: other frequencies, for sequences longer than those of training.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if not (0 < self.fraction <= 1 and self.theta > 1):
            raise UserError(
                f"position.fraction must lie above 0 and at most at 1, and theta above 1; given {self.fraction} and "
                f"{self.theta}."
            )

    def width(self, head_dim: int) -> int:
        """How many dimensions of a head turn."""
        return int(head_dim * self.fraction)

    @property
    def score_factor(self) -> float:
        return self.scaling.score_factor if isinstance(self.scaling, Yarn) else 1.0


@dataclass(frozen=True)
class Learned:
    """A trained table of ``max_length`` vectors added to the embeddings (Radford et al. 2019)."""

    max_length: int


@dataclass(frozen=True)
class Sinusoidal:
    """Fixed sines and cosines added to the embeddings (Vaswani et al. 2017, section 3.5), sines first."""

    max_period: float = 10_000.0


@dataclass(frozen=True)
class Alibi:
    """Scores fall with distance, by a slope that is fixed for each head (Press et al. 2022, section 3)."""

    def slopes(self, num_heads: int) -> np.ndarray:
        """[N]: powers of 2^(-8/N), and where N is no power of two those of the next smaller one, then every second of
        the next larger one (as in the paper's code)."""
        below = 2 ** math.floor(math.log2(num_heads))
        first = 2.0 ** (-8.0 / below * np.arange(1, below + 1))
        between = 2.0 ** (-4.0 / below * np.arange(1, 2 * (num_heads - below), 2))
        return np.concatenate([first, between]).astype(np.float32)


@dataclass(frozen=True)
class RelativeBias:
    """A trained bias of the scores for each head and bucket of distances (Raffel et al. 2020, section 2.1).

    buckets: half of them for one distance each, the rest growing logarithmically up to ``max_distance``.
    per_layer: a table in every layer rather than one for all.
    """

    buckets: int = 32
    max_distance: int = 128
    per_layer: bool = False

    def __post_init__(self) -> None:
        if self.buckets < 2 or self.buckets % 2 or self.max_distance <= self.buckets // 2:
            raise UserError(
                f"Relative biases need an even number of buckets and a max_distance above half of it; given "
                f"{self.buckets} and {self.max_distance}."
            )

    def bucket(self, distance: Array) -> Array:
        """The bucket of each distance, query minus key, for causal attention (later keys count as distance 0)."""
        distance, exact = jnp.maximum(distance, 0), self.buckets // 2
        steps = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = exact + (steps * (self.buckets - exact)).astype(jnp.int32)
        return jnp.where(distance < exact, distance, jnp.minimum(far, self.buckets - 1))


@dataclass(frozen=True)
class TransformerXL:
    """Relative positions of Dai et al. 2019 (section 3.3): the score of query i and key j is (q_i + u) k_j +
    (q_i + v) W r_(i-j), with sinusoids r of the distance and W, u and v of each layer."""

    max_period: float = 10_000.0


Position = Rotary | Learned | Sinusoidal | Alibi | RelativeBias | TransformerXL


def angles(positions: Array, width: int, period: float) -> Array:
    """[..., width/2] float32 angles: position * period^(-2i/width)."""
    frequency = period ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions.astype(jnp.float32)[..., None] * frequency.reshape((1,) * positions.ndim + (-1,))


def rotary_tables(config: Rotary, positions_BT: Array, head_dim: int) -> tuple[Array, Array]:
    """Sines and cosines [B, T, R/2] in float32, made once for all layers of a kind."""
    width = config.width(head_dim)
    if config.scaling is None:
        turn, magnitude = angles(positions_BT, width, config.theta), 1.0
    else:
        plain = config.theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        frequency = jnp.asarray(config.scaling.frequencies(plain, config.theta), jnp.float32)
        turn = positions_BT.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
        magnitude = config.scaling.magnitude if isinstance(config.scaling, Yarn) else 1.0
    return jnp.sin(turn) * magnitude, jnp.cos(turn) * magnitude


def rotate(x_BTNH: Array, tables: tuple[Array, Array]) -> Array:
    """Turns queries or keys [B, T, N, H] by their positions, in float32; the dtype stays."""
    sin, cos = (t[:, :, None, :] for t in tables)
    width = 2 * sin.shape[-1]
    first, second = jnp.split(x_BTNH[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
    return turned if width == x_BTNH.shape[-1] else jnp.concatenate([turned, x_BTNH[..., width:]], axis=-1)


def sinusoids(positions: Array, d_model: int, max_period: float) -> Array:
    """[..., D] float32: sines, then cosines."""
    turn = angles(positions, d_model, max_period)
    return jnp.concatenate([jnp.sin(turn), jnp.cos(turn)], axis=-1)


def distances(q_positions: Array, kv_positions: Array) -> Array:
    """[B, T, S]: how far before its query each key stands."""
    return q_positions[:, :, None] - kv_positions[:, None, :]


def alibi_bias(config: Alibi, num_heads: int, q_positions: Array, kv_positions: Array) -> Array:
    """[B, N, T, S] float32."""
    slopes = jnp.asarray(config.slopes(num_heads))
    return -slopes[None, :, None, None] * distances(q_positions, kv_positions)[:, None].astype(jnp.float32)


def relative_bias(config: RelativeBias, table_KN: Array, q_positions: Array, kv_positions: Array) -> Array:
    """[B, N, T, S] float32 from a table [buckets, N]."""
    found = jnp.take(table_KN.astype(jnp.float32), config.bucket(distances(q_positions, kv_positions)), axis=0)
    return jnp.moveaxis(found, 3, 1)


def relative_scores(q_BTNH: Array, r_RNH: Array, q_positions: Array, kv_positions: Array) -> Array:
    """The second part of TransformerXL's scores [B, N, T, S] float32: queries (with v, scaled) and what W makes of the
    sinusoids of the distances 0 to R - 1."""
    by_distance = jnp.einsum("BTNH,RNH->BNTR", q_BTNH, r_RNH, preferred_element_type=jnp.float32)
    which = jnp.clip(distances(q_positions, kv_positions), 0, r_RNH.shape[0] - 1)
    shape = (*by_distance.shape[:3], which.shape[2])
    return jnp.take_along_axis(by_distance, jax.lax.broadcast_in_dim(which, shape, (0, 2, 3)), axis=3)
