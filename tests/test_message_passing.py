"""The lecture's messages against the enumeration of every trajectory, and against each other."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

from pirl.errors import ConvergenceError, DiscountError, DivergenceError
from pirl.mdp import TabularMDP
from pirl.message_passing import log_partition, messages, occupancy, soft_policy

PROBLEMS = {
    "stochastic": {"states": 4, "actions": 3, "horizon": 4},
    "deterministic": {"states": 4, "actions": 3, "horizon": 5, "stochastic": False},
    "terminal": {"states": 4, "actions": 2, "horizon": 6, "terminal": [3]},
    "counting": {"states": 3, "actions": 2, "horizon": 5, "action_prior": "counting"},
    "masked": {"states": 3, "actions": 2, "horizon": 5, "available": torch.tensor([[1, 1], [0, 1], [1, 0]]).bool()},
    "weighted": {
        "states": 3,
        "actions": 2,
        "horizon": 4,
        "action_prior": torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64),
    },
    "one action": {"states": 3, "actions": 1, "horizon": 4},
    "one state": {"states": 1, "actions": 3, "horizon": 4},
    "one step": {"states": 3, "actions": 2, "horizon": 1},
}


def make(name: str, **more: object) -> tuple[TabularMDP, Tensor]:
    mdp = oracle.random_mdp(7, **{**PROBLEMS[name], **more})  # type: ignore[arg-type]
    return mdp, torch.randn(mdp.num_states, mdp.num_actions, dtype=torch.float64)


@pytest.mark.parametrize("name", PROBLEMS)
def test_log_partition_equals_enumeration(name: str) -> None:
    mdp, reward = make(name)
    expected = oracle.log_partition(mdp, reward)
    assert math.isclose(float(log_partition(mdp, reward)), expected, rel_tol=1e-12, abs_tol=1e-12)
    short = mdp.to(dtype=torch.float32)
    assert math.isclose(float(log_partition(short, reward.float())), expected, rel_tol=1e-5, abs_tol=1e-5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_mu_is_the_posterior_of_pairs_given_optimality(name: str) -> None:
    mdp, reward = make(name)
    assert mdp.horizon is not None
    expected = torch.zeros(mdp.horizon, mdp.num_states, mdp.num_actions, dtype=torch.float64)
    for path in oracle.paths(mdp, mdp.horizon):
        weight = path.probability * math.exp(oracle.reward_sum(path, reward))
        for t, (state, action) in enumerate(path.visited):
            expected[t, state, action] += weight
    expected /= math.exp(oracle.log_partition(mdp, reward))
    found = messages(mdp, reward)
    torch.testing.assert_close(found.mu, expected, rtol=1e-12, atol=1e-14)
    # mu sums to P(not absorbed before t | O): 1 without terminal states, never growing with them
    alive = found.mu.sum((1, 2))
    assert (alive.diff() <= 1e-14).all()
    if not mdp.terminal.any():
        torch.testing.assert_close(alive, torch.ones_like(alive), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_alpha_beta_and_mu_fit_together(name: str) -> None:
    """mu = alpha p(a|s) beta / Z, with alpha from its own forward recursion; beta(s) = sum_a p(a|s) beta(s,a)."""
    mdp, reward = make(name)
    m = messages(mdp, reward)
    assert m.log_alpha is not None and m.log_partition is not None
    product = m.log_alpha.unsqueeze(-1) + mdp.log_prior + m.log_beta_action - m.log_partition
    torch.testing.assert_close(product.exp(), m.mu, rtol=1e-12, atol=1e-14)
    summed = torch.logsumexp(mdp.log_prior + m.log_beta_action, -1)
    torch.testing.assert_close(m.log_beta[:-1], summed, rtol=1e-12, atol=1e-12)
    assert (m.log_beta[-1] == 0).all()
    torch.testing.assert_close(soft_policy(mdp, reward, "trajectory").exp().sum(-1), torch.ones_like(summed))


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_of_log_partition_is_occupancy(name: str) -> None:
    mdp, reward = make(name)
    reward.requires_grad_()
    (gradient,) = torch.autograd.grad(log_partition(mdp, reward), reward)
    expected = messages(mdp, reward.detach()).mu.sum(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(occupancy(mdp, reward.detach(), "trajectory"), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("name", PROBLEMS)
def test_causal_policy_equals_the_definition(name: str, discount: float) -> None:
    mdp, reward = make(name, discount=discount)
    assert mdp.horizon is not None
    policy = soft_policy(mdp, reward, "causal")
    for t in range(mdp.horizon):
        expected = torch.tensor(oracle.causal_policy(mdp, reward, mdp.horizon - t), dtype=torch.float64)
        torch.testing.assert_close(policy[t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("discount", [1.0, 0.7])
@pytest.mark.parametrize("name", PROBLEMS)
def test_causal_occupancy_rolls_the_policy_forward(name: str, discount: float) -> None:
    """Discounted visits under the true dynamics; also the gradient of E V(s_1)."""
    mdp, reward = make(name, discount=discount)
    assert mdp.horizon is not None
    policy = soft_policy(mdp, reward, "causal").exp()
    table = mdp.transition.to_dense() * mdp.acts.unsqueeze(-1)
    state, expected = mdp.initial, []
    for t in range(mdp.horizon):
        expected.append(state.unsqueeze(-1) * policy[t])
        state = discount * torch.einsum("sa,sat->t", expected[-1], table)
    found = occupancy(mdp, reward, "causal", per_step=True)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-14)
    reward.requires_grad_()
    value = (mdp.initial * messages(mdp, reward, "causal").log_beta[0]).sum()
    (gradient,) = torch.autograd.grad(value, reward)
    torch.testing.assert_close(gradient, found.sum(0), rtol=1e-10, atol=1e-10)


def test_readings_agree_exactly_where_they_must() -> None:
    """Deterministic dynamics, no discount, one start, one base measure: the same policy and the same values."""
    mdp, reward = make("deterministic", action_prior="counting")
    mdp = mdp.replace(initial=0)
    causal, trajectory = messages(mdp, reward, "causal"), messages(mdp, reward, "trajectory")
    torch.testing.assert_close(causal.log_beta, trajectory.log_beta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(causal.mu, trajectory.mu, rtol=1e-12, atol=1e-14)
    stochastic, reward = make("stochastic")
    assert (messages(stochastic, reward, "causal").mu - messages(stochastic, reward).mu).abs().max() > 0.01


def test_the_trajectory_reading_controls_its_luck() -> None:
    """A sure reward of 1 against a lottery of +3 or -3: chosen with probability .787 and .269."""
    table = torch.zeros(4, 2, 4, dtype=torch.float64)
    table[0, 0, 1] = 1.0
    table[0, 1, 2] = table[0, 1, 3] = 0.5
    mdp = TabularMDP(table, initial=0, horizon=2, terminal=[1, 2, 3])
    reward = torch.tensor([0.0, 1.0, 3.0, -3.0], dtype=torch.float64)
    lottery = math.log(math.cosh(3.0))
    expected = 1 / (1 + math.exp(1.0 - lottery))
    assert math.isclose(float(soft_policy(mdp, reward, "trajectory")[0, 0, 1].exp()), expected, rel_tol=1e-12)
    assert round(expected, 3) == 0.787
    causal = float(soft_policy(mdp, reward, "causal")[0, 0, 1].exp())
    assert math.isclose(causal, 1 / (1 + math.exp(1.0)), rel_tol=1e-12) and round(causal, 3) == 0.269


def test_stationary_messages_are_the_limit_of_finite_ones() -> None:
    """Undiscounted with absorption: all trajectories that can still be alive after 400 steps weigh nothing."""
    mdp = oracle.random_mdp(5, 4, 2, terminal=[3])
    reward = torch.randn(2, 4, 2, dtype=torch.float64) - 1.5
    found, finite = messages(mdp, reward), messages(mdp.replace(horizon=400), reward)
    assert found.log_alpha is not None and finite.log_partition is not None
    torch.testing.assert_close(found.log_partition, finite.log_partition, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.mu, finite.mu.sum(1), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.log_beta, finite.log_beta[:, 0], rtol=1e-12, atol=1e-12)
    product = found.log_alpha.unsqueeze(-1) + mdp.log_prior + found.log_beta_action
    product = (product - found.log_partition[:, None, None]).exp()  # type: ignore[index]
    torch.testing.assert_close(product, found.mu, rtol=1e-12, atol=1e-13)
    causal, causal_finite = messages(mdp, reward, "causal"), messages(mdp.replace(horizon=400), reward, "causal")
    torch.testing.assert_close(causal.mu, causal_finite.mu.sum(1), rtol=1e-11, atol=1e-12)


def test_geometric_stopping_is_absorption_in_one_more_state() -> None:
    """beta = e^r [(1 - g) + g P beta]: stopping is a move to a terminal state of reward 0."""
    mdp = oracle.random_mdp(2, 3, 2, discount=0.8)
    reward = torch.randn(3, 2, dtype=torch.float64) - 1.0
    table = torch.zeros(4, 2, 4, dtype=torch.float64)
    table[:3, :, :3], table[:3, :, 3], table[3, :, 3] = 0.8 * mdp.transition, 0.2, 1.0
    whole = TabularMDP(table, torch.nn.functional.pad(mdp.initial, (0, 1)), terminal=[3])
    padded = torch.nn.functional.pad(reward, (0, 0, 0, 1))
    torch.testing.assert_close(
        log_partition(mdp, reward, stopping="geometric"), log_partition(whole, padded), rtol=1e-12, atol=1e-12
    )
    for terminal in ([], [2]):
        finite = mdp.replace(horizon=4, terminal=terminal)
        expected = oracle.log_partition(finite, reward, stop=0.2)
        assert math.isclose(float(log_partition(finite, reward, stopping="geometric")), expected, rel_tol=1e-12)


def test_the_trajectory_reading_refuses_a_discount() -> None:
    mdp = oracle.random_mdp(2, discount=0.8)
    with pytest.raises(DiscountError, match="stopping='geometric'"):
        log_partition(mdp, torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("stochastic", [True, False])
def test_z_is_finite_exactly_where_the_spectral_radius_is_below_one(stochastic: bool) -> None:
    """3x3 grid, 4 actions, counting measure: r = -1.30 gives rho(M) = 1.04, and a named error."""
    from pirl.envs import gridworld

    slip = 0.1 if stochastic else 0.0
    grid = gridworld(3, 3, slip=slip, stay=False, terminal=[(2, 2)]).replace(action_prior="counting")
    wrong = 0
    for level in torch.linspace(-1.6, -1.0, 25).tolist():
        reward = torch.full((9, 4), level, dtype=torch.float64)
        matrix = math.exp(level) * (grid.transition.to_dense().reshape(9, 4, 9) * grid.acts.unsqueeze(-1)).sum(1)
        radius = float(torch.linalg.eigvals(matrix[:8, :8]).abs().max())
        try:
            assert log_partition(grid, reward).isfinite()
            converged = True
        except DivergenceError:
            converged = False
        wrong += converged != (radius < 1)
    assert wrong == 0


def test_absorbing_causal_values_that_diverge_raise() -> None:
    """One state that an agent may stay in for ever at a gain."""
    table = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    mdp = TabularMDP(table, initial=0, terminal=[1])
    with pytest.raises(ConvergenceError, match="diverge"):
        soft_policy(mdp, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))


def test_log_space_survives_a_thousand_steps() -> None:
    mdp = oracle.random_mdp(4, horizon=1000)
    reward = torch.full((3, 2), -5.0, dtype=torch.float64)
    m = messages(mdp, reward)
    assert math.isclose(float(m.log_partition), -5000.0, rel_tol=1e-12)  # type: ignore[arg-type]
    torch.testing.assert_close(m.mu.sum((1, 2)), torch.ones(1000, dtype=torch.float64), rtol=1e-10, atol=1e-10)
