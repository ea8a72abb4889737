# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX and Pythia: queries, keys and values of each head side by side, attention beside the feed-forward."""

from typing import Any

from research.hf.config import Config, need, one_attention, one_mlp, rope_config, rotary
from research.hf.family import Family
from research.hf.tables import Part, Table, line, weight
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.positions import Rotary

ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}
TABLE = Table(
    prefix="gpt_neox.",
    layer="gpt_neox.layers.{layer}.",
    unneeded=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    top=(
        weight("gpt_neox.embed_in.weight", "embedding/table", "V D -> V D"),
        weight("gpt_neox.final_layer_norm.weight", "final_norm/scale", "D -> D"),
        weight("gpt_neox.final_layer_norm.bias", "final_norm/bias", "D -> D"),
        weight("embed_out.weight", "unembedding/w", "V D -> D V"),
    ),
    layers=(
        weight("input_layernorm.weight", "attention_norm/scale", "D -> D"),
        weight("input_layernorm.bias", "attention_norm/bias", "D -> D"),
        weight("post_attention_layernorm.weight", "mlp_norm/scale", "D -> D"),
        weight("post_attention_layernorm.bias", "mlp_norm/bias", "D -> D"),
        line(
            "attention.query_key_value.weight",
            *(Part(f"attention/{name}/w", "1 N H D -> D N H", size="1") for name in "qkv"),
            front="(N three H) D -> three N H D",
        ),
        line(
            "attention.query_key_value.bias",
            *(Part(f"attention/{name}/b", "1 N H -> N H", size="1") for name in "qkv"),
            front="(N three H) -> three N H",
        ),
        weight("attention.dense.weight", "attention/out/w", "D (N H) -> N H D"),
        weight("attention.dense.bias", "attention/out/b", "D -> D"),
        weight("mlp.dense_h_to_4h.weight", "mlp/up/w", "F D -> D F"),
        weight("mlp.dense_h_to_4h.bias", "mlp/up/b", "F -> F"),
        weight("mlp.dense_4h_to_h.weight", "mlp/down/w", "D F -> F D"),
        weight("mlp.dense_4h_to_h.bias", "mlp/down/b", "D -> D"),
    ),
)


def gpt_neox(config: Config) -> Decoder:
    kind = config.must("hidden_act", tuple(ACTIVATIONS), "gelu")
    theta, rope = config.number("rotary_emb_base", 10_000), config.rope
    fraction = Config(rope, config.where).number("partial_rotary_factor", config.number("rotary_pct", 0.25))
    return Decoder(
        vocab_size=config.whole("vocab_size"),
        d_model=config.whole("hidden_size"),
        num_layers=config.whole("num_hidden_layers"),
        attention=Attention(
            config.whole("num_attention_heads"), bias="all" if config.flag("attention_bias", True) else "none"
        ),
        mlp=Mlp(config.whole("intermediate_size"), ACTIVATIONS[kind], bias=True),  # type: ignore[arg-type]
        norm=Norm("layer", config.number("layer_norm_eps", 1e-5)),
        position=rotary(config, rope, fraction=fraction, theta=theta),
        head="tied" if config.flag("tie_word_embeddings", False) else "untied",
        residual="parallel" if config.flag("use_parallel_residual", True) else "sequential",
    )


def gpt_neox_config(model: Decoder, length: int) -> dict[str, Any]:
    attention, mlp, position = one_attention(model), one_mlp(model), model.position
    need(isinstance(position, Rotary) and mlp.activation in ACTIVATIONS.values(), "other positions or activations")
    assert isinstance(position, Rotary)
    rope = rope_config(position)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "intermediate_size": mlp.d_ff,
        "hidden_act": "gelu" if mlp.activation == "gelu_exact" else "gelu_new",
        "max_position_embeddings": length,
        "layer_norm_eps": model.norm.eps,
        "attention_bias": attention.bias == "all",
        "rotary_emb_base": position.theta,
        "rotary_pct": position.fraction,
        "rope_scaling": rope.get("rope_scaling"),
        "use_parallel_residual": model.residual == "parallel",
        "tie_word_embeddings": model.head == "tied",
    }


GPT_NEOX = Family("gpt_neox", "GPTNeoXForCausalLM", TABLE, gpt_neox, gpt_neox_config)
