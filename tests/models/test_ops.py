# SPDX-License-Identifier: Apache-2.0
"""Every implementation of an operation against its plain oracle, values and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import sharding
from research.core.sharding import MeshSpec
from research.models import chunked_attention, ops, splash_attention


@functools.cache
def inputs(*, heads=4, kv_heads=2, length=128, documents=3, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(keys[0], (2, length, heads, 8))
    k, v = (jax.random.normal(key, (2, length, kv_heads, 8)) for key in keys[1:3])
    cuts = jnp.sort(jax.random.randint(keys[3], (2, documents - 1), 1, length), axis=1)
    slots = jnp.arange(length)
    segments = 1 + jnp.sum(slots[None, :, None] >= cuts[:, None, :], axis=2)
    starts = jnp.concatenate([jnp.zeros((2, 1), jnp.int32), cuts], axis=1)
    positions = slots[None, :] - jnp.take_along_axis(starts, segments - 1, axis=1)
    segments = jnp.where(slots[None, :] < length - 5, segments, 0)  # the last five are padding
    where = dict(q_positions=positions, kv_positions=positions, q_segments=segments, kv_segments=segments)
    return (q, k, v), where


def by_hand(q, k, v, *, q_positions, kv_positions, q_segments, kv_segments, window=0):
    """One query at a time, in float64: softmax over the keys it may see, nothing for padding."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        seen = [
            s
            for s in range(k.shape[1])
            if q_segments[b, t] == kv_segments[b, s] != 0
            and kv_positions[b, s] <= q_positions[b, t]
            and (not window or q_positions[b, t] - kv_positions[b, s] < window)
        ]
        if seen:
            scores = k[b, seen, n // group] @ q[b, t, n]
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


@pytest.mark.parametrize("window", [0, 7])
def test_plain_attention_is_the_definition(window):
    arrays, where = inputs(length=48)
    found = ops.attention(*arrays, **where, visibility=ops.Visibility("causal", window), implementation="plain")
    wanted = by_hand(*arrays, **{k: np.asarray(v) for k, v in where.items()}, window=window)
    real = np.asarray(where["q_segments"]) > 0
    np.testing.assert_allclose(np.asarray(found)[real], wanted[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "kv_heads", "window", "aligned"),
    [
        ("blocked", 1, 0, True),
        ("blocked", 2, 40, True),
        ("blocked", 4, 0, True),
        ("chunked", 1, 0, True),
        ("chunked", 2, 40, True),
        ("chunked", 2, 40, False),
    ],
)
def test_every_implementation_is_plain(implementation, kv_heads, window, aligned, monkeypatch):
    monkeypatch.setattr(chunked_attention, "CHUNK", 24)  # does not divide 128
    arrays, where = inputs(kv_heads=kv_heads)
    real = (where["q_segments"] > 0)[:, :, None, None]

    def run(implementation):
        def loss(arrays):
            out = ops.attention(
                *arrays, **where, visibility=ops.Visibility("causal", window), aligned=aligned,
                implementation=implementation,
            )  # fmt: skip
            out = jnp.where(real, out, 0.0)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, has_aux=True))(arrays)

    (plain_grad, plain), (grad, out) = run("plain"), run(implementation)
    np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-6)
    for got, want in zip(grad, plain_grad, strict=True):
        assert jnp.linalg.norm(got - want) < 1e-5 * jnp.linalg.norm(want)


@pytest.mark.parametrize("window", [0, 70])
def test_splash_attention_is_plain(window):
    """The TPU's kernels, interpreted, on a mesh that splits rows and heads; packed rows with padding."""
    arrays, where = inputs(length=256)
    real = (where["q_segments"] > 0)[:, :, None, None]

    def run(implementation):
        def loss(arrays):
            out = ops.attention(
                *arrays, **where, visibility=ops.Visibility("causal", window), aligned=True,
                implementation=implementation,
            )  # fmt: skip
            out = jnp.where(real, out, 0.0)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, has_aux=True))(arrays)

    plain_grad, plain = run("plain")
    with jax.set_mesh(sharding.make_mesh(MeshSpec(data=2, tensor=2))):
        grad, out = run("splash")
    np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-6)
    for got, want in zip(grad, plain_grad, strict=True):
        assert jnp.linalg.norm(got - want) < 1e-5 * jnp.linalg.norm(want)


