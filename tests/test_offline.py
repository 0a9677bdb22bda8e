"""Offline reward posteriors: what each term of the objective asks for, what is learned, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pirl
from pirl.baselines import cloning
from pirl.envs import gridworld
from pirl.errors import InvalidTrajectoriesError, NonFiniteError, OptionError
from pirl.learning import offline, offline_posterior
from pirl.learning.offline import kl_to_prior, policy_term, td_term
from pirl.simulators import Policy, TabularPolicy, TabularSimulator, roll_out

F64 = torch.float64
QUICK = {"num_steps": 5, "hidden": (8,)}


def cycle(num: int = 12, length: int = 10) -> pirl.Trajectories:
    """Three states in a circle; each has one action that is always taken."""
    states = (torch.arange(num).unsqueeze(1) + torch.arange(length + 1)) % 3
    return pirl.Trajectories(states, torch.tensor([1, 0, 1])[states[:, :-1]])


def circle(num: int = 40, length: int = 11) -> pirl.Trajectories:
    """Three states in a circle, where both actions are taken, one more often: so that Q is known up to a constant."""
    generator = torch.Generator().manual_seed(0)
    states = (torch.arange(num).unsqueeze(1) + torch.arange(length + 1)) % 3
    often = torch.tensor([0.9, 0.6, 0.2])[states[:, :-1]]
    return pirl.Trajectories(states, (torch.rand(num, length, generator=generator) < often).long())


def vectors(dtype: torch.dtype = F64) -> pirl.ContinuousTrajectories:
    states = torch.randn(4, 7, 2, dtype=F64) * torch.tensor([1e-3, 50.0], dtype=F64) + 7.0
    return pirl.ContinuousTrajectories(states, (states[:, :-1, 0] > 7).long(), torch.tensor([6, 3, 0, 1]), dtype=dtype)


def value(found: offline.OfflinePosterior, states: Tensor, actions: Tensor) -> Tensor:
    q = offline._forward(found._q, found._embed(states))
    return q.gather(-1, actions.unsqueeze(-1)).squeeze(-1).double()


# ------------------------------------------------------------------------------------------------ terms


def test_terms_are_those_of_torch_distributions() -> None:
    mean, sd, now, after = torch.randn(4, 50, dtype=F64)
    sd = sd.exp()
    normal = torch.distributions.Normal(mean, sd)
    prior = torch.distributions.Normal(torch.zeros((), dtype=F64), torch.tensor(0.7, dtype=F64))
    torch.testing.assert_close(kl_to_prior(mean, sd, 0.7), torch.distributions.kl_divergence(normal, prior))
    torch.testing.assert_close(td_term(mean, sd, now, after, 0.9), normal.log_prob(now - 0.9 * after))


def test_the_policy_term_pulls_towards_the_action_taken() -> None:
    q = torch.randn(6, 3, dtype=F64, requires_grad=True)
    actions = torch.tensor([0, 1, 2, 2, 1, 0])
    policy_term(q, actions, temperature=0.5).sum().backward()
    taken = torch.nn.functional.one_hot(actions, 3)
    torch.testing.assert_close(q.grad, 2.0 * (taken - torch.softmax(2.0 * q.detach(), -1)))


@pytest.mark.parametrize(("discount", "weight", "scale"), [(0.0, 0.5, 0.8), (0.0, 1.0, 5.0), (0.7, 0.5, 0.5)])
def test_the_reward_is_what_q_loses_in_a_discounted_step(discount: float, weight: float, scale: float) -> None:
    """A best mean and sd have slope 0: with TD = Q - discount Q', e = TD - mean, pull = weight * scale^2, and a weight
    that is less by the share of decisions that none follows,

    mean (pull + sd^2) = pull E[TD], which is Q itself at discount 0 if the prior is wide, and
    sd^2 = scale^2 (1 - weight + weight E[e^2] / sd^2).
    """
    demos = circle()
    found = offline_posterior(
        demos, 2, num_states=3, discount=discount, td_weight=weight, prior_scale=scale, num_steps=800, batch_size=10**4,
        hidden=(32,), learning_rate=5e-3,
    )  # fmt: skip
    states, actions = demos.states[:, :11], demos.actions[:, :11]
    q, (mean, sd) = value(found, states, actions), found.reward(states, actions)
    now, here = (states * 2 + actions)[:, :-1].flatten(), slice(None, -1)

    def by_pair(x: Tensor) -> Tensor:
        """Means over the steps that another follows."""
        return torch.zeros(6, dtype=F64).index_add(0, now, x.flatten()) / torch.bincount(now, minlength=6)

    td = q[:, :-1] - discount * q[:, 1:]
    weights = weight * torch.bincount(now, minlength=6) / torch.bincount((states * 2 + actions).flatten(), minlength=6)
    pull = weights * scale**2
    expected = pull * by_pair(td) / (pull + by_pair(sd[:, here] ** 2))
    assert float((by_pair(mean[:, here]) - expected).abs().max()) < 0.05
    assert float((by_pair(q[:, here]) - by_pair(mean[:, here])).abs().max()) < 0.05 or scale != 5.0

    def departure(td: Tensor) -> float:
        ratio = by_pair((td - mean[:, here]) ** 2) / by_pair(sd[:, here] ** 2)
        return float((by_pair(sd[:, here] ** 2) / (scale**2 * (1 - weights + weights * ratio)) - 1).abs().max())

    assert weight == 1.0 or departure(td) < 0.03
    # Of another discount it is not the law: the test could tell.
    assert departure(q[:, :-1] - (0.7 - discount) * q[:, 1:]) > 0.06


def test_without_a_td_term_the_reward_is_the_prior() -> None:
    found = offline_posterior(cycle(), 2, num_states=3, td_weight=0.0, prior_scale=2.0, num_steps=1000)
    mean, sd = found.reward(torch.arange(3), torch.tensor([1, 0, 1]))
    torch.testing.assert_close(mean, torch.zeros(3, dtype=F64), rtol=0, atol=0.02)
    torch.testing.assert_close(sd, torch.full((3,), 2.0, dtype=F64), rtol=0, atol=0.02)


def test_only_what_follows_or_terminates_has_a_td_term() -> None:
    """A single decision says nothing of its reward, unless the episode terminated there: then Q' is 0."""

    def law(ends: Any) -> tuple[Tensor, Tensor]:
        demos = pirl.Trajectories([[0, 1]] * 10, [[1]] * 9 + [[0]], ends=ends)
        found = offline_posterior(demos, 2, num_states=2, prior_scale=5.0, num_steps=1000, hidden=(16,))
        pair = (torch.zeros(2).long(), torch.tensor([0, 1]))
        return found.reward(*pair)[0], value(found, *pair)

    mean, q = law("truncated")
    assert float(mean.abs().max()) < 0.1 and float(q[1] - q[0]) == pytest.approx(math.log(9), abs=0.1)
    mean, q = law("terminated")
    assert float((mean - q).abs().max()) < 0.1 and float(q[1] - q[0]) > 1
    tables = [
        offline._decisions(vectors(), 2, None, terminated) for terminated in (None, True, [True, False, True, True])
    ]
    assert [int(x.followed.sum()) for x in tables] == [7, 7, 7]
    assert [int(x.ends.sum()) for x in tables[:2]] == [0, 3]


