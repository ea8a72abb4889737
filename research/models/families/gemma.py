# SPDX-License-Identifier: Apache-2.0
"""Gemma 1 (2024, table 1), 2 (2024, table 1) and 3, its text models (2025, section 2 and table 1)."""

import math
from typing import Any

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.positions import Rotary
from research.models.rope_scaling import Linear

NORM = Norm(eps=1e-6, offset=1.0)


def _gemma(d_model: int, num_layers: int, attention: Any, d_ff: int, vocab_size: int = 256_000, **more) -> Decoder:
    """Heads of a width of their own, embeddings times sqrt(d_model), GEGLU."""
    return Decoder(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        attention=attention,
        mlp=Mlp(d_ff, "geglu"),
        norm=NORM,
        head="tied",
        embedding_scale=math.sqrt(d_model),
        **more,
    )


def gemma_2b() -> Decoder:
    return _gemma(2048, 18, Attention(8, num_kv_heads=1, head_dim=256), 16_384)


def gemma_7b() -> Decoder:
    return _gemma(3072, 28, Attention(16, head_dim=256), 24_576)


def _gemma2(d_model: int, num_layers: int, heads: tuple[int, int, int], d_ff: int, scalar: float = 256.0) -> Decoder:
    """Local and global layers in turn, caps, norms all around. heads: of queries, of keys, and their width; scalar: the
    scores are divided by its square root."""
    common: dict[str, Any] = dict(num_kv_heads=heads[1], head_dim=heads[2], scale=scalar**-0.5, cap=50.0)
    attention = (Attention(heads[0], window=4096, **common), Attention(heads[0], **common))
    return _gemma(d_model, num_layers, attention, d_ff, norms="sandwich", logit_cap=30.0)


def gemma2_2b() -> Decoder:
    return _gemma2(2304, 26, (8, 4, 256), 9216)


def gemma2_9b() -> Decoder:
    return _gemma2(3584, 42, (16, 8, 256), 14_336)


def gemma2_27b() -> Decoder:
    return _gemma2(4608, 46, (32, 16, 128), 36_864, scalar=144.0)


def _gemma3(
    d_model: int,
    num_layers: int,
    heads: tuple[int, int, int],
    d_ff: int,
    *,
    window: int = 1024,
    scalar: float = 256.0,
    factor: float = 8.0,
    vocab_size: int = 262_208,
) -> Decoder:
    """Five local layers for each global one, with rotary positions of their own, and norms of heads. factor: by which
    the global layers' positions are stretched; 1 for not at all."""
    common: dict[str, Any] = dict(num_kv_heads=heads[1], head_dim=heads[2], scale=scalar**-0.5, qk_norm=NORM)
    far = Rotary(1e6, scaling=Linear(factor) if factor > 1 else None)
    local = Attention(heads[0], window=window, position=Rotary(), **common)
    attention = (local,) * 5 + (Attention(heads[0], position=far, **common),)
    return _gemma(d_model, num_layers, attention, d_ff, vocab_size, norms="sandwich", position=far)


def gemma3_270m() -> Decoder:
    return _gemma3(640, 18, (4, 1, 256), 2048, window=512, factor=1.0, vocab_size=262_144)


def gemma3_1b() -> Decoder:
    return _gemma3(1152, 26, (4, 1, 256), 6912, window=512, factor=1.0, vocab_size=262_144)


def gemma3_4b() -> Decoder:
    return _gemma3(2560, 34, (8, 4, 256), 10_240)


def gemma3_12b() -> Decoder:
    return _gemma3(3840, 48, (16, 8, 256), 15_360)


def gemma3_27b() -> Decoder:
    return _gemma3(5376, 62, (32, 16, 128), 21_504, scalar=168.0)
