# SPDX-License-Identifier: Apache-2.0
"""What is made once before the first step: the compiled program's pieces, the first state, the frozen models."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.core import sharding
from research.core.files import read_json
from research.core.types import Stream, UserError
from research.models.bound import Bound
from research.train import checkpoint, hosts, state, step, weights
from research.train.experiment import Experiment, Init
from research.train.state import TrainState


def check_fits(experiment: Experiment, mesh: Mesh) -> None:
    """Raises MeshError where the mesh does not divide the batch or the model, naming the nearest one that does."""
    source, count = experiment.source, experiment.accumulate
    splits = sharding.batch_splits(source.batch_size, source.sequence_length, microbatches=count)
    splits += getattr(source, "splits", [])  # of what its batches hold besides
    sharding.check_mesh(mesh.shape, splits + experiment.model.splits(rows=source.batch_size // count))


class Program:
    """An experiment on a mesh: the state's shapes and layout, and the jitted step that donates it."""

    def __init__(self, experiment: Experiment, mesh: Mesh) -> None:
        self.experiment, self.mesh = experiment, mesh
        self.platform = mesh.devices.flat[0].platform
        self.tx = state.transformation(experiment)
        self.shapes, self.layout = state.shapes_and_shardings(experiment, self.tx, mesh)
        self.step = jax.jit(
            step.make_step(experiment, self.tx, platform=self.platform),
            donate_argnums=0,
            out_shardings=(self.layout, sharding.replicated(mesh)),  # so that every host can read the metrics
        )

    def bind(self, current: TrainState) -> Bound:
        """The policy as it stands."""
        model, precision = self.experiment.model, self.experiment.precision
        return model.bind(current.params, current.buffers, precision, platform=self.platform)

    def fresh(self) -> TrainState:
        """The state of the experiment's seed, made where it will lie."""
        draw = functools.partial(state.fresh, self.experiment, self.tx)
        # it runs once: on a CPU compiling it takes longer than running it
        options = {"xla_backend_optimization_level": 1} if self.platform == "cpu" else None
        return jax.jit(draw, out_shardings=self.layout, compiler_options=options)()

    @functools.cached_property
    def frozen(self) -> dict[str, Bound]:
        """The experiment's frozen models, read when first asked for."""
        return {name: self.load(init) for name, init in self.experiment.frozen.items()}

    def load(self, init: Init) -> Bound:
        """A model with its parameters and buffers from a checkpoint, of a run or of an import. Raises CheckpointError
        where its weights are not those that were meant."""
        model, precision = init.model or self.experiment.model, self.experiment.precision
        return weights.load(init.checkpoint, model, precision, self.mesh, wanted=init.content)


def first_state(program: Program, checkpoints: checkpoint.Checkpointer, stream: Stream) -> TrainState:
    """The state to go on from: the run's last checkpoint, else what ``experiment.init`` names, else fresh."""
    experiment, saved = program.experiment, hosts.from_first(checkpoints.steps)
    if saved:
        return _restore(program, checkpoints, saved[-1], stream, experiment.record())
    init = experiment.init
    for one in filter(None, (init, *experiment.frozen.values())):
        _check_tokenizer(one, stream)
    if init is None:
        return program.fresh()
    if init.parts == "weights":
        given, fresh = program.load(init), program.fresh()
        params = {**fresh.params, **given.params}  # the checkpoint's model may lack a value head
        ema = jax.tree.map(jnp.copy, params) if experiment.ema else None
        return fresh._replace(params=params, buffers=given.buffers, ema=ema)
    checkpoint.check_model(init.checkpoint, experiment.record())
    directory, last = checkpoint.locate(init.checkpoint)
    other = checkpoint.Checkpointer(directory, experiment.checkpoint, read_only=True)
    try:
        return _restore(program, other, last, stream, None)
    finally:
        other.close()


def _check_tokenizer(init: Init, stream: Stream) -> None:
    """Raises UserError where the run that the weights come from had another tokenizer, as far as is known."""
    before = read_json(checkpoint.locate(init.checkpoint)[0] / checkpoint.RESULT) or {}
    given, now = before.get("data", {}).get("tokenizer"), stream.info.get("tokenizer")
    if given is not None and now is not None and given != now:
        raise UserError(
            f"The weights in {init.checkpoint} were trained with the tokenizer {given}, and this run's is {now}, in "
            "which ids mean other texts: give both the same tokenizer, trained on the same corpus."
        )


def _restore(
    program: Program, checkpoints: checkpoint.Checkpointer, step: int, stream: Stream, record: Any
) -> TrainState:
    restored, position = checkpoints.restore(step, program.shapes, program.layout, experiment=record)
    stream.set_state(position)
    return restored
