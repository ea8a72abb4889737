# SPDX-License-Identifier: Apache-2.0
"""Gopher (Rae et al. 2021, table 1): RMSNorm and the relative positions of Transformer-XL, whose projections count."""

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.models.positions import TransformerXL


def gopher(d_model: int = 16_384, num_layers: int = 80, num_heads: int = 128, head_dim: int = 128) -> Decoder:
    """280B, or another row of the table."""
    return Decoder(
        vocab_size=32_000,
        d_model=d_model,
        num_layers=num_layers,
        attention=Attention(num_heads, head_dim=head_dim),
        mlp=Mlp(4 * d_model, "gelu"),
        position=TransformerXL(),
        head="tied",
    )


def gopher_44m() -> Decoder:
    """44M."""
    return gopher(512, 8, 16, 32)


def gopher_117m() -> Decoder:
    """117M."""
    return gopher(768, 12, 12, 64)


def gopher_417m() -> Decoder:
    """417M."""
    return gopher(1536, 12, 12)


def gopher_1_4b() -> Decoder:
    """1.4B."""
    return gopher(2048, 24, 16)


def gopher_7_1b() -> Decoder:
    """7.1B."""
    return gopher(4096, 32, 32)


def gopher_280b() -> Decoder:
    """280B."""
    return gopher()
