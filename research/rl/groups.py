# SPDX-License-Identifier: Apache-2.0
"""Groups of responses to one prompt: what each is worth, the rows they become, and what there is to say of them."""

import math
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import jax
import numpy as np

from research.core.types import Metrics, UserError
from research.evals.tasks.base import Problem, Response, Reward
from research.models.bound import Bound
from research.rl.advantages import is_equal
from research.rl.respond import Answer, Speaker
from research.rl.rewards.weighted import Weighted

TOTAL = ""  # the name of a response's whole reward among its parts
CORRECT = "correct"  # of the part that tells right from wrong


class Group(NamedTuple):
    """A problem's answers in the order of their samples; what each is worth [G], and the parts of that by name."""

    problem: Problem
    answers: list[Answer]
    rewards: np.ndarray
    parts: dict[str, np.ndarray]

    @property
    def equal(self) -> bool:
        """Whether nothing tells its responses apart."""
        return bool(is_equal(self.rewards[None])[0])

    @property
    def correct(self) -> np.ndarray:
        """Which are right [G]: the part called so, else the whole reward, is at least 1."""
        return self.parts.get(CORRECT, self.rewards) >= 1


def graded(reward: Reward, problem: Problem, response: Response) -> dict[str, float]:
    """A response's reward, and its parts by name; a reward without parts is its own. Raises UserError as ``worth``."""
    if isinstance(reward, Weighted):
        values = {name: worth(part, problem, response) for name, (_, part) in reward.parts.items()}
        return {TOTAL: reward.total(values), **values}
    value = worth(reward, problem, response)
    return {TOTAL: value, CORRECT: value}


def worth(reward: Reward, problem: Problem, response: Response) -> float:
    """What a reward gives. Raises UserError naming the line where it fails, or what it gave that is no number."""
    mend = "mend it, and the run goes on from its last checkpoint"
    try:
        value = reward.score(problem, response)
    except (UserError, OSError):  # a full disk is not the reward's fault
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = getattr(sys.modules.get(type(reward).__module__), "__file__", None)
        place = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
        raise UserError(
            f"The reward {type(reward).__name__} fails with {type(error).__name__}: {' '.join(str(error).split())} "
            f"(line {place.lineno} of {place.filename}): {mend}."
        ) from error
    if not isinstance(value, bool | int | float | np.number) or not math.isfinite(value):
        raise UserError(
            f"The reward {type(reward).__name__} gave {value!r} for a response to {problem.prompt[:60]!r}, which is no "
            f"finite number: {mend}."
        )
    return float(value)


def grouped(problems: Sequence[Problem], answers: Sequence[Answer], grades: Sequence[dict[str, float]]) -> list[Group]:
    """Answers as they came, with their grades, by problem."""
    found = []
    for number, problem in enumerate(problems):
        mine = [i for _, i in sorted((a.sample, i) for i, a in enumerate(answers) if a.problem == number)]
        parts = {name: np.array([grades[i][name] for i in mine]) for name in grades[mine[0]]}
        found.append(Group(problem, [answers[i] for i in mine], parts.pop(TOTAL), parts))
    return found


def answered(
    speaker: Speaker,
    policy: Bound,
    problems: Sequence[Problem],
    reward: Reward,
    *,
    samples: int,
    seeds: tuple[Any, ...],
    scorers: Executor,
) -> tuple[list[Group], float]:
    """A model's answers to problems, each scored as soon as it is there while the others are sampled; and the seconds
    that sampling took."""
    answers, grades, began = list[Answer](), list[Future](), time.perf_counter()
    for answer in speaker.ask(policy, problems, samples=samples, seeds=seeds):
        answers.append(answer)
        grades.append(scorers.submit(graded, reward, problems[answer.problem], answer.response))
    seconds = time.perf_counter() - began
    return grouped(problems, answers, agreed([grade.result() for grade in grades])), seconds


def agreed(grades: list[dict[str, float]]) -> list[dict[str, float]]:
    """Those of the first host: a verifier that ran out of time on one host alone must not part them."""
    if jax.process_count() == 1:
        return grades
    from jax.experimental import multihost_utils

    table = multihost_utils.broadcast_one_to_all(np.array([list(grade.values()) for grade in grades]))
    return [dict(zip(grades[0], row, strict=True)) for row in np.asarray(table).tolist()]


def rows(speaker: Speaker, groups: Sequence[Group], temperature: float) -> dict[str, np.ndarray]:
    """Of all responses [N, ...], those of a prompt together, what ``research.objectives.grpo`` says of a batch, but for
    the advantages: rewards [N] in float64, and whether they are finished. Which tokens were drawn is what the engine
    says, whatever their ids are."""
    before, after = speaker.speech.prompt_length, speaker.speech.max_tokens
    count = sum(len(group.answers) for group in groups)
    ids = {name: np.zeros((count, before + after), np.int32) for name in ("tokens", "positions", "segment_ids")}
    log_probs, weights = (np.zeros((count, after), np.float32) for _ in range(2))
    row = 0
    for group in groups:
        prompt = speaker.prompt(group.problem)
        for answer in group.answers:
            size = len(answer.tokens)
            span = slice(before - len(prompt), before + size)
            ids["tokens"][row, span] = np.concatenate([prompt, answer.tokens])
            ids["positions"][row, span] = np.arange(len(prompt) + size)
            ids["segment_ids"][row, span] = 1
            log_probs[row, :size], weights[row, :size] = answer.log_probs, 1.0
            row += 1
    return {
        **ids,
        "targets": ids["tokens"][:, before:].copy(),
        "weights": weights,
        "sampler_log_probs": log_probs,
        "temperature": np.full_like(weights, temperature),
        "rewards": np.concatenate([group.rewards for group in groups]),
        "finished": finished(groups),
    }


def finished(groups: Sequence[Group]) -> np.ndarray:
    """Which responses came to their own end [N]."""
    return np.array([answer.response.finished for group in groups for answer in group.answers])


def summary(groups: Sequence[Group], drawn: Sequence[Group]) -> Metrics:
    """Means over the responses that were drawn; ``groups/zero_advantage`` is of those that are trained on, too."""
    rewards = np.concatenate([group.rewards for group in drawn])
    correct = np.concatenate([group.correct for group in drawn])
    lengths = np.array([len(answer.tokens) for group in drawn for answer in group.answers])
    found: Metrics = {"reward": rewards.mean()}
    for name in drawn[0].parts:
        found[f"reward/{name}"] = np.concatenate([group.parts[name] for group in drawn]).mean()
    found |= {
        "response/length": lengths.mean(),
        "response/truncated": 1 - finished(drawn).mean(),
        "groups/zero_advantage": np.mean([group.equal for group in groups]),
        "groups/drawn": len(drawn),
        "groups/solved": np.mean([group.correct.any() for group in drawn]),
    }
    for name, which in (("right", correct), ("wrong", ~correct)):
        if which.any():
            found[f"response/length_{name}"] = lengths[which].mean()
    return {name: float(value) for name, value in found.items()}


def records(groups: Sequence[Group]) -> Iterator[Mapping[str, Any]]:
    """What samples.jsonl says of responses."""
    for group in groups:
        for number, answer in enumerate(group.answers):
            yield {
                "prompt": group.problem.prompt,
                "reference": group.problem.reference,
                "response": answer.response.text,
                "tokens": len(answer.tokens),
                "finished": answer.response.finished,
                "reward": float(group.rewards[number]),
                "parts": {name: float(values[number]) for name, values in group.parts.items()},
            }
