# SPDX-License-Identifier: Apache-2.0
"""Expert layers against a loop over experts, and what the field got wrong before."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.types import Precision, UserError
from research.models import moe
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.grouped_matmul import BLOCK, grouped_matmul
from research.models.layers import Build, WeightInit
from research.models.mlp import ACTIVATIONS
from research.models.moe import Moe
from research.models.routers import ExpertChoice, Hash, Sigmoid, TopK, glam, switch
from research.models.tokens import Tokens

WIDTH = 16
MOE = Moe(num_experts=4, d_ff=24, router=TopK(2))
VARIANTS = {
    "topk": MOE,
    "gelu": replace(MOE, activation="gelu"),
    "shared": replace(MOE, shared_d_ff=12),
    "deepseek": replace(MOE, router=Sigmoid(k=2, groups=2, top_groups=1)),
    "switch": replace(MOE, router=switch(0.75)),
    "switch buffers": replace(MOE, router=switch(0.75), dispatch="buffers"),
    "glam buffers": replace(MOE, router=glam(0.75), dispatch="buffers"),
    "expert choice": replace(MOE, router=ExpertChoice(1.5)),
    "expert choice buffers": replace(MOE, router=ExpertChoice(1.5), dispatch="buffers"),
    "hash": replace(MOE, router=Hash()),
}


def tokens(*, rows=3, length=40, padding=5):
    positions = jnp.broadcast_to(jnp.arange(length)[None, :], (rows, length))
    ids = jax.random.randint(jax.random.key(7), (rows, length), 0, 100)
    return Tokens(ids, positions, (positions < length - padding).astype(jnp.int32))


@functools.cache
def layer(config):
    module = config.build(Build(WIDTH, 2, WeightInit(), Precision()))
    x_BTD = jax.random.normal(jax.random.key(0), (3, 40, WIDTH))
    variables = jax.jit(module.init)(jax.random.key(1), x_BTD, tokens())
    variables = jax.tree.map(lambda box: getattr(box, "value", box), variables, is_leaf=lambda x: hasattr(x, "value"))
    return module, variables, x_BTD


def by_hand(config, params, x_BTD, where):
    """Every expert on every token, weighed by the gates that the router gave: no dispatch at all."""
    bias_E = jnp.zeros(config.num_experts) if config.router.bias_rate else None
    logits_BTE = x_BTD @ params.get("router", jnp.zeros((WIDTH, config.num_experts)))
    routing = jax.vmap(lambda logits, real, ids: config.router(moe.Group(logits, real, ids, bias_E, None)))(
        logits_BTE, where.segments > 0, where.ids
    )
    hits = jax.nn.one_hot(routing.expert, config.num_experts) * routing.gate[..., None]
    gates_BTE = jax.vmap(lambda t, h: jnp.zeros((x_BTD.shape[1], config.num_experts)).at[t].add(h))(routing.token, hits)
    activation = ACTIVATIONS[config.activation]
    y_BTD = jnp.zeros_like(x_BTD)
    for e in range(config.num_experts):
        up = x_BTD @ params["up"][e]
        inner = activation(x_BTD @ params["gate"][e]) * up if config.gated else activation(up)
        y_BTD += gates_BTE[:, :, e, None] * (inner @ params["down"][e])
    if config.shared is not None:
        p = params["shared"]
        y_BTD += (jax.nn.silu(x_BTD @ p["gate"]["w"]) * (x_BTD @ p["up"]["w"])) @ p["down"]["w"]
    return y_BTD


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_is_the_loop_over_its_experts(name):
    """Values and gradients, of parameters and input."""
    module, variables, x_BTD = layer(VARIANTS[name])

    def loss(run, params, x_BTD):
        return jnp.sum(jnp.square(run(params, x_BTD)))

    def fast(params, x_BTD):
        return module.apply({**variables, "params": params}, x_BTD, tokens())[0]

    def slow(params, x_BTD):
        return by_hand(VARIANTS[name], params, x_BTD, tokens())

    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1)))(variables["params"], x_BTD)
        for run in (fast, slow)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


@pytest.mark.parametrize("implementation", ["blocked", "ragged"])
@pytest.mark.parametrize("sizes", [(2, 0, 1, 1), (0, 0, 0, 0), (0, 5, 0, 0), (1, 1, 1, 1), (13, 0, 7, 1)])
def test_grouped_products_are_plain(implementation, sizes):
    """With empty experts, rows that are nobody's, and blocks of every size; gradients too."""
    rows = max(5, sum(sizes) + 1) * BLOCK
    x_MD = jax.random.normal(jax.random.key(0), (rows, 8))
    w_EDF = jax.random.normal(jax.random.key(1), (4, 8, 6))
    c_MF = jax.random.normal(jax.random.key(2), (rows, 6))

    def both(implementation):
        run = functools.partial(grouped_matmul, sizes_E=BLOCK * jnp.asarray(sizes), implementation=implementation)
        return run(x_MD, w_EDF), jax.grad(lambda x, w: jnp.sum(c_MF * run(x, w)), argnums=(0, 1))(x_MD, w_EDF)

    found, wanted = both(implementation), both("plain")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


