# SPDX-License-Identifier: Apache-2.0
"""``--on sky``: each run is a managed job of SkyPilot, an engine that finds capacity, recovers and retries by itself.

Ours is the translation: of a run to a task, of SkyPilot's states to ours. It needs the extra ``sky`` here, and an API
server of SkyPilot's with access to the cloud (docs/tpu.md).
"""

import contextlib
import io
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch import store
from launch.executor import Report, Stop, Unreachable
from launch.journal import AGAIN, ALONE, STALLED, Journal, Task
from launch.tpu_vm import RUNTIMES, Settings
from research.core.errors import UserError

# of SkyPilot's ManagedJobStatus, by name
PENDING = ("PENDING", "SUBMITTED", "DEPRECATED_SUBMITTED", "STARTING", "RECOVERING")
ACTIVE = ("RUNNING", "WINDING_DOWN", "CANCELLING")
FAILED = ("FAILED_PRECHECKS", "FAILED_NO_RESOURCE", "FAILED_CONTROLLER")
ASKED_EVERY = 5.0  # seconds that one answer of the queue is good for
CODE = "~/code.tar.gz"
SETUP = f"""set -e
[ -e ~/lab/.installed ] || {{
  mkdir -p ~/lab && tar -xzf {CODE} -C ~/lab && cd ~/lab
  python3 -m pip install -q --user uv
  python3 -m uv venv -q --clear --python 3.12 .venv
  python3 -m uv pip install -q --python .venv/bin/python -c constraints.txt '.[tpu,gcs]' && touch .installed
}}"""


