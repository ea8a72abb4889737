# SPDX-License-Identifier: Apache-2.0
"""The model that can be built nearest to a size: layers, width and heads of a family, in multiples that hardware likes.

A family fixes how a decoder looks at any size: the width of its heads, the ratio of feed-forward to width, width over
layers (or a fixed depth), and the multiples that widths come in. The matrix units of TPUs are 128 wide (256 from v6e
on), so the large families have heads of 128 and widths of multiples of 128 and more, which also split over tensor axes.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from research.core.types import UserError
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.scaling import cost, ladder
from research.scaling.table import ParameterCount

ASPECT_TOLERANCE, SIZE_TOLERANCE = math.log(1.35), math.log(1.04)  # what one unit of misfit is
MOST_LAYERS = 160


@dataclass(frozen=True)
class Family:
    """base: what all its models share (vocabulary, norms, positions, activation). aspect: d_model over layers;
    layers: a fixed depth instead. head_dim; ff_ratio: d_ff over d_model, rounded to ``ff_multiple``. multiples: (from
    width, multiple of d_model), rising."""

    name: str
    base: Decoder
    head_dim: int
    ff_ratio: float
    ff_multiple: int
    multiples: tuple[tuple[int, int], ...]
    aspect: float | None = None
    layers: int | None = None

    def widths(self, most: int) -> Iterator[int]:
        """Every width that may be built, up to ``most``: its heads divide into the groups of keys and values."""
        width = self.multiples[0][1]
        while width <= most:
            if self.base.attentions[0].kv_heads == 1 or width // self.head_dim % self.group == 0:
                yield width
            step = next(multiple for start, multiple in reversed(self.multiples) if width >= start)
            width += step

    @property
    def group(self) -> int:
        """Heads that share their keys and values."""
        return self.base.attentions[0].num_heads // self.base.attentions[0].kv_heads

    def model(self, d_model: int, num_layers: int) -> Decoder:
        """Of a width that ``widths`` has."""
        heads = d_model // self.head_dim
        kv_heads = None if self.group == 1 else 1 if self.base.attentions[0].kv_heads == 1 else heads // self.group
        d_ff = max(self.ff_multiple, self.ff_multiple * round(self.ff_ratio * d_model / self.ff_multiple))
        attention = ladder.with_heads(self.base.attention, num_heads=heads, num_kv_heads=kv_heads)
        mlp = dataclasses.replace(self.base.mlp, d_ff=d_ff)
        return dataclasses.replace(self.base, d_model=d_model, num_layers=num_layers, attention=attention, mlp=mlp)


LARGE = ((0, 128), (2048, 256), (4096, 512), (8192, 1024))


def llama(vocab_size: int = 32_000) -> Family:
    """Gated feed-forward layers of 8/3 the width, heads of 128, about 100 of width for each layer (Touvron et al.
    2023)."""
    base = Decoder(
        vocab_size=vocab_size, d_model=1024, num_layers=8, attention=Attention(num_heads=8), mlp=Mlp(d_ff=2816)
    )
    return Family("llama", base, 128, 8 / 3, 256, LARGE, aspect=110.0)


def gpt(vocab_size: int = 50_304) -> Family:
    """Ungated feed-forward layers of four times the width and heads of 64 (Radford et al. 2019), widths of 64 up."""
    mlp = Mlp(d_ff=4096, activation="gelu")
    base = Decoder(vocab_size=vocab_size, d_model=1024, num_layers=24, attention=Attention(num_heads=16), mlp=mlp)
    return Family("gpt", base, 64, 4.0, 128, ((0, 64), (1024, 128), *LARGE[1:]), aspect=64.0)


def small(vocab_size: int = 512) -> Family:
    """Two layers with heads of 8: the models of the studies here, which a laptop trains."""
    base = Decoder(
        vocab_size=vocab_size, d_model=64, num_layers=2, attention=Attention(num_heads=8), mlp=Mlp(d_ff=168),
        layers="unrolled",
    )  # fmt: skip
    return Family("small", base, 8, 8 / 3, 8, ((0, 8),), layers=2)


FAMILIES = {"llama": llama, "gpt": gpt, "small": small}


def family_of(models: Sequence[Decoder], *, name: str = "study's") -> Family:
    """The family that a study's own models belong to, as far as they tell: head width, feed-forward ratio, depth or
    aspect, and the multiple that their widths come in."""
    dense = [model for model in models if isinstance(model.mlp, Mlp) and not model.first]
    if not dense:
        raise UserError("The study's models have experts, and a family is of dense ones: name one with --family.")
    largest = max(dense, key=lambda model: model.d_model)
    head_dim, depths = largest.attentions[0].width(largest.d_model), {model.num_layers for model in dense}
    multiple = math.gcd(*(model.mlp.d_ff for model in dense))
    step = math.lcm(head_dim, math.gcd(*(model.d_model for model in dense)))
    return Family(
        name,
        largest,
        head_dim,
        ff_ratio=_ratio(dense, multiple),
        ff_multiple=multiple,
        multiples=((0, step),),
        aspect=largest.d_model / largest.num_layers if len(depths) > 1 else None,
        layers=largest.num_layers if len(depths) == 1 else None,
    )


def _ratio(models: Sequence[Decoder], multiple: int) -> float:
    """The d_ff over d_model that rounds to every model's d_ff; the largest model's own where it does, or none does."""
    low = max((model.mlp.d_ff - multiple / 2) / model.d_model for model in models)
    high = min((model.mlp.d_ff + multiple / 2) / model.d_model for model in models)
    largest = max(models, key=lambda model: model.d_model)
    ratio = largest.mlp.d_ff / largest.d_model
    return ratio if low < ratio < high or low >= high else (low + high) / 2


def nearest(family: Family, *, params: float, parameters: ParameterCount = "total") -> Decoder:
    """The family's model nearest to a parameter count: sizes are weighed against how far depth is from the family's.

    Raises UserError where even the smallest model has more than twice the count asked for, or the largest less than
    half of it.
    """
    if not (math.isfinite(params) and params > 0):
        raise UserError(f"A model's size must be a positive number of parameters; given {params}.")
    best, least, smallest, largest = None, math.inf, math.inf, 0
    for width in family.widths(int(200 * params**0.5) + 2 * family.group * family.multiples[0][1]):
        depths = [family.layers] if family.layers is not None else _depths(family, width)
        for depth in depths:
            model = family.model(width, depth)
            size = count(model, parameters=parameters)
            smallest, largest = min(smallest, size), max(largest, size)
            misfit = (math.log(size / params) / SIZE_TOLERANCE) ** 2
            if family.aspect is not None:
                misfit += (math.log(width / depth / family.aspect) / ASPECT_TOLERANCE) ** 2
            if misfit < least:
                best, least = model, misfit
        if not depths or count(family.model(width, depths[0]), parameters=parameters) > 4 * params:
            break
    if best is None or count(best, parameters=parameters) > 2 * params:
        raise UserError(
            f"The smallest {family.name} model has {smallest:,} parameters and {params:,.0f} are asked for: "
            f"{_smaller(family)}."
        )
    if count(best, parameters=parameters) < params / 2:
        raise UserError(
            f"The largest {family.name} model has {largest:,} parameters and {params:,.0f} are asked for: no model of "
            f"that size can be built."
        )
    return best


def _smaller(family: Family) -> str:
    if family.name == "small":
        return "no model so small can be built"
    return f"name a smaller family ({', '.join(name for name in FAMILIES if name != family.name)})"


def count(model: Decoder, *, parameters: ParameterCount = "total") -> int:
    """Parameters of a model by any convention of ``Run.count``."""
    if parameters == "with_head":
        return cost.params(model).non_embedding + model.vocab_size * model.d_model
    return ladder.count(model, parameters=parameters)


def _depths(family: Family, width: int) -> list[int]:
    """Depths from half to twice what the family's aspect says."""
    middle = width / family.aspect
    return [n for n in range(max(1, int(middle / 2)), min(MOST_LAYERS, math.ceil(middle * 2)) + 1)]


def describe(model: Decoder) -> str:
    """A model in words: layers, width, heads, feed-forward, size."""
    attention, counts = model.attentions[0], cost.params(model)
    heads = f"{attention.num_heads} heads of {attention.width(model.d_model)}"
    if attention.kv_heads != attention.num_heads:
        heads += f" ({attention.kv_heads} for keys and values)"
    return (
        f"{model.num_layers} layers of width {model.d_model:,}, {heads}, feed-forward {model.mlp.d_ff:,}, vocabulary "
        f"{model.vocab_size:,}: {counts.total:,} parameters"
    )
