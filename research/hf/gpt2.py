# SPDX-License-Identifier: Apache-2.0
"""GPT-2, whose linear layers are stored inputs first, and whose names some files begin with "transformer."."""

from typing import Any

from research.hf.config import Config, need, one_attention, one_mlp
from research.hf.family import Family
from research.hf.tables import Part, Table, line, weight
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.positions import Learned

TABLE = Table(
    prefix="transformer.",
    layer="transformer.h.{layer}.",
    unneeded=(".attn.bias", ".attn.masked_bias"),  # masks
    top=(
        weight("transformer.wte.weight", "embedding/table", "V D -> V D"),
        weight("transformer.wpe.weight", "position/table", "T D -> T D"),
        weight("transformer.ln_f.weight", "final_norm/scale", "D -> D"),
        weight("transformer.ln_f.bias", "final_norm/bias", "D -> D"),
        weight("lm_head.weight", "unembedding/w", "V D -> D V"),
    ),
    layers=(
        weight("ln_1.weight", "attention_norm/scale", "D -> D"),
        weight("ln_1.bias", "attention_norm/bias", "D -> D"),
        weight("ln_2.weight", "mlp_norm/scale", "D -> D"),
        weight("ln_2.bias", "mlp_norm/bias", "D -> D"),
        line(
            "attn.c_attn.weight",
            *(Part(f"attention/{name}/w", "1 D N H -> D N H", size="1") for name in "qkv"),
            front="D (three N H) -> three D N H",
        ),
        line(
            "attn.c_attn.bias",
            *(Part(f"attention/{name}/b", "1 N H -> N H", size="1") for name in "qkv"),
            front="(three N H) -> three N H",
        ),
        weight("attn.c_proj.weight", "attention/out/w", "(N H) D -> N H D"),
        weight("attn.c_proj.bias", "attention/out/b", "D -> D"),
        weight("mlp.c_fc.weight", "mlp/up/w", "D F -> D F"),
        weight("mlp.c_fc.bias", "mlp/up/b", "F -> F"),
        weight("mlp.c_proj.weight", "mlp/down/w", "F D -> F D"),
        weight("mlp.c_proj.bias", "mlp/down/b", "D -> D"),
    ),
)


def gpt2(config: Config) -> Decoder:
    config.must("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    config.must("scale_attn_weights", (True,), True)
    config.must("scale_attn_by_inverse_layer_idx", (False,), False)
    width = config.whole("n_embd")
    return Decoder(
        vocab_size=config.whole("vocab_size"),
        d_model=width,
        num_layers=config.whole("n_layer"),
        attention=Attention(config.whole("n_head"), bias="all"),
        mlp=Mlp(config.whole("n_inner", 4 * width), "gelu", bias=True),
        norm=Norm("layer", config.number("layer_norm_epsilon", 1e-5)),
        position=Learned(config.whole("n_positions")),
        head="tied" if config.flag("tie_word_embeddings", True) else "untied",
    )


def gpt2_config(model: Decoder, length: int) -> dict[str, Any]:
    del length
    attention, mlp = one_attention(model), one_mlp(model)
    need(isinstance(model.position, Learned), "positions that are not learned")
    assert isinstance(model.position, Learned)
    return {
        "vocab_size": model.vocab_size,
        "n_embd": model.d_model,
        "n_layer": model.num_layers,
        "n_head": attention.num_heads,
        "n_inner": mlp.d_ff,
        "n_positions": model.position.max_length,
        "n_ctx": model.position.max_length,
        "layer_norm_epsilon": model.norm.eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": model.head == "tied",
    }


GPT2 = Family("gpt2", "GPT2LMHeadModel", TABLE, gpt2, gpt2_config)
