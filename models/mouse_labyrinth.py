"""Thirsty mice in a labyrinth: what did they want, and did it change on the way?

The labyrinth is a binary tree of 127 nodes with water at one of its ends. A mouse enters, runs for 22 decisions (left,
right, back, stay), and is watched. Its reward belongs to the node where it is: one number each that does not change
(``num_maps=0``), or goal maps, one number a node each, that are weighed differently at each step,

    r_t(s) = sum_k w_k(t) u_k(s),    w_k(1) = 1,    w_k(t + 1) = w_k(t) + drift * Normal(0, 1),

with a given ``drift`` (one that is inferred trades places with the size of the maps). At each step the mouse acts as
if its reward of that moment would last for ever (discount .7), by the soft-optimal policy. With ``lapse`` it takes any
action, each as likely, with some small probability; where it is known which mouse ran (``subjects`` of the model), each
has maps of its own around common ones. An episode is one observation, of the actions given the nodes where they were
taken.

What is determined is ``reward``, recorded less its mean over nodes; maps and their weights share it out by the prior.

    pirl fit models/mouse_labyrinth.py --set num_maps=1 --engine laplace

The data are not part of pirl: the folder mouse_labyrinth, as :func:`pirl.datasets.mouse_labyrinth` describes it, is
looked for where PIRL_DATA says, or give ``--set data=FOLDER``.

Sources: Z. Ashwood, A. Jha and J. Pillow, "Dynamic Inverse Reinforcement Learning for Characterizing Animal Behavior",
NeurIPS 2022; M. Rosenberg et al., "Mice in a labyrinth show rapid learning, sudden insight, and efficient
exploration", eLife 2021.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pirl
from pirl.datasets import labyrinth_transition, mouse_labyrinth

DISCOUNT = 0.7
MAP_SD, SPREAD_SD = 1.0, 0.5

defaults = {
    "num_posterior_predictive": 100,
    "num_prior": 0,
    "laplace": {"num_chains": 1, "num_samples": 500, "num_starts": 1},
    "chees": {"num_chains": 16, "num_warmup": 150, "num_samples": 150},
}
dims = {
    "states": ("episode", "step"),
    "actions": ("episode", "step"),
    "subjects": ("episode",),
    "reward": ("step", "state"),
    "weights": ("step", "map"),
}
labels = {"weights": "weight of the goal map", "reward": "reward, less its mean", "lapse": "probability of a lapse"}


def model(
    mdp: pirl.TabularMDP,
    states: Tensor,
    actions: Tensor,
    num_maps: int = 0,
    drift: float = 0.5,
    lapse: bool = False,
    subjects: Tensor | None = None,
) -> None:
    """Goal maps, how they are weighed over time, and the actions ``[N, T]`` in the states ``[N, T]`` they led to."""
    episodes, steps = states.shape
    log_policy = pirl.soft_policy(mdp, rewards(mdp.num_states, steps, num_maps, drift, subjects).unsqueeze(-1))
    # [subject or 1, step, state, action], of which an episode sees the rows of its subject and its states
    log_policy = log_policy.reshape(-1, *log_policy.shape[-3:]).expand(-1, steps, -1, -1)
    who = torch.zeros_like(states[:, :1]) if subjects is None else subjects.unsqueeze(1)
    log_probability = log_policy[who, torch.arange(steps, device=states.device), states]
    if lapse:
        epsilon = pyro.sample("lapse", dist.Beta(1.0, 19.0))
        random = (epsilon / mdp.num_actions).log()
        log_probability = torch.logaddexp(torch.log1p(-epsilon) + log_probability, random)
    with pyro.plate("episode", episodes):
        pyro.sample("actions", dist.Categorical(logits=log_probability).to_event(1), obs=actions)


def rewards(num_states: int, steps: int, num_maps: int, drift: float, subjects: Tensor | None) -> Tensor:
    """Rewards ``[*subject, step, state]`` from the priors; of one step, if they do not change."""
    shape = [max(num_maps, 1), num_states]
    maps = pyro.sample("maps", dist.Normal(0.0, MAP_SD).expand(shape).to_event(2), infer={"dims": ["map", "state"]})
    if subjects is not None:
        spread = pyro.sample("spread", dist.HalfNormal(SPREAD_SD))
        with pyro.plate("subject", int(subjects.max()) + 1):
            own = dist.Normal(0.0, 1.0).expand(shape).to_event(2)
            maps = maps + spread * pyro.sample("own", own, infer={"dims": ["map", "state"]})
    weights = random_walk(steps, num_maps, drift) if num_maps else maps.new_ones(1, 1)
    reward = weights @ maps
    pyro.deterministic("reward", reward - reward.mean(dim=-1, keepdim=True))
    return reward


def random_walk(steps: int, num_maps: int, drift: float) -> Tensor:
    """Weights ``[step, map]`` that begin at 1, which fixes what the data cannot: the size and sign of a map."""
    noise = dist.Normal(0.0, 1.0).expand([steps - 1, num_maps]).to_event(2)
    moves = drift * pyro.sample("moves", noise, infer={"dims": ["move", "map"]})
    weights = 1.0 + torch.nn.functional.pad(moves.cumsum(dim=-2), (0, 0, 1, 0))
    return pyro.deterministic("weights", weights)


def load(num_maps: int = 0, drift: float = 0.5, lapse: bool = False, data: Path | None = None) -> dict[str, Any]:
    """The paths to learn from; 0 maps are a reward that does not change."""
    training, _ = paths(data)
    return {
        "mdp": pirl.TabularMDP(labyrinth_transition(), 0, DISCOUNT, action_names=("left", "right", "back", "stay")),
        "states": training.states[:, :-1].contiguous(),
        "actions": training.actions.contiguous(),
        "num_maps": num_maps,
        "drift": drift,
        "lapse": lapse,
    }


def paths(data: Path | None = None) -> tuple[pirl.Trajectories, pirl.Trajectories]:
    """Training and validation, from a folder or from where PIRL_DATA says (shared/data beside the repository)."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return mouse_labyrinth(data or Path(os.environ.get("PIRL_DATA") or beside) / "mouse_labyrinth")


if __name__ == "__main__":
    from pirl.cli import fit_module

    fit_module(__file__)
