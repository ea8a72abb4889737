# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 (2024, section 3.1.2 and appendix B) and V3 (2024, section 4.2), whose architecture is R1's (2025)."""

from dataclasses import replace

from research.models.decoder import Decoder
from research.models.latent_attention import LatentAttention
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.positions import Rotary
from research.models.rope_scaling import Yarn
from research.models.routers import Sigmoid, TopK


def _deepseek(
    d_model: int,
    num_layers: int,
    attention: LatentAttention,
    moe: Moe,
    first: tuple[Mlp, ...],
    *,
    mscale: float,
    vocab_size: int = 102_400,
    **more,
) -> Decoder:
    """mscale: of the stretching of positions from 4,096 by 40."""
    return Decoder(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        attention=attention,
        mlp=moe,
        first=first,
        position=Rotary(scaling=Yarn(40.0, 4096, mscale=mscale, mscale_all_dim=mscale)),
        **more,
    )


def deepseek_v2_lite() -> Decoder:
    """15.7B, 2.4B active."""
    moe = Moe(64, 1408, TopK(6, renormalise=False), shared_d_ff=2 * 1408)
    return _deepseek(2048, 27, LatentAttention(16, q_rank=0), moe, (Mlp(10_944),), mscale=0.707)


def deepseek_v2() -> Decoder:
    """236B, 21B active."""
    router = TopK(6, renormalise=False, groups=8, top_groups=3, scale=16.0)
    moe = Moe(160, 1536, router, shared_d_ff=2 * 1536)
    return _deepseek(5120, 60, LatentAttention(128), moe, (Mlp(12_288),), mscale=0.707)


def deepseek_v3() -> Decoder:
    """671B, 37B active, and the module that predicts one token further, which is counted apart."""
    moe = Moe(256, 2048, Sigmoid(k=8, groups=8, top_groups=4, scale=2.5), shared_d_ff=2048)
    first = (Mlp(18_432),) * 3
    return _deepseek(7168, 61, LatentAttention(128), moe, first, mscale=1.0, vocab_size=129_280, ahead=1)


def deepseek_r1() -> Decoder:
    """V3's architecture."""
    return replace(deepseek_v3())
