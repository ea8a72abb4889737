# SPDX-License-Identifier: Apache-2.0
"""The decoder-only transformer: a frozen description, and the Flax module that it builds."""

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.core.sharding import Split, constrain, parameter_splits, partitioned, placed, replicated, tree_shardings
from research.core.tree import at, put
from research.core.types import Array, Batch, Metrics, Output, Params, Precision, UserError
from research.models import cache as caches
from research.models import moe, ring_attention, sharded
from research.models.ahead import ahead, shifted
from research.models.attention import RelativeTable
from research.models.bound import Bound
from research.models.cache import Cache, CacheSpec
from research.models.latent_attention import LatentAttention
from research.models.layers import Build, Embedding, Linear, Norm, WeightInit
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.pipeline import Pipeline, pipelined
from research.models.positions import (
    Learned,
    Position,
    RelativeBias,
    Rotary,
    Sinusoidal,
    TransformerXL,
    rotary_tables,
    sinusoids,
)
from research.models.stack import AttentionKind, Kind, Remat, Wiring, by_block, one_of, stack, stage_policy
from research.models.tokens import Tokens
from research.models.visibility import capped


class Stack(NamedTuple):
    """Layers that repeat: their kinds, how often, and the number of the first of them."""

    kinds: tuple[Kind, ...]
    repeats: int
    start: int