def test_a_reward_of_states_is_the_same_for_every_action() -> None:
    found = offline_posterior(vectors(), 2, state_reward=True, **QUICK)
    states = torch.randn(5, 2, dtype=F64)
    torch.testing.assert_close(found.reward(states, torch.zeros(5)), found.reward(states, torch.ones(5)))
    other = offline_posterior(vectors(), 2, **QUICK)
    assert bool((other.reward(states, torch.zeros(5))[0] != other.reward(states, torch.ones(5))[0]).all())


# ------------------------------------------------------------------------------------------------ what is learned


def test_of_a_tabular_world_it_learns_the_policy_that_cloning_learns() -> None:
    mdp = gridworld(3, 3, slip=0.1, horizon=10)
    reward = torch.zeros(9, 1, dtype=F64)
    reward[8] = 2.0
    expert = TabularPolicy(pirl.soft_policy(mdp, reward)[0])

    def decisions(num: int, seed: int) -> pirl.Trajectories:
        return roll_out(TabularSimulator(mdp), expert, num, torch.Generator().manual_seed(seed)).trajectories()

    demos, unseen = decisions(300, 1), decisions(300, 2)
    states, actions = unseen.states[:, :-1], unseen.actions[:, :10]
    options = {"num_states": 9, "batch_size": 256, "num_steps": 500, "hidden": (32,), "learning_rate": 3e-3}
    found = {weight: offline_posterior(demos, 5, td_weight=weight, **options) for weight in (1.0, 0.1)}
    policies = {weight: x.log_policy(torch.arange(9)) for weight, x in found.items()}
    score = {weight: float(policy[states, actions].mean()) for weight, policy in policies.items()}
    cloned = float(cloning(demos, mdp).log_policy[states, actions].mean())
    # The TD term costs fit: measured 0.12 nats a decision at the default weight, of the 0.55 that are to be had.
    assert cloned > -math.log(5) + 0.5
    assert score[1.0] > -math.log(5) + 0.3
    assert score[0.1] == pytest.approx(cloned, abs=0.01)
    chosen = found[1.0].log_prob(states[:, 0], actions[:, 0], 3)
    torch.testing.assert_close(chosen, policies[1.0][states[:, 0], actions[:, 0]])


@pytest.mark.slow
def test_cartpole_is_balanced_after_three_demonstrations(data_folder: Path) -> None:
    pytest.importorskip("gymnasium")
    from tests.benchmarks.offline_cartpole import Greedy, play

    demos = pirl.ContinuousTrajectories.from_npz(data_folder / "imitation_rollouts" / "cartpole_0.npz")
    found = offline_posterior(demos[:3], 2)
    # Measured: about 470, as the demonstrations themselves. A random policy has about 22.
    assert play(Greedy(found), 10) > 150


