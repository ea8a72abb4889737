# SPDX-License-Identifier: Apache-2.0
"""Text from a finished run, and tokenizers trained by hand."""

from pathlib import Path

import jax
import numpy as np

from launch import host
from research.core import sharding
from research.core.sharding import MeshSpec
from research.core.types import UserError
from research.data.pipeline import TextSource
from research.data.sources import Corpus, Jsonl, Stdlib, TextFolder
from research.data.tokenizers import SentencePiece, tokenizer_folder, train_tokenizer
from research.infer.engine import Engine, Request
from research.infer.generate import Settings
from research.infer.sampling import sampling
from research.train import checkpoint
from research.train.experiment import Experiment


def sample(run: Path, *, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and what the model adds to it."""
    if tokens < 1 or temperature < 0:
        raise UserError(f"--tokens must be at least 1 and --temperature at least 0; given {tokens} and {temperature}.")
    experiment: Experiment = checkpoint.load_experiment(run)
    if not isinstance(experiment.source, TextSource):
        raise UserError(f"{run} was not trained on text, so that a prompt means nothing to it.")
    tokenizer = experiment.source.tokenizer_for(host.cache_dir())
    before = checkpoint.read_item(run, "data").get("data", {}).get("tokenizer")
    if before not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{run} was trained with the tokenizer {before}, and its text now gives {tokenizer.fingerprint}: put the "
            "text back that the tokenizer was trained on."
        )
    mesh = sharding.make_mesh(MeshSpec(data=1))
    model, precision = experiment.model, experiment.precision
    shapes = model.shapes(precision)
    layout = sharding.tree_shardings(mesh, shapes, model.logical_axes())
    with jax.set_mesh(mesh):
        params = checkpoint.load_params(run, shapes, layout)
        policy = model.bind(params, model.init_buffers(), precision, platform=mesh.devices.flat[0].platform)
        ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)])
        chosen = sampling(temperature=temperature, vocab_size=tokenizer.vocab_size)
        engine = Engine(model, slots=1, settings=Settings(chosen, stop=(tokenizer.eos_id, tokenizer.bos_id)))
        (result,) = engine.run(policy, [Request(ids, tokens, seed=seed)])
    return prompt + tokenizer.decode(result.tokens)  # a stop id has no text


def corpus_of(name: str, *, pattern: str, text_field: str) -> Corpus:
    """The corpus meant on the command line. Raises UserError where there is none."""
    if name == "stdlib":
        return Stdlib()
    path = Path(name)
    if not path.exists():
        raise UserError(f"There is no corpus {name}: give stdlib, a folder of text files, or a .jsonl file.")
    return Jsonl(name, text_field=text_field) if path.suffix == ".jsonl" else TextFolder(name, pattern=pattern)


def tokenizer(corpus_name: str, *, kind: str, vocab_size: int, pattern: str, text_field: str) -> str:
    """Trains a tokenizer, or finds it trained, and says where it lies and how far it compresses."""
    corpus, cache = corpus_of(corpus_name, pattern=pattern, text_field=text_field), host.cache_dir()
    spec = SentencePiece(vocab_size=vocab_size, kind="unigram" if kind == "unigram" else "bpe")
    trained = train_tokenizer(spec, corpus, cache_dir=cache)
    bytes_in = tokens_out = 0
    for text in corpus.documents("validation", cache_dir=cache):
        bytes_in += len(text.encode())
        tokens_out += len(trained.encode(text))
    folder = tokenizer_folder(spec, corpus, cache_dir=cache)
    return (
        f"{trained.vocab_size} tokens, {bytes_in / max(1, tokens_out):.2f} bytes per token on held-out text: {folder}"
    )
