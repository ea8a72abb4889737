# SPDX-License-Identifier: Apache-2.0
"""The smallest real experiment, shared by tests: a two-layer decoder on text of known entropy."""

from dataclasses import replace
from typing import Any

import numpy as np

from research.data.pipeline import TextSource
from research.data.sources import Synthetic
from research.data.tokenizers import Bytes
from research.evals.validation import Validation
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.objectives.next_token import NextToken
from research.train.experiment import AdamW, CheckpointPolicy, Experiment, Steps

MODEL = Decoder(
    vocab_size=264, d_model=32, num_layers=2, attention=Attention(num_heads=4, num_kv_heads=2), mlp=Mlp(d_ff=64)
)  # fmt: skip


def experiment(steps: int = 20, **changes: Any) -> Experiment:
    source = TextSource(corpus=Synthetic(num_symbols=20_000), tokenizer=Bytes(), batch_size=8, sequence_length=64)
    tiny = Experiment(
        name="tiny",
        model=MODEL,
        objective=NextToken(),
        source=source,
        optimizer=AdamW(peak=3e-3),
        length=Steps(steps),
        evals=(Validation(source.validation(num_batches=2), NextToken()),),
        checkpoint=CheckpointPolicy(every=5),
        log_every=1,
    )
    return replace(tiny, **changes)


def batch(
    *, rows: int = 8, length: int = 64, vocab_size: int = 264, documents: int = 1, seed: int = 1
) -> dict[str, Any]:
    """A random packed batch: ``documents`` pieces of equal length in each row, a few tokens without weight."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (rows, length + 1), np.int32)
    slots = np.broadcast_to(np.arange(length, dtype=np.int32)[None, :], (rows, length))
    size = length // documents
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (rng.random((rows, length)) < 0.9).astype(np.float32),
        "segment_ids": slots // size + 1,
        "positions": slots % size,
        "target_bytes": np.ones((rows, length), np.float32),
    }
