"""A pendulum swung up by a motor too weak to lift it: what did the controller mind?

Five real demonstrations of a trained agent on Gymnasium's Pendulum (PIRL_DATA names the folder that has
``imitation_rollouts/pendulum_0.npz``), or, without them, of an agent that is soft-optimal for the true reward, made
on the spot. Costs of the angle, of turning and of torque, ``exp(log_cost) * (angle^2, speed^2 / 10, torque^2 /
1000)``, are inferred with log Z from samples of a simulator alone: each demonstration's start is given, so each has a
pool of its own. Gymnasium's reward has three equal costs, each 1. Costs that are found smaller (.13 of the angle, .02
of turning) say that the agent often does worse than it could, such as swinging once more than needed; what cost of
torque it has, so few demonstrations do not tell.

Torque beyond the limits is clipped, so that demonstrations have many actions at a bound. The base policy is uniform
over the allowed torques, and the policies that propose have densities that are constant within bins, closed at the
bounds: an action at a bound has the density of its bin (a smoothed density, no atom).

Pools take most of the time, some minutes on one core: the posterior is narrow beside the prior, and policies are
trained on the way to it, round by round.

    pirl fit models/pendulum.py --plot costs.png
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pirl
from pirl.errors import check_counts
from pirl.grid_control import Actions, Grid, GridLearner
from pirl.learning import guided_pool
from pirl.particles import tilt

COSTS = ("log_angle_cost", "log_speed_cost", "log_torque_cost")
MAX_TORQUE, MAX_SPEED, STEP = 2.0, 8.0, 0.05

defaults = {
    "num_posterior_predictive": 0,
    "num_prior": 100,
    "log_likelihood": False,
    "chees": {"num_chains": 16, "num_warmup": 200, "num_samples": 400, "target_accept_prob": 0.9},
}
labels = {"log_angle_cost": "log cost of the angle", "log_speed_cost": "log cost of turning",
          "log_torque_cost": "log cost of torque"}  # fmt: skip


def model(demos: list[pirl.ContinuousTrajectories], pools: list[pirl.Pool]) -> None:
    """Normal log costs; one demonstration and one pool for each start."""
    costs = torch.stack([pyro.sample(name, dist.Normal(0.0, 2.0)) for name in COSTS], -1).exp()
    reward = pirl.FeatureReward(features, costs)
    for number, (demo, pool) in enumerate(zip(demos, pools, strict=True)):
        with pyro.plate(f"episode_{number}", len(demo)):
            law = pirl.SampledMaxEntTrajectory(pool, reward, lengths=demo.lengths)
            pyro.sample(f"trajectory_{number}", law, obs=demo.as_tensor())


def features(states: Tensor, actions: Tensor) -> Tensor:
    """Minus the squares that Gymnasium's reward is made of; states are (cos, sin, speed)."""
    angle = torch.atan2(states[..., 1], states[..., 0])
    return -torch.stack([angle**2, states[..., 2] ** 2 / 10, actions[..., 0] ** 2 / 1000], -1)


class Pendulum:
    """Gymnasium's Pendulum-v1 from a given start, for many at once: a simulator that can go on from any state."""

    def __init__(self, start: Tensor, horizon: int) -> None:
        self.start, self.horizon, self.steps_taken = start, horizon, 0

    def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """The start."""
        return self.start.expand(num, -1).clone()

    def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Gravity 10, mass and length 1, semi-implicit Euler steps of 1/20 s."""
        self.steps_taken += len(states)
        angle, torque = torch.atan2(states[:, 1], states[:, 0]), actions[:, 0].clamp(-MAX_TORQUE, MAX_TORQUE)
        speed = (states[:, 2] + (15 * angle.sin() + 3 * torque) * STEP).clamp(-MAX_SPEED, MAX_SPEED)
        angle = angle + speed * STEP
        return torch.stack([angle.cos(), angle.sin(), speed], -1)


def load(num_demos: int = 5, horizon: int = 100, num_rollouts: int = 500, seed: int = 0) -> dict[str, Any]:
    """The first ``horizon`` decisions of some demonstrations, and pools that know log Z near their posterior."""
    check_counts(1, num_demos=num_demos, horizon=horizon)
    check_counts(0, seed=seed)
    seen = _recorded(num_demos, horizon)
    if seen is None:
        seen = _made(num_demos, horizon, seed)
    demos = [pirl.ContinuousTrajectories(seen.states[[i]], seen.actions[[i]]) for i in range(len(seen))]
    simulators = [Pendulum(demo.states[0, 0], horizon) for demo in demos]
    learner = _learner(simulators[0])
    pools, _ = guided_pool(
        model, demos, simulators, base=learner.base, policy_step=learner.update, num_policies=2,
        num_rollouts=num_rollouts, seed=seed,
    )  # fmt: skip
    return {"demos": demos, "pools": pools}


def _learner(simulator: Pendulum) -> GridLearner:
    grid = Grid([-math.pi, -MAX_SPEED], [math.pi, MAX_SPEED], [121, 97], wraps=[0])
    return GridLearner(
        simulator, grid, Actions(24, -MAX_TORQUE, MAX_TORQUE),
        coordinates=lambda s: torch.stack([torch.atan2(s[:, 1], s[:, 0]), s[:, 2]], -1),
        states=lambda c: torch.stack([c[:, 0].cos(), c[:, 0].sin(), c[:, 1]], -1),
    )  # fmt: skip


def _recorded(num: int, horizon: int) -> pirl.ContinuousTrajectories | None:
    path = Path(os.environ.get("PIRL_DATA", ".")) / "imitation_rollouts" / "pendulum_0.npz"
    if not path.exists():
        return None
    whole = pirl.ContinuousTrajectories.from_npz(path)
    return pirl.ContinuousTrajectories(whole.states[:num, : horizon + 1], whole.actions[:num, :horizon])


def _made(num: int, horizon: int, seed: int) -> pirl.ContinuousTrajectories:
    """One particle each of the tilted law of the true reward."""
    generator = torch.Generator().manual_seed(seed)
    angle, speed = 2 * torch.rand(2, num, generator=generator, dtype=torch.float64) - 1
    starts = torch.stack([(math.pi * angle).cos(), (math.pi * angle).sin(), speed], -1)
    simulator = Pendulum(starts[0], horizon)
    learner, parts = _learner(simulator), []

    def reward(states: Tensor, actions: Tensor) -> Tensor:
        return features(states, actions).sum(-1)

    policy = learner.update(reward)
    for start in starts:
        simulator.start = start
        drawn, _ = tilt(simulator, policy, reward, 400, generator, base=learner.base)
        parts.append((drawn.states[:1], drawn.actions[:1]))
    return pirl.ContinuousTrajectories(*(torch.cat(x) for x in zip(*parts, strict=True)))


def reference() -> dict[str, Any]:
    """The reward of the environment itself, which need not be what the agent was trained to at its temperature."""
    return {"label": "Gymnasium", "values": dict.fromkeys(COSTS, 0.0)}


if __name__ == "__main__":
    from pirl.cli import fit_module

    fit_module(__file__)
