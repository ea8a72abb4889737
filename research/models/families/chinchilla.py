# SPDX-License-Identifier: Apache-2.0
"""Chinchilla (Hoffmann et al. 2022, table 4): Gopher's architecture, a quarter of its size."""

from research.models.decoder import Decoder
from research.models.families.gopher import gopher


def chinchilla_70b() -> Decoder:
    """70B."""
    return gopher(8192, 80, 64)
