# SPDX-License-Identifier: Apache-2.0
"""Reading and writing the config.json of Hugging Face models: what all families share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
# Settings that change no logits here: bookkeeping, dropout, auxiliary losses, token ids, and how text is drawn.
NEUTRAL = {
    "architectures", "auto_map", "model_type", "name_or_path", "_name_or_path", "transformers_version", "dtype",
    "torch_dtype", "tokenizer_class", "return_dict", "output_hidden_states", "output_attentions",
    "output_router_logits", "id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task",
    "is_decoder", "is_encoder_decoder", "use_cache", "cache_implementation", "prefix", "chunk_size_feed_forward",
    "gradient_checkpointing", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
    "reorder_and_upcast_attn", "pretraining_tp", "ep_size", "initializer_range", "max_position_embeddings", "n_ctx",
    "head_dim", "qk_head_dim", "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attn_pdrop",
    "embd_pdrop", "resid_pdrop", "classifier_dropout", "router_aux_loss_coef", "router_jitter_noise",
    "aux_loss_alpha", "seq_aux", "num_nextn_predict_layers", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_return_sequences", "finetuned",
    "unsloth_fixed", "unsloth_version",
}  # fmt: skip


class Unfit(UserError):
    """A model that a family's config cannot describe."""


@dataclass(frozen=True)
class Config:
    """A config.json as read, that says plainly what it lacks or has otherwise. read: the names that were asked for."""

    values: Mapping[str, Any]
    where: str = "config.json"
    read: set[str] = field(default_factory=set, compare=False, repr=False)

    def get(self, name: str, default: Any = MISSING, *, absent: Any = MISSING) -> Any:
        """A value. null is ``default``, and so is what is not there, unless that is ``absent``. Raises UserError where
        there is no default."""
        self.read.add(name)
        found = self.values.get(name)
        if found is not None:
            return found
        if absent is not MISSING and name not in self.values:
            return absent
        if default is MISSING:
            raise UserError(f"{self.where} has no {name}: give the config.json that belongs to the weights.")
        return default

    def whole(self, name: str, default: Any = MISSING, *, absent: Any = MISSING, least: int | None = None) -> int:
        """least: the least that it may be; None: 1 where the value must be given, else 0."""
        found = self.get(name, default, absent=absent)
        least = least if least is not None else int(default is MISSING)
        if isinstance(found, bool) or not isinstance(found, int | float) or found != int(found) or found < least:
            raise UserError(f"{self.where} has {name} = {found!r}: it must be a whole number of at least {least}.")
        return int(found)

    def number(self, name: str, default: Any = MISSING, *, absent: Any = MISSING) -> float:
        found = self.get(name, default, absent=absent)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise UserError(f"{self.where} has {name} = {found!r}: it must be a number.")
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        found = self.get(name, default)
        if not isinstance(found, bool):
            raise UserError(f"{self.where} has {name} = {found!r}: it must be true or false.")
        return found

    def unused(self, *names: str) -> None:
        """Settings that mean nothing beside others."""
        self.read.update(names)

    def must(self, name: str, allowed: Sequence[Any], default: Any = MISSING) -> Any:
        """Raises UserError where a value is not one of those that can be had here."""
        found = self.get(name, default)
        if found not in allowed:
            choices = ", ".join(repr(value) for value in allowed)
            raise UserError(f"{self.where} has {name} = {found!r}, which is not supported: it must be {choices}.")
        return found

    def part(self, name: str) -> Mapping[str, Any]:
        found = self.get(name, {})
        if not isinstance(found, Mapping):
            raise UserError(f"{self.where} has {name} = {found!r}: it must be settings by name.")
        return found

    def check_read(self) -> None:
        """Raises UserError naming a setting that nobody asked for, unless it changes no logits or is off."""
        if self.values.get("quantization_config"):
            raise UserError(f"{self.where} is of quantized weights, which are not supported: give them in bfloat16.")
        for name, value in self.values.items():
            if value and name not in self.read and name not in NEUTRAL and not name.startswith("summary_"):
                raise UserError(
                    f"{self.where} has {name} = {value!r}, which is not supported in this family: remove it if the "
                    "weights were made without it."
                )

    @property
    def positions(self) -> int:
        """The most positions that the model is said to take."""
        name = "n_positions" if self.get("max_position_embeddings", None) is None else "max_position_embeddings"
        return self.whole(name, 2048, least=1)

    @property
    def rope(self) -> Mapping[str, Any]:
        """Rotary settings of either spelling: ``rope_parameters``, or ``rope_theta`` beside ``rope_scaling``."""
        theta = self.get("rope_theta", None)
        old = {} if theta is None else {"rope_theta": theta}
        return {**old, **self.part("rope_scaling"), **self.part("rope_parameters")}


def rotary(
    config: Config, settings: Mapping[str, Any] | None = None, *, fraction: float | None = None, theta: float = 10_000.0
) -> Rotary:
    """The rotary positions of a config, or of ``settings`` where layers differ.

    fraction: of each head that turns, where a family has that; theta: the family's own. Raises UserError for a kind of
    scaling that is not here, by its name.
    """
    rope = Config(config.rope if settings is None else settings, f"{config.where} (rotary positions)")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if fraction is None:
        rope.must("partial_rotary_factor", (1.0,), config.get("partial_rotary_factor", 1.0))
    else:
        rope.get("partial_rotary_factor", fraction)
    scaling: Scaling | None = None
    if kind == "linear":
        scaling = Linear(rope.number("factor"))
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        scaling = Llama3(*(rope.number(name) for name in names), _original(config, rope))
    elif kind == "yarn":
        optional = lambda name: None if rope.get(name, None) is None else rope.number(name)  # noqa: E731
        all_dim = optional("mscale_all_dim")
        if all_dim and not str(config.get("model_type", "")).startswith("deepseek"):
            raise UserError(f"{rope.where} has mscale_all_dim = {all_dim}, which only DeepSeek's attention has.")
        scaling = Yarn(
            rope.number("factor"),
            _original(config, rope),
            beta_fast=rope.number("beta_fast", 32),
            beta_slow=rope.number("beta_slow", 1),
            attention_factor=optional("attention_factor"),
            mscale=optional("mscale"),
            mscale_all_dim=all_dim,
            truncate=rope.flag("truncate", True),
        )
    elif kind != "default":
        raise UserError(
            f"{config.where} has the rope_type {kind!r}, which is not supported: it must be default, linear, llama3 or "
            "yarn."
        )
    found = Rotary(rope.number("rope_theta", theta), fraction or 1.0, scaling)
    if kind != "default":  # without scaling its settings mean nothing
        rope.check_read()
    return found


def _original(config: Config, rope: Config) -> int:
    """The length that a model was trained at before its positions were stretched."""
    name = "original_max_position_embeddings"
    if rope.get(name, None) is not None:
        return rope.whole(name, least=1)
    return config.whole(name if config.get(name, None) is not None else "max_position_embeddings")


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
    found = config.get("layer_types", list(default))
    if not isinstance(found, list):
        raise UserError(f"{config.where} has layer_types = {found!r}: it must be a list.")
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


def rms(config: Config, *, offset: float = 0.0, eps: float = 1e-6) -> Norm:
    """eps: the family's own."""
    return Norm("rms", config.number("rms_norm_eps", eps), offset=offset)


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
