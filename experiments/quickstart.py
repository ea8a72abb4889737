# SPDX-License-Identifier: Apache-2.0
"""A first study.

Question: how does the loss of a small decoder fall with parameters and tokens, and which model does that
    recommend for ten times the compute? (Hoffmann et al. 2022, approaches 2 and 3.)
Command:  lab sweep experiments/quickstart.py
"""

from dataclasses import replace
from pathlib import Path

from research.data.pipeline import TextSource
from research.data.sources.stdlib import Stdlib
from research.data.tokenizers import SentencePiece
from research.evals.validation import Validation
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.objectives.next_token import NextToken
from research.scaling import ladder
from research.scaling.table import Table
from research.train.experiment import AdamW, Experiment, Tokens
from research.train.optimizers import Schedule, Share

CORPUS = Stdlib()  # your own text: TextFolder("path/to/folder") or Jsonl("file.jsonl")
TOKENIZER = SentencePiece(kind="bpe", vocab_size=512)
BUDGETS = ladder.geometric(6e10, last=9.6e11, count=5)


def model(d_model: int, num_layers: int) -> Decoder:
    return Decoder(
        vocab_size=TOKENIZER.vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        attention=Attention(num_heads=d_model // 16),
        mlp=Mlp(d_ff=8 * round(d_model / 3)),
        head="tied",
    )


MODELS = [
    model(16, 2),
    model(24 * 0 + 32, 1),
    model(32, 2),
    model(48, 2),
    model(64, 2),
    model(64, 3),
    model(96, 3),
    model(128, 3),
]


def base() -> Experiment:
    source = TextSource(corpus=CORPUS, tokenizer=TOKENIZER, batch_size=16, sequence_length=128)
    return Experiment(
        name="base",
        model=MODELS[0],
        objective=NextToken(),
        source=source,
        optimizer=AdamW(schedule=Schedule(warmup=Share(0.1))),
        length=Tokens(1e6),
        evals=(Validation(source.validation(num_batches=4, batch_size=64), NextToken(), num_batches=4),),
    )


def settings(experiment: Experiment) -> Experiment:
    """Learning rate falls with width (Yang et al. 2021: as 1 / width for matrices)."""
    return replace(
        experiment,
        optimizer=replace(experiment.optimizer, peak=0.016 * (32 / experiment.model.d_model) ** 0.5),
    )


def sweep() -> dict[str, Experiment]:
    return ladder.isoflop(
        base(), models=MODELS, budgets=BUDGETS, tokens_per_param=(4, 150), min_steps=50, adjust=settings
    )


def analyze(runs: Table, out: Path) -> None:
    from research.scaling import report

    report.write_report(runs, out=out)
