# SPDX-License-Identifier: Apache-2.0
"""What models say of responses that are there: the policy's own log-probabilities and values, the reference's
log-probabilities, without a gradient."""

import functools
from collections.abc import Mapping

import jax

from research.core.sharding import constrain
from research.core.types import Array, Batch
from research.models.bound import Bound
from research.objectives.grpo import response_log_probs, response_part

CHUNK = 512


@functools.partial(jax.jit, static_argnums=3)
def score(policy: Bound, reference: Bound | None, batch: Batch, values: bool) -> Mapping[str, Array]:
    """For each token of the responses [B, C], in float32, whole on every host: old_log_probs; reference_log_probs where
    there is a reference; and with ``values`` what the policy's value head expects before each."""
    output = policy.forward(batch)
    found = {"old_log_probs": response_log_probs(policy, output, batch, CHUNK).log_probs}
    if values:
        found["values"] = response_part(policy.values(output.hidden), batch)
    if reference is not None:
        found["reference_log_probs"] = response_log_probs(reference, reference.forward(batch), batch, CHUNK).log_probs
    return {name: constrain(x, None, None) for name, x in found.items()}
