# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: a fixed number of slots decode together, and as one sequence ends the next prompt takes its slot
(Yu et al. 2022, Orca, section 3.1).

    engine = Engine(model, slots=8, settings=Settings(sampling(temperature=0.7), stop=(2,)))
    for result in engine.run(policy, [Request(prompt, max_tokens=64, seed=1, samples=4)]): ...

What a sequence becomes is a function of its prompt, its seed and the policy, not of what else is in the batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import jax
import numpy as np

from research.core.types import Array, UserError
from research.infer import generate as programs
from research.infer.generate import Prefilled, Settings, Slots, bucket
from research.models.bound import Bound
from research.models.decoder import Decoder

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt [T] to go on from with at most ``max_tokens``. samples: how many sequences, of which number i has the
    seed ``fold_in(seed, i)``; their prompt is prefilled once."""

    prompt: Sequence[int] | np.ndarray
    max_tokens: int
    seed: int = 0
    samples: int = 1


@dataclass
class Result:
    """A sequence as it stands: which request and which of its samples; tokens drawn, a stop id included, and their
    log-probabilities under the distribution that they were drawn from; finish: why it ended, None while it has not."""

    request: int
    sample: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: Finish | None = None


class _Sequence(NamedTuple):
    """One to be made, whose prompt is prefilled: the row it is in, and what its slot begins with."""

    result: Result
    row: int
    limit: int
    key: np.ndarray


def _never(result: Result) -> bool:
    del result
    return False


class Engine:
    """Generation for one model; the policy is given to each run, so that one may be trained meanwhile.

    model: its description; on CPUs layers are unrolled, whose parameters are the same. slots: sequences at a time.
    length: the most tokens of one, prompt included; None: what the requests of a run need. Run it in the scope of the
    mesh that the policy's parameters lie on (``jax.set_mesh``).
    """

    def __init__(self, model: Decoder, *, slots: int = 8, settings: Settings, length: int | None = None) -> None:
        if slots < 1:
            raise UserError(f"An engine needs at least one slot; given {slots}.")
        self.model, self.slots, self.settings, self.length = model, slots, settings, length

    def run(
        self,
        policy: Bound,
        requests: Iterable[Request],
        *,
        ended: Callable[[Result], bool] = _never,
    ) -> Iterator[Result]:
        """Finished sequences, in the order in which they finish. ended: whether what a sequence has become is to end it
        (a stop string); it is asked as tokens come."""
        for result, _ in self.stream(policy, requests, ended=ended):
            if result.finish is not None:
                yield result

    def stream(
        self,
        policy: Bound,
        requests: Iterable[Request],
        *,
        ended: Callable[[Result], bool] = _never,
    ) -> Iterator[tuple[Result, int]]:
        """Sequences as they grow, each time with how many tokens are new."""
        given = list(requests)
        self._check(given)
        if not given:
            return
        longest = self.length or max(len(request.prompt) + request.max_tokens for request in given)
        run = _Run(self, policy, given, bucket(longest))
        while run.fill():
            yield from run.report(ended)
            run.decode()
        yield from run.report(ended)

    def _check(self, requests: Sequence[Request]) -> None:
        """Raises UserError for a request that cannot be met, before any is begun."""
        for number, request in enumerate(requests):
            length = len(request.prompt) + request.max_tokens
            if request.max_tokens < 1 or request.samples < 1:
                raise UserError(
                    f"Request {number} asks for {request.max_tokens} tokens of {request.samples} samples: ask for at "
                    "least one of each."
                )
            programs.check_prompt(self.model, request.prompt, request.max_tokens, f" of request {number}")
            if self.length is not None and length > self.length:
                raise UserError(
                    f"A prompt of {len(request.prompt)} tokens and {request.max_tokens} more do not fit the engine's "
                    f"slots of {self.length}: ask for fewer."
                )
            if not 0 <= request.seed < 2**63:
                raise UserError(f"Request {number} has the seed {request.seed}: it must be from 0 to 2^63 - 1.")


class _Run:
    """What one run keeps on the host: who is in which slot, and who waits."""

    def __init__(self, engine: Engine, policy: Bound, requests: Sequence[Request], length: int) -> None:
        self.policy, settings = unrolled(policy), engine.settings
        self.settings = replace(settings, cache=settings.cache.on(policy.module.platform))
        self.model, precision = self.policy.module.config, policy.module.precision
        self.prompts, self.waiting = deque(enumerate(requests)), deque[_Sequence]()
        self.prefilled: Prefilled | None = None
        self.slots: Slots = programs.empty(self.model, precision, self.settings, engine.slots, length)
        self.inside: list[_Sequence | None] = [None] * engine.slots
        self.news: list[tuple[Result, int]] = []

    def fill(self) -> bool:
        """Puts those who wait into free slots; False when nobody is left."""
        while None in self.inside and (self.waiting or self.prompts):
            if not self.waiting:
                self._prefill()
            self._admit()
        return any(self.inside)

    def _prefill(self) -> None:
        """The next prompts, as many as there are slots free for their samples."""
        free, taken = self.inside.count(None), []
        while self.prompts and sum(request.samples for _, request in taken) < free:
            taken.append(self.prompts.popleft())
        width = bucket(max(len(request.prompt) for _, request in taken))
        rows = bucket(len(taken), least=1)
        tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row, (number, request) in enumerate(taken):
            tokens[row, : len(request.prompt)], lengths[row] = request.prompt, len(request.prompt)
            for sample, key in enumerate(_keys(request)):
                self.waiting.append(_Sequence(Result(number, sample), row, request.max_tokens, key))
        self.prefilled = programs.prefill(self.model, self.policy, tokens, lengths, self.settings)

    def _admit(self) -> None:
        free = [slot for slot, one in enumerate(self.inside) if one is None]
        entering = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        padding = bucket(len(entering), least=1) - len(entering)
        rows, limits = ([getattr(one, name) for one in entering] + [0] * padding for name in ("row", "limit"))
        places = free[: len(entering)] + [len(self.inside)] * padding
        keys = np.stack([one.key for one in entering] + [entering[0].key] * padding)
        given = (np.asarray(x, np.int32) for x in (rows, places, limits))
        self.slots, first, log_probs = programs.admit(self.slots, self.prefilled, *given, keys, self.settings)
        first, log_probs = jax.device_get((first, log_probs))
        for number, one in enumerate(entering):
            self.inside[places[number]] = one
            self._grow(places[number], first[number : number + 1], log_probs[number : number + 1])

    def decode(self) -> None:
        if not any(self.inside):
            return
        others = np.asarray(bool(self.waiting or self.prompts))
        self.slots, tokens, log_probs = programs.decode(self.policy, self.slots, others, self.settings)
        tokens, log_probs = jax.device_get((tokens, log_probs))
        for place, one in enumerate(self.inside):
            if one is not None:
                made = int(np.sum(tokens[place] >= 0))
                self._grow(place, tokens[place, :made], log_probs[place, :made])

    def _grow(self, place: int, tokens: np.ndarray, log_probs: np.ndarray) -> None:
        one = self.inside[place]
        assert one is not None
        one.result.tokens += tokens.tolist()
        one.result.log_probs += log_probs.tolist()
        if one.result.tokens[-1] in self.settings.stop:
            one.result.finish = "stop"
        elif len(one.result.tokens) >= one.limit:
            one.result.finish = "length"
        self.news.append((one.result, len(tokens)))
        if one.result.finish is not None:
            self.inside[place] = None

    def report(self, ended: Callable[[Result], bool]) -> Iterator[tuple[Result, int]]:
        """What is new since the last report; ends sequences that have met a stop string, with the token that met it."""
        news, self.news = self.news, []
        stop = np.zeros(len(self.inside), bool)
        for result, fresh in news:
            if ended(result):
                spare = _beyond(result, fresh, ended)
                fresh -= spare
                result.finish = "stop"
                for place, one in enumerate(self.inside):
                    if one is not None and one.result is result:
                        stop[place], self.inside[place] = True, None
            yield result, fresh
        if stop.any():
            self.slots = programs.stopped(self.slots, stop)


def _beyond(result: Result, fresh: int, ended: Callable[[Result], bool]) -> int:
    """Takes away the tokens after the one that ended a sequence, which was among the last ``fresh``; how many."""
    whole = len(result.tokens)
    for count in range(whole - fresh + 1, whole):
        part = replace(result, tokens=result.tokens[:count], log_probs=result.log_probs[:count])
        if ended(part):
            del result.tokens[count:], result.log_probs[count:]
            return whole - count
    return 0


def _keys(request: Request) -> np.ndarray:
    """Key data of each sample [samples, ...]."""
    return np.asarray(_keys_of_samples(jax.random.key(request.seed), np.arange(request.samples)))


@jax.jit
def _keys_of_samples(key: Array, sample_N: Array) -> Array:
    return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, sample_N))


def unrolled(policy: Bound) -> Bound:
    """On CPUs each layer is compiled by itself, of the same parameters, taken apart once: a loop over layers would copy
    the weights and the cache of each."""
    module = policy.module
    if module.platform != "cpu":
        return policy
    module = replace(module.config, layers="unrolled").build(module.precision, platform="cpu")
    return _apart(replace(policy, module=module))


_apart = jax.jit(Bound.apart)
