# SPDX-License-Identifier: Apache-2.0
"""The recipe of DeepSeek-R1 (2025, arXiv 2501.12948, sections 2.2 to 2.4) at its smallest, on long addition.

Question:  What does each stage add: a cold start on a few worked examples, trial and error by rules, its right answers
           as examples among general text, trial and error by several rewards, and those answers for a smaller model?
Command:   lab sweep experiments/r1.py
Hardware:  two CPU cores, half an hour.
Expect:    52% (base), 71% (cold), 97% (rl), 98% (sft, final, zero); small 11% (cold), 36% (rl), 100% (distilled).
"""

from dataclasses import replace
from pathlib import Path

from experiments import grpo_arithmetic as arithmetic
from experiments.grpo_arithmetic import SPEECH, TASK
from research.data import sources
from research.data.chat import PLAIN
from research.data.chat_source import ChatSource
from research.data.tokenizers import Bytes
from research.models.attention import Attention
from research.models.mlp import Mlp
from research.recipes.graph import stage
from research.recipes.sampled import Sampled
from research.rl.rewards.format import Format
from research.rl.rewards.length import SoftOverlong
from research.rl.rewards.weighted import Gated, Weighted
from research.scaling.table import Table
from research.train.experiment import AdamW, Experiment, Init, Steps

GENERAL = sources.PlainText(sources.Stdlib())
EXAMPLES = arithmetic.examples(256)
FORM = Format("...#...")  # steps, and one answer
RULES = Weighted({"correct": (1.0, TASK.verifier), "format": (0.1, FORM)})
SEVERAL = Weighted({**RULES.parts, "brief": (0.2, SoftOverlong(SPEECH.max_tokens, cache=8))})
SMALL = replace(arithmetic.MODEL, d_model=64, num_layers=3, attention=Attention(num_heads=4), mlp=Mlp(d_ff=176))


def learned(corpus: sources.ChatCorpus, steps: int, *, after: str = "", **changes) -> Experiment:
    """Supervised, on conversations; from the weights of another stage, or from scratch."""
    source = ChatSource(corpus=corpus, tokenizer=Bytes(), template=PLAIN, batch_size=16, sequence_length=80)
    plain = replace(arithmetic.cold_start(0), source=source, length=Steps(steps), **changes)
    return replace(plain, init=Init(stage(after)) if after else None)


def tried(after: str, steps: int, reward: Weighted, **changes) -> Experiment:
    """By trial and error, from the weights of another stage."""
    plain = arithmetic.grpo(0)
    return replace(
        plain, source=replace(plain.source, reward=reward), length=Steps(steps), init=Init(stage(after)), **changes
    )


def answers(after: str, problems: int) -> Sampled:
    """A stage's right answers to problems that no other stage has seen."""
    readable = Gated(FORM, TASK.verifier)
    return Sampled(stage(after), TASK, SPEECH, problems=problems, first=1 << 28, samples=4, reward=readable)


def sweep() -> dict[str, Experiment]:
    mixed = sources.Mixture((answers("rl", 4000), GENERAL), (0.8, 0.2))
    return {
        "base": learned(sources.Mixture((GENERAL, EXAMPLES), (0.7, 0.3)), 600),
        "zero": tried("base", 400, RULES),  # R1-Zero: no cold start
        "cold": learned(EXAMPLES, 300, after="base", optimizer=AdamW(peak=1e-3)),
        "rl": tried("cold", 400, RULES),
        "sft": learned(mixed, 600, after="base", optimizer=AdamW(peak=2e-3)),
        "final": tried("sft", 300, SEVERAL),
        "small-cold": learned(EXAMPLES, 600, model=SMALL),
        "small-rl": tried("small-cold", 400, RULES, model=SMALL),
        "small-distilled": learned(answers("final", 4000), 600, model=SMALL),
    }


def analyze(runs: Table, out: Path) -> None:
    from research.recipes.report import write_report  # here: training needs no drawing

    found = write_report(
        runs, out, title="From a base model to a reasoning model", kinds={r.name: [r.name] for r in runs}
    )
    for run, solved in found.items():
        print(f"{run}: {solved['greedy']:.1%} of held-out problems, {solved['length']:.1f} tokens")
