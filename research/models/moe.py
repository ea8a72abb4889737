# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: a feed-forward layer whose tokens each go through a few of many experts.

The parts are in rooms of their own: ``routers`` choose, ``expert_parallel`` moves tokens between devices and
``dispatch`` on one, ``grouped_matmul`` multiplies.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from research.core.sharding import constrain
from research.core.types import Array, Metrics, Params, Term, UserError, WeightedSum
from research.models import expert_parallel, ops, ring_attention, sharded
from research.models.grouped_matmul import GroupedMatmul, alignment
from research.models.layers import PRODUCT, Build, param
from research.models.mlp import Activation, Mlp, activated, is_gated
from research.models.routers import Group, RouterKind, Routing, TopK, at_least_zero, capacity
from research.models.tokens import Tokens

Dispatch = Literal["sorted", "buffers"]


@dataclass(frozen=True)
class Moe:
    """``num_experts`` feed-forward layers of inner width d_ff, of which a router chooses for each token.

    shared_d_ff: inner width of an expert that every token goes through besides (Dai et al. 2024), 0 for none.
    shared_gate: what it gives is multiplied by the sigmoid of a product of the token's own (Qwen1.5-MoE, 2024).
    dispatch: "sorted" multiplies rows sorted by expert, without drops of its own; "buffers" gives each expert a
        buffer of the router's capacity in each group, and needs a router with one. The sum is the same; where the mesh
        splits sequences no device has a whole group, and rows are sorted whatever is asked for.
    balance: coefficient of the balance loss E sum_e f_e P_e of each layer, 1 at perfect balance (Fedus et al. 2021,
        eqs. 4 to 6). z_loss: that of the squared log normaliser of the router's logits (Zoph et al. 2022, eq. 5).
    """

    num_experts: int
    d_ff: int
    router: RouterKind = TopK()
    activation: Activation = "swiglu"
    shared_d_ff: int = 0
    dispatch: Dispatch = "sorted"
    balance: float = 0.01
    z_loss: float = 0.0
    implementation: GroupedMatmul = "auto"
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise UserError(f"A layer has {self.num_experts} experts: it needs at least 1.")
        if not isinstance(self.router, RouterKind):
            kinds = ", ".join(kind.__name__ for kind in get_args(RouterKind))
            raise UserError(f"router is {self.router!r}: give one of {kinds}.")
        for name, kinds in (("dispatch", Dispatch), ("implementation", GroupedMatmul), ("activation", Activation)):
            if getattr(self, name) not in get_args(kinds):
                raise UserError(f"{name} is {getattr(self, name)!r}: choose among {', '.join(get_args(kinds))}.")
        for name in ("shared_d_ff", "balance", "z_loss"):
            at_least_zero(name, getattr(self, name))
        for name in ("capacity_factor", "bias_rate"):
            at_least_zero(f"router.{name}", getattr(self.router, name))
        self.router.check(self.num_experts)
        if self.dispatch == "buffers" and not self.router.capacity_factor:
            raise UserError(
                "Buffers need a capacity: set router.capacity_factor above 0, or choose dispatch='sorted', which "
                "drops nothing."
            )

    @property
    def gated(self) -> bool:
        return is_gated(self.activation)

    @property
    def shared(self) -> Mlp | None:
        return Mlp(self.shared_d_ff, self.activation) if self.shared_d_ff else None

    def build(self, build: Build, *, name: str = "mlp") -> nn.Module:
        return _Moe(self, build, name=name)


