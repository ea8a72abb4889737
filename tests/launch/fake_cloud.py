# SPDX-License-Identifier: Apache-2.0
"""A stand-in for ``gcloud`` that keeps its cloud in a folder, and really boots machines: processes of this one that run
the startup script of the request's metadata, with a metadata server on loopback.

    $FAKE_CLOUD/requests/NAME/    a queued resource: request.json, and what its machines write
    $FAKE_CLOUD/commands.jsonl    every command that was given
    $FAKE_CLOUD/disturb.json      what goes wrong: see ``disturbances``

``python fake_cloud.py vm NAME`` is the process behind a request; it takes it through its states.
"""

import argparse
import contextlib
import fcntl
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
SETTINGS = json.loads((CLOUD / "settings.json").read_text())  # hosts, python, environment
HOURS = 3600.0  # what a disturbed call sleeps


def say(status, code=1):
    account = "This command is authenticated as tester@example.com which is the active account specified by the "
    print(f"ERROR: (gcloud.compute.tpus) {status} {account}[core/account] property.", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def locked():
    with (CLOUD / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(path, record):
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record))
    part.replace(path)


def disturbance(**what):
    """Takes the first disturbance that matches, if there is one: each happens once."""
    with locked():
        path = CLOUD / "disturb.json"
        todo = json.loads(path.read_text()) if path.exists() else []
        for one in todo:
            if all(one.get(key) == value for key, value in what.items()):
                todo.remove(one)
                write(path, todo)
                return one
    return None


