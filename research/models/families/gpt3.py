# SPDX-License-Identifier: Apache-2.0
"""GPT-3 (Brown et al. 2020, table 2.1): GPT-2 with dense and locally banded layers in turn.

The paper says "as in the Sparse Transformer" and gives no width of the bands: 256 here. Its 1.3B has 24 heads of 128 in
the table, which are wider than d_model 2048 and more than 1.3B parameters: 16 here.
"""

from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm, WeightInit
from research.models.mlp import Mlp
from research.models.positions import Learned

BAND = 256


def _gpt3(d_model: int, num_layers: int, num_heads: int) -> Decoder:
    dense, banded = (Attention(num_heads, bias="all", window=window) for window in (0, BAND))
    return Decoder(
        vocab_size=50_257,
        d_model=d_model,
        num_layers=num_layers,
        attention=(dense, banded),
        mlp=Mlp(4 * d_model, "gelu", bias=True),
        norm=Norm("layer", 1e-5),
        position=Learned(2048),
        head="tied",
        weight_init=WeightInit("gpt2"),
    )


def gpt3_small() -> Decoder:
    """125M."""
    return _gpt3(768, 12, 12)


def gpt3_medium() -> Decoder:
    """350M."""
    return _gpt3(1024, 24, 16)


def gpt3_large() -> Decoder:
    """760M."""
    return _gpt3(1536, 24, 16)


def gpt3_xl() -> Decoder:
    """1.3B."""
    return _gpt3(2048, 24, 16)


def gpt3_2_7b() -> Decoder:
    """2.7B."""
    return _gpt3(2560, 32, 32)


def gpt3_6_7b() -> Decoder:
    """6.7B."""
    return _gpt3(4096, 32, 32)


def gpt3_13b() -> Decoder:
    """13B; the table's d_model of 5140 is no multiple of its 40 heads: 5120."""
    return _gpt3(5120, 40, 40)


def gpt3_175b() -> Decoder:
    """175B."""
    return _gpt3(12_288, 96, 96)
