# SPDX-License-Identifier: Apache-2.0
"""Routers: which tokens go to which experts, with what weight. Each is a frozen description with one pure
function, of the logits of one group of tokens.

A group is one row of the batch, whatever the mesh: capacity and expert choice are defined within it. (In generation
it is what one call is given of a row: a router with a capacity may then drop what it kept in training.) A router
returns assignments (token, expert, gate), so that a token may have any number of experts and an expert any
number of tokens. In this room T counts the tokens of a group, A its assignments, E experts.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from research.core.types import Array, UserError


class Group(NamedTuple):
    """What a router may look at: one group of tokens.

    logits [T, E] float32; real [T]: False for padding, which is neither routed nor counted; tokens [T]: ids;
    bias [E]: of the choice alone, never of the gates, or None; key: for random choices, or None where there are to
    be none (evaluation).
    """

    logits: Array
    real: Array
    tokens: Array
    bias: Array | None
    key: Array | None


class Routing(NamedTuple):
    """Assignments of one group: [A] token and expert, gate (float32, 0 where not taken), kept and wanted (booleans).

    wanted: asked for by a real token; kept: wanted, and not dropped for want of capacity. probabilities [T, E]: the
    router's, for the balance loss and for statistics.
    """

    token: Array
    expert: Array
    gate: Array
    kept: Array
    wanted: Array
    probabilities: Array


class Router(Protocol):
    """per_token: experts a token asks for on average, by which FLOPs are counted. capacity_factor: an expert takes at
    most ``capacity_factor * per_token * T / E`` tokens of a group, 0 for any number. bias_rate: step of loss-free
    balancing, 0 for none. by_token: assignments are k for each token, in order: all first choices, then all second
    ones, and so on. learned: it chooses by logits; else there is no router's matrix, its logits are zeros, and it has
    no losses. draws: it makes random choices where it is given a key."""

    capacity_factor: float
    bias_rate: float
    by_token: ClassVar[bool] = True
    learned: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    @property
    def per_token(self) -> float: ...

    def check(self, num_experts: int) -> None: ...

    def __call__(self, group: Group) -> Routing: ...


@dataclass(frozen=True)
class TopK(Router):
    """The k likeliest experts. renormalise: gates are a softmax over the chosen logits (Jiang et al. 2024, Mixtral,
    section 2.1); else the softmax over all experts is taken as it is (Muennighoff et al. 2024, OLMoE).

    groups, top_groups: experts lie in so many groups, and only those of the best ones may be chosen, a group's worth
    being its likeliest expert; scale multiplies the gates (DeepSeek-V2, 2024, sections 2.2.2 and D).
    """

    k: int = 2
    renormalise: bool = True
    capacity_factor: float = 0.0
    bias_rate: float = 0.0
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    @property
    def per_token(self) -> float:
        return self.k

    def check(self, num_experts: int) -> None:
        _check_k(self.k, num_experts)
        _check_groups(self.k, num_experts, self.groups, self.top_groups)
        if self.k == 1 and self.renormalise:
            raise UserError(
                "TopK(1) with renormalise=True gives every token the gate 1, from which a router learns nothing: set "
                "renormalise=False (Switch)."
            )

    def __call__(self, group: Group) -> Routing:
        probabilities = jax.nn.softmax(group.logits, axis=-1)
        selection = group.logits if group.bias is None else group.logits + group.bias[None, :]
        if self.top_groups < self.groups:
            selection = jnp.where(_in_best_groups(selection, self.groups, self.top_groups, best=1), selection, -jnp.inf)
        experts = _top(selection, self.k)
        gates = jnp.take_along_axis(probabilities, experts, axis=1)
        if self.renormalise:
            gates = gates / jnp.sum(gates, axis=1, keepdims=True)
        return limited(assigned(group, experts, self.scale * gates, probabilities), self)


def switch(capacity_factor: float = 1.25) -> TopK:
    """The likeliest expert alone, with its probability as the gate (Fedus et al. 2021, eq. 2); tokens beyond an
    expert's capacity are dropped."""
    return TopK(1, renormalise=False, capacity_factor=capacity_factor)


def glam(capacity_factor: float = 1.25) -> TopK:
    """The two likeliest experts up to a capacity, first choices before second ones (Du et al. 2021)."""
    return TopK(2, capacity_factor=capacity_factor)


