# SPDX-License-Identifier: Apache-2.0
"""Rollouts of the live policy as a source of batches: sample, score, and compare the responses to each prompt.

A rollout is a function of (policy, seed, its number): of where its problems begin too, when some of them were drawn
again. It is cut into minibatches and gone through ``epochs`` times, a minibatch a step.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from research.core.sharding import (
    MeshSpec,
    Split,
    batch_sharding,
    batch_splits,
    make_mesh,
    replicated,
    tree_shardings,
)
from research.core.types import Batch, Context, Metrics, UserError
from research.data.packing import order
from research.data.tokenizers import Tokenizer
from research.evals.tasks.base import Problem, Reward, Task
from research.models.bound import Bound
from research.objectives.grpo import REFERENCE, estimated_kl
from research.rl.advantages import Advantage, Gae, GroupRelative, LeaveOneOut, Rewarded
from research.rl.groups import Group, answered, records, summary
from research.rl.groups import rows as assembled
from research.rl.record import Samples, pack, unpack
from research.rl.respond import Speaker, Speech, seed_of
from research.rl.rewards.learned import LearnedReward, learned
from research.rl.score import score

PASSED_OVER = 1000  # problems in a row that are too long before it is an error
PROBLEMS_OF_A_SEED = 1 << 20  # of endless tasks: each seed has its own, after the first ones, which serve as examples


@dataclass(frozen=True)
class Rollouts:
    """Responses of the policy in training to a task's problems, with advantages: batches for ``Grpo``.

    prompts, samples: groups of a rollout, and responses to each. temperature: of the sampler; the loss uses it too.
    reward: what responses are worth; None: the task's verifier. learned: what models give besides, by their weights.
    advantage: how rewards become advantages (``research.rl.advantages``).
    epochs, minibatches: how often a rollout is gone through, in how many steps each time.
    staleness: rollouts that the sampler lags behind: with 1, the next is sampled while this one is trained on (on one
        device; on several, before it).
    Problems whose prompts are longer than ``speech.prompt_length`` are passed over; prompts/too_long is their share.
    rounds: with more than 1, groups whose rewards are all equal are drawn again from further problems, so many times
        at most (dynamic sampling: Yu et al. 2025, section 3.2).
    overlong: responses that were cut off are learnt from ("train") or not ("mask", overlong filtering: section 3.4).
    kl_penalty, kl: times that estimate (``research.objectives.grpo.Grpo``) of each token's KL from the frozen model
        "reference" is taken off the reward.
    rescore: the policy's own log-probabilities are computed before the first epoch, for ``Grpo.importance_cap``.
    generation: a mesh of its own for sampling, over the same devices.
    slots: sequences sampled at a time; 0: all. workers: threads that score. recorded: groups of each rollout whose
        responses go to samples.jsonl.
    """

    task: Task
    speech: Speech
    prompts: int
    samples: int
    temperature: float = 1.0
    reward: Reward | None = None
    learned: tuple[LearnedReward, ...] = ()
    advantage: Advantage = field(default_factory=GroupRelative)
    epochs: int = 1
    minibatches: int = 1
    staleness: int = 0
    rounds: int = 1
    overlong: Literal["train", "mask"] = "train"
    kl_penalty: float = 0.0
    kl: Literal["k1", "k2", "k3"] = "k1"
    rescore: bool = False
    generation: MeshSpec | None = None
    slots: int = 0
    workers: int = 4
    recorded: int = 1

    def __post_init__(self) -> None:
        least = dict(
            prompts=1, samples=1, epochs=1, minibatches=1, staleness=0, rounds=1, slots=0, workers=1, recorded=0
        )
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"source.{name} is {getattr(self, name)}: it must be at least {value}.")
        if self.prompts * self.samples % self.minibatches:
            raise UserError(
                f"A rollout of {self.prompts} x {self.samples} responses does not split into {self.minibatches} "
                "minibatches: choose a number that divides it."
            )
        if not self.temperature > 0 or self.kl_penalty < 0:
            raise UserError(
                f"A rollout's temperature must be above 0 and its kl_penalty at least 0; given {self.temperature} and "
                f"{self.kl_penalty}: a greedy choice has nothing to learn from."
            )
        if self.samples < 2 and (self.rounds > 1 or isinstance(self.advantage, GroupRelative | LeaveOneOut)):
            raise UserError(
                f"The responses to one prompt are compared, and source.samples is {self.samples}: set it to at least 2."
            )

    @property
    def batch_size(self) -> int:
        return self.prompts * self.samples // self.minibatches

    @property
    def sequence_length(self) -> int:
        return self.speech.prompt_length + self.speech.max_tokens

    @property
    def splits(self) -> list[Split]:
        """How a mesh divides the responses, which are shorter than the rows."""
        return batch_splits(self.batch_size, self.speech.max_tokens)

    @property
    def steps(self) -> int:
        """Optimizer steps of a rollout."""
        return self.epochs * self.minibatches

    @property
    def scored(self) -> bool:
        """Whether the policy's own log-probabilities or values are computed."""
        return self.rescore or self.kl_penalty > 0 or self.advantage.uses_values

    def tokenizer_for(self, cache_dir: Path) -> Tokenizer:
        return self.speech.tokenizer_for(cache_dir)

    def vocab_size(self, cache_dir: Path) -> int:
        return self.tokenizer_for(cache_dir).vocab_size

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows, length = self.batch_size, self.speech.max_tokens
        given = {"tokens", "positions", "segment_ids"}
        ids = {name: jax.ShapeDtypeStruct((rows, self.sequence_length), np.int32) for name in sorted(given)}
        names = ["weights", "advantages", "sampler_log_probs", "temperature"]
        names += ["old_log_probs"] if self.rescore else []
        names += ["values", "returns"] if self.advantage.uses_values else []
        numbers = dict.fromkeys(names, jax.ShapeDtypeStruct((rows, length), np.float32))
        targets = jax.ShapeDtypeStruct((rows, length), np.int32)
        return {**ids, "targets": targets, **numbers}

    def start(self, context: Context) -> "RolloutStream":
        return RolloutStream(self, context)

    def check(self, experiment: Any) -> None:
        """Raises UserError where a frozen model is not there that rewards need."""
        asked = {reward.model: f"The learned reward {reward.name!r}" for reward in self.learned}
        for name, who in ((asked | {REFERENCE: "kl_penalty"}) if self.kl_penalty else asked).items():
            if name not in experiment.frozen:
                raise UserError(
                    f"{who} asks the frozen model {name!r}: give the experiment frozen={{'{name}': Init(...)}}."
                )


