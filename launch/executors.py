# SPDX-License-Identifier: Apache-2.0
"""The executors by name: made from the command's options, or again from what the journal says of a sweep; and the
commands that ask one for something."""

import argparse
import contextlib
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import status, store
from launch.controller import Controller, Wanted
from launch.executor import Executor, Refused, Unreachable
from launch.gcloud import Gcloud, NotFound
from launch.journal import Journal, Patience, Task
from launch.plan import hash_of, own_files
from launch.workers import Workers, lab
from research.core.chips import slice_of
from research.core.errors import UserError

BACKOFF = {"local": 5.0, "tpu-vm": 30.0, "sky": 30.0}  # seconds
POLL = {"local": 0.5, "tpu-vm": 15.0, "sky": 15.0}
TPU = ("tpu", "slices", "zones", "provisioning", "project", "runtime_version", "valid_for", "network", "subnetwork",
       "internal_ips", "python", "start_minutes", "gcloud_timeout")  # fmt: skip


NOT_OF_SKY = ("service_account", "network", "subnetwork", "internal_ips", "valid_for", "python")


def check(options: argparse.Namespace) -> None:
    """Raises UserError for options that mean nothing without ``--on``, or with the one given."""
    of_any = ("dry_run", "parallel", "backoff", "budget", "poll")
    of_clouds = ("tpu", "zones", *NOT_OF_SKY, "project", "runtime_version", "shared_runs")
    for names, allowed in ((of_any, ("local", "tpu-vm", "sky")), (of_clouds, ("tpu-vm", "sky"))):
        for name in names:
            if getattr(options, name) not in (None, False) and options.on not in allowed:
                given = f"with --on {options.on}" if options.on else "by itself"
                raise UserError(f"--{name.replace('_', '-')} means nothing {given}: give --on {' or '.join(allowed)}.")
    for name, pattern, what in (
        ("zones", r"[a-z][a-z0-9-]*(\s*,\s*[a-z][a-z0-9-]*)*", "zones with commas between, such as us-west4-a"),
        ("valid_for", r"\d+[smhd]", "a duration, such as 6h"),
    ):
        if (given := getattr(options, name)) and not re.fullmatch(pattern, given):
            raise UserError(f"--{name.replace('_', '-')} {given}: give {what}.")


