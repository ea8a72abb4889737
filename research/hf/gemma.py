# SPDX-License-Identifier: Apache-2.0
"""Gemma 1, 2 and 3 (text): embeddings times sqrt(d_model), norms by 1 + w, and from the second on norms all around,
windows in some layers and caps."""

import math
from dataclasses import replace
from typing import Any

from research.hf.config import (
    Config,
    common,
    layer_types,
    need,
    one_attention,
    one_mlp,
    repeating,
    rms,
    rope_config,
    rotary,
)
from research.hf.family import Family
from research.hf.llama import ATTENTION, EMBEDDINGS, MLP, TABLE, attention_of, decoder_of
from research.hf.tables import Table, weight
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.mlp import Mlp

SANDWICH = (
    weight("input_layernorm.weight", "attention_norm/scale", "D -> D"),
    weight("post_attention_layernorm.weight", "post_attention_norm/scale", "D -> D"),
    weight("pre_feedforward_layernorm.weight", "mlp_norm/scale", "D -> D"),
    weight("post_feedforward_layernorm.weight", "post_mlp_norm/scale", "D -> D"),
)
SANDWICH_TABLE = Table(top=EMBEDDINGS, layers=SANDWICH + ATTENTION + MLP)
TANH = ("gelu_pytorch_tanh", "gelu_tanh", "gelu_new")


def decoder(config: Config, attention: Any, *, logit_cap: float = 0.0, **more: Any) -> Decoder:
    found = decoder_of(
        config,
        attention,
        Mlp(config.whole("intermediate_size"), "geglu"),
        norm=rms(config, offset=1.0),
        embedding_scale=math.sqrt(config.whole("hidden_size")),
        logit_cap=logit_cap,
        **more,
    )
    return replace(found, head="tied" if config.flag("tie_word_embeddings", True) else "untied")


def bias(config: Config) -> str:
    return "all" if config.flag("attention_bias", False) else "none"


def gemma(config: Config) -> Decoder:
    """The first configs say "gelu" and mean its tanh form."""
    if config.get("hidden_activation", None) is None:
        config.must("hidden_act", ("gelu", *TANH), "gelu")
    else:
        config.must("hidden_activation", TANH)
        config.unused("hidden_act")
    return decoder(config, attention_of(config, bias=bias(config)))


def scaled(config: Config, **more: Any) -> Attention:
    """Attention with scores over the square root of ``query_pre_attn_scalar``."""
    config.unused("sliding_window_size")  # some files say it twice
    config.must("hidden_activation", TANH, TANH[0])
    config.unused("hidden_act")
    config.must("use_bidirectional_attention", (False,), False)
    attention = attention_of(config, bias=bias(config), **more)
    scale = config.number("query_pre_attn_scalar", 256) ** -0.5
    return replace(attention, scale=scale)


def gemma2(config: Config) -> Decoder:
    count = config.whole("num_hidden_layers")
    full = scaled(config, cap=config.number("attn_logit_softcapping", 0.0, absent=50.0))
    local = replace(full, window=config.whole("sliding_window", 4096))
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    kinds = {"full_attention": full, "sliding_attention": local}
    attention = repeating([kinds[kind] for kind in layer_types(config, count, default)])
    cap = config.number("final_logit_softcapping", 0.0, absent=30.0)
    return decoder(config, attention, logit_cap=cap, norms="sandwich")


def gemma3(config: Config) -> Decoder:
    count, rope = config.whole("num_hidden_layers"), Config(config.part("rope_parameters"), config.where)
    every = config.whole("sliding_window_pattern", config.get("_sliding_window_pattern", 6), least=1)
    if "full_attention" in rope.values:
        far = rotary(config, rope.part("full_attention"), theta=1e6)
        near = rotary(config, rope.part("sliding_attention"))
    else:
        far = rotary(config, theta=1e6)
        near = rotary(config, {"rope_theta": config.number("rope_local_base_freq", 10_000.0)})
    full = replace(scaled(config), qk_norm=rms(config, offset=1.0), position=far)
    local = replace(full, window=config.whole("sliding_window", 4096), position=near)
    default = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    kinds = {"full_attention": full, "sliding_attention": local}
    attention = repeating([kinds[kind] for kind in layer_types(config, count, default)])
    cap = config.number("final_logit_softcapping", 0.0)
    return decoder(config, attention, logit_cap=cap, norms="sandwich", position=far)


def gemma_config(model: Decoder, length: int) -> dict[str, Any]:
    attention = one_attention(model)
    need(not attention.window and attention.scale is None and model.logit_cap == 0, "windows, scales or caps")
    return _config(model, attention, length) | rope_config(attention.position or model.position)


def _config(model: Decoder, attention: Attention, length: int) -> dict[str, Any]:
    mlp = one_mlp(model)
    need(model.norm.offset == 1.0, "norms by w")
    return common(model, mlp, length) | {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.width(model.d_model),
        "attention_bias": attention.bias == "all",
        "hidden_activation": TANH[0],
        "hidden_act": TANH[0],
        "rms_norm_eps": model.norm.eps,
    }


def _mixed(model: Decoder, *, same: tuple[str, ...]) -> tuple[Attention, Attention, dict[str, Any]]:
    """A full and a local layer, and what configs say of which is which."""
    kinds = [attention for attention, _ in model.kinds]
    full = next((a for a in kinds if isinstance(a, Attention) and not a.window), None)
    local = next((a for a in kinds if isinstance(a, Attention) and a.window), None)
    need(full is not None or local is not None, "another kind of attention")
    full, local = full or replace(local, window=0), local or full  # type: ignore[arg-type]
    assert isinstance(full, Attention) and isinstance(local, Attention)
    need(all(a in (full, local) for a in kinds), "more than two kinds of attention")
    need(all(getattr(full, name) == getattr(local, name) for name in same), "layers that differ in more than windows")
    scale = full.scale if full.scale is not None else full.width(model.d_model) ** -0.5
    names = {True: "sliding_attention", False: "full_attention"}
    return full, local, {
        "layer_types": [names[bool(a.window)] for a in kinds],
        "sliding_window": local.window or 4096,
        "query_pre_attn_scalar": _whole(scale**-2),
        "attn_logit_softcapping": full.cap or None,
        "final_logit_softcapping": model.logit_cap or None,
    }  # fmt: skip


def _whole(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


HEADS = ("num_heads", "num_kv_heads", "head_dim", "bias", "qk_norm", "scale", "cap", "clip", "sinks", "first_tokens")


def gemma2_config(model: Decoder, length: int) -> dict[str, Any]:
    full, _, found = _mixed(model, same=(*HEADS, "position"))
    need(model.norms == "sandwich" and full.qk_norm is None, "no norms all around, or norms of heads")
    return _config(model, full, length) | rope_config(full.position or model.position) | found


def gemma3_config(model: Decoder, length: int) -> dict[str, Any]:
    full, local, found = _mixed(model, same=HEADS)
    need(model.norms == "sandwich" and full.qk_norm == Norm("rms", model.norm.eps, offset=1.0), "no norms of heads")
    near = rope_config(local.position or model.position)
    need("rope_scaling" not in near or not local.window, "scaled rotary positions in local layers")
    found["rope_local_base_freq"] = near["rope_theta"]
    return _config(model, full, length) | rope_config(full.position or model.position) | found


GEMMA = Family("gemma", "GemmaForCausalLM", TABLE, gemma, gemma_config)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", SANDWICH_TABLE, gemma2, gemma2_config)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", SANDWICH_TABLE, gemma3, gemma3_config)
