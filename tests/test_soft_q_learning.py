"""Soft Q-learning from samples against the exact soft policy, whose tables it never sees."""

from __future__ import annotations

import math
import pickle
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import pirl
from pirl.envs import gridworld
from pirl.errors import DiscountError, InvalidRewardError, OptionError, SimulatorError
from pirl.mdp import TabularMDP
from pirl.message_passing import messages
from pirl.simulators import TabularSimulator, log_density, roll_out
from pirl.soft_q_learning import SoftPolicy, SoftQLearner, soft_q_learning

T = 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(slip: float, **options: Any) -> tuple[TabularMDP, Tensor]:
    mdp = gridworld(4, 4, slip=slip, horizon=T, **options)
    return mdp, torch.randn(16, 5, generator=seeded(9), dtype=torch.float64)


def assert_same_policy(learned: Tensor, exact: Tensor, mdp: TabularMDP, tolerance: float = 1e-8) -> None:
    """Where an episode can be at all, and by probabilities of 0 too."""
    torch.testing.assert_close(
        learned[..., mdp.reachable, :], exact[..., mdp.reachable, :], rtol=0, atol=tolerance, equal_nan=False
    )


# ---------------------------------------------------------------------------------------------------- without chance


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"terminal": [(3, 3), (0, 2)]}, {"walls": [(1, 1), (2, 2)]}, {"discount": 0.8}],
    ids=["plain", "terminal", "walls", "discount"],
)
def test_without_slip_the_policy_is_exact_once_all_was_seen(options: dict[str, Any], replay: bool) -> None:
    mdp, reward = grid(0.0, **options)
    policy = soft_q_learning(TabularSimulator(mdp), reward, 300, 10, generator=seeded(), replay=replay)
    pairs = int((mdp.acts & mdp.reachable.unsqueeze(1)).sum())
    assert policy.history[-1].seen == pairs
    assert_same_policy(policy.log_policy, pirl.soft_policy(mdp, reward), mdp)
    exact = messages(mdp, reward, "causal").log_beta[:-1]
    torch.testing.assert_close(policy.values[:, mdp.reachable], exact[:, mdp.reachable], rtol=0, atol=1e-8)
    assert policy.history[-1].change < 1e-8


@pytest.mark.parametrize("prior", ["uniform", "counting"])
def test_masks_and_base_measures_are_respected(prior: str) -> None:
    available = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()
    mdp = oracle.random_mdp(
        4, states=4, actions=3, stochastic=False, horizon=5, available=available, terminal=[3], action_prior=prior
    )
    reward = torch.randn(4, 3, dtype=torch.float64)
    policy = soft_q_learning(TabularSimulator(mdp), reward, 200, 3, generator=seeded())
    assert_same_policy(policy.log_policy, pirl.soft_policy(mdp, reward), mdp)
    assert policy.log_policy.isneginf()[:, ~available & ~mdp.terminal.unsqueeze(1)].all()


def test_rewards_of_states_and_the_stationary_policy() -> None:
    mdp = gridworld(3, 3, slip=0.0, discount=0.9, terminal=[(2, 2)])
    reward = torch.randn(9, 1, dtype=torch.float64)
    learner = SoftQLearner(TabularSimulator(mdp, horizon=20), stationary=True)
    policy = learner.update(reward, 300, seeded())
    assert policy.log_policy.shape == (9, 5) and policy.values.shape == (9,)
    assert_same_policy(policy.log_policy, pirl.soft_policy(mdp, reward), mdp)


# ------------------------------------------------------------------------------------------------------- with chance


def exact_values(table: Tensor, mdp: TabularMDP, reward: Tensor) -> Tensor:
    """V_T(s), differentiable in the table."""
    value = torch.zeros(mdp.num_states, dtype=torch.float64)
    for _ in range(T):
        value = (mdp.log_prior + reward + table @ value).logsumexp(-1)
    return value


