# SPDX-License-Identifier: Apache-2.0
"""Routers against their papers' definitions, written out with numpy one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.types import UserError
from research.models import routers
from research.models.routers import ExpertChoice, Group, Gshard, Hash, Sigmoid, TopK, glam, switch

TOKENS, EXPERTS = 64, 8
ROUTERS = {
    "topk": TopK(2),
    "topk as it is": TopK(3, renormalise=False),
    "topk with capacity": TopK(2, capacity_factor=1.0),
    "switch": switch(),
    "gshard": Gshard(),
    "glam": glam(),
    "deepseek": Sigmoid(k=3, groups=4, top_groups=2, scale=2.5),
    "expert choice": ExpertChoice(),
    "hash": Hash(),
}


def group(seed=0, *, padding=6, bias=None, key=None):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(TOKENS, EXPERTS)), jnp.float32)
    real = jnp.arange(TOKENS) < TOKENS - padding
    return Group(logits, real, jnp.asarray(rng.integers(0, 500, TOKENS)), bias, key)


def chosen(routing, token):
    """Expert -> gate of a token's kept assignments."""
    mine = np.asarray(routing.kept) & (np.asarray(routing.token) == token)
    return dict(zip(np.asarray(routing.expert)[mine].tolist(), np.asarray(routing.gate)[mine].tolist(), strict=True))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_is_neither_routed_nor_asked_for(name):
    routing = ROUTERS[name](group(key=jax.random.key(1)))
    padding = np.asarray(routing.token) >= TOKENS - 6
    assert not np.asarray(routing.kept | routing.wanted)[padding].any()
    assert not np.asarray(routing.gate)[~np.asarray(routing.kept)].any()
    assert np.isfinite(np.asarray(routing.gate)).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_no_expert_takes_a_token_twice_or_more_than_its_capacity(name):
    router = ROUTERS[name]
    routing = router(group(key=jax.random.key(1)))
    kept = np.asarray(routing.kept)
    pairs = list(zip(np.asarray(routing.token)[kept], np.asarray(routing.expert)[kept], strict=True))
    assert len(set(pairs)) == len(pairs)
    if router.capacity_factor:
        size = routers.capacity(router, tokens=TOKENS, num_experts=EXPERTS)
        assert np.bincount(np.asarray(routing.expert)[kept], minlength=EXPERTS).max() <= size


@pytest.mark.parametrize("renormalise", [True, False])
def test_top_k_is_mixtral(renormalise):
    g = group()
    routing = TopK(2, renormalise=renormalise)(g)
    for token in range(TOKENS - 6):
        logits = np.asarray(g.logits[token], np.float64)
        best = np.argsort(-logits)[:2]
        gates = softmax(logits[best]) if renormalise else softmax(logits)[best]
        found = chosen(routing, token)
        assert found.keys() == set(best.tolist())
        np.testing.assert_allclose([found[e] for e in best.tolist()], gates, rtol=1e-5)


def test_a_bias_moves_the_choice_and_not_the_gates():
    bias = jnp.zeros(EXPERTS).at[3].set(100.0)
    for router in (TopK(2, renormalise=False), Sigmoid(k=2)):
        plain, biased = router(group()), router(group(bias=bias))
        for token in range(TOKENS - 6):
            with_bias, without = chosen(biased, token), chosen(plain, token)
            assert 3 in with_bias
            if 3 in without and isinstance(router, TopK):
                np.testing.assert_allclose(with_bias[3], without[3], rtol=1e-6)
    gradient = jax.grad(lambda b: jnp.sum(TopK(2)(group(bias=b)).gate ** 2))(bias)
    assert not np.asarray(gradient).any()