@dataclass(frozen=True)
class Gshard(Router):
    """The two likeliest experts with gates normalised over the two, the second taken with probability
    min(1, 2 g2) (Lepikhin et al. 2020, algorithm 1), first choices before second ones. Without a key (evaluation)
    the second is taken always."""

    capacity_factor: float = 1.0
    bias_rate: ClassVar[float] = 0.0
    draws: ClassVar[bool] = True

    @property
    def per_token(self) -> float:
        return 2

    def check(self, num_experts: int) -> None:
        _check_k(2, num_experts)

    def __call__(self, group: Group) -> Routing:
        routing = TopK(2)(group)
        if group.key is not None:
            second_gate = routing.gate.reshape(2, -1)[1]
            second = jax.random.uniform(group.key, second_gate.shape) < 2 * second_gate
            wanted = routing.wanted & jnp.concatenate([jnp.ones_like(second), second])
            routing = routing._replace(wanted=wanted, kept=wanted, gate=jnp.where(wanted, routing.gate, 0.0))
        return limited(routing, self)


@dataclass(frozen=True)
class Sigmoid(Router):
    """DeepSeek-V3 (2024, eqs. 12 to 16): scores are sigmoids; the k highest of score plus bias are chosen; gates are
    the chosen scores without the bias, normalised (but for renormalise=False), times ``scale``.

    groups, top_groups: experts lie in so many groups, and only those of the best ones may be chosen, a group's
    worth being the sum of its two highest biased scores. bias_rate: after each optimizer step the bias of an
    expert moves by so much towards the mean load (Wang et al. 2024).
    """

    k: int = 8
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    capacity_factor: float = 0.0
    bias_rate: float = 0.001
    renormalise: bool = True

    @property
    def per_token(self) -> float:
        return self.k

    def check(self, num_experts: int) -> None:
        _check_k(self.k, num_experts)
        if self.k == 1:
            raise UserError(
                "Sigmoid(1) gives every token the same gate, from which a router learns nothing: raise k, or choose "
                "TopK(1, renormalise=False)."
            )
        _check_groups(self.k, num_experts, self.groups, self.top_groups)

    def __call__(self, group: Group) -> Routing:
        scores = jax.nn.sigmoid(group.logits)
        selection = scores if group.bias is None else scores + group.bias[None, :]
        if self.top_groups < self.groups:
            selection = jnp.where(_in_best_groups(selection, self.groups, self.top_groups, best=2), selection, -jnp.inf)
        experts = _top(selection, self.k)
        gates = jnp.take_along_axis(scores, experts, axis=1)
        if self.renormalise:
            gates = gates / (jnp.sum(gates, axis=1, keepdims=True) + 1e-20)
        gates = self.scale * gates
        probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        return limited(assigned(group, experts, gates, probabilities), self)


@dataclass(frozen=True)
class ExpertChoice(Router):
    """Each expert takes the ``capacity_factor * T / E`` tokens that like it most (Zhou et al. 2022, eq. 1 to 3).

    A token's experts depend on later tokens of its group: not for generation.
    """

    capacity_factor: float = 2.0
    bias_rate: ClassVar[float] = 0.0
    by_token: ClassVar[bool] = False

    @property
    def per_token(self) -> float:
        return self.capacity_factor

    def check(self, num_experts: int) -> None:
        if not 0 < self.capacity_factor <= num_experts:
            raise UserError(
                f"capacity_factor is {self.capacity_factor}: it must be above 0 and at most {num_experts}, the experts."
            )

    def __call__(self, group: Group) -> Routing:
        tokens, experts = group.logits.shape
        size = capacity(self, tokens=tokens, num_experts=experts)
        probabilities = jax.nn.softmax(group.logits, axis=-1)
        liking = jnp.where(group.real[None, :], probabilities.T, -1.0)
        gate, token = jax.lax.top_k(liking, size)
        wanted = gate.reshape(-1) >= 0
        return Routing(
            token=token.reshape(-1),
            expert=jnp.repeat(jnp.arange(experts), size),
            gate=jnp.where(wanted, gate.reshape(-1), 0.0),
            kept=wanted,
            wanted=wanted,
            probabilities=probabilities,
        )