def test_splash_blocks_add_up_to_the_whole():
    """Two blocks of keys, joined by their log normalisers, forward and backward: what a ring does."""
    (q, k, v), where = inputs(length=256)
    segments, half = where["q_segments"], 128
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    late, block = q[:, :, half:], functools.partial(splash_attention.forward, interpret=True)
    seen = [
        (k[:, :, :half], v[:, :, :half], segments[:, :half], False),
        (k[:, :, half:], v[:, :, half:], segments[:, half:], True),
    ]
    parts = [block(late, k, v, segments[:, half:], ids, causal=causal) for k, v, ids, causal in seen]
    log_z = jnp.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * jnp.exp(own - log_z)[..., None] for part, own in parts)

    def whole(q, k, v):
        back = [x.swapaxes(1, 2) for x in (q, k, v)]
        return ops.attention(*back, **where, aligned=True, implementation="plain").swapaxes(1, 2)[:, :, half:]

    want, pull_back = jax.vjp(whole, q, k, v)
    real = (segments[:, half:] > 0)[:, None, :, None]
    np.testing.assert_allclose(jnp.where(real, out, 0), jnp.where(real, want, 0), rtol=1e-4, atol=1e-5)
    d_out = jnp.where(real, jnp.cos(want), 0.0)
    found = [
        splash_attention.backward(late, k, v, segments[:, half:], ids, out, log_z, d_out, causal=causal, interpret=True)
        for k, v, ids, causal in seen
    ]
    d_q, d_k, d_v = pull_back(d_out)
    for got, wanted in (
        (found[0][0] + found[1][0], d_q[:, :, half:]),
        (jnp.concatenate([found[0][1], found[1][1]], axis=2), d_k),
        (jnp.concatenate([found[0][2], found[1][2]], axis=2), d_v),
    ):
        assert jnp.linalg.norm(got - wanted) < 1e-5 * jnp.linalg.norm(wanted)


def test_kernels_are_left_where_they_do_not_fit():
    """Lengths that are no multiple of 128, and rows or heads that the mesh does not divide."""
    (q, k, v), _ = inputs(length=256)
    assert splash_attention.fits(q, k)
    assert not splash_attention.fits(q[:, :200], k[:, :200])
    with jax.set_mesh(sharding.make_mesh(MeshSpec(data=1, tensor=4))):
        assert not splash_attention.fits(q, k)  # 2 kv heads
    with jax.set_mesh(sharding.make_mesh(MeshSpec(data=4))):
        assert not splash_attention.fits(q, k)  # 2 rows


@pytest.mark.parametrize("window", [0, 64])
def test_attention_on_a_gpu_is_a_cudnn_call(window, monkeypatch):
    """Lowered for CUDA without a GPU: JAX is told that there is cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91300)
    arrays, where = inputs(length=256)

    def program(dtype):
        def loss(arrays):
            seen = ops.Visibility("causal", window)
            out = ops.attention(*arrays, **where, visibility=seen, aligned=True, platform="gpu")
            return jnp.sum(out.astype(jnp.float32))

        halves = tuple(x.astype(dtype) for x in arrays)
        return jax.jit(jax.grad(loss)).trace(halves).lower(lowering_platforms=("cuda",)).as_text()

    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in program(jnp.bfloat16)
    assert "cudnn" not in program(jnp.float32)


def test_blocked_attention_leaves_out_what_cannot_be_seen():
    arrays, where = inputs(length=256)

    def flops(implementation):
        run = jax.jit(lambda arrays: ops.attention(*arrays, **where, aligned=True, implementation=implementation))
        return run.lower(arrays).compile().cost_analysis()["flops"]

    assert flops("blocked") < 0.75 * flops("plain")


@pytest.mark.parametrize("aligned", [True, False])
def test_chunked_attention_never_forms_a_whole_row_of_scores(aligned, monkeypatch):
    monkeypatch.setattr(chunked_attention, "CHUNK", 64)
    arrays, where = inputs(length=512)

    def loss(arrays):
        return jnp.sum(ops.attention(*arrays, **where, aligned=aligned, implementation="chunked"))

    arrays_of = re.findall(r"tensor<([\dx]+)xf32>", jax.jit(jax.grad(loss)).lower(arrays).as_text())
    shapes = [[int(n) for n in found.split("x")] for found in arrays_of]
    assert any(shape[-2:] == [64, 64] for shape in shapes)
    # heads have width 8: what ends in two lengths are scores
    assert not any(max(shape[-2:]) == 512 and min(shape[-2:]) >= 64 for shape in shapes if len(shape) > 1)


def test_a_row_of_padding_stays_finite():
    arrays, where = inputs()
    where = dict(
        where,
        q_segments=jnp.zeros_like(where["q_segments"]),
        kv_segments=jnp.zeros_like(where["kv_segments"]),
    )
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(ops.attention(*a, **where, aligned=True))))(arrays)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradient)


def test_bias_is_added_to_the_scores():
    arrays, where = inputs(length=64)

    def far(q_positions, kv_positions):
        distance = (q_positions[:, :, None] - kv_positions[:, None, :]).astype(jnp.float32)
        return jnp.broadcast_to(-1e9 * (distance > 0)[:, None], (2, 4, *distance.shape[1:]))

    only_self = jax.jit(lambda a: ops.attention(*a, **where, aligned=True, bias=far))(arrays)
    real = np.asarray(where["q_segments"]) > 0
    v = jnp.repeat(arrays[2], 2, axis=2)
    np.testing.assert_allclose(np.asarray(only_self)[real], np.asarray(v)[real], rtol=1e-5)
