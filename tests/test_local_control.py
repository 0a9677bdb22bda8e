"""Fitted linear-Gaussian control against the exact soft-optimal policy, and the posterior that it leads to."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pirl
from models import linear_gaussian as puck
from pirl.convergence import ess_bulk
from pirl.errors import InvalidPolicyError, InvalidRewardError, OptionError
from pirl.gaussian_integrals import Quadratic
from pirl.learning import bayesian_guided_cost
from pirl.linear_gaussian import LinearGaussian, QuadraticReward
from pirl.local_control import LocalLearner, LocalPolicy, _concave, gaussian_base
from pirl.particles import ValuedPolicy


def system(noise: float = 0.1, horizon: int = 5) -> tuple[LinearGaussian, QuadraticReward]:
    """Two positions, one push that turns, a base policy that pulls back, costs and slopes."""
    one = torch.eye(2).double()
    dynamics = LinearGaussian(
        torch.tensor([[1.0, 0.3], [-0.2, 0.9]]).double(), torch.tensor([[0.5], [1.0]]).double(), noise * one,
        torch.tensor([1.0, -0.5]).double(), 0.3 * one, torch.tensor([[1.5]]).double(), horizon,
        torch.tensor([[-0.1, -0.2]]).double(),
    )  # fmt: skip
    cost = torch.tensor([[1.0, 0.2], [0.2, 0.5]]).double()
    slopes = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.4]).double()
    return dynamics, dynamics.quadratic(cost, torch.tensor([[0.7]]).double(), *slopes)


def differences(policy: LocalPolicy, exact: Any) -> float:
    parts = (policy.kernel.gain - exact.policy.gain, policy.kernel.offset - exact.policy.offset)
    own = policy.kernel.factor @ policy.kernel.factor.mT - exact.policy.factor @ exact.policy.factor.mT
    states = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = [policy.value(states, t) - exact.values.at(t)(states) for t in range(len(policy.kernel.gain))]
    return max(float(x.abs().max()) for x in (*parts, own, *values))


@pytest.mark.parametrize("reading", ["trajectory", "causal"])
@pytest.mark.parametrize("shared", [False, True])
def test_without_noise_the_policy_is_exact(reading: Any, shared: bool) -> None:
    dynamics, reward = system(noise=0.0)
    learner = LocalLearner(dynamics, dynamics.base_policy, shared=shared, reading=reading)
    policy = learner.update(reward, 60, torch.Generator().manual_seed(0))
    # Regression without noise finds A and B to the ridge, 1e-9.
    assert differences(policy, dynamics.solve(reward, reading)) < 1e-6
    assert isinstance(policy, ValuedPolicy)


@pytest.mark.parametrize("reading", ["trajectory", "causal"])
def test_with_noise_the_error_falls_as_the_root_of_the_number(reading: Any) -> None:
    dynamics, reward = system()
    exact = dynamics.solve(reward, reading)

    def error(number: int) -> float:
        learner = [LocalLearner(dynamics, dynamics.base_policy, reading=reading) for _ in range(8)]
        found = [x.update(reward, number, torch.Generator().manual_seed(s)) for s, x in enumerate(learner)]
        return sum(differences(policy, exact) for policy in found) / len(found)

    few, many = error(200), error(20_000)
    # A hundred times as many: a tenth of the error, here within a factor of two.
    assert 5 < few / many < 20
    # The readings differ, and the learner knows which it learns.
    other = dynamics.solve(reward, "causal" if reading == "trajectory" else "trajectory")
    assert differences(LocalPolicy(exact.policy, _values(exact, dynamics)), other) > 10 * many


def _values(law: Any, dynamics: LinearGaussian) -> Any:
    """The exact values as functions of (s, 1)."""
    matrix = torch.nn.functional.pad(law.values.matrix, (0, 1, 0, 1))
    return type(law.values)(matrix, torch.nn.functional.pad(law.values.vector, (0, 1)), law.values.constant)


def test_a_policy_is_its_density_and_rewards_may_be_anything() -> None:
    dynamics, _ = system()
    learner = LocalLearner(dynamics, gaussian_base(5, torch.eye(1).double(), 2, torch.ones(1).double()), memory=2)

    def ring(states: Tensor, actions: Tensor) -> Tensor:  # curved upwards somewhere: integrals must stay finite
        return (states.norm(dim=-1) - 1).square().clamp_max(4.0) - 0.1 * actions.square().sum(-1)

    for seed in range(4):
        policy = learner.update(ring, 100, torch.Generator().manual_seed(seed))
    states = torch.randn(1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
    density = policy.log_prob(states.expand(len(grid), -1), grid.unsqueeze(1), 2).exp()
    assert abs(float(torch.trapezoid(density, grid)) - 1) < 1e-8
    actions = policy.sample(states.expand(20_000, -1), 2, torch.Generator().manual_seed(2)).flatten()
    mean = float(torch.trapezoid(density * grid, grid))
    assert abs(float(actions.mean()) - mean) < 4 * float(actions.std()) / math.sqrt(20_000)
    assert len(learner._seen) == 2
    # Without rewards the policy is the base policy, its mean included.
    idle = learner.update(lambda s, a: 0 * s[:, 0], 0).kernel
    for found, base in zip(idle, learner.base, strict=True):
        assert torch.allclose(found, base, atol=1e-6)
    # Where a fit curves upwards more than the base policy's tails fall, it is flattened, and there still is a policy.
    steep = learner.update(lambda s, a: 5 * a[:, 0].square().clamp_max(2.0), 0)
    assert all(bool(x.isfinite().all()) for x in (*steep.kernel, *steep.values))


def features(states: Tensor, actions: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 0.1], dtype=states.dtype)
    return -0.5 * torch.cat([(states.square() * weight).sum(-1, keepdim=True), actions.square()], -1)


def sampled_model(demos: pirl.ContinuousTrajectories, pool: pirl.Pool) -> None:
    costs = [pyro.sample(name, dist.Normal(0.0, puck.PRIOR_SD)).exp() for name in puck.TRUE_COSTS]
    with pyro.plate("episode", len(demos)):
        reward = pirl.FeatureReward(features, torch.stack(costs, -1))
        law = pirl.SampledMaxEntTrajectory(pool, reward, lengths=demos.lengths)
        pyro.sample("trajectories", law, obs=demos.as_tensor())


@pytest.mark.slow
def test_bayesian_guided_cost_agrees_with_the_exact_posterior() -> None:
    given = puck.load(num_demos=5, horizon=6)
    dynamics, table = given["system"], given["demos"]
    demos = pirl.ContinuousTrajectories(table[..., :2], table[:, :-1, 2:])
    few: dict[str, Any] = {"num_chains": 16, "num_warmup": 100, "num_samples": 100, "progress": False, "num_prior": 0,
                           "num_posterior_predictive": 0, "log_likelihood": False}  # fmt: skip
    found = bayesian_guided_cost(
        sampled_model, demos, dynamics, base=dynamics.base_policy, num_rollouts=2000, seed=0, **few
    )
    exact = pirl.fit(puck.model, table, dynamics, **few)
    assert found.posterior.attrs["partition_trusted"] == 1
    # What the pool cannot know, sqrt(M / ESS) of a standard deviation, and what the draws cannot.
    pool_error = math.sqrt(len(demos) / found.posterior.attrs["partition_ess"])
    for name in puck.TRUE_COSTS:
        ours, theirs = (torch.from_numpy(x.posterior[name].values.copy()) for x in (found.posterior, exact))
        size = min(float(ess_bulk(x.numpy())) for x in (ours, theirs))
        off = float((ours.mean() - theirs.mean()) / theirs.std())
        assert abs(off) < 3 * pool_error + 4 * math.sqrt(2 / size)
        assert abs(float(ours.std() / theirs.std()) - 1) < 0.15 + 4 * math.sqrt(1 / size)


def test_bad_input_is_named() -> None:
    dynamics, reward = system()
    with pytest.raises(OptionError, match="memory"):
        LocalLearner(dynamics, dynamics.base_policy, memory=0)
    with pytest.raises(InvalidPolicyError, match="3 steps"):
        LocalLearner(dynamics, gaussian_base(3, torch.eye(1).double(), 2))
    learner = LocalLearner(dynamics, dynamics.base_policy)
    with pytest.raises(OptionError, match="at least 2"):
        learner.update(reward, 0)
    with pytest.raises(InvalidRewardError, match="finite"):
        learner.update(lambda states, actions: states[:, 0] / 0.0, 10)
    assert learner.policy is None
    with pytest.raises(OptionError, match="gaussian_base"):
        given = puck.load(num_demos=2)
        table = given["demos"]
        demos = pirl.ContinuousTrajectories(table[..., :2], table[:, :-1, 2:])

        class Wild:
            def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
                return torch.randn(len(states), 1, generator=generator, dtype=states.dtype)

            def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
                return dist.Normal(0.0, 1.0).log_prob(actions).sum(-1)

        bayesian_guided_cost(sampled_model, demos, given["system"], base=Wild())


def test_upward_curvature_is_taken_away_where_the_samples_are() -> None:
    """A reward that curves up far from the origin: clipped, it keeps its value and slope at the samples' mean."""
    fitted = Quadratic(
        torch.diag(torch.tensor([-2.0, 3.0])).double(), torch.tensor([0.5, -1.0]).double(), torch.tensor(0.7).double()
    )
    centre = torch.tensor([4.0, -3.0], dtype=torch.float64, requires_grad=True)
    clipped = _concave(fitted, 1, centre.detach())
    put = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]).double()  # (s, a) as (s, 1, a)
    for point, matters in ((centre, True), (torch.zeros(2).double().requires_grad_(), False)):
        (slope,) = torch.autograd.grad(fitted(point), point)
        (found,) = torch.autograd.grad(clipped(put @ point), point)
        same = torch.allclose(slope, found) and torch.allclose(fitted(point), clipped(put @ point))
        assert same == matters
    assert float(torch.linalg.eigvalsh(clipped.matrix).min()) >= 0
