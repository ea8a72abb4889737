# SPDX-License-Identifier: Apache-2.0
"""The decoder-only transformer: a frozen description, and the Flax module that it builds."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.core.sharding import Split, constrain, parameter_splits
from research.core.tree import at, put
from research.core.types import Array, Batch, Metrics, Output, Params, Precision, UserError
from research.models import cache as caches
from research.models import moe, ring_attention
from research.models.attention import Attention
from research.models.bound import Bound
from research.models.layers import Build, Embedding, Linear, Norm, WeightInit
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.pipeline import Pipeline, pipelined
from research.models.positions import Learned, Position, Rotary, Sinusoidal, rotary_tables, sinusoids
from research.models.stack import Remat, block_name, one_of, stack, stage_policy
from research.models.tokens import Tokens


@dataclass(frozen=True)
class Decoder:
    """A decoder (Vaswani et al. 2017, pre-norm): token embedding, blocks, final norm, head.

    mlp: the feed-forward of every layer, dense or of experts; or a tuple that repeats over the layers: ``(Mlp(...),
        Moe(...))`` gives every second layer experts.
    first: feed-forwards of the first layers, all alike, before those of ``mlp``: ``(Mlp(...),) * 3`` is "dense first
        three layers" (DeepSeek-V3).
    head: "tied" reads logits off the embedding table, "untied" has a matrix of its own.
    layers: "scanned" compiles one block whatever the depth; "unrolled" compiles each, for speed or for
        counting. The parameters are the same.
    remat: what the backward pass recomputes: none of it, all of it ("full"), all but matrix products
        ("save_matmuls"), or all but products with weights ("save_weight_matmuls").
    pipeline: microbatches and rounds of pipeline stages, where the mesh has stages; the first layers stay outside.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    attention: Attention
    mlp: Mlp | Moe | tuple[Mlp | Moe, ...]
    norm: Norm = field(default_factory=Norm)
    position: Position = field(default_factory=Rotary)
    head: Literal["tied", "untied"] = "untied"
    layers: Literal["scanned", "unrolled"] = "scanned"
    remat: Remat = "none"
    first: tuple[Mlp | Moe, ...] = ()
    weight_init: WeightInit = field(default_factory=WeightInit)
    pipeline: Pipeline = field(default_factory=Pipeline)

    def __post_init__(self) -> None:
        for name, given in (("mlp", self.mlp if isinstance(self.mlp, tuple) else (self.mlp,)), ("first", self.first)):
            if not isinstance(given, tuple) or not all(isinstance(part, Mlp | Moe) for part in given):
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}: give a tuple of Mlp(...) and Moe(...)"
                    f"{', or one of them' if name == 'mlp' else ', such as (Mlp(...),) * 3'}."
                )
        if self.mlp == ():
            raise UserError("model.mlp is empty: give the feed-forward that the layers repeat.")
        if self.num_layers and len(self.first) >= self.num_layers:
            raise UserError(f"model.first has {len(self.first)} layers of {self.num_layers}: leave some for model.mlp.")

    @property
    def period(self) -> tuple[Mlp | Moe, ...]:
        """The feed-forwards that repeat after the first layers."""
        return self.mlp if isinstance(self.mlp, tuple) else (self.mlp,)

    @property
    def repeats(self) -> int:
        return (self.num_layers - len(self.first)) // len(self.period)

    @property
    def feed_forwards(self) -> tuple[Mlp | Moe, ...]:
        """That of each layer."""
        return self.first + self.period * self.repeats

    def moes(self) -> dict[tuple[str, ...], Moe]:
        """The expert layers by their place among parameters, buffers and statistics."""
        found: dict[tuple[str, ...], Moe] = {}
        if self.first and isinstance(self.first[0], Moe):
            found["first",] = self.first[0]
        for place, mlp in enumerate(self.period):
            if isinstance(mlp, Moe):
                found[("layers",) if len(self.period) == 1 else ("layers", block_name(place))] = mlp
        return found

    def check(self, *, sequence_length: int, vocab_size: int) -> None:
        """Raises UserError where the sizes cannot work together, or with the data's."""
        for name, size in (
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("num_layers", self.num_layers),
            ("num_heads", self.attention.num_heads),
            *(("d_ff", mlp.d_ff) for mlp in self.first + self.period),
        ):
            if size < 1:
                raise UserError(f"The model's {name} is {size}: it must be at least 1.")
        if len(set(self.first)) > 1:
            raise UserError("The feed-forwards of model.first must be alike.")
        if len(self.feed_forwards) != self.num_layers:
            raise UserError(
                f"{self.num_layers} layers are not {len(self.first)} first ones and whole repetitions of "
                f"{len(self.period)}: choose num_layers accordingly."
            )
        width = self.attention.width(self.d_model)
        if isinstance(self.position, Rotary) and width % 2:
            raise UserError(f"Rotary positions need an even head width; d_model and num_heads give {width}.")
        if isinstance(self.position, Sinusoidal) and self.d_model % 2:
            raise UserError(f"Sinusoidal positions need an even d_model; given {self.d_model}.")
        if isinstance(self.position, Learned) and sequence_length > self.position.max_length:
            raise UserError(
                f"A sequence of {sequence_length} tokens is longer than the model's table of "
                f"{self.position.max_length} positions: raise model.position.max_length or shorten "
                "source.sequence_length."
            )
        if vocab_size > self.vocab_size:
            raise UserError(
                f"The tokenizer has {vocab_size} tokens and the model's vocab_size is {self.vocab_size}: "
                f"set model.vocab_size to {vocab_size} or more."
            )

    def build(self, precision: Precision, *, platform: str = "cpu") -> nn.Module:
        return _Decoder(config=self, precision=precision, platform=platform)

    def init_boxed(self, key: Array, precision: Precision) -> Any:
        dummy = jnp.zeros((1, 1), jnp.int32)
        batch = {"tokens": dummy, "positions": dummy, "segment_ids": dummy + 1}
        scanned = replace(self, layers="scanned")  # the same draws; unrolled they take seconds to compile
        return scanned.build(precision).init(key, batch, method="initialise")

    def init_params(self, key: Array, precision: Precision) -> Params:
        """Fresh parameters, a nested dict of arrays."""
        return nn.meta.unbox(self.init_boxed(key, precision)["params"])

    def init_buffers(self) -> Params:
        """State that changes without a gradient: the routers' biases, where they have any."""
        shapes = _boxed_shapes(self, Precision()).get("buffers", {})
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def update(self, buffers: Params, stats: Any) -> Params:
        """Buffers after one optimizer step, from the statistics of the whole global batch."""
        for path, config in self.moes().items():
            if config.router.bias_rate:
                place = (*path, "mlp", "bias")
                bias = moe.rebalanced(config.router.bias_rate, at(buffers, place), at(stats, path)["wanted"])
                buffers = put(buffers, place, bias)
        return buffers

    def report(self, stats: Any) -> Metrics:
        """What the statistics of the whole global batch say, for the record."""
        moes = self.moes()
        return {
            _name(name, path, len(moes)): value for path in moes for name, value in moe.report(at(stats, path)).items()
        }

    def shapes(self, precision: Precision) -> Params:
        """The parameter tree as shapes."""
        return nn.meta.unbox(_boxed_shapes(self, precision)["params"])

    def logical_axes(self) -> Any:
        """A tree like the parameters, with a tuple of logical axis names for each."""
        is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
        return jax.tree.map(lambda box: tuple(box.names), _boxed_shapes(self, Precision())["params"], is_leaf=is_box)

    def splits(self, *, rows: int) -> list[Split]:
        """What a mesh must divide: parameters, and layers and rows of a microbatch over stages."""
        stages = self.pipeline.splits(rows=rows, repeats=self.repeats)
        return stages + parameter_splits(self.shapes(Precision()), self.logical_axes())

    def bind(self, params: Params, buffers: Params, precision: Precision, *, platform: str = "cpu") -> Bound:
        return Bound(params, buffers, self.build(precision, platform=platform))

    def empty_cache(self, *, batch: int, slots: int, precision: Precision) -> caches.Cache:
        return caches.empty(
            num_layers=self.num_layers,
            batch=batch,
            slots=slots,
            num_kv_heads=self.attention.kv_heads,
            head_dim=self.attention.width(self.d_model),
            dtype=precision.compute,
        )


