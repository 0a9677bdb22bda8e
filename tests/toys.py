"""The smallest world in which luck matters: one start, of which all depends, and one decision, that does not matter."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scattered:
    """Starts of a wide normal law, one decision that does not matter: luck is all in the start."""

    horizon = 1

    def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        return 3 * torch.randn(num, 1, generator=generator, dtype=torch.float64)

    def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return states


class Plain:
    """The base policy: one of two actions."""

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(2, (len(states), 1), generator=generator).to(states)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
        return torch.full((len(states),), -math.log(2), dtype=states.dtype)


class Knowing(Plain):
    """It, and what a start is worth."""

    def value(self, states: Tensor, step: int) -> Tensor:
        return steep(states, states)


class Misled(Plain):
    """It, and what no start is worth."""

    def value(self, states: Tensor, step: int) -> Tensor:
        return torch.full((len(states),), -torch.inf, dtype=states.dtype)


def steep(states: Tensor, actions: Tensor) -> Tensor:
    return -5 * states[:, 0].square()
