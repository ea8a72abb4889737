# SPDX-License-Identifier: Apache-2.0
"""Corpora, one file each: frozen dataclasses with ``fingerprint`` and ``documents`` (see ``base.Corpus``)."""

from research.data.sources.base import Corpus, CorpusError
from research.data.sources.jsonl import Jsonl
from research.data.sources.mixture import Mixture, parts
from research.data.sources.stdlib import Stdlib
from research.data.sources.synthetic import Synthetic
from research.data.sources.text_folder import TextFolder
from research.data.sources.tfds import Tfds

__all__ = ["Corpus", "CorpusError", "Jsonl", "Mixture", "Stdlib", "Synthetic", "TextFolder", "Tfds", "parts"]
