# SPDX-License-Identifier: Apache-2.0
"""What a model costs: parameters and matrix-product FLOPs per token, by architecture.

The convention of the whole project: a multiply and an add are two FLOPs; every matrix product counts, the
scores and values of attention and the output head included; attention is counted over the full T x T square
(what the plain implementation computes; causal block-skipping makes a program cheaper, not the model); a
training step costs three forward passes, for each product has one gradient product per operand. Embedding
look-ups, norms, softmax and activations are not counted, nor is recomputation. Of experts those count that a
token asks for, whatever is dropped, and the router's product.
"""

from dataclasses import dataclass

from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.positions import Learned


@dataclass(frozen=True)
class Params:
    """Parameter counts. ``embedding`` holds token and position tables; a tied head adds nothing. ``idle``: those of
    ``layers`` that a token does not go through, in experts that were not chosen for it."""

    layers: int
    norm: int
    embedding: int
    head: int
    idle: int = 0

    @property
    def total(self) -> int:
        return self.layers + self.norm + self.embedding + self.head

    @property
    def non_embedding(self) -> int:
        """Without embedding tables and without the head (Kaplan et al. 2020, section 2.1)."""
        return self.layers + self.norm

    @property
    def active(self) -> int:
        """Those that one token goes through: the total of a dense model."""
        return self.total - self.idle


def params(model: Decoder) -> Params:
    d_model, attention = model.d_model, model.attention
    width = attention.width(d_model)
    norm = d_model * (2 if model.norm.kind == "layer" else 1)
    per_layer = 2 * norm
    per_layer += d_model * width * (2 * attention.num_heads + 2 * attention.kv_heads)
    positions = model.position.max_length if isinstance(model.position, Learned) else 0
    mlps = [_feed_forward(d_model, mlp) for mlp in model.feed_forwards]
    return Params(
        layers=model.num_layers * per_layer + sum(all_of_it for all_of_it, _ in mlps),
        norm=norm,
        embedding=(model.vocab_size + positions) * d_model,
        head=model.vocab_size * d_model if model.head == "untied" else 0,
        idle=round(sum(all_of_it - used for all_of_it, used in mlps)),
    )


def _feed_forward(d_model: int, mlp: Mlp | Moe) -> tuple[int, float]:
    """Weights of one layer's feed-forward, and how many of them a token goes through on average."""
    one = d_model * mlp.d_ff * (3 if mlp.gated else 2)
    if isinstance(mlp, Mlp):
        return one, one
    router = d_model * mlp.num_experts if mlp.router.learned else 0
    common = router + (_feed_forward(d_model, mlp.shared)[0] if mlp.shared is not None else 0)
    return common + mlp.num_experts * one, common + mlp.router.per_token * one


def experts(model: Decoder) -> int:
    """The most experts that a layer has; 0 for a dense model."""
    return max(mlp.num_experts if isinstance(mlp, Moe) else 0 for mlp in model.feed_forwards)


@dataclass(frozen=True)
class ForwardFlops:
    """Forward matrix-product FLOPs per token, by part."""

    projections: float
    scores: float
    mlp: float
    head: float

    @property
    def total(self) -> float:
        return self.projections + self.scores + self.mlp + self.head


def forward_flops_per_token(model: Decoder, *, sequence_length: int) -> ForwardFlops:
    d_model, attention = model.d_model, model.attention
    width = attention.width(d_model)
    return ForwardFlops(
        projections=2.0 * model.num_layers * d_model * width * (2 * attention.num_heads + 2 * attention.kv_heads),
        scores=4.0 * model.num_layers * sequence_length * attention.num_heads * width,
        mlp=2.0 * sum(_feed_forward(d_model, mlp)[1] for mlp in model.feed_forwards),
        head=2.0 * d_model * model.vocab_size,
    )


def training_flops_per_token(model: Decoder, *, sequence_length: int) -> float:
    """Forward and backward: three times the forward products."""
    return 3.0 * forward_flops_per_token(model, sequence_length=sequence_length).total
