# SPDX-License-Identifier: Apache-2.0
"""Mistral 7B (Jiang et al. 2023, table 1; the window is of its first version) and Nemo (model card, 2024)."""

from dataclasses import replace

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.models.positions import Rotary


def _mistral(vocab_size: int = 32_000, theta: float = 10_000.0, window: int = 0) -> Decoder:
    model = llama(4096, 32, 32, 14_336, num_kv_heads=8, vocab_size=vocab_size, rotary=Rotary(theta))
    return replace(model, attention=Attention(32, num_kv_heads=8, window=window))


def mistral_7b() -> Decoder:
    """v0.1."""
    return _mistral(window=4096)


def mistral_7b_v0_2() -> Decoder:
    return _mistral(theta=1e6)


def mistral_7b_v0_3() -> Decoder:
    return _mistral(vocab_size=32_768, theta=1e6)


def mistral_nemo() -> Decoder:
    """12B."""
    model = llama(5120, 40, 32, 14_336, num_kv_heads=8, vocab_size=131_072, rotary=Rotary(1e6))
    return replace(model, attention=Attention(32, num_kv_heads=8, head_dim=128))
