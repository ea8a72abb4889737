# SPDX-License-Identifier: Apache-2.0
"""Sets up the stand-in for Google Cloud, and looks into it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT


class Cloud:
    """A cloud in a folder. hosts: of each request; environment: of its machines."""

    def __init__(self, folder: Path, *, hosts: int, environment: dict[str, str]) -> None:
        self.folder = folder
        for name in ("requests", "deleted", "bin"):
            (folder / name).mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps({"hosts": hosts, "environment": environment}))
        gcloud = folder / "bin" / "gcloud"
        gcloud.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "tests" / "launch" / "fake_cloud.py"}" "$@"\n')
        gcloud.chmod(0o755)
        (folder / "bin" / "python3").symlink_to(sys.executable)
        self.environment = os.environ | {
            "FAKE_CLOUD": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def disturb(self, *what: dict) -> None:
        (self.folder / "disturb.json").write_text(json.dumps(what))

    @property
    def left_to_disturb(self) -> list[dict]:
        return json.loads((self.folder / "disturb.json").read_text())

    @property
    def requests(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "requests").iterdir())

    @property
    def commands(self) -> list[list[str]]:
        path = self.folder / "commands.jsonl"
        return [json.loads(line)["words"] for line in path.read_text().splitlines()] if path.exists() else []

    def console(self) -> str:
        """What the machines have said, for when a test fails."""
        found = sorted(self.folder.rglob("startup.log")) + sorted(self.folder.rglob("console.log"))
        return "\n".join(f"=== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in found)

    def wait_until_empty(self, seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while self.requests and time.monotonic() < until:
            time.sleep(0.05)
        assert self.requests == []

    def close(self) -> None:
        """Ends what a test has left running."""
        for name in self.requests:
            (self.folder / "requests" / name / "delete").touch()
        self.wait_until_empty()


def lab(cloud: Cloud, runs: Path, *words: str, **more: str) -> subprocess.CompletedProcess:
    """The command, with the cloud's gcloud first on PATH."""
    command = [sys.executable, "-m", "launch.cli", "--runs", str(runs), *words]
    return subprocess.run(
        command, cwd=ROOT, env=cloud.environment | more, capture_output=True, text=True, timeout=500
    )  # fmt: skip
