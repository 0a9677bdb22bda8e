"""A puck pushed home along a line: how much does someone mind being away, and how much pushing?

States are position and velocity, actions are pushes; air moves the puck a little, so dynamics are linear and Gaussian.
The reward is ``-1/2 state_cost (position^2 + velocity^2 / 10) - 1/2 action_cost push^2``; with pushes at random as base
policy, log Z is exact by a Riccati recursion, and so is the likelihood. Continuous states and actions for which the
posterior is known: whatever estimates log Z from samples can be held against it.

    pirl fit models/linear_gaussian.py --set num_demos=20 --plot costs.png
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pirl.linear_gaussian import LinearGaussian, LinearGaussianTrajectory, QuadraticReward

TRUE_COSTS = {"log_state_cost": 0.5, "log_action_cost": -1.0}
PRIOR_SD = 1.5

defaults = {
    "num_posterior_predictive": 100,
    "num_prior": 100,
    "chees": {"num_chains": 32, "num_warmup": 100, "num_samples": 300},
    "nuts": {"num_warmup": 200, "num_samples": 500, "dense_mass": True},
}
dims = {"demos": ("episode", "step", "state_action")}
labels = {"log_state_cost": "log cost of being away", "log_action_cost": "log cost of pushing"}


def model(demos: Tensor, system: LinearGaussian, reading: Literal["causal", "trajectory"] = "trajectory") -> None:
    """Normal log costs; demonstrations ``[episode, T + 1, 3]`` of position, velocity and push (0 at the end)."""
    log_state_cost = pyro.sample("log_state_cost", dist.Normal(0.0, PRIOR_SD))
    log_action_cost = pyro.sample("log_action_cost", dist.Normal(0.0, PRIOR_SD))
    reward = costs(system, log_state_cost, log_action_cost)
    with pyro.plate("episode", len(demos)):
        pyro.sample("trajectories", LinearGaussianTrajectory(system, reward, reading), obs=demos)


def costs(system: LinearGaussian, log_state_cost: Tensor, log_action_cost: Tensor) -> QuadraticReward:
    """The reward of two log costs ``[*batch]``."""
    weight = torch.tensor([1.0, 0.1], dtype=system.dtype, device=system.device)
    state_cost = torch.diag_embed(log_state_cost.exp().unsqueeze(-1) * weight)
    return system.quadratic(state_cost, log_action_cost.exp()[..., None, None])


def load(
    num_demos: int = 10,
    horizon: int = 10,
    noise: float = 0.05,
    reading: Literal["causal", "trajectory"] = "trajectory",
    seed: int = 0,
) -> dict[str, Any]:
    """Demonstrations drawn from the model itself, with the same costs whatever the seed."""
    system = puck(horizon, noise)
    truth = (torch.tensor(value, dtype=system.dtype) for value in TRUE_COSTS.values())
    generator = torch.Generator().manual_seed(seed)
    states, actions = system.sample(costs(system, *truth), num_demos, generator, reading)
    demos = torch.cat([states, torch.nn.functional.pad(actions, (0, 0, 0, 1))], -1)
    return {"demos": demos, "system": system, "reading": reading}


def puck(horizon: int, noise: float) -> LinearGaussian:
    """Half a second passes between pushes; air changes the velocity only, so that W is singular."""
    dt = 0.5
    transition = torch.tensor([[1.0, dt], [0.0, 0.9]], dtype=torch.float64)
    control = torch.tensor([[dt**2 / 2], [dt]], dtype=torch.float64)
    air = torch.diag(torch.tensor([0.0, noise], dtype=torch.float64))
    start = torch.tensor([2.0, 0.0], dtype=torch.float64)
    return LinearGaussian(transition, control, air, start, torch.eye(2).to(start), 4 * torch.eye(1).to(start), horizon)


def coords() -> dict[str, list[str]]:
    """What a row of a demonstration holds."""
    return {"state_action": ["position", "velocity", "push"]}


def reference() -> dict[str, Any]:
    """The log costs that the demonstrator had."""
    return {"label": "truth", "values": dict(TRUE_COSTS)}


if __name__ == "__main__":
    from pirl.cli import fit_module

    fit_module(__file__)
