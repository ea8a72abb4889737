# SPDX-License-Identifier: Apache-2.0
"""placeholder"""
from research.core.sharding import MeshSpec
from research.core.types import Precision
from research.data.pipeline import TextSource
from research.data.sources import Synthetic
from research.data.tokenizers import Bytes
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.positions import Rotary
from research.objectives.next_token import NextToken
from research.train.experiment import AdamW, Experiment, Steps

LLAMA_2_7B = Decoder(
    vocab_size=32_000,
    d_model=4096,
    num_layers=32,
    attention=Attention(num_heads=32),
    mlp=Mlp(d_ff=11_008),
    norm=Norm(eps=1e-5),
    remat="full",
)
LLAMA_3_8B = Decoder(
    vocab_size=128_256,
    d_model=4096,
    num_layers=32,
    attention=Attention(num_heads=32, num_kv_heads=8),
    mlp=Mlp(d_ff=14_336),
    norm=Norm(eps=1e-5),
    position=Rotary(theta=500_000.0),
    remat="full",
)


def pretraining(name: str, model: Decoder, *, mesh: MeshSpec, rows: int, length: int) -> Experiment:
    return Experiment(
        name=name,
        model=model,
        objective=NextToken(),
        source=TextSource(corpus=Synthetic(), tokenizer=Bytes(), batch_size=rows, sequence_length=length),
        optimizer=AdamW(),
        length=Steps(1000),
        mesh=mesh,
        precision=Precision(compute="bfloat16", logits="bfloat16"),
    )
