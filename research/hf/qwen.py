# SPDX-License-Identifier: Apache-2.0
"""Qwen 1.5, 2 and 2.5 ("qwen2": biases of queries, keys and values), Qwen 3 (norms of heads), and their experts."""

from dataclasses import replace
from typing import Any

from research.hf.config import Config, common, layer_types, need, one_mlp, repeating, rms
from research.hf.family import Family
from research.hf.llama import ATTENTION, EMBEDDINGS, MLP, NORMS, TABLE, attention_of, decoder_of, heads_config
from research.hf.tables import Table, weight
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.routers import TopK

EXPERTS = (
    weight("mlp.gate.weight", "mlp/router", "E D -> D E"),
    weight("mlp.experts.{expert}.gate_proj.weight", "mlp/gate", "F D -> D F"),
    weight("mlp.experts.{expert}.up_proj.weight", "mlp/up", "F D -> D F"),
    weight("mlp.experts.{expert}.down_proj.weight", "mlp/down", "D F -> F D"),
    weight("mlp.shared_expert.gate_proj.weight", "mlp/shared/gate/w", "S D -> D S"),
    weight("mlp.shared_expert.up_proj.weight", "mlp/shared/up/w", "S D -> D S"),
    weight("mlp.shared_expert.down_proj.weight", "mlp/shared/down/w", "D S -> S D"),
    weight("mlp.shared_expert_gate.weight", "mlp/shared_gate/w", "1 D -> D 1"),
)
MOE_TABLE = Table(top=EMBEDDINGS, layers=NORMS + ATTENTION + EXPERTS + MLP)


def attentions(config: Config, **more: Any) -> Attention | tuple[Attention, ...]:
    """Layers from ``max_window_layers`` on see a window, where windows are in use at all."""
    count, full = config.whole("num_hidden_layers"), attention_of(config, **more)
    local = replace(full, window=config.whole("sliding_window", 0, absent=4096))
    first = config.whole("max_window_layers", 28)
    if not config.flag("use_sliding_window", False):
        config.unused("layer_types")
        return full
    default = ["full_attention" if i < first else "sliding_attention" for i in range(count)]
    kinds = {"full_attention": full, "sliding_attention": local}
    return repeating([kinds[kind] for kind in layer_types(config, count, default)])


def attentions_config(model: Decoder) -> tuple[Attention, dict[str, Any]]:
    """The attention of full layers, and which layers are none. Raises Unfit where they differ otherwise."""
    kinds = [attention for attention, _ in model.kinds]
    need(all(isinstance(a, Attention) for a in kinds), "another kind of attention")
    windows = {a.window for a in kinds if isinstance(a, Attention) and a.window}
    full = replace(kinds[0], window=0)
    need(isinstance(full, Attention) and all(replace(a, window=0) == full for a in kinds), "several kinds of attention")
    need(len(windows) <= 1, "windows of several sizes")
    assert isinstance(full, Attention)
    local = [bool(a.window) for a in kinds]
    first = local.index(True) if True in local else len(local)
    need(all(local[first:]), "full layers above layers with windows")
    used = {"sliding_window": windows.pop(), "max_window_layers": first} if windows else {"sliding_window": None}
    return full, {"use_sliding_window": True in local, **used}


def qwen2(config: Config) -> Decoder:
    config.must("hidden_act", ("silu",), "silu")
    return decoder_of(config, attentions(config, bias="qkv"), Mlp(config.whole("intermediate_size")))


def qwen2_config(model: Decoder, length: int) -> dict[str, Any]:
    attention, windows = attentions_config(model)
    mlp = one_mlp(model)
    need(attention.bias == "qkv", f"biases of {attention.bias}")
    return common(model, mlp, length) | heads_config(attention, model) | windows


def qwen3_attention(config: Config) -> Attention | tuple[Attention, ...]:
    bias = "all" if config.flag("attention_bias", False) else "none"
    return attentions(config, bias=bias, qk_norm=rms(config))


