# SPDX-License-Identifier: Apache-2.0
"""Experiments whose inputs are other experiments' outputs: a directed graph without circles, in one study.

    {"sft": ..., "rl": replace(..., init=Init(stage("sft")))}

A stage is an ordinary experiment. Once what it takes is finished, ``resolved`` puts in the path and the content hash of
those weights: a stage whose inputs have changed has another hash, and all that has not changed is not done again.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from research.core.config import mapped
from research.core.files import read_json
from research.core.types import UserError
from research.train import weights
from research.train.checkpoint import RESULT
from research.train.experiment import Experiment

PREFIX = "stage:"


class Waiting(UserError):
    """A stage whose inputs are not finished."""


def stage(name: str) -> str:
    """What stands for the last weights of the study's experiment ``name``, in the place of a checkpoint's path."""
    return PREFIX + name


def inputs(experiment: Experiment) -> tuple[str, ...]:
    """The experiments whose weights this one takes, in the order in which they are named."""
    found: dict[str, None] = {}

    def look(part: Any) -> Any:
        if (name := _stage_of(part)) is not None:
            found[name] = None
        return part

    mapped(look, experiment)
    return tuple(found)


def order(experiments: Mapping[str, Experiment]) -> list[str]:
    """Names, each after its inputs; else the cheapest first. Raises UserError for inputs that are not there, for
    circles, and naming the first experiment of which it can be told now that it will not run: by its settings, or as
    the models of the stages that it begins from are others."""
    for name, experiment in experiments.items():
        with _named(name):
            experiment.check()
    needs = {name: inputs(experiment) for name, experiment in experiments.items()}
    for name, wanted in needs.items():
        for one in wanted:
            if one not in experiments:
                raise UserError(
                    f"{name} begins from the stage {one!r}, which the study has not; it has: {', '.join(experiments)}."
                )
    waiting, found = sorted(experiments, key=lambda name: experiments[name].flops), list[str]()
    while waiting:
        ready = next((name for name in waiting if set(needs[name]) <= set(found)), None)
        if ready is None:
            raise UserError(f"The stages {', '.join(sorted(waiting))} wait for each other: one must begin without.")
        found.append(ready)
        waiting.remove(ready)
    for name, experiment in experiments.items():
        with _named(name):
            for init in filter(None, (experiment.init, *experiment.frozen.values())):
                if (begun := _stage_of(init)) is not None:
                    own, wanted = experiments[begun].model, init.model or experiment.model
                    weights.check_fits(own, wanted, experiment.precision, f"the stage {begun!r}")
    return found


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def resolved(experiment: Experiment, directory: Path, stages: Mapping[str, Experiment] | None = None) -> Experiment:
    """The experiment with what its inputs have left under ``directory``, a folder for each. Raises Waiting for one that
    is not finished, or, where the study's stages are given, that was finished with other settings than it has now."""
    return filled(experiment, directory, outputs(experiment, directory, stages))


def outputs(experiment: Experiment, directory: Path, stages: Mapping[str, Experiment] | None = None) -> dict[str, str]:
    """The content hash of the weights of each of its inputs. Raises Waiting."""
    contents = {}
    for name in inputs(experiment):
        result = read_json(directory / name / RESULT)
        if result is None or "weights" not in result:
            raise Waiting(f"It begins from the stage {name!r}, which is not finished: run that first.")
        if stages is not None and result.get("hash") != resolved(stages[name], directory, stages).hash:
            raise Waiting(
                f"It begins from the stage {name!r}, which was finished with other settings than it has now: remove "
                f"{directory / name} to run it again."
            )
        contents[name] = result["weights"]
    return contents


def filled(experiment: Experiment, directory: Path, contents: Mapping[str, str]) -> Experiment:
    """The experiment with the paths and contents of its inputs."""

    def fill(part: Any) -> Any:
        name = _stage_of(part)
        return part if name is None else replace(part, checkpoint=str(directory / name), content=contents[name])

    return mapped(fill, experiment)


def as_far_as_known(experiment: Experiment, directory: Path) -> Experiment:
    """``resolved``; as it is where it still waits."""
    try:
        return resolved(experiment, directory)
    except Waiting:
        return experiment


def _stage_of(part: Any) -> str | None:
    """The stage that a part of an experiment takes its weights from: it has a checkpoint, and its content."""
    path = getattr(part, "checkpoint", None)
    given = isinstance(path, str) and path.startswith(PREFIX) and hasattr(part, "content")
    return path[len(PREFIX) :] if given else None
