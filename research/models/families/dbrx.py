# SPDX-License-Identifier: Apache-2.0
"""DBRX (Databricks 2024, model card and config): sixteen experts of which each token takes four; queries, keys and
values are cut off at 8."""

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.moe import Moe
from research.models.positions import Rotary
from research.models.routers import TopK


def dbrx() -> Decoder:
    """132B, 36B active."""
    return Decoder(
        vocab_size=100_352,
        d_model=6144,
        num_layers=40,
        attention=Attention(48, num_kv_heads=8, clip=8.0),
        mlp=Moe(16, 10_752, TopK(4)),
        norm=Norm("layer", 1e-5, bias=False),
        position=Rotary(500_000.0),
    )
