# SPDX-License-Identifier: Apache-2.0
"""GPT-2 (Radford et al. 2019, table 2): pre-norm with biases, learned positions, tied heads."""

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm, WeightInit
from research.models.mlp import Mlp
from research.models.positions import Learned


def _gpt2(d_model: int, num_layers: int) -> Decoder:
    return Decoder(
        vocab_size=50_257,
        d_model=d_model,
        num_layers=num_layers,
        attention=Attention(num_heads=d_model // 64, bias="all"),
        mlp=Mlp(4 * d_model, "gelu", bias=True),
        norm=Norm("layer", 1e-5),
        position=Learned(1024),
        head="tied",
        weight_init=WeightInit("gpt2"),
    )


def gpt2() -> Decoder:
    """124M."""
    return _gpt2(768, 12)


def gpt2_medium() -> Decoder:
    """355M."""
    return _gpt2(1024, 24)


def gpt2_large() -> Decoder:
    """774M."""
    return _gpt2(1280, 36)


def gpt2_xl() -> Decoder:
    """1.5B."""
    return _gpt2(1600, 48)
