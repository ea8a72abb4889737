# SPDX-License-Identifier: Apache-2.0
"""The training step of an experiment compiled for TPUs that are not there: its memory, traffic and kernels.

    compiled = compile_step(experiment, "v5e:16x16")
    compiled.memory_analysis().peak_memory_in_bytes

The TPU compiler (libtpu) runs on any x86-64 host. A process that uses it should be one of its own, started with
JAX_PLATFORMS=cpu.
"""

import importlib.metadata
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from research.core import sharding
from research.core.types import UserError
from research.train.experiment import Experiment
from research.train.start import Program, check_fits


def topology_devices(name: str, *, slices: int = 1) -> list[Any]:
    """The devices of a TPU topology such as "v5e:16x16" or "v5p:4x4x4", to compile for; of several such slices that
    a data-centre network joins, one slice after the other."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"To compile for {name} the TPU compiler is needed: install libtpu (the extra 'tpu').")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it looks for the metadata of a TPU virtual machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it compiles only: several may do so at a time
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices)
    except Exception as error:  # whatever class the plugin raises; its message says what it makes of the name
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name!r} is not a topology that can be compiled for ({reason}): give one such as v5e:16x16 or v5p:4x4x4."
        ) from error


def compiler_version() -> str:
    return importlib.metadata.version("libtpu")


def lower_step(experiment: Experiment, devices: list[Any]) -> jax.stages.Lowered:
    """The experiment's real step on its mesh over the devices, lowered for shapes alone."""
    mesh = sharding.make_mesh(experiment.mesh, devices)
    check_fits(experiment, mesh)
    program = Program(experiment, mesh)
    state = jax.tree.map(_placed, program.shapes, program.layout)
    batch = {
        name: _placed(whole, sharding.batch_sharding(mesh)) for name, whole in experiment.source.batch_shapes().items()
    }
    rate = _placed(jax.ShapeDtypeStruct((), jnp.float32), sharding.replicated(mesh))
    with jax.set_mesh(mesh):  # here alone: nothing may be computed on devices that are not there
        return program.step.lower(state, {}, batch, rate)


def compile_step(experiment: Experiment, topology: str, *, slices: int = 1) -> jax.stages.Compiled:
    """The experiment's step as the TPUs of the topology would run it. Raises UserError for an unknown topology."""
    return lower_step(experiment, topology_devices(topology, slices=slices)).compile()


def _placed(shape: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
