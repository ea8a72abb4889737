# SPDX-License-Identifier: Apache-2.0
"""The programs of generation lowered for devices that need not be there, to be compiled and read: what
``research.train.ahead`` is to training steps."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.core import sharding
from research.core.types import Precision
from research.infer import generate
from research.infer.generate import Settings, Slots
from research.models.cache import LayerCache
from research.models.decoder import Decoder


def lower_prefill(
    model: Decoder, mesh: Mesh, precision: Precision, settings: Settings, *, rows: int, width: int
) -> jax.stages.Lowered:
    """The prompts of so many rows at once, of ``width`` tokens at most."""
    policy, settings = model.bind_shapes(mesh, precision), _suited(settings, mesh)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, width), (rows,))]
    tokens, lengths = sharding.placed(shapes, sharding.replicated(mesh))
    with jax.set_mesh(mesh):  # here alone: nothing may be computed on devices that are not there
        return generate.prefill.lower(model, policy, tokens, lengths, settings)


def lower_decode_step(
    model: Decoder, mesh: Mesh, precision: Precision, settings: Settings, *, slots: int, length: int
) -> jax.stages.Lowered:
    """A token of each of so many slots, of ``length`` tokens at most: what ``generate.decode`` repeats."""
    policy, settings = model.bind_shapes(mesh, precision), _suited(settings, mesh)
    given = slots_of_shapes(model, mesh, precision, settings, slots=slots, length=length)
    whole = sharding.replicated(mesh)
    places = (jax.tree.map(lambda x: x.sharding, given), whole, whole)
    step = jax.jit(functools.partial(generate.one_step, settings=settings), donate_argnums=1, out_shardings=places)
    with jax.set_mesh(mesh):
        return step.lower(policy, given)


def slots_of_shapes(
    model: Decoder, mesh: Mesh, precision: Precision, settings: Settings, *, slots: int, length: int
) -> Slots:
    """Slots of shapes alone, as they lie on the mesh."""
    settings = _suited(settings, mesh)
    shapes = jax.eval_shape(functools.partial(generate.empty, model, precision, settings, slots, length))
    is_cache = lambda x: isinstance(x, LayerCache)  # noqa: E731
    whole = sharding.replicated(mesh)
    places = jax.tree.map(lambda x: x.layout(mesh) if is_cache(x) else whole, shapes, is_leaf=is_cache)
    return sharding.placed(shapes, places)


def _suited(settings: Settings, mesh: Mesh) -> Settings:
    return replace(settings, cache=settings.cache.on(mesh.devices.flat[0].platform))
