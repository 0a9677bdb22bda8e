"""A pole balanced on a cart: does the controller mind the pole's tilt, or where the cart is?

Real demonstrations of a trained agent on Gymnasium's CartPole-v1 (PIRL_DATA names the folder that has
``imitation_rollouts/cartpole_0.npz``), or, without them, of an agent that is soft-optimal for costs stated here, made
on the spot. The environment pays 1 for every step before a fall, which says nothing about how to balance; inferred
are the costs ``exp(log_tilt_cost) * (angle / 12 degrees)^2 + exp(log_place_cost) * (position / 2.4)^2`` of a step
under which the agent's choices of left and right are likely. All episodes have the same number of decisions and go on
after a fall, so that their length tells nothing. log Z comes from samples of a simulator alone.

The pool takes most of the time, some minutes in all on one core.

    pirl fit models/cartpole.py --plot costs.png
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

COSTS = {"log_tilt_cost": 1.0, "log_place_cost": -1.0}
"""Of the agent that is made on the spot."""

defaults = {
    "num_posterior_predictive": 0,
    "num_prior": 100,
    "log_likelihood": False,
    "chees": {"num_chains": 16, "num_warmup": 200, "num_samples": 300, "target_accept_prob": 0.9},
}
labels = {"log_tilt_cost": "log cost of tilt", "log_place_cost": "log cost of being off centre"}


def model(demos: pirl.ContinuousTrajectories, pool: pirl.Pool) -> None:
    """Normal log costs of a step."""
    costs = torch.stack([pyro.sample(name, dist.Normal(0.0, 2.0)) for name in COSTS], -1).exp()
    with pyro.plate("episode", len(demos)):
        law = pirl.SampledMaxEntTrajectory(pool, pirl.FeatureReward(features, costs), lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def features(states: Tensor, actions: Tensor) -> Tensor:
    """Minus squares, 1 where Gymnasium's episodes end; states are (position, speed, angle, its speed)."""
    return -torch.stack([(states[..., 2] / math.radians(12)) ** 2, (states[..., 0] / 2.4) ** 2], -1).clamp_max(9.0)


class CartPole:
    """Gymnasium's CartPole-v1 without an end, for many at once: a simulator that can go on from any state."""

    def __init__(self, horizon: int) -> None:
        self.horizon, self.steps_taken = horizon, 0

    def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Nearly upright, nearly at rest."""
        return 0.1 * torch.rand(num, 4, generator=generator, dtype=torch.float64) - 0.05

    def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Barto, Sutton and Anderson (1983): cart 1 kg, pole 0.1 kg and 1 m, pushes of 10 N, Euler steps of 1/50 s."""
        self.steps_taken += len(states)
        place, speed, angle, turning = states.unbind(-1)
        push = 20 * actions[:, 0] - 10
        sine, cosine = angle.sin(), angle.cos()
        drive = (push + 0.05 * turning**2 * sine) / 1.1
        bend = (9.8 * sine - cosine * drive) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        pull = drive - 0.05 * bend * cosine / 1.1
        return torch.stack(
            [place + 0.02 * speed, speed + 0.02 * pull, angle + 0.02 * turning, turning + 0.02 * bend], -1
        )


def load(num_demos: int = 10, horizon: int = 100, num_rollouts: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The first ``horizon`` decisions of some demonstrations, and a pool that knows log Z near their posterior."""
    check_counts(1, num_demos=num_demos, horizon=horizon)
    check_counts(0, seed=seed)
    simulator = CartPole(horizon)
    grid = Grid([-2.4, -2.5, -0.3, -2.5], [2.4, 2.5, 0.3, 2.5], [9, 11, 15, 15])
    learner = GridLearner(simulator, grid, Actions(2))
    demos = _recorded(num_demos, horizon) or _made(learner, num_demos, seed)
    pool, _ = guided_pool(
        model, demos, simulator, base=learner.base, policy_step=learner.update, num_policies=3,
        num_rollouts=num_rollouts, seed=seed,
    )  # fmt: skip
    return {"demos": demos, "pool": pool}


def _recorded(num: int, horizon: int) -> pirl.ContinuousTrajectories | None:
    path = Path(os.environ.get("PIRL_DATA", ".")) / "imitation_rollouts" / "cartpole_0.npz"
    if not path.exists():
        return None
    whole = pirl.ContinuousTrajectories.from_npz(path)
    long = (whole.lengths >= horizon).nonzero().flatten()[:num]
    return pirl.ContinuousTrajectories(whole.states[long, : horizon + 1], whole.actions[long, :horizon])


def _made(learner: GridLearner, num: int, seed: int) -> pirl.ContinuousTrajectories:
    """One particle each of the tilted law of :data:`COSTS`: those of one call share ancestors."""
    costs = torch.tensor(list(COSTS.values()), dtype=torch.float64).exp()
    reward = pirl.FeatureReward(features, costs)
    generator = torch.Generator().manual_seed(seed)
    policy = learner.update(reward)
    drawn = [tilt(learner.simulator, policy, reward, 200, generator, base=learner.base)[0] for _ in range(num)]
    return pirl.ContinuousTrajectories(
        torch.cat([x.states[:1] for x in drawn]), torch.cat([x.actions[:1] for x in drawn])
    )


def reference() -> dict[str, Any] | None:
    """The costs of the agent that is made on the spot; nobody knows those of the recorded one."""
    if _recorded(1, 1) is not None:
        return None
    return {"label": "truth", "values": dict(COSTS)}


if __name__ == "__main__":
    from pirl.cli import fit_module

    fit_module(__file__)
