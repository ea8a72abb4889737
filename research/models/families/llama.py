# SPDX-License-Identifier: Apache-2.0
"""LLaMA 1 (Touvron et al. 2023a, table 2), 2 (2023b) and 3 (Grattafiori et al. 2024, table 3; 3.2: model cards)."""

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.positions import Rotary
from research.models.rope_scaling import Llama3


def llama(
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    *,
    num_kv_heads: int | None = None,
    vocab_size: int = 32_000,
    eps: float = 1e-5,
    rotary: Rotary = Rotary(),  # noqa: B008 - a frozen value
    **more,
) -> Decoder:
    """Any size: RMSNorm, SwiGLU, rotary positions, no biases."""
    return Decoder(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        attention=Attention(num_heads, num_kv_heads=num_kv_heads),
        mlp=Mlp(d_ff),
        norm=Norm(eps=eps),
        position=rotary,
        **more,
    )


def llama_7b() -> Decoder:
    return llama(4096, 32, 32, 11_008, eps=1e-6)


def llama_13b() -> Decoder:
    return llama(5120, 40, 40, 13_824, eps=1e-6)


def llama_33b() -> Decoder:
    return llama(6656, 60, 52, 17_920, eps=1e-6)


def llama_65b() -> Decoder:
    return llama(8192, 80, 64, 22_016)


def llama2_7b() -> Decoder:
    return llama(4096, 32, 32, 11_008)


def llama2_13b() -> Decoder:
    return llama(5120, 40, 40, 13_824)


def llama2_70b() -> Decoder:
    return llama(8192, 80, 64, 28_672, num_kv_heads=8)


def _llama3(d_model: int, num_layers: int, num_heads: int, d_ff: int, factor: float = 1.0, **more) -> Decoder:
    """factor: by which 3.1 and later stretch positions beyond the 8,192 of training; 1 is Llama 3."""
    scaling = Llama3(factor, 1.0, 4.0, 8192) if factor > 1 else None
    rotary = Rotary(500_000.0, scaling=scaling)
    return llama(d_model, num_layers, num_heads, d_ff, num_kv_heads=8, vocab_size=128_256, rotary=rotary, **more)


def llama3_8b() -> Decoder:
    return _llama3(4096, 32, 32, 14_336)


def llama3_70b() -> Decoder:
    return _llama3(8192, 80, 64, 28_672)


def llama3_1_8b() -> Decoder:
    return _llama3(4096, 32, 32, 14_336, 8.0)


def llama3_1_70b() -> Decoder:
    return _llama3(8192, 80, 64, 28_672, 8.0)


def llama3_1_405b() -> Decoder:
    return _llama3(16_384, 126, 128, 53_248, 8.0)


def llama3_2_1b() -> Decoder:
    return _llama3(2048, 16, 32, 8192, 32.0, head="tied")


def llama3_2_3b() -> Decoder:
    return _llama3(3072, 28, 24, 8192, 32.0, head="tied")
