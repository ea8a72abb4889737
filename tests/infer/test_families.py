# SPDX-License-Identifier: Apache-2.0
"""Every family generates what recomputing the whole sequence for each token gives, for prompts of several lengths."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.types import Precision
from research.infer.engine import Engine, Request
from research.infer.generate import Settings
from research.infer.sampling import sampling
from research.models.families import (
    chinchilla,
    dbrx,
    deepseek,
    falcon,
    gemma,
    glam,
    gopher,
    gpt2,
    gpt3,
    gpt_neox,
    grok,
    llama,
    mistral,
    mixtral,
    palm,
    phi,
    qwen,
    yi,
)
from research.models.latent_attention import LatentAttention
from research.models.mlp import Mlp
from research.models.positions import Learned

SIZES = (
    gpt2.gpt2, gpt3.gpt3_small, gopher.gopher_44m, chinchilla.chinchilla_70b, palm.palm_8b, glam.glam_8b_64e,
    llama.llama_7b, llama.llama2_70b, llama.llama3_1_8b, mistral.mistral_7b, mixtral.mixtral_8x7b,
    qwen.qwen1_5_moe_a2_7b, qwen.qwen2_7b, qwen.qwen3_0_6b, qwen.qwen3_30b_a3b, yi.yi_6b, gemma.gemma_2b,
    gemma.gemma2_2b, gemma.gemma3_4b, gpt_neox.pythia_70m, falcon.falcon_7b, falcon.falcon_40b, phi.phi_2,
    phi.phi_3_mini, dbrx.dbrx, grok.grok_1, deepseek.deepseek_v2_lite, deepseek.deepseek_v2, deepseek.deepseek_v3,
)  # fmt: skip
FEW = (mistral.mistral_7b,)
LENGTH = 40


def small(model):
    """The same kinds of layers at a hundredth of the width, with windows shorter than what is generated. Experts take
    any number of tokens: a capacity counts those of one call, of which generation has fewer."""

    def attention(one):
        if isinstance(one, LatentAttention):
            ranks = dict(kv_rank=12, q_rank=20 if one.q_rank else 0)
            return replace(one, num_heads=4, nope_dim=8, rope_dim=4, v_dim=6, **ranks)
        kv_heads = {1: 1, one.num_heads: None}.get(one.kv_heads, 2)
        window, partly = 5 if one.window else 0, getattr(model.position, "fraction", 1.0) < 1
        return replace(one, num_heads=4, num_kv_heads=kv_heads, head_dim=40 if partly else 8, window=window)

    def feed_forward(one):
        if isinstance(one, Mlp):
            return replace(one, d_ff=24)
        router = replace(one.router, k=2, capacity_factor=0.0)
        if router.groups > 1:
            router = replace(router, groups=4, top_groups=2)
        return replace(one, num_experts=8, d_ff=16, shared_d_ff=16 if one.shared_d_ff else 0, router=router)

    mlps = tuple(feed_forward(one) for one in (model.mlp if isinstance(model.mlp, tuple) else (model.mlp,)))
    return replace(
        model,
        vocab_size=64,
        d_model=32,
        num_layers=len(model.first[:1]) + len(model.period) + 1,
        attention=tuple(attention(one) for one in model.attentions),
        mlp=mlps,
        first=tuple(feed_forward(one) for one in model.first[:1]),
        position=Learned(64) if isinstance(model.position, Learned) else model.position,
    )


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[pytest.mark.slow] * (size not in FEW), id=size.__name__) for size in SIZES]
)
def test_greedy_with_a_cache_is_recomputing_the_whole_sequence(size):
    model = small(size())
    model.check(sequence_length=LENGTH, vocab_size=64)
    params = jax.jit(lambda: model.init_params(jax.random.key(0), Precision()))()
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)  # no zeros left
    policy = model.bind(params, model.init_buffers(), Precision())
    prompts = [np.random.default_rng(n).integers(0, 64, n) for n in (3, 19, 8, 1)]
    engine = Engine(model, slots=3, settings=Settings(sampling(temperature=0), steps=8))
    found = {result.request: result for result in engine.run(policy, [Request(prompt, 14) for prompt in prompts])}

    @jax.jit
    def forward(row, length):
        at = jnp.arange(LENGTH)[None]
        batch = {"tokens": row, "positions": at, "segment_ids": (at < length).astype(jnp.int32)}
        return jax.nn.log_softmax(policy.logits(policy.forward(batch).hidden)[0])

    for number, prompt in enumerate(prompts):
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(prompt)] = prompt
        for step in range(14):
            at = len(prompt) + step
            log_probs = forward(row, at)[at - 1]
            row[0, at] = int(jnp.argmax(log_probs))
            assert abs(float(log_probs[row[0, at]]) - found[number].log_probs[step]) < 1e-4
        assert row[0, len(prompt) : at + 1].tolist() == found[number].tokens
