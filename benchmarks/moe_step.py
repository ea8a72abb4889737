# SPDX-License-Identifier: Apache-2.0
"""The training step with experts against the dense one with the same active FLOPs, in one run.

    python -m benchmarks.moe_step [--rounds 15]

Steps are taken in turn: the dense model of ``train_step`` (SwiGLU 688), and the same with 8 experts of half the
width of which each token goes through two, dropless and with buffers of capacity 1.25.
"""

import argparse
import dataclasses
import statistics

import jax  # noqa: I001
import numpy as np

from benchmarks.train_step import SIZES, Racer, experiment, packed_batch  # first: it settles how memory is kept
from research.core import sharding
from research.models.moe import Moe
from research.models.routers import TopK
from research.train.hardware import measure_matmul_rate
from research.train.start import Program

EXPERTS, CHOSEN = 8, 2
WIDTH = SIZES["d_ff"] // CHOSEN


def racers() -> list[Racer]:
    spec = experiment()
    mesh = sharding.make_mesh(spec.mesh)
    batch = packed_batch(mesh)
    jax.set_mesh(mesh)
    layers = {
        "dense": spec.model.mlp,
        "experts, dropless": Moe(EXPERTS, WIDTH, TopK(CHOSEN)),
        "experts, capacity 1.25": Moe(EXPERTS, WIDTH, TopK(CHOSEN, capacity_factor=1.25), dispatch="buffers"),
    }
    found = []
    for name, layer in layers.items():
        program = Program(dataclasses.replace(spec, model=dataclasses.replace(spec.model, mlp=layer)), mesh)
        step = lambda state, program=program: program.step(state, {}, batch, np.float32(3e-4))  # noqa: E731
        found.append(Racer(name, step, program.fresh()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    all_racers, rates = racers(), []
    for _ in range(rounds):
        rates.append(measure_matmul_rate(jax.devices()[0], repeats=1))
        for racer in all_racers:
            racer.once()
    tokens, dense = SIZES["batch"] * SIZES["length"], all_racers[0]
    rate = statistics.median(rates) / 1e9
    print(f"float32 matmul 2048^3: {rate:.0f} GFLOP/s; {tokens} tokens a step, median of {rounds} rounds")
    for racer in all_racers:
        ratio = statistics.median(d / r for d, r in zip(dense.seconds, racer.seconds, strict=True))
        print(f"{racer.name:24s} {tokens / statistics.median(racer.seconds):7,.0f} tokens/s, {ratio:.2f} x dense")


if __name__ == "__main__":
    main()
