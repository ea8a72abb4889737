# SPDX-License-Identifier: Apache-2.0
"""GLaM (Du et al. 2021, table 4 and section 4): experts in every second layer, plain ones of two matrices; the others
gated by GELU; relative biases of each layer."""

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.positions import RelativeBias
from research.models.routers import glam as router


def _glam(d_model: int, num_layers: int, num_heads: int) -> Decoder:
    return Decoder(
        vocab_size=262_144,
        d_model=d_model,
        num_layers=num_layers,
        attention=Attention(num_heads, head_dim=128),
        mlp=(Mlp(4 * d_model, "geglu"), Moe(64, 4 * d_model, router(), activation="gelu")),
        position=RelativeBias(per_layer=True),
        head="tied",
    )


def glam_8b_64e() -> Decoder:
    """143B parameters."""
    return _glam(4096, 32, 32)


def glam_64b_64e() -> Decoder:
    """1.2T parameters, 96.6B for each token."""
    return _glam(8192, 64, 128)
