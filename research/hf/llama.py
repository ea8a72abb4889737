# SPDX-License-Identifier: Apache-2.0
"""LLaMA 1 to 3, Yi and their like ("llama"), and Mistral, which has windows besides."""

from dataclasses import replace
from typing import Any

from research.hf.config import Config, common, need, one_attention, one_mlp, rms, rope_config, rotary
from research.hf.family import Family
from research.hf.tables import Table, weight
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp

EMBEDDINGS = (
    weight("model.embed_tokens.weight", "embedding/table", "V D -> V D"),
    weight("model.norm.weight", "final_norm/scale", "D -> D"),
    weight("lm_head.weight", "unembedding/w", "V D -> D V"),
)
ATTENTION = (
    weight("self_attn.q_proj.weight", "attention/q/w", "(N H) D -> D N H"),
    weight("self_attn.k_proj.weight", "attention/k/w", "(K H) D -> D K H"),
    weight("self_attn.v_proj.weight", "attention/v/w", "(K H) D -> D K H"),
    weight("self_attn.q_proj.bias", "attention/q/b", "(N H) -> N H"),
    weight("self_attn.k_proj.bias", "attention/k/b", "(K H) -> K H"),
    weight("self_attn.v_proj.bias", "attention/v/b", "(K H) -> K H"),
    weight("self_attn.q_norm.weight", "attention/q_norm/scale", "H -> H"),
    weight("self_attn.k_norm.weight", "attention/k_norm/scale", "H -> H"),
    weight("self_attn.o_proj.weight", "attention/out/w", "D (N H) -> N H D"),
    weight("self_attn.o_proj.bias", "attention/out/b", "D -> D"),
)
MLP = (
    weight("mlp.gate_proj.weight", "mlp/gate/w", "F D -> D F"),
    weight("mlp.up_proj.weight", "mlp/up/w", "F D -> D F"),
    weight("mlp.down_proj.weight", "mlp/down/w", "D F -> F D"),
    weight("mlp.gate_proj.bias", "mlp/gate/b", "F -> F"),
    weight("mlp.up_proj.bias", "mlp/up/b", "F -> F"),
    weight("mlp.down_proj.bias", "mlp/down/b", "D -> D"),
)
NORMS = (
    weight("input_layernorm.weight", "attention_norm/scale", "D -> D"),
    weight("post_attention_layernorm.weight", "mlp_norm/scale", "D -> D"),
)
TABLE = Table(top=EMBEDDINGS, layers=NORMS + ATTENTION + MLP)


def attention_of(config: Config, **more: Any) -> Attention:
    """Heads as every config since LLaMA names them."""
    heads = config.whole("num_attention_heads")
    return Attention(
        num_heads=heads,
        num_kv_heads=config.whole("num_key_value_heads", heads),
        head_dim=config.whole("head_dim", config.whole("hidden_size") // heads, least=1),
        **more,
    )


def decoder_of(config: Config, attention: Any, mlp: Any, **more: Any) -> Decoder:
    more.setdefault("norm", rms(config))
    if "position" not in more:
        more["position"] = rotary(config)
    return Decoder(
        vocab_size=config.whole("vocab_size"),
        d_model=config.whole("hidden_size"),
        num_layers=config.whole("num_hidden_layers"),
        attention=attention,
        mlp=mlp,
        head="tied" if config.flag("tie_word_embeddings", False) else "untied",
        **more,
    )


def heads_config(attention: Attention, model: Decoder) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.width(model.d_model),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm.eps,
        **rope_config(attention.position or model.position),
    }


def llama(config: Config) -> Decoder:
    config.must("hidden_act", ("silu",), "silu")
    bias = "all" if config.flag("attention_bias", False) else "none"
    mlp = Mlp(config.whole("intermediate_size"), bias=config.flag("mlp_bias", False))
    return decoder_of(config, attention_of(config, bias=bias), mlp)


def llama_config(model: Decoder, length: int) -> dict[str, Any]:
    attention, mlp = one_attention(model), one_mlp(model)
    need(not attention.window, "windows")
    biases = {"attention_bias": attention.bias == "all", "mlp_bias": mlp.bias}
    return common(model, mlp, length) | heads_config(attention, model) | biases


def mistral(config: Config) -> Decoder:
    config.must("hidden_act", ("silu",), "silu")
    window = config.whole("sliding_window", 0, absent=4096)
    return decoder_of(config, attention_of(config, window=window), Mlp(config.whole("intermediate_size")))


def mistral_config(model: Decoder, length: int) -> dict[str, Any]:
    attention = one_attention(model)
    plain = replace(model, attention=replace(attention, window=0))
    found = {**llama_config(plain, length), "sliding_window": attention.window or None}
    return {name: value for name, value in found.items() if name not in ("attention_bias", "mlp_bias")}


LLAMA = Family("llama", "LlamaForCausalLM", TABLE, llama, llama_config)
MISTRAL = Family("mistral", "MistralForCausalLM", TABLE, mistral, mistral_config)
