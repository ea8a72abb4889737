# SPDX-License-Identifier: Apache-2.0
"""Training steps of published models compiled ahead of time for TPUs: what each chip holds and sends.

    python -m benchmarks.tpu_programs [NAME ...]

Needs libtpu and no TPU. Each program is compiled in a process of its own (a minute or a few). Weights and Adam moments
are float32, products bfloat16, layers scanned, attention by the splash kernels. Memory and traffic are those of one
chip; of a kind of collective the table says the bytes of one turn of each loop times its trips. FLOPs are the analytic
ones of one step, per chip (``research.scaling.cost``: full squares of attention scores, no recomputation); beside them
those of the compiled program, recomputation and kernels in them, and its bytes of HBM (``research.core.hlo_cost``).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.llama2_7b import MODEL as LLAMA_2_7B
from research.core import hlo_cost
from research.core.hlo import BETWEEN, KINDS, Program
from research.core.sharding import MeshSpec
from research.core.types import Precision, UserError
from research.data.pipeline import TextSource
from research.data.sources import Synthetic
from research.data.tokenizers import Bytes
from research.models.decoder import Decoder
from research.models.families.llama import llama3_8b
from research.models.families.mixtral import mixtral_8x7b
from research.objectives.next_token import NextToken
from research.train import ahead
from research.train.experiment import AdamW, Experiment, Steps

LLAMA_3_8B = replace(llama3_8b(), remat="full")
MIXTRAL_8X7B = replace(mixtral_8x7b(), remat="full")  # dropless


@dataclass(frozen=True)
class Planned:
    """One program: a model on all chips of a topology. rows: sequences of the whole batch. slices: of that topology,
    joined by a data-centre network; chips: of all of them."""

    model: Decoder
    topology: str
    mesh: MeshSpec
    chips: int
    rows: int
    length: int = 4096
    slices: int = 1

    @property
    def tokens(self) -> int:
        """Of one chip."""
        return self.rows * self.length // self.chips

    def experiment(self, name: str) -> Experiment:
        source = TextSource(
            corpus=Synthetic(), tokenizer=Bytes(), batch_size=self.rows, sequence_length=self.length
        )  # of the source, shapes alone are used
        return Experiment(
            name=name,
            model=self.model,
            objective=NextToken(),
            source=source,
            optimizer=AdamW(),
            length=Steps(1000),
            mesh=self.mesh,
            precision=Precision(compute="bfloat16", logits="bfloat16"),
        )


def fsdp(model: Decoder, topology: str, chips: int, rows: int, length: int = 4096) -> Planned:
    """rows: sequences per chip."""
    return Planned(model, topology, MeshSpec(data=1, fsdp=chips), chips, rows * chips, length)


PROGRAMS = {
    "llama2-7b-v5e-256": fsdp(LLAMA_2_7B, "v5e:16x16", 256, 1),
    "llama2-7b-v5p-128": fsdp(replace(LLAMA_2_7B, remat="save_weight_matmuls"), "v5p:4x4x4", 64, 4),
    "llama3-8b-v6e-256": fsdp(LLAMA_3_8B, "v6e:16x16", 256, 2, 8192),
    "mixtral-8x7b-v5p-128": fsdp(MIXTRAL_8X7B, "v5p:4x4x4", 64, 4),
}
OTHER_MESHES = {  # the same machine: experts spread over chips, and sequences too long for one
    "mixtral-8x7b-expert-8-v5p-128": Planned(
        MIXTRAL_8X7B, "v5p:4x4x4", MeshSpec(data=1, fsdp=8, expert=8), chips=64, rows=256
    ),
    "llama3-8b-context-16-v5p-128": Planned(
        LLAMA_3_8B, "v5p:4x4x4", MeshSpec(data=1, fsdp=4, context=16), chips=64, rows=4, length=131_072
    ),
}
TWO_LAYERS = replace(LLAMA_2_7B, num_layers=2)
SMALL = {  # for tests: two layers of the first on 16 chips, and on two slices of as many
    "llama2-7b-2-layers-v5e-16": fsdp(TWO_LAYERS, "v5e:4x4", 16, 1),
    "llama2-7b-2-layers-two-v5e-16": Planned(
        TWO_LAYERS, "v5e:4x4", MeshSpec(data=2, fsdp=16), chips=32, rows=32, slices=2
    ),
}
ALL = PROGRAMS | OTHER_MESHES | SMALL


def measure(name: str) -> dict[str, Any]:
    """Compiles one program in this process and says what it is."""
    planned = ALL[name]
    experiment = planned.experiment(name)
    begun = time.perf_counter()
    compiled = ahead.compile_step(experiment, planned.topology, slices=planned.slices)
    seconds = time.perf_counter() - begun
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    counts = hlo_cost.count(program)
    assert memory is not None
    return {
        "name": name,
        "peak_bytes": memory.peak_memory_in_bytes,
        "state_bytes": memory.argument_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "flops": experiment.flops_per_token * planned.tokens,
        "compiled_flops": counts.all_flops,
        "hbm_bytes": counts.hbm_bytes,
        "traffic": program.traffic(),
        "collectives": [(c.kind, c.bytes, c.runs) for c in program.collectives()],
        "kernels": program.kernels(),
        "seconds": seconds,
        "libtpu": ahead.compiler_version(),
    }


def run(name: str) -> dict[str, Any]:
    """``measure`` in a process of its own, which has no accelerator and says nothing else."""
    command = [sys.executable, "-m", "benchmarks.tpu_programs", "--here", name]
    environment, here = os.environ | {"JAX_PLATFORMS": "cpu"}, Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} could not be compiled:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


COLUMNS = (*KINDS, BETWEEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*PROGRAMS, *OTHER_MESHES], help=f"among {', '.join(ALL)}")
    parser.add_argument("--here", action="store_true", help="compile in this process and print one line of JSON")
    options = parser.parse_args()
    if unknown := set(options.names) - set(ALL):
        parser.error(f"there is no program {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    if options.here:
        try:
            for name in options.names:
                print(json.dumps(measure(name)))
        except UserError as error:
            raise SystemExit(str(error)) from None
        return
    heads = ("program", "peak GiB", "state GiB", "TFLOPs", "compiled", "HBM GB", *(f"{kind} GB" for kind in COLUMNS))
    print(f"| {' | '.join(heads)} | seconds |\n{'|---' * (len(heads) + 1)}|")
    notes = []
    for name in options.names:
        found = run(name)
        cells = [f"{found[key] / 2**30:.2f}" for key in ("peak_bytes", "state_bytes")]
        cells += [f"{found[name] / 1e12:.1f}" for name in ("flops", "compiled_flops")]
        cells += [f"{found['hbm_bytes'] / 1e9:.1f}"]
        cells += [moved(found["collectives"], kind) for kind in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} | {found['seconds']:.0f} |", flush=True)
        notes.append(f"{name}: libtpu {found['libtpu']}; kernels a step {found['kernels']}")
    print("", *notes, sep="\n")


def moved(collectives: list[tuple[str, int, int]], kind: str) -> str:
    """What collectives (kind, bytes, trips) of one kind move, in GB, by trips: "13.10 = 0.300 + 0.400 x 32"."""
    turns: Counter[int] = Counter()
    for name, size, trips in collectives:
        if name == kind and size * trips >= 1e6:  # less is not worth a word
            turns[trips] += size
    if not turns:
        return ""
    parts = [f"{size / 1e9:.3f}" + (f" x {trips}" if trips > 1 else "") for trips, size in sorted(turns.items())]
    return f"{sum(size * trips for trips, size in turns.items()) / 1e9:.2f} = {' + '.join(parts)}"


if __name__ == "__main__":
    main()
