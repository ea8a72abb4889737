# SPDX-License-Identifier: Apache-2.0
"""Several processes that run one program: what they must agree on, and errors that all raise alike.

One process, or one that is alone, pays nothing: every function here then does the plain thing. With several, each of
these calls is made by all, in the same order: one that is left out makes the others wait.
"""

import contextlib
import functools
import json
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core.config import differences
from research.core.errors import Crashed, Passing
from research.core.types import Array, UserError

T = TypeVar("T")
SMALLEST = 1024  # bytes; texts are padded to powers of two, so that few programs are compiled to exchange them


class HostsError(UserError):
    """What went wrong on one host or on all, raised on all alike: the next thing can be begun together."""


class HostsCrashed(HostsError, Crashed):
    """No user's mistake."""


class HostsHindered(HostsError, Passing):
    """What may pass by itself."""


KINDS = {"": HostsError, "crashed": HostsCrashed, "passing": HostsHindered}


def several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1  # alone, asking starts no backend


def first() -> bool:
    """Whether this process writes what is written once: metrics, records, results, what a person watches."""
    return not several() or jax.process_index() == 0


def gathered(text: str) -> list[str]:
    """What every process says, by process."""
    from jax.experimental import multihost_utils

    if not several():
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(max(SMALLEST, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def from_first(compute: Callable[[], T]) -> T:
    """What process 0 computes (a JSON value), on all; raises HostsError on all where it fails."""
    if not several():
        return compute()
    value, error = None, None
    if first():
        try:
            value = compute()
        except Exception as caught:
            error = caught
    said = json.loads(gathered(json.dumps({"value": value, "error": _sentence(error), "kind": _kind(error)}))[0])
    if said["error"]:
        raise KINDS[said["kind"]](said["error"]) from error
    return said["value"]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process raises within the block, all raise after it, as HostsError. No process waits within."""
    if not several():
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    said = enumerate(gathered(json.dumps([_kind(error), _sentence(error)])))
    found = {host: told for host, text in said if (told := json.loads(text))[1]}
    if found:
        host, (kind, text) = next(iter(found.items()))
        alike = len(found) == jax.process_count() and len({other for _, other in found.values()}) == 1
        raise KINDS[kind](text if alike else f"Host {host}: {text}") from error


def _kind(error: Exception | None) -> str:
    """What it is to the host that tells of it: a user's mistake, something that may pass, or a crash."""
    if isinstance(error, Passing | OSError):
        return "passing"
    return "crashed" if error is not None and not isinstance(error, UserError) else ""


def _sentence(error: Exception | None) -> str:
    if error is None:
        return ""
    if isinstance(error, UserError | OSError):
        return str(error) or type(error).__name__
    traceback.print_exception(error, file=sys.stderr)  # only its text reaches the others
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


def in_turn(compute: Callable[[], T], *, folder: Path) -> T:
    """``compute()`` on every process, failing on all alike. Where all see one ``folder``, a cache that it fills,
    process 0 goes before the others, so that they find what it makes there; else all go at once."""
    if not several():
        return compute()
    shared = same_folder(folder)
    if shared and not first():
        with together():
            pass
    with together():
        value = compute()
    if shared and first():
        with together():
            pass
    return value


def same_folder(folder: Path) -> bool:
    """Whether all processes see one folder at this path. Makes it where it is not."""

    def leave_a_mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".{uuid.uuid4().hex}.host"
        (folder / name).touch()
        return name

    mark = folder / from_first(leave_a_mark)  # the path as this process sees it
    seen = all(gathered("seen" if mark.exists() else ""))
    if first():
        mark.unlink()
    return seen


def check(mesh: Mesh) -> None:
    """Raises UserError where a process has no device in the mesh: it could not take part."""
    idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if idle:
        raise UserError(
            f"The mesh of {mesh.devices.size} devices leaves host {', '.join(map(str, sorted(idle)))} of "
            f"{jax.process_count()} without one: choose axes whose product is {jax.device_count()}, or use fewer hosts."
        )


def check_equal(what: str, record: Mapping[str, Any]) -> None:
    """Raises HostsError, on all, naming the first difference between a JSON value here and that of process 0."""
    if not several():
        return
    wanted = from_first(lambda: record)
    with together():
        found = differences(wanted, json.loads(json.dumps(record)))
        if found:
            raise UserError(
                f"its {what} is not that of host 0 ({'; '.join(found[:5])}): run the same code with the same words "
                "and data on every host."
            )


def check_shared(folder: Path) -> None:
    """Raises HostsError where a run's folder is not one for all: each writes its share of a checkpoint there."""
    if several() and not same_folder(folder):
        raise HostsError(
            f"{folder} is not the same folder on all {jax.process_count()} hosts, and each writes its share of a "
            "checkpoint there: put the folder of runs (lab --runs) on a file system that all share."
        )


def largest(number: int) -> Array:
    """The largest of what the processes say, as an array to be read later: nobody waits for it here."""
    everyone, maximum = _maximum()
    where = NamedSharding(everyone, PartitionSpec("device"))
    said = jax.make_array_from_callback((jax.device_count(),), where, lambda index: np.full(1, number, np.int32))
    with jax.set_mesh(everyone):
        return maximum(said)


@functools.cache
def _maximum() -> tuple[Mesh, Callable[[Array], Array]]:
    everyone = Mesh(np.array(jax.devices()), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    return everyone, jax.jit(jnp.max, out_shardings=NamedSharding(everyone, PartitionSpec()))
