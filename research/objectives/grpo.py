# SPDX-License-Identifier: Apache-2.0
"""Policy gradients with verifiable rewards: GRPO (Shao et al. 2024) and its kin as orthogonal choices.

What tells them apart is the ratio, how it is clipped, what sums are divided by, and the penalty for leaving a
reference; the advantage and what is sampled are the source's (``research.rl``). A batch has rows of a prompt, padded on
its left, and a response of at most C tokens: tokens, positions, segment_ids [B, T], T = prompt + C; and of the response
alone, [B, C]: targets; weights (1 where the sampler drew the token and it is to be learnt from); advantages;
sampler_log_probs; and where there are such, old_log_probs (of the policy before the first inner epoch) and
reference_log_probs; temperature, the sampler's.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from research.core.types import Array, Batch, Loss, Output, Policy, Term, UserError, WeightedSum
from research.objectives.log_probs import TokenLogProbs, token_log_probs

REFERENCE = "reference"


@dataclass(frozen=True)
class Clip:
    """What keeps a step near the policy that was sampled from.

    form: "minimum" of the objective with the ratio and with it clipped to [1 - low, 1 + high] (Schulman et al. 2017,
        eq. 7; high above low is DAPO's clip-higher, Yu et al. 2025, section 3.1); "weight" lets the clipped ratio,
        without a gradient, weigh the log-probability (CISPO: MiniMax-M1 2025, eq. 4 and 5; low=1 leaves it unbounded
        below); "none" takes the ratio as it is.
    dual: where the advantage is negative, the ratio counts as at most this (Ye et al. 2020, eq. 5); 0: no such bound.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float = 0.0
    form: Literal["minimum", "weight", "none"] = "minimum"

    def __post_init__(self) -> None:
        if not (0 <= self.low <= 1 and self.high >= 0) or (self.dual and self.dual <= 1 + self.high):
            raise UserError(
                "Clip needs low from 0 to 1, high of at least 0 and dual above 1 + high (or 0: none); given "
                f"{self.low}, {self.high} and {self.dual}."
            )
        if self.dual and self.form != "minimum":
            raise UserError(f"Clip's dual bound goes with form='minimum'; given {self.form!r}: set dual to 0.")


@dataclass(frozen=True)
class Grpo:
    """The loss of a policy on responses with advantages.

    ratio: of each "token", or of the whole "sequence" by the mean of its log-ratios (GSPO: Zheng et al. 2025, eq. 7).
    normaliser: each "response" is averaged over its tokens, then responses are (GRPO: Shao et al. 2024, eq. 3); all
        "tokens" of the batch count alike (DAPO, eq. 8); or each response is divided by a "constant" (Dr. GRPO: Liu et
        al. 2025, section 3.2). Responses and tokens are those of the whole optimizer batch, over shards and
        microbatches.
    constant: for that; the most tokens of a response is usual. 0: C.
    beta, kl: the penalty for leaving the reference, in the loss: beta times an estimate of KL(policy, reference) for
        each token (Schulman 2020): with d = log(reference / policy), k1 = -d, whose expected gradient as a loss is zero
        (it belongs into the reward), k2 = d^2 / 2, k3 = exp(d) - d - 1. The reference is the frozen model "reference".
    importance_cap: old / sampler, at most this, weighs each token: for a sampler that is not the policy of the first
        inner epoch (Yao et al. 2025, truncated importance sampling); 0: no such weight. It needs old_log_probs.
    entropy: of the policy, rewarded by so much.
    Metrics: sampler_gap is |trainer - sampler| of log-probabilities, of the policy before the first epoch where its own
    are there; approximate_kl is how far the policy has moved since, KL(old, policy).
    chunk: tokens that the head takes at a time.
    """

    ratio: Literal["token", "sequence"] = "token"
    clip: Clip = field(default_factory=Clip)
    normaliser: Literal["response", "tokens", "constant"] = "response"
    constant: float = 0.0
    beta: float = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    importance_cap: float = 0.0
    entropy: float = 0.0
    chunk: int = 512

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("constant", "beta", "importance_cap", "entropy", "chunk")}
        if not all(value >= 0 for value in given.values()):
            told = ", ".join(f"{name} {value}" for name, value in given.items())
            raise UserError(f"Grpo's settings must be at least 0; given {told}.")

    def check(self, experiment: Any) -> None:
        """Raises UserError where the experiment's source or frozen models lack what the loss takes."""
        source, shapes = experiment.source, experiment.source.batch_shapes()
        if "advantages" not in shapes:
            raise UserError(
                f"Grpo learns from responses with advantages, and {type(source).__name__} gives none: set source to "
                "Rollouts(...), or objective to NextToken()."
            )
        if self.importance_cap:
            _old(shapes)
        if self.beta:
            self._check_reference({**experiment.frozen, **shapes})

    def __call__(self, policy: Policy, frozen: Mapping[str, Policy], batch: Batch, key: Array | None) -> Loss:
        output = policy.forward(batch, key=key)
        return self.loss(output, response_log_probs(policy, output, batch, self.chunk), frozen, batch)

    def loss(self, output: Output, found: TokenLogProbs, frozen: Mapping[str, Policy], batch: Batch) -> Loss:
        """Given the policy's log-probabilities of the response."""
        mask_BC = batch["weights"].astype(jnp.float32)
        log_probs_BC, advantages_BC = found.log_probs, batch["advantages"]
        old_BC = batch.get("old_log_probs", batch["sampler_log_probs"])
        moved_BC = log_ratio_BC = jnp.where(mask_BC > 0, log_probs_BC - old_BC, 0.0)
        if self.ratio == "sequence":
            lengths_B1 = jnp.maximum(jnp.sum(mask_BC, axis=1, keepdims=True), 1.0)
            log_ratio_BC = jnp.broadcast_to(jnp.sum(log_ratio_BC, axis=1, keepdims=True) / lengths_B1, mask_BC.shape)
        ratio_BC = jnp.exp(log_ratio_BC)
        objective_BC, clipped_BC = _surrogate(self.clip, ratio_BC, advantages_BC, log_probs_BC)
        if self.importance_cap:
            off_BC = jnp.exp(jnp.where(mask_BC > 0, _old(batch) - batch["sampler_log_probs"], 0.0))
            objective_BC *= jnp.minimum(off_BC, self.importance_cap)
        total = jnp.sum(mask_BC)
        terms = {"policy": Term(-1.0, self._normalised(objective_BC, mask_BC)), **output.aux}
        gap_BC = jnp.abs(batch.get("old_log_probs", log_probs_BC) - batch["sampler_log_probs"])
        metrics = {
            "entropy": WeightedSum(jnp.sum(found.entropy * mask_BC), total),
            "clipped": WeightedSum(jnp.sum(clipped_BC * mask_BC), total),
            "sampler_gap": WeightedSum(jnp.sum(gap_BC * mask_BC), total),
            "approximate_kl": WeightedSum(jnp.sum(_k3(moved_BC) * mask_BC), total),
        }
        if self.beta:
            estimate_BC = estimated_kl(self.kl, log_probs_BC, self._reference(frozen, batch))
            terms["kl"] = Term(self.beta, self._normalised(estimate_BC, mask_BC))
            metrics["kl"] = WeightedSum(jnp.sum(estimate_BC * mask_BC), total)
        if self.entropy:
            terms["entropy_bonus"] = Term(-self.entropy, self._normalised(found.entropy, mask_BC))
        peaks = {
            "ratio_max": jnp.max(jnp.where((mask_BC > 0) | (total == 0), ratio_BC, 0.0)),
            "ratio_min": jnp.min(jnp.where((mask_BC > 0) | (total == 0), ratio_BC, jnp.inf)),
            "sampler_gap_max": jnp.max(gap_BC * mask_BC),
        }
        peaks = jax.tree.map(jax.lax.stop_gradient, peaks)
        return Loss(terms=terms, metrics=metrics, stats=output.stats, peaks=peaks)

    def _normalised(self, x_BC: Array, mask_BC: Array) -> WeightedSum:
        """The sum and what it is divided by, which depends on the masks alone."""
        masked_BC = x_BC * mask_BC
        if self.normaliser == "tokens":
            return WeightedSum(jnp.sum(masked_BC), jnp.sum(mask_BC))
        responses = jnp.asarray(mask_BC.shape[0], jnp.float32)
        if self.normaliser == "constant":
            return WeightedSum(jnp.sum(masked_BC), responses * (self.constant or mask_BC.shape[1]))
        lengths_B = jnp.maximum(jnp.sum(mask_BC, axis=1), 1.0)
        return WeightedSum(jnp.sum(jnp.sum(masked_BC, axis=1) / lengths_B), responses)

    def _check_reference(self, given: Container[str]) -> None:
        if REFERENCE not in given and "reference_log_probs" not in given:
            raise UserError(
                f"beta is {self.beta} and there is no frozen model {REFERENCE!r}: give the experiment "
                f"frozen={{'{REFERENCE}': Init(...)}}, or beta=0."
            )

    def _reference(self, frozen: Mapping[str, Policy], batch: Batch) -> Array:
        if "reference_log_probs" in batch:
            return batch["reference_log_probs"]
        self._check_reference(frozen)
        reference = frozen[REFERENCE]
        return jax.lax.stop_gradient(
            response_log_probs(reference, reference.forward(batch), batch, self.chunk).log_probs
        )


