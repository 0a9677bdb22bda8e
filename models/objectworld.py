"""Objectworld: a reward that no weighted sum of the features comes near, found by a neural network with priors.

Coloured objects lie on a grid. Cells near some colours are good, near others bad, and only in combination; what is
given of a cell is how far the nearest object of each colour is. The reward is a small network of these distances with
a normal prior on every weight. Many weights make the same reward (hidden units can be exchanged, their signs flipped),
so it is the reward of each cell that is recorded, and by which chains are judged: ``reward``, less its mean over the
cells, since a constant changes no decision.

    pirl fit models/objectworld.py
    pirl fit models/objectworld.py --set hidden=0            # a linear reward of the same features, to compare

Source: S. Levine, Z. Popovic and V. Koltun, "Nonlinear Inverse Reinforcement Learning with Gaussian Processes", NIPS
2011.
"""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor, nn

import pirl
from pirl.datasets import simulate
from pirl.envs import ObjectWorld
from pirl.envs import objectworld as build
from pirl.errors import check_counts
from pirl.rewards import lifted_reward

# Of a bias, and of what a layer's inputs make together: rewards of a few units, with bends inside the grid.
PRIOR_SCALE = 2.0

defaults = {
    "num_posterior_predictive": 100,
    "num_prior": 100,
    # Between networks of few units lie barriers; many units leave ways around.
    "chees": {"num_chains": 16, "num_warmup": 200, "num_samples": 200, "init": "uniform", "max_leapfrogs": 64},
    "nuts": {"num_chains": 2, "num_warmup": 300, "num_samples": 500},
    "svi": {"num_samples": 500},
}
dims = {"features": ("state", "feature"), "reward": ("state",)}
labels = {"reward": "reward, less its mean"}


def model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: Tensor, network: nn.Module) -> None:
    """A network's reward; demonstrators who act by its soft-optimal policy."""
    reward = lifted_reward("network", network, features, PRIOR_SCALE)
    pyro.deterministic("reward", centred(reward.squeeze(-1)), event_dim=1)
    with pyro.plate("episode", len(demos)):
        law = pirl.MaxCausalEntTrajectory(mdp, reward, lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


def centred(reward: Tensor) -> Tensor:
    """Rewards ``[*batch, S]`` less their mean over states: all that can be known of them."""
    return reward - reward.mean(dim=-1, keepdim=True)


def load(
    size: int = 10,
    num_objects: int = 15,
    num_colours: int = 2,
    num_demos: int = 100,
    length: int = 20,
    hidden: int = 16,
    sharpness: float = 3.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Demonstrations of ``length`` decisions from random cells; ``hidden=0`` makes the reward linear.

    The true reward of a cell is 1, -1 or 0, times ``sharpness``: the larger, the fewer mistakes.
    """
    check_counts(0, hidden=hidden)
    world, truth = true_reward(size, num_objects, num_colours, sharpness, seed)
    features = (world.features - world.features.mean(dim=0)) / world.features.std(dim=0)
    return {
        "demos": simulate(world.mdp, truth, num_demos, length, seed=seed),
        "mdp": world.mdp,
        "features": features,
        "network": perceptron(features.shape[1], hidden),
    }


def true_reward(
    size: int, num_objects: int, num_colours: int, sharpness: float, seed: int
) -> tuple[ObjectWorld, Tensor]:
    """The world, and the reward ``[S]`` that its demonstrators have."""
    world = build(size, num_objects, num_colours, seed=seed)
    return world, sharpness * world.reward


def perceptron(num_features: int, hidden: int) -> nn.Module:
    """One hidden layer, or none; no last bias, which would change no decision."""
    if hidden == 0:
        return nn.Linear(num_features, 1, bias=False)
    return nn.Sequential(nn.Linear(num_features, hidden), nn.Tanh(), nn.Linear(hidden, 1, bias=False))


def coords(num_colours: int) -> dict[str, list[str]]:
    """A feature is the distance to a colour."""
    return {"feature": [f"{where} {c}" for where in ("inner", "outer") for c in range(num_colours)]}


def reference(size: int, num_objects: int, num_colours: int, sharpness: float, seed: int) -> dict[str, Any]:
    """The rewards that the demonstrators had."""
    truth = true_reward(size, num_objects, num_colours, sharpness, seed)[1]
    return {"label": "truth", "values": {"reward": centred(truth).tolist()}}


def truth(size: int, num_objects: int, num_colours: int, sharpness: float, seed: int) -> Tensor:
    """The reward that the demonstrators had."""
    return true_reward(size, num_objects, num_colours, sharpness, seed)[1]


if __name__ == "__main__":
    from pirl.cli import fit_module

    fit_module(__file__)
