# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by Orbax: written in the background, whole or not at all, restored onto any mesh.

A checkpoint holds the parameters, the rest of the training state, the data position and the experiment's own
JSON. Orbax writes into a temporary folder and renames it when all is there, so that a folder with a plain
number for a name is a whole checkpoint.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core import config
from research.core.errors import Passing
from research.core.tree import named_leaves
from research.core.types import Array, UserError
from research.train.experiment import WATCHING, CheckpointPolicy
from research.train.places import absolute, is_remote, place
from research.train.state import TrainState

FOLDER = "checkpoints"
RECORD, RESULT = "experiment.json", "result.json"  # of a run, beside that
COMMITTED = "commit_success.txt"  # as Orbax marks a whole one in a bucket


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or used."""


def steps(directory: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, oldest first. Needs no Orbax."""
    return steps_in(directory / FOLDER)


def steps_in(folder: Path) -> list[int]:
    """Of the whole checkpoints in a folder. In a bucket, where nothing can be renamed, a whole one is marked so."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if entry.name.isdigit()]
    if is_remote(folder):
        found = [entry for entry in found if (entry / COMMITTED).exists()]
    return sorted(int(entry.name) for entry in found)


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two experiments' JSON, apart from what only says where or how it is watched."""
    old, new = (_placeless({k: v for k, v in record.items() if k not in WATCHING}) for record in (saved, now))
    return config.differences(config.short_types(old), config.short_types(new))


def _placeless(record: Any) -> Any:
    """A record without the paths of weights whose content hash it has."""
    if isinstance(record, Mapping):
        kept = {k: v for k, v in record.items() if not (k == "checkpoint" and record.get("content"))}
        return {k: _placeless(v) for k, v in kept.items()}
    return [_placeless(v) for v in record] if isinstance(record, list) else record


def check_unchanged(saved: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    """Raises CheckpointError naming each setting that is not what the run was begun with."""
    found = changes(saved, now)
    if found:
        raise CheckpointError(
            f"{directory} was begun with other settings ({'; '.join(found)}): give the run another name, "
            "put the settings back, or remove the folder."
        )


def check_model(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming what a checkpoint's model or optimizer have other than a record's."""
    saved = read_item(path, "experiment")
    found = [
        line for line in changes(saved, record) if re.split("[.:]", line)[0] in ("model", "optimizer", "precision")
    ]
    if found:
        raise CheckpointError(
            f"{path} belongs to other settings ({'; '.join(found)}): take them over, or give "
            "Init(parts='weights') where the model is the same."
        )


class CheckpointUnwritten(CheckpointError, Passing):
    """A checkpoint that a bucket did not take now."""


class Checkpointer:
    """Saves and restores one run's checkpoints under ``directory/checkpoints``, or in another folder. before_saving is
    called before each save begins."""

    def __init__(
        self,
        directory: Path,
        policy: CheckpointPolicy,
        *,
        folder: Path | None = None,
        before_saving: Callable[[], None] = lambda: None,
        read_only: bool = False,
    ) -> None:
        self.directory, self.policy, self.read_only = directory, policy, read_only
        self._before_saving = before_saving
        self._folder = folder or directory / FOLDER
        self._opened: Any = None

    @property
    def _manager(self) -> Any:
        """Orbax's manager, made when first needed: a fresh run's first step does not wait for it."""
        if self._opened is None:
            import orbax.checkpoint as ocp

            # what fails is raised here as one sentence; Orbax and its event loop would log tracebacks besides
            for name in ("absl", "asyncio"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            self._opened = ocp.CheckpointManager(
                absolute(self._folder),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self.policy.keep_last,
                    keep_period=self.policy.keep_every or None,
                    cleanup_tmp_directories=not self.read_only,
                    read_only=self.read_only,
                    enable_async_checkpointing=True,
                ),
            )
        return self._opened

    def save(self, step: int, state: TrainState, data: Mapping[str, Any], experiment: Any) -> None:
        """Starts writing; returns once the state has been copied. A failure of the save before surfaces here."""
        import orbax.checkpoint as ocp

        self._before_saving()
        rest = state._replace(params=None)._asdict()
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    rest=ocp.args.StandardSave({k: v for k, v in rest.items() if jax.tree.leaves(v)}),
                    data=ocp.args.JsonSave(dict(data)),
                    experiment=ocp.args.JsonSave(experiment),
                    checksums=ocp.args.JsonSave(checksums(state)),
                ),
            )
        except Exception as error:
            raise self._failed("written", step, error) from error

    def restore(
        self, step: int, shapes: TrainState, layout: TrainState, *, experiment: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state laid out as asked, and the data position. ``experiment``: the JSON it must belong to, if any.

        Raises CheckpointError where the checkpoint cannot be read or belongs to other settings.
        """
        import orbax.checkpoint as ocp

        if experiment is not None:
            try:
                saved = self._manager.restore(step, args=ocp.args.Composite(experiment=ocp.args.JsonRestore()))
            except Exception as error:
                raise self._failed("read", step, error) from error
            if not isinstance(saved["experiment"], Mapping):
                raise self._failed("read", step, ValueError("its record of the experiment is none"))
            check_unchanged(saved["experiment"], experiment, self.directory)
        targets = jax.tree.map(
            lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
            shapes,
            layout,
        )
        rest = targets._replace(params=None)._asdict()
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(targets.params),
                    rest=ocp.args.StandardRestore({k: v for k, v in rest.items() if jax.tree.leaves(v)}),
                    data=ocp.args.JsonRestore(),
                    checksums=ocp.args.JsonRestore(),
                ),
            )
            state = TrainState(**{**rest, **found["rest"], "params": found["params"]})
            compare(found["checksums"], checksums(state))
        except Exception as error:
            raise self._failed("read", step, error) from error
        return state, found["data"]

    @property
    def remote(self) -> bool:
        """Whether they go to a bucket, which all hosts share."""
        return is_remote(self._folder)

    @property
    def home(self) -> Path:
        """The folder that stands for the run where a checkpoint is asked for."""
        return self._folder.parent

    def steps(self) -> list[int]:
        """Of the whole ones, oldest first."""
        return steps_in(self._folder)

    def last(self) -> Path | None:
        """The folder of the newest checkpoint, once what is being written is on disk."""
        self.wait()
        saved = self.steps()
        return self._folder / str(saved[-1]) if saved else None

    def wait(self) -> None:
        """Waits until what was saved is on disk. Raises CheckpointError where it is not."""
        if self._opened is None:
            return
        try:
            self._opened.wait_until_finished()
        except Exception as error:
            raise self._failed("written", None, error) from error

    def close(self) -> None:
        if self._opened is None:
            return
        try:
            self._opened.close()
        except Exception as error:
            raise self._failed("written", None, error) from error

    def _failed(self, verb: str, step: int | None, error: Exception) -> CheckpointError:
        reason = brief(error)
        which = self._folder / str(step) if step is not None else self._folder
        if verb == "read" and self.read_only:
            todo = "give another checkpoint"
        elif verb == "read":
            todo = "remove that folder to go on from an earlier checkpoint or from the start"
        else:
            todo = f"earlier ones are whole (steps {self.steps() or 'none'}): free some space and start again"
        kind = CheckpointUnwritten if verb == "written" and self.remote else CheckpointError
        return kind(f"The checkpoint {which} could not be {verb} ({reason}); {todo}.")


