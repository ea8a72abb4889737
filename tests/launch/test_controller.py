# SPDX-License-Identifier: Apache-2.0
"""The controller over a made-up executor in which anything may go wrong, and submitting processes that die anywhere:
no run is ever in two live tasks, each ends as it must, and nothing is left."""

import random

import pytest

from launch.controller import Controller, Wanted, share
from launch.executor import Refused, Report, Stop, Unreachable
from launch.journal import Ended, Journal, Patience, Task, outcome_of, states

NAMES = ["a", "b", "c", "d-bug", "e"]


class Died(BaseException):
    """The submitting process, at a random point."""


class World:
    """What there is, whoever looks: tasks that were asked for, and runs that are done. Chances are of each call."""

    packs, name, chips = True, "world", 8

    def __init__(self, seed, packs=True):
        self.chance, self.packs = random.Random(seed), packs
        self.there: dict[str, dict] = {}
        self.done: set[str] = set()
        self.times_done: list[str] = []
        self.deadly = 0.0

    def may(self, share):
        return self.chance.random() < share

    def die(self):
        if self.may(self.deadly):
            raise Died

    def unreachable(self):
        self.die()
        if self.may(0.05):
            raise Unreachable("no network")

    def places(self, tasks, last):
        return "somewhere"

    def submit(self, task):
        self.unreachable()
        if self.may(0.1):
            raise Refused("no quota")
        if task.name not in self.there:
            alive = {run for one in self.there.values() if one["state"] != "gone" for run in one["left"]}
            assert not alive & set(task.runs), "a run in two tasks"
            self.there[task.name] = {"state": "pending", "left": list(task.runs), "codes": {}}
        self.die()
        return {}

    def move(self, one):
        """Time goes by for one task."""
        if one["state"] == "pending" and self.may(0.5):
            one["state"] = "failed" if self.may(0.15) else "active"
        elif one["state"] == "active" and self.may(0.6):
            if self.may(0.2):
                one["state"] = "lost"
            elif one["left"]:
                run = one["left"].pop(0)
                crashed = run.endswith("bug") or self.may(0.05)
                one["codes"][run] = 1 if crashed else 143 if self.may(0.05) else 0
                if one["codes"][run] == 0:
                    self.done.add(run)
                    self.times_done.append(run)
            else:
                one["state"] = "ended"

    def poll(self, task):
        self.unreachable()
        one = self.there.get(task.name)
        if one is None:
            return Report("absent")
        self.move(one)
        current = one["left"][0] if one["left"] and one["state"] == "active" else ""
        return Report(one["state"], "", dict(one["codes"]), current)

    def cancel(self, task):
        self.unreachable()
        one = self.there.get(task.name)
        if one is not None and self.may(0.5):
            one["state"] = "gone"
            del self.there[task.name]
        self.die()
        return task.name not in self.there

    def logs(self, task, run):
        return []

    def preview(self, task):
        return ""

    def interrupt(self, tasks):
        return ""


class Mortal(Journal):
    """A journal whose process may die before and after each write."""

    world: World

    def record(self, task):
        self.world.die()
        super().record(task)
        self.world.die()

    def intend(self, *words, **more):
        self.world.die()
        made = super().intend(*words, **more)
        self.world.die()
        return made


def sweep(world, folder, after=None, **more):
    journal = Mortal(folder)
    journal.world = world
    runs = [
        Wanted(name, 1.0, lambda name=name: name in world.done, after=(after or {}).get(name, ())) for name in NAMES
    ]
    patience = Patience(retries=3, preemptions=1000, troubles=1000, declined=1000, backoff=0.0)
    return Controller(journal, journal.begin({"runs": NAMES}), world, runs, 2, patience, lambda text: None, **more)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_whatever_goes_wrong_every_run_is_done_once(tmp_path, seed, packs):
    world = World(seed, packs)
    world.deadly = 0.02
    controller, deaths = sweep(world, tmp_path), 0
    for _ in range(5000):
        try:
            if not controller.step():
                break
        except Died:
            deaths += 1
            controller = sweep(world, tmp_path)  # another process, which knows the journal alone
    else:
        pytest.fail("it does not end")
    known = controller.states()
    assert {name for name, run in known.items() if run.state == "finished"} == world.done
    assert known["d-bug"].state == "failed" and known["d-bug"].counts["failures"] == 4
    assert world.times_done.count("d-bug") == 0
    assert all(world.times_done.count(name) == 1 for name in world.done)  # and not after it was done
    assert world.there == {} and not any(task.live for task in controller.journal.tasks())
    assert {run.state for run in known.values()} <= {"finished", "failed"}
    assert deaths > 0 or seed > 3


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_what_begins_from_another_run_waits_for_it_and_ends_where_that_failed(tmp_path, seed, packs):
    """b begins from a, c from b and a; e begins from d, which has a bug."""
    after = {"b": ("a",), "c": ("b", "a"), "e": ("d-bug",)}
    world = World(seed, packs)
    submit = world.submit

    def checked(task):
        assert all(set(after.get(run, ())) <= world.done for run in task.runs)
        return submit(task)

    world.submit = checked
    controller = sweep(world, tmp_path, after)
    for _ in range(5000):
        if not controller.step():
            break
    else:
        pytest.fail("it does not end")
    known = {name: run.state for name, run in controller.states().items()}
    assert known["d-bug"] == "failed" and known["e"] == "waiting" and "e" not in world.times_done
    if "a" in world.done and "b" in world.done:
        assert world.times_done.index("a") < world.times_done.index("b")
    assert known["b"] in ("finished", "failed") or known["a"] == "failed"


