# SPDX-License-Identifier: Apache-2.0
"""Yi (Young et al. 2024, table 1; 9B: model card): LLaMA with grouped heads at every size."""

from research.models.decoder import Decoder
from research.models.families.llama import llama
from research.models.positions import Rotary


def _yi(d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, d_ff: int) -> Decoder:
    kv = dict(num_kv_heads=num_kv_heads, vocab_size=64_000)
    return llama(d_model, num_layers, num_heads, d_ff, rotary=Rotary(5e6), **kv)


def yi_6b() -> Decoder:
    return _yi(4096, 32, 32, 4, 11_008)


def yi_9b() -> Decoder:
    return _yi(4096, 48, 32, 4, 11_008)


def yi_34b() -> Decoder:
    return _yi(7168, 60, 56, 8, 20_480)
