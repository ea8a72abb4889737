# SPDX-License-Identifier: Apache-2.0
"""What gcloud says and what is made of it; requests as they are asked for; states of requests, machines and hosts."""

import json
import subprocess
import time

import pytest

from launch import gcloud
from launch.executor import Refused, Stop, Unreachable
from launch.gcloud import Exists, Gcloud, NotFound, failure
from launch.journal import Journal, Task
from launch.slice_hosts import Hosts, together
from launch.tpu_vm import Settings, TpuVm
from research.core.chips import slice_of

ACCOUNT = (
    ". This command is authenticated as me@example.com which is the active account specified by the [core] property"
)


@pytest.mark.parametrize(
    ("said", "kind", "word"),
    [
        ("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'x' was not found" + ACCOUNT, NotFound, "was not found"),
        ("ERROR: (gcloud.x) ALREADY_EXISTS: Resource 'x' already exists", Exists, "exists"),
        ("ERROR: (gcloud.x) PERMISSION_DENIED: Permission 'tpu.nodes.get' denied" + ACCOUNT, Unreachable, "tpu.nodes"),
        (
            "ERROR: (gcloud.x) There was a problem refreshing your current auth tokens: Reauthentication failed. "
            "cannot prompt during non-interactive execution.\nPlease run:\n\n  $ gcloud auth login",
            Unreachable,
            "Reauthentication",
        ),
        ("ERROR: (gcloud.x) You do not currently have an active account selected.", Unreachable, "active account"),
        ("ERROR: (gcloud.x) UNAVAILABLE: connection reset", Unreachable, "UNAVAILABLE"),
        (
            "ERROR: (gcloud.x) There was a problem refreshing your current auth tokens: HTTPSConnectionPool(host='x'): "
            "Max retries exceeded",
            Unreachable,
            "Max retries",
        ),
        ("ERROR: gcloud crashed (ConnectionError): network is unreachable", Unreachable, "network"),
        (
            "ERROR: (gcloud.x) RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' "
            "has been exceeded. Limit: 0 in zone us-west4-a.",
            Refused,
            "Quota limit",
        ),
        ("ERROR: (gcloud.x) INVALID_ARGUMENT: the accelerator v6e-4 was not found in zone a", Refused, "accelerator"),
    ],
)
def test_failures_are_told_apart(said, kind, word):
    found = failure(1, said)
    assert type(found) is kind and word in str(found) and "me@example.com" not in str(found)


def test_a_login_that_ran_out_says_what_to_do_and_words_it_does_not_take_stop():
    assert "gcloud auth login" in failure(1, "UNAUTHENTICATED: x").mend
    assert "roles/tpu.admin" in failure(1, "PERMISSION_DENIED: x" + ACCOUNT).mend
    assert isinstance(failure(2, "ERROR: (gcloud.x) unrecognized arguments: --best"), Stop)


def test_without_gcloud_and_with_one_that_hangs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Stop, match="install the Google Cloud CLI"):
        Gcloud().run("x")
    monkeypatch.setattr(gcloud.shutil, "which", lambda name: name)

    def hang(*words, timeout, **more):
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(gcloud.subprocess, "run", hang)
    with pytest.raises(Unreachable, match="did not answer within 7 s"):
        Gcloud(timeout=7).run("x")


# --- requests -----------------------------------------------------------------------------------

TASK = Task(name="lab-01234567-3", number=3, on="tpu-vm", runs=("a", "b"), place="us-west4-a", active=time.time())


class Answers(Gcloud):
    """Answers by the last group and verb of a command."""

    said: dict = {}

    def run(self, *words):
        found = self.said[" ".join(words[2:4])]
        if isinstance(found, Exception):
            raise found
        return json.dumps(found)


def executor(tmp_path, **changes):
    settings = Settings(slice_of("v5p-16"), ("us-west4-a", "us-east5-b"), **changes)
    return TpuVm(Journal(tmp_path), Answers("my-project"), settings, "gs://b/code.tar.gz", ["-m", "launch.cli"])


def test_how_a_request_is_asked_for(tmp_path):
    files = {"startup-script": tmp_path / "s", "lab-config": tmp_path / "c"}
    words = executor(tmp_path).creation(TASK, files)
    pairs = dict(zip(words, words[1:], strict=False))
    assert pairs["create"] == pairs["--node-id"] == TASK.name and pairs["--accelerator-type"] == "v5p-16"
    assert pairs["--runtime-version"] == "v2-alpha-tpuv5" and "--spot" in words
    assert sum(word.startswith("--metadata-from-file") for word in words) == 1  # a second would replace the first
    several = executor(tmp_path, slices=4, provisioning="reserved", valid_for="6h", internal=True).creation(TASK, files)
    pairs = dict(zip(several, several[1:], strict=False))
    assert (pairs["--node-count"], pairs["--node-prefix"]) == ("4", TASK.name) and "--node-id" not in several
    assert {"--reserved", "--internal-ips", "--valid-until-duration=6h"} <= set(several) and "--spot" not in several
    plain = executor(tmp_path, provisioning="on-demand").creation(TASK, files)
    assert not {"--spot", "--reserved"} & set(plain)


