# SPDX-License-Identifier: Apache-2.0
"""A process that compiles for TPUs: ``python -m launch.compiler`` takes jobs as lines of JSON and answers each.

The TPU compiler wants a process of its own (it takes over signals and may abort); one process serves many jobs, so that
JAX is loaded once. ``Compiler`` is the other end: it starts the process, says what it does, and outlives its crashes.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from research.core.errors import UserError

TICK = 30.0  # seconds between signs of life during one compilation
OPTIONS = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}


@dataclass(frozen=True)
class Job:
    """One program to compile: the training step, unless another is named.

    study: as ``launch.study.load`` takes it, with its overrides. evaluation: which of the experiment's, by index.
    generation: of the experiment's model, "prefill" or "decode", with how many slots of how many tokens. change: fields
    of the experiment by path, as ``--set`` has them.
    """

    study: str
    overrides: tuple[str, ...]
    name: str
    tpu: str
    slices: int = 1
    evaluation: int | None = None
    generation: tuple[str, int, int] | None = None
    change: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """What a program is, per chip. Bytes of HBM: arguments, temporaries, output, aliased (output that takes the place
    of arguments), code, and the peak by the compiler's own account. roofline: seconds by part. traffic: bytes sent by
    kind of collective. seconds: of compiling."""

    arguments: int
    temporaries: int
    output: int
    aliased: int
    code: int
    peak: int
    flops: float
    hbm_traffic: float
    roofline: Mapping[str, float]
    traffic: Mapping[str, int]
    seconds: float
    unknown: tuple[str, ...] = field(default=())


class Failed(Exception):
    """The compiler's own words for a program that it could not make."""


class TooLarge(Failed):
    """The compiler says how much the program would take: ``peak`` bytes a chip."""

    def __init__(self, peak: float) -> None:
        super().__init__(f"it would take {peak / 1e9:.2f} GB of HBM")
        self.peak = peak


class Compiler:
    """The other end of the process. say: takes lines for whoever waits."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None

    def compile(self, job: Job, what: str) -> Compiled:
        """Raises UserError for what the user can mend, Failed where the compiler cannot make this program."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        with self._ticking(what):
            try:
                process.stdin.write(json.dumps(asdict(job)) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
        if not answer:
            raise Failed(self._last_words())
        said = json.loads(answer)
        if "user_error" in said:
            raise UserError(said["user_error"])
        if "error" in said:
            raise failure(said["error"])
        return Compiled(**{**said, "unknown": tuple(said["unknown"])})

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launch.compiler"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env=os.environ | OPTIONS,
            )  # fmt: skip
        return self._process

    @contextlib.contextmanager
    def _ticking(self, what: str) -> Iterator[None]:
        begun, over = time.monotonic(), threading.Event()

        def tick() -> None:
            while not over.wait(TICK):
                self.say(f"  {what}: still compiling after {time.monotonic() - begun:.0f} s")

        threading.Thread(target=tick, daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _last_words(self) -> str:
        """Of a process that ended without an answer."""
        assert self._process is not None
        code = self._process.wait()
        self._process = None
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        self._errors.close()
        told = next((line for line in reversed(lines) if "rror" in line or "Check failed" in line), (lines or [""])[-1])
        return f"the compiler ended with status {code}: {told[:300]}"

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._process is not None:
            self._process.stdin.close()  # type: ignore[union-attr]
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._errors is not None:
            self._errors.close()


def failure(text: str) -> Failed:
    """What the compiler says, with the size where it says that there is no room for it."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|\(([\d.]+)([KMGT]?)\) exceeds", text)
    if "memory" not in text or found is None:
        return Failed(text)
    number, unit = found[1] or found[3], found[2] or found[4] or ""
    return TooLarge(float(number) * 1024 ** " KMGT".index(unit or " "))


def serve() -> None:
    """Answers jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a study or a library prints goes with the errors
    loaded: dict[tuple[str, tuple[str, ...]], Any] = {}
    for line in sys.stdin:
        fields = json.loads(line)
        tuples: dict[str, Any] = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        job = Job(**{**fields, **tuples})
        try:
            answer = asdict(measure(job, loaded))
        except UserError as error:
            answer = {"user_error": str(error)}
        except Exception as error:  # of whatever class the compiler raises; the next job may do
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:2000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def measure(job: Job, loaded: dict[tuple[str, tuple[str, ...]], Any]) -> Compiled:
    """Compiles one program in this process and reads it."""
    from launch import study
    from research.core import hlo_cost, roofline
    from research.core.chips import slice_of
    from research.core.config import override
    from research.core.hlo import Program
    from research.train import ahead

    key = job.study, job.overrides
    if key not in loaded:
        loaded[key] = study.load(job.study, job.overrides)
    experiment, where = override(loaded[key].only(job.name), *job.change), slice_of(job.tpu)
    devices, begun = ahead.topology_devices(where.compiled_as, slices=job.slices), time.perf_counter()
    if job.generation is not None:
        lowered = ahead.lower_generation(experiment, *job.generation, devices)
    elif job.evaluation is not None:
        lowered = ahead.lower_evaluation(experiment, experiment.evals[job.evaluation], devices)
        assert lowered is not None, "asked for an evaluation without a program"
    else:
        lowered = ahead.lower_step(experiment, devices)
    compiled = lowered.compile()
    spent, memory = time.perf_counter() - begun, compiled.memory_analysis()
    assert memory is not None
    program = Program(compiled.as_text() or "")
    counts = hlo_cost.count(program, grouped_rows=ahead.grouped_rows(experiment, where.chips * job.slices))
    places = [tuple(device.coords) for device in ahead.mesh_devices(experiment, devices)]
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=counts.all_flops,
        hbm_traffic=counts.hbm_bytes,
        roofline=roofline.seconds(program, counts, where, places).parts,
        traffic=program.traffic(),
        seconds=spent,
        unknown=counts.unknown,
    )


if __name__ == "__main__":
    serve()
