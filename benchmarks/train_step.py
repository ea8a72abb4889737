# SPDX-License-Identifier: Apache-2.0
"""The library's training step against bare JAX, in one run.

    python -m benchmarks.train_step [--rounds 15]

Steps of three programs on the same tokens are taken in turn: the library's, the bare step written for this one
model (``bare_step``), and the bare step as a textbook would write it. Then the library's whole loop (data,
metrics, logging) runs on the standard library's text, and its step time is held against its own step alone.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

from launch import host

host.expect_no_tpu()
host.keep_memory()  # before JAX is loaded, as `lab` does

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import bare_step  # noqa: E402
from benchmarks.bare_step import SIZES  # noqa: E402
from launch import host  # noqa: E402
from research.core import sharding  # noqa: E402
from research.core.sharding import MeshSpec  # noqa: E402
from research.data.pipeline import TextSource  # noqa: E402
from research.data.sources import Stdlib  # noqa: E402
from research.data.tokenizers import SentencePiece  # noqa: E402
from research.models.attention import Attention  # noqa: E402
from research.models.decoder import Decoder  # noqa: E402
from research.models.mlp import Mlp  # noqa: E402
from research.objectives.next_token import NextToken  # noqa: E402
from research.train import loop  # noqa: E402
from research.train.experiment import AdamW, CheckpointPolicy, Experiment, Steps  # noqa: E402
from research.train.hardware import measure_matmul_rate  # noqa: E402
from research.train.start import Program  # noqa: E402


def experiment(steps: int = 30) -> Experiment:
    """The model of the comparison: vocabulary 8192, width 256, 4 layers of 4 heads, SwiGLU 688."""
    return Experiment(
        name="w1",
        model=Decoder(
            vocab_size=SIZES["vocab"],
            d_model=SIZES["d_model"],
            num_layers=SIZES["layers"],
            attention=Attention(num_heads=SIZES["heads"]),
            mlp=Mlp(d_ff=SIZES["d_ff"]),
            layers="unrolled",
        ),
        objective=NextToken(),
        source=TextSource(
            corpus=Stdlib(),
            tokenizer=SentencePiece(vocab_size=SIZES["vocab"]),
            batch_size=SIZES["batch"],
            sequence_length=SIZES["length"],
        ),
        optimizer=AdamW(peak=3e-4, clip=0.0),
        length=Steps(steps),
        mesh=MeshSpec(data=1),
        checkpoint=CheckpointPolicy(every=0),
        log_every=1,
    )


def sweep() -> dict[str, Experiment]:
    """So that this file is a study too: ``lab run benchmarks/train_step.py --only w1``."""
    return {"w1": experiment()}


def packed_batch(mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Random tokens in rows of one document each, as the bare step takes them."""
    rng = np.random.default_rng(1)
    shape = (SIZES["batch"], SIZES["length"])
    tokens = rng.integers(0, SIZES["vocab"], (shape[0], shape[1] + 1), np.int32)
    host_batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32)[None], shape),
        "target_bytes": np.ones(shape, np.float32),
    }
    return {name: jax.device_put(x, sharding.batch_sharding(mesh)) for name, x in host_batch.items()}


class Racer:
    """One program, its state, and the seconds of each step it has taken."""

    def __init__(self, name, step, state):
        self.name, self.step, self.state, self.seconds = name, step, state, []
        self.once()
        self.seconds.clear()

    def once(self):
        begun = time.perf_counter()
        self.state, _ = self.step(self.state)
        jax.block_until_ready(self.state)
        self.seconds.append(time.perf_counter() - begun)


def racers() -> list[Racer]:
    spec = experiment()
    mesh = sharding.make_mesh(spec.mesh)
    batch = packed_batch(mesh)
    jax.set_mesh(mesh)
    program = Program(spec, mesh)
    scanned = Program(dataclasses.replace(spec, model=dataclasses.replace(spec.model, layers="scanned")), mesh)
    found = [
        Racer("library", lambda state: program.step(state, {}, batch, np.float32(3e-4)), program.fresh()),
        Racer("library, scanned", lambda state: scanned.step(state, {}, batch, np.float32(3e-4)), scanned.fresh()),
    ]
    for name, plain in (("bare", False), ("bare, textbook", True)):
        step = bare_step.make_step(plain=plain)
        found.append(
            Racer(name, lambda state, step=step: step(state, batch["tokens"], batch["targets"]), bare_step.start())
        )
    return found


def loop_share(library: Racer) -> float:
    """Median step of the whole loop over the median of its step alone, taken just before and just after."""
    with tempfile.TemporaryDirectory() as folder:
        library.seconds.clear()
        for _ in range(8):
            library.once()
        loop.run(experiment(), Path(folder) / "w1", loop.Options(cache_dir=host.cache_dir()))
        for _ in range(8):
            library.once()
        lines = (Path(folder) / "w1" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step_seconds"] for line in lines][2:]
    return statistics.median(steps) / statistics.median(library.seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    all_racers, rates = racers(), []
    for _ in range(rounds):
        rates.append(measure_matmul_rate(jax.devices()[0], repeats=1))
        for racer in all_racers:
            racer.once()
    rate, tokens = statistics.median(rates), SIZES["batch"] * SIZES["length"]
    flops = experiment().flops_per_token
    bare = next(r for r in all_racers if r.name == "bare")
    print(f"float32 matmul 2048^3: {rate / 1e9:.0f} GFLOP/s; {tokens} tokens a step, median of {rounds} rounds")
    for racer in all_racers:
        speed = tokens / statistics.median(racer.seconds)
        ratio = statistics.median(b / r for b, r in zip(bare.seconds, racer.seconds, strict=True))
        print(f"{racer.name:18s} {speed:7,.0f} tokens/s, {speed * flops / rate:4.0%} of it, {ratio:.2f} x bare")
    print(f"whole loop: {loop_share(all_racers[0]):.3f} x the library's step alone")


if __name__ == "__main__":
    main()