@functools.lru_cache(maxsize=64)
def _boxed_shapes(model: Decoder, precision: Precision) -> Any:
    """The parameters' shapes with their logical axes: tracing them takes a tenth of a second, and many ask."""
    return jax.eval_shape(functools.partial(model.init_boxed, precision=precision), jax.random.key(0))


def _name(name: str, path: tuple[str, ...], count: int) -> str:
    """A metric's name: its place is said where there are several."""
    return name if count == 1 else f"{name}/{'_'.join(path)}"


class _Decoder(nn.Module):
    config: Decoder
    precision: Precision
    platform: str

    def setup(self) -> None:
        c = self.config
        embed_axes = ("vocab", "embed")
        init = c.weight_init.embedding(c.d_model)
        self.embedding = Embedding(c.vocab_size, c.d_model, embed_axes, init, self.precision)
        if isinstance(c.position, Learned):
            axes = ("position", "embed")
            self.position = Embedding(c.position.max_length, c.d_model, axes, init, self.precision)
        keep = c.remat != "full"
        self.parts = Build(c.d_model, c.num_layers, c.weight_init, self.precision, self.platform, keep=keep)
        parts = dict(attention=c.attention, norm=c.norm, build=self.parts, layers=c.layers, remat=c.remat)
        if c.first:
            self.first = stack(mlps=c.first[:1], repeats=len(c.first), **parts)
        self.layers = stack(mlps=c.period, repeats=c.repeats, **parts)
        self.final_norm = c.norm.build(c.d_model, self.precision)
        if c.head == "untied":
            matrix = c.weight_init.matrix(c.d_model)
            precision = Precision(params=self.precision.params, compute=self.precision.logits)
            self.unembedding = Linear(
                (c.d_model,), (c.vocab_size,), ("embed", "vocab"), matrix, precision, self.platform
            )

    def forward(self, batch: Batch, cache: caches.Cache | None = None, key: Array | None = None) -> Output:
        c, ring = self.config, cache is None and ring_attention.applies(batch["tokens"].shape[1])
        places = [batch[name] for name in ("tokens", "positions", "segment_ids")]
        ids_BT, positions_BT, segments_BT = (ring_attention.balance(x) for x in places) if ring else places
        x_BTD = self.embedding(ids_BT)
        if isinstance(c.position, Learned):
            x_BTD = x_BTD + self.position(positions_BT)
        elif isinstance(c.position, Sinusoidal):
            x_BTD = x_BTD + sinusoids(c.position, positions_BT, c.d_model).astype(x_BTD.dtype)
        x_BTD = constrain(x_BTD, "batch", "residual_sequence", "act_embed")
        rotary = None
        if isinstance(c.position, Rotary):
            rotary = rotary_tables(c.position, positions_BT, c.attention.width(c.d_model))
        length = cache.length if cache is not None else None
        rows_B = jnp.arange(ids_BT.shape[0])
        tokens = Tokens(ids_BT, positions_BT, segments_BT, rotary, length, key, rows_B)
        x_BTD, layers, stats = self._blocks(x_BTD, cache.layers if cache is not None else None, tokens)
        if cache is not None:
            cache = caches.Cache(layers, cache.length + positions_BT.shape[1])
        moes = c.moes()
        aux = {
            _name(name, path, len(moes)): term
            for path, config in moes.items()
            for name, term in moe.losses(config, at(stats, path)).items()
        }
        hidden_BTD = self.final_norm(x_BTD)
        if ring:
            hidden_BTD = ring_attention.balance(hidden_BTD, inverse=True)
        return Output(hidden=hidden_BTD, cache=cache, aux=aux, stats=stats)

    def _blocks(self, x_BTD: Array, layers: Any, tokens: Tokens) -> tuple[Array, Any, Params]:
        """Through the first layers, then through the repeated ones: caches [L, ...] and statistics by stack."""
        c, stats, found = self.config, {}, []
        for name, start, period in (("first", 0, 1), ("layers", len(c.first), len(c.period))):
            repeats = (len(c.first) if name == "first" else c.num_layers - start) // period
            if not repeats:
                continue
            indices = start + period * jnp.arange(repeats)
            if name == "layers" and layers is None and (schedule := self._schedule(x_BTD.shape[0])) is not None:
                x_BTD, stats[name] = self._pipelined(x_BTD, indices, tokens, schedule)
                continue
            mine = jax.tree.map(lambda x, a=start, n=repeats, p=period: x[a : a + n * p], layers)
            if period > 1:
                mine = jax.tree.map(lambda x, n=repeats: x.reshape(n, -1, *x.shape[1:]), mine)
            run = getattr(self, name)
            x_BTD, (mine, stats[name]) = run(x_BTD, mine, indices, tokens)
            if period > 1:
                mine = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), mine)
            found.append(mine)
        return x_BTD, None if layers is None else jax.tree.map(lambda *x: jnp.concatenate(x), *found), stats

    def _schedule(self, rows: int) -> tuple[int, int] | None:
        return None if self.is_initializing() else self.config.pipeline.schedule(rows=rows, repeats=self.config.repeats)

    def _pipelined(
        self, x_BTD: Array, indices: Array, tokens: Tokens, schedule: tuple[int, int]
    ) -> tuple[Array, Params]:
        c = self.config
        layer = one_of(c.period, c.attention, c.norm, replace(self.parts, taken=("stage",)))
        params, buffers = (self.variables.get(kind, {}).get("layers", {}) for kind in ("params", "buffers"))
        axes, policy = c.logical_axes()["layers"], stage_policy(c.remat)
        return pipelined(layer, params, buffers, axes, x_BTD, indices, tokens, schedule=schedule, policy=policy)

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> [..., V]."""
        if self.config.head == "untied":
            return self.unembedding(hidden)
        dtype = jnp.dtype(self.precision.logits)
        table_VD = self.embedding.table_VD.astype(dtype)
        contract = ((hidden.ndim - 1,), (1,))
        return jax.lax.dot_general(hidden.astype(dtype), table_VD, (contract, ((), ())))

    def initialise(self, batch: Batch) -> Array:
        return self.logits(self.forward(batch).hidden)

    def head_params(self, params: Params) -> Params:
        """The part of the parameters that ``logits`` reads."""
        name = "unembedding" if self.config.head == "untied" else "embedding"
        return {name: params[name]}
