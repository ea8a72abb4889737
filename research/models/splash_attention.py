# SPDX-License-Identifier: Apache-2.0
"""Attention on TPUs by JAX's splash kernels: blocks of scores in fast memory, blocks that nobody sees left out.

``attention`` is the whole operation on global arrays, in one fully manual ``jax.shard_map``. ``forward`` and
``backward`` are its two halves on the arrays of one device, for who adds up blocks of keys: a ring.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from research.core import sharding
from research.core.sharding import partition_spec
from research.core.types import Array
from research.models.visibility import Places, Visibility

LANES = 128  # lengths come in multiples of it
BLOCK_Q, BLOCK_KV, BLOCK_COMPUTE = 512, 1024, 512  # the most; a block divides the length


def fits(q_BTNH: Array, k_BSKH: Array) -> bool:
    """Whether the kernels take such arrays on the mesh in scope: lengths in whole lanes, whole rows and heads."""
    rows, ways = sharding.ways("batch"), sharding.ways("act_heads")
    lengths = q_BTNH.shape[1], k_BSKH.shape[1]
    whole = all(n % LANES == 0 for n in lengths) and q_BTNH.shape[0] % rows == 0
    return whole and q_BTNH.shape[2] % ways == 0 and k_BSKH.shape[2] % ways == 0


def attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segments_BT: Array,
    *,
    window: int = 0,
    cap: float = 0.0,
    interpret: bool = False,
) -> Array:
    """Causal attention within segments: q [B, T, N, H], scaled; k and v [B, T, K, H] -> [B, T, N, H] in q's dtype.

    Slot t of the queries and of the keys is the same token. window: at most so many slots back, the query's own
    included (0: no limit). cap: of the scores (``visibility.capped``). Padding (segment 0) sees padding only.
    interpret: run the kernels on a CPU, slowly.
    """

    def local(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array) -> Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        return _attention(window, cap, interpret, q, k, v, segments_BT).swapaxes(1, 2)

    if not jax.sharding.get_abstract_mesh().empty:
        heads, rows = partition_spec(("batch", None, "act_heads", None)), partition_spec(("batch", None))
        local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return local(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def forward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    q_segments_BT: Array,
    kv_segments_BS: Array,
    *,
    causal: bool,
    window: int = 0,
    cap: float = 0.0,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """One block of attention on the arrays of one device: (out [B, N, T, H], log normaliser [B, N, T] float32).

    q [B, N, T, H], scaled; k and v [B, K, S, H], float32 or bfloat16; segments [B, T] and [B, S], int32; T and S
    multiples of 128. Seen are keys of the query's segment: with ``causal`` those in its slot or before (T = S), else
    all. A query that sees none gets a log normaliser of -2e38, so that its block weighs nothing beside others.
    """
    infos, function = _mask(causal, window, q_BNTH.shape[2], k_BKSH.shape[2])

    def row(q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array) -> tuple[Array, Array]:
        out, (log_z,) = kernels._splash_attention_forward(
            infos[0],
            q,
            k,
            v,
            kernels.SegmentIds(q_segments, kv_segments),
            None,
            block_sizes=_sizes(q.shape[1], k.shape[1]),
            save_residuals=True,
            mask_function=function,
            interpret=interpret,
            attn_logits_soft_cap=cap or None,
            **COMMON,
        )
        return out, log_z

    return jax.vmap(row)(q_BNTH, k_BKSH, v_BKSH, q_segments_BT, kv_segments_BS)


def backward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    q_segments_BT: Array,
    kv_segments_BS: Array,
    out_BNTH: Array,
    log_z_BNT: Array,
    d_out_BNTH: Array,
    *,
    causal: bool,
    window: int = 0,
    cap: float = 0.0,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """What one block adds to the gradients of q, k and v, in their shapes and dtypes (``forward`` says which).

    out and log_z [B, N, T] are those over all the keys that a query sees, of which these may be a part.
    """
    infos, function = _mask(causal, window, q_BNTH.shape[2], k_BKSH.shape[2])

    def row(*saved: Array) -> tuple[Array, Array, Array]:
        q, k, v, q_segments, kv_segments, out, log_z, d_out = saved
        segments = kernels.SegmentIds(q_segments, kv_segments)
        gradients = kernels._splash_attention_bwd(
            False,
            block_sizes=_sizes(q.shape[1], k.shape[1]),
            mask_function=function,
            interpret=interpret,
            res=(q, k, v, segments, None, out, log_z, *infos[1:]),
            do=d_out,
            attn_logits_soft_cap=cap or None,
            **COMMON,
        )
        return gradients[3:6]

    arrays = q_BNTH, k_BKSH, v_BKSH, q_segments_BT, kv_segments_BS, out_BNTH, log_z_BNT, d_out_BNTH
    return jax.vmap(row)(*arrays)


@dataclass(frozen=True)
class Block:
    """A block of a ring (``ring_attention.Block``): in one order with its keys, or of keys that are all seen."""

    interpret: bool = False
    cap: float = 0.0

    def forward(
        self, visibility: Visibility, aligned: bool, q: Array, k: Array, v: Array, places: Places
    ) -> tuple[Array, Array]:
        del visibility
        heads = (x.swapaxes(1, 2) for x in (q, k, v))
        segments = places.q_segments, places.kv_segments
        how = dict(causal=aligned, interpret=self.interpret, cap=self.cap)
        return tuple(x.swapaxes(1, 2) for x in forward(*heads, *segments, **how))

    def backward(
        self, visibility: Visibility, aligned: bool, inputs: tuple, out: Array, log_sum: Array, d_out: Array
    ) -> tuple[Array, Array, Array]:
        del visibility
        *heads, places = inputs
        heads, rest = ([x.swapaxes(1, 2) for x in arrays] for arrays in (heads, (out, log_sum, d_out)))
        segments = places.q_segments, places.kv_segments
        found = backward(*heads, *segments, *rest, causal=aligned, interpret=self.interpret, cap=self.cap)
        return tuple(x.swapaxes(1, 2).astype(jnp.float32) for x in found)


COMMON: dict[str, Any] = dict(mask_value=kernels.DEFAULT_MASK_VALUE, is_mqa=False, residual_checkpoint_name=None)


def _block(length: int, most: int) -> int:
    """The largest block that divides the length, in whole lanes."""
    return max(size for size in range(LANES, min(length, most) + 1, LANES) if length % size == 0)


def _sizes(length: int, keys: int) -> kernels.BlockSizes:
    q, kv, compute = _block(length, BLOCK_Q), _block(keys, BLOCK_KV), _block(keys, BLOCK_COMPUTE)
    compute = compute if kv % compute == 0 else kv
    return kernels.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        block_q_dq=q,
        block_kv_dq=kv,
    )


@functools.lru_cache(maxsize=32)
def _mask(causal: bool, window: int, length: int, keys: int) -> tuple[tuple[Any, Any, Any], Any]:
    """Which blocks are looked at, for the forward pass, for q's gradient and for k's and v's; and the mask of a block
    as a function of slots. Plain NumPy: they become constants of whatever program they are used in."""
    shape, sizes = (length, keys), _sizes(length, keys)
    one: masks.Mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    if causal and window:
        one = masks.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    every_head = masks.MultiHeadMask([one])
    forward, function = mask_info.process_mask(every_head, (sizes.block_q, sizes.block_kv))
    keys_side, _ = mask_info.process_mask_dkv(every_head, (sizes.block_q_dkv, sizes.block_kv_dkv))
    numpy = [jax.tree.map(np.asarray, info) for info in (forward, forward, keys_side)]  # q's blocks are the forward's
    return (numpy[0], numpy[1], numpy[2]), function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(window: int, cap: float, interpret: bool, q: Array, k: Array, v: Array, segments: Array) -> Array:
    return _forward(window, cap, interpret, q, k, v, segments)[0]


def _forward(
    window: int, cap: float, interpret: bool, q: Array, k: Array, v: Array, segments: Array
) -> tuple[Array, tuple]:
    out, log_z = forward(q, k, v, segments, segments, causal=True, window=window, cap=cap, interpret=interpret)
    return out, (q, k, v, segments, segments, out, log_z)


def _backward(window: int, cap: float, interpret: bool, saved: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    return *backward(*saved, d_out, causal=True, window=window, cap=cap, interpret=interpret), None


_attention.defvjp(_forward, _backward)
