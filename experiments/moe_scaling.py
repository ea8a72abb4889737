# SPDX-License-Identifier: Apache-2.0
"""Experts against dense decoders: the loss for the same training compute, on the Python standard library's source.

Question:  How large a dense model is a model with 8 or 16 experts worth, at equal active training FLOPs? (Effective
           parameter count; Clark et al. 2022.) A token goes through two experts of half the dense inner width
           each: top-2 as in Lepikhin et al. 2020 and Jiang et al. 2024, half the width so that a token costs what
           it costs in the dense model, but for the router (granularity 2; Krajewski et al. 2024). Dropless, balance
           loss 0.01; everything else as the quickstart has it, whose learning rates were found for dense models.
Command:   lab sweep experiments/moe_scaling.py
Hardware:  two CPU cores, 25 minutes.
Expect:    on the text with the content hash b5d113dbea4700018f5ca73d (Python 3.11.7, 12,118,641 bytes) at 2e12 FLOPs:
           loss 2.280 nats per token for the best dense model, 2.194 with 8 experts, 2.167 with 16; worth 2.1 and 2.7
           times their active parameters (1.4 and 1.7 at 2e11 FLOPs). Single losses move by half a percent.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from experiments import quickstart
from research.models.decoder import Decoder
from research.models.moe import Moe
from research.models.routers import TopK
from research.scaling import ladder
from research.scaling.table import Table
from research.train.experiment import Experiment

KINDS = (0, 8, 16)  # experts of a layer
CHOSEN = 2
WIDTHS = {2e11: (24, 32, 48), 6.3e11: (32, 48, 64), 2e12: (48, 64, 96)}  # around the optimum of each budget (FLOPs)
DENSE = {2e11: (16, 64), 6.3e11: (24, 96), 2e12: (32, 128)}  # besides: a law of three sizes a budget is a loose one


def model(d_model: int, *, experts: int) -> Decoder:
    """The quickstart's decoder, or the same with experts of half its inner width, two of them for each token."""
    dense = quickstart.model(d_model)
    return replace(dense, mlp=Moe(experts, dense.mlp.d_ff // CHOSEN, TopK(CHOSEN))) if experts else dense


Widths = Mapping[float, tuple[int, ...]]


def study(widths: Widths, *, dense: Widths, min_steps: int) -> dict[str, Experiment]:
    """Every kind at every width of every budget, and dense models of some more; settings as the quickstart has them."""
    found = {}
    for budget, sizes in widths.items():
        models = {f"{f'e{n}' if n else 'dense'}-w{width}": model(width, experts=n) for n in KINDS for width in sizes}
        models |= {f"dense-w{width}": model(width, experts=0) for width in dense.get(budget, ())}
        adjust, base = quickstart.adjust, quickstart.base()
        found |= ladder.isoflop(base, models=models, budgets=(budget,), adjust=adjust, min_steps=min_steps)
    return found


def sweep() -> dict[str, Experiment]:
    return study(WIDTHS, dense=DENSE, min_steps=400)


def smallest() -> dict[str, Experiment]:
    """The same study in a minute or two: it shows that all of it works, not what experts are worth."""
    return study({6e9: (8, 12, 16), 1.2e10: (8, 12, 16)}, dense={}, min_steps=40)


def analyze(runs: Table, out: Path) -> None:
    from research.scaling.effective_report import write_effective  # here: training needs no drawing

    found = write_effective(runs, out, title=f"Experts against dense decoders on {type(quickstart.CORPUS).__name__}")
    print("\n".join(found.sentences))
