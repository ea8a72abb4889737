# SPDX-License-Identifier: Apache-2.0
"""Stands for ``lab run`` where tests want many runs in little time: it counts steps, saves every fifth, goes on from
there, and says so if it ever meets itself.

    python standin.py RUNS --only NAME        # NAME may end in -bug or -refused
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS, SECONDS = 40, 0.02


def main() -> int:
    runs, name = Path(sys.argv[1]), sys.argv[sys.argv.index("--only") + 1]
    host, folder = int(os.environ.get("JAX_PROCESS_ID", "0")), runs / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".alive-{host}").open("w") as alive:
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (folder / "twice").write_text(f"host {host}")
            return 1
        return run(folder, host, name)


def run(folder: Path, host: int, name: str) -> int:
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    if (folder / "result.json").exists():
        return 0
    saved, lines = folder / f"saved-{host}", folder / "metrics.jsonl"
    begin = int(saved.read_text()) if saved.exists() else 0
    with (folder / f"starts-{host}").open("a") as file:
        file.write(f"{begin}\n")
    if host == 0:
        kept = lines.read_text().splitlines()[:begin] if lines.exists() else []
        write(lines, "".join(line + "\n" for line in kept))
    for step in range(begin + 1, STEPS + 1):
        time.sleep(SECONDS)
        if host == 0:
            with lines.open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1.0 / step}) + "\n")
        if step % 5 == 0 or asked:
            write(saved, str(step))
        if asked:
            return 143
        if step == 23 and name.endswith("-bug"):
            raise ValueError("a bug of its own")
        if step == 3 and name.endswith("-refused"):
            print("lab: error: The learning rate is a fish: give a number.", file=sys.stderr)
            return 2
    if host == 0:
        write(folder / "result.json", json.dumps({"status": "finished", "loss": 1.0 / STEPS}))
    return 0


def write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
