# SPDX-License-Identifier: Apache-2.0
"""Several hosts: who they are, a meeting that names the one that did not come, and the start of ``jax.distributed``.

JAX's own start waits for a missing process without saying which, and some of its time-outs abort the process. So
every process first meets host 0 over TCP, on the port that JAX takes afterwards, and tells it index and name.
"""

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass

from research.core.errors import UserError

TIMEOUT = 300.0  # seconds
RETRY, GRACE = 0.1, 10.0  # seconds between attempts to reach host 0; seconds left to the others when one fails
OPTIONS = {
    "coordinator": ("--coordinator HOST:PORT", "JAX_COORDINATOR_ADDRESS"),
    "hosts": ("--hosts N", "JAX_NUM_PROCESSES"),
    "host": ("--host I", "JAX_PROCESS_ID"),
}


class Apart(UserError):
    """Hosts that did not come together: nothing is wrong with the run."""


@dataclass(frozen=True)
class Hosts:
    """``count`` processes, of which this one has ``index``; all meet at ``coordinator``, HOST:PORT of host 0.

    names: of all hosts in order where the cluster tells, else empty. detected: found by JAX's own means.
    """

    coordinator: str
    count: int
    index: int
    names: tuple[str, ...] = ()
    detected: bool = False

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(
                f"The coordinator is {self.coordinator!r}: give host 0 as HOST:PORT, such as 10.0.0.1:8476."
            )
        if not 0 <= self.index < self.count:
            raise UserError(f"This is host {self.index} of {self.count}: --host counts from 0 to {self.count - 1}.")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    def describe(self, index: int, name: str | None = None) -> str:
        name = name or (self.names[index] if len(self.names) == self.count else None)
        return f"host {index} ({name})" if name else f"host {index}"


def find(coordinator: str | None = None, hosts: int | None = None, host: int | None = None) -> Hosts | None:
    """The hosts that the options name, else the environment, else the cluster; None where this one is alone."""
    given: dict[str, str | int | None] = {"coordinator": coordinator, "hosts": hosts, "host": host}
    for name, (_, variable) in OPTIONS.items():
        if given[name] is None:
            given[name] = os.environ.get(variable)
    if all(value is None for value in given.values()):
        return detect()
    try:
        count, index = (int(given[name]) if given[name] is not None else None for name in ("hosts", "host"))  # type: ignore[arg-type]
    except ValueError:
        raise UserError(
            f"The number of hosts is {given['hosts']!r} and this one's index {given['host']!r}: give whole numbers."
        ) from None
    if count == 1:
        return None
    missing = [f"{option} (or ${variable})" for name, (option, variable) in OPTIONS.items() if given[name] is None]
    if missing:
        raise UserError(f"To run on several hosts, give {' and '.join(missing)} too.")
    assert count is not None and index is not None
    names = tuple(filter(None, os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")))
    return Hosts(str(given["coordinator"]), count, index, names)


def detect() -> Hosts | None:
    """The hosts of a TPU pod or a Slurm step, by what ``jax.distributed.initialize()`` itself goes by."""
    from jax._src import clusters  # not public: the public function starts at once, and names nobody

    for cluster in (clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster):
        try:
            if not cluster.is_env_present():
                continue
            if (count := cluster.get_process_count()) == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            coordinator = cluster.get_coordinator_address(int(TIMEOUT), port)
            names = tuple(getattr(cluster, "_get_worker_list_in_slice", list)())
            return Hosts(coordinator, count, cluster.get_process_id(), names, detected=True)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"This looks like one host of a cluster ({cluster.name}), but the others were not found "
                f"({' '.join(str(error).split())}): give --coordinator, --hosts and --host, or --hosts 1 to run alone."
            ) from error
    return None


def start(hosts: Hosts | None, timeout: float = TIMEOUT) -> None:
    """Meets the other hosts and starts ``jax.distributed``; does nothing for None. Raises UserError."""
    if hosts is None:
        return
    meet(hosts, timeout)
    import jax

    # JAX's own handler of SIGTERM would swallow the signal that asks a run to save and leave
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.count,
            hosts.index,
            cluster_detection_method=None if hosts.detected else "deactivate",
            initialization_timeout=max(1, int(timeout)),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"All {hosts.count} hosts came, but JAX could not connect them ({' '.join(str(error).split())[:300]}): "
            f"check that port {hosts.address[1]} of host 0 is free and open to the others."
        ) from error


def started() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def stop() -> None:
    """Takes leave of the other hosts, which all must do; what follows is this host's own."""
    if started():
        import jax

        jax.distributed.shutdown()


