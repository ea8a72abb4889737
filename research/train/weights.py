# SPDX-License-Identifier: Apache-2.0
"""Models without their training: what a checkpoint's model is, its weights on a mesh, and weights that came from
elsewhere written as a checkpoint that ``Init`` takes."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from research.core import config, sharding
from research.core.types import Params, Precision
from research.models.bound import Bound
from research.models.decoder import Decoder
from research.train import checkpoint
from research.train.checkpoint import FOLDER, CheckpointError, brief, checksums, locate
from research.train.places import absolute

MODEL = "model"  # the item of a checkpoint that no run has made


class Described(NamedTuple):
    """A model, the number formats it was stored for, and where it came from: a run's experiment, or a record."""

    model: Decoder
    precision: Precision
    origin: Any


def content(path: str | os.PathLike) -> str:
    """A hash of a checkpoint's weights: the same on any mesh, from their checksums. Raises CheckpointError where there
    are none. One host may ask it alone: Orbax, which wrote the file, would wait for the others to read it."""
    directory, step = locate(path)
    file = directory / FOLDER / str(step) / "checksums" / "metadata"
    try:
        sums = json.loads(file.read_text()).items()
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"The checksums of {path} cannot be read ({brief(error)}).") from error
    weights = {name: value for name, value in sums if name.split("/")[0] in ("params", "buffers")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16]


def describe(path: str | os.PathLike) -> Described:
    """What the checkpoint of a run, or of an import, holds. Raises CheckpointError where there is none."""
    directory, step = locate(path)
    if (directory / FOLDER / str(step) / MODEL).is_dir():
        found = config.from_json(checkpoint.read_item(path, MODEL))
        return Described(found["model"], found["precision"], found["origin"])
    experiment = checkpoint.load_experiment(path)
    return Described(experiment.model, experiment.precision, experiment)


def load(path: str | os.PathLike, model: Decoder, precision: Precision, mesh: Mesh, *, wanted: str = "") -> Bound:
    """The model with a checkpoint's parameters, and the buffers that belong to them, laid out over the mesh. Raises
    CheckpointError saying in what the checkpoint's own model differs, where it does not fit, and where its content hash
    is not the one that is wanted, if one is."""
    if wanted and (found := content(path)) != wanted:
        raise CheckpointError(
            f"The weights in {path} have the content hash {found}, and {wanted} is wanted: put those back, or begin "
            "anew from these."
        )
    shapes = model.shapes(precision)
    try:
        own = describe(path).model
    except Exception:  # of a study that is not here, or of no checkpoint: reading it says so
        own = None
    if own is not None:
        check_fits(own, model, precision, str(path))
    params = checkpoint.load_params(path, shapes, sharding.tree_shardings(mesh, shapes, model.logical_axes()))
    buffers = jax.eval_shape(model.init_buffers)
    if jax.tree.leaves(buffers):
        buffers = _buffers(path, buffers, mesh)
    return model.bind(params, buffers, precision, platform=mesh.devices.flat[0].platform)


def check_fits(own: Decoder, model: Decoder, precision: Precision, where: str) -> None:
    """Raises CheckpointError where the parameters of one model are not those of the other. where: its own lie."""
    if own.shapes(precision) == model.shapes(precision):
        return
    found = config.differences(*(config.short_types(config.to_json(one)) for one in (own, model)))
    mend = "take over the checkpoint's model"
    if replace(own, value_head=model.value_head) == model:
        mend = "give Init(..., model=the checkpoint's model), and the value head begins afresh"
    raise CheckpointError(f"The parameters in {where} do not fit the model asked for ({'; '.join(found[:4])}): {mend}.")


def _buffers(path: str | os.PathLike, shapes: Params, mesh: Mesh) -> Params:
    import orbax.checkpoint as ocp

    directory, step = locate(path)
    where = sharding.replicated(mesh)
    targets = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes)
    args = ocp.args.PyTreeRestore(
        item={"buffers": targets},
        restore_args=ocp.checkpoint_utils.construct_restore_args({"buffers": targets}),
        partial_restore=True,
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            buffers = checkpointer.restore(absolute(directory) / FOLDER / str(step) / "rest", args=args)["buffers"]
        checkpoint.compare(checkpoint.read_item(path, "checksums"), checksums({"buffers": buffers}))
        return buffers
    except Exception as error:
        raise CheckpointError(
            f"The buffers in {directory / FOLDER / str(step)} do not fit the model asked for, or cannot be read "
            f"({brief(error)})."
        ) from error


def save(folder: Path, model: Decoder, precision: Precision, params: Params, buffers: Params, origin: Any) -> None:
    """Writes ``folder`` so that it serves as a checkpoint, whole or not at all. origin: JSON for the record."""
    import orbax.checkpoint as ocp

    record = {"model": config.to_json(model), "precision": config.to_json(precision), "origin": origin}
    items: dict[str, Any] = dict(
        params=ocp.args.StandardSave(params),
        model=ocp.args.JsonSave(record),
        checksums=ocp.args.JsonSave(checksums({"params": params, "buffers": buffers})),
    )
    if jax.tree.leaves(buffers):
        items["rest"] = ocp.args.StandardSave({"buffers": buffers})
    room = max(x.nbytes for x in jax.tree.leaves(params)) // 2**30 + 1  # held twice: an array as large as the largest
    try:
        writers: dict[str, Any] = {name: ocp.JsonCheckpointHandler() for name in (MODEL, "checksums")}
        writers |= {name: ocp.StandardCheckpointHandler(save_concurrent_gb=room) for name in ("params", "rest")}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**writers)) as checkpointer:
            checkpointer.save(absolute(folder) / FOLDER / "0", args=ocp.args.Composite(**items))
    except Exception as error:
        raise CheckpointError(f"{folder} could not be written ({brief(error)}): free some space.") from error
