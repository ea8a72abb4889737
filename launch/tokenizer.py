# SPDX-License-Identifier: Apache-2.0
"""Tokenizers trained by hand."""

import argparse
from pathlib import Path

from launch import host
from research.core.types import UserError
from research.data.sources import Corpus, Jsonl, Stdlib, TextFolder
from research.data.tokenizers import SentencePiece, tokenizer_folder, train_tokenizer


def corpus_of(name: str, *, pattern: str, text_field: str) -> Corpus:
    """The corpus meant on the command line. Raises UserError where there is none."""
    if name == "stdlib":
        return Stdlib()
    path = Path(name)
    if not path.exists():
        raise UserError(f"There is no corpus {name}: give stdlib, a folder of text files, or a .jsonl file.")
    return Jsonl(name, text_field=text_field) if path.suffix == ".jsonl" else TextFolder(name, pattern=pattern)


def command(options: argparse.Namespace) -> int:
    """``lab tokenizer train``: trains one, or finds it trained, and says where it lies and how far it compresses."""
    corpus = corpus_of(options.corpus, pattern=options.pattern, text_field=options.text_field)
    spec, cache = SentencePiece(vocab_size=options.vocab_size, kind=options.kind), host.cache_dir()
    trained = train_tokenizer(spec, corpus, cache_dir=cache)
    bytes_in = tokens_out = 0
    for text in corpus.documents("validation", cache_dir=cache):
        bytes_in += len(text.encode())
        tokens_out += len(trained.encode(text))
    folder = tokenizer_folder(spec, corpus, cache_dir=cache)
    print(
        f"{trained.vocab_size} tokens, {bytes_in / max(1, tokens_out):.2f} bytes per token on held-out text: {folder}"
    )
    return 0
