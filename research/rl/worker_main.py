# SPDX-License-Identifier: Apache-2.0
"""What runs in a worker process (``research.rl.workers``): calls come in as JSON lines, results go out as JSON lines.

Nothing here imports JAX. A call runs in the main thread, so that libraries may use ``signal.alarm``; what they print
goes nowhere; while it runs, the process can neither write files nor start programs nor speak to the network. That fence
is there for libraries that evaluate text where we do not expect it; it is no prison for a text that sets out to escape,
which is why verifiers keep text from being evaluated at all.
"""

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

LIMIT = 1 << 20  # bytes of a request or a reply
AGAIN = 0.05  # CPU seconds after which a deadline that a library swallowed is raised again
DETAIL = 500  # characters of an error that are passed on
DENIED = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.kill",
    "os.putenv",
    "os.chdir",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "pty.spawn",
    "shutil.",
    "signal.pthread_kill",
    "socket.",
    "subprocess.",
    "urllib.",
    "ctypes.dlsym",
    "ctypes.string_at",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Expired(BaseException):
    """The deadline of a call. Not an Exception, so that ``except Exception`` in a library lets it through."""


class Deadline:
    """A limit on the CPU time of what runs under it: SIGPROF raises Expired in the main thread, again and again until
    it is out; where Python is not come back to, the system ends the process at twice the limit (SIGXCPU)."""

    def __init__(self) -> None:
        self.running = False
        self.expired = False
        signal.signal(signal.SIGPROF, self._raise)

    def _raise(self, *_: Any) -> None:
        if self.running:
            self.expired = True
            raise Expired

    def start(self, seconds: float) -> None:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + 2 * seconds) + 1, hard))
        self.expired, self.running = False, True
        signal.setitimer(signal.ITIMER_PROF, seconds, AGAIN)

    def stop(self) -> None:
        self.running = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that the call left behind
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


class Fence:
    """An audit hook (PEP 578) that while ``up`` refuses what no verifier needs."""

    def __init__(self) -> None:
        self.up = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.up:
            return
        if event == "open":
            _, mode, flags = arguments
            if (flags or 0) & WRITES or set(mode or "") & set("wax+"):
                raise PermissionError("A verifier writes no files.")
        elif event.startswith(DENIED):
            raise PermissionError(f"A verifier has no need of {event}.")


def called(request: Mapping[str, Any], deadline: Deadline, fence: Fence, begun: Callable[[], None]) -> dict[str, Any]:
    """What a call comes to: its value, or how it failed. ``begun`` is called once its module is there."""
    module, _, name = request["call"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        return {"failure": "error", "detail": f"{type(error).__name__}: {error}"[:DETAIL]}
    begun()
    found: dict[str, Any] = {"failure": "time"}
    try:
        try:
            deadline.start(request["seconds"])
            fence.up = True
            found = _result(function, request["arguments"])
        finally:
            deadline.stop()
            fence.up = False
    except Expired:
        deadline.stop()
        fence.up = False
    return {"failure": "time"} if deadline.expired else found


def _result(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    try:
        value = function(*arguments)
        if len(json.dumps(value)) > LIMIT // 2:
            return {"failure": "error", "detail": "The result is too long."}
        return {"value": value}
    except Expired:
        raise
    except MemoryError:
        return {"failure": "memory"}
    except BaseException as error:  # SystemExit too: a verdict must come of whatever the text does
        detail = type(error).__name__
        with contextlib.suppress(Exception):
            detail += f": {error}"[:DETAIL]
        return {"failure": "error", "detail": detail}


def own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The process's standard input and output as the only ways in and out; those names then lead nowhere."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
    return requests, replies


def end_with_parent(requests: BinaryIO) -> None:
    """Ends the process as soon as the other end of its input is closed, whatever it is doing."""
    poll = select.poll()
    poll.register(requests, select.POLLHUP)

    def watch() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
        poll.poll()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    requests, replies = own_pipes()
    end_with_parent(requests)
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    deadline, fence = Deadline(), Fence()
    sys.addaudithook(fence)

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()

    say({"ready": True})
    for line in requests:
        say(called(json.loads(line), deadline, fence, begun=lambda: say({"begun": True})))


if __name__ == "__main__":
    main()
