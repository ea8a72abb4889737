# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies stretched beyond the length a model was trained at: linear, NTK-aware, YaRN and Llama 3's.

Each takes the frequencies [H/2] of plain RoPE and gives others, in float64 on the host. All are fixed: none depends on
the length of the sequence in hand, so that keys in a cache stay what they were.
"""

import math
from dataclasses import dataclass

import numpy as np

from research.core.types import UserError


@dataclass(frozen=True)
class Linear:
    """Positions divided by ``factor`` (Chen et al. 2023, position interpolation, eq. 4)."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        return plain / self.factor


@dataclass(frozen=True)
class Ntk:
    """theta times factor^(H / (H - 2)): the slowest frequency is divided by ``factor``, the fastest stays (bloc97
    2023; Peng et al. 2023, eq. 16)."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        width = 2 * len(plain)
        return (theta * self.factor ** (width / (width - 2))) ** (-np.arange(0, width, 2) / width)


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, section 3.3): frequencies that turn more than ``beta_fast`` times within
    ``original_length`` stay, those that turn less than ``beta_slow`` times are divided by ``factor``, with a ramp
    between, whose ends are whole numbers where ``truncate``.

    Queries and keys are each multiplied by ``attention_factor`` (None: 0.1 ln(factor) + 1, eq. 22). DeepSeek-V2 and V3
    give ``mscale`` and ``mscale_all_dim`` instead: queries and keys are multiplied by the ratio of 0.1 mscale
    ln(factor) + 1 of the two, and the scores by the square of that of the latter.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        width = 2 * len(plain)

        def dimension(turns: float) -> float:
            return width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        stretched = np.clip((np.arange(len(plain)) - low) / (max(high - low, 0.001)), 0, 1)
        return plain * (1 - stretched) + plain / self.factor * stretched

    @property
    def magnitude(self) -> float:
        """What queries and keys are each multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def score_factor(self) -> float:
        """What the scores are multiplied by besides."""
        return self._temperature(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1 (2024): wavelengths above original_length / low_freq_factor are stretched by ``factor``, those below
    original_length / high_freq_factor stay, with a line between in the frequency's share of the two."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"low_freq_factor and high_freq_factor must rise from above 0; given {self.low_freq_factor} and "
                f"{self.high_freq_factor}."
            )

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        turns = self.original_length * plain / (2 * math.pi)  # within the original length
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return plain * kept + plain / self.factor * (1 - kept)


Scaling = Linear | Ntk | Yarn | Llama3


def _check_factor(factor: float) -> None:
    if not (math.isfinite(factor) and factor >= 1):
        raise UserError(f"A rotary scaling's factor is {factor}: it must be a number of at least 1.")