def leave(code: int) -> None:
    """Ends one of several processes after a failure; returns where this one is alone.

    Hosts that fail alike leave together. One that fails alone leaves after some seconds, which breaks the
    connections that the others wait on; JAX's own exit would wait for them for minutes, and they for it.
    """
    if not started():
        return
    attempt = threading.Thread(target=stop, daemon=True)
    attempt.start()
    attempt.join(GRACE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def meet(hosts: Hosts, timeout: float) -> None:
    """Returns once all hosts are at host 0. Raises Apart, on every host that came, naming those that did not."""
    if (sentence := asyncio.run(_meet(hosts, timeout))) is not None:
        raise Apart(sentence)


async def _meet(hosts: Hosts, timeout: float) -> str | None:
    if hosts.index != 0:
        return await _come(hosts, timeout)
    async with _Reception(hosts, timeout):
        return await _come(hosts, timeout)  # host 0 too: that its address leads to itself is part of the test


async def _come(hosts: Hosts, timeout: float) -> str | None:
    """Says to host 0 who this is, and waits for its answer: None, or why the hosts cannot go on."""
    deadline = time.monotonic() + timeout
    hello = {"host": hosts.index, "hosts": hosts.count, "name": socket.gethostname()}
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError, asyncio.TimeoutError, ValueError, KeyError, TypeError):
            reader, writer = await asyncio.wait_for(asyncio.open_connection(*hosts.address), left)
            try:
                writer.write(json.dumps(hello).encode() + b"\n")
                answer = await asyncio.wait_for(reader.readline(), timeout + GRACE)
                return json.loads(answer)["error"]
            finally:
                writer.close()
        await asyncio.sleep(RETRY)
    return (
        f"Host 0 at {hosts.coordinator} did not answer host {hosts.index} ({hello['name']}) within {timeout:g} s: "
        "start the same command there, and check that address and that its port is open."
    )


class _Reception:
    """Host 0's side of the meeting: takes in the hosts, and tells all of them the same when it is decided."""

    def __init__(self, hosts: Hosts, timeout: float) -> None:
        self.hosts, self.timeout = hosts, timeout
        self.came: dict[int, str] = {}
        self.guests: set[asyncio.Task] = set()

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        self.verdict: asyncio.Future[str | None] = loop.create_future()
        host, port = self.hosts.address
        try:
            families = {family for family, *_ in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
            every = "0.0.0.0" if socket.AF_INET in families else "::"
            self.server = await asyncio.start_server(self._take_in, every, port, backlog=4096)
        except OSError as error:
            raise UserError(
                f"This process is host 0 and cannot listen at {self.hosts.coordinator} ({error.strerror}): another one "
                "may be host 0 already (give each its own --host), or choose another address or port."
            ) from error
        self.alarm = loop.call_later(self.timeout, self._give_up)

    async def __aexit__(self, *raised: object) -> None:
        self.alarm.cancel()
        self.server.close()
        if self.guests:
            await asyncio.wait(self.guests, timeout=GRACE)  # until each has its answer

    async def _take_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            hello = json.loads(await reader.readline())
            index, count, name = int(hello["host"]), int(hello["hosts"]), str(hello["name"])
        except (OSError, ValueError, KeyError, TypeError):
            return writer.close()  # no host of ours
        self.guests.add(task)
        self._register(index, count, name)
        gone = asyncio.ensure_future(reader.read(1))
        await asyncio.wait({self.verdict, gone}, return_when=asyncio.FIRST_COMPLETED)
        if self.verdict.done():
            with contextlib.suppress(OSError):
                writer.write(json.dumps({"error": self.verdict.result()}).encode() + b"\n")
                await writer.drain()
        else:
            self.came.pop(index, None)  # it left before all were there, and may come again
        gone.cancel()
        writer.close()
        self.guests.discard(task)

    def _register(self, index: int, count: int, name: str) -> None:
        if count != self.hosts.count:
            self._decide(
                f"Host {index} ({name}) was started as one of {count} hosts and host 0 ({socket.gethostname()}) as one "
                f"of {self.hosts.count}: give every host the same --hosts."
            )
        elif index in self.came:
            self._decide(
                f"Two processes came as host {index} of {count}, from {self.came[index]} and {name}: give each its own "
                f"--host, 0 to {count - 1}."
            )
        else:
            self.came[index] = name
            if len(self.came) == self.hosts.count:
                self._decide(None)

    def _give_up(self) -> None:
        missing = [self.hosts.describe(i) for i in range(self.hosts.count) if i not in self.came]
        named = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        self._decide(
            f"{len(missing)} of {self.hosts.count} hosts did not come to {self.hosts.coordinator} within "
            f"{self.timeout:g} s: {named}; start the same command there, or see why it ended."
        )

    def _decide(self, sentence: str | None) -> None:
        if not self.verdict.done():
            self.verdict.set_result(sentence)
