# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2 and V3: latent attention whose rotary dimensions are stored in pairs, routed and shared experts, and in
V3 a bias of the router's choice and a layer that predicts one token further."""

from typing import Any

from research.hf.config import Config, common, need, rope_config
from research.hf.family import Family
from research.hf.llama import EMBEDDINGS, MLP, NORMS, decoder_of
from research.hf.tables import Part, Table, line, weight
from research.models.decoder import Decoder
from research.models.latent_attention import LatentAttention
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.routers import Sigmoid, TopK

ATTENTION = (
    weight("self_attn.q_proj.weight", "attention/q/w", "(N H) D -> D N H", turned="Z"),
    weight("self_attn.q_a_proj.weight", "attention/q_down/w", "Q D -> D Q"),
    weight("self_attn.q_a_layernorm.weight", "attention/q_norm/scale", "Q -> Q"),
    weight("self_attn.q_b_proj.weight", "attention/q_up/w", "(N H) Q -> Q N H", turned="Z"),
    line(
        "self_attn.kv_a_proj_with_mqa.weight",
        Part("attention/kv_down/w", "R D -> D R", size="R"),
        Part("attention/k_rope/w", "Z D -> D Z", size="Z", turned="Z"),
    ),
    weight("self_attn.kv_a_layernorm.weight", "attention/kv_norm/scale", "R -> R"),
    line(
        "self_attn.kv_b_proj.weight",
        Part("attention/k_up/w", "X N R -> R N X", size="P"),
        Part("attention/v_up/w", "X N R -> R N X", size="U"),
        front="(N X) R -> X N R",
    ),
    weight("self_attn.o_proj.weight", "attention/out/w", "D (N U) -> N U D"),
)
EXPERTS = (
    weight("mlp.gate.weight", "mlp/router", "E D -> D E"),
    weight("mlp.gate.e_score_correction_bias", "mlp/bias", "E -> E", buffer=True),
    weight("mlp.experts.{expert}.gate_proj.weight", "mlp/gate", "F D -> D F"),
    weight("mlp.experts.{expert}.up_proj.weight", "mlp/up", "F D -> D F"),
    weight("mlp.experts.{expert}.down_proj.weight", "mlp/down", "D F -> F D"),
    weight("mlp.shared_experts.gate_proj.weight", "mlp/shared/gate/w", "S D -> D S"),
    weight("mlp.shared_experts.up_proj.weight", "mlp/shared/up/w", "S D -> D S"),
    weight("mlp.shared_experts.down_proj.weight", "mlp/shared/down/w", "D S -> S D"),
)
FURTHER = (
    weight("enorm.weight", "token_norm/scale", "D -> D"),
    weight("hnorm.weight", "hidden_norm/scale", "D -> D"),
    weight("eh_proj.weight", "join/w", "D (two C) -> two C D"),
    weight("shared_head.norm.weight", "norm/scale", "D -> D"),
)
TABLE = Table(top=EMBEDDINGS, layers=NORMS + ATTENTION + EXPERTS + MLP, ahead=FURTHER)


def latent(config: Config) -> LatentAttention:
    config.must("attention_bias", (False,), False)
    config.must("rope_interleave", (True,), True)
    heads = config.whole("num_attention_heads")
    config.must("num_key_value_heads", (heads,), heads)
    return LatentAttention(
        num_heads=heads,
        kv_rank=config.whole("kv_lora_rank"),
        q_rank=config.whole("q_lora_rank", 0),
        nope_dim=config.whole("qk_nope_head_dim"),
        rope_dim=config.whole("qk_rope_head_dim"),
        v_dim=config.whole("v_head_dim"),
        norm=Norm(),  # its epsilon is 1e-6 whatever rms_norm_eps is
    )


def _decoder(config: Config, router: Sigmoid | TopK) -> Decoder:
    config.must("hidden_act", ("silu",), "silu")
    config.must("moe_layer_freq", (1,), 1)
    width, dense = config.whole("moe_intermediate_size"), config.whole("first_k_dense_replace", least=0)
    shared = width * config.whole("n_shared_experts", 0)
    moe = Moe(config.whole("n_routed_experts"), width, router, shared_d_ff=shared)
    first = (Mlp(config.whole("intermediate_size")),) * dense
    return decoder_of(config, latent(config), moe, first=first)


def deepseek_v3(config: Config) -> Decoder:
    config.must("scoring_func", ("sigmoid",), "sigmoid")
    config.must("topk_method", ("noaux_tc",), "noaux_tc")
    router = Sigmoid(
        k=config.whole("num_experts_per_tok"),
        groups=config.whole("n_group"),
        top_groups=config.whole("topk_group"),
        scale=config.number("routed_scaling_factor"),
        renormalise=config.flag("norm_topk_prob", True),
    )
    return _decoder(config, router)


def deepseek_v2(config: Config) -> Decoder:
    config.must("scoring_func", ("softmax",), "softmax")
    config.must("norm_topk_prob", (False,), False)
    grouped = config.must("topk_method", ("greedy", "group_limited_greedy"), "greedy") != "greedy"
    router = TopK(
        config.whole("num_experts_per_tok"),
        renormalise=False,
        groups=config.whole("n_group", 1) if grouped else 1,
        top_groups=config.whole("topk_group", 1) if grouped else 1,
        scale=config.number("routed_scaling_factor", 1.0),
    )
    return _decoder(config, router)


def _config(model: Decoder, length: int) -> tuple[Moe, dict[str, Any]]:
    attention, moe = model.attentions[0], model.mlp
    need(len(model.attentions) == 1 and isinstance(attention, LatentAttention), "attention that is not latent")
    need(isinstance(moe, Moe) and all(isinstance(mlp, Mlp) for mlp in model.first), "layers without experts")
    assert isinstance(attention, LatentAttention) and isinstance(moe, Moe)
    need(moe.shared_d_ff % moe.d_ff == 0 and not moe.shared_gate, "shared experts of another width")
    dense = model.first[0].d_ff if model.first else moe.d_ff
    return moe, common(model, moe, length) | rope_config(attention.position or model.position) | {
        "intermediate_size": dense,
        "moe_intermediate_size": moe.d_ff,
        "first_k_dense_replace": len(model.first),
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_d_ff // moe.d_ff,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "kv_lora_rank": attention.kv_rank,
        "q_lora_rank": attention.q_rank or None,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.v_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm.eps,
        "moe_layer_freq": 1,
    }  # fmt: skip


def deepseek_v3_config(model: Decoder, length: int) -> dict[str, Any]:
    moe, found = _config(model, length)
    router = moe.router
    need(isinstance(router, Sigmoid) and router.bias_rate > 0, "a router without a bias of its choice")
    assert isinstance(router, Sigmoid)
    return found | {
        "num_experts_per_tok": router.k,
        "n_group": router.groups,
        "topk_group": router.top_groups,
        "routed_scaling_factor": router.scale,
        "norm_topk_prob": router.renormalise,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": model.ahead,
    }


def deepseek_v2_config(model: Decoder, length: int) -> dict[str, Any]:
    moe, found = _config(model, length)
    router = moe.router
    need(isinstance(router, TopK) and not router.renormalise and not model.ahead, "another router")
    assert isinstance(router, TopK)
    return found | {
        "num_experts_per_tok": router.k,
        "n_group": router.groups,
        "topk_group": router.top_groups,
        "routed_scaling_factor": router.scale,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if router.groups > 1 else "greedy",
    }


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", TABLE, deepseek_v2, deepseek_v2_config)
DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", TABLE, deepseek_v3, deepseek_v3_config)
