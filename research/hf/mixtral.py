# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral with experts in every layer."""

from typing import Any

from research.hf.config import Config, common, need, one_attention, rms, rotary
from research.hf.family import Family
from research.hf.llama import ATTENTION, EMBEDDINGS, NORMS, attention_of, decoder_of, heads_config
from research.hf.tables import Table, weight
from research.models.decoder import Decoder
from research.models.moe import Moe
from research.models.routers import TopK

EXPERTS = (
    weight("block_sparse_moe.gate.weight", "mlp/router", "E D -> D E"),
    weight("block_sparse_moe.experts.{expert}.w1.weight", "mlp/gate", "F D -> D F"),
    weight("block_sparse_moe.experts.{expert}.w3.weight", "mlp/up", "F D -> D F"),
    weight("block_sparse_moe.experts.{expert}.w2.weight", "mlp/down", "D F -> F D"),
)
TABLE = Table(top=EMBEDDINGS, layers=NORMS + ATTENTION + EXPERTS)


def mixtral(config: Config) -> Decoder:
    config.must("hidden_act", ("silu",), "silu")
    router = TopK(config.whole("num_experts_per_tok", 2))
    moe = Moe(config.whole("num_local_experts"), config.whole("intermediate_size"), router)
    attention = attention_of(config, window=config.whole("sliding_window", 0))
    return decoder_of(config, attention, moe, norm=rms(config, eps=1e-5), position=rotary(config, theta=1e6))


def mixtral_config(model: Decoder, length: int) -> dict[str, Any]:
    attention, moe = one_attention(model), model.mlp
    need(isinstance(moe, Moe) and isinstance(moe.router, TopK) and not model.first, "layers without experts")
    assert isinstance(moe, Moe) and isinstance(moe.router, TopK)
    need(moe.router.renormalise and moe.shared is None, "another router, or shared experts")
    return common(model, moe, length) | heads_config(attention, model) | {
        "sliding_window": attention.window or None,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.router.k,
    }  # fmt: skip


MIXTRAL = Family("mixtral", "MixtralForCausalLM", TABLE, mixtral, mixtral_config)
