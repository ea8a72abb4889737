# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules, with lengths in tokens, FLOPs or steps.

An optimizer is a frozen description; ``build`` returns an optax transformation whose parameter groups are
chosen by logical axes, never by names.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import jax
import optax

from research.core.types import UserError


@dataclass(frozen=True)
class Tokens:
    """A length in training tokens (rows times sequence length, padding included)."""

    count: float

    def __str__(self) -> str:
        return f"{self.count:,.0f} tokens"


@dataclass(frozen=True)
class Flops:
    """A length in training FLOPs (``research.scaling.cost``)."""

    count: float

    def __str__(self) -> str:
        return f"{self.count:.3g} FLOPs"


@dataclass(frozen=True)
class Steps:
    """A length in optimizer steps."""

    count: int

    def __str__(self) -> str:
        return f"{self.count:,} steps"


@dataclass(frozen=True)
class Share:
    """A share of the run, 0 to 1."""

    of: float

    def __str__(self) -> str:
        return f"{self.of:.3g} of the run"

    def __post_init__(self) -> None:
        if not 0 <= self.of <= 1:
            raise UserError(f"A share of a run lies between 0 and 1; given {self.of}.")


Length = Tokens | Flops | Steps


@dataclass(frozen=True)
class Clock:
    """What a step costs, to turn lengths into steps; ``total`` is the run's own number of steps."""

    tokens_per_step: int
    flops_per_token: float
    total: int = 0

    def steps(self, length: Length | Share) -> int:
        """The nearest whole number of steps. Raises UserError for a length that is negative or not finite."""
        amount = length.of if isinstance(length, Share) else length.count
        if not (math.isfinite(amount) and amount >= 0):
            raise UserError(f"A length must be a finite number of at least 0; given {length}.")
        if isinstance(length, Share):
            return round(length.of * self.total)
        if isinstance(length, Steps):
            return int(length.count)
        if isinstance(length, Flops):
            return round(length.count / (self.flops_per_token * self.tokens_per_step))
        return round(length.count / self.tokens_per_step)


@dataclass(frozen=True)
class Schedule:
    """Warm-up from zero, then a shape that ends where the run ends.

    cosine: half a cosine to ``final`` (Loshchilov and Hutter 2017). linear: a line to ``final``.
    constant: no decay. wsd: constant, then a line to ``final`` over the last ``decay`` of the run (Hu et al. 2024).
    peak is reached at the end of the warm-up; ``final`` is a fraction of it.
    """

    shape: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: Tokens | Flops | Steps | Share = field(default_factory=lambda: Share(0.05))
    decay: Tokens | Flops | Steps | Share = field(default_factory=lambda: Share(0.2))
    final: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.final <= 1:
            raise UserError(f"A schedule's final is a fraction of its peak, 0 to 1; given {self.final}.")

    def __str__(self) -> str:
        ends = "" if self.shape == "constant" else f" to {self.final:g} of the peak"
        over = f" over the last {self.decay}" if self.shape == "wsd" else ""
        return f"{self.shape}{ends}{over}, warm-up over {self.warmup}"

    def value(self, peak: float, clock: Clock, step: int) -> float:
        """The learning rate of step ``step`` (from 0). A decaying one ends at ``final * peak``, at the last step."""
        total = clock.total
        warmup = min(clock.steps(self.warmup), max(0, total - 1))
        start = max(warmup, total - clock.steps(self.decay)) if self.shape == "wsd" else warmup
        done = min(1.0, max(0.0, (step - start) / max(1, total - 1 - start)))
        if self.shape == "cosine":
            shape = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
        elif self.shape == "constant":
            shape = 1.0
        else:
            shape = 1 - (1 - self.final) * done
        return peak * shape * min(1.0, (step + 1) / max(1, warmup))


class Optimizer(Protocol):
    """A frozen description of an optimizer.

    The transformation turns gradients into a direction; the step subtracts learning rate times direction. The
    rate comes from the host, so that runs that differ in length or rate alone share one compiled program.
    """

    def build(self, shapes: Any, logical_axes: Any) -> optax.GradientTransformation: ...

    def learning_rate(self, clock: Clock, step: int) -> float: ...


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019) after clipping by global norm (Pascanu et al. 2013).

    Weight decay is applied to matrices: parameters with at least two logical axes besides "layers", so not to
    norms and biases. As in optax it is multiplied by the learning rate. clip: 0 is no clipping.
    """

    peak: float = 1e-3
    schedule: Schedule = field(default_factory=Schedule)
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise UserError(f"AdamW's eps must be at least 0; given {self.eps}.")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise UserError(f"AdamW's b1 and b2 must be at least 0 and below 1; given {self.b1} and {self.b2}.")
        if not (math.isfinite(self.peak) and self.peak >= 0 and self.clip >= 0 and self.weight_decay >= 0):
            raise UserError(
                f"AdamW's peak, clip and weight_decay must be at least 0; given {self.peak}, {self.clip} and "
                f"{self.weight_decay}."
            )

    def learning_rate(self, clock: Clock, step: int) -> float:
        return self.schedule.value(self.peak, clock, step)

    def build(self, shapes: Any, logical_axes: Any) -> optax.GradientTransformation:
        del shapes
        return optax.chain(
            optax.clip_by_global_norm(self.clip) if self.clip else optax.identity(),
            optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=decay_mask(logical_axes)),
        )


@dataclass(frozen=True)
class Sgd:
    """Plain gradient descent, for tests of equality and as the smallest example of an optimizer."""

    peak: float = 0.1
    schedule: Schedule = field(default_factory=lambda: Schedule(shape="constant", warmup=Steps(0)))

    def learning_rate(self, clock: Clock, step: int) -> float:
        return self.schedule.value(self.peak, clock, step)

    def build(self, shapes: Any, logical_axes: Any) -> optax.GradientTransformation:
        del shapes, logical_axes
        return optax.identity()


def at_any_rate(optimizer: Optimizer) -> Optimizer:
    """The optimizer without what only its learning rate comes from, which is an argument of the step: all that one
    compiled program serves."""
    return replace(optimizer, peak=0.0, schedule=Schedule()) if isinstance(optimizer, AdamW | Sgd) else optimizer


def decay_mask(logical_axes: Any) -> Any:
    """True for parameters with two or more logical axes besides "layers" and "head_dim": not for biases of heads."""
    is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
    return jax.tree.map(
        lambda axes: sum(a not in ("layers", "head_dim") for a in axes) >= 2, logical_axes, is_leaf=is_axes
    )
