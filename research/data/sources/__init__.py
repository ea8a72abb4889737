# SPDX-License-Identifier: Apache-2.0
"""Corpora, one file each: frozen dataclasses with ``fingerprint`` and ``documents`` (see ``base.Corpus``); of
conversations, ``conversations`` too (``base.ChatCorpus``)."""

from research.data.sources.base import ChatCorpus, Corpus, CorpusError
from research.data.sources.conversations import Conversations, PlainText
from research.data.sources.jsonl import Jsonl
from research.data.sources.mixture import Mixture, as_chat, parts
from research.data.sources.stdlib import Stdlib
from research.data.sources.synthetic import Synthetic
from research.data.sources.text_folder import TextFolder
from research.data.sources.tfds import Tfds

__all__ = [
    "ChatCorpus",
    "Conversations",
    "Corpus",
    "CorpusError",
    "Jsonl",
    "Mixture",
    "PlainText",
    "Stdlib",
    "Synthetic",
    "TextFolder",
    "Tfds",
    "as_chat",
    "parts",
]
