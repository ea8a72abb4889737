# SPDX-License-Identifier: Apache-2.0
"""A first study: how the loss of small decoders falls with parameters and tokens.

Question:  Which model, trained on how many tokens, does the law of these runs recommend for ten times the
           largest budget? (Hoffmann et al. 2022, approaches 2 and 3, on the Python standard library's source.)
Command:   lab sweep experiments/quickstart.py
Hardware:  two CPU cores, five minutes.
Expect:    on the text with the content hash b5d113dbea4700018f5ca73d (Python 3.11.7, 12,118,641 bytes): loss 2.341 nats
           per token, 1.845 bits per byte for c1.3e12-n160k; L = 1.41 + 65.2 / params^.400 + 173 / tokens^.423;
           the held-out runs of the largest budget predicted within 1.2%. Other Pythons have other text, and
           other processors round differently: single losses move by half a percent.
"""

from dataclasses import replace
from pathlib import Path

from research.data import sources
from research.data.pipeline import TextSource
from research.data.tokenizers import SentencePiece
from research.evals.validation import Validation
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.objectives.next_token import NextToken
from research.scaling import ladder
from research.scaling.table import Table
from research.train.experiment import AdamW, CheckpointPolicy, Experiment, Flops
from research.train.optimizers import Schedule, Share

CORPUS = sources.Stdlib()  # your own: sources.TextFolder("path/to/folder"), sources.Jsonl("file.jsonl")
TOKENIZER = SentencePiece(vocab_size=512)
BUDGETS = ladder.geometric(8e10, last=1.28e12, count=5)
WIDTHS = (16, 24, 32, 40, 48, 64, 80)


def model(d_model: int) -> Decoder:
    """A two-layer decoder with heads of width 8."""
    return Decoder(
        vocab_size=TOKENIZER.vocab_size,
        d_model=d_model,
        num_layers=2,
        attention=Attention(num_heads=d_model // 8),
        mlp=Mlp(d_ff=8 * round(d_model / 3)),
        layers="unrolled",
    )


def base() -> Experiment:
    """What all runs share; the ladder sets model and length."""
    source = TextSource(corpus=CORPUS, tokenizer=TOKENIZER, batch_size=16, sequence_length=32)
    validation = source.validation(num_batches=8, batch_size=256)
    return Experiment(
        name="base",
        model=model(WIDTHS[0]),
        objective=NextToken(),
        source=source,
        optimizer=AdamW(schedule=Schedule("cosine", warmup=Share(0.1))),
        length=Flops(BUDGETS[0]),
        evals=(Validation(validation, NextToken()),),
        checkpoint=CheckpointPolicy(every=500),
    )


def adjust(experiment: Experiment) -> Experiment:
    """The learning rate falls with the square root of the width."""
    peak = 0.016 * (32 / experiment.model.d_model) ** 0.5
    return replace(experiment, optimizer=replace(experiment.optimizer, peak=peak))


def sweep() -> dict[str, Experiment]:
    models = [model(width) for width in WIDTHS]
    return ladder.isoflop(
        base(), models=models, budgets=BUDGETS, tokens_per_param=(4.2, 50), adjust=adjust, min_steps=400
    )


def smallest() -> dict[str, Experiment]:
    """The same study in under a minute: it shows that all of it works, not what the law is."""
    models = [model(width) for width in (8, 12, 16)]
    return ladder.isoflop(base(), models=models, budgets=(6e9, 1.2e10, 2.4e10), adjust=adjust, min_steps=40)


def analyze(runs: Table, out: Path) -> None:
    from research.scaling.report import training_curves, write_report  # here: training needs no drawing

    title = f"Quickstart: small decoders on {type(CORPUS).__name__}"
    conclusion = write_report(runs, out, title=title, curves=training_curves(runs, out))
    print("\n".join(conclusion.sentences))
