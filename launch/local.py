# SPDX-License-Identifier: Apache-2.0
"""Runs experiments on this machine, one at a time, in this process."""

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from launch import host
from launch.locks import locked
from research.train import checkpoint, hosts, loop, progress, watchdog
from research.train.experiment import Experiment
from research.train.mirror import Mirror
from research.train.monitor import Diverged
from research.train.places import is_remote

FAILURE = "failure.json"


def use_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs on disk, so that a program compiled once starts at once the next time."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def run(
    experiment: Experiment, directory: Path, *, profile: bool = False, stall_minutes: float = watchdog.MINUTES
) -> dict[str, Any]:
    """One run to its end, with a record of the failure where it fails."""
    folder = host.cache_dir()
    use_compilation_cache(folder)
    options = loop.Options(cache_dir=folder, progress=progress.choose(), profile=profile, stall_minutes=stall_minutes)
    mirror: Mirror | None = None
    with contextlib.ExitStack() as stack:
        if is_remote(directory):
            mirror = Mirror(directory, host.mirrored(directory))
            options = replace(options, checkpointer=functools.partial(
                checkpoint.Checkpointer, folder=directory / checkpoint.FOLDER, before_saving=mirror.send_first
            ))  # fmt: skip
            directory = mirror.local

        def begin() -> None:
            stack.enter_context(locked(directory))
            if mirror is not None:
                mirror.fetch()
                stack.enter_context(mirror.kept())
            (directory / FAILURE).unlink(missing_ok=True)

        hosts.from_first(begin)
        try:
            return loop.run(experiment, directory, options)
        except Exception as error:
            status = "diverged" if isinstance(error, Diverged) else "failed"
            if not hosts.first() or (directory / loop.RESULT).exists():
                raise  # a finished run that was refused under other settings is no failure; one host writes for all
            with contextlib.suppress(OSError):  # a full disk must not hide the error that says so
                record = {"status": status, "hash": experiment.hash, "message": str(error)}
                loop.write_json(directory / FAILURE, record)
            raise
