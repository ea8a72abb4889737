# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX-20B (Black et al. 2022, section 2.1) and Pythia (Biderman et al. 2023, table 1): attention and feed-forward
side by side, each behind its norm; a quarter of each head turns."""

from dataclasses import replace

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.positions import Rotary


def _neox(d_model: int, num_layers: int, num_heads: int, vocab_size: int = 50_304) -> Decoder:
    """vocab_size: as padded to share it out over devices."""
    return Decoder(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        attention=Attention(num_heads, bias="all"),
        mlp=Mlp(4 * d_model, "gelu_exact", bias=True),
        norm=Norm("layer", 1e-5),
        position=Rotary(fraction=0.25),
        residual="parallel",
    )


def gpt_neox_20b() -> Decoder:
    """The feed-forward's GELU is the tanh form, Pythia's the exact one."""
    return replace(_neox(6144, 44, 64, 50_432), mlp=Mlp(4 * 6144, "gelu", bias=True))


def pythia_70m() -> Decoder:
    return _neox(512, 6, 8)


def pythia_160m() -> Decoder:
    return _neox(768, 12, 12)


def pythia_410m() -> Decoder:
    return _neox(1024, 24, 16)


def pythia_1b() -> Decoder:
    return _neox(2048, 16, 8)


def pythia_1_4b() -> Decoder:
    return _neox(2048, 24, 16)


def pythia_2_8b() -> Decoder:
    return _neox(2560, 32, 32)


def pythia_6_9b() -> Decoder:
    return _neox(4096, 32, 32, 50_432)


def pythia_12b() -> Decoder:
    return _neox(5120, 36, 40, 50_688)
