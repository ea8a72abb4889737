# SPDX-License-Identifier: Apache-2.0
"""The smallest real experiment, shared by tests: a two-layer decoder on text of known entropy."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

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
    source = TextSource(corpus=Synthetic(num_symbols=20_000), tokenizer=Bytes(), batch_size=8, sequence_length=32)
    tiny = Experiment(
        name="tiny",
        model=MODEL,
        objective=NextToken(),
        source=source,
        optimizer=AdamW(peak=3e-3),
        length=Steps(steps),
        evals=(Validation(source.validation(num_batches=2), NextToken(), num_batches=2),),
        checkpoint=CheckpointPolicy(every=5),
        log_every=1,
    )
    return replace(tiny, **changes)


def batch(*, rows: int = 8, length: int = 32, vocab_size: int = 264, documents: int = 1, seed: int = 1) -> dict[str, Any]:
    """A random packed batch: ``documents`` pieces of equal length in each row, a few tokens without weight."""
    tokens = jax.random.randint(jax.random.key(seed), (rows, length + 1), 0, vocab_size)
    piece = jnp.broadcast_to(jnp.arange(length)[None, :], (rows, length))
    size = length // documents
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (jax.random.uniform(jax.random.key(seed + 1), (rows, length)) < 0.9).astype(jnp.float32),
        "segment_ids": piece // size + 1,
        "positions": piece % size,
        "target_bytes": jnp.ones((rows, length), jnp.float32),
    }
