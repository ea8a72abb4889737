# SPDX-License-Identifier: Apache-2.0
"""``--on tpu-vm``: Cloud TPU queued resources through the ``gcloud`` command, one request for each task.

A request's name is that of its task, so that asking twice is asking once. Its machines start by a script in their
metadata, report to the task's folder in the bucket, and delete the request themselves when they are done; whatever
stays is deleted here, because SUSPENDED and FAILED requests go on holding quota.
"""

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launch import store
from launch.executor import Refused, Report, Unreachable
from launch.gcloud import Exists, Gcloud, NotFound, shown
from launch.journal import Journal, Task
from launch.machine import deletion
from launch.slice_hosts import Hosts
from research.core.chips import Slice

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
STARTUP = Path(__file__).with_name("startup.sh")
PENDING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "STATE_UNSPECIFIED")
GONE = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING")  # of a machine
SEEN, ABSENT = "the request is", "there is no request:"
UNSEEN = 300.0  # seconds in which a request that was asked for may not be found yet
REQUEST = ("compute", "tpus", "queued-resources")


@dataclass(frozen=True)
class Settings:
    """What to ask for. provisioning: on-demand, spot or reserved. slices: of one run, joined by a data-centre network.
    valid_for: how long a request may wait, as gcloud writes it (6h). network, internal: of the machines. python: of an
    image that has everything, else it is installed. service_account: who the machines are; never written down.
    start, silence: minutes after which machines that do not report are given up."""

    where: Slice
    zones: tuple[str, ...]
    provisioning: str = "spot"
    slices: int = 1
    runtime: str = ""
    valid_for: str = ""
    network: str = ""
    subnetwork: str = ""
    internal: bool = False
    python: str = ""
    service_account: str = ""
    start: float = 30.0
    silence: float = 10.0
    speed: float = 1.0

    @property
    def hosts(self) -> int:
        return self.where.hosts * self.slices


