# SPDX-License-Identifier: Apache-2.0
"""Problems put to a model: prompts by a chat template, responses by the engine, as they come."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from research.core.types import UserError
from research.data.chat import ChatTemplate, Message
from research.data.sources import Corpus
from research.data.tokenizers import Tokenizer, TokenizerSpec, train_tokenizer
from research.evals.tasks.base import Problem, Response
from research.infer.engine import Engine, Request, Result
from research.infer.generate import Settings, bucket
from research.infer.sampling import sampling
from research.models.bound import Bound

Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Speech:
    """How problems become tokens, and tokens responses.

    corpus: what the tokenizer is trained on, where it is one that is trained. system: what the system says first.
    prompt_length: the most tokens of a prompt. max_tokens: the most of a response, its end included.
    """

    tokenizer: TokenizerSpec
    template: ChatTemplate
    prompt_length: int
    max_tokens: int
    corpus: Corpus | None = None
    system: str = ""

    def __post_init__(self) -> None:
        if self.prompt_length < 1 or self.max_tokens < 1:
            raise UserError(
                f"prompt_length and max_tokens must be at least 1; given {self.prompt_length} and {self.max_tokens}."
            )

    def tokenizer_for(self, cache_dir: Path) -> Tokenizer:
        if self.corpus is None:
            if self.tokenizer.sample_limit != 0:
                raise UserError(
                    f"A {type(self.tokenizer).__name__} tokenizer is trained on text: give corpus=..., that of the "
                    "model's own training."
                )
            return self.tokenizer.train(())
        return train_tokenizer(self.tokenizer, self.corpus, cache_dir=cache_dir)

    def messages(self, problem: Problem) -> Messages:
        asked = (Message("user", problem.prompt),)
        return (Message("system", self.system), *asked) if self.system else asked


class Answer(NamedTuple):
    """A response to the problem that is number ``problem`` of those asked."""

    problem: int
    sample: int
    tokens: list[int]
    log_probs: list[float]
    response: Response


class Speaker:
    """Asks a model. slots: sequences at a time (0: all of a call). seeds: what the draws of a call depend on."""

    def __init__(self, speech: Speech, *, cache_dir: Path, temperature: float = 1.0, slots: int = 0) -> None:
        self.speech, self.slots = speech, slots
        self.tokenizer = speech.tokenizer_for(cache_dir)
        self.settings = Settings(sampling(temperature=temperature), stop=speech.template.stop(self.tokenizer))

    def fits(self, problem: Problem) -> bool:
        """Whether its prompt has at most ``prompt_length`` tokens."""
        return len(self._ids(problem)) <= self.speech.prompt_length

    def prompt(self, problem: Problem) -> np.ndarray:
        """Ids [tokens]. Raises UserError where they are more than ``prompt_length``."""
        ids = self._ids(problem)
        if len(ids) > self.speech.prompt_length:
            raise UserError(
                f"A prompt has {len(ids)} tokens and prompt_length is {self.speech.prompt_length}: raise it "
                f"({problem.prompt[:60]!r})."
            )
        return ids

    def _ids(self, problem: Problem) -> np.ndarray:
        return self.speech.template.prompt(self.tokenizer, self.speech.messages(problem))

    def ask(
        self, policy: Bound, problems: Sequence[Problem], *, samples: int, seeds: tuple[Any, ...]
    ) -> Iterator[Answer]:
        """Answers as they are finished, ``samples`` to each problem. What an answer is depends on the problem's place,
        the seeds and the policy alone."""
        requests = [
            Request(self.prompt(problem), self.speech.max_tokens, seed=seed_of(*seeds, number), samples=samples)
            for number, problem in enumerate(problems)
        ]
        length = self.speech.prompt_length + self.speech.max_tokens
        asked = bucket(len(requests) * samples, least=1)  # few sizes: each is a program of its own
        slots = min(self.slots or asked, asked)
        engine = Engine(policy.module.config, slots=slots, settings=self.settings, length=length)
        for result in engine.run(policy, requests):
            yield Answer(result.request, result.sample, result.tokens, result.log_probs, self.response(result))

    def response(self, result: Result) -> Response:
        finished = result.finish == "stop"
        said = result.tokens[:-1] if finished else result.tokens
        known = [
            token for token in said if token < self.tokenizer.vocab_size
        ]  # a padded vocabulary has ids without text
        return Response(self.tokenizer.decode(known), len(result.tokens), finished)


def seed_of(*parts: Any) -> int:
    """A number below 2^63 that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