@dataclass(frozen=True)
class Hash(Router):
    """A fixed expert for each token id, nothing learned (Roller et al. 2021, section 3: random hash)."""

    seed: int = 0
    capacity_factor: float = 0.0
    bias_rate: ClassVar[float] = 0.0
    learned: ClassVar[bool] = False

    @property
    def per_token(self) -> float:
        return 1

    def check(self, num_experts: int) -> None:
        _check_k(1, num_experts)

    def __call__(self, group: Group) -> Routing:
        x = group.tokens.astype(jnp.uint32) + jnp.uint32((self.seed * 0x9E3779B9) & 0xFFFFFFFF)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finaliser: every bit counts
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        experts = ((x ^ (x >> 16)) % group.logits.shape[1]).astype(jnp.int32)[:, None]
        probabilities = jax.nn.one_hot(experts[:, 0], group.logits.shape[1])
        return limited(assigned(group, experts, jnp.ones(experts.shape), probabilities), self)


RouterKind = TopK | Gshard | Sigmoid | ExpertChoice | Hash


def assigned(group: Group, experts: Array, gates: Array, probabilities: Array) -> Routing:
    """Assignments from each token's choices [T, k]: all first choices, then all second ones, and so on."""
    tokens, k = experts.shape
    wanted = jnp.tile(group.real, k)
    return Routing(
        token=jnp.tile(jnp.arange(tokens), k),
        expert=experts.T.reshape(-1),
        gate=jnp.where(wanted, gates.T.reshape(-1), 0.0),
        kept=wanted,
        wanted=wanted,
        probabilities=probabilities,
    )


def capacity(router: Router, *, tokens: int, num_experts: int) -> int:
    """Tokens that one expert takes of a group of ``tokens``."""
    asked = router.per_token if isinstance(router, ExpertChoice) else router.capacity_factor * router.per_token
    return min(tokens, math.ceil(asked * tokens / num_experts))


def limited(routing: Routing, router: Router) -> Routing:
    """Drops what goes beyond an expert's capacity, in the order of the assignments."""
    if not router.capacity_factor:
        return routing
    tokens, experts = routing.probabilities.shape
    size = capacity(router, tokens=tokens, num_experts=experts)
    kept = routing.wanted & (rank(routing.expert, routing.wanted, num_experts=experts) < size)
    return routing._replace(kept=kept, gate=jnp.where(kept, routing.gate, 0.0))


def rank(expert: Array, counted: Array, *, num_experts: int) -> Array:
    """[A]: how many of the assignments before it that are ``counted`` went to the same expert."""
    hits = (expert[:, None] == jnp.arange(num_experts)[None, :]) & counted[:, None]
    return jnp.take_along_axis(jnp.cumsum(hits, axis=0), expert[:, None], axis=1)[:, 0] - counted


def _top(x: Array, k: int) -> Array:
    """The places of the k largest of the last axis, largest first; no gradient."""
    return jax.lax.top_k(jax.lax.stop_gradient(x), k)[1]


def _in_best_groups(selection: Array, groups: int, top_groups: int, *, best: int) -> Array:
    """[T, E]: whether an expert lies in one of the ``top_groups`` whose ``best`` highest sum to most."""
    by_group = selection.reshape(selection.shape[0], groups, -1)
    worth = jnp.sum(jax.lax.top_k(by_group, min(best, by_group.shape[2]))[0], axis=-1)
    allowed = jnp.any(_top(worth, top_groups)[:, :, None] == jnp.arange(groups)[None, None, :], axis=1)
    return jnp.repeat(allowed, by_group.shape[2], axis=1)


def at_least_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} is {value}: it must be a finite number of at least 0.")


def _check_k(k: int, num_experts: int) -> None:
    if not 1 <= k <= num_experts:
        raise UserError(f"A router cannot choose {k} of {num_experts} experts: choose between 1 and {num_experts}.")


def _check_groups(k: int, num_experts: int, groups: int, top_groups: int) -> None:
    if groups < 1 or num_experts % groups or not 1 <= top_groups <= groups:
        raise UserError(
            f"{num_experts} experts in {groups} groups, {top_groups} of them chosen: groups must divide the experts, "
            "and top_groups lie between 1 and groups."
        )
    if k > top_groups * (num_experts // groups):
        raise UserError(
            f"{top_groups} groups of {num_experts // groups} experts hold fewer than k={k}: raise top_groups or "
            "lower k."
        )
