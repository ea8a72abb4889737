# SPDX-License-Identifier: Apache-2.0
"""Scaling laws as small pure functions: named numbers in, loss out. One frozen dataclass for each law.

The numbers may be floats or arrays (a thousand bootstrap laws are one law whose numbers are arrays); so may the inputs,
by the rules of broadcasting. With NumPy or plain numbers the arithmetic is NumPy's, in float64; under a JAX
transformation it is JAX's. Losses are in nats per token; counts are single parameters, tokens, FLOPs, experts.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from research.core.types import UserError

Cls = TypeVar("Cls", bound=type)


class Law(Protocol):
    """A frozen dataclass of numbers; ``INPUTS`` names what ``loss`` is a function of."""

    INPUTS: ClassVar[tuple[str, ...]]

    def loss(self, **inputs: Any) -> Any: ...


def law(cls: Cls) -> Cls:
    """Makes a class a frozen dataclass of numbers that JAX can map over, and that prints as its numbers."""
    cls = dataclass(frozen=True)(cls)
    if cls.__str__ is object.__str__:
        cls.__str__ = _in_words
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


def numbers(of: Law) -> dict[str, Any]:
    """The law's numbers by name."""
    return {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}


def _in_words(of: Law) -> str:
    values = {name: f"{value:.4g}" if np.ndim(value) == 0 else str(value) for name, value in numbers(of).items()}
    return f"{type(of).__name__}: " + ", ".join(f"{name} = {value}" for name, value in values.items())


