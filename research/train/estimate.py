# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a training step by arithmetic alone: for where there is no compiler, and to rank what to compile.

What is exact: parameters, optimizer state and how the mesh splits them. What is a model: the activations that each
choice of ``remat`` keeps, the weights that are fetched (ZeRO-3: three times a microbatch), the activations that tensor
parallelism exchanges (Megatron with sequence parallelism, Korthikanti et al. 2022: four a layer forward and backward
each way), and every byte that goes through HBM. ``tests/train/test_estimate.py`` holds it against compiled programs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from research.core.chips import Slice
from research.core.roofline import Roofline
from research.core.sharding import check_slices, tree_shardings
from research.core.types import Precision
from research.models.decoder import Decoder
from research.models.latent_attention import LatentAttention
from research.models.moe import Moe
from research.models.stack import AttentionKind
from research.scaling import cost
from research.train import state
from research.train.experiment import Experiment
from research.train.start import check_fits

HEAD_CHUNK = 512  # tokens whose logits stand in memory at a time (``objectives.next_token``)


@dataclass(frozen=True)
class Estimate:
    """Of one chip. Bytes: state (parameters, moments, frozen models), gradients, activations kept for the backward
    pass, and what the layer or head in hand takes besides. roofline: of one optimizer step."""

    state: float
    gradients: float
    kept: float
    in_hand: float
    roofline: Roofline

    @property
    def peak(self) -> float:
        return self.state + self.gradients + self.kept + self.in_hand


def abstract_mesh(experiment: Experiment, where: Slice, slices: int = 1) -> AbstractMesh:
    """The experiment's mesh on devices that are not there. Raises MeshError as ``sharding.make_mesh`` does."""
    sizes = experiment.mesh.shape(where.chips * slices)
    check_slices(sizes, slices, where.chips)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def estimate(experiment: Experiment, where: Slice, slices: int = 1) -> Estimate:
    """Raises MeshError where the mesh does not fit the chips, the batch or the model."""
    mesh: Any = abstract_mesh(experiment, where, slices)
    check_fits(experiment, mesh)
    return _Step(experiment, where, slices, mesh).estimate()


