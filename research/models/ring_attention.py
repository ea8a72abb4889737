# SPDX-License-Identifier: Apache-2.0
"""Causal attention over a sequence split across devices: keys and values travel around a ring (Liu et al. 2023).

A causal ring in order leaves the first devices idle. Here device i of c holds pieces i and 2c-1-i of the 2c pieces
of the sequence (as in Llama 3, 2024, section 3.3.2), so that every device has the same work at every step: of a
visitor's keys, its own later piece sees the earlier piece whole; and either both of its pieces see the visitor's
earlier piece, or its later piece sees both of the visitor's. Nothing is computed to be masked but on the diagonal.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.core import sharding
from research.core.types import Array
from research.models import chunked_attention
from research.models.visibility import MASKED, Places, Visibility

AXIS = "context"


class Block(Protocol):
    """Attention of local queries to local keys whose results merge (``chunked_attention.Block``)."""

    def forward(
        self, visibility: Visibility, aligned: bool, q: Array, k: Array, v: Array, places: Places
    ) -> tuple[Array, Array]: ...

    def backward(
        self, visibility: Visibility, aligned: bool, inputs: tuple, out: Array, log_sum: Array, d_out: Array
    ) -> tuple[Array, Array, Array]: ...


def applies(length: int) -> bool:
    """Whether the mesh in scope splits sequences of this length over a ring."""
    size = sharding.ways("sequence")
    return size > 1 and length % (2 * size) == 0


def balance(x: Array, *, inverse: bool = False) -> Array:
    """[B, T, ...] in order -> each device's two pieces side by side, or back. Every piece is sent once.

    Of the two pieces of a device one is even and one odd, in order (2i, 2i+1) and in balance (i, 2c-1-i): the even
    ones and the odd ones are a permutation of the devices each.
    """
    size = sharding.ways("sequence")
    holder = lambda piece: min(piece, 2 * size - 1 - piece)  # noqa: E731
    moves = [[(i, holder(2 * i + odd)) for i in range(size)] for odd in (0, 1)]
    if inverse:
        moves = [[(to, i) for i, to in pairs] for pairs in moves]

    def local(x: Array) -> Array:
        first, second = jnp.split(x, 2, axis=1)
        swapped = lax.axis_index(AXIS) % 2 == 1
        if inverse:
            first, second = jnp.where(swapped, second, first), jnp.where(swapped, first, second)
        first, second = (lax.ppermute(piece, AXIS, pairs) for piece, pairs in zip((first, second), moves, strict=True))
        if not inverse:
            first, second = jnp.where(swapped, second, first), jnp.where(swapped, first, second)
        return jnp.concatenate([first, second], axis=1)

    spec = sharding.partition_spec(("batch", "sequence", *[None] * (x.ndim - 2)))
    spec = sharding.fitting_spec(x.shape, spec, sharding.current_shape())
    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)


def order(length: int) -> np.ndarray:
    """[T]: which place in order each slot of balanced rows has."""
    size = sharding.ways("sequence")
    pieces = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([pieces[piece] for i in range(size) for piece in (i, 2 * size - 1 - i)])


def ring_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    positions_BT: Array,
    segments_BT: Array,
    visibility: Visibility,
    *,
    block: Block = chunked_attention.Block(),  # noqa: B008 - a frozen value
) -> Array:
    """Causal attention of packed rows in balanced order (``balance``) -> [B, T, N, H]. q comes scaled.

    T is a multiple of twice the ring. Memory per device is that of its own part; each device sends its keys and
    values once around, and in the backward pass keys, values and their gradients.
    """
    tokens = sharding.partition_spec(("batch", "sequence"))
    heads = sharding.partition_spec(("batch", "sequence", "act_heads", None))
    sizes = sharding.current_shape()
    tokens, heads = (sharding.fitting_spec(x.shape, s, sizes) for x, s in ((positions_BT, tokens), (q_BTNH, heads)))
    local = functools.partial(_ring, visibility, block)
    specs = (heads, heads, heads, tokens, tokens)
    run = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)
    return run(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT)


class _Visitor(NamedTuple):
    """What travels: a device's keys and values, where they stand, and (backward) the gradients so far."""

    k: Array
    v: Array
    positions: Array
    segments: Array
    gradients: Any = None

    def halves(self) -> tuple["_Visitor", "_Visitor"]:
        return _halves(self._replace(gradients=None))


def _halves(tree: Any) -> tuple[Any, Any]:
    """The two pieces of arrays [B, 2h, ...]."""
    length = jax.tree.leaves(tree)[0].shape[1] // 2
    return jax.tree.map(lambda x: x[:, :length], tree), jax.tree.map(lambda x: x[:, length:], tree)


def _around(visitor: _Visitor) -> _Visitor:
    size = lax.axis_size(AXIS)
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, [(i, (i + 1) % size) for i in range(size)]), visitor)


def _pick(condition: Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), one, other)


