# SPDX-License-Identifier: Apache-2.0
"""One model's training step in bare JAX: the yardstick that the library's step is held against.

It knows its model, its one document a row and its machine, and uses nothing of the library: attention in causal
blocks with its gradient written out, projections of one input in one product, the gradients of head and loss
formed together in chunks, hand-written AdamW. Each of these was kept because it made the step faster on two CPU
cores. ``plain=True`` is the same model as a textbook would write it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MASKED = -1e30
BLOCK, CHUNK = 128, 512
SIZES = dict(vocab=8192, d_model=256, layers=4, heads=4, d_ff=688, length=512, batch=8)


def init(sizes, seed=0):
    """Parameters as a dict; layers are a list, each with its own arrays."""
    rng, d = np.random.default_rng(seed), sizes["d_model"]

    def matrix(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.02, jnp.float32)

    def layer():
        return dict(
            norm1=jnp.ones(d), q=matrix(d, d), k=matrix(d, d), v=matrix(d, d), out=matrix(d, d), norm2=jnp.ones(d),
            gate=matrix(d, sizes["d_ff"]), up=matrix(d, sizes["d_ff"]), down=matrix(sizes["d_ff"], d),
        )  # fmt: skip

    layers = [layer() for _ in range(sizes["layers"])]
    return dict(embedding=matrix(sizes["vocab"], d), layers=layers, norm=jnp.ones(d), head=matrix(d, sizes["vocab"]))


def rms_norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def rope_tables(length, width):
    turn = jnp.arange(length)[:, None] * 10000.0 ** (-jnp.arange(0, width, 2) / width)
    return jnp.sin(turn)[:, None, :], jnp.cos(turn)[:, None, :]


def rope(x, tables):
    sin, cos = tables
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


# --- products: several of one input at once; their gradients stand side by side before they are used --------


@jax.custom_vjp
def products(x, weights):
    """x [n, in] times each of weights [in, out_i]."""
    return tuple(jnp.split(x @ jnp.concatenate(weights, 1), _cuts(weights), -1))


def _cuts(weights):
    return np.cumsum([w.shape[1] for w in weights])[:-1].tolist()


def _products_backward(saved, gradients):
    x, weights = saved
    gradient = gradients[0]
    if len(weights) > 1:
        gradient = lax.optimization_barrier(jnp.concatenate(gradients, -1))
    d_x = lax.dot_general(gradient, jnp.concatenate(weights, 1), (((1,), (1,)), ((), ())))
    d_w = lax.dot_general(x, gradient, (((0,), (0,)), ((), ())))
    return d_x, tuple(jnp.split(d_w, _cuts(weights), 1))


products.defvjp(lambda x, weights: (products(x, weights), (x, weights)), _products_backward)


@jax.custom_vjp
def swiglu(gate, up):
    return gate * jax.nn.sigmoid(gate) * up


def _swiglu_backward(saved, gradient):
    gate, up = saved
    s = jax.nn.sigmoid(gate)
    return gradient * up * (s + gate * s * (1 - s)), gradient * gate * s


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


# --- attention: [B, N, T, H], queries in blocks, keys up to the block's end --------------------------------


def _bmm(x, y, contract):
    return lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((0, 1), (0, 1))))


def _spans(q):
    return [(start, start + BLOCK) for start in range(0, q.shape[2], BLOCK)]


@jax.custom_vjp
def attention(q, k, v):
    return _attention_forward(q, k, v)[0]


def _attention_forward(q, k, v):
    outputs, saved = [], []
    for start, end in _spans(q):
        scores = _bmm(q[:, :, start:end], k[:, :, :end], (3, 3))
        scores = jnp.where(jnp.arange(start, end)[:, None] >= jnp.arange(end), scores, MASKED)
        weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
        total = jnp.sum(weights, -1, keepdims=True)
        outputs.append(_bmm(weights, v[:, :, :end], (3, 2)) / total)
        saved.append((weights, total))
    out = jnp.concatenate(outputs, 2)
    return out, (q, k, v, out, saved)


def _attention_backward(residuals, d_out):
    q, k, v, out, saved = residuals
    inner = jnp.sum(out * d_out, -1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros_like(k.swapaxes(2, 3)), jnp.zeros_like(v.swapaxes(2, 3))
    for (start, end), (weights, total) in zip(_spans(q), saved, strict=True):
        d_block = d_out[:, :, start:end] / total
        d_scores = weights * (_bmm(d_block, v[:, :, :end], (3, 3)) - inner[:, :, start:end] / total)
        d_q.append(_bmm(d_scores, k[:, :, :end], (3, 2)))
        d_k = d_k.at[..., :end].add(_bmm(q[:, :, start:end], d_scores, (2, 2)))
        d_v = d_v.at[..., :end].add(_bmm(d_block, weights, (2, 2)))
    return jnp.concatenate(d_q, 2), d_k.swapaxes(2, 3), d_v.swapaxes(2, 3)


attention.defvjp(_attention_forward, _attention_backward)


# --- head and loss: gradients formed chunk by chunk in the forward pass ------------------------------------


@jax.custom_vjp
def cross_entropy(x, head, targets):
    """Mean over x [n, D] of the cross-entropy of targets [n]."""
    return _cross_entropy_forward(x, head, targets)[0]


def _cross_entropy_forward(x, head, targets):
    def body(carry, part):
        loss, d_head = carry
        x, y = part
        logits = x @ head
        top = jnp.max(logits, -1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, -1, keepdims=True)
        chosen = jnp.take_along_axis(logits, y[:, None], 1)
        loss += jnp.sum(top + jnp.log(total) - chosen)
        hit = jnp.arange(head.shape[1]) == y[:, None]
        d_logits = lax.optimization_barrier(weights * (scale / total) - jnp.where(hit, scale, 0))
        d_x = lax.dot_general(d_logits, head, (((1,), (1,)), ((), ())))
        return (loss, d_head + lax.optimization_barrier(x.T) @ d_logits), d_x

    scale = 1.0 / x.shape[0]
    parts = x.reshape(-1, CHUNK, x.shape[1]), targets.reshape(-1, CHUNK)
    (loss, d_head), d_x = lax.scan(body, (jnp.zeros(()), jnp.zeros_like(head)), parts)
    return loss * scale, (d_x.reshape(x.shape), d_head)


cross_entropy.defvjp(_cross_entropy_forward, lambda saved, g: (g * saved[0], g * saved[1], None))


# --- the model and its step ----------------------------------------------------------------------------------


def loss_fast(params, tokens, targets, sizes):
    batch, length = tokens.shape
    heads, d = sizes["heads"], sizes["d_model"]
    tables = rope_tables(length, d // heads)
    x = params["embedding"][tokens].reshape(batch * length, d)
    for layer in params["layers"]:
        parts = products(rms_norm(x, layer["norm1"]), (layer["q"], layer["k"], layer["v"]))
        q, k, v = (part.reshape(batch, length, heads, -1) for part in parts)
        q = rope(q * (d // heads) ** -0.5, tables)
        mixed = attention(q.swapaxes(1, 2), rope(k, tables).swapaxes(1, 2), v.swapaxes(1, 2))
        (y,) = products(mixed.swapaxes(1, 2).reshape(batch * length, d), (layer["out"],))
        x = x + y
        (y,) = products(swiglu(*products(rms_norm(x, layer["norm2"]), (layer["gate"], layer["up"]))), (layer["down"],))
        x = x + y
    return cross_entropy(rms_norm(x, params["norm"]), params["head"], targets.reshape(-1))


def loss_plain(params, tokens, targets, sizes):
    batch, length = tokens.shape
    heads, width = sizes["heads"], sizes["d_model"] // sizes["heads"]
    tables, causal = rope_tables(length, width), jnp.tril(jnp.ones((length, length), bool))
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        y = rms_norm(x, layer["norm1"])
        q, k, v = ((y @ layer[name]).reshape(batch, length, heads, width) for name in "qkv")
        scores = jnp.einsum("btnh,bsnh->bnts", rope(q, tables), rope(k, tables)) * width**-0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, MASKED), -1)
        x = x + jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(batch, length, -1) @ layer["out"]
        y = rms_norm(x, layer["norm2"])
        x = x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
    logits = jax.nn.log_softmax(rms_norm(x, params["norm"]) @ params["head"])
    return -jnp.mean(jnp.take_along_axis(logits, targets[..., None], -1))


def adamw(params, gradients, m, v, step, rate=3e-4, b1=0.9, b2=0.95, eps=1e-8, decay=0.1):
    scale1, scale2 = 1 - b1**step, 1 - b2**step
    m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, gradients)
    v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, gradients)

    def move(p, m, v):
        return p - rate * (m / scale1 / (jnp.sqrt(v / scale2) + eps) + (decay * p if p.ndim > 1 else 0))

    return jax.tree.map(move, params, m, v), m, v


def start(sizes=SIZES):
    """The state before the first step: parameters, two moments, steps done."""
    params = init(sizes)
    return params, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params), jnp.zeros(())


def make_step(sizes=SIZES, *, plain=False):
    """step(state, tokens [B, T], targets [B, T]) -> (state, loss), the state donated."""
    loss = loss_plain if plain else loss_fast

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens, targets):
        params, m, v, done = state
        value, gradients = jax.value_and_grad(loss)(params, tokens, targets, sizes)
        return (*adamw(params, gradients, m, v, done + 1), done + 1), value

    return step