def test_errors_are_those_of_the_counts() -> None:
    """First order: Var V(s) = sum over pairs of Var_{s'~P}[dV(s)/dP(s'|pair)] / n(pair), in each of 16 states."""
    mdp, reward = grid(0.1)
    table = mdp.transition
    jacobian = torch.func.jacrev(lambda p: exact_values(p, mdp, reward))(table)
    spread = (table * jacobian**2).sum(-1) - (table * jacobian).sum(-1) ** 2  # [S, S, A]
    exact = exact_values(table, mdp, reward)
    scores = []
    for seed in range(100):
        learner = SoftQLearner(TabularSimulator(mdp), explore=1.0)
        values = learner.update(reward, 1_000, seeded(seed)).values[0]
        scores.append((values - exact) / (spread / learner.visits).sum((1, 2)).sqrt())
    z = torch.stack(scores)
    # The states' squares are correlated: their mean over states has its own spread over seeds.
    mean = (z**2).mean(1)
    assert abs(float(mean.mean()) - 1) < 4 * float(mean.std()) / math.sqrt(len(mean)) + 0.05
    assert float(mean.std()) / math.sqrt(len(mean)) < 0.1
    assert z.mean().abs() < 4 * float(z.mean(1).std()) / math.sqrt(len(z)) + 0.1  # bias is of second order


@pytest.mark.parametrize("replay", [True, False])
def test_four_times_the_samples_halve_the_error(replay: bool) -> None:
    mdp, reward = grid(0.1)
    exact = pirl.soft_policy(mdp, reward)

    def divergence(num_rollouts: int, seed: int) -> float:
        policy = soft_q_learning(
            TabularSimulator(mdp), reward, num_rollouts, 5, generator=seeded(seed), replay=replay
        ).log_policy
        return float((exact.exp() * (exact - policy)).sum(-1).mean())

    few, many = ([divergence(n, seed) for seed in range(20)] for n in (200, 800))
    few_mean, many_mean = (sum(x) / len(x) for x in (few, many))
    # KL is of second order in the error, so a quarter; the band is four standard errors of 20 seeds' mean.
    ratio = few_mean / many_mean
    error = ratio * math.sqrt(
        sum(torch.tensor(x).var().item() / len(x) / m**2 for x, m in ((few, few_mean), (many, many_mean)))
    )
    assert abs(ratio - 4) < 4 * error
    assert error < 0.6
    assert many_mean < 1e-3


def test_online_steps_are_those_of_one_visit_after_another() -> None:
    mdp = TabularMDP(torch.ones(1, 2, 1, dtype=torch.float64), 0, horizon=4)
    reward = torch.randn(1, 2, dtype=torch.float64)
    learner = SoftQLearner(TabularSimulator(mdp), replay=False, explore=1.0)
    following, n = torch.zeros(4, 1, 2, dtype=torch.float64), torch.zeros(2)
    for seed in range(3):
        learner.update(reward, 5, seeded(seed))
        m = learner.visits[0] - n
        value = 0.0
        for k in range(1, 5):
            for a in range(2):
                for visit in range(int(n[a]) + 1, int(n[a] + m[a]) + 1):
                    following[k - 1, 0, a] += (k + 1) / (k + visit) * (value - following[k - 1, 0, a])
            value = float((mdp.log_prior + reward + following[k - 1]).logsumexp(-1))
        n = learner.visits[0]
        following[1:] += 1.0  # as if earlier targets had been wrong
        learner._following[1:] += 1.0
        torch.testing.assert_close(learner._following, following, rtol=0, atol=1e-12)


def test_with_chance_masks_and_terminals_it_converges() -> None:
    available = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()
    mdp = oracle.random_mdp(4, states=4, actions=3, horizon=5, available=available, terminal=[3])
    reward = torch.randn(4, 3, dtype=torch.float64)
    exact = pirl.soft_policy(mdp, reward)
    for replay in (True, False):
        policy = soft_q_learning(TabularSimulator(mdp), reward, 10_000, 5, generator=seeded(), replay=replay)
        assert policy.log_policy.isneginf().equal(exact.isneginf())
        gap = (policy.log_policy - exact).nan_to_num(0.0)
        # 5 k-step means of values that spread by less than 5 over at least 5,000 visits.
        assert gap.abs().max() < 0.2
        assert gap.abs().max() > 1e-6  # it learned from samples


