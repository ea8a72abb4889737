# SPDX-License-Identifier: Apache-2.0
"""A submitting process for tests, to be killed: follows a sweep of stand-in runs on worker processes or TPU VMs.

python submitter.py local|tpu-vm RUNS SECONDS NAME...     # SECONDS: before a second attempt
"""

import sys
import time
from pathlib import Path

from launch import bundle, store
from launch.controller import Controller, Wanted, summary
from launch.gcloud import Gcloud
from launch.journal import Journal, Patience
from launch.locks import Busy, locked
from launch.tpu_vm import Settings, TpuVm
from launch.workers import Workers
from research.core.chips import slice_of
from tests.conftest import ROOT

STANDIN = str(ROOT / "tests" / "launch" / "standin.py")


def say(text: str) -> None:
    print(f"{time.time():.2f} {text}", flush=True)


def executor(kind: str, journal: Journal, runs: Path):
    if kind == "local":
        return Workers(journal, [sys.executable, STANDIN, str(runs)], 2)
    place = journal.folder / "code.tar.gz"
    if not place.exists():
        store.write(place, bundle.archive({f"launch/{p.name}": p for p in (ROOT / "launch").glob("*.py")}))
    settings = Settings(slice_of("v5p-16"), ("zone-a", "zone-b"), python=sys.executable, speed=20.0)
    return TpuVm(journal, Gcloud(timeout=10.0), settings, str(place.absolute()), [STANDIN, str(runs)])


def main() -> None:
    kind, runs, names = sys.argv[1], Path(sys.argv[2]).absolute(), sys.argv[4:]
    journal = Journal(runs)
    while True:
        try:
            with locked(journal.folder):
                sweep = journal.begin({"runs": names, "on": kind})
                wanted = [Wanted(name, 1.0, (runs / name / "result.json").exists) for name in names]
                patience = Patience(backoff=float(sys.argv[3]))
                controller = Controller(journal, sweep, executor(kind, journal, runs), wanted, 2, patience, say)
                while controller.step():
                    time.sleep(0.02)
                say(summary(controller.states()))
                return
        except Busy:  # of a process that was killed: its lock goes with it
            time.sleep(0.02)


if __name__ == "__main__":
    main()
