# SPDX-License-Identifier: Apache-2.0
# Stages of a study: their order, their inputs by content, and what is done again when an input changes.

from dataclasses import replace

import pytest

from launch import collect, study
from launch import sweep as sweeps
from launch.study import Study
from research.core.files import read_json
from research.core.types import UserError
from research.recipes.graph import Waiting, inputs, order, resolved, stage
from research.train import loop, weights
from research.train.checkpoint import CheckpointError
from research.train.experiment import Init
from tests import tiny


def stages(steps=3):
    first = replace(tiny.experiment(steps=steps), evals=())
    second = replace(first, init=Init(stage("first")), seed=1)
    third = replace(first, init=Init(stage("second")), frozen={"reference": Init(stage("first"))}, seed=2)
    return {"third": third, "second": second, "first": first}


def test_inputs_come_first_and_circles_are_told():
    experiments = stages()
    assert inputs(experiments["third"]) == ("second", "first") and order(experiments) == ["first", "second", "third"]
    with pytest.raises(UserError, match="'first', which the study has not"):
        order({"second": experiments["second"]})
    with pytest.raises(UserError, match="wait for each other"):
        order(experiments | {"first": replace(experiments["first"], init=Init(stage("third")))})


def test_what_will_not_run_is_told_before_the_first_stage_does(tmp_path):
    experiments = {name: one for name, one in stages().items() if name != "third"}
    valued = replace(experiments["second"], model=replace(tiny.MODEL, value_head=True))
    for changed, told in (
        (replace(experiments["second"], model=replace(tiny.MODEL, d_model=64)), "take over the checkpoint's model"),
        (valued, "model=the checkpoint's model.*value head begins afresh"),
        (replace(experiments["second"], log_every=0), "log_every is 0"),
        (replace(experiments["second"], length=600), "length is 600: it must be Tokens or"),
        (replace(experiments["second"], frozen={"reference": stage("first")}), "frozen is .*: it must be a mapping"),
    ):
        with pytest.raises(UserError, match=f"^second: .*{told}"):
            sweeps.sweep(Study("graph", "graph.py", experiments | {"second": changed}, None), tmp_path)
    assert not list(tmp_path.iterdir())
    order(experiments | {"second": replace(valued, init=Init(stage("first"), model=tiny.MODEL))})


def test_one_stage_is_changed_by_its_name():
    changed = study.load("experiments/r1.py", ["rl.source.samples=4", "seed=3"]).experiments
    assert changed["rl"].source.samples == 4 and changed["zero"].source.samples == 16
    assert {experiment.seed for experiment in changed.values()} == {3}
    with pytest.raises(UserError, match="ChatSource has no field 'samples'"):
        study.load("experiments/r1.py", ["source.samples=4"])
    with pytest.raises(UserError, match="'rll' is neither a field of experiments .* nor one of the study's runs"):
        study.load("experiments/r1.py", ["rll.seed=4"])
    with pytest.raises(UserError, match="--set name="):
        study.load("experiments/r1.py", ["rl.name=x"])
    changed = study.load("experiments/r1.py", ["seed=1", "seed=2", "seed=1"]).experiments
    assert changed["rl"].seed == 1  # the last one wins


def test_weights_of_another_tokenizer_are_refused(tmp_path, cache_dir):
    first = replace(tiny.experiment(steps=2), evals=())
    loop.run(first, tmp_path / "first", loop.Options(cache_dir=cache_dir))
    path = tmp_path / "first" / "result.json"
    path.write_text(path.read_text().replace(read_json(path)["data"]["tokenizer"], "another"))
    second = replace(first, init=Init(str(tmp_path / "first")))
    with pytest.raises(UserError, match="were trained with the tokenizer .* give both the same tokenizer"):
        loop.run(second, tmp_path / "second", loop.Options(cache_dir=cache_dir))


def test_a_sweep_runs_stages_in_order_and_does_again_what_has_other_inputs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "graph"
    experiments = {name: replace(one, name=name) for name, one in stages().items()}
    with pytest.raises(Waiting, match="'first', which is not finished"):
        resolved(experiments["second"], directory)
    made = Study("graph", "graph.py", experiments, None)
    assert sweeps.sweep(made, directory) == 0
    given = resolved(experiments["second"], directory).init
    assert given.checkpoint == str(directory / "first") and given.content == weights.content(directory / "first")
    done = {name: collect.status(one, directory / name)[0] for name, one in experiments.items()}
    assert set(done.values()) == {"finished"}
    before = read_json(directory / "third" / "result.json")
    assert sweeps.sweep(made, directory) == 0 and "third: finished before" in capsys.readouterr().err
    assert read_json(directory / "third" / "result.json") == before

    # where the weights lie does not count, what they are does
    moved = directory.rename(tmp_path / "moved")
    assert collect.status(experiments["third"], moved / "third")[0] == "finished"
    (moved / "first").rename(moved / "old")
    changed = {**experiments, "first": replace(experiments["first"], seed=7)}
    assert collect.status(changed["second"], moved / "second")[0] == "changed"
    assert sweeps.sweep(Study("graph", "graph.py", changed, None), moved) == 1  # nothing is overwritten
    told = capsys.readouterr().err
    assert f"second: {moved / 'second'} was begun with other settings (init.content" in told
    assert "third: It begins from the stage 'second', which was finished with other settings than it has now" in told
    with pytest.raises(CheckpointError, match="is wanted"):
        tiny_run = replace(changed["second"], init=replace(given, checkpoint=str(moved / "first")))
        sweeps.local.run(tiny_run, tmp_path / "other")
