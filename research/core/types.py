# SPDX-License-Identifier: Apache-2.0
"""The shared vocabulary: shape suffixes, batches, weighted sums, and the contracts between rooms.

Shape suffixes (``x_BTD``): B batch, T query time, S key time, D model, N heads, K kv heads, H head
width, F feed-forward, E experts, V vocabulary, L layers. In ``research/scaling`` words are used
instead (``params``, ``tokens``, ``flops``), because there N and D mean other things.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax

from research.core.errors import UserError as UserError

Array = jax.Array
Params = Any  # a nested dict of arrays
Batch = Mapping[str, Array]
Metrics = dict[str, Any]


class WeightedSum(NamedTuple):
    """A sum and its denominator, kept apart so that microbatches and shards add up exactly.

    ``weight`` depends on the batch alone, never on parameters: the mean is formed once, from global sums.
    """

    sum: Array
    weight: Array

    @property
    def mean(self) -> Array:
        return self.sum / jax.numpy.maximum(self.weight, 1e-9)


class Term(NamedTuple):
    """One term of a loss: it contributes ``coefficient * value.sum / global(value.weight)``."""

    coefficient: float | Array
    value: WeightedSum


class Loss(NamedTuple):
    """What an objective returns.

    terms: what is minimised, each with a denominator of its own.
    metrics: what is only reported (name -> WeightedSum).
    stats: sums for ``model.update`` (router loads and the like), added over microbatches and shards.
    peaks: what is only reported as the largest over the whole batch (name -> number; ``..._min``: the smallest).
    """

    terms: Mapping[str, Term]
    metrics: Mapping[str, WeightedSum]
    stats: Any
    peaks: Mapping[str, Array] = {}


class Output(NamedTuple):
    """What a model's forward pass returns: final hidden states, the cache after them, auxiliary losses, stats, and for
    each token further ahead that it predicts, hidden states for its head."""

    hidden: Array
    cache: Any
    aux: Mapping[str, Term]
    stats: Any
    ahead: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Precision:
    """Number formats: parameters at rest, matrix products, and the logits that a loss is computed from."""

    params: Literal["float32", "bfloat16"] = "float32"
    compute: Literal["float32", "bfloat16"] = "float32"
    logits: Literal["float32", "bfloat16"] = "float32"


class Head(Protocol):
    """A model's output head: a pytree of its own parameters only, so that it can be differentiated in chunks."""

    def __call__(self, hidden: Array) -> Array:
        """[..., D] -> logits [..., V]."""
        ...

    def cast(self) -> "Head":
        """The same with its parameters in the number format of its products."""
        ...

    def specs(self) -> "Head":
        """The same with a PartitionSpec in the place of each parameter: how they lie on the mesh."""
        ...


class Policy(Protocol):
    """A model bound to its parameters; a pytree (``research.models.bound.Bound``)."""

    def forward(self, batch: Batch, cache: Any = None, key: Array | None = None) -> Output: ...

    def logits(self, hidden: Array) -> Array: ...

    def head(self) -> Head: ...

    def values(self, hidden: Array) -> Array: ...


@runtime_checkable
class Objective(Protocol):
    """A pure function of the policy, the frozen models, a batch and a key (None: no random choices, to evaluate)."""

    def __call__(self, policy: Policy, frozen: Mapping[str, Policy], batch: Batch, key: Array | None) -> Loss: ...


@dataclass(frozen=True)
class Context:
    """Where a source or an eval runs: the mesh its batches are laid out over, the run's seed, the cache folder; the
    frozen models of its experiment; and the run's own folder, where there is one."""

    mesh: jax.sharding.Mesh
    seed: int
    cache_dir: Path
    frozen: Mapping[str, "Policy"] = field(default_factory=dict)
    directory: Path | None = None


class Stream(Protocol):
    """Batches of one run. ``next`` is a function of (policy, seed, step), never of host timing.

    info: what the data are, as JSON for the record (vocab_size, corpus_bytes, corpus_hash, ...).
    num_batches: how many there are; None where the stream is endless.
    """

    info: Mapping[str, Any]
    num_batches: int | None

    def next(self, policy: Policy | None, step: int) -> Batch:
        """The global batch of ``step``, as global arrays sharded over the context's mesh."""
        ...

    def report(self) -> Metrics:
        """What the host knows of the batch last drawn, for the record: numbers by name, equal on all hosts but for
        those named ``seconds/...``."""
        ...

    def get_state(self) -> dict[str, Any]:
        """One small JSON value, equal on all hosts."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a state. Raises UserError where the data are no longer those of the state."""
        ...


@runtime_checkable
class Source(Protocol):
    """Where batches come from: a corpus, preference pairs, rollouts of the live policy.

    It may have ``check(experiment)``, as an objective may: it raises UserError for what it lacks of the experiment's
    other parts; and ``splits``, what a mesh must divide besides its rows (``sharding.Split``).
    """

    batch_size: int
    sequence_length: int

    def vocab_size(self, cache_dir: Path) -> int:
        """How many token ids its batches may hold."""
        ...

    def batch_shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What a global batch holds: a program can be compiled before there are any data."""
        ...

    def start(self, context: Context) -> Stream: ...


class EvalRun(Protocol):
    def __call__(self, policy: Policy, step: int) -> Metrics: ...


@runtime_checkable
class Eval(Protocol):
    """Something measured every ``every`` steps and at the end (0: at the end only), as ``name/...``."""

    every: int

    @property
    def name(self) -> str: ...

    def start(self, context: Context) -> EvalRun: ...