def estimated_kl(kind: Literal["k1", "k2", "k3"], log_probs: Array, reference: Array) -> Array:
    """Of each token, an estimate of KL(policy, reference) from a draw of the policy (Schulman 2020; see ``Grpo``)."""
    d = reference - log_probs
    return {"k1": lambda: -d, "k2": lambda: jnp.square(d) / 2, "k3": lambda: _k3(d)}[kind]()


def response_log_probs(policy: Policy, output: Output, batch: Batch, chunk: int) -> TokenLogProbs:
    """Of the response's tokens [B, C], which the hidden states of the token before each predict: no other reaches the
    head."""
    hidden_BCD = response_part(output.hidden, batch)
    return token_log_probs(policy.head(), hidden_BCD, batch["targets"], batch["temperature"], chunk=chunk)


def response_part(x_BT: Array, batch: Batch) -> Array:
    """What stands at the tokens before those of the response: [B, T, ...] -> [B, C, ...]."""
    length = batch["targets"].shape[1]
    return x_BT[:, -length - 1 : -1]


def _surrogate(clip: Clip, ratio: Array, advantages: Array, log_probs: Array) -> tuple[Array, Array]:
    """The objective of each token, and where clipping took its gradient away or, as a weight, was felt."""
    kept = jnp.clip(ratio, 1 - clip.low, 1 + clip.high)
    if clip.form == "none":
        return ratio * advantages, jnp.zeros_like(ratio)
    if clip.form == "weight":
        return jax.lax.stop_gradient(kept) * advantages * log_probs, (kept != ratio).astype(jnp.float32)
    bounded = jnp.where(advantages < 0, jnp.minimum(ratio, clip.dual), ratio) if clip.dual else ratio
    plain, clipped = bounded * advantages, kept * advantages
    lost = (clipped < plain) | (bounded < ratio)
    return jnp.minimum(plain, clipped), lost.astype(jnp.float32)


def _old(batch: Mapping[str, Any]) -> Any:
    if "old_log_probs" not in batch:
        raise UserError(
            "importance_cap needs the policy's log-probabilities beside the sampler's: set rescore=True on the source."
        )
    return batch["old_log_probs"]


def _k3(d: Array) -> Array:
    """exp(d) - d - 1, without loss of digits near 0."""
    return jnp.expm1(d) - d
