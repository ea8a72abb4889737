# SPDX-License-Identifier: Apache-2.0
"""A family of Hugging Face models: its table of tensors, and its config.json in both directions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from research.hf.config import Config
from research.hf.tables import Table
from research.models.decoder import Decoder


@dataclass(frozen=True)
class Family:
    """model_type, architecture: as config.json names them. model: what a config describes; config: the inverse, for a
    model and the most positions it promises, which raises ``Unfit`` naming what the family does not have."""

    model_type: str
    architecture: str
    table: Table
    model: Callable[[Config], Decoder]
    config: Callable[[Decoder, int], dict[str, Any]]