# ------------------------------------------------------------------------------------------------ the interface


def test_it_is_a_policy_and_answers_in_any_shape() -> None:
    found = offline_posterior(vectors(), 2, **QUICK)
    assert isinstance(found, Policy)
    states = torch.randn(3, 4, 2, dtype=F64)
    log_policy = found.log_policy(states)
    torch.testing.assert_close(log_policy.exp().sum(-1), torch.ones(3, 4, dtype=F64))
    assert bool((found.greedy(states) == log_policy.argmax(-1)).all())
    chosen = found.sample(states[0, :1].expand(20_000, 2), 0, torch.Generator().manual_seed(0))
    share, truth = float(chosen.double().mean()), float(log_policy[0, 0, 1].exp())
    assert abs(share - truth) < 4 * (0.25 / 20_000) ** 0.5
    mean, sd = found.reward(states, torch.ones(3, 4, 1))
    draws = found.reward_draws(states, torch.ones(3, 4), 20_000, torch.Generator().manual_seed(0))
    assert draws.shape == (20_000, 3, 4) and bool((sd > 0).all())
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 5 / 20_000**0.5
    assert float((draws.std(0) / sd - 1).abs().max()) < 5 / 40_000**0.5
    history = found.history
    torch.testing.assert_close(history["objective"], history["policy"] - history["kl"] + history["td"])
    assert history["objective"].shape == (5,)


def test_units_of_states_do_not_matter() -> None:
    demos = vectors()
    units = torch.tensor([1000.0, 0.01], dtype=F64)
    other = pirl.ContinuousTrajectories(demos.states * units - 3.0, demos.actions, demos.lengths)
    states = demos.states[0]
    one = offline_posterior(demos, 2, **QUICK).log_policy(states)
    two = offline_posterior(other, 2, **QUICK).log_policy(states * units - 3.0)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)  # float32


def test_seeds_reproduce_and_nothing_global_moves() -> None:
    demos, states = vectors(), torch.randn(6, 2, dtype=F64)
    before = torch.get_rng_state()
    one, again, other = (offline_posterior(demos, 2, batch_size=4, seed=seed, **QUICK) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before) and torch.get_default_dtype() == torch.float32
    assert torch.equal(one.log_policy(states), again.log_policy(states))
    assert not torch.equal(one.log_policy(states), other.log_policy(states))
    torch.set_default_dtype(F64)
    try:
        third = offline_posterior(demos, 2, batch_size=4, seed=1, **QUICK)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(one.log_policy(states), third.log_policy(states))
    assert one.log_policy(states).dtype == F64
    assert offline_posterior(vectors(torch.float32), 2, **QUICK).log_policy(states).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"discount": math.nan}, "discount is nan"),
        ({"discount": 1.1}, "discount is 1.1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"td_weight": math.inf}, "td_weight is inf"),
        ({"td_weight": math.nan}, "td_weight is nan"),
        ({"prior_scale": math.nan}, "prior_scale is nan"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"hidden": (8, 0)}, "hidden is 0"),
        ({"num_states": 3}, "num_states is 3"),
        ({"terminated": [True]}, "expected one bool, or 4"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        offline_posterior(vectors(), 2, **options)


def test_bad_demonstrations_are_named() -> None:
    demos = vectors()
    states, actions = demos.states, demos.actions.clone()
    actions[0, 2, 0] = 0.5
    with pytest.raises(
        InvalidTrajectoriesError, match="trajectory 0, step 2: action 0.5 is no whole number from 0 to 1"
    ):
        offline_posterior(pirl.ContinuousTrajectories(states, actions), 2)
    with pytest.raises(InvalidTrajectoriesError, match="action 1 is no whole number from 0 to 0"):
        offline_posterior(demos, 1)
    with pytest.raises(InvalidTrajectoriesError, match="vectors of size 2"):
        offline_posterior(pirl.ContinuousTrajectories(states, actions.expand(-1, -1, 2)), 2)
    with pytest.raises(InvalidTrajectoriesError, match="no decision"):
        offline_posterior(pirl.ContinuousTrajectories(states, demos.actions, torch.zeros(4)), 2)
    with pytest.raises(OptionError, match="num_states is None"):
        offline_posterior(cycle(), 2)
    with pytest.raises(InvalidTrajectoriesError, match="states must be whole numbers from 0 to 1"):
        offline_posterior(cycle(), 2, num_states=2)
    found = offline_posterior(demos, 2, **QUICK)
    with pytest.raises(InvalidTrajectoriesError, match="actions must be whole numbers from 0 to 1"):
        found.reward(states[:, 0], torch.full((4,), 2))
    with pytest.raises(InvalidTrajectoriesError, match="expected vectors of size 2"):
        found.log_policy(torch.zeros(3, dtype=F64))
    with pytest.raises(NonFiniteError, match="lower learning_rate"):
        offline_posterior(demos, 2, learning_rate=1e30, num_steps=20)
