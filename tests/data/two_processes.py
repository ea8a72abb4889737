# SPDX-License-Identifier: Apache-2.0
"""One stream in two processes of four devices each: what every process holds and what it builds."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from research.core.sharding import MeshSpec, make_mesh
from research.core.types import Context

ROOT = Path(__file__).resolve().parents[2]
SPECS = (MeshSpec(data=8), MeshSpec(data=2, fsdp=2, tensor=2))
STEPS = 2


def run(source, context: Context, folder: Path) -> list[dict]:
    """The records of both processes: by mesh the shards (step, name, index, data) and the rows assembled."""
    (folder / "given").write_bytes(pickle.dumps((source, context.seed, context.cache_dir)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    children = []
    try:
        for number in (0, 1):
            with (folder / f"log{number}").open("w") as log:
                command = [sys.executable, __file__, str(port), str(number), str(folder)]
                children.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log))
        codes = [child.wait(timeout=180) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert codes == [0, 0], "\n".join((folder / f"log{number}").read_text() for number in (0, 1))
    return [pickle.loads((folder / f"record{number}").read_bytes()) for number in (0, 1)]


def main(port: str, number: str, folder: Path) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
    source, seed, cache_dir = pickle.loads((folder / "given").read_bytes())
    record = {}
    for spec in SPECS:
        stream = source.start(Context(mesh=make_mesh(spec), seed=seed, cache_dir=cache_dir))
        shards, built = record["shards", spec], record["built", spec] = [], []
        assemble = stream.assemble
        stream.assemble = lambda start, stop, a=assemble, b=built: b.append((start, stop)) or a(start, stop)
        for step in range(STEPS):
            for name, array in stream.next(None, step).items():
                shards += [(step, name, shard.index, np.asarray(shard.data)) for shard in array.addressable_shards]
        stream.close()
    (folder / f"record{number}").write_bytes(pickle.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
