"""Actions of networks in an environment's units, and their densities."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from jaxtyping import Float
from stable_baselines3.sac.policies import Actor
from torch import Tensor
from torch.nn.functional import softplus

from pirl.errors import check_generator
from pirl.simulators.protocols import Generator

EDGE = 1e-9
"""An action nearer to the end of its range than this share has the density of one just so near."""


class Actions(NamedTuple):
    """The law of actions, from a network's parameters; and the environment's units."""

    number: int | None
    centre: Tensor
    half: Tensor
    """Half the width of the range ``[da]``."""

    @staticmethod
    def of(space: Any) -> Actions:
        if isinstance(space, gymnasium.spaces.Discrete):
            return Actions(int(space.n), torch.zeros(0), torch.zeros(0))
        low, high = (torch.as_tensor(np.asarray(x, np.float64).reshape(-1)) for x in (space.low, space.high))
        return Actions(None, (low + high) / 2, (high - low) / 2)

    def squash(self, u: Tensor) -> Tensor:
        """a = centre + half tanh u."""
        return self.centre + self.half * u.tanh()

    def log_slope(self, u: Tensor) -> Tensor:
        """log |da/du|, summed over coordinates: 1 - tanh^2 u = 4 / (e^u + e^-u)^2."""
        return (self.half.log() + 2 * (np.log(2) - u - softplus(-2 * u))).sum(-1)

    def sample(self, parameters: tuple[Tensor, ...], generator: Generator) -> Tensor:
        check_generator(generator)
        if self.number is not None:
            cumulative = parameters[0].double().softmax(-1).cumsum(-1)
            uniform = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64)
            return torch.searchsorted(cumulative, uniform, right=True).squeeze(-1).clamp_max(self.number - 1)
        mean, log_scale = (x.double() for x in parameters)
        return self.squash(mean + log_scale.exp() * torch.randn(mean.shape, generator=generator, dtype=torch.float64))

    def log_prob(self, parameters: tuple[Tensor, ...], actions: Tensor) -> Float[Tensor, " n"]:
        if self.number is not None:
            chosen = actions.reshape(-1, 1).long()
            return parameters[0].double().log_softmax(-1).gather(-1, chosen).squeeze(-1)
        mean, log_scale = (x.double() for x in parameters)
        share = (actions.reshape(mean.shape).double() - self.centre) / self.half
        u = share.clamp(EDGE - 1, 1 - EDGE).atanh()
        log_prob = torch.distributions.Normal(mean, log_scale.exp()).log_prob(u).sum(-1) - self.log_slope(u)
        return log_prob.masked_fill((share.abs() > 1 + EDGE).any(-1), -torch.inf)


def parameters(network: Any, states: Tensor) -> tuple[Tensor, ...]:
    """Logits ``[n, A]``, or (mean, log scale) of the Gaussian that is squashed, each ``[n, da]``."""
    seen = states.to("cpu", torch.float32)
    if isinstance(network, Actor):
        mean, log_scale, _ = network.get_action_dist_params(seen)
        return mean, log_scale
    law = network.get_distribution(seen).distribution
    return (law.logits,) if isinstance(law, torch.distributions.Categorical) else (law.mean, law.stddev.log())
