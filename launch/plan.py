# SPDX-License-Identifier: Apache-2.0
"""``lab plan``: what each run of a study would take on a TPU slice, before any TPU is asked for.

Every distinct program (model, batch, mesh) is compiled once by the TPU compiler in a process of its own, and read: its
memory, and the least time that it can take (``research.core.roofline``). What was compiled is kept by content: the
experiment's JSON, the source and the versions. A whole plan is kept too, with the files that the study read, so that
asking again needs neither JAX nor a compiler.
"""

import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import host
from launch.compiler import Compiled, Compiler, Failed, Job, TooLarge
from research.core.chips import Slice, slice_of
from research.core.errors import UserError
from research.core.files import write_atomically

if TYPE_CHECKING:
    from launch.study import Study
    from research.train.experiment import Experiment

FORMAT = 1
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
NO_COMPILER = (
    "The TPU compiler is not installed (pip install -c constraints.txt libtpu): these figures are estimates by "
    "arithmetic, not of compiled programs."
)


@dataclass(frozen=True)
class Request:
    """What is asked. mesh: assignments such as "mesh.fsdp=256" that replace every experiment's own mesh. estimate: by
    arithmetic alone. search: find mesh, recomputation and microbatches. generate: prefill and decode too, with so many
    slots of so many tokens."""

    study: str
    overrides: tuple[str, ...]
    tpu: str
    slices: int = 1
    mesh: tuple[str, ...] = ()
    search: bool = False
    estimate: bool = False
    generate: tuple[int, int] | None = None

    @property
    def where(self) -> Slice:
        return slice_of(self.tpu)

    @property
    def chips(self) -> int:
        return self.where.chips * self.slices


@dataclass(frozen=True)
class Row:
    """One run. Bytes and seconds are of one chip and one step. memory: by kind; "step", the compiler's
    peak of the training step; and "peak", that or an evaluation's beside the training state. parts: the
    roofline. bound: its longest. share_of_peak: of the chips' FLOP/s, counting the model's own FLOPs. change: what the
    search chose, as --set has it. generation: of prefill and decode, "peak" bytes and "seconds" of one call. problem:
    why it cannot run so, and what would help."""

    name: str
    params: int
    active_params: int
    tokens: int
    flops: float
    steps: int
    mesh: str
    memory: dict[str, float]
    parts: dict[str, float]
    step_seconds: float
    bound: str
    share_of_peak: float
    evaluation_seconds: float
    hours: float
    chip_hours: float
    compiled: bool
    change: tuple[str, ...] = ()
    generation: dict[str, dict[str, float]] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """rows: of the study's runs, in its order. notes: what a reader should know. programs: how many distinct programs
    there are; compiled: how many of them were compiled now, in ``seconds``."""

    rows: list[Row]
    notes: list[str]
    programs: int
    compiled: int
    seconds: float


def plan(request: Request, *, fresh: bool = False, say: Callable[[str], None] = print) -> Plan:
    """The plan that was made before, where nothing that it came from has changed; else a new one."""
    _ = request.where  # a slice that is not there is said before anything is loaded
    if not fresh and (found := recall(request)) is not None:
        return found
    begun = time.monotonic()
    from launch.planner import Planner
    from launch.study import load

    study = load(request.study, request.overrides)
    with Compiler(say) as compiler:
        planner = Planner(request, study, Programs(request, study, compiler, say), say)
        rows = planner.rows()
    made = Plan(rows, planner.notes, planner.programs.distinct, planner.programs.compiled, time.monotonic() - begun)
    if not planner.programs.failed:  # a compiler that died may live another time
        remember(request, made)
    return made


