# SPDX-License-Identifier: Apache-2.0
"""What a chip-hour costs, by a table that the user can edit (``prices.toml`` beside this file is the default)."""

import math
import tomllib
from pathlib import Path
from typing import Any

from research.core.chips import Chip
from research.core.errors import UserError

DEFAULT = Path(__file__).with_name("prices.toml")


def per_chip_hour(chip: Chip, pricing: str, table: Path | None = None) -> float:
    """US dollars. Raises UserError for a table that cannot be read, or that lacks the chip or the way of paying."""
    path = table or DEFAULT
    try:
        rows: dict[str, Any] = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no price table {path}: copy {DEFAULT} and edit it.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a price table ({error}): write it as {DEFAULT} is written.") from None
    prices = rows.get(chip.name)
    if not isinstance(prices, dict):
        raise UserError(f"{path} has no section [{chip.name}] of prices: write it as {DEFAULT} has it.")
    price = prices.get(pricing)
    if price is None:
        raise UserError(
            f"{path} has no price of {chip.name} for {pricing} (it has {', '.join(prices) or 'none'}): choose one with "
            f"--pricing, or add a line '{pricing} = DOLLARS' below [{chip.name}]."
        )
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
        raise UserError(f"{path} has {price!r} for {pricing} of {chip.name}: give US dollars, a number of at least 0.")
    return float(price)