def test_groups_of_experts_are_deepseek_v3():
    router, g = ROUTERS["deepseek"], group(bias=jnp.linspace(-0.2, 0.2, EXPERTS))
    routing = router(g)
    for token in range(TOKENS - 6):
        scores = 1 / (1 + np.exp(-np.asarray(g.logits[token], np.float64)))
        biased = scores + np.asarray(g.bias)
        worth = [np.sort(biased[2 * i : 2 * i + 2]).sum() for i in range(4)]
        allowed = [e for e in range(EXPERTS) if e // 2 in np.argsort(worth)[-2:]]
        best = sorted(allowed, key=lambda e: -biased[e])[:3]
        found = chosen(routing, token)
        assert found.keys() == set(best)
        np.testing.assert_allclose([found[e] for e in best], 2.5 * scores[best] / scores[best].sum(), rtol=1e-5)


def test_switch_drops_the_last_tokens_beyond_the_capacity():
    g = group(padding=0)
    routing, size = switch(capacity_factor=0.5)(g), 4
    left = [size] * EXPERTS
    for token in range(TOKENS):
        best = int(np.argmax(g.logits[token]))
        wanted = {best: softmax(np.asarray(g.logits[token]))[best]} if left[best] else {}
        left[best] -= bool(left[best])
        assert chosen(routing, token) == pytest.approx(wanted, rel=1e-5)


def test_first_choices_come_before_second_ones():
    g = group(padding=0)
    routing = glam(0.5)(g)
    taken = {e: [] for e in range(EXPERTS)}
    order = np.argsort(-np.asarray(g.logits), axis=1)
    for choice in range(2):
        for token in range(TOKENS):
            if len(taken[order[token, choice]]) < 8:
                taken[order[token, choice]].append(token)
    for expert, tokens in taken.items():
        mine = np.asarray(routing.kept) & (np.asarray(routing.expert) == expert)
        assert sorted(np.asarray(routing.token)[mine]) == sorted(tokens)


def test_the_second_expert_is_taken_by_chance():
    """With probability min(1, 2 g2) over many keys, always where that is 1, and without a key (evaluation)."""
    g, router = group(padding=0), Gshard(capacity_factor=0.0)
    draws = jax.vmap(lambda key: router(g._replace(key=key)).kept)(jax.random.split(jax.random.key(0), 2000))
    second = np.asarray(draws).reshape(2000, 2, TOKENS)[:, 1].mean(axis=0)
    logits = -np.sort(-np.asarray(g.logits, np.float64), axis=1)[:, :2]
    g2 = np.exp(logits[:, 1]) / np.exp(logits).sum(axis=1)
    np.testing.assert_allclose(second, np.minimum(1, 2 * g2), atol=0.05)
    assert np.asarray(router(g).kept).all()


def test_experts_choose_the_tokens_that_like_them_most():
    g = group()
    routing = ExpertChoice(capacity_factor=2.0)(g)
    probabilities = np.stack([softmax(row) for row in np.asarray(g.logits, np.float64)])
    for expert in range(EXPERTS):
        best = np.argsort(-probabilities[: TOKENS - 6, expert])[:16]
        mine = np.asarray(routing.kept) & (np.asarray(routing.expert) == expert)
        assert set(np.asarray(routing.token)[mine].tolist()) == set(best.tolist())


def test_a_hash_depends_on_the_token_alone_and_is_even():
    g = group()._replace(tokens=jnp.arange(TOKENS))
    first, again = Hash()(g), Hash()(g._replace(logits=-g.logits))
    assert (first.expert == again.expert).all()
    many = jax.vmap(lambda start: Hash()(g._replace(tokens=start + jnp.arange(TOKENS))).expert)(
        jnp.arange(500) * TOKENS
    )
    load = np.bincount(np.asarray(many).reshape(-1), minlength=EXPERTS)
    assert load.min() > 0.95 * load.mean() and load.max() < 1.05 * load.mean()
    assert (Hash(seed=1)(g).expert != first.expert).any()


@pytest.mark.parametrize(
    ("router", "words"),
    [
        (TopK(9), "between 1 and 8"),
        (Sigmoid(k=2, groups=3), "must divide"),
        (Sigmoid(k=5, groups=4, top_groups=2), "fewer than k=5"),
        (ExpertChoice(9.0), "at most 8"),
    ],
)
def test_what_cannot_be_is_refused(router, words):
    with pytest.raises(UserError, match=words):
        router.check(EXPERTS)
