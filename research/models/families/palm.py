# SPDX-License-Identifier: Apache-2.0
"""PaLM (Chowdhery et al. 2022, table 1): one norm for attention and feed-forward side by side, no biases, MQA."""

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.mlp import Mlp


def _palm(d_model: int, num_layers: int, num_heads: int) -> Decoder:
    return Decoder(
        vocab_size=256_000,
        d_model=d_model,
        num_layers=num_layers,
        attention=Attention(num_heads, num_kv_heads=1, head_dim=256),
        mlp=Mlp(4 * d_model),
        norm=Norm("layer", bias=False),
        head="tied",
        logit_scale=d_model**-0.5,  # section 5, weight initialization: the table is drawn with a deviation of 1
        residual="parallel_shared",
    )


def palm_8b() -> Decoder:
    """8.63B."""
    return _palm(4096, 32, 16)


def palm_62b() -> Decoder:
    """62.50B."""
    return _palm(8192, 64, 32)


def palm_540b() -> Decoder:
    """540.35B."""
    return _palm(18_432, 118, 48)