def about(study: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The record of a sweep: what another process needs to go on with it, or to ask for its logs. The service account
    is not in it."""
    count = options.parallel if options.parallel is not None else (os.cpu_count() or 1) if options.on == "local" else 1
    backoff = options.backoff if options.backoff is not None else BACKOFF[options.on]
    for name, value, least in (
        ("parallel", count, 1), ("retries", options.retries, 0), ("backoff", backoff, 0), ("slices", options.slices, 1)
    ):  # fmt: skip
        if value < least:
            raise UserError(f"--{name} {value:g} must be at least {least}.")
    if options.budget is not None and options.on == "local":
        raise UserError("--budget is in chip-hours of TPUs, and workers here have none: leave it out.")
    if options.budget is not None and not options.budget > 0:
        raise UserError(f"--budget {options.budget:g}: give chip-hours above 0.")
    if options.on != "local":
        if options.tpu is None:
            raise UserError(f"--on {options.on} needs --tpu SLICE, such as v5e-16.")
        slice_of(options.tpu)
    if options.on == "tpu-vm" and not options.zones:
        raise UserError("--on tpu-vm needs --zones ZONE[,ZONE...], in the order to try them, such as us-west4-a.")
    if options.on == "tpu-vm" and not (store.is_remote(options.runs) or options.shared_runs):
        raise UserError(
            f"--on tpu-vm needs --runs gs://BUCKET/FOLDER, for the machines do not see {options.runs}: or give "
            "--shared-runs where it is a file system that they all mount at the same path."
        )
    if options.on == "sky" and not store.is_remote(options.runs):
        raise UserError("--on sky needs --runs gs://BUCKET/FOLDER: its machines share no other folder.")
    if options.on == "sky":
        if options.slices > 1:
            raise UserError(f"--on sky gives each run one slice, not {options.slices}: --on tpu-vm joins several.")
        if options.provisioning == "reserved":
            raise UserError("--on sky has no reserved slices: choose --provisioning spot or on-demand, or --on tpu-vm.")
        for name in NOT_OF_SKY:
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} is for --on tpu-vm: in SkyPilot's own settings it goes.")
    return {
        "on": options.on, "study": study.reference, "overrides": list(study.overrides), "runs": list(study.experiments),
        "words": [
            "--stall-minutes", f"{options.stall_minutes:g}", "--host-timeout", f"{options.host_timeout:g}"
        ], "parallel": count, "budget": options.budget,
        "version": hash_of(own_files())[:16],
        "patience": asdict(Patience(retries=options.retries, backoff=backoff)),
        **({name: getattr(options, name) for name in TPU} if options.on != "local" else {}),
    }  # fmt: skip


def make(journal: Journal, runs: Path, told: dict[str, Any], *, on: str = "", archive: str = "") -> Executor:
    """told: the sweep's record. archive: of the code, for what is submitted; study: its reference there."""
    on = on or told["on"]
    overrides = [word for assignment in told["overrides"] for word in ("--set", assignment)]
    if on == "local":
        run = ["run", told["study"], *overrides, *told["words"]]
        return Workers(journal, lab("--runs", str(runs), *run), told["parallel"])
    from launch import tpu_vm

    settings = tpu_vm.Settings(
        where=slice_of(told["tpu"]),
        zones=tuple(zone.strip() for zone in (told["zones"] or "").split(",") if zone.strip()),
        provisioning=told["provisioning"],
        slices=told["slices"],
        runtime=told["runtime_version"] or "",
        valid_for=told["valid_for"] or "",
        network=told["network"] or "",
        subnetwork=told["subnetwork"] or "",
        internal=told["internal_ips"],
        python=told["python"] or "",
        service_account=os.environ.get("LAB_SERVICE_ACCOUNT", ""),
        start=told["start_minutes"],
    )
    run = ["run", told.get("packed", told["study"]), *overrides, *told["words"]]
    words = ["-m", "launch.cli", "--runs", str(store.absolute(runs)), *run]
    if on == "sky":
        from launch import skypilot

        return skypilot.Sky(journal, settings, archive, words, told["patience"]["retries"])
    secrets = (settings.service_account,) if settings.service_account else ()
    gcloud = Gcloud(told["project"], told["gcloud_timeout"], secrets)
    return tpu_vm.TpuVm(journal, gcloud, settings, archive, words)


def sweep(study: Any, options: argparse.Namespace) -> int:
    """Hands the study to the executor, follows it to its end, and analyses it."""
    from launch import submit
    from launch import sweep as sweeps

    told, directory = about(study, options), options.runs / study.name
    if options.service_account:
        os.environ["LAB_SERVICE_ACCOUNT"] = options.service_account  # for this process alone
    if options.dry_run:
        return submit.preview(study, directory, told, options)
    poll = options.poll if options.poll is not None else POLL[options.on]
    code = submit.sweep(study, directory, told, runs=options.runs, poll=poll)
    if study.analyze is not None and any((directory / name / status.RESULT).exists() for name in study.experiments):
        sweeps.analyze(study, directory)
    return code


def logs(options: argparse.Namespace) -> int:
    """Prints a run's output; with ``--follow`` as it grows, until the run is over or nobody looks any more."""
    with contextlib.suppress(KeyboardInterrupt):
        return follow_logs(options)
    return 130


def follow_logs(options: argparse.Namespace) -> int:
    (directory,) = status.sweeps(options.runs, options.study)
    journal = Journal(directory)
    shown, last = "", ""
    while True:
        tasks = [task for task in journal.tasks() if options.run in task.runs]
        if not tasks:
            names = journal.about()["runs"]
            if options.run in names:
                raise UserError(f"{options.run} has not been begun yet: lab status says what it waits for.")
            raise UserError(f"{directory} has no run {options.run!r}: its runs are {', '.join(names[:20])}.")
        task = tasks[-1]
        paths = make(journal, options.runs, journal.about(), on=task.on).logs(task, options.run)
        if options.host >= len(paths):
            raise UserError(f"{task.name} has {len(paths)} logs of hosts: --host counts from 0.")
        path = paths[options.host]
        if str(path) != last:
            shown, last = "", str(path)
        text = store.read(path) or ""
        sys.stdout.write(new_in(text, shown))
        sys.stdout.flush()
        shown = text or shown
        state = status.known(journal, directory)[options.run].state if options.follow else "finished"
        if state in ("finished", "failed", "cancelled"):
            return 0
        time.sleep(1.0)


def new_in(text: str, shown: str) -> str:
    """What a log has more than was shown of it; its beginning may have been cut off since."""
    if text.startswith(shown):
        return text[len(shown) :]
    end = text.find(shown[-500:])
    return text if end < 0 else text[end + len(shown[-500:]) :]


def cancel(options: argparse.Namespace) -> int:
    """Ends runs: writes it down, and ends what is live, or waits until the process that submits has."""
    from launch import submit

    (directory,) = status.sweeps(options.runs, options.study)
    journal = Journal(directory)
    told = journal.about()
    if unknown := set(options.run) - set(told["runs"]):
        names = ", ".join(sorted(told["runs"])[:20])
        raise UserError(f"{directory} has no run {', '.join(sorted(unknown))}: its runs are {names}.")
    over = {name: run.state for name, run in status.known(journal, directory).items()}
    going = [name for name, state in over.items() if state in ("waiting", "assigned", "running")]
    wanted = set(options.run or going) & set(going)
    if not wanted:
        states = ", ".join(f"{name} is {over[name]}" for name in (options.run or told["runs"])[:10])
        print(f"nothing to cancel: {states}", file=sys.stderr)
        return 0
    journal.cancel(sorted(wanted))

    def left() -> list[Task]:
        """Live tasks of which nothing else is wanted; what shares a slice with others is ended by the slice itself."""
        return [t for t in journal.tasks() if t.live and {run for run in t.runs if run not in t.outcomes} <= wanted]

    count, deadline = len(left()), time.monotonic() + 180
    while left() and time.monotonic() < deadline:
        try:
            with submit.only_submitter(journal):
                runs = [Wanted(name, 0.0, (directory / name / status.RESULT).exists) for name in told["runs"]]
                executor, patience = make(journal, options.runs, told), Patience(**told["patience"])
                Controller(
                    journal, told["id"], executor, runs, 0, patience, submit.say, version=told.get("version", "")
                ).step()
        except submit.Busy:
            pass  # that process reads what was written
        time.sleep(0.5)
    tasks = f"{count - len(left())} of {count} live tasks ended" if count else "no task held them alone"
    print(f"cancelled: {', '.join(sorted(wanted))}; {tasks}", file=sys.stderr)
    return 1 if left() else 0


def collect_garbage(options: argparse.Namespace) -> int:
    """Lists the requests that no live run owns, and deletes them with ``--delete``."""
    from launch import tpu_vm

    tasks: dict[str, Task] = {}
    known: dict[str, Journal] = {}
    zones: dict[str, None] = dict.fromkeys(options.zones.split(",") if options.zones else [])
    for directory in status.sweeps(options.runs, None):
        journal = Journal(directory)
        known[journal.about()["id"]] = journal
        for task in journal.tasks():
            if task.on == "tpu-vm":
                tasks[task.name] = task
                zones[task.place] = None
    gcloud = Gcloud(options.project)
    try:
        requests = tpu_vm.requests(gcloud, list(zones))
    except (Unreachable, Refused, NotFound) as error:
        raise UserError(f"The requests could not be listed ({error}): mend that and repeat the command.") from error
    if not requests:
        print(f"no requests of sweeps in {', '.join(zones) or 'any zone (give --zones)'}")
    for zone, name, state in requests:
        task, sweep_id = tasks.get(name), name.split("-")[1]
        if task is None and sweep_id in known:  # it may have been begun since
            task = known[sweep_id].task(name)
        if task is not None and task.live:
            print(f"{zone}  {name}  {state}  in use: {', '.join(task.runs)}")
        elif sweep_id not in known and not options.unknown:
            print(f"{zone}  {name}  {state}  of a journal that is not below {options.runs}: --unknown takes it too")
        elif options.delete:
            try:
                gcloud.run(*tpu_vm.deletion(name, zone))
                print(f"{zone}  {name}  {state}  deleted")
            except (Unreachable, Refused, NotFound) as error:
                print(f"{zone}  {name}  {state}  could not be deleted ({error})")
        else:
            print(f"{zone}  {name}  {state}  owned by no live run: --delete deletes it")
    return 0
