# SPDX-License-Identifier: Apache-2.0
"""What a fit needs to know of each law: coordinates in which it is well scaled, bounds, and its linear part.

A coordinate vector theta holds first the levels (the size of each term at the centre of the points, in log loss), then
the shape (exponents and their kin). With the shape fixed, a function of the loss is linear in the levels, which is what
variable projection (``projection``) uses. Centred, levels and shape are nearly independent of one another, and no
power overflows, so a sum of terms needs no log-sum-exp shift.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from research.scaling import laws

Inputs = Mapping[str, np.ndarray]
SMALLEST_SHARE = 1e-5  # of the loss at the centre of the points: a term as small as this is zero
EXPONENTS = (0.02, 2.0)  # where exponents of params and tokens are looked for
NO_TERM = 1e-3  # of the loss: a fitted term below it is reported as zero


@dataclass(frozen=True)
class Shape:
    """A number that the loss is not linear in, and where it is looked for. log: its coordinate is its logarithm."""

    name: str
    low: float
    high: float
    log: bool = False

    def coordinate(self, value: Any) -> Any:
        return np.log(value) if self.log else value

    def value(self, coordinate: Any) -> Any:
        return jnp.exp(coordinate) if self.log else coordinate

    def grid(self, count: int) -> np.ndarray:
        """Values to begin at, away from the bounds."""
        inset = (self.high / self.low) ** 0.08
        return np.geomspace(self.low * inset, self.high / inset, count)


@dataclass(frozen=True)
class Form:
    """A law as a fit sees it. Instances carry no data: they are keys of compiled programs."""

    law_type: ClassVar[type]
    name: ClassVar[str]
    text: ClassVar[str]
    shapes: ClassVar[tuple[Shape, ...]]
    terms: ClassVar[tuple[str, ...]]  # the sentence for each level that the fit puts at zero; "" where it may be
    signed: ClassVar[bool] = False  # whether levels may be negative (then they are coordinates as they are)

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.law_type.INPUTS

    @property
    def size(self) -> int:
        """How many numbers the law has."""
        return len(self.terms) + len(self.shapes)

    def scale(self, inputs: Inputs) -> np.ndarray:
        """Mean logs of the inputs: the centre."""
        return np.array([np.log(inputs[name]).mean() for name in self.inputs])

    def law(self, theta: Any, scale: Any) -> Any:
        raise NotImplementedError

    def log_loss(self, theta: Any, scale: Any, inputs: Mapping[str, Any]) -> Any:
        """Log of the predicted loss at each point."""
        return jnp.log(self.law(theta, scale).loss(**inputs))

    def columns(self, shape: np.ndarray, inputs: Inputs, scale: np.ndarray) -> np.ndarray:
        """[points, levels]: what each level is multiplied by in ``target``."""
        raise NotImplementedError

    def target(self, shape: np.ndarray, loss: np.ndarray) -> np.ndarray:
        """The function of the loss that is linear in the levels."""
        del shape
        return loss

    def theta(self, shape: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Coordinates of a projection's result (``levels`` clipped away from zero)."""
        return np.concatenate([np.log(levels), [s.coordinate(v) for s, v in zip(self.shapes, shape, strict=True)]])

    def bounds(self, log_loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of theta: no term above the losses by much, nor the floor above any of them."""
        least, most = float(log_loss.mean()) + math.log(SMALLEST_SHARE), float(log_loss.max()) + 1.0
        levels = len(self.terms)
        low = [least] * levels + [s.coordinate(s.low) for s in self.shapes]
        high = [most] * levels + [s.coordinate(s.high) for s in self.shapes]
        if "floor" in self.terms[-1]:
            high[levels - 1] = float(log_loss.min())
        return np.array(low), np.array(high)

    def astray(self, theta: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """[...]: whether a theta [..., K] stands at a bound of its search, so that what follows from it is the bound's.
        A floor of zero is not meant: no loss is below it."""
        room = 1e-3 * (high - low)
        at = (theta <= low + room) | (theta >= high - room)
        if "floor" in self.terms[-1]:
            at[..., len(self.terms) - 1] = False
        return at.any(axis=-1)

    def not_identified(self, theta: np.ndarray, log_loss: np.ndarray) -> tuple[str, ...]:
        """A sentence for each term at zero and each number at a bound of its search."""
        found = []
        if not self.signed:
            sizes = np.exp(theta[: len(self.terms)] - log_loss.mean())
            found = [words for words, size in zip(self.terms, sizes, strict=True) if size < NO_TERM and words]
        told = " ".join(found)
        for shape, at in zip(self.shapes, theta[len(self.terms) :], strict=True):
            value = math.exp(at) if shape.log else float(at)
            if f"and {shape.name} are" not in told and not shape.low * 1.01 < value < shape.high * 0.99:
                found.append(f"{shape.name} is not identified: it stands at the bound {value:.3g} of its search.")
        return tuple(found)


def _zero(numbers: str, what: str, effect: str) -> str:
    return f"{numbers} are not identified: the fit puts the term of {what} at zero, as if {effect} had no effect."


SIZE, DATA = ("alpha", *EXPONENTS), ("beta", *EXPONENTS)
FLOOR = (
    "is not identified: the fit puts this floor at zero, so these runs do not show where the loss levels off, and the "
    "law may not be carried far beyond them."
)
NO_SIZE = _zero("A and alpha", "model size", "size")
NO_DATA = _zero("B and beta", "tokens", "they")


def _power(exponent: Any, value: Any, centre: Any) -> np.ndarray:
    return np.exp(-exponent * (np.log(value) - centre))


@dataclass(frozen=True)
class ChinchillaForm(Form):
    law_type = laws.Chinchilla
    name = "chinchilla"
    text = "loss = E + A / params^alpha + B / tokens^beta"
    shapes = (Shape(*SIZE), Shape(*DATA))
    terms = (NO_SIZE, NO_DATA, f"E {FLOOR}")

    def law(self, theta: Any, scale: Any) -> laws.Chinchilla:
        a, b, e, alpha, beta = theta
        A, B = jnp.exp(a + alpha * scale[0]), jnp.exp(b + beta * scale[1])
        return laws.Chinchilla(E=jnp.exp(e), A=A, B=B, alpha=alpha, beta=beta)

    def log_loss(self, theta: Any, scale: Any, inputs: Mapping[str, Any]) -> Any:
        """The same in log-sum-exp form (Hoffmann et al. 2022, eq. 3): three exponentials a point and no power."""
        a, b, e, alpha, beta = theta
        size, data = jnp.log(inputs["params"]) - scale[0], jnp.log(inputs["tokens"]) - scale[1]
        return jnp.log(jnp.exp(a - alpha * size) + jnp.exp(b - beta * data) + jnp.exp(e))

    def columns(self, shape: np.ndarray, inputs: Inputs, scale: np.ndarray) -> np.ndarray:
        size = _power(shape[0], inputs["params"], scale[0])
        return np.stack([size, _power(shape[1], inputs["tokens"], scale[1]), np.ones_like(size)], axis=1)


@dataclass(frozen=True)
class KaplanForm(Form):
    """loss = (x (N0/N)^ratio + y D0/D)^alpha_D with x = exp(u / alpha_D): levels are terms in log loss."""

    law_type = laws.Kaplan
    name = "kaplan"
    text = "loss = ((N_c / params)^(alpha_N / alpha_D) + D_c / tokens)^alpha_D"
    shapes = (Shape("alpha_N / alpha_D", 0.05, 10.0), Shape("alpha_D", 0.005, 2.0))
    terms = (_zero("N_c and alpha_N", "model size", "size"), _zero("D_c and alpha_D", "tokens", "they"))

    def law(self, theta: Any, scale: Any) -> laws.Kaplan:
        u, v, ratio, alpha_D = theta
        N_c = jnp.exp(scale[0] + u / (alpha_D * ratio))
        return laws.Kaplan(N_c=N_c, D_c=jnp.exp(scale[1] + v / alpha_D), alpha_N=ratio * alpha_D, alpha_D=alpha_D)

    def columns(self, shape: np.ndarray, inputs: Inputs, scale: np.ndarray) -> np.ndarray:
        size = _power(shape[0], inputs["params"], scale[0])
        return np.stack([size, _power(1.0, inputs["tokens"], scale[1])], axis=1)

    def target(self, shape: np.ndarray, loss: np.ndarray) -> np.ndarray:
        return loss ** (1 / shape[1])

    def theta(self, shape: np.ndarray, levels: np.ndarray) -> np.ndarray:
        return np.concatenate([shape[1] * np.log(levels), shape])


@dataclass(frozen=True)
class OverTrainingForm(Form):
    law_type = laws.OverTraining
    name = "over-training"
    text = "loss = E + (a M^eta + b M^-eta) C^-eta, M = tokens / params, C = 6 params tokens"
    shapes = (Shape("eta", 0.01, 1.0),)
    terms = (_zero("a", "model size", "size"), _zero("b", "tokens", "they"), f"E {FLOOR}")

    def law(self, theta: Any, scale: Any) -> laws.OverTraining:
        size, data, e, eta = theta
        a = jnp.exp(size + 2 * eta * scale[0] + eta * math.log(6))
        b = jnp.exp(data + 2 * eta * scale[1] + eta * math.log(6))
        return laws.OverTraining(E=jnp.exp(e), a=a, b=b, eta=eta)

    def columns(self, shape: np.ndarray, inputs: Inputs, scale: np.ndarray) -> np.ndarray:
        size = _power(2 * shape[0], inputs["params"], scale[0])
        return np.stack([size, _power(2 * shape[0], inputs["tokens"], scale[1]), np.ones_like(size)], axis=1)


@dataclass(frozen=True)
class SaturatingForm(Form):
    law_type = laws.SaturatingPowerLaw
    name = "saturating"
    text = "loss = E + k / flops^gamma"
    shapes = (Shape("gamma", 0.01, 2.0),)
    terms = (_zero("k and gamma", "compute", "compute"), f"E {FLOOR}")

    def law(self, theta: Any, scale: Any) -> laws.SaturatingPowerLaw:
        level, e, gamma = theta
        return laws.SaturatingPowerLaw(E=jnp.exp(e), k=jnp.exp(level + gamma * scale[0]), gamma=gamma)

    def columns(self, shape: np.ndarray, inputs: Inputs, scale: np.ndarray) -> np.ndarray:
        fall = _power(shape[0], inputs["flops"], scale[0])
        return np.stack([fall, np.ones_like(fall)], axis=1)


@dataclass(frozen=True)
class FineGrainedForm(Form):
    law_type = laws.FineGrainedExperts
    name = "fine-grained-experts"
    text = "loss = c + (g / granularity^gamma + a) / params^alpha + b / tokens^beta"
    shapes = (Shape("gamma", 0.05, 4.0), Shape(*SIZE), Shape(*DATA))
    terms = (
        _zero("g and gamma", "granularity", "it"),
        _zero("a", "model size at infinite granularity", "it"),
        _zero("b and beta", "tokens", "they"),
        f"c {FLOOR}",
    )

    def law(self, theta: Any, scale: Any) -> laws.FineGrainedExperts:
        fine, size, data, c, gamma, alpha, beta = theta
        n, d, grain = scale
        g, a = jnp.exp(fine + alpha * n + gamma * grain), jnp.exp(size + alpha * n)
        b = jnp.exp(data + beta * d)
        return laws.FineGrainedExperts(c=jnp.exp(c), g=g, gamma=gamma, a=a, alpha=alpha, b=b, beta=beta)

    def columns(self, shape: np.ndarray, inputs: Inputs, scale: np.ndarray) -> np.ndarray:
        size = _power(shape[1], inputs["params"], scale[0])
        fine = size * _power(shape[0], inputs["granularity"], scale[2])
        return np.stack([fine, size, _power(shape[2], inputs["tokens"], scale[1]), np.ones_like(size)], axis=1)


@dataclass(frozen=True)
class RoutedForm(Form):
    """Levels are d, a, b, c about the centre of log10 params and log10 of the saturating count: of either sign."""

    law_type = laws.RoutedExperts
    name = "routed-experts"
    text = "log10 loss = a log10 params + b log10 X + c log10 params log10 X + d, X a saturating count of experts"
    shapes = (Shape("E_start", 0.2, 20.0, log=True), Shape("E_max / E_start", 1.5, 1e5, log=True))
    terms = ("", "", "", "")
    signed = True

    def law(self, theta: Any, scale: Any) -> laws.RoutedExperts:
        d, a, b, c, start, times = theta
        x, y = scale[0] / math.log(10), scale[1] / math.log(10)
        start, most = jnp.exp(start), jnp.exp(start + times)
        return laws.RoutedExperts(
            a=a - c * y, b=b - c * x, c=c, d=d - a * x - b * y + c * x * y, E_start=start, E_max=most
        )

    def columns(self, shape: np.ndarray, inputs: Inputs, scale: np.ndarray) -> np.ndarray:
        shaped = laws.RoutedExperts(a=0.0, b=0.0, c=0.0, d=0.0, E_start=shape[0], E_max=shape[0] * shape[1])
        x = (np.log(inputs["params"]) - scale[0]) / math.log(10)
        y = np.log10(shaped.effective_experts(inputs["experts"])) - scale[1] / math.log(10)
        return np.stack([np.ones_like(x), x, y, x * y], axis=1)

    def target(self, shape: np.ndarray, loss: np.ndarray) -> np.ndarray:
        return np.log10(loss)

    def theta(self, shape: np.ndarray, levels: np.ndarray) -> np.ndarray:
        return np.concatenate([levels, [s.coordinate(v) for s, v in zip(self.shapes, shape, strict=True)]])

    def bounds(self, log_loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = super().bounds(log_loss)
        low[:4], high[:4] = -20.0, 20.0
        return low, high


@dataclass(frozen=True)
class DataConstrainedForm(Form):
    """The Chinchilla law's coordinates, then log R_D and log R_N. Its projection is at fixed R and fixed worth of a
    corpus, so it only serves for starts (``projection.starts`` begins at the fit of the fresh law)."""

    law_type = laws.DataConstrained
    name = "data-constrained"
    text = "loss = E + A / (effective params)^alpha + B / (effective tokens)^beta"
    shapes = (Shape(*SIZE), Shape(*DATA), Shape("R_D", 0.05, 1e4, log=True), Shape("R_N", 0.05, 1e4, log=True))
    terms = (NO_SIZE, NO_DATA, f"E {FLOOR}")

    def law(self, theta: Any, scale: Any) -> laws.DataConstrained:
        fresh = CHINCHILLA.law(theta[:5], scale)
        return laws.DataConstrained(**laws.numbers(fresh), R_D=jnp.exp(theta[5]), R_N=jnp.exp(theta[6]))


CHINCHILLA, KAPLAN, OVER_TRAINING, SATURATING = ChinchillaForm(), KaplanForm(), OverTrainingForm(), SaturatingForm()
FINE_GRAINED, ROUTED, DATA_CONSTRAINED = FineGrainedForm(), RoutedForm(), DataConstrainedForm()
FORMS: tuple[Form, ...] = (
    CHINCHILLA, KAPLAN, DATA_CONSTRAINED, OVER_TRAINING, ROUTED, FINE_GRAINED, SATURATING,
)  # fmt: skip
