# SPDX-License-Identifier: Apache-2.0
"""The residual stack: one pre-norm block, scanned over layers, with a choice of what to recompute."""

from typing import Any, Literal

import flax.linen as nn
import jax

from research.core.sharding import constrain
from research.core.types import Array, Precision
from research.models.attention import Attention, Tokens
from research.models.cache import LayerCache
from research.models.layers import Norm, WeightInit
from research.models.mlp import Mlp

Remat = Literal["none", "full", "save_matmuls", "save_weight_matmuls"]
POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_matmuls": jax.checkpoint_policies.dots_saveable,
    "save_weight_matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Xiong et al. 2020, pre-norm)."""

    attention: Attention
    mlp: Mlp
    norm: Norm
    d_model: int
    num_layers: int
    weight_init: WeightInit
    precision: Precision
    platform: str

    @nn.compact
    def __call__(self, x_BTD: Array, cache: LayerCache | None, tokens: Tokens) -> tuple[Array, LayerCache | None]:
        parts = (self.d_model, self.num_layers, self.weight_init, self.precision, self.platform)

        def norm(name: str) -> nn.Module:
            return self.norm.build(self.d_model, self.precision, name=name)

        y_BTD, cache = self.attention.build(*parts)(norm("attention_norm")(x_BTD), tokens, cache)
        x_BTD = constrain(x_BTD + y_BTD, "batch", "sequence", "act_embed")
        y_BTD = self.mlp.build(*parts)(norm("mlp_norm")(x_BTD))
        return constrain(x_BTD + y_BTD, "batch", "sequence", "act_embed"), cache


def stack(*, layers: Literal["scanned", "unrolled"], remat: Remat, num_layers: int) -> Any:
    """``Block`` repeated: parameters [L, ...] under one name whether scanned or unrolled.

    Called with (x [B, T, D], layer caches [L, ...] or None, tokens) -> (x, caches).
    """
    block = Block if remat == "none" else nn.remat(Block, policy=POLICIES[remat], prevent_cse=layers == "unrolled")
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=num_layers,
        unroll=num_layers if layers == "unrolled" else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