def test_a_service_account_is_given_to_gcloud_and_shown_to_nobody(tmp_path):
    made = executor(tmp_path, service_account="robot@my-project.iam")
    assert "--service-account=robot@my-project.iam" in made.creation(TASK, {})
    assert "robot" not in made.preview(TASK) and "--service-account=ACCOUNT" in made.preview(TASK)
    assert "robot" not in json.dumps(made.metadata(TASK))


def host(folder, index, *, hosts=2, done=False, codes=(), age=0.0, current="a", words=(), phase="running"):
    folder.mkdir(parents=True, exist_ok=True)
    said = {
        "host": index, "hosts": hosts, "done": done, "codes": dict(codes), "time": time.time() - age,
        "phase": phase, "current": current, "words": dict(words), "began": time.time() - age,
    }  # fmt: skip
    (folder / f"host-{index}.json").write_text(json.dumps(said))


def request(state, **more):
    return {"state": {"state": state, **more}}


READY = {"state": "READY"}


@pytest.mark.parametrize(
    ("state", "machine", "hosts", "condition", "word"),
    [
        (request("WAITING_FOR_RESOURCES"), READY, [], "pending", "WAITING"),
        (request("ACTIVE"), READY, [], "active", "ACTIVE"),
        (request("ACTIVE"), READY, [{}], "active", "1 of 2 hosts are up"),
        (request("ACTIVE"), READY, [{}, {}], "active", "running"),
        (request("ACTIVE"), READY, [{"age": 3600}, {}], "active", "running"),  # its clock may be wrong
        (request("ACTIVE"), {"state": "PREEMPTED"}, [{}, {}], "lost", "is PREEMPTED"),
        (request("ACTIVE"), NotFound("x"), [{}, {}], "lost", "is gone"),
        (request("SUSPENDED"), READY, [{}, {}], "lost", "is SUSPENDED"),
        (request("SUSPENDING"), READY, [{}, {}], "lost", "is SUSPENDING"),
        (NotFound("x"), READY, [{}, {}], "lost", "no request: absent"),
        (request("FAILED", failedData={"error": {"message": "no capacity"}}), READY, [], "lost", "no capacity"),
        (request("DELETING"), READY, [{}, {}], "active", "running"),
        (NotFound("x"), READY, [{"done": True, "codes": {"a": 0, "b": 0}}] * 2, "ended", "done"),
        (request("SUSPENDED"), READY, [{"done": True, "codes": {"a": 0, "b": 1}}] * 2, "ended", "done"),
        (request("ACTIVE"), READY, [{"done": True, "codes": {"a": 4}}], "failed", "host 1 of 2 did not come up"),
    ],
)
def test_what_becomes_of_a_request(tmp_path, state, machine, hosts, condition, word):
    made = executor(tmp_path)
    made.gcloud.said.update({"queued-resources describe": state, "tpu-vm describe": machine})
    for index, said in enumerate(hosts):
        host(made.journal.task_folder(TASK), index, **said)
    report = made.poll(TASK)
    assert report.condition == condition and word in report.detail


def test_hosts_that_end_and_give_their_slice_back_while_it_is_asked_about_have_ended(tmp_path):
    """What they said last came before their machine went, whatever was known of them a moment earlier."""
    made = executor(tmp_path)
    folder = made.journal.task_folder(TASK)
    for index in range(2):
        host(folder, index)

    class EndWhenAsked(Answers):
        def run(self, *words):
            if words[2:4] == ("tpu-vm", "describe"):
                for index in range(2):
                    host(folder, index, done=True, codes={"a": 0, "b": 0}, phase="done")
            return super().run(*words)

    made.gcloud = EndWhenAsked("my-project")
    made.gcloud.said.update({"queued-resources describe": request("ACTIVE"), "tpu-vm describe": NotFound("x")})
    report = made.poll(TASK)
    assert (report.condition, report.detail, report.codes) == ("ended", "done", {"a": 0, "b": 0})


def test_a_host_without_a_sign_of_life_is_lost_by_this_machines_clock(tmp_path):
    made = executor(tmp_path, silence=0.002)
    made.gcloud.said.update({"queued-resources describe": request("ACTIVE"), "tpu-vm describe": READY})
    for index in range(2):
        host(made.journal.task_folder(TASK), index)
    assert made.poll(TASK).condition == "active"
    time.sleep(0.2)
    host(made.journal.task_folder(TASK), 1)  # this one lives
    report = made.poll(TASK)
    assert report.condition == "lost" and "host 0 has given no sign of life" in report.detail