class _Moe(nn.Module):
    config: Moe
    build: Build

    @nn.compact
    def __call__(self, x_BTD: Array, tokens: Tokens) -> tuple[Array, Params]:
        config, dtype = self.config, jnp.dtype(self.build.precision.compute)
        routing, found = self._route(x_BTD, tokens)
        size = 0
        if config.dispatch == "buffers":
            size = capacity(config.router, tokens=x_BTD.shape[1], num_experts=config.num_experts)
        layer = expert_parallel.Layer(
            num_experts=config.num_experts,
            sorted=self._sorted,
            buffered=self._buffered,
            capacity=size,
            by_token=config.router.by_token,
            align=alignment(self.build.platform, config.implementation),
            platform=self.build.platform,
            keep=self.build.keep,
        )
        weights = self._weights(dtype)
        y_BTD = expert_parallel.run(layer, x_BTD.astype(dtype), routing, weights, taken=self.build.taken)
        if config.shared is not None:
            shared_BTD = config.shared.build(self.build, name="shared")(x_BTD, tokens)[0]
            if config.shared_gate:
                gate = self.build.linear("shared_gate", (self.build.d_model,), (1,), ("embed", "router"))
                shared_BTD = shared_BTD * jax.nn.sigmoid(gate(x_BTD))
            y_BTD = y_BTD + shared_BTD
        return constrain(y_BTD, "batch", "residual_sequence", "act_embed"), found

    def _route(self, x_BTD: Array, tokens: Tokens) -> tuple[Routing, Params]:
        """Each row of the batch is a group. Logits and scores are float32 whatever the compute dtype."""
        config, experts = self.config, self.config.num_experts
        if tokens.length is not None and not config.router.by_token:
            raise UserError(
                f"A model with the router {type(config.router).__name__} cannot generate: its experts choose among all "
                "tokens of a row, later ones included. Train one whose tokens choose, such as TopK."
            )
        logits_BTE = jnp.zeros((*x_BTD.shape[:2], experts), jnp.float32)
        if config.router.learned:
            axes, init = ("embed", "router"), self.build.weight_init.matrix(self.build.d_model)
            w_DE = param(self, "router", init, (self.build.d_model, experts), axes, self.build.precision.params)
            given = x_BTD.astype(jnp.float32), [w_DE.astype(jnp.float32)], [axes]
            how = dict(platform=self.build.platform, taken=self.build.taken, precision="highest")
            (logits_BTE,) = sharded.linear(*given, **how)  # unasked, a TPU would multiply in bfloat16
        bias_E = None
        if config.router.bias_rate:
            bias_E = self.variable("buffers", "bias", jnp.zeros, (experts,), jnp.float32).value
        keys = None
        if tokens.key is not None:
            keys = jax.vmap(lambda row: jax.random.fold_in(tokens.key, row))(tokens.rows)
        given, order = (logits_BTE, tokens.segments > 0, tokens.ids), None
        by_order = config.router.capacity_factor or (config.router.draws and keys is not None)
        if by_order and tokens.length is None and ring_attention.applies(x_BTD.shape[1]):
            order = ring_attention.order(x_BTD.shape[1])  # who comes first is taken, and which draw is whose
            given = tuple(x[:, np.argsort(order)] for x in given)
        logits_BTE, real_BT, ids_BT = given

        def one(logits: Array, real: Array, ids: Array, key: Array | None) -> Routing:
            return config.router(Group(logits, real, ids, bias_E, key))

        routing = jax.vmap(one)(logits_BTE, real_BT, ids_BT, keys)
        found = statistics(routing, logits_BTE, real_BT)
        if order is not None:
            routing = expert_parallel.in_order(routing, order, by_token=config.router.by_token)
        return routing, found

    def _weights(self, dtype: Any) -> tuple[Array, ...]:
        """Gate (where there is one), up and down: [E, D, F] or [E, F, D]."""
        config, width = self.config, self.config.d_ff
        into = self.build.weight_init.matrix(self.build.d_model)
        out = self.build.weight_init.matrix(width, residual_layers=self.build.num_layers)
        shape, axes = (config.num_experts, self.build.d_model, width), expert_parallel.Into
        names = ("gate", "up") if config.gated else ("up",)
        found = [param(self, name, _each(into), shape, axes, self.build.precision.params) for name in names]
        shape, axes = (config.num_experts, width, self.build.d_model), expert_parallel.Out
        found.append(param(self, "down", _each(out), shape, axes, self.build.precision.params))
        return tuple(w.astype(dtype) for w in found)

    def _sorted(self, x_MD: Array, gate_M: Array, sizes_E: Array, weights: tuple[Array, ...]) -> Array:
        def product(x: Array, w: Array) -> Array:
            kind = dict(platform=self.build.platform, implementation=self.config.implementation)
            return checkpoint_name(ops.grouped_matmul(x, w, sizes_E, **kind), PRODUCT)

        *into, down = weights
        if self.build.platform == "cpu":  # as in ``ops.linear``: one product costs less there than two
            inner = jnp.split(product(x_MD, jnp.concatenate(into, axis=-1)), len(into), axis=-1)
        else:
            inner = [product(x_MD, w) for w in into]
        return product(self._weighed(inner, gate_M), down)

    def _buffered(self, x_GECD: Array, gate_GEC: Array, weights: tuple[Array, ...]) -> Array:
        *into, down = weights
        inner = [checkpoint_name(jnp.einsum("GECD,EDF->GECF", x_GECD, w), PRODUCT) for w in into]
        return checkpoint_name(jnp.einsum("GECF,EFD->GECD", self._weighed(inner, gate_GEC), down), PRODUCT)

    def _weighed(self, inner: list[Array], gate: Array) -> Array:
        """What the last product takes: inner [..., F] activated, times the router's gate [...]."""
        return activated(self.config.activation, inner) * gate.astype(inner[0].dtype)[..., None]


