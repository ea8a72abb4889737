# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning from a verifier, at its smallest: long addition from a few worked examples.

Question:  A model that has seen 256 worked sums solves half of others. How far does it come by trial and error on
           problems without solutions, told right or wrong and no more (GRPO: Shao et al. 2024), and how far by more of
           the same examples?
Command:   lab sweep experiments/grpo_arithmetic.py
Hardware:  two CPU cores, an hour and a quarter.
Expect:    40% to 53% solved greedily after the cold start, 92% to 97% after GRPO in 10 to 11 minutes a seed, 63% to 76%
           after as many FLOPs of the same examples.
"""

from dataclasses import replace
from pathlib import Path

from research.data.chat import PLAIN
from research.data.chat_source import ChatSource
from research.data.tokenizers import Bytes
from research.evals.solve import Solve
from research.evals.tasks.addition import Addition
from research.evals.tasks.worked import Worked
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.objectives.grpo import Clip, Grpo
from research.objectives.next_token import NextToken
from research.recipes.graph import stage
from research.rl.respond import Speech
from research.rl.rollout import Rollouts
from research.scaling.table import Table
from research.train.experiment import AdamW, CheckpointPolicy, Experiment, Flops, Init, Steps
from research.train.optimizers import Schedule

TASK = Addition(digits=3)
SPEECH = Speech(Bytes(), PLAIN, prompt_length=10, max_tokens=32)
SEEDS = (0, 1, 2)
MODEL = Decoder(
    vocab_size=264,
    d_model=128,
    num_layers=4,
    attention=Attention(num_heads=4),
    mlp=Mlp(d_ff=352),
    layers="unrolled",
)


def examples(count: int) -> Worked:
    """Worked sums. Those of the validation split are never learnt from."""
    return Worked(TASK, count=count)


def cold_start(seed: int) -> Experiment:
    """From scratch on 256 worked sums."""
    source = ChatSource(corpus=examples(256), tokenizer=Bytes(), template=PLAIN, batch_size=16, sequence_length=80)
    return Experiment(
        name="cold",
        model=MODEL,
        objective=NextToken(),
        source=source,
        optimizer=AdamW(peak=3e-3),
        length=Steps(400),
        evals=(Solve(TASK, SPEECH, problems=512, samples=16),),
        checkpoint=CheckpointPolicy(every=0),
        seed=seed,
    )


def grpo(seed: int) -> Experiment:
    """The cold start goes on by trial and error, on sums that nobody has worked out."""
    return replace(
        cold_start(seed),
        objective=Grpo(normaliser="tokens", clip=Clip(high=0.28)),
        source=Rollouts(TASK, SPEECH, prompts=16, samples=16),
        optimizer=AdamW(peak=4e-4, schedule=Schedule("linear", warmup=Steps(10)), weight_decay=0.0),
        length=Steps(700),
        init=Init(stage(f"cold-{seed}")),
        evals=(Solve(TASK, SPEECH, problems=512, samples=0, every=100),),
        checkpoint=CheckpointPolicy(every=100),
    )


def more_examples(seed: int) -> Experiment:
    """The cold start goes on with its own examples, for what the trial and error costs: sampling is a third of it."""
    return replace(
        cold_start(seed),
        optimizer=AdamW(peak=1e-3),
        length=Flops(grpo(seed).flops * 4 / 3),
        init=Init(stage(f"cold-{seed}")),
        evals=(Solve(TASK, SPEECH, problems=512, samples=16, every=2000),),
    )


def sweep() -> dict[str, Experiment]:
    kinds = {"cold": cold_start, "grpo": grpo, "more": more_examples}
    return {f"{kind}-{seed}": make(seed) for seed in SEEDS for kind, make in kinds.items()}


def analyze(runs: Table, out: Path) -> None:
    from research.recipes.report import write_report  # here: training needs no drawing

    kinds = {"cold start: 256 examples": "cold", "GRPO": "grpo", "more of the same examples": "more"}
    named = {label: [f"{kind}-{seed}" for seed in SEEDS] for label, kind in kinds.items()}
    found = write_report(runs, out, title="Long addition by trial and error", kinds=named)
    for run, solved in found.items():
        print(f"{run}: {solved['greedy']:.1%} greedily, in {solved['seconds']:.0f} s")
