# SPDX-License-Identifier: Apache-2.0
"""Experts against dense decoders at equal training compute."""

from dataclasses import replace

from experiments import quickstart
from research.models.decoder import Decoder
from research.models.moe import Moe
from research.models.routers import TopK
from research.scaling import ladder
from research.train.experiment import Experiment

CHOSEN = 2
EXPERTS = (0, 8, 16)
WIDTHS = {2e11: (24, 32, 48), 6.3e11: (32, 48, 64), 2e12: (48, 64, 96)}


def model(d_model: int, *, experts: int) -> Decoder:
    dense = quickstart.model(d_model)
    if not experts:
        return dense
    return replace(dense, mlp=Moe(experts, dense.mlp.d_ff // CHOSEN, TopK(CHOSEN)))


def sweep(widths=WIDTHS, min_steps: int = 400) -> dict[str, Experiment]:
    found = {}
    for budget, sizes in widths.items():
        for experts in EXPERTS:
            label = f"e{experts}" if experts else "dense"
            models = {f"{label}-w{width}": model(width, experts=experts) for width in sizes}
            found |= ladder.isoflop(
                quickstart.base(), models=models, budgets=(budget,), adjust=quickstart.rate, min_steps=min_steps
            )
    return found
