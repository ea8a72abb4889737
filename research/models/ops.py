# SPDX-License-Identifier: Apache-2.0
"""Operations with one signature and several implementations, chosen by the platform of the mesh's devices.

``attention``: "plain" is the oracle and forms [B, N, T, S] scores; "blocked" goes through blocks of queries and
leaves out the keys that no query of the block may see, which on a CPU takes about half the time; "chunked" never
forms scores of a whole row; "splash" are kernels for TPUs and "cudnn" those for GPUs. ``grouped_matmul`` has a file of
its own.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from research.core import sharding
from research.core.types import Array, UserError
from research.models import chunked_attention, ring_attention
from research.models.blocked_attention import blocked_attention
from research.models.grouped_matmul import grouped_matmul as grouped_matmul
from research.models.visibility import MASKED, Places, Visibility, capped, mask_BTS

AttentionImplementation = Literal["auto", "plain", "blocked", "chunked", "splash", "cudnn"]
IMPLEMENTATION: dict[str, AttentionImplementation] = {"cpu": "blocked", "tpu": "splash", "gpu": "cudnn"}
BLOCKS = 4  # of queries; 2 leaves a quarter of the square more, 8 gains nothing (measured at 512)
SMALLEST_BLOCK = 16
LONGEST_PLAIN = 2048  # beyond it, scores of a whole row of the batch are not formed


def linear(
    x: Array, *weights: Array, contract: int = 1, platform: str = "cpu", precision: str | None = None
) -> tuple[Array, ...]:
    """x [..., *in] times each of weights [*in, *out], contracting the last ``contract`` dimensions of x.

    precision: that of ``jax.lax.dot_general``, of which a CPU knows but one.

    On a CPU as one product of two matrices, the weights side by side: contracting the leading dimensions of x
    apart, as the gradient of a weight does, is a third slower there, and every product more reads x once more.
    """
    if platform != "cpu":
        dims = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
        return tuple(jax.lax.dot_general(x, w, (dims, ((), ())), precision=precision) for w in weights)
    leading, width = x.shape[: x.ndim - contract], math.prod(x.shape[x.ndim - contract :])
    outputs = _products(x.reshape(-1, width), tuple(w.reshape(width, -1) for w in weights))
    return tuple(y.reshape(*leading, *w.shape[contract:]) for y, w in zip(outputs, weights, strict=True))


def _split(x: Array, like: tuple[Array, ...]) -> tuple[Array, ...]:
    """The columns of x, as many for each as the matrices of ``like`` have."""
    ends = list(itertools.accumulate(w.shape[1] for w in like))
    return tuple(jnp.split(x, ends[:-1], axis=1))


@jax.custom_vjp
def _products(x: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
    """x [n, in] times each of weights [in, out]."""
    return _split(jax.lax.dot_general(x, jnp.concatenate(weights, 1), (((1,), (0,)), ((), ()))), weights)


def _products_backward(
    saved: tuple[Array, tuple[Array, ...]], d_outputs: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    x, weights = saved
    d_y = d_outputs[0]
    if len(weights) > 1:  # the barrier: else each of the two products below would put them side by side again
        d_y = jax.lax.optimization_barrier(jnp.concatenate(d_outputs, 1))
    d_x = jax.lax.dot_general(d_y, jnp.concatenate(weights, 1), (((1,), (1,)), ((), ())))
    if x.shape[0] < d_y.shape[1]:  # transposing x first costs less than a product with its long side transposed
        d_w = jax.lax.dot_general(jax.lax.optimization_barrier(x.T), d_y, (((1,), (0,)), ((), ())))
    else:
        d_w = jax.lax.dot_general(x, d_y, (((0,), (0,)), ((), ())))
    return d_x, _split(d_w, weights)


_products.defvjp(lambda x, weights: (_products(x, weights), (x, weights)), _products_backward)


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    q_positions: Array,
    kv_positions: Array,
    q_segments: Array,
    kv_segments: Array,
    visibility: Visibility = Visibility(),  # noqa: B008 - a frozen value
    bias: Callable[[Array, Array], Array] | None = None,
    cap: float = 0.0,
    sinks: Array | None = None,
    kv_scales: tuple[Array, Array] | None = None,
    aligned: bool = False,
    implementation: AttentionImplementation = "auto",
    platform: str = "cpu",
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) with grouped kv heads (Ainslie et al. 2023).

    q [B, T, N, H], already multiplied by the scale (1/sqrt(H) in eq. 1), k [B, S, K, H] and v [B, S, K, X] with N a
    multiple of K -> [B, T, N, X] in q's dtype; softmax in float32. positions and segments [B, T] and [B, S] decide what
    is seen (``Visibility``); ``bias`` maps query and key positions to [B, N, T, S] added to the scores. cap: scores
    become cap tanh(score / cap) (Gemma 2, 2024, section 2). sinks [N]: a logit of each head that takes its share of the
    softmax and gives nothing. kv_scales [B, S, K] each: k and v are whole numbers to be multiplied by them.

    ``aligned`` promises packed training rows: slot t of the queries and of the keys is the same token, and positions
    count the slots since the segment began. Only then may blocks of keys be left out: what is not aligned, or not of a
    shape that an implementation takes, falls back to "plain".
    """
    only_plain = [
        name for name, given in (("bias", bias), ("sinks", sinks), ("scales", kv_scales)) if given is not None
    ]
    if only_plain and implementation not in ("auto", "plain"):
        raise UserError(
            f"The attention {implementation!r} takes no {only_plain[0]}: choose attention.implementation=plain or auto."
        )
    places = Places(q_positions, kv_positions, q_segments, kv_segments)
    length, value_width = q_BTNH.shape[1], v_BSKH.shape[-1]
    chosen = IMPLEMENTATION.get(platform, "plain") if implementation == "auto" else implementation
    if not only_plain and chosen != "plain":
        causal = aligned and visibility.kind == "causal"
        run = _fast(chosen, implementation, q_BTNH, k_BSKH, visibility, cap, platform) if causal else None
        if run is not None:
            return run(q_BTNH, k_BSKH, _widened(v_BSKH, k_BSKH), q_positions, q_segments)[..., :value_width]
        if chosen == "chunked" or length > LONGEST_PLAIN:
            v = _widened(v_BSKH, k_BSKH)
            run = functools.partial(chunked_attention.chunked_attention, aligned=aligned, cap=cap)
            return run(q_BTNH, k_BSKH, v, places, visibility)[..., :value_width]
    mask = mask_BTS(visibility, places)
    added = bias(q_positions, kv_positions) if bias else None
    return _attend(q_BTNH, k_BSKH, v_BSKH, mask, added, cap=cap, sinks=sinks, kv_scales=kv_scales)


