# SPDX-License-Identifier: Apache-2.0
"""Falcon (Almazrouei et al. 2023, table 1; 7B has one kv head and one norm, the others groups and two)."""

from typing import Literal

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.mlp import Mlp


def _falcon(
    d_model: int, num_layers: int, heads: tuple[int, int], residual: Literal["parallel", "parallel_shared"]
) -> Decoder:
    return Decoder(
        vocab_size=65_024,
        d_model=d_model,
        num_layers=num_layers,
        attention=Attention(heads[0], num_kv_heads=heads[1], head_dim=64),
        mlp=Mlp(4 * d_model, "gelu_exact"),
        norm=Norm("layer", 1e-5),
        head="tied",
        residual=residual,
    )


def falcon_7b() -> Decoder:
    return _falcon(4544, 32, (71, 1), "parallel_shared")


def falcon_40b() -> Decoder:
    return _falcon(8192, 60, (128, 8), "parallel")


def falcon_180b() -> Decoder:
    return _falcon(14_848, 80, (232, 8), "parallel")
