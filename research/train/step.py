# SPDX-License-Identifier: Apache-2.0
"""One optimizer step as one jitted function: microbatches, global denominators, update, norms."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.core.sharding import microbatch
from research.core.types import Array, Batch, Loss, Metrics, Params, WeightedSum
from research.models.bound import Bound
from research.train.experiment import Experiment
from research.train.state import TrainState

Step = Callable[[TrainState, Mapping[str, Bound], Batch, Array], tuple[TrainState, Metrics]]


def make_gradient(experiment: Experiment, *, platform: str) -> Callable[..., tuple[Params, Loss]]:
    """gradient(state, frozen, batch, key) -> (gradients, loss) over the whole global batch, in microbatches."""
    model, objective, microbatches = experiment.model, experiment.objective, experiment.accumulate

    def loss(params: Params, buffers: Params, frozen: Mapping[str, Bound], batch: Batch, key: Array) -> Loss:
        policy = model.bind(params, buffers, experiment.precision, platform=platform)
        return objective(policy, frozen, batch, key)

    def gradient(
        state: TrainState,
        frozen: Mapping[str, Bound],
        batch: Batch,
        key: Array,
        weights: Mapping[str, Array] | None = None,
    ) -> tuple[Params, Loss]:
        def scalar(params: Params) -> tuple[Array, Loss]:
            result = loss(params, state.buffers, frozen, batch, key)
            total = jnp.zeros((), jnp.float32)
            for name, term in result.terms.items():
                weight = term.value.weight if weights is None else weights[name]
                total += term.coefficient * WeightedSum(term.value.sum, jax.lax.stop_gradient(weight)).mean
            return total, result

        return jax.grad(scalar, has_aux=True)(state.params)

    def accumulated(state: TrainState, frozen: Mapping[str, Bound], batch: Batch, key: Array) -> tuple[Params, Loss]:
        parts = jax.tree.map(lambda x: microbatch(x, microbatches), batch)
        keys = jax.random.split(key, microbatches)

        def weigh(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            # only the weights are used, and they depend on the batch alone: the compiler drops the model
            terms = loss(state.params, state.buffers, frozen, *part).terms
            return jax.tree.map(jnp.add, total, {name: t.value.weight for name, t in terms.items()}), None

        def add(total: Any, part: tuple[Batch, Array]) -> tuple[Any, Mapping[str, Array]]:
            part_gradients, part_loss = gradient(state, frozen, *part, weights)
            sums = jax.tree.map(
                lambda a, b: a + jnp.asarray(b, a.dtype), total, (part_gradients, part_loss._replace(peaks={}))
            )
            return sums, part_loss.peaks

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(lambda: gradient(state, frozen, first, key))
        shapes = shapes[0], shapes[1]._replace(peaks={})
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
        no_weight = {name: jnp.zeros((), jnp.float32) for name in shapes[1].terms}
        weights, _ = jax.lax.scan(weigh, no_weight, (parts, keys))
        (gradients, result), peaks = jax.lax.scan(add, zeros, (parts, keys))
        peaks = {name: (jnp.min if name.endswith("_min") else jnp.max)(values) for name, values in peaks.items()}
        terms = {
            name: term._replace(coefficient=term.coefficient / microbatches) for name, term in result.terms.items()
        }
        gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, state.params)
        return gradients, result._replace(terms=terms, peaks=peaks)

    return accumulated if microbatches > 1 else gradient


def make_step(experiment: Experiment, tx: optax.GradientTransformation, *, platform: str) -> Step:
    """step(state, frozen, batch, learning_rate) -> (state, metrics), to be jitted with the state donated.

    Each loss term is divided by its weight summed over the whole global batch, so that microbatches and shards
    add up to exactly the gradient of the whole.
    """
    model = experiment.model
    gradient = make_gradient(experiment, platform=platform)

    def step(
        state: TrainState, frozen: Mapping[str, Bound], batch: Batch, learning_rate: Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        gradients, result = gradient(state, frozen, batch, key)
        directions, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(
            lambda p, d: (p - learning_rate * d.astype(jnp.float32)).astype(p.dtype), state.params, directions
        )
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda old, new: experiment.ema * old + (1 - experiment.ema) * new, ema, params)
        metrics = summarise(result)
        metrics |= model.report(result.stats)
        metrics["learning_rate"] = learning_rate
        metrics |= norms("grad_norm", gradients) | norms("param_norm", params)
        new = TrainState(
            step=state.step + 1,
            params=params,
            buffers=model.update(state.buffers, result.stats),
            opt_state=opt_state,
            ema=ema,
            key=state.key,
        )
        return new, metrics

    return step


def summarise(loss: Loss) -> Metrics:
    """The loss, its terms and its metrics as means over the global batch."""
    terms = {name: term.coefficient * term.value.mean for name, term in loss.terms.items()}
    total = sum(terms.values(), start=jnp.zeros((), jnp.float32))
    named = {f"loss/{name}": value for name, value in terms.items()} if len(terms) > 1 else {}
    return {"loss": total, **named, **{name: value.mean for name, value in loss.metrics.items()}, **loss.peaks}


def norms(name: str, tree: Params) -> Metrics:
    """The global norm, and that of each top-level part; the stack gives one number per layer [L]."""

    def squares(leaf: Array, keep: int) -> Array:
        return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(keep, leaf.ndim)))

    parts = {
        part: sum(squares(leaf, 1 if part in ("first", "layers") else 0) for leaf in jax.tree.leaves(subtree))
        for part, subtree in tree.items()
    }
    total = jnp.sqrt(sum(jnp.sum(part) for part in parts.values()))
    return {name: total, **{f"{name}/{part}": jnp.sqrt(value) for part, value in parts.items()}}
