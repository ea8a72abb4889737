# SPDX-License-Identifier: Apache-2.0
"""Llama-2-7B's shape, trained as Touvron et al. 2023 did: to plan for a slice before one is asked for.

Question:  What does a run of this size take: memory, time of a step, chip-hours?
Command:   lab plan experiments/llama2_7b.py --tpu v5e-256
           lab sweep experiments/llama2_7b.py --on tpu-vm --tpu v5e-256    # once C4 is prepared by TFDS
Hardware:  v5e-256; by the roofline of the compiled step 1.16 s for a million tokens, at least 6,300 chip-hours for 80
           billion (twelve tokens a parameter).
Expect:    2.44 GB of each chip's 16, 83% of peak at best (libtpu 0.0.42.1).
"""

from dataclasses import replace

from research.core.sharding import MeshSpec
from research.core.types import Precision
from research.data import sources
from research.data.pipeline import TextSource
from research.data.tokenizers import SentencePiece
from research.evals.validation import Validation
from research.models.families.llama import llama2_7b
from research.objectives.next_token import NextToken
from research.train.experiment import AdamW, CheckpointPolicy, Experiment, Steps, Tokens
from research.train.optimizers import Schedule

LENGTH = 4096
MODEL = replace(llama2_7b(), remat="full")


def sweep() -> dict[str, Experiment]:
    corpus = sources.Tfds("c4/en:3.1.0")
    source = TextSource(
        corpus=corpus, tokenizer=SentencePiece(vocab_size=32_000), batch_size=256, sequence_length=LENGTH
    )
    experiment = Experiment(
        name="llama2-7b",
        model=MODEL,
        objective=NextToken(),
        source=source,
        optimizer=AdamW(peak=3e-4, schedule=Schedule("cosine", warmup=Steps(2000))),
        length=Tokens(80e9),
        mesh=MeshSpec(data=1, fsdp=256),
        precision=Precision(compute="bfloat16", logits="bfloat16"),
        evals=(Validation(source.validation(num_batches=16), NextToken(), every=1000),),
        checkpoint=CheckpointPolicy(every=1000),
    )
    return {experiment.name: experiment}