@dataclass(frozen=True)
class Decoder:
    """A decoder (Vaswani et al. 2017, pre-norm): token embedding, blocks, final norm, head.

    attention: that of every layer, or a tuple that repeats over the layers (local and global ones in turn).
    mlp: the feed-forward of every layer, dense or of experts; or a tuple that repeats over the layers: ``(Mlp(...),
        Moe(...))`` gives every second layer experts. Where the layers are no whole number of repetitions, the last are
        the beginning of one.
    first: feed-forwards of the first layers, all alike, before those of ``mlp``: ``(Mlp(...),) * 3`` is "dense first
        three layers" (DeepSeek-V3).
    head: "tied" reads logits off the embedding table, "untied" has a matrix of its own, and with head_bias a bias.
    layers: "scanned" compiles one block whatever the depth; "unrolled" compiles each, for speed or for
        counting. The parameters are the same.
    remat: what the backward pass recomputes: none of it, all of it ("full"), all but matrix products
        ("save_matmuls"), or all but products with weights ("save_weight_matmuls").
    pipeline: microbatches and rounds of pipeline stages, where the mesh has stages; the first layers stay outside, and
        so do the last ones that are no whole repetition.
    residual, norms: how blocks are put together (``research.models.stack.Wiring``).
    embedding_scale: what embeddings are multiplied by (Gemma: sqrt(d_model)). logit_scale: likewise logits, which then
        become logit_cap tanh(logit / logit_cap) where there is a cap (Gemma 2).
    ahead: how many tokens further than the next are predicted in training (``research.models.ahead``).
    value_head: besides logits a number, from 0, is read off each hidden state: the reward that is to come.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    attention: AttentionKind | tuple[AttentionKind, ...]
    mlp: Mlp | Moe | tuple[Mlp | Moe, ...]
    norm: Norm = field(default_factory=Norm)
    position: Position = field(default_factory=Rotary)
    head: Literal["tied", "untied"] = "untied"
    layers: Literal["scanned", "unrolled"] = "scanned"
    remat: Remat = "none"
    first: tuple[Mlp | Moe, ...] = ()
    weight_init: WeightInit = field(default_factory=WeightInit)
    pipeline: Pipeline = field(default_factory=Pipeline)
    residual: Literal["sequential", "parallel", "parallel_shared"] = "sequential"
    norms: Literal["pre", "sandwich"] = "pre"
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    head_bias: bool = False
    ahead: int = 0
    value_head: bool = False

    def __post_init__(self) -> None:
        for name, given in (("mlp", self.mlp if isinstance(self.mlp, tuple) else (self.mlp,)), ("first", self.first)):
            if not isinstance(given, tuple) or not all(isinstance(part, Mlp | Moe) for part in given):
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}: give a tuple of Mlp(...) and Moe(...)"
                    f"{', or one of them' if name == 'mlp' else ', such as (Mlp(...),) * 3'}."
                )
        if not all(isinstance(part, AttentionKind) for part in self.attentions):
            raise UserError(
                f"model.attention is {self.attention!r}: give Attention(...), LatentAttention(...) or a tuple of them."
            )
        for name in ("mlp", "attention"):
            if getattr(self, name) == ():
                raise UserError(f"model.{name} is empty: give what the layers repeat.")
        if self.num_layers and len(self.first) >= self.num_layers:
            raise UserError(f"model.first has {len(self.first)} layers of {self.num_layers}: leave some for model.mlp.")
        if self.first and len(self.attentions) > 1:
            raise UserError(
                "model.first goes with one kind of attention: give model.attention one, or no first layers."
            )

    @property
    def attentions(self) -> tuple[AttentionKind, ...]:
        """Those that repeat."""
        return self.attention if isinstance(self.attention, tuple) else (self.attention,)

    @property
    def period(self) -> tuple[Kind, ...]:
        """The kinds of layers that repeat after the first ones."""
        mlps = self.mlp if isinstance(self.mlp, tuple) else (self.mlp,)
        count = math.lcm(len(self.attentions), len(mlps))
        return tuple((self.attentions[i % len(self.attentions)], mlps[i % len(mlps)]) for i in range(count))

    @property
    def repeats(self) -> int:
        return (self.num_layers - len(self.first)) // len(self.period)

    @property
    def stacks(self) -> dict[str, Stack]:
        """The layers, by name among the parameters."""
        start = len(self.first)
        end = start + self.repeats * len(self.period)
        found = {
            "first": Stack(((self.attentions[0], self.first[0]),) if self.first else (), start, 0),
            "layers": Stack(self.period, self.repeats, start),
            "last": Stack(self.period[: self.num_layers - end], 1, end),
        }
        return {name: part for name, part in found.items() if part.kinds and part.repeats}

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """That of each layer."""
        return tuple(kind for part in self.stacks.values() for kind in part.kinds * part.repeats)

    @property
    def feed_forwards(self) -> tuple[Mlp | Moe, ...]:
        """That of each layer."""
        return tuple(mlp for _, mlp in self.kinds)

    @property
    def wiring(self) -> Wiring:
        return Wiring(self.norm, self.residual, self.norms)

    @property
    def rotaries(self) -> tuple[tuple[Rotary, int], ...]:
        """The kinds of rotary positions in use, with the width of the heads that they turn."""
        found = [(a.position or self.position, a.turned(self.d_model)) for a in self.attentions]
        return tuple(dict.fromkeys((p, width) for p, width in found if isinstance(p, Rotary)))

    def moes(self) -> dict[tuple[str, ...], Moe]:
        """The expert layers by their place among parameters, buffers and statistics."""
        found = {
            (name, *path): mlp
            for name, part in self.stacks.items()
            for path, (_, mlp) in by_block(part.kinds).items()
            if isinstance(mlp, Moe)
        }
        if self.ahead and isinstance(self.period[-1][1], Moe):
            found["ahead", "block"] = self.period[-1][1]
        return found

    def check(self, *, sequence_length: int, vocab_size: int) -> None:
        """Raises UserError where the sizes cannot work together, or with the data's."""
        for name, size in (
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("num_layers", self.num_layers),
            *(("num_heads", attention.num_heads) for attention in self.attentions),
            *(("d_ff", mlp.d_ff) for _, mlp in self.period),
            *(("d_ff", mlp.d_ff) for mlp in self.first),
        ):
            if size < 1:
                raise UserError(f"The model's {name} is {size}: it must be at least 1.")
        if self.ahead < 0 or not (self.logit_cap >= 0 and self.embedding_scale > 0 and self.logit_scale > 0):
            raise UserError(
                "model.ahead and logit_cap must be at least 0, embedding_scale and logit_scale above 0; given "
                f"{self.ahead}, {self.logit_cap}, {self.embedding_scale} and {self.logit_scale}."
            )
        if len(set(self.first)) > 1:
            raise UserError("The feed-forwards of model.first must be alike.")
        if self.head_bias and self.head == "tied":
            raise UserError("A tied head has no bias: set model.head to untied, or head_bias to false.")
        self._check_positions(sequence_length)
        if vocab_size > self.vocab_size:
            raise UserError(
                f"The tokenizer has {vocab_size} tokens and the model's vocab_size is {self.vocab_size}: "
                f"set model.vocab_size to {vocab_size} or more."
            )

    def _check_positions(self, sequence_length: int) -> None:
        for attention in self.attentions:
            position, width = attention.position or self.position, attention.width(self.d_model)
            if attention.position is not None and isinstance(position, Learned | Sinusoidal):
                raise UserError("attention.position cannot be learned or sinusoidal, which are added to embeddings.")
            if isinstance(position, Rotary) and position.width(attention.turned(self.d_model)) % 2:
                turned = position.width(attention.turned(self.d_model))
                raise UserError(f"Rotary positions turn an even width of a head; these turn {turned} of {width}.")
            if isinstance(attention, LatentAttention) and not isinstance(position, Rotary):
                raise UserError(f"Latent attention needs rotary positions; given {position!r}.")
        if isinstance(self.position, Sinusoidal | TransformerXL) and self.d_model % 2:
            raise UserError(f"Sinusoidal positions need an even d_model; given {self.d_model}.")
        if isinstance(self.position, RelativeBias) and len({a.num_heads for a in self.attentions}) > 1:
            raise UserError("One table of relative biases needs layers with equally many heads: set per_layer.")
        if isinstance(self.position, Learned) and sequence_length > self.position.max_length:
            raise UserError(
                f"A sequence of {sequence_length} tokens is longer than the model's table of "
                f"{self.position.max_length} positions: raise model.position.max_length or shorten "
                "source.sequence_length."
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

    def bind_shapes(self, mesh: Mesh, precision: Precision) -> Bound:
        """Of shapes alone, as they lie on the mesh: to lower programs with, for devices that need not be there."""
        params = placed(shapes := self.shapes(precision), tree_shardings(mesh, shapes, self.logical_axes()))
        buffers = placed(jax.eval_shape(self.init_buffers), replicated(mesh))
        return self.bind(params, buffers, precision, platform=mesh.devices.flat[0].platform)

    def empty_cache(
        self,
        *,
        batch: int,
        slots: int,
        precision: Precision,
        spec: CacheSpec = CacheSpec(),  # noqa: B008
    ) -> Cache:
        """For ``batch`` rows of at most ``slots`` tokens. Layers that are scanned have one cache, stacked; unrolled
        ones have one each, so that none is ever taken out of another."""

        def one(part: Stack, repeats: int) -> Any:
            made = {}
            for path, (attention, _) in by_block(part.kinds).items():
                heads, widths = attention.stored(self.d_model)
                # its table of distances is as long as its keys are many: a first token kept forever would fall out
                far = attention.first_tokens and isinstance(attention.position or self.position, TransformerXL)
                made[path] = caches.empty(
                    spec,
                    layers=repeats,
                    batch=batch,
                    slots=slots,
                    heads=heads,
                    widths=widths,
                    window=0 if far else attention.window,
                    first_tokens=attention.first_tokens,
                    compute=precision.compute,
                )
            return made[()] if () in made else {path[0]: cache for path, cache in made.items()}

        layers = {
            name: one(part, part.repeats)
            if self.layers == "scanned"
            else tuple(one(part, 1) for _ in range(part.repeats))
            for name, part in self.stacks.items()
        }
        return Cache(layers, constrain(jnp.zeros((batch,), jnp.int32), "batch"))


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
        elif isinstance(c.position, RelativeBias) and not c.position.per_layer:
            self.relative = RelativeTable(c.position, c.attentions[0].num_heads, self.precision)
        self.parts = Build(
            c.d_model,
            c.num_layers,
            c.weight_init,
            self.precision,
            self.platform,
            keep=c.remat != "full",
            position=c.position,
            rotaries=c.rotaries,
        )
        how = dict(wiring=c.wiring, build=self.parts, layers=c.layers, remat=c.remat)
        for name, part in c.stacks.items():
            setattr(self, name, stack(kinds=part.kinds, repeats=part.repeats, **how))
        if c.ahead:
            self.ahead = ahead(c.period[-1], c.wiring, self.parts, c.ahead)
        self.final_norm = c.norm.build(c.d_model, self.precision)
        if c.head == "untied":
            matrix = c.weight_init.matrix(c.d_model)
            precision = Precision(params=self.precision.params, compute=self.precision.logits)
            how = dict(axes=("embed", "vocab"), initializer=matrix, precision=precision, platform=self.platform)
            self.unembedding = Linear((c.d_model,), (c.vocab_size,), bias=c.head_bias, **how)
        if c.value_head:
            wide, zeros = Precision(params=self.precision.params), nn.initializers.zeros
            self.value = Linear((c.d_model,), (1,), ("embed", None), zeros, wide, self.platform, bias=True)

    def forward(self, batch: Batch, cache: Cache | None = None, key: Array | None = None) -> Output:
        c, ring = self.config, cache is None and ring_attention.applies(batch["tokens"].shape[1])
        places = [batch[name] for name in ("tokens", "positions", "segment_ids")]
        ids_BT, positions_BT, segments_BT = (ring_attention.balance(x) for x in places) if ring else places
        x_BTD = self._embedded(ids_BT)
        if isinstance(c.position, Learned):
            x_BTD = x_BTD + self.position(positions_BT)
        elif isinstance(c.position, Sinusoidal):
            x_BTD = x_BTD + sinusoids(positions_BT, c.d_model, c.position.max_period).astype(x_BTD.dtype)
        x_BTD = constrain(x_BTD, "batch", "residual_sequence", "act_embed")
        tokens = Tokens(
            ids_BT,
            positions_BT,
            segments_BT,
            rotary=tuple(rotary_tables(position, positions_BT, width) for position, width in c.rotaries),
            relative=self.relative() if hasattr(self, "relative") else None,
            length=cache.length if cache is not None else None,
            key=key,
            rows=jnp.arange(ids_BT.shape[0]),
        )
        x_BTD, layers, stats = self._blocks(x_BTD, cache.layers if cache is not None else None, tokens)
        hidden_BTD, further = self.final_norm(x_BTD), ()
        if c.ahead and cache is None:
            further, stats["ahead"] = self._ahead(hidden_BTD, batch["tokens"], tokens, ring=ring)
        if cache is not None:
            cache = Cache(caches.used(layers), cache.length + caches.real_tokens(tokens))
        moes = {path: config for path, config in c.moes().items() if path[0] in stats}
        aux = {
            _name(name, path, len(moes)): term
            for path, config in moes.items()
            for name, term in moe.losses(config, at(stats, path)).items()
        }
        if ring:
            hidden_BTD, *further = (ring_attention.balance(x, inverse=True) for x in (hidden_BTD, *further))
        return Output(hidden=hidden_BTD, cache=cache, aux=aux, stats=stats, ahead=tuple(further))

    def _embedded(self, ids_BT: Array) -> Array:
        x_BTD = self.embedding(ids_BT)
        scale = self.config.embedding_scale
        return x_BTD if scale == 1.0 else x_BTD * jnp.asarray(scale, x_BTD.dtype)

    def _blocks(self, x_BTD: Array, layers: Any, tokens: Tokens) -> tuple[Array, Any, Params]:
        """Through all stacks: caches and statistics by stack."""
        stats, found = {}, {}
        for name, part in self.config.stacks.items():
            places = jnp.arange(part.repeats)
            indices = part.start + len(part.kinds) * places
            if name == "layers" and layers is None and (schedule := self._schedule(x_BTD.shape[0])) is not None:
                x_BTD, stats[name] = self._pipelined(x_BTD, indices, tokens, schedule)
                continue
            if layers is not None and isinstance(layers[name], tuple):
                x_BTD, found[name], stats[name] = self._one_by_one(name, part, x_BTD, layers[name], tokens)
                continue
            mine = None if layers is None else layers[name]
            (x_BTD, found[name]), stats[name] = getattr(self, name)((x_BTD, mine), indices, places, tokens)
        return x_BTD, found, stats

    def _one_by_one(
        self, name: str, part: Stack, x_BTD: Array, layers: tuple, tokens: Tokens
    ) -> tuple[Array, tuple, Params]:
        """Through the repetitions of a stack that have a cache each: nothing but new tokens is written anywhere."""
        layer, stats, found = one_of(part.kinds, self.config.wiring, self.parts), [], []
        given = [self.variables.get(kind, {}).get(name, {}) for kind in ("params", "buffers")]
        is_apart = lambda w: isinstance(w, tuple)  # noqa: E731
        for number, cache in enumerate(layers):
            params, buffers = jax.tree.map(lambda w, number=number: w[number], given, is_leaf=is_apart)
            index = part.start + number * len(part.kinds)
            (x_BTD, cache), one = layer(params, buffers, (x_BTD, cache), index, tokens)
            found.append(cache)
            stats.append(one)
        return x_BTD, tuple(found), jax.tree.map(lambda *x: jnp.stack(x), *stats)

    def _ahead(self, hidden_BTD: Array, ids_BT: Array, tokens: Tokens, *, ring: bool) -> tuple[list[Array], Params]:
        """Hidden states [B, T, D] that predict further tokens, and the modules' statistics. ids: in order."""
        depth = self.config.ahead
        further = [shifted(ids_BT, steps) for steps in range(1, depth + 1)]
        embedded = [self._embedded(ring_attention.balance(ids) if ring else ids) for ids in further]
        indices = self.config.num_layers + jnp.arange(depth)
        _, (found, stats) = self.ahead(hidden_BTD, jnp.stack(embedded), indices, tokens)
        return [found[i] for i in range(depth)], {"block": stats}

    def _schedule(self, rows: int) -> tuple[int, int] | None:
        return None if self.is_initializing() else self.config.pipeline.schedule(rows=rows, repeats=self.config.repeats)

    def _pipelined(
        self, x_BTD: Array, indices: Array, tokens: Tokens, schedule: tuple[int, int]
    ) -> tuple[Array, Params]:
        c = self.config
        one = one_of(c.period, c.wiring, replace(self.parts, taken=("stage",)))

        def layer(params: Params, buffers: Params, x_BTD: Array, index: Array, tokens: Tokens) -> tuple[Array, Params]:
            (x_BTD, _), found = one(params, buffers, (x_BTD, None), index, tokens)
            return x_BTD, found

        params, buffers = (self.variables.get(kind, {}).get("layers", {}) for kind in ("params", "buffers"))
        axes, policy = c.logical_axes()["layers"], stage_policy(c.remat)
        return pipelined(layer, params, buffers, axes, x_BTD, indices, tokens, schedule=schedule, policy=policy)

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> [..., V]."""
        c, dtype = self.config, jnp.dtype(self.precision.logits)
        if c.head == "untied":
            logits = self.unembedding(hidden)
        else:
            hidden, table_VD = hidden.astype(dtype), self.embedding.table_VD.astype(dtype)
            if partitioned() and hidden.ndim == 3:  # as it lies: the compiler might gather the table
                axes = ("embed", "vocab")
                (logits,) = sharded.linear(hidden, [table_VD.T], [axes], platform=self.platform)
            else:
                contract = ((hidden.ndim - 1,), (1,))
                logits = jax.lax.dot_general(hidden, table_VD, (contract, ((), ())))
        if c.logit_scale != 1.0:
            logits = logits * jnp.asarray(c.logit_scale, logits.dtype)
        return capped(logits, c.logit_cap) if c.logit_cap else logits

    def values(self, hidden: Array) -> Array:
        """[..., D] -> [...] in float32, of a model with a value head."""
        return self.value(hidden)[..., 0].astype(jnp.float32)

    def initialise(self, batch: Batch) -> tuple[Array, ...]:
        hidden = self.forward(batch).hidden
        return self.logits(hidden), *([self.values(hidden)] if self.config.value_head else [])

    def head_params(self, params: Params) -> Params:
        """The part of the parameters that ``logits`` reads."""
        name = "unembedding" if self.config.head == "untied" else "embedding"
        return {name: params[name]}
