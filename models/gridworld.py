"""A gridworld whose true reward is known: does the posterior find the weights of its features?

Cells are described by radial features, each a smooth bump around one cell; the reward of a cell is their weighted sum.
Demonstrations are drawn from the model itself with weights drawn from the prior, so a calibrated posterior covers the
true weights as often as it says.

    pirl fit models/gridworld.py --set num_demos=200 --plot weights.png
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pirl
from pirl.datasets import simulate
from pirl.envs import gridworld, gridworld_features

LAWS = {"causal": pirl.MaxCausalEntTrajectory, "trajectory": pirl.MaxEntTrajectory}
PRIOR_SD = 2.0

# Weights of overlapping features are correlated. Beyond some weights demonstrators would go elsewhere: the posterior
# falls off there within a leapfrog step of the usual size, and transitions diverge.
defaults = {
    "num_posterior_predictive": 100,
    "num_prior": 100,
    "chees": {"num_warmup": 100, "num_samples": 250, "target_accept_prob": 0.9},
    "nuts": {"num_warmup": 300, "num_samples": 500, "dense_mass": True},
}
dims = {"features": ("state", "feature")}
labels = {"weights": "weight"}


def model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, features: Tensor, reading: str = "causal") -> None:
    """Independent normal weights; demonstrators who act by the soft-optimal policy of the reward that they make."""
    prior = dist.Normal(0.0, PRIOR_SD).expand([features.shape[-1]]).to_event(1)
    weights = pyro.sample("weights", prior, infer={"dims": ["feature"]})
    reward = pirl.linear_reward(features, weights)
    with pyro.plate("episode", len(demos)):
        pyro.sample("trajectories", LAWS[reading](mdp, reward, lengths=demos.lengths), obs=demos.as_tensor())


def load(
    rows: int = 10,
    cols: int = 10,
    num_demos: int = 50,
    horizon: int = 20,
    slip: float = 0.1,
    num_features: int = 8,
    reading: Literal["causal", "trajectory"] = "causal",
    seed: int = 0,
) -> dict[str, Any]:
    """Demonstrations of ``horizon`` decisions each, from uniformly drawn starting cells."""
    mdp = gridworld(rows, cols, slip=slip, horizon=horizon)
    features = gridworld_features(rows, cols, num_features, seed)
    reward = pirl.linear_reward(features, true_weights(num_features, seed))
    demos = simulate(mdp, reward, num_demos, horizon, reading, seed)
    return {"demos": demos, "mdp": mdp, "features": features, "reading": reading}


def true_weights(num_features: int, seed: int) -> Tensor:
    """A draw from the prior."""
    return PRIOR_SD * torch.randn(num_features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def coords(features: Tensor, cols: int) -> dict[str, list[str]]:
    """A feature is named after the row and column of its centre."""
    return {"feature": [f"r{cell // cols}c{cell % cols}" for cell in features.argmax(dim=0).tolist()]}


def reference(num_features: int, seed: int) -> dict[str, Any]:
    """The weights that the demonstrators had."""
    return {"label": "truth", "values": {"weights": true_weights(num_features, seed).tolist()}}


def truth(features: Tensor, num_features: int, seed: int) -> Tensor:
    """The reward that the demonstrators had."""
    return pirl.linear_reward(features, true_weights(num_features, seed))


if __name__ == "__main__":
    from pirl.cli import fit_module

    fit_module(__file__)
