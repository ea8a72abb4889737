# SPDX-License-Identifier: Apache-2.0
"""Phi-3: LLaMA with queries, keys and values in one tensor, and gate and up projection in another."""

from typing import Any

from research.hf.config import Config, common, need, one_attention, one_mlp, rms, rotary
from research.hf.family import Family
from research.hf.llama import EMBEDDINGS, NORMS, attention_of, decoder_of, heads_config
from research.hf.tables import Part, Table, line, weight
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.models.positions import Rotary

TABLE = Table(
    top=EMBEDDINGS,
    layers=(
        *NORMS,
        line(
            "self_attn.qkv_proj.weight",
            Part("attention/q/w", "(N H) D -> D N H", size="N H"),
            Part("attention/k/w", "(K H) D -> D K H", size="K H"),
            Part("attention/v/w", "(K H) D -> D K H", size="K H"),
        ),
        weight("self_attn.o_proj.weight", "attention/out/w", "D (N H) -> N H D"),
        line(
            "mlp.gate_up_proj.weight",
            Part("mlp/gate/w", "F D -> D F", size="F"),
            Part("mlp/up/w", "F D -> D F", size="F"),
        ),
        weight("mlp.down_proj.weight", "mlp/down/w", "D F -> F D"),
    ),
)


def phi3(config: Config) -> Decoder:
    config.must("hidden_act", ("silu",), "silu")
    config.must("attention_bias", (False,), False)
    config.unused("original_max_position_embeddings")  # of a scaling, which would read it
    rope = config.rope
    fraction = Config(rope, config.where).number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    attention = attention_of(config, window=config.whole("sliding_window", 0))
    mlp = Mlp(config.whole("intermediate_size"))
    return decoder_of(config, attention, mlp, norm=rms(config, eps=1e-5), position=rotary(config, fraction=fraction))


def phi3_config(model: Decoder, length: int) -> dict[str, Any]:
    attention, mlp, position = one_attention(model), one_mlp(model), model.position
    need(isinstance(position, Rotary), "positions that are not rotary")
    assert isinstance(position, Rotary)
    return common(model, mlp, length) | heads_config(attention, model) | {
        "partial_rotary_factor": position.fraction,
        "sliding_window": attention.window or None,
        "original_max_position_embeddings": length,
        "pad_token_id": None,
    }  # fmt: skip


PHI3 = Family("phi3", "Phi3ForCausalLM", TABLE, phi3, phi3_config)