def brief(error: Exception) -> str:
    """An error's text on one line; of a long one the beginning (what) and the end (why)."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-180:]}"


@jax.jit
def _sums(leaves: list[Array]) -> list[Array]:
    def one(x: Array) -> Array:
        words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.itemsize}").astype(jnp.uint32)
        return jnp.sum(words, dtype=jnp.uint32)

    return [one(x) for x in leaves]


def checksums(tree: Any) -> dict[str, int]:
    """The sum of each array's words modulo 2^32: the same on any mesh, and another one if any single bit flips."""
    named = named_leaves(tree)
    if all(_is_here(x) for x in named.values()):
        return {name: _sum_here(x) for name, x in named.items()}
    sums = jax.device_get(_sums(list(named.values())))
    return {name: int(value) for name, value in zip(named, sums, strict=True)}


def _is_here(x: Any) -> bool:
    """Whether all of an array lies in this process's own memory."""
    return isinstance(x, jax.Array) and x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())


def _sum_here(x: Array) -> int:
    """By NumPy, in pieces: a program for a CPU would first write two-byte words out as four-byte ones, all of them."""
    parts = [np.asarray(shard.data) for shard in x.addressable_shards if shard.replica_id == 0]
    return sum(int(np.sum(part.view(f"u{part.itemsize}"), dtype=np.uint32)) for part in parts) % 2**32


def compare(saved: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Raises ValueError naming an array whose content is not what was saved."""
    for name, value in found.items():
        if saved.get(name) != value:
            raise ValueError(f"{name} is not what was saved")


def read_item(path: str | os.PathLike, item: str) -> Any:
    """One JSON item of a checkpoint: "experiment", "data" or "checksums"."""
    import orbax.checkpoint as ocp

    directory, step = locate(path)
    try:
        return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(absolute(directory) / FOLDER / str(step) / item)
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {directory / FOLDER / str(step)} cannot be read ({brief(error)})."
        ) from error


def locate(path: str | os.PathLike) -> tuple[Path, int]:
    """The run folder and step meant by a run's folder (its newest checkpoint) or by a checkpoint's own folder."""
    given = place(path)
    if given.name.isdigit() and given.parent.name == FOLDER and given.is_dir():
        return given.parent.parent, int(given.name)
    found = steps(given)
    if not found:
        if (given / "config.json").exists():
            raise CheckpointError(f"{given} has the files of Hugging Face: give the folder that lab import hf makes.")
        raise CheckpointError(
            f"{given} holds no checkpoint: give a run's folder (one with a {FOLDER}/ folder in it) or one of "
            f"its {FOLDER}/STEP folders."
        )
    return given, found[-1]


def load_experiment(path: str | os.PathLike) -> Any:
    """The experiment that a checkpoint was made by, rebuilt from its JSON."""
    return config.from_json(read_item(path, "experiment"))


def load_params(path: str | os.PathLike, shapes: Any, layout: Any) -> Any:
    """A checkpoint's parameters alone, laid out as asked. Raises CheckpointError naming what does not match."""
    import orbax.checkpoint as ocp

    directory, step = locate(path)
    targets = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(absolute(directory) / FOLDER / str(step) / "params", targets)
        compare(read_item(path, "checksums"), checksums({"params": params}))
        return params
    except Exception as error:
        raise CheckpointError(
            f"The parameters in {directory / FOLDER / str(step)} do not fit the model asked for, or cannot be "
            f"read ({brief(error)})."
        ) from error
