# SPDX-License-Identifier: Apache-2.0
"""On a host of a TPU slice: runs the task's runs one after the other, on every host the same, and tells the bucket.

    python -m launch.machine config.json

Each host writes ``host-I.json`` (what it does, exit statuses, a sign of life) and its runs' output beside the journal.
When the metadata server announces a preemption, or the machine is shut down, the run is asked to save and leave. At the
end the first host gives the slice back.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

from launch import store
from launch.gcloud import Gcloud
from launch.journal import AGAIN, ALONE, CANCEL
from launch.workers import last_words

BEAT, UPLOAD, LOOK = 30.0, 10.0, 5.0  # seconds between signs of life, uploads of output, looks at the metadata
LEFT = "left"  # the phase of a host that saved and left, for its machine is to be taken away
KEPT = 8 * 2**20  # bytes of a run's output that are kept, from its end
OTHERS = 120.0  # seconds that the first host waits for the others before it gives the slice back


class Machine:
    """config: task, folder (of the task, in the bucket), zone, project, runs, words (of Python, that run a run, before
    ``--only NAME``), speed (1; tests go faster)."""

    def __init__(self, config: dict[str, Any], work: Path, index: int, count: int) -> None:
        self.config, self.work, self.index, self.count = config, work, index, count
        self.folder = store.place(config["folder"])
        self.speed = float(config.get("speed") or 1.0)
        self.status: dict[str, Any] = {
            "host": index, "hosts": count, "name": os.uname().nodename, "began": time.time(), "phase": "begun",
            "current": "", "codes": {}, "words": {}, "done": False,
        }  # fmt: skip
        self._leaving = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._sent: dict[str, int] = {}
        self._beaten = 0.0

    def run(self) -> None:
        """All runs of the task, or until this machine is to be taken away."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked)
        self._tell("begun")
        for name in self.config["runs"]:
            if self._leaving.is_set():
                break
            code = self._one(name)  # after a boot the finished ones too: they end at once, on all hosts alike
            self.status["codes"][name] = code
            if code not in (0, *AGAIN):
                self.status["words"][name] = last_words(self.work / f"{name}.log")
            self._tell("between runs", current="")
            # on its way out, or without the other hosts; one that was cancelled makes room for the next
            if code == ALONE or (code in AGAIN and (self._leaving.is_set() or not self._cancelled(name))):
                break
        self._tell(self._end_phase(), done=True)
        if self.index == 0 and not self._leaving.is_set():
            self._wait_for_others()
            self.give_back()

    def _end_phase(self) -> str:
        """Whether its runs are done, or it left among them."""
        left = any(code in AGAIN and not self._cancelled(name) for name, code in self.status["codes"].items())
        return LEFT if left or self._leaving.is_set() else "done"

    def _one(self, name: str) -> int:
        """One run's exit status."""
        log = self.work / f"{name}.log"
        with log.open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, *self.config["words"], "--only", name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._child = child
        if self._leaving.is_set():  # it was said while the process was made
            self._stop()
        stopped = False
        self._tell("running", current=name)
        looked = uploaded = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(min(0.2, 0.2 / self.speed))
                self._upload(log)
                self._child = None
                return code if code >= 0 else 128 - code
            now = time.monotonic()
            if now - looked > LOOK / self.speed:
                looked = now
                if not self._leaving.is_set() and preempted():
                    self._asked(signal.SIGTERM, None)
                if not stopped and not self._leaving.is_set() and self._cancelled(name):
                    stopped = True
                    self._stop()
            if now - uploaded > UPLOAD / self.speed:
                uploaded = now
                self._upload(log)
            if now - self._beaten > BEAT / self.speed:
                self._tell(self.status["phase"])

    def _cancelled(self, name: str) -> bool:
        """Whether somebody has asked for the end of this run (``launch.journal``)."""
        with contextlib.suppress(Exception):  # a bucket that does not answer now: the next time
            found = store.read_json(self.folder.parent.parent / CANCEL)
            return bool({name, "*"} & set((found or {}).get("runs", ())))
        return False

    def _asked(self, number: int, frame: FrameType | None) -> None:
        """This machine is to be taken away: the run saves and leaves. Asked once, however often it is said."""
        if not self._leaving.is_set():
            self._leaving.set()
            self._stop()

    def _stop(self) -> None:
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def _tell(self, phase: str, **changes: Any) -> None:
        self.status |= {"phase": phase, "time": time.time(), **changes}
        self._beaten = time.monotonic()
        self._send(f"host-{self.index}.json", store.text(self.status))

    def _upload(self, log: Path) -> None:
        """Sends a run's output, where there is more than before."""
        name = f"{log.stem}.host-{self.index}.log"
        with contextlib.suppress(OSError), log.open("rb") as file:
            size = file.seek(0, 2)
            if self._sent.get(name) != size:
                file.seek(max(0, size - KEPT))
                self._send(name, file.read())
                self._sent[name] = size

    def _send(self, name: str, content: str | bytes) -> None:
        """A bucket that does not answer now will the next time: the run goes on."""
        try:
            store.write(self.folder / name, content)
        except Exception as error:  # of whatever class the cloud's client raises
            print(f"{name} could not be sent ({type(error).__name__}: {error})", file=sys.stderr)

    def _wait_for_others(self) -> None:
        until = time.monotonic() + OTHERS / self.speed
        while time.monotonic() < until:
            with contextlib.suppress(Exception):
                others = [store.read_json(self.folder / f"host-{i}.json") for i in range(1, self.count)]
                if all(other is not None and other.get("done") for other in others):
                    return
            time.sleep(1.0 / self.speed)

    def give_back(self) -> None:
        """Deletes the request that this machine belongs to, and with it the machine."""
        gcloud = Gcloud(self.config.get("project"))
        for _ in range(5):
            try:
                gcloud.run(*deletion(self.config["task"], self.config["zone"]))
                return
            except Exception as error:  # whatever it is, the submitting process and lab gc look after it too
                print(f"the slice could not be given back ({error})", file=sys.stderr)
                time.sleep(5.0 / self.speed)


def deletion(task: str, zone: str) -> list[str]:
    """The words that delete a request and its machines."""
    return ["compute", "tpus", "queued-resources", "delete", task, "--zone", zone, "--force", "--async"]


def preempted() -> bool:
    """Whether the metadata server says that this machine is about to be taken away."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().strip().upper() == b"TRUE"
    except (OSError, urllib.error.URLError):
        return False


def main() -> None:
    from launch import distributed

    path = Path(sys.argv[1])
    hosts = distributed.find()
    index, count = (hosts.index, hosts.count) if hosts is not None else (0, 1)
    Machine(json.loads(path.read_text()), path.parent, index, count).run()


if __name__ == "__main__":
    main()