@dataclass
class Sky:
    """archive: of the code, in a bucket. words: of Python, that run a run, before ``--only NAME``. retries: of a run
    that crashes, by SkyPilot."""

    journal: Journal
    settings: Settings
    archive: str
    words: Sequence[str]
    retries: int = 1
    name: str = "sky"
    packs: bool = False
    _queue: tuple[float, dict[str, Any]] = field(default=(0.0, {}))

    @property
    def chips(self) -> int:
        return self.settings.where.chips * self.settings.slices

    def places(self, tasks: Sequence[Task], last: Task | None) -> str | None:
        return "sky"

    # --- the translation ---------------------------------------------------------------------------

    def job(self, task: Task) -> dict[str, Any]:
        """The task as SkyPilot's YAML has it."""
        chosen, (run,) = self.settings, task.runs
        # v5litepod-16 as Google writes it, after SkyPilot's own prefix; a slice is one node, whatever hosts it has
        accelerator = f"tpu-{chosen.where.accelerator_type}"
        runtime = chosen.runtime or RUNTIMES[chosen.where.chip.name]
        resources: dict[str, Any] = {
            "accelerators": {accelerator: 1},
            "accelerator_args": {"runtime_version": runtime, "tpu_vm": True},
            "use_spot": chosen.provisioning == "spot",
            "job_recovery": {
                "strategy": "FAILOVER" if len(chosen.zones) == 1 else "EAGER_NEXT_REGION",
                "max_restarts_on_errors": self.retries,
                # saved and left, stalled, or without its other hosts: again, however often
                "recover_on_exit_codes": [STALLED, ALONE, *AGAIN],
            },
        }
        zones = [f"gcp/{zone.rsplit('-', 1)[0]}/{zone}" for zone in chosen.zones]
        where = {"infra": zones[0]} if len(zones) == 1 else {"any_of": [{"infra": zone} for zone in zones]}
        return {
            "name": task.name,
            "num_nodes": 1,
            "resources": {**resources, **(where if zones else {"infra": "gcp"})},
            "file_mounts": {CODE: self.archive},
            "setup": SETUP,
            "run": "cd ~/lab && exec .venv/bin/python " + shlex.join([*self.words, "--only", run]),
        }

    def preview(self, task: Task) -> str:
        import yaml

        return yaml.safe_dump(self.job(task), sort_keys=False).rstrip()

    # --- the executor ------------------------------------------------------------------------------

    def submit(self, task: Task) -> dict[str, Any]:
        store.write(self.journal.task_folder(task) / "task.yaml", self.preview(task))
        if self._found(task, fresh=True) is not None:  # by a process that died before it could write it down
            return {}
        sky, asked = library(), self.journal.task_folder(task) / "request.json"
        # SkyPilot takes minutes to bring up its controller, in which no queue knows of the job: its request does
        if (known := store.read_json(asked)) is None:
            made = sky.Task.from_yaml_config(self.job(task))
            known = {"request": str(_reached(lambda: sky.jobs.launch(made, name=task.name)))}
            store.write(asked, store.text(known))
        _reached(lambda: sky.get(known["request"]))
        self._queue = (0.0, {})
        return {}

    def poll(self, task: Task) -> Report:
        found = self._found(task)
        if found is None:
            return Report("absent", "SkyPilot has no job of that name")
        (run,), status = task.runs, name_of(found.status)
        reason = " ".join(str(getattr(found, "failure_reason", None) or "").split())[:300]
        again = getattr(found, "recovery_count", None)
        told = status.lower() + (f", recovered {again} times" if again else "")
        if status in PENDING:
            # one that recovers has been active: it goes on being charged to this task
            return Report("active" if task.active is not None else "pending", told, current=run)
        if status in ACTIVE:
            return Report("active", told, current=run)
        if status == "SUCCEEDED":
            return Report("ended", told, {run: 0})
        if status == "CANCELLED":
            return Report("lost", "it was cancelled in SkyPilot", current=run)
        if status in FAILED:
            condition = "declined" if status == "FAILED_NO_RESOURCE" else "failed"
            return Report(condition, f"{told}: {reason}" if reason else told)
        # SkyPilot has tried as often as it was to: it is not tried again here
        return Report("ended", told, {run: 2}, details={run: reason or told})

    def cancel(self, task: Task) -> bool:
        found = self._found(task, fresh=True)
        if found is None or name_of(found.status) not in (*PENDING, *ACTIVE):
            return True
        sky = library()
        _answered(sky, lambda: sky.jobs.cancel(name=task.name))
        return False

    def logs(self, task: Task, run: str) -> list[Path]:
        """Fetched from SkyPilot into the task's folder."""
        place, text = self.journal.task_folder(task) / f"{run}.log", io.StringIO()
        sky = library()
        with contextlib.suppress(ValueError):  # there are none yet
            _reached(lambda: sky.jobs.tail_logs(name=task.name, follow=False, output_stream=text))
        store.write(place, text.getvalue())
        return [place]

    def interrupt(self, tasks: Sequence[Task]) -> str:
        return "the jobs go on in SkyPilot; the same command follows them again, lab cancel ends them"

    def _found(self, task: Task, *, fresh: bool = False) -> Any:
        """SkyPilot's newest record of a task, or None."""
        asked, jobs = self._queue
        if fresh or time.monotonic() - asked > ASKED_EVERY:
            sky, name = library(), f"lab-{task.name.split('-')[1]}-"
            records, *_ = _answered(
                sky, lambda: sky.jobs.queue_v2(refresh=False, name_match=name, fields=None, all_users=True)
            )
            jobs = {}
            for record in sorted(records, key=lambda record: record.job_id or 0):
                jobs[record.job_name] = record
            self._queue = (time.monotonic(), jobs)
        return jobs.get(task.name)


def name_of(status: Any) -> str:
    """Of one of SkyPilot's states."""
    return str(getattr(status, "name", status))


def library() -> Any:
    """SkyPilot. Raises UserError where it is not installed."""
    if find_spec("sky") is None:
        raise UserError("--on sky needs SkyPilot: pip install -c constraints.txt -e '.[sky]'.")
    return import_module("sky")


def _answered(sky: Any, ask: Any) -> Any:
    """What the API server answers to a request."""
    return _reached(lambda: sky.get(ask()))


def _reached(ask: Any) -> Any:
    """Raises Unreachable where there is no API server to be reached."""
    try:
        return ask()
    except (ConnectionError, TimeoutError) as error:
        raise Unreachable(" ".join(str(error).split())[:300]) from error
    except RuntimeError as error:  # as SkyPilot says that there is no server, or none that it may use
        text = " ".join(str(error).split())[:300]
        raise Unreachable(text, mend="start or log in to an API server (`sky api login`, `sky api start`)") from error
    except Exception as error:
        if type(error).__module__.startswith("sky"):
            raise Stop(f"SkyPilot refuses: {' '.join(str(error).split())[:300]}") from error
        raise
