# SPDX-License-Identifier: Apache-2.0
"""A run's folder in a bucket: small files are written on this machine and sent on, checkpoints go there directly.

Objects cannot be appended to, as metrics are. So a run works in a folder of this machine, fetched before it goes on and
sent before each checkpoint is begun, so that no checkpoint is ahead of the metrics that lead to it; and every so often
between, for whoever watches.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from research.core.errors import Passing, UserError
from research.train import hosts

EVERY = 30.0  # seconds between what is sent for whoever watches
KEPT_APART = ("checkpoints", ".lock", ".sweep")  # by name; checkpoints are in the bucket alone


class Mirror:
    """``local`` stands for the folder ``remote`` in a bucket."""

    def __init__(self, remote: Path, local: Path) -> None:
        self.remote, self.local = remote, local
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def fetch(self) -> None:
        """Makes the small files here what they are in the bucket."""
        self.local.mkdir(parents=True, exist_ok=True)
        theirs = dict(_files(self.remote))
        for name, path in _files(self.local):
            if name not in theirs:
                path.unlink()
        for name, path in theirs.items():
            mine = self.local / name
            mine.parent.mkdir(parents=True, exist_ok=True)
            mine.write_bytes(path.read_bytes())
            self._sent[name] = _stamp(mine)

    def send(self) -> None:
        """Sends what has changed. Raises UserError where the bucket does not take it."""
        with self._lock:
            mine = dict(_files(self.local))
            for name, path in mine.items():
                with contextlib.suppress(FileNotFoundError):  # replaced meanwhile: the next time
                    stamp = _stamp(path)
                    if self._sent.get(name) != stamp:
                        self._put(name, path.read_bytes())
                        self._sent[name] = stamp
            for name in [name for name in self._sent if name not in mine]:
                with contextlib.suppress(Exception):
                    (self.remote / name).unlink(missing_ok=True)
                del self._sent[name]

    def send_first(self) -> None:
        """``send``, by the first host alone."""
        if hosts.first():
            self.send()

    def _put(self, name: str, content: bytes) -> None:
        try:
            (self.remote / name).write_bytes(content)
        except Exception as error:  # of whatever class the cloud's client raises
            raise Passing(
                f"{self.remote / name} could not be written ({' '.join(str(error).split())[:300]}): see that the "
                "bucket is there and that this account may write to it."
            ) from error

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Sends now and then within the block, and at its end, however it ends."""
        over = threading.Event()

        def now_and_then() -> None:
            while not over.wait(EVERY):
                with contextlib.suppress(UserError):  # the next time, or the checkpoint says so
                    self.send()

        thread = threading.Thread(target=now_and_then, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            over.set()
            with contextlib.suppress(UserError):  # it must not hide why the run ends
                self.send()
            raise
        finally:
            over.set()
        thread.join()
        self.send()


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _files(folder: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Files below a folder by their path within it, checkpoints and locks apart."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in folder.iterdir():
            if entry.name in KEPT_APART or entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(entry, f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}", entry
