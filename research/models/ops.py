# SPDX-License-Identifier: Apache-2.0
"""Operations with one signature and several implementations, chosen by the platform of the mesh's devices.

``attention``: "plain" is the oracle and forms [B, N, T, S] scores; "blocked" goes through blocks of queries and
leaves out the keys that no query of the block may see, which on a CPU takes about half the time; "chunked" never
forms scores of a whole row; "splash" are kernels for TPUs and "cudnn" those for GPUs. ``grouped_matmul`` has a file of
its own.
"""

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
from research.models.visibility import MASKED, Places, Visibility, mask_BTS

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
    aligned: bool = False,
    implementation: AttentionImplementation = "auto",
    platform: str = "cpu",
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) with grouped kv heads (Ainslie et al. 2023).

    q [B, T, N, H], already multiplied by the scale (1/sqrt(H) in eq. 1), k and v [B, S, K, H] with N a multiple
    of K -> [B, T, N, H] in q's dtype; softmax in float32. positions and segments [B, T] and [B, S] decide what is
    seen (``Visibility``); ``bias`` maps query and key positions to [B, N, T, S] added to the scores. ``aligned``
    promises packed training rows: slot t of the queries and of the keys is the same token, and positions count
    the slots since the segment began. Only then may blocks of keys be left out: what is not aligned, or not of a
    shape that an implementation takes, falls back to "plain".
    """
    if bias is not None and implementation not in ("auto", "plain"):
        raise UserError(
            f"The attention {implementation!r} takes no bias: choose attention.implementation=plain, or auto."
        )
    places = Places(q_positions, kv_positions, q_segments, kv_segments)
    length, window = q_BTNH.shape[1], visibility.window
    chosen = IMPLEMENTATION.get(platform, "plain") if implementation == "auto" else implementation
    if aligned and bias is None and visibility.kind == "causal" and chosen != "plain":
        if ring_attention.applies(length):
            block = _ring_block(q_BTNH, window, platform) if chosen == "splash" else chunked_attention
            return ring_attention.ring_attention(
                q_BTNH, k_BSKH, v_BSKH, q_positions, q_segments, visibility, block=block
            )
        short = implementation == "blocked" or length <= LONGEST_PLAIN
        if chosen == "blocked" and short and length % BLOCKS == 0 and length >= BLOCKS * SMALLEST_BLOCK:
            return blocked_attention(q_BTNH, k_BSKH, v_BSKH, q_positions, window=window, blocks=BLOCKS)
        if chosen == "splash":
            from research.models import splash_attention  # here: Pallas takes a tenth of a second to import

            if splash_attention.fits(q_BTNH, k_BSKH):
                interpret = platform != "tpu"
                return splash_attention.attention(
                    q_BTNH, k_BSKH, v_BSKH, q_segments, window=window, interpret=interpret
                )
        if chosen == "cudnn" and _cudnn_fits(q_BTNH):
            return _cudnn(q_BTNH, k_BSKH, v_BSKH, q_segments, window)
    if bias is None and (chosen == "chunked" or (chosen != "plain" and length > LONGEST_PLAIN)):
        return chunked_attention.chunked_attention(q_BTNH, k_BSKH, v_BSKH, places, visibility, aligned=aligned)
    mask = mask_BTS(visibility, places)
    return _attend(q_BTNH, k_BSKH, v_BSKH, mask, bias(q_positions, kv_positions) if bias else None)


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


def _ring_block(q_BTNH: Array, window: int, platform: str) -> ring_attention.Block:
    """Splash kernels for a ring whose pieces they take; they know no window between pieces."""
    from research.models import splash_attention

    pieces = 2 * sharding.ways("sequence")
    if window or q_BTNH.shape[1] % (pieces * splash_attention.LANES):
        return chunked_attention
    return splash_attention.Block(interpret=platform != "tpu")


def _attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Array, bias: Array | None) -> Array:
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    group = heads // kv_heads
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, group, width)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH).astype(jnp.float32)
    if bias is not None:
        scores_BKGTS = scores_BKGTS + bias.reshape(scores_BKGTS.shape)
    scores_BKGTS = jnp.where(mask[:, None, None, :, :], scores_BKGTS, MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(batch, length, heads, width)
