"""Soft values on a grid against exact ones, the densities of interpolated policies, and the models that use them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pirl
from models import cartpole, pendulum
from pirl import grid_control
from pirl.errors import InvalidRewardError, OptionError
from pirl.grid_control import Actions, Grid, GridLearner, UniformPolicy
from pirl.message_passing import log_policy_to_go
from pirl.particles import ValuedPolicy, tilt
from pirl.simulators import GymSimulator, roll_out
from pirl.soft_values import soft_values


def test_interpolation_is_exact_for_multilinear_functions() -> None:
    grid = Grid([-1.0, 0.0, 2.0], [1.0, 3.0, 4.0], [4, 3, 5])
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(200, 3, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 3.0, 2.0]).double()
    points = points + grid.low
    f = lambda x: 1 + x[:, 0] - 2 * x[:, 1] * x[:, 2] + x.prod(1)  # noqa: E731
    index, share = grid.neighbours(points)
    assert torch.allclose((f(grid.nodes)[index] * share).sum(1), f(points), atol=1e-12)
    assert torch.allclose(share.sum(1), torch.ones(200).double()) and bool((share >= 0).all())
    # Beyond the border as on it.
    index, share = grid.neighbours(torch.tensor([[-9.0, 9.0, 3.0]]).double())
    assert torch.allclose((grid.nodes[index] * share.unsqueeze(2)).sum(1), torch.tensor([[-1.0, 3.0, 3.0]]).double())


def test_angles_wrap() -> None:
    grid = Grid([-math.pi], [math.pi], [8], wraps=[0])
    points = torch.linspace(-9, 9, 101, dtype=torch.float64).unsqueeze(1)
    index, share = grid.neighbours(points)
    for function in (torch.sin, torch.cos):
        found = (function(grid.nodes[:, 0])[index] * share).sum(1)
        # Linear interpolation is off by at most h^2 / 8 times the second derivative, which is at most 1.
        assert float((found - function(points[:, 0])).abs().max()) <= (math.pi / 4) ** 2 / 8 + 1e-12


def test_memory_is_bounded_and_draws_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = learner(41, 9).update(cost)
    states = torch.linspace(-4, 4, 101, dtype=torch.float64).unsqueeze(1)
    sizes, of_nodes = list[int](), policy._log_policy
    monkeypatch.setattr(policy, "_log_policy", lambda step, nodes: sizes.append(len(nodes)) or of_nodes(step, nodes))
    drawn = []
    for largest in (2**22, 2 * 9 * 2 * 10):  # two neighbours, nine actions, two neighbours of each next state
        monkeypatch.setattr(grid_control, "_LARGEST", largest)
        drawn.append(policy.sample(states, 0, torch.Generator().manual_seed(0)))
    assert torch.equal(*drawn) and sizes == [101, *[10] * 10, 1]


class Line:
    """A point on a line that moves by its action, without noise."""

    def __init__(self, horizon: int = 4) -> None:
        self.horizon = horizon

    def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(num, 1, dtype=torch.float64)

    def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return states + 0.5 * actions


def cost(states: Tensor, actions: Tensor) -> Tensor:
    return -((states[..., 0] - 1) ** 2) - 0.1 * actions[..., 0] ** 2


def learner(nodes: int, bins: int) -> GridLearner:
    return GridLearner(Line(), Grid([-5.0], [5.0], [nodes]), Actions(bins, -2.0, 2.0))


def test_values_tend_to_the_integral() -> None:
    # Trapezoids on a grid of actions and states, fine enough that their error is far below what is compared.
    actions, states = torch.linspace(-2, 2, 801, dtype=torch.float64), torch.linspace(-6, 6, 2401, dtype=torch.float64)
    value = torch.zeros_like(states)
    for _ in range(4):
        following = (states.unsqueeze(1) + 0.5 * actions).clamp(-6, 6)
        place = ((following + 6) / 12 * 2400).clamp(0, 2400 - 1e-9)
        below = place.floor().long()
        ahead = value[below] + (place - below) * (value[below + 1] - value[below])
        pair = torch.stack([states.unsqueeze(1).expand_as(ahead), actions.expand_as(ahead)], -1)
        value = torch.trapezoid((cost(pair[..., :1], pair[..., 1:]) + ahead).exp() / 4, actions, dim=1).log()
    exact = float(value[1200])
    errors = []
    for size in (20, 40, 80):
        policy = learner(5 * size + 1, size).update(cost)
        errors.append(abs(float(policy.value(torch.zeros(1, 1).double(), 0)) - exact))
    # Interpolation and midpoints are of second order: half the width, a quarter of the error.
    assert errors[0] < 0.02 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3
    # Particles mend what a coarse grid gets wrong.
    coarse = learner(21, 6)
    policy = coarse.update(cost)
    _, proposal = tilt(Line(), policy, cost, 20_000, torch.Generator().manual_seed(0), base=coarse.base)
    assert abs(proposal.log_partition - exact) < 4 * proposal.standard_error < 0.1


def test_policies_are_those_of_the_soft_values_at_all_nodes() -> None:
    """What is computed where it is asked for is what the message passing of a finite problem gives for all at once."""
    made = learner(11, 6)
    policy = made.update(cost)
    table = cost(made._row_states, made._row_actions).reshape(11, 6)
    dense = log_policy_to_go(table, soft_values(table, made._problem), made._problem).flip(-3)  # [T, S, K]
    nodes = Grid([-5.0], [5.0], [11]).nodes
    for step in range(4):
        for kind, action in enumerate(Actions(6, -2.0, 2.0).middle):
            found = policy.log_prob(nodes, action.expand(11, 1), step) + math.log(4 / 6)
            assert torch.allclose(found, dense[step, :, kind], atol=1e-12)
        between = policy.log_prob(nodes[:-1] + 0.25, action.expand(10, 1), step).exp() * 4 / 6
        assert torch.allclose(between, 0.75 * dense[step, :-1, 5].exp() + 0.25 * dense[step, 1:, 5].exp(), atol=1e-12)


def test_densities_sum_to_one_and_samples_follow_them() -> None:
    policy = learner(41, 8).update(cost)
    assert isinstance(policy, ValuedPolicy)
    state = torch.tensor([[0.13]]).double()
    middle = Actions(8, -2.0, 2.0).middle
    density = policy.log_prob(state.expand(8, -1), middle, 1).exp()
    assert abs(float(density.sum()) * 0.5 - 1) < 1e-12
    drawn = policy.sample(state.expand(40_000, -1), 1, torch.Generator().manual_seed(0))
    count = torch.bincount(Actions(8, -2.0, 2.0).kind(drawn), minlength=8)
    expected = 40_000 * 0.5 * density
    assert float(((count - expected) ** 2 / expected).sum()) < 30  # chi-square of 7 degrees: 1 in 10,000
    # At the last decision nothing lies ahead: the density is that of exp(reward) over the bins, wherever one is.
    last = torch.softmax(cost(torch.zeros(8, 1).double(), middle), 0)
    found = policy.log_prob(state.expand(8, -1), middle, 3).exp() * 0.5
    assert torch.allclose(found, last, atol=1e-10) and not torch.allclose(density * 0.5, last, atol=1e-2)
    within = (drawn[:, 0] + 2) % 0.5 / 0.5
    assert abs(float(within.mean()) - 0.5) < 4 / math.sqrt(12 * 40_000)
    # Actions at the bounds have the density of their bins, those beyond none; the base policy's is 1/4.
    edges = torch.tensor([[-2.0], [2.0], [2.1], [-3.0]]).double()
    found = policy.log_prob(state.expand(4, -1), edges, 1).exp()
    assert torch.allclose(found, torch.stack([density[0], density[-1], 0 * density[0], 0 * density[0]]))
    base = UniformPolicy(Actions(8, -2.0, 2.0))
    assert torch.allclose(base.log_prob(state.expand(4, -1), edges, 0).exp(), torch.tensor([0.25, 0.25, 0, 0]).double())
    numbered = Actions(3)
    assert numbered.kind(torch.tensor([[0.0], [2.0], [0.5], [3.0]]).double()).tolist() == [0, 2, -1, -1]
    assert abs(numbered.log_density + math.log(3)) < 1e-12


@pytest.mark.parametrize(("name", "module"), [("Pendulum-v1", pendulum), ("CartPole-v1", cartpole)])
def test_the_simulators_are_gymnasiums(name: str, module: Any) -> None:
    pytest.importorskip("gymnasium")
    horizon = 30
    gym = GymSimulator(name, horizon=horizon)
    ours = pendulum.Pendulum(torch.zeros(3).double(), horizon) if module is pendulum else cartpole.CartPole(horizon)
    played = roll_out(gym, _Sway(gym.discrete), 3, torch.Generator().manual_seed(0))
    for t in range(horizon):
        alive = played.lengths > t
        if module is cartpole:  # Gymnasium stops when the pole falls, and repeats the state
            alive = alive & (played.states[:, t + 1, 2].abs() < math.radians(12))
        actions = played.actions[alive, t].double().reshape(-1, 1)
        following = ours.step(played.states[alive, t], actions)
        # Gymnasium's observations are of single precision.
        assert torch.allclose(following, played.states[alive, t + 1], atol=2e-5)
    starts = ours.reset(1000, torch.Generator().manual_seed(1))
    if module is cartpole:
        assert float(starts.abs().max()) <= 0.05 and abs(float(starts.mean())) < 4 * 0.029 / math.sqrt(4000)


class _Sway:
    """Pushes to and fro, whatever the state."""

    def __init__(self, discrete: bool) -> None:
        self.discrete = discrete

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        if self.discrete:
            return torch.full((len(states),), step % 2)
        return torch.full((len(states), 1), 3.0 * math.cos(step / 2), dtype=torch.float64)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
        return torch.zeros(len(states), dtype=torch.float64)


@pytest.mark.slow
def test_the_cart_pole_posterior_finds_the_costs_of_its_own_demonstrators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIRL_DATA", raising=False)
    given = cartpole.load(num_demos=20, horizon=30, num_rollouts=1500)
    posterior = pirl.fit(
        cartpole.model, **given, num_chains=8, num_warmup=80, num_samples=80, max_leapfrogs=10, progress=False,
        num_prior=0, num_posterior_predictive=0, log_likelihood=False,
    )  # fmt: skip
    assert posterior.posterior.attrs["partition_trusted"] == 1
    for name, true in cartpole.COSTS.items():
        draws = posterior.posterior[name].values
        low, high = np.quantile(draws, [0.001, 0.999])
        assert low < true < high
    # The prior's standard deviation is 2. In 30 steps the cart hardly leaves its place, whose cost stays unknown.
    assert posterior.posterior["log_tilt_cost"].std() < 0.5


@pytest.mark.slow
def test_the_pendulums_posterior_runs_with_a_pool_for_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIRL_DATA", raising=False)
    given = pendulum.load(num_demos=3, horizon=20, num_rollouts=400)
    assert len(given["pools"]) == len(given["demos"]) == 3
    for demo, pool in zip(given["demos"], given["pools"], strict=True):
        assert torch.equal(pool.states[:, 0], demo.states[:, 0].expand(len(pool), -1))
    posterior = pirl.fit(
        pendulum.model, **given, num_chains=8, num_warmup=60, num_samples=40, max_leapfrogs=10, progress=False,
        num_prior=0, num_posterior_predictive=0, log_likelihood=False,
    )  # fmt: skip
    # Each pool explains one demonstration, and is asked for the samples of one.
    assert posterior.posterior.attrs["partition_demonstrations"] == 1
    assert posterior.posterior.attrs["partition_trusted"] == 1
    assert float(posterior.posterior["log_angle_cost"].std()) < 1.8


def test_bad_input_is_named() -> None:
    with pytest.raises(OptionError, match="is none"):
        Grid([0.0], [0.0], [3])
    with pytest.raises(OptionError, match="at least 2"):
        Grid([0.0], [1.0], [1])
    with pytest.raises(OptionError, match="neither"):
        Actions(3, 0.0)
    with pytest.raises(OptionError, match="draws"):
        GridLearner(Line(), Grid([-5.0], [5.0], [3]), Actions(2), draws=0)
    with pytest.raises(InvalidRewardError, match="node"):
        learner(5, 2).update(lambda states, actions: states[:, 0] / 0)
