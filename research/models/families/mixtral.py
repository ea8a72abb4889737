# SPDX-License-Identifier: Apache-2.0
"""Mixtral (Jiang et al. 2024, table 1; 8x22B: model card): Mistral with eight experts, each token to two."""

from dataclasses import replace

from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.models.moe import Moe
from research.models.positions import Rotary
from research.models.routers import TopK


def _mixtral(d_model: int, num_layers: int, num_heads: int, d_ff: int, vocab_size: int) -> Decoder:
    rotary = Rotary(1e6)
    model = llama(d_model, num_layers, num_heads, d_ff, num_kv_heads=8, vocab_size=vocab_size, rotary=rotary)
    return replace(model, mlp=Moe(8, d_ff, TopK(2)))


def mixtral_8x7b() -> Decoder:
    """46.7B, 12.9B active."""
    return _mixtral(4096, 32, 32, 14_336, 32_000)


def mixtral_8x22b() -> Decoder:
    """141B, 39B active."""
    return _mixtral(6144, 56, 48, 16_384, 32_768)
