# SPDX-License-Identifier: Apache-2.0
"""Gathers every run of a study into one table."""

from pathlib import Path
from typing import Any

from launch import host
from launch.local import FAILURE
from launch.locks import is_locked
from launch.study import Study
from research.recipes import graph
from research.scaling import cost
from research.scaling.table import Run, Status, Table
from research.train import loop, metrics
from research.train.experiment import Experiment
from research.train.places import is_remote


def status(experiment: Experiment, directory: Path) -> tuple[Status, dict[str, Any]]:
    """What is known of a run: finished, changed (finished, under other settings than the study has now), diverged,
    failed, running (a process is at it), interrupted or missing."""
    experiment = graph.as_far_as_known(experiment, directory.parent)
    result = loop.read_json(directory / loop.RESULT)
    if result is not None and result.get("hash") == experiment.hash:
        return "finished", result
    if result is not None:
        return "changed", {}
    failure = loop.read_json(directory / FAILURE)
    if failure is not None:
        return failure.get("status", "failed"), {}
    if not (directory / metrics.FILE).exists():
        return "missing", {}
    here = host.mirrored(directory) if is_remote(directory) else directory
    return ("running" if is_locked(here) else "interrupted"), {}


def failure(directory: Path) -> str | None:
    """What a run's failure says of itself, where it left something."""
    found = loop.read_json(directory / FAILURE)
    return None if found is None else str(found.get("message", ""))


def table(study: Study, directory: Path) -> Table:
    """One row per experiment of the study, whether it has run or not."""
    rows = []
    for name, experiment in study.experiments.items():
        state, result = status(experiment, directory / name)
        params = cost.params(experiment.model)
        data, words = result.get("data", {}), described(experiment)
        rows.append(
            Run(
                name=name,
                params=params.total,
                non_embedding_params=params.non_embedding,
                tokens=experiment.tokens,
                flops=experiment.flops,
                loss=result.get("loss"),
                bits_per_byte=result.get("bits_per_byte"),
                status=state,
                seconds=result.get("seconds"),
                corpus_bytes=data.get("corpus_bytes"),
                corpus_hash=data.get("corpus_hash"),
                experts=cost.experts(experiment.model),
                active_params=params.active,
                head_params=experiment.model.vocab_size * experiment.model.d_model,
                batch_tokens=experiment.tokens_per_step,
                unique_tokens=data.get("train_tokens"),
                **words,
            )
        )
    return Table(tuple(rows))


def described(experiment: Experiment) -> dict[str, Any]:
    """Schedule and tokenizer of a run, where its optimizer and source have them."""
    schedule = getattr(experiment.optimizer, "schedule", None)
    tokenizer = getattr(experiment.source, "tokenizer", None)
    clock = experiment.clock
    return {
        "learning_rate": getattr(experiment.optimizer, "peak", None),
        "schedule": None if schedule is None else str(schedule),
        "warmup_tokens": None if schedule is None else clock.steps(schedule.warmup) * clock.tokens_per_step,
        "tokenizer": None if tokenizer is None else " ".join(to_text(tokenizer)),
    }


def to_text(tokenizer: Any) -> list[str]:
    kind = [type(tokenizer).__name__]
    return kind + [f"{name} {value}" for name in ("kind", "vocab_size") if (value := getattr(tokenizer, name, None))]