# ------------------------------------------------------------------------------------------------------ going on


def test_a_new_reward_needs_no_new_steps() -> None:
    mdp, reward = grid(0.0)
    simulator = TabularSimulator(mdp)
    learner = SoftQLearner(simulator)
    learner.update(reward, 300, seeded())
    assert learner.visits.gt(0).all()
    steps = simulator.steps_taken
    other = torch.randn(3, 2, 16, 5, dtype=torch.float64)
    torch.testing.assert_close(learner.solve(other), pirl.soft_policy(mdp, other), rtol=0, atol=1e-10)
    assert_same_policy(learner.update(other[0, 0], 0).log_policy, pirl.soft_policy(mdp, other[0, 0]), mdp)
    assert simulator.steps_taken == steps


@pytest.mark.parametrize("replay", [True, False])
def test_learning_follows_a_reward_that_changes(replay: bool) -> None:
    mdp, _ = grid(0.1)
    learner = SoftQLearner(TabularSimulator(mdp), replay=replay)
    rewards = torch.randn(4, 16, 5, dtype=torch.float64)
    for i, reward in enumerate(rewards):
        for _ in range(3):
            learner.update(reward, 2_000, seeded(i))
        gap = (learner.policy.log_policy - pirl.soft_policy(mdp, reward)).abs().mean()
        assert gap < 0.05  # the rewards' policies differ by more than one
    assert (pirl.soft_policy(mdp, rewards[2]) - pirl.soft_policy(mdp, rewards[3])).abs().mean() > 1


def test_steps_are_reported_seeds_reproduce_and_learners_pickle() -> None:
    mdp, reward = grid(0.1, terminal=[(3, 3)])
    policies = []
    for _ in range(2):
        simulator = TabularSimulator(mdp)
        policies.append(soft_q_learning(simulator, reward, 50, 4, generator=seeded(3)))
        assert sum(round_.steps for round_ in policies[-1].history) == simulator.steps_taken
        assert [round_.num_rollouts for round_ in policies[-1].history] == [50] * 4
    assert policies[0].log_policy.equal(policies[1].log_policy)

    learner = SoftQLearner(TabularSimulator(mdp))
    learner.update(reward, 50, seeded())
    twin = pickle.loads(pickle.dumps(learner))
    one, other = (x.update(reward, 50, seeded(1)).log_policy for x in (learner, twin))
    assert one.equal(other)


def test_the_policy_can_be_rolled_out_and_scores_others() -> None:
    mdp, reward = grid(0.0)
    simulator = TabularSimulator(mdp)
    policy = soft_q_learning(simulator, reward, 300, 3, generator=seeded())
    assert isinstance(policy, SoftPolicy)
    rollouts = roll_out(simulator, policy, 4_000, seeded(1))
    torch.testing.assert_close(log_density(policy, rollouts.states, rollouts.actions), rollouts.log_density)
    # Without chance the optimal proposal's weights are constant given the start: V(s_1) is their logarithm.
    base = T * mdp.log_prior[0, 0]
    log_weight = rollouts.returns(reward) + base - rollouts.log_density
    torch.testing.assert_close(log_weight, policy.values[0, rollouts.states[:, 0]], rtol=0, atol=1e-8)


def test_exploration_mixes_the_base_measure_in() -> None:
    mdp, _ = grid(0.0)
    reward = torch.zeros(16, 5, dtype=torch.float64)
    reward[:, 4] = 50.0  # to stay is all that the policy does
    shares = {}
    for explore in (0.0, 0.5):
        learner = SoftQLearner(TabularSimulator(mdp), explore=explore)
        learner.update(reward, 200, seeded())
        before = learner.visits
        learner.update(reward, 2_000, seeded(1))
        tried = learner.visits - before
        shares[explore] = float(tried[:, :4].sum() / tried.sum())
    assert shares[0.0] < 1e-6
    n = 2_000 * T
    assert abs(shares[0.5] - 0.5 * 0.8) < 4 * math.sqrt(0.4 * 0.6 / n)