class Rollout(NamedTuple):
    """rows: arrays of all responses by name, prompt by prompt; rewards and whether each was finished among them, until
    it is gone through: then advantages. report: what is known of them. records: what samples.jsonl is to say. sampled:
    the step whose policy sampled it."""

    rows: dict[str, np.ndarray]
    report: Metrics
    records: list[Mapping[str, Any]]
    sampled: int

    def stored(self) -> dict[str, Any]:
        """As JSON."""
        return {**self._asdict(), "rows": pack(self.rows)}


class RolloutStream:
    """Batches of ``Rollouts`` (see ``research.core.types.Stream``)."""

    num_batches: int | None = None

    def __init__(self, source: Rollouts, context: Context) -> None:
        self.source, self.context = source, context
        self.speaker = Speaker(
            source.speech, cache_dir=context.cache_dir, temperature=source.temperature, slots=source.slots
        )
        self.reward = source.reward or source.task.verifier
        self.info = {"vocab_size": self.speaker.tokenizer.vocab_size, "tokenizer": self.speaker.tokenizer.fingerprint}
        self._samples = Samples(context.directory)
        self._sharding = batch_sharding(context.mesh)
        self._mesh = context.mesh if source.generation is None else make_mesh(source.generation)
        self._scorers = ThreadPoolExecutor(source.workers, thread_name_prefix="reward")
        self._sampler = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._step, self._cursor = 0, 0
        self._held: dict[int, Rollout | Future[Rollout]] = {}  # by number
        self._report: Metrics = {}
        self._returned, self._trained = 0.0, 0.0  # when the last rollout was ready, and the seconds of its steps

    def next(self, policy: Bound, step: int) -> Batch:
        """The minibatch of ``step``. A rollout's first step samples it, or the one that is ``staleness`` later."""
        source, (number, place) = self.source, divmod(step, self.source.steps)
        if place == 0:
            jax.block_until_ready(policy.params)
            self._trained = time.perf_counter() - self._returned if self._returned else 0.0
            self._held = {held: rollout for held, rollout in self._held.items() if held >= number}
            for wanted in range(number, number + source.staleness + 1):
                if wanted not in self._held:
                    self._held[wanted] = self._sampled(policy, wanted, step)
            fresh = self._settled(number)
            if "rewards" in fresh.rows:  # else this step was drawn before
                self._held[number] = fresh._replace(rows=self._compared(policy, fresh.rows, fresh.report))
                self._samples.write(step + 1, fresh.records)
        rollout = self._settled(number)
        self._report = {**rollout.report, "staleness": step - rollout.sampled, "seconds/training": self._trained}
        batch = self._batch(rollout.rows, self._minibatch(number, place))
        self._step, self._returned = step + 1, self._returned if place else time.perf_counter()
        return batch

    def report(self) -> Metrics:
        return self._report

    def get_state(self) -> dict[str, Any]:
        """The next step and problem; and the rollouts that have been sampled and not yet been gone through, whole:
        their policy is no more."""
        needed = [number for number in sorted(self._held) if number >= self._step // self.source.steps]
        rollouts = {str(number): self._settled(number).stored() for number in needed}
        return {"step": self._step, "cursor": self._cursor, "seed": self.context.seed, "rollouts": rollouts}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Raises UserError where it is no state of rollouts with this seed."""
        try:
            step, cursor, seed = (int(state[name]) for name in ("step", "cursor", "seed"))
            held = {
                int(number): Rollout(**{**one, "rows": unpack(one["rows"])})
                for number, one in state["rollouts"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"This is not the state of rollouts ({error!r}): resume from a checkpoint that this experiment wrote."
            ) from error
        if seed != self.context.seed:
            raise UserError(f"The rollouts of the checkpoint have the seed {seed} and this run {self.context.seed}.")
        self._step, self._cursor, self._held = step, cursor, dict(held)

    def _settled(self, number: int) -> Rollout:
        rollout = self._held[number]
        if isinstance(rollout, Future):
            rollout = self._held[number] = rollout.result()
        return rollout

    def _sampled(self, policy: Bound, number: int, step: int) -> Rollout | Future[Rollout]:
        """Beside the training where it may lag behind; several devices must be given all programs in one order, as else
        each may wait for the others in another one."""
        if self.source.staleness == 0 or self.context.mesh.size > 1:
            return self._rollout(policy, number, step)
        return self._sampler.submit(self._rollout, jax.tree.map(jax.numpy.copy, policy), number, step)

    def _rollout(self, policy: Bound, number: int, step: int) -> Rollout:
        began = time.perf_counter()
        cursor = self._cursor
        groups, drawn, generation = self._groups(policy, number)
        report = summary(groups, drawn)
        report["prompts/too_long"] = 1 - len(drawn) / (self._cursor - cursor)
        report |= {"seconds/generation": generation, "seconds/reward": time.perf_counter() - began - generation}
        rows = assembled(self.speaker, groups, self.source.temperature)
        return Rollout(rows, report, list(records(groups[: self.source.recorded])), step)

    def _groups(self, policy: Bound, number: int) -> tuple[list[Group], list[Group], float]:
        """Those to learn from, all that were drawn, and the seconds in which they were sampled."""
        source, drawn, seconds = self.source, list[Group](), 0.0
        if source.generation is not None:
            policy = _laid_out(policy, self._mesh)
        with jax.set_mesh(self._mesh):
            for attempt in range(source.rounds):
                useful = [group for group in drawn if source.rounds == 1 or not group.equal]
                missing = source.prompts - len(useful)
                if missing <= 0:
                    break
                fresh, spent = self._asked(policy, missing, (self.context.seed, "rollout", number, attempt))
                drawn, seconds = drawn + fresh, seconds + spent
        # where too few tell their responses apart, the last of the others fill the rows
        ranked = sorted(range(len(drawn)), key=lambda i: (source.rounds > 1 and drawn[i].equal, -i))
        return [drawn[i] for i in sorted(ranked[: source.prompts])], drawn, seconds

    def _asked(self, policy: Bound, count: int, seeds: tuple[Any, ...]) -> tuple[list[Group], float]:
        """Answers to the next problems, and the seconds of sampling them."""
        problems = self._problems(count)
        how = dict(samples=self.source.samples, seeds=seeds, scorers=self._scorers)
        groups, seconds = answered(self.speaker, policy, problems, self.reward, **how)
        for reward in self.source.learned:
            groups = self._learned(reward, groups)
        return groups, seconds

    def _problems(self, count: int) -> list[Problem]:
        """The next so many whose prompts are not too long. Raises UserError where too many in a row are."""
        found, last = list[Problem](), self._cursor
        while len(found) < count:
            problem = self.source.task.problem("train", self._index(self._cursor))
            if self.speaker.fits(problem):
                found.append(problem)
                last = self._cursor
            elif self._cursor - last >= PASSED_OVER:
                self.speaker.prompt(problem)  # which says so
            self._cursor += 1
        return found

    def _learned(self, reward: LearnedReward, groups: list[Group]) -> list[Group]:
        """Groups with what a model gives besides."""
        model, rows = self.context.frozen[reward.model], assembled(self.speaker, groups, self.source.temperature)
        given = self._batchwise(rows, lambda batch: {reward.name: learned(reward, model, batch)})[reward.name]
        return [
            group._replace(rewards=group.rewards + reward.weight * mine, parts={**group.parts, reward.name: mine})
            for group, mine in zip(groups, given.reshape(len(groups), -1).astype(np.float64), strict=True)
        ]

    def _index(self, number: int) -> int:
        """The problem that comes so late: of a task with an end in an order of each epoch's own."""
        size = self.source.task.size("train")
        if size is None:
            return (self.context.seed + 1) * PROBLEMS_OF_A_SEED + number
        epoch, place = divmod(number, size)
        return int(order(size, seed=self.context.seed, epoch=epoch)[place])

    def _compared(self, policy: Bound, rows: Mapping[str, np.ndarray], report: Metrics) -> dict[str, np.ndarray]:
        """Rows with advantages, by the policy that first learns from them; adds to the report."""
        source, rows = self.source, dict(rows)
        mask, rewards, finished = rows["weights"], rows.pop("rewards"), rows.pop("finished")
        by_group = (source.prompts, source.samples, source.speech.max_tokens)
        found = self._scores(policy, rows) if source.scored else {}
        penalties = np.zeros(mask.shape)
        if source.kl_penalty:
            estimate = np.asarray(estimated_kl(source.kl, found["old_log_probs"], found.pop("reference_log_probs")))
            penalties = source.kl_penalty * estimate
            report["kl"] = float((estimate * mask).sum() / max(1.0, mask.sum()))
        values = found["values"].reshape(by_group) if source.advantage.uses_values else None
        given = Rewarded(rewards.reshape(by_group[:2]), mask.reshape(by_group), penalties.reshape(by_group), values)
        rows["advantages"] = source.advantage(given).reshape(mask.shape)
        if isinstance(source.advantage, Gae):
            rows["returns"] = source.advantage.plain(given).reshape(mask.shape) + found["values"]
        if source.overlong == "mask":
            rows["weights"] = mask * finished[:, None]
        if not source.rescore:
            found.pop("old_log_probs", None)  # the ratio is to what was sampled from
        return rows | found

    def _scores(self, policy: Bound, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        reference = self.context.frozen[REFERENCE] if self.source.kl_penalty else None
        values = self.source.advantage.uses_values
        return self._batchwise(rows, lambda batch: score(policy, reference, batch, values))

    def _batchwise(
        self, rows: Mapping[str, np.ndarray], ask: Callable[[Batch], Mapping[str, jax.Array]]
    ) -> dict[str, np.ndarray]:
        """What a function of a batch says of all rows, a batch at a time; the last is filled up."""
        parts, size, count = [], self.source.batch_size, len(rows["tokens"])
        names = ("tokens", "positions", "segment_ids", "targets", "weights", "temperature")
        with jax.set_mesh(self.context.mesh):
            for first in range(0, count, size):
                batch = self._batch({name: rows[name] for name in names}, np.arange(first, first + size) % count)
                parts.append(jax.device_get(ask(batch)))
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}

    def _minibatch(self, number: int, place: int) -> np.ndarray:
        """The rows of a rollout's step, from an order of each epoch's own."""
        source = self.source
        epoch, part = divmod(place, source.minibatches)
        rows = np.arange(source.prompts * source.samples)
        if source.steps > 1:
            rows = order(len(rows), seed=seed_of(self.context.seed, "minibatches", number), epoch=epoch)
        return rows.reshape(source.minibatches, -1)[part]

    def _batch(self, rows: Mapping[str, np.ndarray], chosen: np.ndarray) -> Batch:
        def whole(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, self._sharding, lambda index: x[index])

        return {name: whole(x[chosen]) for name, x in rows.items()}


def _laid_out(policy: Bound, mesh: jax.sharding.Mesh) -> Bound:
    """The policy as it lies on another mesh of the same devices."""
    model = policy.module.config
    where = tree_shardings(mesh, policy.params, model.logical_axes())
    return replace(
        policy, params=jax.device_put(policy.params, where), buffers=jax.device_put(policy.buffers, replicated(mesh))
    )