def qwen3(config: Config) -> Decoder:
    config.must("hidden_act", ("silu",), "silu")
    return decoder_of(config, qwen3_attention(config), Mlp(config.whole("intermediate_size")))


def qwen3_config(model: Decoder, length: int) -> dict[str, Any]:
    attention, windows = attentions_config(model)
    mlp = one_mlp(model)
    need(attention.qk_norm == model.norm, "no norms of heads like those of layers")
    bias = {"attention_bias": attention.bias == "all"}
    return common(model, mlp, length) | heads_config(attention, model) | windows | bias


def experts(config: Config, *, count: str, **more: Any) -> Mlp | Moe | tuple[Mlp | Moe, ...]:
    """The feed-forwards: every ``decoder_sparse_step``-th layer has experts, but for ``mlp_only_layers``."""
    router = TopK(config.whole("num_experts_per_tok"), renormalise=config.flag("norm_topk_prob", False))
    moe = Moe(config.whole(count), config.whole("moe_intermediate_size"), router, **more)
    step, dense = config.whole("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    mlp = Mlp(config.whole("intermediate_size", 0))
    kinds = [mlp if (i + 1) % step or i in dense else moe for i in range(config.whole("num_hidden_layers"))]
    return repeating(kinds)


def experts_config(model: Decoder) -> tuple[Moe, dict[str, Any]]:
    layers = model.feed_forwards
    moe, mlp = (next((m for m in layers if isinstance(m, kind)), None) for kind in (Moe, Mlp))
    need(isinstance(moe, Moe) and isinstance(moe.router, TopK), "no layers with experts")
    assert isinstance(moe, Moe) and isinstance(moe.router, TopK)
    need(moe.router.scale == 1.0 and moe.activation == "swiglu", "another router or activation")
    return moe, {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.router.k,
        "norm_topk_prob": moe.router.renormalise,
        "moe_intermediate_size": moe.d_ff,
        "intermediate_size": mlp.d_ff if mlp is not None else moe.d_ff,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, one in enumerate(layers) if isinstance(one, Mlp)],
    }


def qwen2_moe(config: Config) -> Decoder:
    config.must("hidden_act", ("silu",), "silu")
    bias = "qkv" if config.flag("qkv_bias", True) else "none"
    shared = config.whole("shared_expert_intermediate_size")
    moe = experts(config, count="num_experts", shared_d_ff=shared, shared_gate=True)
    config.must("use_sliding_window", (False,), False)
    return decoder_of(config, attentions(config, bias=bias), moe)


def qwen2_moe_config(model: Decoder, length: int) -> dict[str, Any]:
    (attention, windows), (moe, found) = attentions_config(model), experts_config(model)
    need(moe.shared_gate and moe.shared is not None, "no shared expert with a gate")
    found |= {"shared_expert_intermediate_size": moe.shared_d_ff, "qkv_bias": attention.bias == "qkv"}
    return common(model, moe, length) | heads_config(attention, model) | windows | found


def qwen3_moe(config: Config) -> Decoder:
    config.must("hidden_act", ("silu",), "silu")
    config.must("use_sliding_window", (False,), False)
    count = "num_experts" if config.get("num_experts", None) is not None else "num_local_experts"
    return decoder_of(config, qwen3_attention(config), experts(config, count=count))


def qwen3_moe_config(model: Decoder, length: int) -> dict[str, Any]:
    (attention, windows), (moe, found) = attentions_config(model), experts_config(model)
    need(moe.shared is None and attention.qk_norm == model.norm, "shared experts, or no norms of heads")
    found["attention_bias"] = attention.bias == "all"
    return common(model, moe, length) | heads_config(attention, model) | windows | found


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", TABLE, qwen2, qwen2_config)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", TABLE, qwen3, qwen3_config)
QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", MOE_TABLE, qwen2_moe, qwen2_moe_config)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", MOE_TABLE, qwen3_moe, qwen3_moe_config)
