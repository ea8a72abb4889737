# SPDX-License-Identifier: Apache-2.0
"""A config as transformers 5 writes it, in the words of the checkpoints on the hub, most of them older than that.

Then, RoPE was ``rope_theta`` and ``rope_scaling`` (GPT-NeoX: ``rotary_emb_base`` and ``rotary_pct``; Gemma 3:
``rope_local_base_freq`` too), windows were a width and a rule instead of ``layer_types``, and what could be derived was
left out.
"""

from typing import Any

NEW = (
    "rope_parameters",
    "layer_types",
    "dtype",
    "pad_token_id",
    "_sliding_window_pattern",
    "use_bidirectional_attention",
)
DERIVED_HEAD = ("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe")
TIED = ("gpt2", "gemma", "gemma2", "gemma3_text")  # tied heads go without saying
DEEPSEEK_ONLY_NEW = ("head_dim", "qk_head_dim", "rope_interleave", "output_router_logits", "mlp_bias")


def downgrade(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``config`` in the older format; ``more``: what such files say besides or say otherwise."""
    kind = config["model_type"]
    old = {name: value for name, value in config.items() if name not in NEW}
    old |= {"torch_dtype": config["dtype"], "transformers_version": "4.46.0"}
    if config.get("pad_token_id") is not None:
        old["pad_token_id"] = config["pad_token_id"]
    if kind != "gpt2":
        old |= positions(kind, config["rope_parameters"])
    derived = kind in DERIVED_HEAD and config["hidden_size"] // config["num_attention_heads"]
    if derived and old.get("head_dim") in (None, derived):
        old.pop("head_dim", None)
    if kind in TIED and old["tie_word_embeddings"]:
        del old["tie_word_embeddings"]
    if kind == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    if kind.startswith("deepseek"):
        old = {name: value for name, value in old.items() if name not in DEEPSEEK_ONLY_NEW}
    if kind == "gemma3_text":
        old["sliding_window_pattern"] = 6
    return old | more


def positions(kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    """The older fields for what is now ``rope_parameters``."""
    if kind == "gemma3_text":
        local, rope = rope["sliding_attention"], rope["full_attention"]
        return {
            "rope_local_base_freq": local["rope_theta"],
            "rope_theta": rope["rope_theta"],
            "rope_scaling": scaling(kind, rope),
        }
    if kind == "gpt_neox":
        return {
            "rotary_emb_base": rope["rope_theta"],
            "rotary_pct": rope["partial_rotary_factor"],
            "rope_scaling": scaling(kind, rope),
        }
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling(kind, rope)}
    if kind == "phi3":
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return old


def scaling(kind: str, rope: dict[str, Any]) -> dict[str, Any] | None:
    """``rope_scaling``; DeepSeek's files name it by ``type``, the first of its two spellings."""
    if rope["rope_type"] == "default":
        return None
    rest = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta", "partial_rotary_factor")}
    return {"type" if kind.startswith("deepseek") else "rope_type": rope["rope_type"], **rest}