def _arithmetic(*values: Any) -> Any:
    """JAX's functions where a value is JAX's, else NumPy's: those would round float64 to float32."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


@law
class Chinchilla:
    """loss = E + A / params^alpha + B / tokens^beta (Hoffmann et al. 2022, eq. 2)."""

    INPUTS = ("params", "tokens")

    E: Any
    A: Any
    B: Any
    alpha: Any
    beta: Any

    def loss(self, *, params: Any, tokens: Any) -> Any:
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    @property
    def params_in_compute(self) -> Any:
        """a of params ~ C^a on the frontier where FLOPs go as params x tokens (Hoffmann et al. 2022, eq. 4)."""
        return self.beta / (self.alpha + self.beta)

    def tokens_to_reach(self, loss: Any, *, params: Any) -> Any:
        """Tokens after which a model of ``params`` has the loss; infinite where none are enough."""
        left = loss - self.E - self.A * params**-self.alpha
        lib = _arithmetic(left)
        return lib.where(left > 0, (self.B / lib.where(left > 0, left, 1.0)) ** (1 / self.beta), lib.inf)

    def frontier_params(self, tokens: Any) -> Any:
        """The params whose compute-optimal training, at 6 FLOPs per param and token, takes ``tokens``."""
        return (self.alpha * self.A * tokens**self.beta / (self.beta * self.B)) ** (1 / self.alpha)

    def __str__(self) -> str:
        size, data = f"{self.A:.4g} / params^{self.alpha:.4g}", f"{self.B:.4g} / tokens^{self.beta:.4g}"
        return f"loss = {self.E:.4g} + {size} + {data}"


@law
class Kaplan:
    """loss = ((N_c / params)^(alpha_N / alpha_D) + D_c / tokens)^alpha_D (Kaplan et al. 2020, eq. 1.5).

    params are those outside embedding tables. There is no floor: the loss falls to zero.
    """

    INPUTS = ("params", "tokens")

    N_c: Any
    D_c: Any
    alpha_N: Any
    alpha_D: Any

    def loss(self, *, params: Any, tokens: Any) -> Any:
        return ((self.N_c / params) ** (self.alpha_N / self.alpha_D) + self.D_c / tokens) ** self.alpha_D


@law
class DataConstrained:
    """The Chinchilla law of effective params and tokens, where a corpus is repeated (Muennighoff et al. 2023,
    section 3).

    effective tokens = U + U R_D (1 - exp(-R / R_D)) with U unique tokens and R = tokens / U - 1 repetitions; effective
    params likewise, beyond the params that are compute-optimal for U, with R_N. R_D: the repetitions after which new
    ones are worth 1/e of fresh tokens.
    """

    INPUTS = ("params", "tokens", "unique_tokens")

    E: Any
    A: Any
    B: Any
    alpha: Any
    beta: Any
    R_D: Any
    R_N: Any

    @property
    def fresh(self) -> Chinchilla:
        """The law of tokens that are all unique, and of models no larger than they are worth."""
        return Chinchilla(E=self.E, A=self.A, B=self.B, alpha=self.alpha, beta=self.beta)

    def effective(self, *, params: Any, tokens: Any, unique_tokens: Any) -> tuple[Any, Any]:
        """(params, tokens) that would give the same loss with all tokens unique."""
        lib = _arithmetic(params, tokens, unique_tokens, *numbers(self).values())
        unique = lib.minimum(unique_tokens, tokens)
        worth = lib.minimum(self.fresh.frontier_params(unique), params)

        def saturated(amount: Any, base: Any, times: Any) -> Any:
            return base * (1 - times * lib.expm1(-(amount / base - 1) / times))

        return saturated(params, worth, self.R_N), saturated(tokens, unique, self.R_D)

    def loss(self, *, params: Any, tokens: Any, unique_tokens: Any) -> Any:
        params, tokens = self.effective(params=params, tokens=tokens, unique_tokens=unique_tokens)
        return self.fresh.loss(params=params, tokens=tokens)

    def tokens_to_reach(self, loss: Any, *, params: Any, unique_tokens: Any) -> Any:
        """Tokens, repeated ones counted, after which a model of ``params`` has the loss; infinite where none are
        enough. Of models that fewer than all unique tokens suffice for, those beyond the frontier of these tokens are
        taken at their full worth."""
        worth, _ = self.effective(params=params, tokens=unique_tokens, unique_tokens=unique_tokens)
        fresh = self.fresh.tokens_to_reach(loss, params=params)
        scarce = self.fresh.tokens_to_reach(loss, params=worth)
        lib = _arithmetic(fresh, scarce)
        used_up = (scarce / unique_tokens - 1) / self.R_D
        repetitions = -self.R_D * lib.log1p(-lib.clip(used_up, 0.0, 0.999999999))
        repeated = lib.where(used_up < 0.999999999, unique_tokens * (1 + repetitions), lib.inf)
        return lib.where(fresh <= unique_tokens, fresh, repeated)


@law
class OverTraining:
    """loss = E + (a M^eta + b M^-eta) C^-eta with M = tokens / params and C = 6 params tokens (Gadre et al. 2024,
    section 2).

    The Chinchilla law with alpha = beta = 2 eta: on a line of constant M the loss is a power law in compute, and
    training past the optimum moves the line, not its slope.
    """

    INPUTS = ("params", "tokens")

    E: Any
    a: Any
    b: Any
    eta: Any

    def loss(self, *, params: Any, tokens: Any) -> Any:
        ratio, flops = tokens / params, 6 * params * tokens
        return self.E + (self.a * ratio**self.eta + self.b * ratio**-self.eta) * flops**-self.eta

    def as_chinchilla(self) -> Chinchilla:
        """The same function in the five numbers of the Chinchilla law."""
        exponent = 2 * self.eta
        scale = 6.0**-self.eta
        return Chinchilla(E=self.E, A=self.a * scale, B=self.b * scale, alpha=exponent, beta=exponent)


@law
class RoutedExperts:
    """log10 loss = a log10 N + b log10 X + c log10 N log10 X + d (Clark et al. 2022, section 5), N the params that
    a token goes through in a dense model of the same width and depth, and X a saturating count of experts:
    1 / X = 1 / (experts - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max.
    """

    INPUTS = ("params", "experts")

    a: Any
    b: Any
    c: Any
    d: Any
    E_start: Any
    E_max: Any

    def effective_experts(self, experts: Any) -> Any:
        """X: E_start for a dense model (one expert), and never above E_max."""
        start = 1 / (1 / self.E_start - 1 / self.E_max)
        return 1 / (1 / (experts - 1 + start) + 1 / self.E_max)

    def loss(self, *, params: Any, experts: Any) -> Any:
        lib = _arithmetic(params, experts, *numbers(self).values())
        size, count = lib.log10(params), lib.log10(self.effective_experts(experts))
        return 10.0 ** (self.a * size + self.b * count + self.c * size * count + self.d)

    def effective_params(self, *, params: Any, experts: Any) -> Any:
        """Params of the dense model with the same loss (Clark et al. 2022: effective parameter count)."""
        lib = _arithmetic(params, experts, *numbers(self).values())
        dense, count = (lib.log10(self.effective_experts(n)) for n in (1.0, experts))
        size = ((self.a + self.c * count) * lib.log10(params) + self.b * (count - dense)) / (self.a + self.c * dense)
        return 10.0**size


@law
class FineGrainedExperts:
    """loss = c + (g / granularity^gamma + a) / params^alpha + b / tokens^beta (Krajewski et al. 2024, the joint law).

    granularity: d_ff of the dense layer over that of one expert. params are all of the model, at one rate of
    expansion (total over active), to which the numbers belong.
    """

    INPUTS = ("params", "tokens", "granularity")

    c: Any
    g: Any
    gamma: Any
    a: Any
    alpha: Any
    b: Any
    beta: Any

    def loss(self, *, params: Any, tokens: Any, granularity: Any) -> Any:
        size = self.g * granularity**-self.gamma + self.a
        return self.c + size * params**-self.alpha + self.b * tokens**-self.beta


@law
class SaturatingPowerLaw:
    """loss = E + k / flops^gamma: the loss of the best model of each budget (Henighan et al. 2020, section 1)."""

    INPUTS = ("flops",)

    E: Any
    k: Any
    gamma: Any

    def loss(self, *, flops: Any) -> Any:
        return self.E + self.k * flops**-self.gamma


@law
class PowerLaw:
    """y = coefficient x^exponent."""

    coefficient: Any
    exponent: Any

    def __call__(self, x: Any) -> Any:
        return self.coefficient * x**self.exponent


# What the papers found: to compare with, and to start from. None of them holds for another corpus or tokenizer.
HOFFMANN = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # Hoffmann et al. 2022, eq. 10; not its optimum:
BESIROGLU = Chinchilla(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)  # Besiroglu et al. 2024
KAPLAN = Kaplan(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103)  # Kaplan et al. 2020, table 2
KAPLAN_PARAMS = PowerLaw(1.3e9 * 8.64e19**-0.73, 0.73)  # Kaplan et al. 2020, table 6: 1.3e9 (C / PF-day)^0.73
HOFFMANN_PARAMS = (0.50, 0.49, 0.46)  # exponents of params in compute by approaches 1 to 3; Hoffmann et al., table 2
MUENNIGHOFF = DataConstrained(
    E=float(np.exp(0.6254804)), A=float(np.exp(6.255414)), B=float(np.exp(7.3049974)), alpha=0.3526596,
    beta=0.3526596, R_D=15.387756, R_N=5.309743,
)  # fmt: skip
CLARK_S_BASE = RoutedExperts(
    a=-0.082, b=-0.108, c=0.009, d=1.104, E_start=1.847, E_max=314.478
)  # Clark et al., table 3
KRAJEWSKI = FineGrainedExperts(c=0.47, g=2.1, gamma=0.58, a=18.1, alpha=0.115, b=30.8, beta=0.147)  # Krajewski et al.
DEEPSEEK_LEARNING_RATE = PowerLaw(0.3118, -0.1250)  # Bi et al. 2024 (DeepSeek LLM), section 3.1
DEEPSEEK_BATCH_TOKENS = PowerLaw(0.2920, 0.3271)


def fit_power_law(x: Any, *, y: Any) -> PowerLaw:
    """Least squares in logs. Raises UserError for fewer than two distinct x or for values that are not
    positive."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y)) and np.all(x > 0) and np.all(y > 0)):
        raise UserError("A power law is fitted to finite positive numbers only: leave the other points out.")
    if len(np.unique(x)) < 2:
        raise UserError(f"A power law needs at least 2 distinct points; there are {len(np.unique(x))}.")
    log_x = np.log(x)
    centre = log_x.mean()
    exponent, level = np.polyfit(log_x - centre, np.log(y), 1)
    return PowerLaw(coefficient=float(np.exp(level - exponent * centre)), exponent=float(exponent))