def test_a_request_that_never_was_active_and_one_whose_hosts_do_not_come(tmp_path):
    made, fresh = executor(tmp_path), Task(**{**vars(TASK), "active": None})
    made.gcloud.said.update({"queued-resources describe": NotFound("x"), "tpu-vm describe": READY})
    assert made.poll(fresh).condition == "absent" and made.cancel(fresh)
    young = Task(**{**vars(fresh), "created": time.time()})  # just asked for: it may not be seen yet
    assert made.poll(young).condition == "pending" and not made.cancel(young)
    made.gcloud.said["queued-resources describe"] = request("FAILED")
    assert made.poll(fresh).condition == "declined"
    made.gcloud.said["queued-resources describe"] = request("SUSPENDED")
    assert made.poll(fresh).condition == "lost"  # capacity that was taken back
    made.gcloud.said["queued-resources describe"] = request("ACTIVE")
    late = Task(**{**vars(TASK), "active": time.time() - 3600})
    assert "host 0, 1 of 2 did not come up" in made.poll(late).detail


def test_hosts_that_left_to_be_taken_away_are_given_back(tmp_path):
    """Or their machines would boot, and begin again what is then begun elsewhere."""
    made = executor(tmp_path)
    made.gcloud.said.update({"queued-resources describe": request("ACTIVE"), "tpu-vm describe": READY})
    for index in range(2):
        host(made.journal.task_folder(TASK), index, done=True, codes={"a": 143}, phase="left")
    assert made.poll(TASK).condition == "lost"
    for index in range(2):  # one that was cancelled left as well, and the others are done
        host(made.journal.task_folder(TASK), index, done=True, codes={"a": 143, "b": 0}, phase="done")
    report = made.poll(TASK)
    assert report.condition == "ended" and report.codes == {"a": 143, "b": 0} and report.began and report.until


def test_exit_statuses_of_a_slice_that_is_taken_away_are_not_its_runs(tmp_path):
    made = executor(tmp_path)
    folder = made.journal.task_folder(TASK)
    for index in range(2):
        host(folder, index, codes={"a": 0, "b": 1}, current="b")
    made.gcloud.said.update({"queued-resources describe": request("SUSPENDING"), "tpu-vm describe": READY})
    report = made.poll(TASK)
    assert report.condition == "lost" and report.codes == {"a": 0} and report.current == "b"


def test_a_startup_script_that_failed_says_why(tmp_path):
    made = executor(tmp_path)
    folder = made.journal.task_folder(TASK)
    folder.mkdir(parents=True)
    (folder / "setup-node-0.json").write_text('{"done": true, "setup": 1, "codes": {}}')
    (folder / "setup-node-0.log").write_text("boot\nERROR: no matching distribution\nsetup failed with status 1\n")
    made.gcloud.said.update({"queued-resources describe": NotFound("x"), "tpu-vm describe": READY})
    report = made.poll(TASK)
    assert report.condition == "failed" and "no matching distribution" in report.detail


def test_a_service_account_that_is_refused_is_not_in_the_message(monkeypatch):
    told = "ERROR: (gcloud.x) INVALID_ARGUMENT: Service account robot@my-project.iam does not exist"
    monkeypatch.setattr(gcloud.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        gcloud.subprocess, "run", lambda *words, **more: subprocess.CompletedProcess(words, 1, "", told)
    )
    with pytest.raises(Refused, match="Service account ACCOUNT does not exist"):
        Gcloud(secrets=("robot@my-project.iam",)).run("x")


def test_answers_that_say_nothing_of_what_there_is(tmp_path):
    made = executor(tmp_path)
    made.gcloud.said.update(
        {"queued-resources describe": Refused("Read requests per minute"), "tpu-vm describe": READY}
    )
    for ask in (made.poll, made.cancel):
        with pytest.raises(Unreachable, match="per minute"):
            ask(TASK)
    made.gcloud.said["queued-resources create"] = NotFound("the network 'x' was not found")
    with pytest.raises(Refused, match="network 'x'"):
        made.submit(TASK)


def test_hosts_speak_with_one_voice():
    assert together([0, 0]) == 0 and together([0, 143]) == 143 and together([1, 143]) == 143
    assert together([2, 1]) == 1 and together([134, 2]) == 134 and together([2, 2]) == 2
    assert together([4, 2]) == 4 and together([3, 1]) == 3
    said = {
        0: {"codes": {"a": 0, "b": 2}, "done": True, "words": {}},
        1: {"codes": {"a": 0}, "done": False, "words": {}},
    }
    hosts = Hosts(said, 2)
    assert hosts.codes(["a", "b"]) == {"a": 0} and not hosts.done  # of b one host is still at it
    assert Hosts(said, 3).missing == [2]


def test_zones_are_tried_in_turn(tmp_path):
    from launch.journal import Ended

    made = executor(tmp_path)
    lost = Task(**{**vars(TASK), "outcomes": {"a": Ended("preempted"), "b": Ended("untouched")}})
    again = Task(**{**vars(lost), "place": "us-east5-b"})
    fine = Task(**{**vars(TASK), "place": "us-east5-b", "outcomes": {"a": Ended("crashed")}})
    assert made.places([], None) == "us-west4-a" and made.places([lost, lost], lost) == "us-east5-b"
    assert made.places([], again) == "us-west4-a" and made.places([], fine) == "us-east5-b"
