# SPDX-License-Identifier: Apache-2.0
"""What the goldens are made of: small models of each family whose every option differs from what a default would give.

Sliding windows are shorter than the sequence, epsilons larger than usual, soft caps low enough to bend, and RoPE is
scaled within the 24 positions: an importer that overlooks one of these gives other logits. ``matters`` names options
that the script changes, one at a time, to see that the logits do move.
"""

from dataclasses import dataclass
from typing import Any, Literal

VOCAB, LENGTH = 96, 24

Changes = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One golden: ``model_type`` and ``settings`` of its config, the side of its padding, options that must matter."""

    model_type: str
    settings: Changes
    padding: Literal["none", "left", "right"] = "none"
    matters: tuple[Changes, ...] = ()
    legacy: Changes | None = None  # what a config on the hub says besides, or says otherwise


def small(**settings: Any) -> Changes:
    """Settings that most families share: grouped heads, an epsilon that is not the default and large enough to show."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **settings,
    }


def rope(theta: float = 10_000.0, kind: str = "default", **scaling: Any) -> Changes:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **scaling}}


# Wavelengths of 16 dimensions and base 100 go from 6 to 354 positions: below 16 / 1 kept, beyond 16 / 0.25 slowed.
LLAMA3 = rope(
    100.0, "llama3", factor=8.0, low_freq_factor=0.25, high_freq_factor=1.0, original_max_position_embeddings=16
)
LONG = {"max_position_embeddings": 256}
YARN = LONG | rope(100.0, "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, beta_slow=1.0)
YARN_DEFAULTS = LONG | rope(100.0, "yarn", factor=4.0, original_max_position_embeddings=64)
UNSCALED = rope(100.0)
EPS = {"rms_norm_eps": 1e-6}


def llama() -> dict[str, Case]:
    plain = small(tie_word_embeddings=False, **rope(500.0))
    return {
        "llama": Case("llama", plain, "left", (rope(600.0), EPS)),
        "llama_tied": Case("llama", plain | {"tie_word_embeddings": True}, "right"),
        "llama_bias": Case("llama", plain | {"attention_bias": True, "mlp_bias": True}),
        "llama_head_dim": Case("llama", plain | {"head_dim": 24}),
        "llama_rope_llama3": Case("llama", plain | LLAMA3, matters=(UNSCALED,)),
        "llama_rope_linear": Case(
            "llama",
            plain | rope(500.0, "linear", factor=4.0),
            "left",
            (rope(500.0),),
            legacy={"rope_scaling": {"type": "linear", "factor": 4.0}},  # as written before "rope_type"
        ),
        "llama_rope_yarn": Case("llama", plain | YARN, matters=(UNSCALED,)),
        "yi": Case("llama", plain | {"vocab_size": 100, "num_key_value_heads": 1} | rope(5_000_000.0), "right"),
    }


def mistral() -> dict[str, Case]:
    return {
        "mistral_window": Case(
            "mistral", small(sliding_window=8, **rope(500.0)), "left", ({"sliding_window": 9}, {"sliding_window": 7})
        ),
        "mistral_full": Case(  # as Mistral 7B v0.3 and Nemo: no window, a head width that does not follow
            "mistral", small(sliding_window=None, head_dim=24, **rope(1_000_000.0)), "right"
        ),
    }


def qwen() -> dict[str, Case]:
    plain = small(num_hidden_layers=4, use_sliding_window=False, sliding_window=8, max_window_layers=2, **rope(500.0))
    unused = {"sliding_window": 8}  # on the hub the width stays there although no layer uses it
    window = {"use_sliding_window": True}
    qwen3 = plain | {"head_dim": 24}
    return {
        "qwen2": Case("qwen2", plain, "left", (rope(600.0),), legacy=unused),
        "qwen2_tied": Case("qwen2", plain | {"tie_word_embeddings": True}, "right", legacy=unused),
        "qwen2_window": Case(
            "qwen2",
            plain | window | {"max_window_layers": 3},
            "left",
            ({"layer_types": ["full_attention"] * 4}, {"max_window_layers": 2}, {"sliding_window": 9}),
        ),
        "qwen2_yarn": Case(
            "qwen2",
            plain | YARN_DEFAULTS,
            matters=(UNSCALED, YARN),
            legacy=unused | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        ),
        "qwen3": Case("qwen3", qwen3, "left", legacy=unused),
        "qwen3_tied": Case("qwen3", qwen3 | {"tie_word_embeddings": True}, "right", legacy=unused),
        "qwen3_window": Case("qwen3", qwen3 | window, matters=({"max_window_layers": 1}, {"sliding_window": 7})),
    }


def gemma() -> dict[str, Case]:
    gemma1 = small(head_dim=24, pad_token_id=0, **rope(500.0))
    gemma2 = gemma1 | {
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 20,
        "sliding_window": 8,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 6.0,
    }
    gemma3 = small(
        head_dim=24,
        pad_token_id=0,
        num_hidden_layers=8,
        intermediate_size=64,
        query_pre_attn_scalar=40,
        sliding_window=8,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5_000.0},
        },
    )
    unscaled = {
        "rope_parameters": gemma3["rope_parameters"]
        | {"full_attention": {"rope_type": "default", "rope_theta": 5_000.0}}
    }
    swapped = {
        "rope_parameters": gemma3["rope_parameters"]
        | {"sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0}}
    }
    caps = ({"attn_logit_softcapping": None}, {"final_logit_softcapping": None}, {"query_pre_attn_scalar": 24})
    return {
        # the first checkpoints say "gelu" and mean its tanh form
        "gemma": Case("gemma", gemma1, "left", legacy={"hidden_act": "gelu", "hidden_activation": None}),
        "gemma_mqa": Case("gemma", gemma1 | {"num_key_value_heads": 1}, "right"),
        "gemma2": Case("gemma2", gemma2, "left", (*caps, {"sliding_window": 9}), {"hidden_act": "gelu_pytorch_tanh"}),
        "gemma2_uncapped": Case("gemma2", gemma2 | {"attn_logit_softcapping": None}, "right"),
        "gemma3": Case(
            "gemma3_text",
            gemma3,
            "left",
            (unscaled, swapped, {"sliding_window": 7}, {"query_pre_attn_scalar": 24}),
        ),
        "gemma3_unscaled": Case("gemma3_text", gemma3 | unscaled, "right"),
    }


def mixture() -> dict[str, Case]:
    mixtral = small(num_local_experts=4, num_experts_per_tok=2, intermediate_size=48, **rope(500.0))
    qwen2 = small(
        use_sliding_window=False,
        sliding_window=8,
        max_window_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        norm_topk_prob=False,
        **rope(500.0),
    )
    qwen3 = qwen2 | {"head_dim": 24, "norm_topk_prob": True, "mlp_only_layers": [1]}
    del qwen3["shared_expert_intermediate_size"], qwen3["max_window_layers"]
    unused = {"sliding_window": 8}
    return {
        "mixtral": Case("mixtral", mixtral | {"sliding_window": None}, "left", ({"num_experts_per_tok": 1},)),
        "mixtral_window": Case("mixtral", mixtral | {"sliding_window": 8}, matters=({"sliding_window": None},)),
        "qwen2_moe": Case("qwen2_moe", qwen2, "left", ({"norm_topk_prob": True},), unused | {"max_window_layers": 2}),
        "qwen2_moe_sparse": Case(  # every second layer has experts, and their weights are made to sum to 1
            "qwen2_moe", qwen2 | {"decoder_sparse_step": 2, "norm_topk_prob": True}, "right", legacy=unused
        ),
        "qwen3_moe": Case("qwen3_moe", qwen3, "right", ({"norm_topk_prob": False},), unused | {"max_window_layers": 2}),
    }


def deepseek() -> dict[str, Case]:
    latent = small(
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=14,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        rms_norm_eps=1e-2,  # unlike the latent norms', which keep 1e-6 whatever the config says
        **rope(100.0),
    )
    v3 = latent | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 1.0}
    yarn = LONG | rope(100.0, "yarn", **scaling, mscale=0.7, mscale_all_dim=1.0)
    same = LONG | rope(100.0, "yarn", **scaling, mscale=0.7, mscale_all_dim=0.7)  # as published: cos and sin unscaled
    hub = {
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "ep_size": 1,
        "aux_loss_alpha": 0.001,
    }
    hub_v2 = {"moe_layer_freq": 1, "scoring_func": "softmax", "ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001}
    lite = latent | {"q_lora_rank": None, "n_shared_experts": 2, "topk_method": "greedy", "routed_scaling_factor": 1.0}
    grouped = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0}
    grouped["num_experts_per_tok"] = 3  # no more experts than groups, and the groups would exclude nothing
    return {
        "deepseek_v3": Case(
            "deepseek_v3", v3, "left", ({"topk_group": 4}, {"norm_topk_prob": False}, {"rope_interleave": False}), hub
        ),
        "deepseek_v3_yarn": Case("deepseek_v3", v3 | yarn, "right", (UNSCALED, same), hub),
        "deepseek_v3_no_q_lora": Case("deepseek_v3", v3 | {"q_lora_rank": None, "norm_topk_prob": False}, legacy=hub),
        "deepseek_v2_lite": Case("deepseek_v2", lite | same, "left", (yarn,), hub_v2),
        "deepseek_v2_groups": Case(
            "deepseek_v2", latent | grouped, "right", ({"topk_method": "greedy"}, {"topk_group": 4}), hub_v2
        ),
    }