def _both(one: Any, other: Any) -> Any:
    """Side by side along the batch."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=0), one, other)


def _unboth(tree: Any) -> tuple[Any, Any]:
    rows = jax.tree.leaves(tree)[0].shape[0] // 2
    return jax.tree.map(lambda x: x[:rows], tree), jax.tree.map(lambda x: x[rows:], tree)


def _merged(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Outputs (float32) and log sums over two sets of keys as one."""
    (out, log_sum), (more, more_log) = one, other
    top = jnp.maximum(log_sum, more_log)
    a, b = jnp.exp(log_sum - top), jnp.exp(more_log - top)
    out = (out * a[..., None] + more.astype(jnp.float32) * b[..., None]) / (a + b)[..., None]
    return out, jnp.where(top > MASKED, top + jnp.log(a + b), MASKED)


def _rotate(state: Any, visitor: _Visitor, visit: Any) -> tuple[Any, _Visitor]:
    """Calls ``visit(state, visitor, step)`` for the steps 1 to c-1; the next visitor is sent for before."""
    size = lax.axis_size(AXIS)

    def body(carry: tuple[Any, _Visitor], step: Array) -> tuple[tuple[Any, _Visitor], None]:
        state, visitor = carry
        plain = visitor._replace(gradients=None)
        following = _around(plain)
        state, gradients = visit(state, visitor, step)
        if gradients is not None:
            gradients = _around(gradients)
        return (state, following._replace(gradients=gradients)), None

    (state, visitor), _ = lax.scan(body, (state, visitor), jnp.arange(1, size - 1))
    state, gradients = visit(state, visitor, jnp.asarray(size - 1))
    return state, visitor._replace(gradients=gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(visibility: Visibility, block: Block, *inputs: Array) -> Array:
    return _forward(visibility, block, *inputs)[0]


def _forward(visibility: Visibility, block: Block, *inputs: Array) -> tuple[Array, tuple]:
    q, k, v, positions, segments = inputs
    mine = _Visitor(k, v, positions, segments)
    visitor = _around(mine)
    out, log_sum = block.forward(visibility, True, q, k, v, _places((positions, segments), mine))
    me = lax.axis_index(AXIS)
    q_halves = _halves((q, positions, segments))

    def visit(state: Any, visitor: _Visitor, step: Array) -> tuple[Any, None]:
        earlier = (me - step) >= 0  # the visitor's home comes before this device
        first, second = visitor.halves()
        queries = _both(q_halves[1], _pick(earlier, q_halves[0], q_halves[1]))
        keys = _both(first, _pick(earlier, first, second))
        found = block.forward(visibility, False, queries[0], keys.k, keys.v, _places(queries[1:], keys))
        always, other = _unboth(found)
        nothing = jnp.full(other[1].shape, MASKED)
        one = _merged(state[0], (other[0], jnp.where(earlier, other[1], nothing)))
        two = _merged(_merged(state[1], always), (other[0], jnp.where(earlier, nothing, other[1])))
        return (one, two), None

    start = _halves((out.astype(jnp.float32), log_sum))
    (one, two), _ = _rotate(start, visitor, visit)
    out, log_sum = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), one, two)
    out = out.astype(q.dtype)
    return out, (inputs, out, log_sum)


def _places(queries: tuple[Array, Array], keys: _Visitor) -> Places:
    return Places(queries[0], keys.positions, queries[1], keys.segments)


def _backward(visibility: Visibility, block: Block, saved: tuple, d_out: Array) -> tuple:
    (q, k, v, positions, segments), out, log_sum = saved
    mine = _Visitor(k, v, positions, segments)
    me = lax.axis_index(AXIS)
    places = _places((positions, segments), mine)
    d_q, *d_kv = block.backward(visibility, True, (q, k, v, places), out, log_sum, d_out)
    visitor = _around(mine._replace(gradients=tuple(d_kv)))
    halves = _halves((q, positions, segments, out, log_sum, d_out))

    def visit(state: Any, visitor: _Visitor, step: Array) -> tuple[Any, Any]:
        earlier = (me - step) >= 0
        first, second = visitor.halves()
        queries, here, there, *rest = _both(halves[1], _pick(earlier, halves[0], halves[1]))
        keys = _both(first, _pick(earlier, first, second))
        inputs = (queries, keys.k, keys.v, _places((here, there), keys))
        always, other = _unboth(block.backward(visibility, False, inputs, *rest))
        zero = jax.tree.map(jnp.zeros_like, other)
        to_first, to_second = _pick(earlier, other, zero), _pick(earlier, zero, other)
        d_q = (state[0] + to_first[0], state[1] + always[0] + to_second[0])
        # the visitor's earlier piece was seen by both of its readers, the later one by none, or one by each
        d_first, d_second = _halves(visitor.gradients)
        d_first = jax.tree.map(lambda d, a, b: d + a + b, d_first, always[1:], to_first[1:])
        d_second = jax.tree.map(jnp.add, d_second, to_second[1:])
        return d_q, jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), d_first, d_second)

    d_q, visitor = _rotate(_halves(d_q), visitor, visit)
    d_k, d_v = _around(visitor.gradients)
    return jnp.concatenate(d_q, axis=1).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_ring.defvjp(_forward, _backward)
