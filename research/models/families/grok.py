# SPDX-License-Identifier: Apache-2.0
"""Grok-1 (xAI 2024, the released code): eight experts of which each token takes two, norms all around, capped
scores."""

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.moe import Moe
from research.models.routers import TopK


def grok_1() -> Decoder:
    """314B."""
    return Decoder(
        vocab_size=131_072,
        d_model=6144,
        num_layers=64,
        attention=Attention(48, num_kv_heads=8, head_dim=128, cap=30.0),
        mlp=Moe(8, 32_768, TopK(2, renormalise=False), activation="geglu"),
        norm=Norm(eps=1e-5),
        head="tied",
        norms="sandwich",
        embedding_scale=78.38367176906169,
        logit_scale=3**-0.5,
    )