class _Step:
    """The quantities that memory and time are made of. Widths are per token, bytes per chip."""

    def __init__(self, experiment: Experiment, where: Slice, slices: int, mesh: Any) -> None:
        self.experiment, self.where, self.slices, self.size = experiment, where, slices, dict(mesh.shape)
        model, source, size = experiment.model, experiment.source, self.size
        self.compute_bytes = np.dtype(experiment.precision.compute).itemsize
        shapes, layout = state.shapes_and_shardings(experiment, state.transformation(experiment), mesh)
        frozen = [init.model or model for init in experiment.frozen.values()]
        self.frozen_bytes = sum(_bytes(*_placed(one, experiment.precision, mesh)) for one in frozen)
        length = source.sequence_length
        self.frozen_flops = sum(cost.training_flops_per_token(one, sequence_length=length) / 3 for one in frozen)
        self.state_bytes = _bytes(shapes, layout)
        self.param_bytes = _bytes(shapes.params, layout.params)
        self.rows = source.batch_size / experiment.accumulate / (size["data"] * size["fsdp"] * size["expert"])
        self.tokens = self.rows * source.sequence_length / size["context"]  # of a microbatch, on one chip
        self.layers = model.num_layers / size["stage"]
        params = cost.params(model)
        self.experts_share = 1.0 if cost.experts(model) == 0 else 1 - params.idle / max(1, params.layers)
        self.layer_params = params.layers / model.num_layers
        self.head_params = model.vocab_size * model.d_model
        self.products = _mean(_products(attention, model.d_model) for attention, _ in model.kinds)
        widths = [(m.router.per_token * m.d_ff + (m.shared_d_ff or 0), 3 if m.gated else 2) if isinstance(m, Moe)
                  else (m.d_ff, 3 if m.gated else 2) for m in model.feed_forwards]  # fmt: skip
        self.inner = sum(width * parts for width, parts in widths) / len(widths)

    def estimate(self) -> Estimate:
        c, d, size = self.compute_bytes, self.experiment.model.d_model, self.size
        accumulated = self.experiment.accumulate > 1
        whole = 4 * d + self.products + self.inner  # what one layer computes for a token: all of it is kept, or some
        kept = {"none": whole, "full": d}.get(self.experiment.model.remat, d + self.products + self.inner * 2 / 3)
        one = self.tokens * c / size["tensor"]
        split = size["fsdp"] * size["expert"] * size["context"] > 1
        logits = min(self.tokens, HEAD_CHUNK) * self.experiment.model.vocab_size / size["tensor"] * (4 + c)
        head = logits + (self.head_params / size["tensor"] * (c + 4) if split else 0.0)  # and its gradient
        layer = one * whole + (self._layer_weights * c if split else 0.0)
        gradients = self.param_bytes * (2 if accumulated else 1)
        held = self.state_bytes + self.frozen_bytes
        return Estimate(held, gradients, one * self.layers * kept, max(layer, head), self._roofline(whole))

    @property
    def _layer_weights(self) -> float:
        """Of one layer as a chip needs them: experts that live elsewhere are not fetched."""
        model, size = self.experiment.model, self.size
        if (experts := cost.experts(model)) == 0 or size["expert"] == 1:
            return self.layer_params / size["tensor"]
        mlp = next(m for m in model.feed_forwards if isinstance(m, Moe))
        mine = self.layer_params - experts * model.d_model * mlp.d_ff * (3 if mlp.gated else 2) * (
            1 - 1 / size["expert"]
        )
        return max(0.0, mine) / size["tensor"]

    def _roofline(self, whole: float) -> Roofline:
        experiment, chip, size = self.experiment, self.where.chip, self.size
        c, d, micro = self.compute_bytes, experiment.model.d_model, experiment.accumulate
        recomputed = experiment.model.remat == "full"
        passes = 4 if recomputed else 3
        chips = math.prod(size.values())
        a_token = experiment.flops_per_token * passes / 3 + self.frozen_flops
        flops = a_token * experiment.tokens_per_step / chips
        if size["stage"] > 1:  # the pipeline's first and last ticks are not full
            parts = experiment.model.pipeline.microbatches
            flops *= (parts + size["stage"] - 1) / max(1, parts)
        weights = self._layer_weights * self.layers * c
        hbm = 2 * self.state_bytes + 2 * self.param_bytes + self.frozen_bytes + micro * (
            2 * passes * weights + 2 * passes * self.tokens * self.layers * whole * c / size["tensor"]
        )  # fmt: skip
        copies = size["fsdp"] * size["expert"] * size["context"]
        fetches = 3 if recomputed else 2
        ici = micro * (fetches * weights * self._links("fsdp", "expert", "context") if copies > 1 else 0.0)
        residual = self.tokens * d * c
        if size["tensor"] > 1:  # gathered before, and scattered after, attention and feed-forward, each way
            ici += micro * self.layers * 4 * passes / 3 * 2 * residual * self._links("tensor")
        if size["context"] > 1:  # keys and values around the ring, forward and (with gradients) backward
            width = _mean(attention.kv_heads * attention.width(d) for attention, _ in experiment.model.kinds)
            keys = 2 * self.tokens * width * c
            ici += micro * self.layers * 4 * keys * size["context"] * self._links("context")
        if size["expert"] > 1 and (moe := next(iter(experiment.model.moes().values()), None)) is not None:
            ici += micro * self.layers * 5 * residual * moe.router.per_token * self._links("expert")
        if size["stage"] > 1:
            ici += micro * 2 * 2 * residual * self._links("stage")
        across = 2 * self.param_bytes * (c / 4)  # gradients, in the precision of products
        ici += across * self._links("data") if size["data"] > self.slices else 0.0
        dcn = across / 2 / chip.network_bandwidth if self.slices > 1 else 0.0
        return Roofline(flops / chip.peak_flops, hbm / chip.hbm_bandwidth, ici, dcn)

    def _links(self, *axes: str) -> float:
        """Seconds a byte for a group of chips along mesh axes: the sides of the torus that it must span, two links a
        side where that wraps around."""
        chips, sides = math.prod(self.size[axis] for axis in axes), sorted(self.where.sides, reverse=True)
        if "data" in axes:
            chips //= self.slices
        spanned, links = 1, 0
        for side in sides:
            if spanned < chips and side > 1:
                links += 2 if all(self.where.wraps) and chips >= spanned * side else 1
                spanned *= side
        return (chips - 1) / chips / (max(1, links) * self.where.chip.link_bandwidth)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _products(attention: AttentionKind, d_model: int) -> int:
    """The width of all that a layer's attention makes of a token by products with weights, but for the last."""
    if isinstance(attention, LatentAttention):
        small = attention.kv_rank + attention.rope_dim + attention.q_rank
        return small + attention.num_heads * (attention.width(d_model) + attention.nope_dim + 2 * attention.v_dim)
    return attention.width(d_model) * (2 * attention.num_heads + 2 * attention.kv_heads)


def _placed(model: Decoder, precision: Precision, mesh: Any) -> tuple[Any, Any]:
    """The shapes of a model's parameters, and how they lie."""
    shapes = model.shapes(precision)
    return shapes, tree_shardings(mesh, shapes, model.logical_axes())


def _bytes(shapes: Any, layout: Any) -> float:
    """Of what one chip holds of a tree."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(layout), strict=True)
    return float(sum(math.prod(where.shard_shape(s.shape)) * s.dtype.itemsize for s, where in leaves))