def _widened(v_BSKH: Array, k_BSKH: Array) -> Array:
    """Values with zeros behind, as wide as the keys: what kernels of one width take."""
    missing = k_BSKH.shape[-1] - v_BSKH.shape[-1]
    return jnp.pad(v_BSKH, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else v_BSKH


def _fast(
    chosen: AttentionImplementation,
    asked: AttentionImplementation,
    q_BTNH: Array,
    k_BTKH: Array,
    visibility: Visibility,
    cap: float,
    platform: str,
) -> Callable[..., Array] | None:
    """The chosen implementation for aligned rows, as a function of q, k, v, positions and segments, or the ring where
    sequences are split; None where it does not take such arrays."""
    length, window = q_BTNH.shape[1], visibility.window
    if ring_attention.applies(length):
        block: ring_attention.Block = chunked_attention.Block(cap)
        if chosen == "splash" and not visibility.first_tokens:
            block = _ring_block(q_BTNH, window, cap, platform)
        return lambda q, k, v, at, segments: ring_attention.ring_attention(
            q, k, v, at, segments, visibility, block=block
        )
    if visibility.first_tokens:
        return None
    short = asked == "blocked" or length <= LONGEST_PLAIN
    if chosen == "blocked" and not cap and short and length % BLOCKS == 0 and length >= BLOCKS * SMALLEST_BLOCK:
        return lambda q, k, v, at, segments: blocked_attention(q, k, v, at, window=window, blocks=BLOCKS)
    if chosen == "splash":
        from research.models import splash_attention  # here: Pallas takes a tenth of a second to import

        if splash_attention.fits(q_BTNH, k_BTKH):
            how = dict(window=window, cap=cap, interpret=platform != "tpu")
            return lambda q, k, v, at, segments: splash_attention.attention(q, k, v, segments, **how)
    if chosen == "cudnn" and not cap and _cudnn_fits(q_BTNH):
        return lambda q, k, v, at, segments: _cudnn(q, k, v, segments, window)
    return None


def _cudnn_fits(q_BTNH: Array) -> bool:
    """What cuDNN takes on every GPU: half precision, heads of whole octets up to 128, even lengths."""
    half, (_, length, _, width) = q_BTNH.dtype in (jnp.bfloat16, jnp.float16), q_BTNH.shape
    return half and length % 2 == 0 and width % 8 == 0 and width <= 128


def _cudnn(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array, window: int) -> Array:
    """Causal attention within segments by cuDNN, in half precision; q comes scaled."""
    same_BNTS = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=same_BNTS,
        scale=1.0,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )


def _ring_block(q_BTNH: Array, window: int, cap: float, platform: str) -> ring_attention.Block:
    """Splash kernels for a ring whose pieces they take; they know no window between pieces."""
    from research.models import splash_attention

    pieces = 2 * sharding.ways("sequence")
    if window or q_BTNH.shape[1] % (pieces * splash_attention.LANES):
        return chunked_attention.Block(cap)
    return splash_attention.Block(interpret=platform != "tpu", cap=cap)


def _attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Array,
    bias: Array | None,
    *,
    cap: float = 0.0,
    sinks: Array | None = None,
    kv_scales: tuple[Array, Array] | None = None,
) -> Array:
    batch, length, heads, width = q_BTNH.shape
    kv_heads, dtype = k_BSKH.shape[2], q_BTNH.dtype
    group = heads // kv_heads
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, group, width)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(dtype)).astype(jnp.float32)
    k_scale, v_scale = (jnp.einsum("BSK->BKS", x)[:, :, None, None] for x in kv_scales) if kv_scales else (None, None)
    if k_scale is not None:
        scores_BKGTS = scores_BKGTS * k_scale
    if bias is not None:
        scores_BKGTS = scores_BKGTS + bias.reshape(scores_BKGTS.shape)
    if cap:
        scores_BKGTS = capped(scores_BKGTS, cap)
    scores_BKGTS = jnp.where(mask[:, None, None, :, :], scores_BKGTS, MASKED)
    if sinks is None:
        weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    else:
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, group, 1, 1)
        top = jnp.maximum(jnp.max(scores_BKGTS, axis=-1, keepdims=True), sink)
        exponentials = jnp.exp(scores_BKGTS - top)
        weights_BKGTS = exponentials / (jnp.sum(exponentials, axis=-1, keepdims=True) + jnp.exp(sink - top))
    if v_scale is not None:
        weights_BKGTS = weights_BKGTS * v_scale
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(dtype), v_BSKH.astype(dtype))
    return out_BTKGH.reshape(batch, length, heads, v_BSKH.shape[-1])