def note():
    """Writes down a command that was given."""
    with locked(), (CLOUD / "commands.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "words": sys.argv[1:]}) + "\n")


def place(name):
    return CLOUD / "requests" / name


def described(name, zone):
    try:
        record = json.loads((place(name) / "request.json").read_text())
    except FileNotFoundError:
        record = None
    if record is None or record["zone"] != zone:
        say(f"NOT_FOUND: Resource 'projects/p/locations/{zone}/queuedResources/{name}' was not found.")
    return record


def shown(record):
    name, zone = record["name"], record["zone"]
    return {
        "name": f"projects/p/locations/{zone}/queuedResources/{name}",
        "state": {"state": record["state"], "stateInitiator": "SERVICE", **record.get("more", {})},
        "tpu": {"nodeSpec": [{"nodeId": name, "node": {"acceleratorType": record["accelerator"]}}]},
    }


# --- the commands -------------------------------------------------------------------------------


def create(options):
    names = dict(pair.split("=", 1) for pair in options.metadata_from_file.split(","))
    metadata = {name: Path(path).read_text() for name, path in names.items()}
    assert all(len(text) < 2**18 for text in metadata.values()), "metadata values hold 256 KiB"
    with locked():
        if place(options.name).exists():
            say(f"ALREADY_EXISTS: Resource 'projects/p/locations/{options.zone}/queuedResources/{options.name}'.")
        serial = len(list((CLOUD / "requests").iterdir())) + len(list((CLOUD / "deleted").iterdir())) + 1
        place(options.name).mkdir()
        write(place(options.name) / "request.json", {
            "name": options.name, "zone": options.zone, "state": "ACCEPTED", "accelerator": options.accelerator_type,
            "metadata": metadata, "labels": options.labels, "serial": serial, "spot": options.spot,
        })  # fmt: skip
    with (place(options.name) / "vm.log").open("w") as log:
        subprocess.Popen([sys.executable, __file__, "vm", options.name], stdout=log, stderr=log, start_new_session=True)


def delete(options):
    record = described(options.name, options.zone)
    if record["state"] not in ("ACCEPTED", "SUSPENDED", "FAILED") and not options.force:
        say("FAILED_PRECONDITION: it has nodes: give --force.")
    (place(options.name) / "delete").touch()
    record["state"] = "DELETING"
    with contextlib.suppress(FileNotFoundError):
        write(place(options.name) / "request.json", record)


def machine(options):
    record = described(options.name, options.zone)
    if record["state"] not in ("ACTIVE", "SUSPENDING"):
        say(f"NOT_FOUND: Resource 'projects/p/locations/{options.zone}/nodes/{options.name}' was not found.")
    print(json.dumps({"name": options.name, "state": record.get("machine", "READY")}))


def copy(options):
    if "://" in options.name + options.target:
        import fsspec

        with fsspec.open(options.name, "rb") as source, fsspec.open(options.target, "wb") as target:
            target.write(source.read())
        return
    Path(options.target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(options.name, options.target)


def parser():
    top = argparse.ArgumentParser(prog="gcloud", allow_abbrev=False)
    groups = top.add_subparsers(required=True)

    def command(group, name, function, *flags):
        sub = group.add_parser(name, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument("name", nargs="?" if name == "list" else None)
        for flag in ("--zone", "--project", "--format", *(f for f in flags if not f.endswith("!"))):
            sub.add_argument(flag)
        for flag in ("--quiet!", *(f for f in flags if f.endswith("!"))):
            sub.add_argument(flag[:-1], action="store_true")
        return sub

    tpus = groups.add_parser("compute").add_subparsers(required=True).add_parser("tpus").add_subparsers(required=True)
    requests = tpus.add_parser("queued-resources").add_subparsers(required=True)
    command(
        requests, "create", create, "--node-id", "--node-count", "--node-prefix", "--accelerator-type", "--labels",
        "--runtime-version", "--metadata-from-file", "--valid-until-duration", "--service-account", "--network",
        "--subnetwork", "--spot!", "--reserved!", "--internal-ips!",
    )  # fmt: skip
    command(requests, "describe", lambda o: print(json.dumps(shown(described(o.name, o.zone)))))
    command(requests, "delete", delete, "--force!", "--async!")
    command(requests, "list", lambda o: print(json.dumps([
        shown(record) for path in sorted((CLOUD / "requests").glob("*/request.json"))
        if (record := json.loads(path.read_text()))["zone"] == o.zone
    ])))  # fmt: skip
    command(tpus.add_parser("tpu-vm").add_subparsers(required=True), "describe", machine)
    copies = groups.add_parser("storage").add_subparsers(required=True)
    command(copies, "cp", copy).add_argument("target")
    return top


# --- the machines -------------------------------------------------------------------------------


class Vm:
    """Takes one request through its states, and holds its hosts."""

    def __init__(self, name):
        self.name, self.folder = name, place(name)
        self.record = json.loads((self.folder / "request.json").read_text())
        self.hosts, self.preempted = [], False
        mine = {"serial": self.record["serial"]}
        self.fate = next((f for kind in ("suspend", "fail", "preempt", "notice", "missing host") if
                          (f := disturbance(do=kind, **mine))), {})  # fmt: skip

    def state(self, state, **more):
        if not (self.folder / "delete").exists():
            self.record |= {"state": state, **more}
            write(self.folder / "request.json", self.record)

    def pause(self, seconds):
        """False where the request was deleted meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (self.folder / "delete").exists():
                return False
            time.sleep(0.02)
        return True

    def live(self):
        for state in ("WAITING_FOR_RESOURCES", "PROVISIONING"):
            self.state(state)
            if not self.pause(0.1):
                return
        if self.fate.get("do") in ("suspend", "fail"):
            end = {"suspend": "SUSPENDED", "fail": "FAILED"}[self.fate["do"]]
            more = {"failedData": {"error": {"code": 8, "message": "There is no more capacity in the zone."}}}
            self.state(end, more=more if end == "FAILED" else {})
            self.pause(1e9)
            return
        self.state("ACTIVE")
        self.boot()
        while self.pause(0.05):
            if self.fate.get("do") in ("preempt", "notice") and self.reached():
                self.preempt()
                self.pause(1e9)
                return

    def reached(self):
        path, want = Path(self.fate["file"]), self.fate["step"]
        with contextlib.suppress(OSError, ValueError, IndexError):
            return json.loads(path.read_text().splitlines()[-1])["step"] >= want
        return False

    def preempt(self):
        self.preempted = True  # the metadata server says so
        if self.fate["do"] == "notice":
            self.pause(self.fate.get("seconds", 30))
        self.state("SUSPENDING", machine="PREEMPTED")
        self.kill()
        self.pause(0.1)
        self.state("SUSPENDED")

    def boot(self):
        count = SETTINGS["hosts"]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        for index in range(count):
            if self.fate.get("do") == "missing host" and index == self.fate["host"]:
                continue
            server = http.server.ThreadingHTTPServer(("localhost", 0), self.metadata(index))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            work = self.folder / f"host-{index}"
            work.mkdir()
            script = work / "startup.sh"
            script.write_text(self.record["metadata"]["startup-script"])
            several = {} if count == 1 else {
                "JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index),
            }  # fmt: skip
            environment = os.environ | SETTINGS["environment"] | several | {
                "GCE_METADATA_HOST": f"localhost:{server.server_port}", "LAB_WORK": str(work), "FAKE_HOST": str(index),
            }  # fmt: skip
            with (work / "console.log").open("w") as log:
                self.hosts.append(subprocess.Popen(["bash", str(script)], env=environment, stdout=log, stderr=log,
                                                   start_new_session=True, cwd=work))  # fmt: skip

    def metadata(self, index):
        vm = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.split("/instance/", 1)[-1]
                answers = {
                    "preempted": "TRUE" if vm.preempted else "FALSE", "attributes/agent-worker-number": str(index),
                    "attributes/instance-id": vm.name,
                    **{f"attributes/{key}": value for key, value in vm.record["metadata"].items()},
                }  # fmt: skip
                known = name in answers and self.headers.get("Metadata-Flavor") == "Google"
                body = answers.get(name, "").encode()
                self.send_response(200 if known else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words): ...

        return Handler

    def kill(self):
        for host in self.hosts:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(host.pid, signal.SIGKILL)
            host.wait()

    def run(self):
        try:
            self.live()
        finally:
            self.kill()
            shutil.move(self.folder, CLOUD / "deleted" / f"{self.name}-{time.time_ns()}")


def main():
    if sys.argv[1:2] == ["vm"]:
        return Vm(sys.argv[2]).run()
    options = parser().parse_args()
    note()
    if "describe" in sys.argv and disturbance(do="timeout"):
        time.sleep(HOURS)
    if "describe" in sys.argv and disturbance(do="auth"):
        say("There was a problem refreshing your current auth tokens: Reauthentication failed. cannot prompt during "
            "non-interactive execution. Please run: gcloud auth login")  # fmt: skip
    options.function(options)


if __name__ == "__main__":
    main()
