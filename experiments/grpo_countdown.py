# SPDX-License-Identifier: Apache-2.0
"""Countdown by trial and error: three numbers are to make a fourth.

Question:  How far does GRPO take a model beyond the worked examples that it began with, where answers are to be found?
Command:   lab sweep experiments/grpo_countdown.py
Hardware:  two CPU cores, a quarter of an hour.
Expect:    pass@1 of 30% after the cold start, 59% after GRPO; pass@16 falls from 83% to 67%.
"""

from dataclasses import replace
from pathlib import Path

from experiments import grpo_arithmetic as base
from research.data.chat import PLAIN
from research.data.chat_source import ChatSource
from research.data.tokenizers import Bytes
from research.evals.solve import Solve
from research.evals.tasks.base import Marked
from research.evals.tasks.countdown import Countdown
from research.evals.tasks.worked import Worked
from research.recipes.graph import stage
from research.rl.respond import Speech
from research.rl.rollout import Rollouts
from research.scaling.table import Table
from research.train.experiment import AdamW, Experiment, Init, Steps

TASK = Countdown(count=3, largest=20, targets=(5, 99), prompt="{numbers}>{target}:", mark=Marked("#"))
SPEECH = Speech(Bytes(), PLAIN, prompt_length=16, max_tokens=40)


def cold_start() -> Experiment:
    source = ChatSource(
        corpus=Worked(TASK, count=20000), tokenizer=Bytes(), template=PLAIN, batch_size=32, sequence_length=96
    )
    return replace(
        base.cold_start(0),
        source=source,
        optimizer=AdamW(peak=3e-3),
        length=Steps(400),
        evals=(Solve(TASK, SPEECH, problems=512, samples=16),),
    )


def grpo() -> Experiment:
    return replace(
        base.grpo(0),
        source=Rollouts(TASK, SPEECH, prompts=16, samples=16, rounds=3),
        optimizer=replace(base.grpo(0).optimizer, peak=3e-4),
        length=Steps(500),
        init=Init(stage("cold")),
        evals=(Solve(TASK, SPEECH, problems=512, samples=16, every=100),),
    )


def sweep() -> dict[str, Experiment]:
    return {"cold": cold_start(), "grpo": grpo()}


def analyze(runs: Table, out: Path) -> None:
    from research.recipes.report import write_report  # here: training needs no drawing

    found = write_report(runs, out, title="Countdown by trial and error", kinds={"cold": ["cold"], "GRPO": ["grpo"]})
    for run, solved in found.items():
        print(f"{run}: {solved['greedy']:.1%} greedily, pass@1 {solved['pass@1']:.1%}, pass@16 {solved['pass@16']:.1%}")
