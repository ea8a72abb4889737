# SPDX-License-Identifier: Apache-2.0
"""Seconds from the command to the first loss, against the bare step's own start.

    python -m benchmarks.startup [--rounds 3]

Both in fresh processes, in turn: with the compilation cache empty ("cold") and filled ("warm"). Corpus and
tokenizer are cached beforehand. The model is that of ``train_step``.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import sys
from launch import host
host.expect_no_tpu()
host.keep_memory()
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
import numpy as np
from benchmarks import bare_step
tokens = np.random.default_rng(0).integers(0, 8192, (8, 513), np.int32)
state, loss = bare_step.make_step()(bare_step.start(), tokens[:, :-1], tokens[:, 1:])
print("step 1/", float(loss), flush=True)
"""
ROOT = Path(__file__).resolve().parents[1]


def seconds_to_first_loss(arguments: list[str], environment: dict[str, str]) -> float:
    """Starts a process, waits for its line of step 1, and ends it."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "step 1/" in line:
            taken = time.perf_counter() - begun
            process.kill()
            process.wait()
            return taken
    raise SystemExit("no first loss:\n" + "".join(said))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    from launch.host import cache_dir

    taken: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        if cache_dir().exists():  # corpora and tokenizers, not compiled programs
            for entry in cache_dir().iterdir():
                if entry.name != "xla":
                    (cache / entry.name).symlink_to(entry)
        environment = {**os.environ, "LAB_CACHE": str(cache)}
        for number in range(rounds + 1):  # the first round fills the corpus cache and is not counted
            for state in ("cold", "warm"):
                for name in ("bare", "lab run"):
                    programs = Path(folder) / f"{name}-{number}" if name == "bare" else cache / "xla"
                    if state == "cold" and name == "lab run":
                        subprocess.run(["rm", "-rf", str(programs)], check=True)
                    runs = Path(folder) / f"runs-{number}-{state}"
                    arguments = ["-c", BARE, str(programs)] if name == "bare" else [
                        "-m", "launch.cli", "--runs", str(runs), "run", "benchmarks/train_step.py", "--only", "w1",
                    ]  # fmt: skip
                    value = seconds_to_first_loss(arguments, environment)
                    if number:
                        taken.setdefault((state, name), []).append(value)
    for state in ("cold", "warm"):
        bare, lab = (statistics.median(taken[state, name]) for name in ("bare", "lab run"))
        print(f"{state} compilation cache: lab run {lab:.1f} s, bare {bare:.1f} s, difference {lab - bare:+.1f} s")


if __name__ == "__main__":
    main()
