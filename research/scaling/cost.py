# SPDX-License-Identifier: Apache-2.0
"""What a model costs: parameters and matrix-product FLOPs per token, by architecture.

The convention of the whole project: a multiply and an add are two FLOPs; every matrix product counts, the
scores and values of attention and the output head included; attention is counted over the full T x T square
(what the plain implementation computes; causal block-skipping makes a program cheaper, not the model); a
training step costs three forward passes, for each product has one gradient product per operand. Embedding
look-ups, norms, softmax and activations are not counted, nor is recomputation, nor what the positions of
Transformer-XL project once for all rows of a batch. Of experts those count that a token asks for, whatever is dropped,
and the router's product.
"""

from dataclasses import dataclass
from typing import NamedTuple

from research.models.decoder import Decoder
from research.models.latent_attention import LatentAttention
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.models.positions import Learned, Position, RelativeBias, TransformerXL
from research.models.stack import AttentionKind, Kind


@dataclass(frozen=True)
class Params:
    """Parameter counts. ``embedding`` holds token and position tables; a tied head adds nothing. ``ahead``: modules
    that predict tokens further ahead, in training alone. ``idle``: those of ``layers`` that a token does not go
    through, in experts that were not chosen for it."""

    layers: int
    norm: int
    embedding: int
    head: int
    ahead: int = 0
    idle: int = 0

    @property
    def total(self) -> int:
        return self.layers + self.norm + self.embedding + self.head + self.ahead

    @property
    def non_embedding(self) -> int:
        """Without embedding tables and without the head (Kaplan et al. 2020, section 2.1)."""
        return self.layers + self.norm + self.ahead

    @property
    def active(self) -> int:
        """Those that one token of a generation goes through: the total of a dense model."""
        return self.total - self.idle - self.ahead


class Layer(NamedTuple):
    """Of one layer: parameters, those that a token goes through on average, weights of its products with them by part,
    and the width of scores and of values over all heads."""

    params: int
    used: float
    projections: int
    mlp: float
    scores: int


def layer(model: Decoder, kind: Kind) -> Layer:
    (attention, mlp), d_model = kind, model.d_model
    matrices, others, scores = _attention(d_model, attention, attention.position or model.position)
    norms = (1 if model.residual == "parallel_shared" else 2) + (2 if model.norms == "sandwich" else 0)
    common = matrices + others + norms * _norm(model.norm, d_model)
    all_of_it, used, products = _feed_forward(d_model, mlp)
    return Layer(common + all_of_it, common + used, matrices, products, scores)


def params(model: Decoder) -> Params:
    d_model, layers = model.d_model, [layer(model, kind) for kind in model.kinds]
    positions = model.position.max_length if isinstance(model.position, Learned) else 0
    shared = _relative(model.position, model.attentions[0]) if not _per_layer(model.position) else 0
    ahead = 2 * d_model**2 + layer(model, model.period[-1]).params + 3 * _norm(model.norm, d_model)
    return Params(
        layers=sum(one.params for one in layers) + shared,
        norm=_norm(model.norm, d_model),
        embedding=(model.vocab_size + positions) * d_model,
        head=(model.vocab_size * (d_model + model.head_bias) if model.head == "untied" else 0)
        + (d_model + 1) * model.value_head,
        ahead=model.ahead * ahead,
        idle=round(sum(one.params - one.used for one in layers)),
    )


def _norm(norm: Norm, width: int) -> int:
    return width * (2 if norm.has_bias else 1)


def _per_layer(position: Position) -> bool:
    return isinstance(position, RelativeBias) and position.per_layer


def _relative(position: Position, attention: AttentionKind) -> int:
    """A table of relative biases."""
    return position.buckets * attention.num_heads if isinstance(position, RelativeBias) else 0


def _attention(d_model: int, attention: AttentionKind, position: Position) -> tuple[int, int, int]:
    """Weights of one layer's products, its other parameters, and the width of scores and values over all heads."""
    heads, width = attention.num_heads, attention.width(d_model)
    if isinstance(attention, LatentAttention):
        rank, queries = attention.kv_rank, attention.q_rank
        into = d_model * (rank + attention.rope_dim) + rank * heads * (attention.nope_dim + attention.v_dim)
        into += queries * (d_model + heads * width) if queries else d_model * heads * width
        norms = _norm(attention.norm, rank) + (_norm(attention.norm, queries) if queries else 0)
        return into + heads * attention.v_dim * d_model, norms, heads * (width + attention.v_dim)
    others = {"none": 0, "qkv": width * (heads + 2 * attention.kv_heads)}.get(attention.bias, 0)
    if attention.bias == "all":
        others = width * (heads + 2 * attention.kv_heads) + d_model
    if attention.qk_norm is not None:
        others += 2 * _norm(attention.qk_norm, width)
    others += heads if attention.sinks == "learned" else 0
    others += _relative(position, attention) if _per_layer(position) else 0
    scores = 2 * heads * width
    if isinstance(position, TransformerXL):
        others += d_model * heads * width + 2 * heads * width
        scores += heads * width
    return d_model * width * (2 * heads + 2 * attention.kv_heads), others, scores


def _feed_forward(d_model: int, mlp: Mlp | Moe) -> tuple[int, float, float]:
    """Parameters of one layer's feed-forward, how many of them a token goes through on average, and those of these that
    are in products."""
    weights, inner = d_model * mlp.d_ff * (3 if mlp.gated else 2), 2 if mlp.gated else 1
    if isinstance(mlp, Mlp):
        biases = inner * mlp.d_ff + d_model if mlp.bias else 0
        return weights + biases, weights + biases, weights
    common = d_model * mlp.num_experts if mlp.router.learned else 0
    if mlp.shared is not None:
        common += _feed_forward(d_model, mlp.shared)[0] + d_model * mlp.shared_gate
    used = common + mlp.router.per_token * weights
    return common + mlp.num_experts * weights, used, used


def experts(model: Decoder) -> int:
    """The most experts that a layer has; 0 for a dense model."""
    return max(mlp.num_experts if isinstance(mlp, Moe) else 0 for mlp in model.feed_forwards)


@dataclass(frozen=True)
class ForwardFlops:
    """Forward matrix-product FLOPs per token, by part; ``ahead``: of modules that predict tokens further ahead."""

    projections: float
    scores: float
    mlp: float
    head: float
    ahead: float = 0.0

    @property
    def total(self) -> float:
        return self.projections + self.scores + self.mlp + self.head + self.ahead


def forward_flops_per_token(model: Decoder, *, sequence_length: int) -> ForwardFlops:
    d_model, layers = model.d_model, [layer(model, kind) for kind in model.kinds]
    head, last = 2.0 * d_model * (model.vocab_size + model.value_head), layer(model, model.period[-1])
    ahead = 2.0 * (2 * d_model**2 + last.projections + last.mlp + sequence_length * last.scores) + head
    return ForwardFlops(
        projections=2.0 * sum(one.projections for one in layers),
        scores=2.0 * sequence_length * sum(one.scores for one in layers),
        mlp=2.0 * sum(one.mlp for one in layers),
        head=head,
        ahead=model.ahead * ahead,
    )


def training_flops_per_token(model: Decoder, *, sequence_length: int) -> float:
    """Forward and backward: three times the forward products."""
    return 3.0 * forward_flops_per_token(model, sequence_length=sequence_length).total
