# SPDX-License-Identifier: Apache-2.0
"""Advantages from rewards: pure functions on the host, P prompts with G responses each of at most C tokens."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np

from research.core.types import UserError


class Rewarded(NamedTuple):
    """rewards [P, G] of whole responses; mask [P, G, C]: which tokens were drawn; penalties [P, G, C], of tokens, which
    lower the reward; values [P, G, C]: what was expected before each token, where there is a value head."""

    rewards: np.ndarray
    mask: np.ndarray
    penalties: np.ndarray
    values: np.ndarray | None = None

    @property
    def returns(self) -> np.ndarray:
        """Of whole responses, penalties taken off [P, G]."""
        return self.rewards - np.sum(self.penalties * self.mask, axis=-1)

    @property
    def returns_to_go(self) -> np.ndarray:
        """From each token on [P, G, C]; the reward comes at the end, and nothing is discounted."""
        penalties = self.penalties * self.mask
        ahead = np.flip(np.cumsum(np.flip(penalties, -1), axis=-1), -1)
        return (self.rewards[..., None] - ahead) * self.mask


@runtime_checkable
class Advantage(Protocol):
    """Rewards -> advantages [P, G, C] float32, zero where there is no token. uses_values: it needs a value head."""

    uses_values: ClassVar[bool] = False

    def __call__(self, given: Rewarded) -> np.ndarray: ...


@dataclass(frozen=True)
class GroupRelative(Advantage):
    """A response's return less the mean of its group, over the group's standard deviation where ``std`` (GRPO: Shao et
    al. 2024, section 4.1.2; without, Dr. GRPO: Liu et al. 2025, section 3.2).

    The standard deviation is a sample's (over G - 1). A group whose returns are all one has advantages of exactly 0.
    """

    std: bool = True
    eps: float = 1e-4

    def __call__(self, given: Rewarded) -> np.ndarray:
        returns = given.returns
        centred = returns - returns.mean(axis=1, keepdims=True)
        if self.std and returns.shape[1] > 1:
            centred = centred / (returns.std(axis=1, ddof=1, keepdims=True) + self.eps)
        return _spread(np.where(is_equal(returns)[:, None], 0.0, centred), given.mask)


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """A response's return less the mean of the others of its group (RLOO: Ahmadian et al. 2024, eq. 8)."""

    def __call__(self, given: Rewarded) -> np.ndarray:
        returns = given.returns
        group = returns.shape[1]
        if group < 2:
            raise UserError("LeaveOneOut compares the responses to one prompt: set the source's samples to at least 2.")
        others = (returns.sum(axis=1, keepdims=True) - returns) / (group - 1)
        return _spread(np.where(is_equal(returns)[:, None], 0.0, returns - others), given.mask)


@dataclass(frozen=True)
class BatchNormalised(Advantage):
    """Returns to go, normalised over all tokens of the batch (REINFORCE++: Hu 2025, eq. 4 and 5). baseline: the group's
    mean reward is taken off first (its variant for several responses to a prompt)."""

    baseline: bool = False
    eps: float = 1e-8

    def __call__(self, given: Rewarded) -> np.ndarray:
        if self.baseline:
            given = given._replace(rewards=given.rewards - given.rewards.mean(axis=1, keepdims=True))
        return _whitened(given.returns_to_go, given.mask, self.eps)


@dataclass(frozen=True)
class Gae(Advantage):
    """Generalised advantage estimation from a value head (Schulman et al. 2016, eq. 16), whitened over the batch as in
    Ouyang et al. 2022's PPO."""

    uses_values: ClassVar[bool] = True
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise UserError(f"Gae's gamma and lam lie between 0 and 1; given {self.gamma} and {self.lam}.")

    def __call__(self, given: Rewarded) -> np.ndarray:
        found = self.plain(given)
        return _whitened(found, given.mask, 1e-8) if self.whiten else found

    def plain(self, given: Rewarded) -> np.ndarray:
        """Before whitening: added to the values it gives what the values are to become."""
        assert given.values is not None
        mask, found = given.mask, np.zeros(given.mask.shape)
        last = mask * (np.cumsum(mask, axis=-1) == np.sum(mask, axis=-1, keepdims=True))
        rewards = last * given.rewards[..., None] - given.penalties
        after, running = np.zeros(mask.shape[:2]), np.zeros(mask.shape[:2])
        for t in reversed(range(mask.shape[2])):
            here = mask[..., t] > 0
            delta = rewards[..., t] + self.gamma * after - given.values[..., t]
            running = np.where(here, delta + self.gamma * self.lam * running, running)
            after = np.where(here, given.values[..., t], after)
            found[..., t] = running * here
        return found.astype(np.float32)


def is_equal(returns_PG: np.ndarray) -> np.ndarray:
    """Of each group, whether all of it is one number [P]: there is nothing to tell its responses apart by."""
    return returns_PG.max(axis=1) == returns_PG.min(axis=1)


def _spread(advantages_PG: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (advantages_PG[..., None] * mask).astype(np.float32)


def _whitened(x: np.ndarray, mask: np.ndarray, eps: float) -> np.ndarray:
    """Mean 0 and variance 1 over the tokens of the batch; all equal: exactly 0."""
    tokens = x[mask > 0]
    if not len(tokens) or tokens.max() == tokens.min():
        return np.zeros(x.shape, np.float32)
    return ((x - tokens.mean()) / np.sqrt(tokens.var() + eps) * mask).astype(np.float32)
