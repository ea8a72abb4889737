# SPDX-License-Identifier: Apache-2.0
"""The command ``lab``. Each subcommand imports what it needs, so that a mistake is reported at once."""

import argparse
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

from launch import distributed, host, store
from launch.journal import ALONE, CRASHED, HINDERED, REFUSED
from launch.options import parser

TESTED_JAX = (0, 10)


def main(arguments: list[str] | None = None) -> int:
    """Parses and runs; every error that a user can cause ends in one sentence and a non-zero code."""
    options = parser().parse_args(arguments)
    if (code := check_jax()) != 0:
        return code
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    host.expect_no_tpu()
    if options.command in ("run", "sweep"):
        host.keep_memory()  # before JAX is loaded
    sys.unraisablehook = quiet_unraisable
    try:
        code = guarded(options)
    except Exception:
        if not distributed.started():
            raise
        traceback.print_exc()
        code = 1
    if code != 0:
        distributed.leave(code)
    return code


AGAIN = "; repeat the command to go on from the last checkpoint."
AFTER_STOP = {"run": AGAIN, "sweep": AGAIN, "sample": "; the texts of a file (--out) go on where they were."}


def guarded(options: argparse.Namespace) -> int:
    """The command's exit code, with one sentence for what the user can mend."""
    from research.core.errors import (
        Crashed,
        Interrupted,
        Passing,
        UserError,
    )  # without JAX, which takes seconds to load

    try:
        options.runs = store.place(options.runs)
        return COMMANDS[options.command](options)
    except distributed.Apart as error:
        return fail(str(error), code=ALONE)
    except (Passing, Crashed) as error:
        return fail(str(error), code=HINDERED if isinstance(error, Passing) else CRASHED)
    except UserError as error:
        return fail(str(error))
    except Exception as error:
        if store.of_a_bucket(error):
            return fail(
                f"A bucket could not be used ({' '.join(str(error).split())[:200]}): see that this machine has network "
                "and credentials (gcloud auth application-default login), and that the bucket is there.",
                code=HINDERED,
            )
        if not isinstance(error, OSError):
            raise
        if error.errno in host.OUT_OF_SPACE:
            where = f" while writing {error.filename}" if error.filename else ""
            return fail(f"The disk is full{where}: free some space and repeat the command; what was saved is whole.")
        if error.filename is None:
            raise
        return fail(f"{error.filename} cannot be used ({error.strerror}): check that path and who may write there.")
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print(f"\nlab: stopped{AFTER_STOP.get(options.command, '.')}", file=sys.stderr)
        return 130


def quiet_unraisable(unraisable: Any) -> None:
    """Drops complaints of files that could not be written to their end: that error has been raised already."""
    full = isinstance(unraisable.exc_value, OSError) and unraisable.exc_value.errno in host.OUT_OF_SPACE
    if not full and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def fail(sentence: str, *, code: int = REFUSED) -> int:
    print(f"lab: error: {sentence}", file=sys.stderr)
    return code


def check_jax() -> int:
    """One sentence where JAX is missing, one warning where it is newer than what was tested."""
    if any(importlib.util.find_spec(name) is None for name in ("jax", "jaxlib")):
        return fail("JAX is not installed in this Python: run `make env`, or `pip install jax` in this environment.")
    version = metadata.version("jax")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) > TESTED_JAX:
        tested = ".".join(str(part) for part in TESTED_JAX)
        print(
            f"lab: warning: JAX {version} is newer than the tested {tested}; results may differ.",
            file=sys.stderr,
        )
    return 0


def load_study(options: argparse.Namespace):
    from launch import study

    return study.load(options.study, options.overrides)


def join_hosts(options: argparse.Namespace) -> None:
    hosts = distributed.find(options.coordinator, options.hosts, options.host)
    distributed.start(hosts, options.host_timeout)


def run(options: argparse.Namespace) -> int:
    join_hosts(options)
    from research.train import hosts

    with hosts.together():
        study = load_study(options)
        study.only(options.only)
    from launch import local
    from launch.sweep import check_corpus, settled

    experiment = settled(study, options.only, options.runs / study.name)

    directory = options.runs / study.name / options.only
    hosts.from_first(lambda: check_corpus(experiment, directory))
    result = local.run(experiment, directory, profile=options.profile, stall_minutes=options.stall_minutes)
    bits = f", {result['bits_per_byte']:.4f} bits per byte" if result["bits_per_byte"] is not None else ""
    loss = f"loss {result['loss']:.4f} nats per token" if result["loss"] is not None else "no held-out loss"
    solved = {name: share for name, share in result["metrics"].items() if name.endswith(("/greedy", "/pass@1"))}
    loss = ", ".join([loss] * (result["loss"] is not None or not solved) + [f"{n} {v:.1%}" for n, v in solved.items()])
    if hosts.first():
        print(f"{options.only}: {loss}{bits}, {result['seconds']:.0f} s")
    return 0


def sweep(options: argparse.Namespace) -> int:
    join_hosts(options)
    from research.train import hosts

    with hosts.together():
        study = load_study(options)
    from launch import executors
    from launch import sweep as sweeps

    executors.check(options)
    if options.on is not None:
        return executors.sweep(study, options)
    return sweeps.sweep(study, options.runs / study.name, stall_minutes=options.stall_minutes)


def analyze(options: argparse.Namespace) -> int:
    from launch import sweep as sweeps

    study = load_study(options)
    sweeps.analyze(study, options.runs / study.name)
    return 0


def list_runs(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from launch import collect

    study = load_study(options)
    shown = Table("name", "params", "non-embedding", "tokens", "FLOPs", "steps", "status", "loss")
    for row in collect.table(study, options.runs / study.name).runs:
        loss = f"{row.loss:.4f}" if row.loss is not None else ""
        steps = study.experiments[row.name].steps
        shown.add_row(
            row.name, f"{row.params:,}", f"{row.non_embedding_params:,}", f"{row.tokens:,}", f"{row.flops:.3g}",
            f"{steps:,}", row.status, loss,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(shown)
    return 0


def handed(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """A command that a module of its own does, imported when it is asked for."""

    def command(options: argparse.Namespace) -> int:
        return getattr(import_module(f"launch.{module}"), function)(options)

    return command


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": run,
    "sweep": sweep,
    "analyze": analyze,
    "list": list_runs,
    "sample": handed("sample", "command"),
    "eval": handed("evaluate", "command"),
    "import": handed("models", "import_model"),
    "export": handed("models", "export_model"),
    "tokenizer": handed("tokenizer", "command"),
    "plan": handed("plan", "command"),
    "status": handed("status", "command"),
    "logs": handed("executors", "logs"),
    "cancel": handed("executors", "cancel"),
    "gc": handed("executors", "collect_garbage"),
    "fit": handed("law", "fit"),
    "recommend": handed("law", "recommend"),
    "next": handed("law", "suggest"),
}


if __name__ == "__main__":
    sys.exit(main())
