# SPDX-License-Identifier: Apache-2.0
# The smallest task that a fresh model solves at times, and rollouts of it: to answer in ASCII.

from dataclasses import dataclass, replace

from research.data.chat import PLAIN
from research.data.tokenizers import Bytes
from research.evals.solve import Solve
from research.evals.tasks.base import Problem
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.objectives.grpo import Grpo
from research.rl.respond import Speech
from research.rl.rollout import Rollouts
from research.train.experiment import AdamW, CheckpointPolicy, Experiment, Steps
from tests import tiny


@dataclass(frozen=True)
class InAscii:
    """1 for a response with at least four characters of ASCII."""

    def score(self, problem, response):
        return float(sum(ord(c) < 128 for c in response.text) >= 4)


@dataclass(frozen=True)
class Letters:
    def size(self, split: str) -> None: ...

    @property
    def verifier(self):
        return InAscii()

    def problem(self, split, index):
        return Problem(f"{index % 97}{'?' if split == 'train' else '!'}", "a")


MODEL = Decoder(
    vocab_size=264, d_model=16, num_layers=1, attention=Attention(num_heads=2), mlp=Mlp(d_ff=32), layers="unrolled"
)
SPEECH = Speech(Bytes(), PLAIN, prompt_length=8, max_tokens=8)


def rollouts(**changes):
    return replace(Rollouts(Letters(), SPEECH, prompts=4, samples=4), **changes)


def experiment(steps=6, *, objective=None, source=None, **changes) -> Experiment:
    made = tiny.experiment(
        steps=steps,
        model=MODEL,
        objective=objective or Grpo(),
        source=source or rollouts(),
        evals=(Solve(Letters(), SPEECH, problems=8, samples=2),),
        optimizer=AdamW(peak=1e-2),
        length=Steps(steps),
        checkpoint=CheckpointPolicy(every=0),
    )
    return replace(made, **changes)
