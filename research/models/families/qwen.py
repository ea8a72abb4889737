# SPDX-License-Identifier: Apache-2.0
"""Qwen 1.5 (2024), 2 (Yang et al. 2024, table 1), 2.5 (2024) and 3 (Yang et al. 2025, tables 1 and 2)."""

from dataclasses import replace

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.models.layers import Norm
from research.models.moe import Moe
from research.models.positions import Rotary
from research.models.routers import TopK

SMALL, LARGE = 151_936, 152_064  # vocabularies, as padded


def _qwen2(
    d_model: int,
    num_layers: int,
    heads: tuple[int, int],
    d_ff: int,
    vocab_size: int = SMALL,
    *,
    theta: float = 1e6,
    eps: float = 1e-6,
    **more,
) -> Decoder:
    """heads: of queries, and of keys and values."""
    rotary = Rotary(theta)
    model = llama(d_model, num_layers, heads[0], d_ff, vocab_size=vocab_size, eps=eps, rotary=rotary, **more)
    return replace(model, attention=Attention(heads[0], num_kv_heads=heads[1], bias="qkv"))


def qwen1_5_0_5b() -> Decoder:
    return _qwen2(1024, 24, (16, 16), 2816, head="tied")


def qwen1_5_1_8b() -> Decoder:
    return _qwen2(2048, 24, (16, 16), 5504)


def qwen1_5_4b() -> Decoder:
    return _qwen2(2560, 40, (20, 20), 6912, theta=5e6)


def qwen1_5_7b() -> Decoder:
    return _qwen2(4096, 32, (32, 32), 11_008)


def qwen1_5_14b() -> Decoder:
    return _qwen2(5120, 40, (40, 40), 13_696, LARGE)


def qwen1_5_32b() -> Decoder:
    return _qwen2(5120, 64, (40, 8), 27_392, LARGE)


def qwen1_5_72b() -> Decoder:
    return _qwen2(8192, 80, (64, 64), 24_576, LARGE)


def qwen1_5_110b() -> Decoder:
    return _qwen2(8192, 80, (64, 8), 49_152, LARGE)


def qwen1_5_moe_a2_7b() -> Decoder:
    """14.3B, 2.7B active."""
    moe = Moe(60, 1408, TopK(4, renormalise=False), shared_d_ff=5632, shared_gate=True)
    return replace(_qwen2(2048, 24, (16, 16), 5632), mlp=moe)


def qwen2_0_5b() -> Decoder:
    return _qwen2(896, 24, (14, 2), 4864, head="tied")


def qwen2_1_5b() -> Decoder:
    return _qwen2(1536, 28, (12, 2), 8960, head="tied")


def qwen2_7b() -> Decoder:
    return _qwen2(3584, 28, (28, 4), 18_944, LARGE)


def qwen2_72b() -> Decoder:
    return _qwen2(8192, 80, (64, 8), 29_568, LARGE)


def qwen2_57b_a14b() -> Decoder:
    """57.4B, 14B active."""
    moe = Moe(64, 2560, TopK(8, renormalise=False), shared_d_ff=20_480, shared_gate=True)
    return replace(_qwen2(3584, 28, (28, 4), 18_944), mlp=moe)


def qwen2_5_0_5b() -> Decoder:
    return qwen2_0_5b()


def qwen2_5_1_5b() -> Decoder:
    return qwen2_1_5b()


def qwen2_5_3b() -> Decoder:
    return _qwen2(2048, 36, (16, 2), 11_008, head="tied")


def qwen2_5_7b() -> Decoder:
    return qwen2_7b()


def qwen2_5_14b() -> Decoder:
    return _qwen2(5120, 48, (40, 8), 13_824, LARGE, eps=1e-5)


def qwen2_5_32b() -> Decoder:
    return _qwen2(5120, 64, (40, 8), 27_648, LARGE, eps=1e-5)


def qwen2_5_72b() -> Decoder:
    return _qwen2(8192, 80, (64, 8), 29_568, LARGE, eps=1e-5)


def _qwen3(d_model: int, num_layers: int, heads: tuple[int, int], d_ff: int, **more) -> Decoder:
    """Norms of heads in the place of biases."""
    attention = Attention(heads[0], num_kv_heads=heads[1], head_dim=128, qk_norm=Norm(eps=1e-6))
    return replace(_qwen2(d_model, num_layers, heads, d_ff, **more), attention=attention)


def qwen3_0_6b() -> Decoder:
    return _qwen3(1024, 28, (16, 8), 3072, head="tied")


def qwen3_1_7b() -> Decoder:
    return _qwen3(2048, 28, (16, 8), 6144, head="tied")


def qwen3_4b() -> Decoder:
    return _qwen3(2560, 36, (32, 8), 9728, head="tied")


def qwen3_8b() -> Decoder:
    return _qwen3(4096, 36, (32, 8), 12_288)


def qwen3_14b() -> Decoder:
    return _qwen3(5120, 40, (40, 8), 17_408)


def qwen3_32b() -> Decoder:
    return _qwen3(5120, 64, (64, 8), 25_600)


def qwen3_30b_a3b() -> Decoder:
    """30.5B, 3.3B active."""
    return replace(_qwen3(2048, 48, (32, 4), 6144), mlp=Moe(128, 768, TopK(8)))


def qwen3_235b_a22b() -> Decoder:
    """235B, 22B active."""
    return replace(_qwen3(4096, 94, (64, 4), 12_288), mlp=Moe(128, 1536, TopK(8)))
