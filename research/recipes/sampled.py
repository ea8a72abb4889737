# SPDX-License-Identifier: Apache-2.0
"""A corpus that a trained model says: its answers to a task's problems, of which the right ones are kept (rejection
sampling), to learn from them oneself or to teach a smaller model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from research.core.config import to_json
from research.core.sharding import MeshSpec, make_mesh
from research.core.types import UserError
from research.data.cache import cached_folder, name_of
from research.data.chat import Conversation, Message
from research.data.sources.base import check_split
from research.data.sources.conversations import texts
from research.evals.tasks.base import Reward, Task
from research.models.bound import Bound
from research.rl.groups import worth
from research.rl.respond import Speaker, Speech
from research.train import weights

FORMAT = 1
CHUNK = 64  # problems that are sampled, and kept on disk, at a time


@dataclass(frozen=True)
class Sampled:
    """Conversations: a problem of the task, and an answer of the model.

    checkpoint: a run's folder, or a stage of the study; content: the hash of the weights there (see ``Init``).
    problems, validation_problems: how many of each split are asked, from number ``first`` on; samples: answers to each,
    at ``temperature``. keep: at most so many different ones of a problem, the first whose ``reward`` (None: the task's
    verifier) is at least ``least``. Answers that were cut off are never kept, and problems whose prompts are too long
    not asked. What was sampled is cached by content,
    some problems at a time, so that a process that is killed goes on where it was.
    """

    checkpoint: str
    task: Task
    speech: Speech
    problems: int
    validation_problems: int = 64
    first: int = 0
    samples: int = 4
    keep: int = 1
    temperature: float = 1.0
    reward: Reward | None = None
    least: float = 1.0
    seed: int = 0
    content: str = ""

    def __post_init__(self) -> None:
        counts = self.problems, self.validation_problems, self.samples, self.keep
        if min(counts) < 1 or self.first < 0 or not self.temperature > 0:
            raise UserError(
                "Sampled needs problems, validation_problems, samples and keep of at least 1, first of at least 0 and "
                f"a temperature above 0; given {', '.join(map(str, counts))}, {self.first} and {self.temperature}."
            )

    def fingerprint(self, cache_dir: Path) -> str:
        content = self.content or weights.content(self.checkpoint)
        return name_of("sampled", FORMAT, content, to_json(replace(self, checkpoint="", content="")))

    def conversations(self, split: str, *, cache_dir: Path) -> Iterator[Conversation]:
        check_split(split)
        folder = Path(cache_dir) / "sampled" / self.fingerprint(cache_dir)
        count = self.problems if split == "train" else self.validation_problems
        size = self.task.size(split)
        end = self.first + count if size is None else min(self.first + count, size)
        model, found = _Model(self, Path(cache_dir)), 0
        for start in range(self.first, end, CHUNK):
            chosen = range(start, min(start + CHUNK, end))
            for record in _chunk(folder / f"{split}-{chosen.start}-{chosen.stop}", model, split, chosen):
                found += 1
                yield tuple(Message(*message) for message in record)
        if split == "train" and not found:
            if end <= self.first:
                raise UserError(f"Sampled begins at problem {self.first} of {size}: set first below that.")
            raise UserError(
                f"No answer of {self.checkpoint} to {end - self.first} problems was finished and worth at least "
                f"{self.least}: begin from a better model, ask more problems, take more samples, or, where no prompt "
                "fits, raise prompt_length."
            )

    def documents(self, split: str, *, cache_dir: Path) -> Iterator[str]:
        return texts(self.conversations(split, cache_dir=cache_dir))


class _Model:
    """The model, read when it is first asked."""

    def __init__(self, corpus: Sampled, cache_dir: Path) -> None:
        self.corpus = corpus
        self.speaker = Speaker(corpus.speech, cache_dir=cache_dir, temperature=corpus.temperature)
        self._policy: Bound | None = None

    def said(self, split: str, chosen: range) -> Iterator[Conversation]:
        """What is kept of the answers to some problems."""
        if jax.process_count() > 1:
            raise UserError(
                f"Answers of {self.corpus.checkpoint} are sampled by one host: run the stage that learns from them on "
                "one host until it trains, with a $LAB_CACHE that all share, then on all."
            )
        corpus = self.corpus
        reward = corpus.reward or corpus.task.verifier
        mesh = jax.sharding.get_mesh()
        mesh = make_mesh(MeshSpec()) if mesh.empty else mesh
        asked = (corpus.task.problem(split, index) for index in chosen)
        problems = [problem for problem in asked if self.speaker.fits(problem)]
        with jax.set_mesh(mesh):
            if self._policy is None:
                found = weights.describe(corpus.checkpoint)
                self._policy = weights.load(
                    corpus.checkpoint, found.model, found.precision, mesh, wanted=corpus.content
                )
            seeds = (corpus.seed, "sampled", split, chosen.start)
            answers = list(self.speaker.ask(self._policy, problems, samples=corpus.samples, seeds=seeds))
        for number, problem in enumerate(problems):
            mine = sorted((a.sample, a.response) for a in answers if a.problem == number and a.response.finished)
            right = [said.text for _, said in mine if worth(reward, problem, said) >= corpus.least]
            for text in list(dict.fromkeys(right))[: corpus.keep]:
                yield (*corpus.speech.messages(problem), Message("assistant", text))


def _chunk(folder: Path, model: _Model, split: str, chosen: range) -> list[list[list[str]]]:
    def build(place: Path) -> None:
        (place / "said.json").write_text(json.dumps(list(model.said(split, chosen))))

    def load(place: Path) -> list[list[list[str]]]:
        return json.loads((place / "said.json").read_text())

    return cached_folder(folder, build=build, load=load)