# ----------------------------------------------------------------------------------------------------------- failures


class Breaking(TabularSimulator):
    """Breaks at the fourth step of whatever is rolled out while ``broken``."""

    broken = False
    calls = 0

    def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.calls += 1
        if self.broken and self.calls % T == 4:
            raise ConnectionError("gone")
        return super().step(states, actions, generator)


@pytest.mark.parametrize("replay", [True, False])
def test_a_simulator_that_breaks_leaves_the_learner_as_it_was(replay: bool) -> None:
    mdp, reward = grid(0.1)
    simulator = Breaking(mdp)
    learner = SoftQLearner(simulator, replay=replay)
    learner.update(reward, 20, seeded())
    policy, kept = learner.policy, pickle.dumps(learner._counts)
    before = learner._following.clone(), learner.visits
    simulator.broken = True
    with pytest.raises(SimulatorError, match="at step 3: ConnectionError: gone") as caught:
        learner.update(2 * reward, 20, seeded())
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert learner.policy is policy and pickle.dumps(learner._counts) == kept
    assert learner._following.equal(before[0]) and learner.visits.equal(before[1])
    simulator.broken, simulator.calls = False, 0
    learner.update(reward, 20, seeded(1))
    assert len(learner.policy.history) == 2


def test_bad_input_is_named() -> None:
    mdp, reward = grid(0.1)
    simulator = TabularSimulator(mdp)
    learner = SoftQLearner(simulator)
    with pytest.raises(OptionError, match="nothing was learned"):
        _ = learner.policy
    for wrong, complaint in (
        (reward[:3], "shape"),
        (reward.expand(2, 16, 5), "solve"),
        (reward.float(), "float32"),
        (reward.index_fill(0, torch.tensor([3]), torch.nan), "state 3, action 0 is NaN"),
    ):
        with pytest.raises(InvalidRewardError, match=complaint):
            learner.update(wrong, 5)
    assert simulator.steps_taken == 0
    with pytest.raises(OptionError, match="num_rollouts"):
        learner.update(reward, -1)
    with pytest.raises(OptionError, match="num_rounds"):
        soft_q_learning(simulator, reward, 5, 0)
    with pytest.raises(OptionError, match="num_rollouts"):
        soft_q_learning(simulator, reward, 0)
    with pytest.raises(OptionError, match="explore"):
        SoftQLearner(simulator, explore=1.1)
    with pytest.raises(OptionError, match="replay"):
        SoftQLearner(simulator, replay=False, stationary=True)
    with pytest.raises(DiscountError, match="below 1"):
        SoftQLearner(simulator, stationary=True)
    with pytest.raises(OptionError, match="keeps no transitions"):
        SoftQLearner(simulator, replay=False).solve(reward)


def test_rows_of_ended_states_do_not_matter() -> None:
    """What stands in the base measure where episodes have ended is nobody's decision."""

    class Own:
        horizon, discount = 5, 1.0
        terminal = torch.tensor([False, False, True])

        def __init__(self, log_prior: Tensor) -> None:
            self.log_prior = log_prior

        def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
            return torch.zeros(num, dtype=torch.long)

        def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return (states + actions).clamp(max=2)

    reward = torch.tensor([[0.1, -0.3], [0.2, 0.4], [1.5, 9.0]]).double()
    log_prior = torch.zeros(3, 2).double()
    transition = torch.zeros(3, 2, 3).double()
    for state in range(3):
        for action in range(2):
            transition[state, action, min(state + action, 2)] = 1.0
    mdp = pirl.TabularMDP(transition, initial=0, horizon=5, terminal=[2], action_prior="counting")
    exact = pirl.soft_policy(mdp, reward, "trajectory")
    for row in ([0.0, 0.0], [0.0, -torch.inf], [-9.0, -0.5]):
        table = log_prior.clone()
        table[2] = torch.tensor(row)
        policy = SoftQLearner(Own(table), reading="trajectory").update(reward, 200, torch.Generator().manual_seed(0))
        assert torch.allclose(policy.log_policy[:, :2], exact[:, :2], atol=1e-12)
