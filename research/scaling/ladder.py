# SPDX-License-Identifier: Apache-2.0
"""From compute budgets to experiments: which models to run at each budget, and for exactly how long.

A ladder is a set of IsoFLOP curves (Hoffmann et al. 2022, approach 2): at each budget several models, each
trained for the whole number of steps whose FLOPs come within 1% of the budget. The length of a run is its
budget, so a schedule that is a share of the run ends where the run ends.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from research.core.types import UserError
from research.models.decoder import Decoder
from research.models.latent_attention import LatentAttention
from research.models.stack import AttentionKind
from research.scaling import cost
from research.scaling.table import ParameterCount
from research.train.experiment import Experiment, Flops

Models = Mapping[str, Decoder] | Sequence[Decoder]
FEWEST_SIZES = 3  # a parabola through fewer says nothing

TOLERANCE = 0.01  # by how much a run's FLOPs may miss its budget


def isoflop(
    base: Experiment,
    *,
    models: Models,
    budgets: Sequence[float],
    tokens_per_param: tuple[float, float] | None = None,
    parameters: ParameterCount = "total",
    adjust: Callable[[Experiment], Experiment] | None = None,
    tolerance: float = TOLERANCE,
    min_steps: int = 100,
) -> dict[str, Experiment]:
    """Experiments by name (``c1.6e11-n36k``): every model at every budget (FLOPs), each within ``tolerance``
    of it.

    models: by name, or a sequence, then named by their ``parameters`` count. tokens_per_param: (lowest,
    highest), leaves out the pairs of model and budget outside. adjust: settings that depend on the model or
    the budget, such as a learning rate by width; it is handed the experiment with its model and length set,
    and may change both. min_steps: fewer are refused, for a warm-up that is a share of too few steps bends
    the small end of the curve.

    Raises UserError, naming the nearest budget that works, where a budget gives too few steps to come within
    the tolerance, fewer than ``min_steps``, or (with tokens_per_param) fewer than three models.
    """
    labelled, experiments = labels(models, parameters=parameters), {}
    for budget, tag in zip(budgets, budget_labels(budgets), strict=True):
        chosen = labelled
        if tokens_per_param is not None:
            chosen = choose(
                labelled,
                budget=budget,
                sequence_length=base.source.sequence_length,
                tokens_per_param=tokens_per_param,
                parameters=parameters,
            )
        for label, model in chosen.items():
            name = f"{tag}-{label}"
            experiment = dataclasses.replace(base, name=name, model=model, length=Flops(float(budget)))
            if adjust is not None:
                experiment = dataclasses.replace(adjust(experiment), name=name)
            check_budget(experiment, budget=budget, tolerance=tolerance, min_steps=min_steps)
            experiments[name] = experiment
    return experiments


def check_budget(experiment: Experiment, *, budget: float, tolerance: float = TOLERANCE, min_steps: int = 100) -> None:
    """Raises UserError where the run's exact FLOPs miss the budget by more than ``tolerance``, or its steps
    are few."""
    step = experiment.tokens_per_step * experiment.flops_per_token
    steps, name = round(budget / step), experiment.name
    if steps < min_steps:
        raise UserError(
            f"{name}: {budget:.4g} FLOPs are {steps} steps of {experiment.tokens_per_step} tokens and at "
            f"least {min_steps} are needed for a warm-up that does not bend the curve: the nearest budget "
            f"that works is {min_steps * step:.4g} FLOPs, or use a smaller batch or model, or lower "
            "min_steps."
        )
    if abs(steps * step / budget - 1) > tolerance:
        near = [count for count in (math.floor(budget / step), math.ceil(budget / step)) if count > 0]
        raise UserError(
            f"{name}: {budget:.4g} FLOPs are {budget / step:.2f} steps, and no whole number of steps comes "
            f"within {tolerance:.2%}: the nearest budgets that work are "
            f"{' and '.join(f'{count * step:.4g}' for count in near)} FLOPs, or use a smaller batch."
        )
    if abs(experiment.flops / budget - 1) > tolerance:
        raise UserError(
            f"{name}: the run costs {experiment.flops:.4g} FLOPs and its budget is {budget:.4g}: an adjust "
            "function must leave the length as it is, or set one that costs the same."
        )


def choose(
    models: Models,
    *,
    budget: float,
    sequence_length: int,
    tokens_per_param: tuple[float, float],
    parameters: ParameterCount = "total",
    at_least: int = FEWEST_SIZES,
) -> dict[str, Decoder]:
    """The models that a budget (FLOPs) trains for between lowest and highest tokens per parameter.

    Around the expected optimum: 20 tokens per parameter for large models (Hoffmann et al. 2022), so (5, 80)
    brackets it. Raises UserError for a range that is empty or holds fewer than ``at_least`` models.
    """
    low, high = tokens_per_param
    if not 0 < low < high:
        raise UserError(f"tokens_per_param is {tokens_per_param}: give (lowest, highest), positive and rising.")
    labelled, ratios = labels(models, parameters=parameters), {}
    for label, model in labelled.items():
        tokens = budget / cost.training_flops_per_token(model, sequence_length=sequence_length)
        ratios[label] = tokens / count(model, parameters=parameters)
    chosen = {label: labelled[label] for label, ratio in ratios.items() if low <= ratio <= high}
    if len(chosen) < at_least:
        raise UserError(
            f"At {budget:.3g} FLOPs {len(chosen)} of the {len(labelled)} models see {low:g} to {high:g} "
            f"tokens per parameter and {at_least} are needed (the models see {min(ratios.values()):.3g} to "
            f"{max(ratios.values()):.3g}): widen the range, add sizes or change the budget."
        )
    return chosen


def grid(
    base: Decoder,
    *,
    d_models: Sequence[int],
    head_dim: int = 16,
    ff_ratio: float = 8 / 3,
    aspect: float = 32.0,
) -> tuple[Decoder, ...]:
    """``base`` at several widths: heads of ``head_dim``, d_ff = ff_ratio d_model, d_model / aspect layers.

    d_ff is rounded to a multiple of 8 and the layers to a whole number, at least 1. A base with grouped kv
    heads keeps its group size where it divides, else every head has its own. Raises UserError for a width
    that does not split into heads.
    """
    models = []
    for d_model in d_models:
        heads = d_model // head_dim
        if heads < 1 or d_model % head_dim:
            raise UserError(f"d_model {d_model} does not split into heads of {head_dim}: choose a multiple of it.")
        group = base.attentions[0].num_heads // base.attentions[0].kv_heads
        kv_heads = heads // group if group > 1 and heads % group == 0 else None
        attention = with_heads(base.attention, num_heads=heads, num_kv_heads=kv_heads)
        mlp = dataclasses.replace(base.mlp, d_ff=max(8, 8 * round(ff_ratio * d_model / 8)))
        layers = max(1, round(d_model / aspect))
        models.append(dataclasses.replace(base, d_model=d_model, num_layers=layers, attention=attention, mlp=mlp))
    return tuple(models)


def with_heads(
    attention: AttentionKind | tuple[AttentionKind, ...], *, num_heads: int, num_kv_heads: int | None
) -> AttentionKind | tuple[AttentionKind, ...]:
    """The same attention with so many heads of d_model / num_heads; of a pattern each. Raises UserError for latent
    attention, whose heads have widths of their own."""
    if isinstance(attention, tuple):
        return tuple(with_heads(one, num_heads=num_heads, num_kv_heads=num_kv_heads) for one in attention)
    if isinstance(attention, LatentAttention):
        raise UserError("Models with latent attention are not sized by a rule: give the models of a ladder yourself.")
    return dataclasses.replace(attention, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=None)


def geometric(first: float, *, last: float, count: int) -> tuple[float, ...]:
    """``count`` numbers from first to last at equal ratios, e.g. budgets in FLOPs."""
    if not (first > 0 and last > 0 and count >= 1):
        raise UserError(f"geometric needs positive ends and a count of at least 1; given {first}, {last}, {count}.")
    if count == 1:
        return (float(first),)
    return tuple(float(first) * (last / first) ** (index / (count - 1)) for index in range(count))


def count(model: Decoder, *, parameters: ParameterCount = "total") -> int:
    """Parameters of a model by convention: all of them, or those outside embedding tables and head."""
    if parameters not in ("total", "non_embedding"):
        raise UserError(f"parameters is {parameters!r}: choose 'total' or 'non_embedding'.")
    return getattr(cost.params(model), parameters)


def labels(models: Models, *, parameters: ParameterCount = "total") -> dict[str, Decoder]:
    """Models by label: a mapping as it is, a sequence as ``n36k``, ``n1.2M`` with as many digits as tell
    them apart."""
    if isinstance(models, Mapping):
        return dict(models)
    counts = [count(model, parameters=parameters) for model in models]
    names = _distinct(counts, lambda value, digits: f"n{short_count(value, digits=digits)}", "parameter counts")
    return dict(zip(names, models, strict=True))


def budget_labels(budgets: Sequence[float]) -> list[str]:
    """``c1.6e11`` for each budget (FLOPs), with as many digits as tell them apart."""
    for budget in budgets:
        if not (math.isfinite(budget) and budget > 0):
            raise UserError(f"A budget must be a positive number of FLOPs; given {budget}.")
    return _distinct(budgets, _budget_label, "budgets")


def _budget_label(budget: float, digits: int) -> str:
    mantissa, exponent = f"{budget:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"c{mantissa}e{int(exponent)}"


def short_count(value: float, *, digits: int = 2) -> str:
    """36000 -> "36k", 1234567 -> "1.2M"; ``digits`` significant digits."""
    if value < 1:
        return f"{value:.{digits}g}"
    value = float(f"{value:.{digits - 1}e}")
    power = min(4, max(0, int(math.floor(math.log10(value) / 3))))
    scaled = value / 1000**power
    decimals = max(0, digits - 1 - int(math.floor(math.log10(scaled))))
    text = f"{scaled:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + ("", "k", "M", "B", "T")[power]


def _distinct(values: Iterable[float], label: Callable[[float, int], str], what: str) -> list[str]:
    values = list(values)
    for digits in range(2, 17):
        names = [label(value, digits) for value in values]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"Two of the {what} are equal ({', '.join(f'{v:g}' for v in values)}): give each once.")
