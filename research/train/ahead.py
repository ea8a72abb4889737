# SPDX-License-Identifier: Apache-2.0
"""The programs of an experiment compiled for TPUs that are not there: their memory, traffic and kernels.

    compiled = compile_step(experiment, "v5e:16x16")
    compiled.memory_analysis().peak_memory_in_bytes

The TPU compiler (libtpu) runs on any x86-64 host. A process that uses it should be one of its own, started with
JAX_PLATFORMS=cpu.
"""

import importlib.metadata
import importlib.util
import math
import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.core import sharding
from research.core.config import to_json
from research.core.types import Eval, Source, UserError
from research.infer import ahead as generation
from research.infer.generate import Settings
from research.infer.sampling import sampling
from research.train.experiment import WATCHING, Experiment, Steps
from research.train.optimizers import at_any_rate
from research.train.start import Program, check_fits
from research.train.state import TrainState


def topology_devices(name: str, *, slices: int = 1) -> list[Any]:
    """The devices of a TPU topology such as "v5e:16x16" or "v5p:4x4x4", to compile for; of several such slices that
    a data-centre network joins, one slice after the other."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"To compile for {name} the TPU compiler is needed: install libtpu (the extra 'tpu').")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it looks for the metadata of a TPU virtual machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it compiles only: several may do so at a time
    from jax.experimental import topologies

    how: dict[str, Any] = {"num_slices": slices}
    if name.startswith("v4:"):  # else each of a chip's two cores is a device of its own, as on no machine today
        how["chip_config_name"] = "megacore"
    if name.endswith(":1x1"):
        how["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **how).devices)
    except Exception as error:  # whatever class the plugin raises; its message says what it makes of the name
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name!r} is not a topology that can be compiled for ({reason}): give one such as v5e:16x16 or v5p:4x4x4."
        ) from error


def compiler_version() -> str:
    return importlib.metadata.version("libtpu")


def lower_step(experiment: Experiment, devices: list[Any]) -> jax.stages.Lowered:
    """The experiment's real step on its mesh over the devices, lowered for shapes alone."""
    program, state = _program(experiment, devices)
    mesh = program.mesh
    models = {name: init.model or experiment.model for name, init in experiment.frozen.items()}
    frozen = {name: model.bind_shapes(mesh, experiment.precision) for name, model in models.items()}
    rate = sharding.placed(jax.ShapeDtypeStruct((), jnp.float32), sharding.replicated(mesh))
    with jax.set_mesh(mesh):  # here alone: nothing may be computed on devices that are not there
        return program.step.lower(state, frozen, _batch(experiment.source, mesh), rate)


def lower_evaluation(experiment: Experiment, evaluation: Eval, devices: list[Any]) -> jax.stages.Lowered | None:
    """One batch of an evaluation on the experiment's mesh; None where the evaluation has no one program (``lower``)."""
    lower, source = getattr(evaluation, "lower", None), getattr(evaluation, "source", None)
    if lower is None or source is None:
        return None
    program, state = _program(experiment, devices)
    with jax.set_mesh(program.mesh):
        return lower(program.bind(state), _batch(source, program.mesh))


def lower_generation(
    experiment: Experiment, program: str, slots: int, length: int, devices: list[Any]
) -> jax.stages.Lowered:
    """Of the experiment's model as it lies in training: the "prefill" of so many prompts of so many tokens, or the
    "decode" of a token in each of so many slots (``research.infer.ahead``)."""
    mesh = sharding.make_mesh(experiment.mesh, devices)
    given = experiment.model, mesh, experiment.precision, Settings(sampling())
    if program == "prefill":
        return generation.lower_prefill(*given, rows=slots, width=length)
    return generation.lower_decode_step(*given, slots=slots, length=length)


def generation_record(experiment: Experiment) -> dict[str, Any]:
    """What its programs of generation depend on, as JSON."""
    model = replace(experiment.model, remat="none")
    return {"model": to_json(model), "mesh": to_json(experiment.mesh), "precision": to_json(experiment.precision)}


def program_record(experiment: Experiment, evaluation: Eval | None = None) -> dict[str, Any]:
    """What the compiled step, or an evaluation, depends on, as JSON: not names, seeds, lengths, rates or what the
    corpus says. Experiments with equal records share one program."""
    source = experiment.source if evaluation is None else getattr(evaluation, "source", experiment.source)
    same: dict[str, Any] = {name: WATCHING[name] for name in ("name", "checkpoint", "log_every")}
    bare = replace(
        experiment, length=Steps(1), seed=0, init=None, evals=(), optimizer=at_any_rate(experiment.optimizer), **same
    )
    if evaluation is not None:  # it has no backward pass, and no batch but its own
        bare = replace(bare, accumulate=1, ema=0.0, model=replace(bare.model, remat="none"))
    record = bare.record()
    del record["source"]
    record["batch"] = {name: [list(x.shape), str(x.dtype)] for name, x in source.batch_shapes().items()}
    record["frozen"] = {name: to_json(init.model or experiment.model) for name, init in experiment.frozen.items()}
    if evaluation is not None:
        for name in ("optimizer", "objective", "frozen"):
            del record[name]
        record["evaluation"] = {k: v for k, v in to_json(evaluation).items() if k not in ("source", "every", "name")}
    return record


def mesh_devices(experiment: Experiment, devices: list[Any]) -> list[Any]:
    """The devices in the order of the experiment's mesh, which is that of its programs."""
    return list(sharding.make_mesh(experiment.mesh, devices).devices.flat)


def grouped_rows(experiment: Experiment, chips: int) -> float:
    """Rows of one grouped product of experts, on average over the chips; infinite for a dense model. Over the expert
    axis tokens travel in as many parts as it has chips (``models.expert_parallel``)."""
    moes = list(experiment.model.moes().values())
    if not moes:
        return math.inf
    size = experiment.mesh.shape(chips)
    ways = size["data"] * size["fsdp"] * size["expert"] * size["context"] * experiment.accumulate
    return max(moe.router.per_token for moe in moes) * experiment.tokens_per_step / ways / size["expert"]


def _program(experiment: Experiment, devices: list[Any]) -> tuple[Program, TrainState]:
    """The experiment on its mesh over the devices, and its state as placed shapes."""
    mesh = sharding.make_mesh(experiment.mesh, devices)
    check_fits(experiment, mesh)
    program = Program(experiment, mesh)
    return program, sharding.placed(program.shapes, program.layout)


def _batch(source: Source, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    return sharding.placed(source.batch_shapes(), sharding.batch_sharding(mesh))


def compile_step(experiment: Experiment, topology: str, *, slices: int = 1) -> jax.stages.Compiled:
    """The experiment's step as the TPUs of the topology would run it. Raises UserError for an unknown topology."""
    return lower_step(experiment, topology_devices(topology, slices=slices)).compile()
