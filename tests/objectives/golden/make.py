# SPDX-License-Identifier: Apache-2.0
"""Goldens of TRL: its GRPO losses, and their gradients, for given log-probabilities, masks and advantages.

    python -m tests.objectives.golden.make        # writes grpo.npz here

Run it from the root of the repository with a python that has trl, transformers and torch (CPU). The golden holds the
inputs [rows, length]: log_probs, old, reference, sampler, entropy, mask; advantages [rows]; and for each case
``CASE/loss`` and ``CASE/gradient`` [rows, length], that of the loss with respect to log_probs; ``versions``.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
import trl
from trl.trainer.grpo_trainer import GRPOTrainer

from tests.objectives.golden.cases import CAP, LENGTH, ROWS, TRL


def inputs() -> dict[str, np.ndarray]:
    """Responses of several lengths, one of them empty; ratios far enough from 1 that every bound is met."""
    rng = np.random.default_rng(7)
    shape = (ROWS, LENGTH)
    log_probs = -rng.gamma(1.0, 1.0, shape)
    lengths = np.array([LENGTH, 3, 5, 1, 0, LENGTH])
    drawn = dict(
        log_probs=log_probs,
        old=log_probs + rng.normal(0, 0.4, shape),
        reference=log_probs + rng.normal(0, 0.5, shape),
        entropy=rng.gamma(2.0, 0.5, shape),
        mask=np.arange(LENGTH)[None, :] < lengths[:, None],
        advantages=rng.normal(0, 1, ROWS),
    )
    drawn["sampler"] = drawn["old"] + rng.normal(0, 0.6, shape)
    return {name: x.astype(np.float32) for name, x in drawn.items()}


def trainer(settings: dict[str, Any], given: dict[str, torch.Tensor]) -> SimpleNamespace:
    """What ``_compute_loss`` asks of its trainer: one process, one batch a step, no accumulation."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x
    )
    epsilon = settings.get("epsilon", 0.2)
    return SimpleNamespace(
        loss_type=settings["loss_type"],
        beta=settings.get("beta", 0.0),
        epsilon_low=epsilon,
        epsilon_high=settings.get("epsilon_high", epsilon),
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        use_vllm=settings.get("corrected", False),
        vllm_importance_sampling_correction=True,
        max_completion_length=LENGTH,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=settings.get("delta"), use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (given["log_probs"], given["entropy"], None),
    )


def main() -> None:
    arrays = inputs()
    out: dict[str, Any] = dict(arrays)
    for name, settings in TRL.items():
        given = {key: torch.tensor(x) for key, x in arrays.items()}
        given["log_probs"].requires_grad_(True)
        batch = dict(
            prompt_ids=torch.zeros(ROWS, 1, dtype=torch.long),
            prompt_mask=torch.ones(ROWS, 1, dtype=torch.long),
            completion_ids=torch.zeros(ROWS, LENGTH, dtype=torch.long),
            completion_mask=given["mask"],
            advantages=given["advantages"],
            old_per_token_logps=given["old"],
            ref_per_token_logps=given["reference"],
            importance_sampling_ratio=torch.clamp(torch.exp(given["old"] - given["sampler"]), max=CAP),
            num_items_in_batch=given["mask"].sum(),
        )
        loss = GRPOTrainer._compute_loss(trainer(settings, given), None, batch)
        loss.backward()
        out[f"{name}/loss"] = loss.detach().numpy()
        out[f"{name}/gradient"] = given["log_probs"].grad.numpy()
    modules = dict(trl=trl, torch=torch, transformers=transformers, numpy=np)
    versions = {name: module.__version__ for name, module in modules.items()} | {"python": sys.version.split()[0]}
    np.savez_compressed(Path(__file__).parent / "grpo.npz", **out, versions=json.dumps(versions))


if __name__ == "__main__":
    main()