@dataclass
class TpuVm:
    """archive: of the code, in the bucket. words: of Python, that run a run on a machine, before ``--only NAME``."""

    journal: Journal
    gcloud: Gcloud
    settings: Settings
    archive: str
    words: Sequence[str]
    name: str = "tpu-vm"
    packs: bool = True
    _signs: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)

    @property
    def chips(self) -> int:
        return self.settings.where.chips * self.settings.slices

    def places(self, tasks: Sequence[Task], last: Task | None) -> str | None:
        """The zone after that of a task that was taken away or not given; the first for a fresh one."""
        zones, taken = self.settings.zones, ("preempted", "again", "unplaced", "declined")
        if last is None or last.place not in zones:
            return zones[0]
        troubled = any(end.outcome in taken for end in last.outcomes.values())
        return zones[(zones.index(last.place) + troubled) % len(zones)]

    # --- submit ------------------------------------------------------------------------------------

    def submit(self, task: Task) -> dict[str, Any]:
        """Raises Refused where there is no quota or capacity."""
        with TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in ("startup-script", "lab-config")}
            for name, text in self.metadata(task).items():
                files[name].write_text(text)
            try:
                self.gcloud.run(*self.creation(task, files))
            except Exists:
                pass  # by a process that died before it could write it down
            except NotFound as error:  # of the project, the zone or the network
                raise Refused(str(error), lasting=True) from error
        return {"hosts": self.settings.hosts}

    def metadata(self, task: Task) -> dict[str, str]:
        """What the machines are told."""
        config = {
            "task": task.name, "folder": str(store.absolute(self.journal.task_folder(task))), "zone": task.place,
            "project": self.gcloud.project, "runs": list(task.runs), "archive": self.archive,
            "words": list(self.words), "python": self.settings.python, "speed": self.settings.speed,
        }  # fmt: skip
        return {"startup-script": STARTUP.read_text(), "lab-config": store.text(config)}

    def creation(self, task: Task, files: Mapping[str, Path]) -> list[str]:
        """The words that ask for a task's machines."""
        chosen, labels = self.settings, {"lab-sweep": task.name.split("-")[1], "lab-task": str(task.number)}
        nodes = ("--node-id", task.name)
        if chosen.slices > 1:
            nodes = ("--node-count", str(chosen.slices), "--node-prefix", task.name)
        optional = {
            "--valid-until-duration": chosen.valid_for, "--network": chosen.network, "--subnetwork": chosen.subnetwork,
            "--service-account": chosen.service_account,
        }  # fmt: skip
        return [
            *REQUEST, "create", task.name, "--zone", task.place, *nodes,
            "--accelerator-type", chosen.where.accelerator_type,
            "--runtime-version", chosen.runtime or RUNTIMES[chosen.where.chip.name],
            *({"spot": ["--spot"], "reserved": ["--reserved"]}.get(chosen.provisioning, [])),
            *(f"{name}={value}" for name, value in optional.items() if value),
            *(["--internal-ips"] if chosen.internal else []),
            # once each: a second one would replace the first
            "--labels=" + ",".join(f"{name}={value}" for name, value in labels.items()),
            "--metadata-from-file=" + ",".join(f"{name}={path}" for name, path in files.items()),
        ]  # fmt: skip

    # --- poll --------------------------------------------------------------------------------------

    def poll(self, task: Task) -> Report:
        request = self._described(*REQUEST, task=task, name=task.name)
        state = str(request["state"]["state"]) if request else "absent"
        if state in PENDING or (state == "absent" and self._unseen(task)):
            return Report("pending", state if request else "")
        gone = self._machine_gone(task) if state == "ACTIVE" else ""
        folder = self.journal.task_folder(task)
        hosts = Hosts.read(folder, self._hosts(task))  # after the machines: they speak before they go
        codes, words = hosts.codes(task.runs), hosts.words(task.runs)
        if hosts.done and not hosts.left:
            return Report("ended", "done", codes, details=words, began=hosts.began, until=hosts.newest)
        # what hosts leave with while their slice is taken away, one after the other, says nothing of the run
        finished = {run: code for run, code in codes.items() if code == 0}
        if (failed := setup_failure(folder)) is not None:
            return Report("failed", failed, finished)
        lost, never = "", task.active is None and not hosts.said
        if state in ("FAILED", "SUSPENDING", "SUSPENDED", "absent"):
            reason = (request or {}).get("state", {}).get("failedData", {}).get("error", {}).get("message", "")
            lost = f"{SEEN if request else ABSENT} {state}" + (f": {reason}" if reason else "")
            if never and state != "SUSPENDED":
                return Report("declined" if request else "absent", lost)
        elif state == "ACTIVE":
            lost = gone or ("its hosts saved and left" if hosts.done else "")
        if not lost and (silent := self._silent(task, hosts)):
            lost = f"host {silent[0]} has given no sign of life for {self.settings.silence:g} minutes"
        if lost:
            return Report("lost", lost, finished, hosts.current, began=hosts.began, until=hosts.newest)
        late = task.active is not None and time.time() - task.active > self.settings.start * 60
        if hosts.missing and (late or hosts.alone()):
            named = ", ".join(map(str, hosts.missing[:10]))
            return Report("failed", f"host {named} of {hosts.count} did not come up", finished, hosts.current)
        phase = hosts.phase if hosts.said else state
        return Report("active", phase, codes, hosts.current, words, began=hosts.began)

    def _silent(self, task: Task, hosts: Hosts) -> list[int]:
        """Hosts not through whose last sign of life has not changed for long, by this machine's clock, not theirs."""
        now, limit = time.monotonic(), 60 * self.settings.silence
        found = []
        for index, sign in hosts.signs.items():
            known = self._signs.setdefault((task.name, index), (sign, now))
            if known[0] != sign:
                self._signs[task.name, index] = (sign, now)
            elif now - known[1] > limit:
                found.append(index)
        return found

    def _unseen(self, task: Task) -> bool:
        """Whether its request may have been made and not be found yet."""
        if task.active is not None or time.time() - task.created > UNSEEN:
            return False
        seen = any(detail in PENDING or detail.startswith(SEEN) for _, _, detail in task.history)
        return not seen and not Hosts.read(self.journal.task_folder(task), 1).said

    def _hosts(self, task: Task) -> int:
        return int(task.extra.get("hosts") or self.settings.hosts)

    def _described(self, *group: str, task: Task, name: str) -> dict[str, Any] | None:
        """None where gcloud says that there is none of that name."""
        try:
            return self.gcloud.json(*group, "describe", name, "--zone", task.place)
        except NotFound:
            return None
        except Refused as error:  # too many questions, or one that it does not take now: nothing is known
            raise Unreachable(str(error)) from error

    def _machine_gone(self, task: Task) -> str:
        """What became of a machine of an active request, where one is gone: the request learns of it later."""
        many = self.settings.slices
        for node in [task.name] if many == 1 else [f"{task.name}-{i}" for i in range(many)]:
            machine = self._described("compute", "tpus", "tpu-vm", task=task, name=node)
            if machine is None or machine["state"] in GONE:
                return f"the machine {node} is {machine['state'] if machine else 'gone'}"
        return ""

    # --- the rest ----------------------------------------------------------------------------------

    def cancel(self, task: Task) -> bool:
        """Deletes the request, once; then waits until it is gone."""
        request = self._described(*REQUEST, task=task, name=task.name)
        if request is None:
            return not self._unseen(task)  # it would be left alone for ever
        if request["state"]["state"] != "DELETING":
            with contextlib.suppress(NotFound, Refused):  # not while it changes its state: the next time
                self.gcloud.run(*deletion(task.name, task.place))
        return False

    def logs(self, task: Task, run: str) -> list[Path]:
        folder = self.journal.task_folder(task)
        return [folder / f"{run}.host-{i}.log" for i in range(self._hosts(task))]

    def preview(self, task: Task) -> str:
        """Every command and file that would be sent for a task."""
        told = self.metadata(task)
        command = shown(self.gcloud.words(*self.creation(task, {name: Path(name) for name in told})))
        return "\n".join([f"$ {command}", *(f"--- {name}\n{text.rstrip()}" for name, text in told.items())])

    def interrupt(self, tasks: Sequence[Task]) -> str:
        return "the slices go on; the same command follows them again, lab cancel ends them"


def requests(gcloud: Gcloud, zones: Sequence[str]) -> list[tuple[str, str, str]]:
    """(zone, name, state) of every request in the zones that a sweep has made."""
    found = []
    for zone in zones:
        for one in gcloud.json(*REQUEST, "list", "--zone", zone) or ():
            if re.fullmatch(r"lab-[0-9a-f]{8}-\d+", name := one["name"].rsplit("/", 1)[-1]):
                found.append((zone, name, str(one.get("state", {}).get("state"))))
    return found


def setup_failure(folder: Path) -> str | None:
    """What a startup script that failed has told, if one has."""
    for name in store.names(folder):
        if name.startswith("setup-") and name.endswith(".json"):
            log = store.read((folder / name).with_suffix(".log")) or ""
            lines = [line.strip() for line in log.splitlines() if line.strip()]
            return f"the startup script failed: {' | '.join(lines[-3:])}"
    return None
