# SPDX-License-Identifier: Apache-2.0
"""Properties of the decoder: causal, packed = unpacked, cached = uncached, scanned = unrolled, recomputed = kept."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.tree import named_leaves
from research.core.types import Precision, UserError
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.latent_attention import LatentAttention
from research.models.layers import Norm, WeightInit
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.positions import Alibi, Learned, RelativeBias, Rotary, Sinusoidal, TransformerXL
from research.models.rope_scaling import Linear, Yarn
from research.models.routers import Sigmoid, TopK
from tests import tiny

VARIANTS = {
    "mha rope rms swiglu": replace(tiny.MODEL, attention=Attention(4)),
    "gqa tied geglu": replace(tiny.MODEL, head="tied", mlp=Mlp(48, "geglu")),
    "mqa learned layernorm gelu": replace(
        tiny.MODEL, attention=Attention(4, 1), position=Learned(64), norm=Norm("layer"), mlp=Mlp(48, "gelu")
    ),
    "sinusoidal relu wide heads": replace(
        tiny.MODEL, attention=Attention(2, head_dim=24), position=Sinusoidal(), mlp=Mlp(48, "relu")
    ),
    "window": replace(tiny.MODEL, attention=Attention(4, window=5)),
    "experts": replace(tiny.MODEL, mlp=Moe(4, 32)),
    "local and global layers in turn, five layers, caps, norms all around (Gemma)": replace(
        tiny.MODEL,
        num_layers=5,
        attention=(
            Attention(4, 2, window=7, cap=20.0, scale=0.3, qk_norm=Norm(offset=1.0), position=Rotary(100.0)),
            Attention(4, 2, cap=20.0, qk_norm=Norm(offset=1.0), position=Rotary(1000.0, scaling=Linear(2.0))),
        ),
        norm=Norm(offset=1.0),
        norms="sandwich",
        head="tied",
        embedding_scale=32**0.5,
        logit_cap=30.0,
    ),
    "parallel, partial rotary, biases (NeoX)": replace(
        tiny.MODEL,
        attention=Attention(4, bias="all", position=Rotary(fraction=0.5)),
        mlp=Mlp(48, "gelu_exact", bias=True),
        norm=Norm("layer"),
        residual="parallel",
        head_bias=True,
    ),
    "parallel with one norm, alibi, clipped": replace(
        tiny.MODEL,
        attention=Attention(6, 1, head_dim=8, clip=0.5),
        position=Alibi(),
        norm=Norm("layer", bias=False),
        residual="parallel_shared",
    ),
    "relative biases": replace(tiny.MODEL, position=RelativeBias(8, 20)),
    "relative biases of each layer": replace(tiny.MODEL, position=RelativeBias(8, 20, per_layer=True)),
    "transformer-xl": replace(tiny.MODEL, position=TransformerXL()),
    "sinks": replace(tiny.MODEL, attention=Attention(4, 2, sinks="learned", window=9, first_tokens=3)),
    "latent attention, tokens further ahead": replace(
        tiny.MODEL,
        attention=LatentAttention(4, kv_rank=16, q_rank=24, nope_dim=8, rope_dim=4, v_dim=10),
        position=Rotary(scaling=Yarn(4.0, 16, mscale=1.0, mscale_all_dim=0.8)),
        first=(Mlp(48),),
        mlp=Moe(8, 16, Sigmoid(k=2, groups=4, top_groups=2), shared_d_ff=16),
        ahead=2,
    ),
    "latent attention without a vector for queries": replace(
        tiny.MODEL, attention=LatentAttention(4, kv_rank=16, q_rank=0, nope_dim=8, rope_dim=4, v_dim=8)
    ),
    "shared experts with a gate, groups of experts": replace(
        tiny.MODEL, mlp=Moe(8, 16, TopK(3, groups=4, top_groups=2, scale=2.0), shared_d_ff=24, shared_gate=True)
    ),
    "dense first, then experts in every second layer": replace(
        tiny.MODEL, num_layers=5, first=(Mlp(48),), mlp=(Mlp(48), Moe(4, 32, Sigmoid(k=2), shared_d_ff=16))
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, batch, cache=None):
    return model.bind(params, model.init_buffers(), Precision()).forward(batch, cache)


@functools.partial(jax.jit, static_argnums=0)
def drawn(model):
    return model.init_params(jax.random.key(0), Precision())


@functools.partial(jax.jit, static_argnums=0)
def params_of(model):
    """Moved off the values that hide a mistake: biases and sinks of zero, scales of one."""
    params = drawn(model)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


RARE = ("relative biases of each layer", "latent attention without a vector for queries", "sinusoidal relu wide heads")
RARE += ("shared experts with a gate, groups of experts", "mqa learned layernorm gelu")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in RARE)) for name in VARIANTS])
def model(request):
    return VARIANTS[request.param]


def test_causal(model):
    """Changing a token changes nothing before it, and something after it."""
    params, batch = params_of(model), tiny.batch(rows=2)
    changed = dict(batch, tokens=np.where(np.arange(64)[None, :] == 20, (batch["tokens"] + 1) % 264, batch["tokens"]))
    before, after = (hidden(model, params, b).hidden for b in (batch, changed))
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert not np.allclose(before[:, 20], after[:, 20])


def test_packed_is_unpacked(model):
    """Documents side by side in a row give what each gives alone."""
    params, packed = params_of(model), tiny.batch(rows=2, documents=2)
    together = hidden(model, params, packed).hidden
    for start in (0, 32):
        alone = {name: x[:, start : start + 32] for name, x in packed.items()}
        alone["segment_ids"] = np.ones_like(alone["segment_ids"])
        np.testing.assert_allclose(
            together[:, start : start + 32], hidden(model, params, alone).hidden, rtol=2e-4, atol=2e-5
        )


def test_cached_is_uncached(model):
    """In pieces through the cache, rows of different filling, and after a rollback."""
    params, batch = params_of(model), tiny.batch(rows=2)
    whole = hidden(model, params, batch).hidden
    cache = model.empty_cache(batch=2, slots=64, precision=Precision())
    found = []
    for start in range(0, 64, 8):
        output = hidden(model, params, {name: x[:, start : start + 8] for name, x in batch.items()}, cache)
        cache = output.cache
        found.append(output.hidden)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, rtol=2e-4, atol=2e-5)
    rolled_back = cache._replace(length=jnp.array([10, 20]))
    slots = np.array([10, 20])[:, None] + np.arange(8)[None, :]
    again = {name: np.take_along_axis(x, slots, axis=1) for name, x in batch.items()}
    output = hidden(model, params, again, rolled_back)
    want = np.take_along_axis(np.asarray(whole), slots[:, :, None], axis=1)
    np.testing.assert_allclose(output.hidden, want, rtol=2e-4, atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def mean_square(model, params):
    """A loss through the whole model, and its gradient."""

    def loss(params):
        output = hidden(model, params, tiny.batch(rows=2)).hidden
        return jnp.mean(jnp.square(model.bind(params, model.init_buffers(), Precision()).logits(output)))

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": "unrolled"},
        {"remat": "full"},
        pytest.param({"remat": "save_matmuls"}, marks=pytest.mark.slow),
        pytest.param({"remat": "save_weight_matmuls"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_values_and_gradients_however_it_is_computed(change):
    model = tiny.MODEL
    value, gradient = mean_square(model, params_of(model))
    other_value, other = mean_square(replace(model, **change), params_of(model))
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    for name, leaf in named_leaves(gradient).items():
        gap = jnp.linalg.norm(leaf - named_leaves(other)[name]) / jnp.linalg.norm(leaf)
        assert gap < 1e-5, name


@pytest.mark.slow
def test_remat_recomputes():
    """More floating-point work in the compiled step, none of it in the forward pass."""

    def flops(model):
        batch, params = tiny.batch(rows=2), params_of(model)
        step = jax.jit(jax.grad(lambda p: jnp.sum(hidden(model, p, batch).hidden)))
        return step.lower(params).compile().cost_analysis()["flops"]

    base = replace(tiny.MODEL, layers="unrolled")
    kept, whole = flops(base), flops(replace(base, remat="full"))
    assert kept < whole
    # attention alone is formed again: its share of the forward pass is small here
    assert flops(replace(base, remat="save_weight_matmuls")) - kept < 0.4 * (whole - kept)


def test_every_parameter_has_logical_axes(model):
    shapes, axes = model.shapes(Precision()), model.logical_axes()
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=lambda a: isinstance(a, tuple))
    for name, shape in named_leaves(shapes).items():
        leaf = axes
        for part in name.split("/"):
            leaf = leaf[part]
        assert len(leaf) == len(shape.shape), name


def test_precision_of_parameters_compute_and_logits():
    precision = Precision(params="bfloat16", compute="bfloat16", logits="float32")
    params = jax.jit(functools.partial(tiny.MODEL.init_params, precision=precision))(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    bound = tiny.MODEL.bind(params, {}, precision)
    output = jax.eval_shape(lambda: bound.forward(tiny.batch(rows=1)).hidden)
    assert output.dtype == jnp.bfloat16 and jax.eval_shape(bound.logits, output).dtype == jnp.float32


@pytest.mark.parametrize("scheme", ["fan_in", "gpt2"])
def test_initial_weights_have_the_documented_deviation(scheme):
    model = replace(tiny.MODEL, d_model=128, weight_init=WeightInit(scheme), attention=Attention(4), mlp=Mlp(512))
    leaves = named_leaves(drawn(model))
    small = 0.02 if scheme == "gpt2" else None
    expected = {
        "layers/attention/q/w": small or 128**-0.5,
        "layers/mlp/up/w": small or 128**-0.5,
        "layers/mlp/down/w": (small or 512**-0.5) / 2,  # two layers: divided by sqrt(4)
        "layers/attention/out/w": (small or 128**-0.5) / 2,
        "embedding/table": small or 128**-0.5,
        "unembedding/w": small or 128**-0.5,
    }
    for name, deviation in expected.items():
        assert np.std(leaves[name]) == pytest.approx(deviation, rel=0.03), name
    assert np.all(leaves["final_norm/scale"] == 1)


def test_layers_start_out_different():
    w = params_of(tiny.MODEL)["layers"]["mlp"]["up"]["w"]
    assert not np.allclose(w[0], w[1])


def test_head_is_the_logits_and_holds_its_own_parameters_only(model):
    params = params_of(model)
    bound, x = (
        model.bind(params, model.init_buffers(), Precision()),
        jax.random.normal(jax.random.key(0), (3, 5, model.d_model)),
    )
    np.testing.assert_array_equal(bound.head()(x), bound.logits(x))
    assert len(jax.tree.leaves(bound.head())) == 1 + model.head_bias


@pytest.mark.parametrize(
    ("change", "length", "vocabulary", "words"),
    [
        ({"position": Learned(16)}, 32, 10, "32 tokens is longer than the model's table of 16"),
        ({}, 32, 300, "tokenizer has 300 tokens and the model's vocab_size is 264"),
        ({"d_model": 30}, 32, 10, "does not split into 4 heads"),
        ({"attention": Attention(4, 3)}, 32, 10, "divisors of 4"),
        (
            {"attention": Attention(4, head_dim=7), "position": Rotary()},
            32,
            10,
            "these turn 7 of 7",
        ),
        ({"num_layers": 0}, 32, 10, "num_layers is 0"),
    ],
)
def test_sizes_that_cannot_work_are_one_sentence(change, length, vocabulary, words):
    with pytest.raises(UserError, match=words):
        replace(tiny.MODEL, **change).check(sequence_length=length, vocab_size=vocabulary)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(mlp=()), "model.mlp is empty"),
        (dict(mlp=[Mlp(8)]), "give a tuple of Mlp"),
        (dict(first=Mlp(8)), r"such as \(Mlp"),
        (dict(num_layers=2, first=(Mlp(8),) * 2), "first has 2 layers of 2"),
    ],
)
def test_layers_that_cannot_be_are_refused(settings, words):
    with pytest.raises(UserError, match=words) as error:
        Decoder(**(dict(vocab_size=8, d_model=8, num_layers=4, attention=Attention(1), mlp=Mlp(8)) | settings))
    assert "\n" not in str(error.value)
