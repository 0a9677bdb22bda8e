"""Frozen Lake, Gymnasium's own table: what the two readings of exp(r) make of chance.

Someone crosses a lake to a goal; the ice has holes, and where it is slippery only one step in three goes where it was
meant to. What is each kind of cell worth to the walker? Demonstrations are drawn from a known reward.

The causal reading knows that nobody chooses where they slip. The trajectory reading takes lucky slips for choices:
given the same demonstrations it finds other worths, and its agent would control its luck. Compare

    pirl fit models/frozen_lake.py
    pirl fit models/frozen_lake.py --set reading=trajectory
    pirl fit models/frozen_lake.py --set reading=trajectory --set slippery=no

Without slipping the two agree.
"""

from __future__ import annotations

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pirl
from pirl.datasets import simulate
from pirl.envs import from_gymnasium
from pirl.errors import MissingDependencyError

LAWS = {"causal": pirl.MaxCausalEntTrajectory, "trajectory": pirl.MaxEntTrajectory}
KINDS = ("ice", "hole", "goal")
# What the simulated walker gets at each step on ice (the start is ice too), in a hole, and at the goal.
TRUE_WORTH = (-0.3, -2.0, 4.0)
HORIZON = 50

Reading = Literal["causal", "trajectory"]

defaults = {
    "num_posterior_predictive": 100,
    "num_prior": 100,
    "chees": {"num_warmup": 100, "num_samples": 250},
    "nuts": {"num_warmup": 300, "num_samples": 500, "dense_mass": True},
}
dims = {"kinds": ("state", "kind")}
labels = {"worth": "worth"}


def model(demos: pirl.Trajectories, mdp: pirl.TabularMDP, kinds: Tensor, reading: Reading = "causal") -> None:
    """Each kind of cell has its worth; a walker's steps follow from them, and from the ice."""
    worth = pyro.sample("worth", dist.Normal(0.0, 3.0).expand([len(KINDS)]).to_event(1), infer={"dims": ["kind"]})
    reward = pirl.linear_reward(kinds, worth)
    with pyro.plate("episode", len(demos)):
        pyro.sample("trajectories", LAWS[reading](mdp, reward, lengths=demos.lengths), obs=demos.as_tensor())


def load(
    size: Literal["4x4", "8x8"] = "4x4",
    slippery: bool = True,
    num_demos: int = 100,
    reading: Reading = "causal",
    demonstrator: Reading = "causal",
    seed: int = 0,
) -> dict[str, Any]:
    """Crossings by a walker of the reading ``demonstrator``, to be explained by the reading ``reading``."""
    try:
        import gymnasium
    except ImportError:
        raise MissingDependencyError("gymnasium is not installed: pip install 'pirl[envs]'") from None
    lake = gymnasium.make("FrozenLake-v1", map_name=size, is_slippery=slippery)
    mdp = from_gymnasium(lake, horizon=HORIZON).mdp
    letters = [letter.decode() for letter in lake.unwrapped.desc.ravel()]
    kinds = torch.tensor([[letter in "SF", letter == "H", letter == "G"] for letter in letters], dtype=mdp.dtype)
    reward = pirl.linear_reward(kinds, kinds.new_tensor(TRUE_WORTH))
    return {"demos": simulate(mdp, reward, num_demos, HORIZON, demonstrator, seed), "mdp": mdp, "kinds": kinds,
            "reading": reading}  # fmt: skip


def coords() -> dict[str, tuple[str, ...]]:
    """Names of the kinds of cells."""
    return {"kind": KINDS}


def reference() -> dict[str, Any]:
    """The worths that the demonstrations were simulated with."""
    return {"label": "truth", "values": {"worth": TRUE_WORTH}}


if __name__ == "__main__":
    from pirl.cli import fit_module

    fit_module(__file__)
