# SPDX-License-Identifier: Apache-2.0
"""The training state: one pytree, laid out over the mesh by logical axes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from research.core import sharding
from research.core.types import Array, Params
from research.train.experiment import Experiment


class TrainState(NamedTuple):
    """Everything that a step changes.

    step: optimizer steps done, int32. buffers: state that changes without a gradient (router biases).
    ema: a moving average of the parameters, or None. key: the run's key data (uint32); the key of step n is
    ``fold_in(key, n)``.
    """

    step: Array
    params: Params
    buffers: Params
    opt_state: Any
    ema: Params | None
    key: Array


def transformation(experiment: Experiment) -> optax.GradientTransformation:
    """The experiment's optimizer, its groups chosen by the model's logical axes."""
    return experiment.optimizer.build(experiment.model.shapes(experiment.precision), experiment.model.logical_axes())


def fresh(experiment: Experiment, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; a pure function of the experiment's seed, on any mesh."""
    init_key, train_key = jax.random.split(jax.random.key(experiment.seed))
    params = experiment.model.init_params(init_key, experiment.precision)
    return _begin(experiment, tx, params, jax.random.key_data(train_key))


def _begin(experiment: Experiment, tx: optax.GradientTransformation, params: Params, key: Array) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        buffers=experiment.model.init_buffers(),
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if experiment.ema else None,
        key=key,
    )


def shapes_and_shardings(
    experiment: Experiment, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Any]:
    """The state's shapes, and a TrainState of where each of its arrays lies on the mesh."""
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    shapes = jax.eval_shape(
        functools.partial(_begin, experiment, tx), experiment.model.shapes(experiment.precision), key
    )
    params = sharding.tree_shardings(mesh, shapes.params, experiment.model.logical_axes())
    everywhere = sharding.replicated(mesh)
    layout: Any = dict(
        step=everywhere,
        params=params,
        buffers=jax.tree.map(lambda _: everywhere, shapes.buffers),
        opt_state=optax.tree_utils.tree_map_params(
            tx, lambda _, where: where, shapes.opt_state, params, transform_non_params=lambda _: everywhere
        ),
        ema=params if experiment.ema else None,
        key=everywhere,
    )
    return shapes, TrainState(**layout)
