# SPDX-License-Identifier: Apache-2.0
"""``lab sweep --on ...``: a study handed to an executor and followed to its end, with a live table of its runs."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from launch import bundle, collect, executors, status, store
from launch.controller import Controller, Wanted, summary
from launch.executor import Executor
from launch.journal import LEASE, STALE, SWEEP, Journal, Patience
from launch.locks import Busy, locked
from launch.plan import own_files
from launch.study import Study
from research.recipes import graph
from research.train.experiment import Experiment

T = TypeVar("T")
RENEW, LEAVING = 45.0, 60.0  # seconds


def sweep(study: Study, directory: Path, told: dict[str, Any], *, runs: Path, poll: float) -> int:
    """told: the record of the sweep. Returns 0 where every run has finished. Raises Busy where another process submits
    the same sweep."""
    journal = Journal(directory)
    with only_submitter(journal):
        content, told = packed(study, told)
        sweep_id = journal.begin(told)
        journal.resume()
        archive = ""
        if content is not None:
            place = journal.folder / bundle.name_of(content)
            archive = str(store.absolute(place))
            if not place.exists():
                store.write(place, content)
        executor = executors.make(journal, runs, told, archive=archive)
        controller = controlled(journal, sweep_id, executor, study, directory, told)
        follow(controller, study, directory, poll)
    known = controller.states()
    say(summary(known))
    for run in known.values():
        if run.state == "failed":
            say(f"{run.name} failed: {run.detail}")
            if run.task is not None:
                for path in controller.executor.logs(run.task, run.name)[:1]:
                    say(f"  its log: {path}")
    return 0 if all(run.state == "finished" for run in known.values()) else 1


def controlled(
    journal: Journal, sweep_id: str, executor: Executor, study: Study, directory: Path, told: dict[str, Any]
) -> Controller:
    return Controller(
        journal, sweep_id, executor, wanted(study, directory), told["parallel"], Patience(**told["patience"]), say,
        told["budget"], explain=lambda run: collect.failure(directory / run) or "", version=told["version"],
    )  # fmt: skip


def packed(study: Study, told: dict[str, Any]) -> tuple[bytes | None, dict[str, Any]]:
    """The code as an archive, and the record with the study's place in it; where the runs are done here, neither."""
    if told["on"] == "local":
        return None, told
    content, reference = bundle.files(study.reference, own_files())
    return bundle.archive(content), {**told, "packed": reference}


def preview(study: Study, directory: Path, told: dict[str, Any], options: Any) -> int:
    """``--dry-run``: prints every command and file that the first round would send; sends none."""
    journal = Journal(directory)
    content, told = packed(study, told)
    sweep_id = (store.read_json(journal.folder / SWEEP) or {}).get("id", "00000000")
    archive = f"{journal.folder / bundle.name_of(content)}" if content is not None else ""
    executor = executors.make(journal, options.runs, told, archive=archive)
    if content is not None:
        print(f"--- {archive} ({len(content):,} bytes)")
        print("\n".join(f"    {name}" for name in sorted(bundle.files(study.reference, own_files())[0])))
    tasks = controlled(journal, sweep_id, executor, study, directory, told).preview()
    for task in tasks:
        print(f"--- {task.name} at {task.place}: {', '.join(task.runs)}")
        print(executor.preview(task))
    later = len(study.experiments) - sum(len(task.runs) for task in tasks)
    print(f"{len(tasks)} tasks would be submitted now, of {told['parallel']} at a time; {later} runs are not in them")
    return 0


def wanted(study: Study, directory: Path) -> list[Wanted]:
    """The study's runs: inputs before what begins from them, else smallest first."""

    def has_result(name: str, experiment: Experiment) -> Callable[[], bool]:
        return lambda: collect.status(experiment, directory / name)[0] == "finished"

    ordered = [(name, study.experiments[name]) for name in graph.order(study.experiments)]
    return [
        Wanted(name, experiment.flops, has_result(name, experiment), graph.inputs(experiment))
        for name, experiment in ordered
    ]


def follow(controller: Controller, study: Study, directory: Path, poll: float) -> None:
    """Rounds until there is nothing left to wait for; the first Ctrl-C asks the executor what becomes of the tasks."""
    journal = controller.journal
    with table(lambda: status.rows(controller.journal, directory, controller.states()), study.name) as refresh:
        try:
            while step(controller):
                patiently(journal, refresh)
                time.sleep(poll)
            patiently(journal, refresh)
        except KeyboardInterrupt:
            live = [task for task in journal.tasks() if task.live]
            say(controller.executor.interrupt(live) if live else "stopped")
            controller.parallel = 0
            until = time.monotonic() + LEAVING
            while controller.executor.name == "local" and time.monotonic() < until:  # a second Ctrl-C does not wait
                controller.step()
                if not any(task.live for task in journal.tasks()):
                    break
                time.sleep(poll)
            raise


def step(controller: Controller) -> bool:
    """One round of the controller. A bucket that does not answer ends nothing: it is asked again."""
    again = patiently(controller.journal, controller.step)
    return True if again is None else again


def patiently(journal: Journal, ask: Callable[[], T]) -> T | None:
    """What is asked; None, and a word, where the journal's bucket does not answer now."""
    try:
        return ask()
    except Exception as error:
        if not (store.is_remote(journal.folder) and store.passes(error)):
            raise
        say(f"the bucket could not be reached ({' '.join(str(error).split())[:200]}); trying again")
        return None


@contextlib.contextmanager
def table(rows: Callable[[], list[status.Row]], title: str) -> Iterator[Callable[[], None]]:
    """A live table on a terminal; elsewhere lines say what changes."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False, redirect_stderr=True) as live:
        yield lambda: live.update(status.table(rows(), title), refresh=True)


@contextlib.contextmanager
def only_submitter(journal: Journal) -> Iterator[None]:
    """Keeps a second submitting process away. Raises Busy while there is one. On a bucket, where nothing goes with
    a process that dies, its word holds for some minutes."""
    if not store.is_remote(journal.folder):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(journal.folder))
            except Busy:
                raise Busy(
                    f"Another process submits the sweep in {journal.folder.parent}: wait for it, or end it; lab status "
                    "shows how far it is."
                ) from None
            yield
        return
    me = {"host": socket.gethostname(), "process": os.getpid()}
    while (other := store.read_json(journal.folder / LEASE)) and not _gone(other, me):
        left = STALE - (time.time() - other["time"])
        raise Busy(
            f"{other['host']} (process {other['process']}) submits this sweep: wait for it or end it; if it is dead, "
            f"try again in {max(1, left):.0f} s."
        )
    import threading

    over = threading.Event()

    def say_so() -> None:
        store.write(journal.folder / LEASE, store.text({**me, "time": time.time()}))

    def renew() -> None:
        while not over.wait(RENEW):
            with contextlib.suppress(Exception):  # a bucket that does not answer now: the next time
                say_so()

    (journal.folder / LEASE).unlink(missing_ok=True)  # of one that is gone
    if not store.create(journal.folder / LEASE, store.text({**me, "time": time.time()})):
        raise Busy("Another process has just begun to submit this sweep: wait for it or end it.")
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)
        if (now := store.read_json(journal.folder / LEASE)) and (now["host"], now["process"]) == tuple(me.values()):
            (journal.folder / LEASE).unlink(missing_ok=True)


def _gone(other: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the process that wrote the lease has ended, as far as can be told."""
    if time.time() - other["time"] > STALE:
        return True
    if other["host"] != me["host"]:
        return False
    try:
        os.kill(other["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