def others() -> dict[str, Case]:
    gpt2 = {
        "vocab_size": VOCAB,
        "n_positions": 32,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "layer_norm_epsilon": 1e-3,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    neox = small(**rope(500.0, partial_rotary_factor=0.25), layer_norm_eps=1e-3, tie_word_embeddings=False)
    del neox["num_key_value_heads"], neox["rms_norm_eps"]
    phi3 = small(pad_token_id=2, **rope(500.0))
    partial = rope(500.0, partial_rotary_factor=0.5)
    return {
        "gpt2": Case(
            "gpt2", gpt2, "left", ({"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-5}), {"n_ctx": 32}
        ),
        "gpt2_untied": Case(
            "gpt2", gpt2 | {"tie_word_embeddings": False, "n_inner": 80}, "right", legacy={"n_ctx": 32}
        ),
        "gpt_neox": Case("gpt_neox", neox, "left", ({"hidden_act": "gelu_new"}, {"use_parallel_residual": False})),
        "gpt_neox_sequential": Case("gpt_neox", neox | {"use_parallel_residual": False}, "right"),
        "gpt_neox_no_bias": Case("gpt_neox", neox | {"attention_bias": False} | rope(500.0, partial_rotary_factor=1.0)),
        "phi3_window": Case("phi3", phi3 | {"sliding_window": 8}, "left", ({"sliding_window": None},)),
        "phi3_partial": Case("phi3", phi3 | partial | {"sliding_window": None}, "right", (rope(500.0),)),
    }


CASES = others() | llama() | mistral() | qwen() | gemma() | mixture() | deepseek()
