# SPDX-License-Identifier: Apache-2.0
"""Reading and writing the config.json of Hugging Face models: what all families share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from research.core.types import UserError
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.layers import Norm, WeightInit
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.pipeline import Pipeline
from research.models.positions import Position, Rotary
from research.models.rope_scaling import Linear, Llama3, Scaling, Yarn
from research.models.routers import Sigmoid, TopK
from research.models.stack import AttentionKind

T = TypeVar("T")
MISSING = object()


class Unfit(UserError):
    """A model that a family's config cannot describe."""


@dataclass(frozen=True)
class Config:
    """A config.json as read, that says plainly what it lacks or has otherwise."""

    values: Mapping[str, Any]
    where: str = "config.json"

    def get(self, name: str, default: Any = MISSING) -> Any:
        """A value; null counts as absent. Raises UserError where it is absent and has no default."""
        found = self.values.get(name)
        if found is None:
            if default is MISSING:
                raise UserError(f"{self.where} has no {name}: give the config.json that belongs to the weights.")
            return default
        return found

    def must(self, name: str, allowed: Sequence[Any], default: Any = MISSING) -> Any:
        """Raises UserError where a value is not one of those that can be had here."""
        found = self.get(name, default)
        if found not in allowed:
            choices = ", ".join(repr(value) for value in allowed)
            raise UserError(f"{self.where} has {name} = {found!r}, which is not supported: it must be {choices}.")
        return found

    @property
    def rope(self) -> Mapping[str, Any]:
        """Rotary settings of either spelling: ``rope_parameters``, or ``rope_theta`` beside ``rope_scaling``."""
        new = self.get("rope_parameters", {})
        old = {name: self.values[name] for name in ("rope_theta",) if self.values.get(name) is not None}
        return {**old, **self.get("rope_scaling", {}), **new}


def rotary(config: Config, settings: Mapping[str, Any] | None = None, *, fraction: float = 1.0) -> Rotary:
    """The rotary positions of a config, or of ``settings`` where layers differ. Raises UserError for a kind of scaling
    that is not here, by its name."""
    rope = config.rope if settings is None else settings
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings", 0)
    scaling: Scaling | None = None
    if kind == "linear":
        scaling = Linear(float(rope["factor"]))
    elif kind == "llama3":
        scaling = Llama3(
            float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), int(original)
        )
    elif kind == "yarn":
        number = lambda name: None if rope.get(name) is None else float(rope[name])  # noqa: E731
        scaling = Yarn(
            float(rope["factor"]),
            int(original),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            attention_factor=number("attention_factor"),
            mscale=number("mscale"),
            mscale_all_dim=number("mscale_all_dim"),
            truncate=bool(rope.get("truncate", True)),
        )
    elif kind not in ("default", "mrope_default"):
        raise UserError(
            f"{config.where} has the rope_type {kind!r}, which is not supported: it must be default, linear, llama3 or "
            "yarn."
        )
    return Rotary(float(rope.get("rope_theta", 10_000.0)), fraction, scaling)


def rope_config(position: Position) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of rotary positions. Raises Unfit for others."""
    if not isinstance(position, Rotary):
        raise Unfit(f"positions {type(position).__name__}")
    found: dict[str, Any] = {"rope_theta": position.theta}
    scaling = position.scaling
    if isinstance(scaling, Linear):
        found["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3):
        found["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    elif isinstance(scaling, Yarn):
        named = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
        given = {name: getattr(scaling, name) for name in named}
        found["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            **{name: value for name, value in given.items() if value is not None},
        }
    elif scaling is not None:
        raise Unfit(f"rotary scaling {type(scaling).__name__}")
    return found


def repeating(kinds: Sequence[T]) -> T | tuple[T, ...]:
    """The shortest pattern that gives these when it is repeated; one kind alone as it is."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return kinds[0] if period == 1 else tuple(kinds[:period])
    raise UserError("A model needs at least one layer: num_hidden_layers is 0.")


def layer_types(config: Config, count: int, default: Sequence[str]) -> list[str]:
    """Which layers see a window."""
    found = list(config.get("layer_types", default))
    allowed = ("full_attention", "sliding_attention")
    for kind in found:
        if kind not in allowed:
            raise UserError(f"{config.where} has a layer of the type {kind!r}: it must be {' or '.join(allowed)}.")
    if len(found) != count:
        raise UserError(f"{config.where} has {len(found)} layer_types for {count} layers: give one for each.")
    return found


def need(condition: bool, what: str) -> None:
    """Raises Unfit naming what a family does not have."""
    if not condition:
        raise Unfit(what)


def one_attention(model: Decoder) -> Attention:
    """The attention that all layers have. Raises Unfit where they differ or are of another kind."""
    need(len(model.attentions) == 1 and isinstance(model.attentions[0], Attention), "several kinds of attention")
    found = model.attentions[0]
    assert isinstance(found, Attention)
    return found


def one_mlp(model: Decoder) -> Mlp:
    need(isinstance(model.mlp, Mlp) and not model.first, "experts")
    assert isinstance(model.mlp, Mlp)
    return model.mlp


def canonical(model: Decoder) -> Decoder:
    """The model without what only says how it is computed, drawn or trained: equal ones give equal logits."""

    def plain(mlp: Mlp | Moe) -> Mlp | Moe:
        if isinstance(mlp, Mlp):
            return mlp
        router = mlp.router
        if isinstance(router, Sigmoid):  # it has a bias or not; how fast that moves is a matter of training
            router = replace(router, bias_rate=float(router.bias_rate > 0))
        if isinstance(router, TopK) and router.top_groups == router.groups:
            router = replace(router, groups=1, top_groups=1)
        return replace(mlp, router=router, dispatch="sorted", balance=0.0, z_loss=0.0, implementation="auto")

    def bare(attention: AttentionKind) -> AttentionKind:
        scale = attention.scale
        if scale is not None and abs(scale * attention.width(model.d_model) ** 0.5 - 1) < 1e-6:
            scale = None
        same: dict[str, Any] = dict(implementation="auto", position=attention.position or model.position, scale=scale)
        if isinstance(attention, Attention):
            heads = dict(num_kv_heads=attention.kv_heads, head_dim=attention.width(model.d_model))
            return replace(attention, **same, **heads)
        return replace(attention, **same)

    attentions, kinds = [bare(attention) for attention, _ in model.kinds], [plain(mlp) for _, mlp in model.kinds]
    mlps = repeating(kinds[len(model.first) :])
    return replace(
        model,
        attention=repeating(attentions),
        mlp=mlps,
        first=tuple(plain(mlp) for mlp in model.first),
        position=Rotary() if isinstance(model.position, Rotary) else model.position,
        layers="scanned",
        remat="none",
        weight_init=WeightInit(),
        pipeline=Pipeline(),
    )


def rms(config: Config, *, offset: float = 0.0) -> Norm:
    return Norm("rms", float(config.get("rms_norm_eps", 1e-6)), offset=offset)


def common(model: Decoder, mlp: Mlp | Moe, length: int) -> dict[str, Any]:
    """What the config of every family since LLaMA says. length: the most positions that it promises."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "intermediate_size": mlp.d_ff,
        "max_position_embeddings": length,
        "tie_word_embeddings": model.head == "tied",
    }
