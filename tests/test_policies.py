"""Acting on draws of a reward: against enumeration of policies, and against each other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracle import random_mdp
from torch import Tensor

import pirl
from pirl import errors
from pirl.planning import discounted_occupancy, optimal_policy
from pirl.policies import bayes_policy, mean_policy, risk_averse_policy

F64 = torch.float64


def draws(count: int, states: int = 3, actions: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, states, actions, dtype=F64, generator=torch.Generator().manual_seed(seed))


def returns(mdp: pirl.TabularMDP, policy: Tensor, rewards: Tensor) -> Tensor:
    value = pirl.policy_value(mdp, policy, rewards)
    return (value if mdp.horizon is None else value[..., 0, :]) @ mdp.initial


def test_mean_policy_is_the_mean() -> None:
    policies = torch.rand(7, 4, 3, 2, dtype=F64).softmax(-1)
    torch.testing.assert_close(mean_policy(policies.log()).exp(), policies.mean(0))


@pytest.mark.parametrize("horizon", [None, 3])
def test_bayes_policy_has_the_largest_expected_return(horizon: int | None) -> None:
    """Among all deterministic policies."""
    mdp = random_mdp(1, horizon=horizon, discount=0.9)
    rewards = draws(20)
    best = returns(mdp, bayes_policy(mdp, rewards), rewards).mean()
    for choice in itertools.product(range(2), repeat=3 * (horizon or 1)):
        policy = (
            torch.nn.functional.one_hot(torch.tensor(choice), 2).to(F64).reshape(*([horizon] if horizon else []), 3, 2)
        )
        assert returns(mdp, policy, rewards).mean() <= best + 1e-10


@pytest.mark.parametrize("horizon", [None, 3])
@pytest.mark.parametrize("of", ["return", "regret"])
@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_the_largest_value_at_risk(horizon: int | None, of: Any, level: float) -> None:
    """It is what the policy attains, and no policy of many, random and optimal ones, attains more."""
    mdp = random_mdp(2, horizon=horizon, discount=0.9, terminal=[2])
    rewards = draws(20)
    best = returns(mdp, optimal_policy(mdp, rewards).policy, rewards) if of == "regret" else torch.zeros(20, dtype=F64)

    def cvar(found: Tensor) -> float:
        return float(found.sort().values[: max(1, round(level * 20))].mean())

    found = risk_averse_policy(mdp, rewards, level=level, of=of)
    attained = returns(mdp, found.policy, rewards) - best
    torch.testing.assert_close(found.returns, attained, rtol=0, atol=1e-8)
    assert cvar(attained) == pytest.approx(found.value, abs=1e-8)
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2) if horizon is None else (3, 3, 2)
    others = [torch.randn(*shape, dtype=F64, generator=generator).mul(3).softmax(-1) for _ in range(200)]
    others += list(optimal_policy(mdp, rewards).policy)
    # Their mixtures too: over occupancies it is concave, and its maximum need not be at a corner.
    assert max(cvar(returns(mdp, other, rewards) - best) for other in others) <= found.value + 1e-8


def test_at_level_one_risk_does_not_matter() -> None:
    mdp = random_mdp(3, discount=0.9)
    rewards = draws(15)
    averse = risk_averse_policy(mdp, rewards, level=1.0)
    assert averse.value == pytest.approx(float(returns(mdp, bayes_policy(mdp, rewards), rewards).mean()), abs=1e-8)


def test_quantiles_beat_those_of_the_other_policies() -> None:
    mdp = random_mdp(4, discount=0.9)
    rewards = draws(30, seed=5)
    for level in (0.05, 0.2, 0.5):
        rank = max(1, round(level * 30)) - 1
        found = risk_averse_policy(mdp, rewards, risk="quantile", level=level)
        attained = returns(mdp, found.policy, rewards).sort().values[rank]
        assert float(attained) == pytest.approx(found.value, abs=1e-8)
        for other in (bayes_policy(mdp, rewards), risk_averse_policy(mdp, rewards, level=level).policy):
            assert returns(mdp, other, rewards).sort().values[rank] <= attained + 1e-8


def test_regret_does_not_see_what_is_not_identified() -> None:
    """Constants and shaping, drawn at will, change returns and no regret."""
    mdp = random_mdp(5, discount=0.8)
    rewards = draws(12)
    potential = 5 * draws(12, actions=1, seed=9)
    following = torch.einsum("sat,dt->dsa", mdp.transition, potential[..., 0])
    shaped = rewards + potential - 0.8 * following
    plain, other = (risk_averse_policy(mdp, r, of="regret", level=0.25) for r in (rewards, shaped))
    assert plain.value == pytest.approx(other.value, abs=1e-8)
    first, second = (risk_averse_policy(mdp, r, level=0.25) for r in (rewards, shaped))
    assert abs(first.value - second.value) > 0.1


def test_unavailable_actions_are_never_taken_and_draws_are_thinned() -> None:
    available = torch.tensor([[True, False], [True, True], [True, True]])
    mdp = random_mdp(6, discount=0.9).replace(available=available)
    rewards = draws(500)
    found = risk_averse_policy(mdp, rewards, max_draws=50)
    assert found.policy[0].tolist() == [1.0, 0.0] and found.returns.shape == (50,)
    torch.testing.assert_close(found.policy.sum(-1), torch.ones(3, dtype=F64))
    assert discounted_occupancy(mdp, found.policy).sum() == pytest.approx(10.0)


@pytest.mark.parametrize(
    "options, words",
    [({"risk": "variance"}, "risk must be"), ({"of": "loss"}, "of must be"), ({"level": 0.0}, "level is 0"),
     ({"max_draws": 0}, "max_draws is 0")],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.OptionError, match=words):
        risk_averse_policy(random_mdp(1, discount=0.9), draws(5), **options)