@pytest.mark.parametrize("implementation", ["blocked", "ragged"])
def test_grouped_products_of_bfloat16(implementation):
    """Within the rounding of bfloat16 of the plain ones in float32; sums over rows are in float32."""
    x_MD = jax.random.normal(jax.random.key(0), (6 * BLOCK, 8), jnp.bfloat16)
    w_EDF = jax.random.normal(jax.random.key(1), (3, 8, 6), jnp.bfloat16)
    sizes_E = BLOCK * jnp.asarray((3, 0, 2))

    def both(x_MD, w_EDF, implementation):
        run = functools.partial(grouped_matmul, sizes_E=sizes_E, implementation=implementation)
        return run(x_MD, w_EDF), jax.grad(lambda x, w: jnp.sum(run(x, w).astype(jnp.float32)), (0, 1))(x_MD, w_EDF)

    wanted = both(x_MD.astype(jnp.float32), w_EDF.astype(jnp.float32), "plain")
    found = both(x_MD, w_EDF, implementation)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.linalg.norm(got.astype(jnp.float32) - want) < 4e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("sizes", [(200, 0, 91, 150), (0, 0, 7, 0)])
def test_the_kernels_take_groups_of_any_size(sizes):
    """megablox, interpreted: no alignment, a number of rows that no tile divides, rows that are nobody's."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_MD, w_EDF, c_MF = (jax.random.normal(k, s) for k, s in zip(keys, ((500, 8), (4, 8, 6), (500, 6)), strict=True))

    @functools.partial(jax.jit, static_argnums=2)
    def both(x_MD, w_EDF, implementation):
        run = functools.partial(grouped_matmul, sizes_E=jnp.asarray(sizes), implementation=implementation)
        y_MF, pull_back = jax.vjp(run, x_MD, w_EDF)
        return y_MF, pull_back(c_MF)

    found, wanted = both(x_MD, w_EDF, "megablox"), both(x_MD, w_EDF, "plain")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
    assert not np.asarray(found[1][1][1]).any()  # an expert without rows


def test_blocked_products_under_vmap_checkpoint_and_scan():
    """Two layers of products, each with sizes of its own."""
    sizes_LE = BLOCK * jnp.asarray([(4, 0, 1), (0, 2, 3)])
    x_LMD = jax.random.normal(jax.random.key(0), (2, 5 * BLOCK, 8))
    w_LEDF = jax.random.normal(jax.random.key(1), (2, 3, 8, 6))

    def one(implementation, x, w, sizes):
        return jnp.sum(jnp.square(grouped_matmul(x, w, sizes, implementation=implementation)))

    def scanned(x_LMD, w_LEDF):
        step = jax.checkpoint(lambda x, w, sizes: one("blocked", x, w, sizes))
        return jax.lax.scan(lambda total, part: (total + step(*part), None), 0.0, (x_LMD, w_LEDF, sizes_LE))[0]

    def mapped(implementation):
        return lambda x_LMD, w_LEDF: jnp.sum(jax.vmap(functools.partial(one, implementation))(x_LMD, w_LEDF, sizes_LE))

    wanted, *found = (
        jax.value_and_grad(run, argnums=(0, 1))(x_LMD, w_LEDF) for run in (mapped("plain"), mapped("blocked"), scanned)
    )
    for each in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), each, wanted)


def test_an_expert_without_tokens_gets_a_zero_finite_gradient():
    module, variables, x_BTD = layer(MOE)
    params = dict(variables["params"])
    x_BTD = jnp.abs(x_BTD)
    params["router"] = jnp.abs(params["router"]).at[:, 2].set(-1.0)
    loss = jax.jit(lambda p: jnp.sum(jnp.square(module.apply({"params": p}, x_BTD, tokens())[0])))
    gradient = jax.jit(jax.grad(loss))(params)
    for name in ("gate", "up", "down"):
        assert not np.asarray(gradient[name][2]).any() and np.asarray(gradient[name][0]).any()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))


def test_padding_is_not_counted_and_changes_nothing():
    module, variables, x_BTD = layer(MOE)
    y_BTD, found = module.apply(variables, x_BTD, tokens())
    other = x_BTD.at[:, -5:].set(100.0)
    y_other, found_other = module.apply(variables, other, tokens())
    np.testing.assert_array_equal(y_BTD, y_other)
    jax.tree.map(np.testing.assert_array_equal, found, found_other)
    assert found["tokens"] == 3 * 35 and found["load"].sum() == 2 * 3 * 35


def test_logits_and_their_losses_are_float32_whatever_the_products_are():
    """The z-loss is the mean of the squared log normaliser; in bfloat16 it would be off by a thousandth."""
    config = replace(MOE, z_loss=0.5)
    module = config.build(Build(WIDTH, 2, WeightInit(), Precision(compute="bfloat16")))
    _, variables, x_BTD = layer(MOE)
    x_BTD = x_BTD.astype(jnp.bfloat16)
    _, found = module.apply(variables, x_BTD, tokens())
    logits = np.asarray(x_BTD, np.float64) @ np.asarray(variables["params"]["router"], np.float64)
    wanted = np.square(np.log(np.exp(logits).sum(-1)))[:, :35].mean()
    term = moe.losses(config, jax.tree.map(lambda x: x[None], found))["router_z"]
    assert term.coefficient == 0.5 and float(term.value.mean) == pytest.approx(wanted, rel=1e-6)


def test_a_hash_has_neither_a_matrix_nor_losses():
    _, variables, _ = layer(VARIANTS["hash"])
    assert variables["params"].keys() == {"gate", "up", "down"}
    assert not moe.losses(replace(VARIANTS["hash"], z_loss=1.0), {"tokens": jnp.ones(1)})


def test_balance_is_one_when_even_and_the_number_of_experts_when_not():
    def of(load, probability):
        found = {"wanted": jnp.asarray([load]), "probability": jnp.asarray([probability]), "tokens": jnp.asarray([8.0])}
        return float(moe.losses(replace(MOE, balance=1.0), found)["balance"].value.sum)

    assert of([4.0] * 4, [2.0] * 4) == pytest.approx(1.0)
    assert of([16.0, 0, 0, 0], [8.0, 0, 0, 0]) == pytest.approx(4.0)


def test_the_report_says_how_even_the_load_is():
    found = {
        "load": jnp.asarray([[4.0, 4, 4, 4], [12, 0, 0, 0]]),
        "wanted": jnp.asarray([[4.0, 4, 4, 4], [16, 0, 0, 0]]),
        "confidence": jnp.asarray([4.0, 8.0]),
        "tokens": jnp.asarray([8.0, 8.0]),
    }
    said = moe.report(found)
    np.testing.assert_allclose(said["router/load_entropy"], [1, 0], atol=1e-6)
    np.testing.assert_allclose(said["router/max_load"], [1, 4], rtol=1e-6)
    np.testing.assert_allclose(said["router/dropped"], [0, 0.25], atol=1e-6)
    np.testing.assert_allclose(said["router/confidence"], [0.5, 1], rtol=1e-6)


def test_loss_free_bias_evens_out_a_skewed_load():
    """Logits that favour expert 0 by far: within 10% of uniform in 400 updates, and still so 50 later."""
    router = Sigmoid(k=2, bias_rate=0.005)
    logits = jax.random.normal(jax.random.key(0), (4096, 8)) + jnp.asarray([[3.0, 2, 1, 0, 0, -1, -2, -3]])
    real, ids = jnp.ones(4096, bool), jnp.zeros(4096, jnp.int32)

    def once(bias, _):
        routing = router(moe.Group(logits, real, ids, bias, None))
        load = jnp.sum(jax.nn.one_hot(routing.expert, 8), axis=0)
        return moe.rebalanced(router.bias_rate, bias, load), load / jnp.mean(load)

    bias, loads = jax.lax.scan(once, jnp.zeros(8), None, length=450)
    assert np.asarray(loads[0]).max() > 3
    assert np.abs(np.asarray(loads[400:]) - 1).max() < 0.1
    assert abs(float(bias.mean())) < 1e-5


def test_a_bias_follows_what_was_asked_for_not_what_a_capacity_kept():
    """An expert below the mean of the load asked for is raised, though of the kept load it has more than the mean."""
    model = Decoder(32, 8, 1, Attention(1), Moe(4, 8, TopK(1, renormalise=False, capacity_factor=1.0, bias_rate=0.1)))
    stats = {"layers": {"wanted": jnp.asarray([[305.0, 74, 10, 11]]), "load": jnp.asarray([[100.0, 74, 10, 11]])}}
    bias = model.update(model.init_buffers(), stats)["layers"]["mlp"]["bias"]
    np.testing.assert_allclose(bias, [[-0.15, 0.05, 0.05, 0.05]], rtol=1e-6)


def test_one_expert_is_evenly_loaded():
    found = {name: jnp.ones((1, 1)) for name in ("load", "wanted")} | {
        name: jnp.ones(1) for name in ("confidence", "tokens")
    }
    assert moe.report(found)["router/load_entropy"].tolist() == [1.0]


def test_a_router_multiplies_in_float32_on_accelerators():
    """Unasked, a TPU multiplies float32 arrays in bfloat16: forward, and for both gradients."""
    module = replace(MOE, implementation="ragged").build(Build(WIDTH, 2, WeightInit(), Precision(), platform="tpu"))
    _, variables, x_BTD = layer(MOE)
    run = lambda variables, x: jnp.sum(module.apply(variables, x, tokens())[0])  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(variables, x_BTD))
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 3


def test_experts_that_choose_cannot_generate():
    module, variables, x_BTD = layer(VARIANTS["expert choice"])
    with pytest.raises(UserError, match="ExpertChoice cannot generate"):
        module.apply(variables, x_BTD, tokens()._replace(length=jnp.zeros(3, jnp.int32)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(dispatch="buffers"), "router.capacity_factor above 0"),
        (dict(dispatch="buffer"), "dispatch is 'buffer': choose among sorted, buffers"),
        (dict(implementation="nonsense"), "choose among auto, plain"),
        (dict(num_experts=0), "at least 1"),
        (dict(router="topk"), "give one of TopK, Gshard"),
        (dict(shared_d_ff=-3), "shared_d_ff is -3"),
        (dict(balance=-1.0), "balance is -1.0"),
        (dict(router=TopK(2, capacity_factor=-1.0)), "router.capacity_factor is -1.0"),
        (dict(router=TopK(2, capacity_factor=float("nan"))), "router.capacity_factor is nan"),
        (dict(router=TopK(2, bias_rate=-1.0)), "router.bias_rate is -1.0"),
        (dict(router=TopK(1)), "learns nothing: set renormalise=False"),
        (dict(router=Sigmoid(1)), "learns nothing: raise k"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(UserError, match=words) as error:
        replace(MOE, **settings)
    assert "\n" not in str(error.value)
