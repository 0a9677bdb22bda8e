"""Groups of demonstrations that start in given states of their own: a simulator, a policy and a pool for each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pirl
from models import linear_gaussian as puck
from pirl.errors import ModelError, OptionError, SimulatorError
from pirl.learning import guided_pool
from pirl.linear_gaussian import LinearGaussian
from pirl.local_control import gaussian_base
from pirl.simulators import roll_out

TRUTH = (1.0, 0.0)
STARTS = ((1.5, 0.0), (-0.5, 0.5))


def squares(states: Tensor, actions: Tensor) -> Tensor:
    away = (states.square() * torch.tensor([1.0, 0.1], dtype=states.dtype)).sum(-1, keepdim=True)
    return -0.5 * torch.cat([away, actions.square()], -1)


def model(groups: list[pirl.ContinuousTrajectories], pools: list[pirl.Pool]) -> None:
    costs = [pyro.sample(name, dist.Normal(0.0, 1.0)) for name in puck.TRUE_COSTS]
    for number, (demos, pool) in enumerate(zip(groups, pools, strict=True)):
        with pyro.plate(f"episode_{number}", len(demos)):
            reward = pirl.FeatureReward(squares, torch.stack(costs, -1).exp())
            pyro.sample(f"group_{number}", pirl.SampledMaxEntTrajectory(pool, reward), obs=demos.as_tensor())


def first_only(groups: list[pirl.ContinuousTrajectories], pools: list[pirl.Pool]) -> None:
    model(groups[:1], pools[:1])


def problem() -> tuple[list[LinearGaussian], list[pirl.ContinuousTrajectories]]:
    around = puck.puck(6, 0.05)
    systems = [
        dataclasses.replace(
            around,
            initial_mean=torch.tensor(start, dtype=torch.float64),
            initial_covariance=torch.zeros(2, 2, dtype=torch.float64),
        )
        for start in STARTS
    ]
    costs, generator = torch.tensor(TRUTH, dtype=torch.float64), torch.Generator().manual_seed(0)
    seen = [system.sample(puck.costs(system, *costs), 5, generator) for system in systems]
    return systems, [pirl.ContinuousTrajectories(*each) for each in seen]


def test_every_pool_knows_its_own_log_z() -> None:
    """Learned in the first world alone, the second one's pool would have a few dozen effective samples of thousands."""
    systems, groups = problem()
    options: dict[str, Any] = {"num_rollouts": 500, "num_rounds": 6, "progress": False, "seed": 0}
    found = guided_pool(model, groups, systems, base=systems[0].base_policy, **options)
    assert found.history["trusted"][-1] == 1
    costs = torch.tensor(TRUTH, dtype=torch.float64)
    for system, pool in zip(systems, found.pool, strict=True):
        estimate = pirl.SampledMaxEntTrajectory(pool, pirl.FeatureReward(squares, costs.exp())).estimate()
        exact = system.log_partition(puck.costs(system, *costs))
        assert float(estimate.ess) > 500
        assert abs(float(estimate.log_partition - exact)) < 4 * float(estimate.standard_error)


def test_a_base_policy_among_the_models_arguments_is_found() -> None:
    systems, groups = problem()
    with pytest.raises(OptionError, match="needs base=, .*; there is a policy among the model's arguments"):
        guided_pool(model, groups, systems, systems[0].base_policy, progress=False)


def test_a_simulator_of_one_episode_is_told_how_it_is_called() -> None:
    class Single:
        horizon = 3

        def reset(self) -> Tensor:
            return torch.zeros(2)

        def step(self, state: Tensor, action: Tensor) -> Tensor:
            return state

    policy = gaussian_base(3, torch.eye(1), num_state_dims=2)
    with pytest.raises(
        SimulatorError, match=r"failed at reset: TypeError.*called as reset\(num, generator\), and step"
    ):
        roll_out(Single(), policy, 2)  # type: ignore[arg-type]


def test_groups_that_do_not_fit_are_named() -> None:
    systems, groups = problem()
    options: dict[str, Any] = {"base": systems[0].base_policy, "num_rollouts": 20, "progress": False}
    with pytest.raises(ModelError, match="observes nothing with pool 1 of 2: let it observe every group"):
        guided_pool(first_only, groups, systems, **options)
    with pytest.raises(OptionError, match="2 groups of demonstrations, and one simulator: give a list of as many"):
        guided_pool(model, groups, systems[0], **options)
    with pytest.raises(ModelError, match=r"lists of both for several simulators"):
        guided_pool(lambda demos, pool: demos.lengths, groups, systems, **options)
