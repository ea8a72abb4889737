# SPDX-License-Identifier: Apache-2.0
"""Models that see pictures too (Gemma 3 from 4B on): the part of them that reads and writes text."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from research.core.types import UserError
from research.hf.config import Config

# What a Gemma 3 config leaves out where it is so (Gemma3TextConfig of transformers 5).
GEMMA3_TEXT = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}
TEXT = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
PICTURES = ("vision_tower.", "multi_modal_projector.")


class Files(Protocol):
    """Tensors by name (``research.hf.store.Store``). shapes: shape and dtype of each, as safetensors names them."""

    @property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]: ...

    def read(self, name: str) -> np.ndarray: ...


class _TextOf:
    """The tensors of the language model under the names that they have in one without pictures."""

    def __init__(self, files: Files) -> None:
        self.files, self.names = files, dict[str, str]()
        for name in files.shapes:
            if not name.removeprefix("model.").startswith(PICTURES):
                self.names[_plain(name)] = name
        self.shapes = {plain: files.shapes[name] for plain, name in self.names.items()}

    def read(self, name: str) -> np.ndarray:
        return self.files.read(self.names[name])


def _plain(name: str) -> str:
    return next((new + name.removeprefix(old) for old, new in TEXT.items() if name.startswith(old)), name)


def language_part(config: Config, files: Files) -> tuple[Config, Files]:
    """The config and the tensors of the language model; both as they are, where there is no more to the model."""
    if config.get("model_type", None) != "gemma3":
        return config, files
    given: dict[str, Any] = dict(config.part("text_config"))
    if given.get("model_type", "gemma3_text") != "gemma3_text":
        raise UserError(f"{config.where} has a text_config of {given['model_type']!r}: it must be gemma3_text.")
    shared = {name: config.values[name] for name in ("tie_word_embeddings",) if config.values.get(name) is not None}
    values = {**GEMMA3_TEXT, **shared, **given, "model_type": "gemma3_text"}
    return Config(values, f"{config.where} (text_config)"), _TextOf(files)