class Programs:
    """Compiled programs by content, on disk: none is compiled twice."""

    def __init__(self, request: Request, study: "Study", compiler: Compiler, say: Callable[[str], None]) -> None:
        self.request, self.study, self.compiler, self.say = request, study, compiler, say
        self.folder = host.cache_dir() / "programs"
        self.source = hash_of(sorted((ROOT / "research").rglob("*.py")) + [ROOT / "launch" / "compiler.py"])
        self.compiled = 0
        self._found: dict[str, Compiled | Failed] = {}

    @property
    def failed(self) -> bool:
        return any(isinstance(found, Failed) and not isinstance(found, TooLarge) for found in self._found.values())

    @property
    def distinct(self) -> int:
        return len(self._found)

    def get(
        self,
        experiment: "Experiment",
        change: Sequence[str] = (),
        *,
        evaluation: int | None = None,
        generation: str | None = None,
    ) -> Compiled:
        """The program of the training step, or of an evaluation, or "prefill" or "decode", of an experiment of the
        study after changes to it. Raises Failed where it cannot be compiled."""
        from research.core.config import override
        from research.train import ahead

        changed, request = override(experiment, *change), self.request
        job = Job(request.study, request.overrides, experiment.name, request.tpu, request.slices, change=tuple(change))
        if generation is not None:
            assert request.generate is not None
            what, record = generation, ahead.generation_record(changed)
            job = replace(job, generation=(generation, *request.generate))
        elif evaluation is not None:
            one = changed.evals[evaluation]
            what, record, job = one.name, ahead.program_record(changed, one), replace(job, evaluation=evaluation)
        else:
            what, record = "training step", ahead.program_record(changed)
        content = [record, own_classes(record), job.generation, request.where.name, request.slices, self.source]
        key = hashlib.sha256(json.dumps([*content, versions()], sort_keys=True).encode()).hexdigest()
        if key not in self._found:
            self._found[key] = self._read(key) or self._compile(key, job, what)
        found = self._found[key]
        if isinstance(found, Failed):
            raise found
        return found

    def _read(self, key: str) -> Compiled | None:
        try:
            return Compiled(**json.loads((self.folder / f"{key[:32]}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _compile(self, key: str, job: Job, what: str) -> Compiled | Failed:
        from research.core.config import override

        plain = self.study.experiments[job.name]
        new = dict.fromkeys(one for one in job.change if override(plain, one) != plain)
        told = f"{job.name}, {what}" + (f", {' '.join(new)}" if new else "")
        self.say(f"compiling {told}")
        try:
            found = self.compiler.compile(job, told)
        except Failed as failure:
            return failure
        self.compiled += 1
        self.say(f"  {found.seconds:.1f} s, {size(found.peak)} a chip")
        write_atomically(self.folder / f"{key[:32]}.json", json.dumps(asdict(found)))
        return found


def own_classes(record: Any) -> dict[str, str]:
    """Hashes of the files of classes in an experiment's record that are not of this checkout's rooms: a study's own."""
    found: dict[str, str] = {}
    for value in record.values() if isinstance(record, dict) else record if isinstance(record, list) else ():
        found |= own_classes(value)
    name = record.get("type") if isinstance(record, dict) else None
    if isinstance(name, str) and not name.startswith("research."):
        file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
        found[name] = hash_of([Path(file)]) if file else ""
    return found


def versions() -> dict[str, str | None]:
    """Of what compiles; None for what is not installed."""
    flags = os.environ.get("LIBTPU_INIT_ARGS")
    found: dict[str, str | None] = {"python": sys.version.split()[0], "LIBTPU_INIT_ARGS": flags}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def has_compiler() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def hash_of(files: Sequence[Path]) -> str:
    """Of the files' content, in order."""
    total = hashlib.sha256()
    for path in files:
        total.update(str(path.name).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


# --- whole plans --------------------------------------------------------------------------------


def _place(request: Request) -> Path:
    file, _, function = request.study.partition(":")
    what = {**asdict(request), "study": [str(Path(file).resolve()), function], "versions": versions()}
    name = hashlib.sha256(json.dumps([FORMAT, what], sort_keys=True).encode()).hexdigest()[:32]
    return host.cache_dir() / "plans" / f"{name}.json"


def recall(request: Request) -> Plan | None:
    """The plan that was made of the same words and the same files, if any."""
    try:
        record = json.loads(_place(request).read_text())
        if any(hash_of([Path(path)]) != content for path, content in record["files"].items()):
            return None
        rows = [Row(**{**row, "change": tuple(row["change"])}) for row in record["rows"]]
        return Plan(rows, record["notes"], record["programs"], compiled=0, seconds=0.0)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(request: Request, made: Plan) -> None:
    """Keeps a plan with every file of Python that it came from, libraries apart, whose versions stand for them."""
    record = {**asdict(made), "files": {str(path): hash_of([path]) for path in own_files()}}
    write_atomically(_place(request), json.dumps(record))


def own_files() -> list[Path]:
    """The source files of all loaded modules that belong to no installed library."""
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    libraries = tuple(Path(place).resolve() for place in places)
    found = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and file.endswith(".py") and (path := Path(file).resolve()).is_file():
            inside = any(path.is_relative_to(library) for library in libraries)
            found |= set() if inside else {path}
    return sorted(found)


# --- what a person reads ------------------------------------------------------------------------


def mesh_assignments(text: str | None) -> tuple[str, ...]:
    """ "fsdp=256" or "data=2,fsdp=128" as assignments to every axis; those not named are 1, data what is left. Raises
    UserError naming the axes that there are."""
    if text is None:
        return ()
    axes = ("data", "stage", "fsdp", "expert", "context", "tensor")
    sizes = {"data": "-1"} | dict.fromkeys(axes[1:], "1")
    for part in text.split(","):
        name, _, ways = (piece.strip() for piece in part.partition("="))
        if name not in axes or not (ways.lstrip("-").isdigit()):
            raise UserError(f"--mesh {text}: give NAME=SIZE, with commas between; the axes are {', '.join(axes)}.")
        sizes[name] = ways
    return tuple(f"mesh.{name}={ways}" for name, ways in sizes.items())


def number(value: float) -> str:
    """1234567 as 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def size(count: float) -> str:
    """Bytes, in MB or GB of 10^6 and 10^9."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def table(made: Plan, request: Request, price: float | None) -> Any:
    """A rich table of the plan. price: of a chip-hour, in US dollars."""
    from rich.table import Table

    chip = request.where.chip
    many = f"{request.slices} x " if request.slices > 1 else ""
    title = f"{many}{request.where.name}: {request.chips} chips of {chip.hbm_bytes / 1e9:.3g} GB"
    if any(row.parts and not row.compiled for row in made.rows):
        title += "; ESTIMATES by arithmetic, nothing compiled"
    shown = Table(title=title, title_justify="left")
    shown.add_column("run", no_wrap=True)
    heads = ("params", "tokens", "FLOPs", "mesh", "arguments", "temporaries", "output", "aliased", "peak", "of HBM")
    heads += ("step", "bound by", "of peak", "chip-hours", *(("cost $",) if price is not None else ()))
    for head in heads:
        shown.add_column(head, justify="left" if head in ("mesh", "bound by") else "right", no_wrap=head != "mesh")
    for row in made.rows:
        memory = [size(row.memory[k]) if k in row.memory else "" for k in
                  ("arguments", "temporaries", "output", "aliased", "peak")]  # fmt: skip
        full = row.memory.get("peak", 0.0) / chip.hbm_bytes
        cost = [f"{row.chip_hours * price:,.2f}"] if price is not None else []
        if not row.parts:  # nothing is known
            known = (row.name, number(row.params), number(row.tokens), f"{row.flops:.3g}", row.mesh)
            shown.add_row(*known, *[""] * 4, "no program")
            continue
        shown.add_row(
            row.name, number(row.params), number(row.tokens), f"{row.flops:.3g}", row.mesh, *memory,
            f"{full:.0%}" if full <= 1 else f"[bold red]{full:.0%}[/]", duration(row.step_seconds), row.bound,
            f"{row.share_of_peak:.0%}", f"{row.chip_hours:,.3g}", *cost,
        )  # fmt: skip
    if len(made.rows) > 1:
        fine = [row for row in made.rows if not row.problem]
        hours = sum(row.chip_hours for row in fine)
        tokens, flops = (sum(getattr(row, name) for row in fine) for name in ("tokens", "flops"))
        cost = [f"{hours * price:,.2f}"] if price is not None else []
        shown.add_section()
        shown.add_row(
            "all" if len(fine) == len(made.rows) else f"{len(fine)} of {len(made.rows)}",
            "",
            number(tokens),
            f"{flops:.3g}",
            *[""] * 10,
            f"{hours:,.3g}",
            *cost,
        )
    return shown


def generation_table(made: Plan, request: Request, price: float) -> Any:
    """A rich table of what prefill and decode take."""
    from rich.table import Table

    assert request.generate is not None
    slots, length = request.generate
    shown = Table(title=f"Generation: {slots} slots of {length} tokens, on the runs' own meshes", title_justify="left")
    for head in ("run", "prefill peak", "time", "tokens/s", "decode peak", "step", "new tokens/s", "$ a million"):
        shown.add_column(head, justify="left" if head == "run" else "right", no_wrap=True)
    for row in made.rows:
        cells = []
        for name, tokens in (("prefill", slots * length), ("decode", slots)):
            found = row.generation.get(name, {})
            full = found.get("peak", 0.0) / request.where.chip.hbm_bytes
            peak = f"{size(found['peak'])}, {full:.0%}" if found else ""
            rate = tokens / found["seconds"] if found.get("seconds") else 0.0
            cells += [
                f"[bold red]{peak}[/]" if full > 1 else peak,
                *((duration(found["seconds"]), number(rate)) if rate else ("", "")),
            ]
        shown.add_row(row.name, *cells, f"{request.chips * price / 3600 / rate * 1e6:,.3g}" if rate else "")
    return shown


def slots_of(text: str | None) -> tuple[int, int] | None:
    """ "32x2048" as 32 slots of 2048 tokens."""
    if text is None:
        return None
    slots, _, length = text.partition("x")
    if not (slots.isdecimal() and length.isdecimal() and int(slots) and int(length)):
        raise UserError(f"--generate {text}: give SLOTSxTOKENS, such as 32x2048.")
    return int(slots), int(length)


def command(options: Any) -> int:
    """``lab plan``. Returns 1 where a run does not fit or has no program."""
    from rich.console import Console

    from launch import prices

    if options.slices < 1:
        raise UserError(f"--slices {options.slices}: give 1 or more.")
    request = Request(
        options.study, tuple(options.overrides), options.tpu, options.slices, mesh_assignments(options.mesh),
        options.search, options.estimate, slots_of(options.generate),
    )  # fmt: skip
    price = prices.per_chip_hour(request.where.chip, options.pricing, options.prices)
    begun = time.monotonic()
    made = plan(request, fresh=options.fresh, say=lambda text: print(text, file=sys.stderr, flush=True))
    if options.json:
        cost = {row.name: row.chip_hours * price for row in made.rows}
        print(json.dumps({"request": asdict(request), **asdict(made), "pricing": options.pricing, "cost": cost}))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(table(made, request, price))
        if any(row.generation for row in made.rows):
            Console(width=None if sys.stdout.isatty() else 200).print(generation_table(made, request, price))
        for row in made.rows:
            if row.change:
                print(f"{row.name}: {' '.join(f'--set {assignment}' for assignment in row.change)}")
        for problem in dict.fromkeys(row.problem for row in made.rows if row.problem):
            names = [row.name for row in made.rows if row.problem == problem]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            print(f"{', '.join(names[:3])}{more}: {problem}")
        for note in made.notes:
            print(note)
        print(
            f"{made.programs} distinct programs, {made.compiled} compiled now, {time.monotonic() - begun:.1f} s; "
            f"{options.pricing} at {price:g} $ a chip-hour; times are the least that a roofline allows."
        )
    return 1 if any(row.problem for row in made.rows) else 0