def test_two_processes_cannot_begin_the_same_task(tmp_path):
    first, second = Journal(tmp_path), Journal(tmp_path)
    sweep_id = first.begin({"runs": ["a"]})
    assert second.begin({"runs": ["a"]}) == sweep_id
    assert first.intend(sweep_id, [], on="x", runs=("a",)) is not None
    assert second.intend(sweep_id, [], on="x", runs=("a",)) is None
    assert [task.runs for task in second.tasks()] == [("a",)]


def test_what_a_run_left_with():
    assert [outcome_of(code) for code in (0, 1, 2, 3, 4, 130, 143, 137)] == [
        "finished", "crashed", "refused", "stalled", "unplaced", "again", "again", "crashed"
    ]  # fmt: skip


def test_preemptions_and_failures_are_counted_apart_and_each_has_its_limit():
    def after(*outcomes):
        patience = Patience(retries=1, preemptions=2, backoff=10.0)
        tasks = [
            Task(f"t{i}", i, "x", ("a",), state="ended", ended=100.0, outcomes={"a": Ended(outcome, None, "so it was")})
            for i, outcome in enumerate(outcomes)
        ]
        return states(["a"], tasks, set(), set(), patience)["a"]

    assert after("preempted", "again").counts == {"failures": 0, "preemptions": 2, "troubles": 0, "declined": 0}
    assert after("preempted", "again").state == "waiting" and after("preempted", "again").until == 120.0
    assert after("preempted", "again", "preempted").state == "failed"
    assert after("crashed").state == "waiting" and after("crashed", "preempted", "crashed").state == "failed"
    assert after("refused").state == "failed"  # nothing to try again
    assert after("stalled", "unplaced").counts["troubles"] == 2
    assert after("untouched", "untouched").until == 0.0  # it waited for others: no fault, no backoff


def test_what_failed_is_tried_again_once_the_code_has_changed():
    tasks = [Task("t", 1, "x", ("a",), state="ended", ended=1.0, version="old", outcomes={"a": Ended("refused")})]
    assert states(["a"], tasks, set(), set(), Patience(), "old")["a"].state == "failed"
    assert states(["a"], tasks, set(), {"a"}, Patience(), "old")["a"].state == "failed"  # and not cancelled
    assert states(["a"], tasks, set(), set(), Patience(), "new")["a"].state == "waiting"


def test_what_is_ready_is_shared_out_evenly_and_what_failed_goes_alone():
    runs = [Wanted(name, flops, bool) for name, flops in zip("abcdef", (1, 1, 2, 4, 8, 16), strict=True)]
    assert [run.name for run in share(runs, set(), 2)] == list("abcde")
    assert [run.name for run in share(runs, set(), 6)] == ["a"]  # a room for each
    assert [run.name for run in share(runs, {"a"}, 2)] == ["a"]


def test_a_budget_stops_what_is_new_and_a_login_that_ran_out_stops_in_the_end(tmp_path):
    world = World(1)
    controller = sweep(world, tmp_path, budget=0.5)
    task = controller.journal.intend("0", [], on="world", runs=("a",), place="x", chips=1000)
    controller.journal.record(task.now("active"))
    world.there[task.name] = {"state": "active", "left": ["a"], "codes": {}}
    controller.journal.record(
        Task(**{**vars(task), "state": "ended", "active": 0.0, "ended": 3600.0, "outcomes": {"a": Ended("preempted")}})
    )
    assert not controller.step() and len(controller.journal.tasks()) == 1  # 1000 chip-hours are used

    class Locked(World):
        def unreachable(self):
            raise Unreachable("Reauthentication failed", mend="log in again")

    locked = sweep(Locked(1), tmp_path / "other")
    with pytest.raises(Stop, match="Reauthentication failed: log in again, then repeat"):
        for _ in range(100):
            locked.step()


def test_a_live_task_of_another_executor_is_not_forgotten(tmp_path):
    controller = sweep(World(1), tmp_path)
    controller.journal.intend("0", [], on="elsewhere", runs=("a",))
    with pytest.raises(Stop, match="was begun with --on elsewhere"):
        controller.step()
