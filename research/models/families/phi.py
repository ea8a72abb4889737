# SPDX-License-Identifier: Apache-2.0
"""Phi-1 and 1.5 (Gunasekar et al. 2023, Li et al. 2023), Phi-2 (model card) and Phi-3 (Abdin et al. 2024, section 2).

Phi-3-small, whose layers see blocks in a pattern of their own, is not among them.
"""

from dataclasses import replace

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.positions import Rotary


def _phi(d_model: int, num_layers: int, fraction: float) -> Decoder:
    """One norm for attention and feed-forward side by side, biases everywhere, a part of each head turns."""
    return Decoder(
        vocab_size=51_200,
        d_model=d_model,
        num_layers=num_layers,
        attention=Attention(32, bias="all"),
        mlp=Mlp(4 * d_model, "gelu", bias=True),
        norm=Norm("layer", 1e-5),
        position=Rotary(fraction=fraction),
        residual="parallel_shared",
        head_bias=True,
    )


def phi_1() -> Decoder:
    return _phi(2048, 24, 0.5)


def phi_1_5() -> Decoder:
    return phi_1()


def phi_2() -> Decoder:
    return _phi(2560, 32, 0.4)


def phi_3_mini() -> Decoder:
    """3.8B, of 4,096 positions."""
    model = llama(3072, 32, 32, 8192, vocab_size=32_064)
    return replace(model, attention=Attention(32, window=2047))


def phi_3_medium() -> Decoder:
    """14B, of 4,096 positions."""
    model = llama(5120, 40, 40, 17_920, vocab_size=32_064)
    return replace(model, attention=Attention(40, num_kv_heads=10, window=2047))
