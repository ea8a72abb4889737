# SPDX-License-Identifier: Apache-2.0
"""A decoding step of Llama-2-7B compiled ahead of time for four TPU chips: what each reads from its memory.

    python -m benchmarks.decode_program [--cache bfloat16] [--slots 32] [--length 2048] [--tpu v5e:2x2]

Needs libtpu and no TPU. Weights are bfloat16, split over the chips as ``tensor``. Bytes of HBM are counted over the
compiled program's text (``research.core.hlo_cost``), a loop's body as often as it runs: those that every instruction
outside a fusion reads and writes, of a slice what is sliced, of a write in place what is written. Beside them stands
the floor: each weight but the embedding's once, and every slot of the cache once.
"""

import argparse
import json
import math
import os
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from research.core import hlo_cost, sharding  # noqa: E402
from research.core.hlo import Program  # noqa: E402
from research.core.sharding import MeshSpec  # noqa: E402
from research.core.types import Precision  # noqa: E402
from research.infer import ahead  # noqa: E402
from research.infer.generate import Settings  # noqa: E402
from research.infer.sampling import sampling  # noqa: E402
from research.models.cache import CacheSpec  # noqa: E402
from research.models.families.llama import llama2_7b  # noqa: E402
from research.train.ahead import compiler_version, topology_devices  # noqa: E402

PRECISION = Precision(params="bfloat16", compute="bfloat16")


def measure(tpu: str, cache: str, slots: int, length: int) -> dict[str, Any]:
    """Of one chip, in bytes."""
    model, devices = llama2_7b(), topology_devices(tpu)
    settings = Settings(sampling(temperature=0), stop=(2,), cache=CacheSpec(dtype=cache))
    mesh, sizes = sharding.make_mesh(MeshSpec(data=1, tensor=len(devices)), devices), dict(slots=slots, length=length)
    lowered = ahead.lower_decode_step(model, mesh, PRECISION, settings, **sizes)
    begun = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - begun
    counts, memory = hlo_cost.count(Program(compiled.as_text())), compiled.memory_analysis()
    params = model.bind_shapes(mesh, PRECISION).params
    given = ahead.slots_of_shapes(model, mesh, PRECISION, settings, **sizes)
    assert memory is not None
    return {
        "hbm_bytes": counts.hbm_bytes,
        "weight_bytes": per_chip(params) - per_chip(params["embedding"]),
        "cache_bytes": per_chip(given.cache.layers),
        "peak_bytes": memory.peak_memory_in_bytes,
        "unknown_loops": len(counts.unknown),
        "compilers_figure": compiled.cost_analysis()["bytes accessed"],
        "seconds": seconds,
        "libtpu": compiler_version(),
    }


def per_chip(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", default="v5e:2x2", help="a topology, default %(default)s")
    parser.add_argument("--cache", default="int8", choices=("int8", "bfloat16"), help="default %(default)s")
    parser.add_argument("--slots", type=int, default=32, help="sequences at a time, default %(default)s")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each, default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    found = measure(options.tpu, options.cache, options.slots, options.length)
    if options.json:
        print(json.dumps(found))
        return
    floor = found["weight_bytes"] + found["cache_bytes"]
    print(
        f"{found['hbm_bytes'] / 1e9:.3f} GB of HBM a step and chip: {found['hbm_bytes'] / floor:.3f} times weights "
        f"({found['weight_bytes'] / 1e9:.3f}) and cache ({found['cache_bytes'] / 1e9:.3f}) read once; peak "
        f"{found['peak_bytes'] / 1e9:.2f} GB; compiled in {found['seconds']:.0f} s by libtpu {found['libtpu']}, whose "
        f"own count is {found['compilers_figure'] / 1e9:.3f} GB"
    )


if __name__ == "__main__":
    main()
