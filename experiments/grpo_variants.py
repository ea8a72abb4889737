# SPDX-License-Identifier: Apache-2.0
"""GRPO and its kin as a few settings each, from one cold start on long addition.

Question:  What do normalisers, clipping, ratios and advantages change at this scale; and do wrong answers grow longer
           under GRPO's normaliser and not under Dr. GRPO's (Liu et al. 2025, section 3.1)?
Command:   lab sweep experiments/grpo_variants.py
Hardware:  two CPU cores, five minutes a variant.
Expect:    GRPO 82%, Dr. GRPO 78% greedily; wrong answers keep their length under both, as sums set it (LOG.md).
"""

from dataclasses import replace
from pathlib import Path

from experiments import grpo_arithmetic as base
from research.objectives.grpo import REFERENCE, Clip, Grpo
from research.objectives.ppo import Ppo
from research.recipes.graph import stage
from research.rl.advantages import BatchNormalised, Gae, GroupRelative, LeaveOneOut
from research.rl.rewards.length import SoftOverlong
from research.rl.rewards.weighted import Weighted
from research.scaling.table import Table
from research.train.experiment import Experiment, Init, Steps

COLD = stage("cold")
LONGEST = base.SPEECH.max_tokens


def common() -> Experiment:
    """Two steps for each rollout, so that ratios are not all one."""
    plain = base.grpo(0)
    return replace(
        plain, objective=Grpo(), source=replace(plain.source, minibatches=2), init=Init(COLD), length=Steps(400)
    )


def grpo() -> Experiment:
    """Shao et al. 2024, with its penalty for leaving the reference."""
    return replace(common(), objective=Grpo(beta=0.04), frozen={REFERENCE: Init(COLD)})


def dr_grpo() -> Experiment:
    """Liu et al. 2025: neither lengths nor standard deviations divide anything."""
    plain = common()
    source = replace(plain.source, advantage=GroupRelative(std=False))
    return replace(plain, objective=Grpo(normaliser="constant", constant=LONGEST), source=source)


def dapo() -> Experiment:
    """Yu et al. 2025: clip-higher, dynamic sampling, a loss of tokens, overlong filtering and soft punishment."""
    plain = common()
    reward = Weighted(
        {"correct": (1.0, base.TASK.verifier), "overlong": (1.0, SoftOverlong(LONGEST, cache=LONGEST // 4))}
    )
    source = replace(plain.source, rounds=3, overlong="mask", reward=reward)
    return replace(plain, objective=Grpo(normaliser="tokens", clip=Clip(high=0.28)), source=source)


def gspo() -> Experiment:
    """Zheng et al. 2025: the ratio of a whole response, clipped close."""
    return replace(common(), objective=Grpo(ratio="sequence", clip=Clip(low=3e-3, high=4e-3)))


def cispo() -> Experiment:
    """MiniMax 2025: the clipped ratio weighs, and no token loses its gradient."""
    return replace(common(), objective=Grpo(normaliser="tokens", clip=Clip(form="weight", low=1.0, high=3.0)))


def rloo() -> Experiment:
    """Ahmadian et al. 2024: plain REINFORCE against the mean of the others, the penalty within the reward."""
    plain = common()
    source = replace(plain.source, advantage=LeaveOneOut(), kl_penalty=0.02, minibatches=1)
    objective = Grpo(normaliser="constant", constant=LONGEST, clip=Clip(form="none"))
    return replace(plain, objective=objective, source=source, frozen={REFERENCE: Init(COLD)})


def reinforce_plus_plus() -> Experiment:
    """Hu 2025: advantages of tokens, normalised over the batch, with the penalty within the reward."""
    plain = common()
    source = replace(plain.source, advantage=BatchNormalised(), kl_penalty=0.01)
    return replace(plain, objective=Grpo(normaliser="tokens"), source=source, frozen={REFERENCE: Init(COLD)})


def ppo() -> Experiment:
    """Schulman et al. 2017: the same with a value head, which the cold start has not."""
    plain = common()
    source = replace(plain.source, advantage=Gae(lam=0.95))
    model = replace(plain.model, value_head=True)
    return replace(plain, model=model, objective=Ppo(), source=source, init=Init(COLD, model=plain.model))


VARIANTS = (grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_plus_plus, ppo)


def sweep() -> dict[str, Experiment]:
    return {"cold": base.cold_start(0), **{make.__name__: make() for make in VARIANTS}}


def smallest() -> dict[str, Experiment]:
    """Each for a few steps from next to nothing: it shows that all of it works, not what it is worth."""

    def few(experiment: Experiment) -> Experiment:
        evals = tuple(replace(one, problems=8, samples=2, every=0) for one in experiment.evals)
        model = replace(experiment.model, d_model=32, num_layers=1, mlp=replace(experiment.model.mlp, d_ff=64))
        init = experiment.init
        if init is not None and init.model is not None:
            init = replace(init, model=replace(model, value_head=False))
        return replace(experiment, model=model, length=Steps(2), evals=evals, init=init, log_every=1)

    return {name: few(experiment) for name, experiment in sweep().items()}


def analyze(runs: Table, out: Path) -> None:
    from research.recipes.report import write_report  # here: training needs no drawing

    found = write_report(runs, out, title="GRPO and its kin", kinds={run.name: [run.name] for run in runs.runs})
    for run, solved in found.items():
        print(f"{run}: {solved['greedy']:.1%} greedily, in {solved['seconds']:.0f} s")