def _each(init: Any) -> Any:
    """The initialiser of a matrix for each of [E, ...]: its fan-in does not count the experts."""
    return lambda key, shape, dtype: jax.vmap(lambda k: init(k, shape[1:], dtype))(jax.random.split(key, shape[0]))


def statistics(routing: Routing, logits_BTE: Array, real_BT: Array) -> Params:
    """Sums over the tokens of one layer: they add up over microbatches and shards. Padding is not counted.

    load [E]: assignments kept. wanted: assignments asked for. probability [E], confidence, z: sums over real tokens
    of the router's probabilities, of the largest of them, and of the squared log normaliser of its logits.
    """
    experts = logits_BTE.shape[-1]
    real = real_BT.astype(jnp.float32)
    hits = (routing.expert[..., None] == jnp.arange(experts)[None, None, :]).astype(jnp.float32)
    return {
        "load": jnp.sum(hits * routing.kept[..., None], axis=(0, 1)),
        "wanted": jnp.sum(hits * routing.wanted[..., None], axis=(0, 1)),
        "probability": jnp.sum(routing.probabilities * real[..., None], axis=(0, 1)),
        "confidence": jnp.sum(jnp.max(routing.probabilities, axis=-1) * real),
        "z": jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real),
        "tokens": jnp.sum(real),
    }


def losses(config: Moe, found: Params) -> dict[str, Term]:
    """Auxiliary losses of layers with statistics [L, ...], summed over the layers.

    The balance loss is a product of two means, over one microbatch and all its shards: its weight is one.
    """
    terms = {}
    tokens_L = jnp.maximum(found["tokens"], 1.0)
    if config.balance and config.router.learned and config.router.by_token:  # experts that choose are even
        asked_LE = found["wanted"] / jnp.maximum(jnp.sum(found["wanted"], axis=-1, keepdims=True), 1.0)
        probability_LE = found["probability"] / tokens_L[:, None]
        value = config.num_experts * jnp.sum(jax.lax.stop_gradient(asked_LE) * probability_LE)
        terms["balance"] = Term(config.balance, WeightedSum(value, jnp.ones(())))
    if config.z_loss and config.router.learned:
        terms["router_z"] = Term(config.z_loss, WeightedSum(jnp.sum(found["z"]), found["tokens"][0]))
    return terms


def report(found: Params) -> Metrics:
    """How each layer's router does, [L]: load entropy over its largest, largest load over mean, dropped share of
    the assignments, mean of the largest probability."""
    load_LE = found["load"]
    total_L = jnp.maximum(jnp.sum(load_LE, axis=-1), 1.0)
    share_LE = load_LE / total_L[:, None]
    experts = load_LE.shape[-1]
    entropy_L = -jnp.sum(jnp.where(share_LE > 0, share_LE * jnp.log(jnp.maximum(share_LE, 1e-30)), 0.0), axis=-1)
    wanted_L = jnp.maximum(jnp.sum(found["wanted"], axis=-1), 1.0)
    return {
        "router/load_entropy": entropy_L / jnp.log(experts) if experts > 1 else jnp.ones_like(entropy_L),
        "router/max_load": jnp.max(share_LE, axis=-1) * experts,
        "router/dropped": 1.0 - jnp.sum(load_LE, axis=-1) / wanted_L,
        "router/confidence": found["confidence"] / jnp.maximum(found["tokens"], 1.0),
    }


def rebalanced(rate: float, bias_LE: Array, wanted_LE: Array) -> Array:
    """Loss-free balancing (Wang et al. 2024, algorithm 1): each bias moves by ``rate`` towards the mean load, and
    the biases of a layer stay centred. wanted: assignments asked for in the whole global batch; what a capacity then
    drops would hide how uneven they are."""
    moved = bias_LE + rate * jnp.sign(jnp.mean(wanted_LE, axis=-1, keepdims=True) - wanted_LE)
    return moved - jnp.mean(moved, axis=-1, keepdims=True)
