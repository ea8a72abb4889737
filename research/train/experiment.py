# SPDX-License-Identifier: Apache-2.0
"""The experiment: one frozen value that says everything about a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from research.core.config import check_types, config_hash, mapped, to_json
from research.core.sharding import MeshSpec
from research.core.types import Eval, Objective, Precision, Source, UserError
from research.models.decoder import Decoder
from research.scaling import cost
from research.train.optimizers import AdamW, Clock, Flops, Length, Optimizer, Steps, Tokens

__all__ = ["AdamW", "CheckpointPolicy", "Experiment", "Flops", "Init", "Length", "Steps", "Tokens"]


@dataclass(frozen=True)
class Init:
    """Where parameters come from instead of a random draw.

    checkpoint: a run's folder, or one of its checkpoints. model: its description, where it differs from the
    experiment's own: a frozen teacher; or a model without the value head, which then begins afresh. parts: "weights"
    alone, or "all" of the state: optimizer and data position too. content: the hash of the weights that must be there
    ("": whatever they are); where it is given, it says in the experiment's hash what the path would.
    """

    checkpoint: str
    model: Decoder | None = None
    parts: Literal["weights", "all"] = "weights"
    content: str = ""


@dataclass(frozen=True)
class CheckpointPolicy:
    """every: steps between checkpoints (0: at the end only). keep_last: how many recent ones stay.
    keep_every: those at multiples of so many steps stay for good (0: none)."""

    every: int = 200
    keep_last: int = 2
    keep_every: int = 0


# Fields that change where a run is computed or how it is watched, not what it computes, with their defaults.
WATCHING: Mapping[str, Any] = {
    "name": "",
    "mesh": MeshSpec(),
    "checkpoint": CheckpointPolicy(),
    "log_every": 10,
}


@dataclass(frozen=True)
class Experiment:
    """One run. ``replace(experiment, ...)`` makes a variant; its JSON leaves out fields at their default.

    accumulate: microbatches per optimizer step. log_every: steps between lines of metrics.
    ema: decay of a moving average of the parameters, kept beside them (0: none).
    """

    name: str
    model: Decoder
    objective: Objective
    source: Source
    optimizer: Optimizer
    length: Length
    mesh: MeshSpec = field(default_factory=MeshSpec)
    precision: Precision = field(default_factory=Precision)
    init: Init | None = None
    frozen: Mapping[str, Init] = field(default_factory=dict)
    evals: tuple[Eval, ...] = ()
    checkpoint: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    accumulate: int = 1
    log_every: int = 10
    ema: float = 0.0
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.source.batch_size * self.source.sequence_length

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token by the project's convention (``research.scaling.cost``)."""
        return cost.training_flops_per_token(self.model, sequence_length=self.source.sequence_length)

    @property
    def clock(self) -> Clock:
        """Turns a length in tokens, FLOPs or shares of the run into steps of this run."""
        clock = Clock(tokens_per_step=self.tokens_per_step, flops_per_token=self.flops_per_token)
        return replace(clock, total=max(1, clock.steps(self.length)))

    @property
    def steps(self) -> int:
        return self.clock.total

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        return self.tokens * self.flops_per_token

    @property
    def sources(self) -> list[Source]:
        """That of training, and those of the evals that have one."""
        found = [getattr(evaluation, "source", None) for evaluation in self.evals]
        return [self.source, *(source for source in found if isinstance(source, Source))]

    @property
    def eval_names(self) -> list[str]:
        return [evaluation.name for evaluation in self.evals]

    def check(self) -> None:
        """Raises UserError for what can be told wrong before anything is loaded. A part that depends on others may say
        what it needs of them, by a method ``check(experiment)``."""
        check_types(self)
        if len(set(self.eval_names)) < len(self.evals):
            raise UserError(f"Two evals have one name among {self.eval_names}: name them apart, by their field name.")
        if not self.length.count > 0:
            raise UserError(f"A run's length must be above 0; given {self.length}.")
        for name, value, least in (
            ("source.batch_size", self.source.batch_size, 1),
            ("source.sequence_length", self.source.sequence_length, 1),
            ("accumulate", self.accumulate, 1),
            ("log_every", self.log_every, 1),
            ("checkpoint.every", self.checkpoint.every, 0),
            ("checkpoint.keep_last", self.checkpoint.keep_last, 1),
            ("checkpoint.keep_every", self.checkpoint.keep_every, 0),
            ("seed", self.seed, 0),
            *((f"evals.{i}.every", evaluation.every, 0) for i, evaluation in enumerate(self.evals)),
        ):
            if value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}.")
        if self.seed >= 2**32 or not 0 <= self.ema < 1:
            raise UserError(
                f"seed must be below 2^32 and ema at least 0 and below 1; given {self.seed} and {self.ema}."
            )
        for part in (self.objective, self.source):
            if (check := getattr(part, "check", None)) is not None:
                check(self)

    def record(self) -> Any:
        """The experiment's JSON."""
        return to_json(self)

    @property
    def hash(self) -> str:
        """Content hash of all that the results depend on: what is in ``WATCHING`` does not count, nor where weights lie
        whose own hash is given."""
        watched = replace(self, **{name: default for name, default in WATCHING.items()})
        return config_hash(mapped(lambda x: replace(x, checkpoint="") if getattr(x, "content", "") else x, watched))
