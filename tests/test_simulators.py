"""Roll-outs: their law, their densities, what they collect, what they cost, and how they fail."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from torch import Tensor

import pirl
import pirl.envs
from pirl.distributions import MaxCausalEntTrajectory
from pirl.errors import (
    HorizonError,
    InvalidPolicyError,
    InvalidRewardError,
    MissingDependencyError,
    OptionError,
    SimulatorError,
    UnavailableActionError,
)
from pirl.mdp import TabularMDP
from pirl.simulators import (
    GymSimulator,
    Rollouts,
    TabularPolicy,
    TabularSimulator,
    base_policy,
    log_base_measure,
    log_density,
    roll_out,
)

PROBLEMS: dict[str, dict[str, Any]] = {
    "stochastic": {"horizon": 3},
    "deterministic": {"horizon": 4, "stochastic": False},
    "terminal": {"horizon": 4, "terminal": [2]},
    "counting": {"horizon": 3, "action_prior": "counting", "terminal": [1]},
    "masked": {"horizon": 4, "available": torch.tensor([[1, 1], [0, 1], [1, 0]]).bool()},
}


def make(name: str) -> tuple[TabularMDP, Tensor, TabularPolicy]:
    mdp = oracle.random_mdp(11, **PROBLEMS[name])
    reward = torch.randn(3, 2, dtype=torch.float64)
    return mdp, reward, TabularPolicy(pirl.soft_policy(mdp, reward))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(rollouts: Rollouts) -> Tensor:
    """As a trajectory distribution writes them: (state, action), a last state (s, -1), padding."""
    actions = torch.nn.functional.pad(rollouts.actions, (0, 1), value=-1)
    return torch.stack([rollouts.states, actions], -1)


def p_value(observed: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square, with rare outcomes as one."""
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0
    assert observed[~kept].sum() == 0
    if kept.sum() == 1:
        return 1.0
    return float(scipy.stats.chisquare(observed[kept], expected[kept] * observed.sum() / expected.sum()).pvalue)


# ---------------------------------------------------------------------------------------------------- law and density


@pytest.mark.parametrize("name", PROBLEMS)
def test_roll_outs_have_the_enumerated_law_and_collect_what_the_enumeration_collects(name: str) -> None:
    mdp, reward, policy = make(name)
    assert mdp.horizon is not None
    rollouts = roll_out(TabularSimulator(mdp), policy, 20_000, seeded())
    paths = list(oracle.paths(mdp, mdp.horizon))
    everything = torch.stack([oracle.as_tensor(path, mdp.horizon + 1) for path in paths])
    expected = MaxCausalEntTrajectory(mdp, reward).log_prob(everything).exp() * 20_000
    number = {tuple(row.flatten().tolist()): i for i, row in enumerate(everything)}
    drawn = [number[tuple(row.flatten().tolist())] for row in table(rollouts)]  # KeyError: an impossible one
    assert p_value(np.bincount(drawn, minlength=len(paths)), expected.numpy()) > 1e-3
    returns = torch.tensor([oracle.reward_sum(paths[i], reward) for i in drawn], dtype=torch.float64)
    torch.testing.assert_close(rollouts.returns(reward), returns, rtol=0, atol=1e-12)
    torch.testing.assert_close(rollouts.returns(torch.stack([reward, 2 * reward]))[1], 2 * returns, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_importance_weights_are_unbiased_for_the_partition_function(name: str) -> None:
    mdp, reward, policy = make(name)
    for proposal in (policy, base_policy(mdp)):
        rollouts = roll_out(TabularSimulator(mdp), proposal, 20_000, seeded(1))
        base = log_base_measure(mdp, rollouts.states, rollouts.actions)
        weight = (rollouts.returns(reward) + base - rollouts.log_density).exp()
        error = float(weight.std()) / math.sqrt(len(weight))
        assert abs(float(weight.mean()) - math.exp(oracle.log_partition(mdp, reward))) < 4 * error + 1e-12
        assert error < 0.05 * float(weight.mean())  # the test can fail


@pytest.mark.parametrize("name", PROBLEMS)
def test_log_density_is_the_sum_by_hand(name: str) -> None:
    mdp, reward, policy = make(name)
    rollouts = roll_out(TabularSimulator(mdp), policy, 50, seeded(2))
    assert mdp.horizon is not None
    by_hand = []
    for states, actions, length in zip(*(x.tolist() for x in rollouts[:2]), rollouts.lengths.tolist(), strict=True):
        exact = [oracle.causal_policy(mdp, reward, mdp.horizon - t)[states[t]][actions[t]] for t in range(length)]
        by_hand.append(math.fsum(exact))
    expected = torch.tensor(by_hand, dtype=torch.float64)
    torch.testing.assert_close(rollouts.log_density, expected, rtol=0, atol=1e-12)
    for lengths in (None, rollouts.lengths):
        again = log_density(policy, rollouts.states, rollouts.actions, lengths)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)


def test_a_terminal_state_takes_no_decision_and_pays_once_if_one_is_left() -> None:
    right = torch.zeros(4, 1, 4, dtype=torch.float64)  # 0 -> 1 -> 2 -> 3, where it ends
    right[[0, 1, 2, 3], 0, [1, 2, 3, 3]] = 1
    reward = torch.tensor([[1.0], [10.0], [100.0], [1000.0]], dtype=torch.float64)
    for start, horizon, collected, length in [
        (0, 5, 1111.0, 3),
        (0, 4, 1111.0, 3),
        (0, 3, 111.0, 3),  # no decision is left
        (2, 5, 1100.0, 1),
        (3, 2, 1000.0, 0),
    ]:
        mdp = TabularMDP(right, start, horizon=horizon, terminal=[3])
        simulator = TabularSimulator(mdp)
        rollouts = roll_out(simulator, base_policy(mdp), 2, seeded())
        assert rollouts.returns(reward).tolist() == [collected] * 2
        assert rollouts.lengths.tolist() == [length] * 2
        assert rollouts.log_density.tolist() == [0.0] * 2
        assert simulator.steps_taken == 2 * length
        path = [*range(start, start + length + 1)]
        assert rollouts.states[0].tolist() == path + [-1] * (horizon - length)
        assert rollouts.actions[0].tolist() == [0] * length + [-1] * (horizon - length)
        demos = rollouts.trajectories()
        demos.validate(mdp)
        assert set(demos.ends) == {"terminated" if length < horizon else "truncated"}


@pytest.mark.parametrize("sparse", [False, True])
def test_steps_and_starts_have_the_laws_of_the_tables(sparse: bool) -> None:
    mdp = oracle.random_mdp(5, states=4, actions=3, horizon=2)
    dense = mdp.transition
    if sparse:
        mdp = mdp.replace(transition=dense.reshape(12, 4).to_sparse_coo())
    simulator, draws = TabularSimulator(mdp), 4_000
    state, action = torch.arange(12).repeat(draws) // 3, torch.arange(12).repeat(draws) % 3
    following = simulator.step(state, action, seeded(3))
    assert simulator.steps_taken == 12 * draws
    for s in range(4):
        for a in range(3):
            seen = np.bincount(following[(state == s) & (action == a)], minlength=4)
            assert p_value(seen, dense[s, a].numpy() * draws) > 1e-4
    assert p_value(np.bincount(simulator.reset(draws, seeded(4)), minlength=4), mdp.initial.numpy() * draws) > 1e-4
    assert simulator.steps_taken == 12 * draws


def test_impossible_states_and_actions_are_never_drawn_whatever_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    transition = torch.tensor([[[0.0, 0.3, 0.7, 0.0]]], dtype=torch.float64).expand(4, 1, 4).contiguous()
    mdp = TabularMDP(transition, torch.tensor([0.0, 0.1, 0.9, 0.0], dtype=torch.float64), horizon=1)
    simulator = TabularSimulator(mdp)
    policy = TabularPolicy(torch.tensor([[0.0, 0.3, 0.7, 0.0]], dtype=torch.float64).log())
    for extreme, drawn in ((0.0, 1), (1 - 2**-53, 2), (1.0, 2)):
        monkeypatch.setattr(
            torch, "rand", lambda *size, extreme=extreme, **_: torch.full(_size(size), extreme).double()
        )
        assert simulator.reset(3).tolist() == [drawn] * 3
        assert simulator.step(torch.arange(4), torch.zeros(4).long()).tolist() == [drawn] * 4
        assert policy.sample(torch.zeros(2).long(), 0).tolist() == [drawn] * 2


def _size(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if isinstance(size[0], tuple) else size


def test_steps_are_counted_and_seeds_reproduce() -> None:
    mdp, _, policy = make("terminal")
    simulator = TabularSimulator(mdp)
    first = roll_out(simulator, policy, 300, seeded(7))
    assert simulator.steps_taken == int(first.lengths.sum()) < 300 * 4
    second = roll_out(simulator, policy, 300, seeded(7))
    assert simulator.steps_taken == 2 * int(first.lengths.sum())
    for one, other in zip(first[:4], second[:4], strict=True):
        assert one.equal(other)
    assert not roll_out(simulator, policy, 300, seeded(8)).states.equal(first.states)
    torch.manual_seed(3)
    without = roll_out(simulator, policy, 300)
    torch.manual_seed(3)
    assert roll_out(simulator, policy, 300).states.equal(without.states)


def test_a_simulator_has_its_own_horizon_and_samples_the_base_measure() -> None:
    mdp = oracle.random_mdp(1, discount=0.9, available=torch.tensor([[1, 1], [0, 1], [1, 0]]).bool())
    with pytest.raises(HorizonError, match="horizon="):
        TabularSimulator(mdp)
    with pytest.raises(HorizonError, match="at least 1"):
        TabularSimulator(mdp, horizon=0)
    simulator = TabularSimulator(mdp, horizon=6)
    assert roll_out(simulator, base_policy(simulator), 4).states.shape == (4, 7)
    drawn = simulator.sample_actions(torch.tensor([0, 1, 2]).repeat(4_000), seeded()).reshape(-1, 3)
    assert drawn[:, 1].eq(1).all() and drawn[:, 2].eq(0).all()
    assert abs(float(drawn[:, 0].double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(4_000)


# -------------------------------------------------------------------------------------------------------- own kinds


class Walk:
    """A random walk in the plane, which may fail in several ways; it ends beyond ``edge``."""

    def __init__(self, fault: str = "", edge: float = math.inf) -> None:
        self.horizon, self.fault, self.edge, self.calls = 6, fault, edge, 0

    def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        if self.fault == "reset":
            raise OSError("no such world\nand more")
        if self.fault == "flat":
            return torch.zeros(num, dtype=torch.float64)
        return torch.zeros(num, 2, dtype=torch.float64)

    def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Any:
        self.calls += 1
        following = states + actions
        if self.calls == 4:
            if self.fault == "raise":
                raise RuntimeError("the world broke")
            if self.fault == "nan":
                following[1, 0] = torch.nan
            if self.fault == "inf":
                following[1, 0] = torch.inf
            if self.fault == "fewer":
                return following[:-1]
            if self.fault == "type":
                return following.float()
            if self.fault == "list":
                return following.tolist()
        return following

    def is_terminal(self, states: Tensor) -> Tensor:
        return states[:, 0].abs() > self.edge


class Gauss:
    """Normal steps; ``fault`` spoils what it gives at step 2."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        drawn = torch.randn(states.shape, generator=generator, dtype=states.dtype)
        if step == 2 and self.fault == "nan":
            drawn[0] = torch.nan
        return drawn[:-1] if step == 2 and self.fault == "fewer" else drawn

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
        density = torch.distributions.Normal(0.0, 1.0).log_prob(actions).sum(-1)
        return density - torch.inf if step == 2 and self.fault == "impossible" else density


@pytest.mark.parametrize(
    ("ends", "terminal", "following", "complaint"),
    [
        (lambda states: False, None, 1, r"reset: TypeError: is_terminal gave a bool; expected a bool tensor \(4,\)"),
        (lambda states: np.zeros(4, bool), None, 1, "reset: TypeError: is_terminal gave an ndarray"),
        (lambda states: torch.zeros(4).long(), None, 1, "reset: TypeError: is_terminal gave a Tensor torch.int64"),
        (
            lambda states: states == 1,
            [False] * 3,
            1,
            r"step 0: ValueError: is_terminal\(1\) is True, and",
        ),
        (None, [False] * 3, 3, "step 0: ValueError: state 3 of episode 0 is out of range, of 3 states"),
    ],
)
def test_what_a_finite_simulator_says_of_ends_and_states_is_looked_at(
    ends: Any, terminal: Any, following: int, complaint: str
) -> None:
    class Own:
        horizon, log_prior = 2, torch.zeros(3, 1)

        def reset(self, num: int, generator: torch.Generator | None = None) -> Tensor:
            return torch.zeros(num, dtype=torch.long)

        def step(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.full_like(states, following)

    own: Any = Own()
    if ends is not None:
        own.is_terminal = ends
    if terminal is not None:
        own.terminal = torch.tensor(terminal)
    with pytest.raises(SimulatorError, match=f"the simulator failed at {complaint}"):
        roll_out(own, TabularPolicy(torch.zeros(3, 1)), 4, seeded())
    # A mask by itself is enough.
    del own.__dict__["is_terminal" if ends is not None else "terminal"]
    own.terminal, Own.step = torch.tensor([False, True, False]), lambda self, s, a, g=None: s + 1  # type: ignore[assignment,method-assign,misc]
    assert roll_out(own, TabularPolicy(torch.zeros(3, 1)), 4, seeded()).lengths.tolist() == [1] * 4


def test_vector_states_and_actions_and_ends() -> None:
    rollouts = roll_out(Walk(), Gauss(), 5, seeded())
    assert rollouts.states.shape == (5, 7, 2) and rollouts.actions.shape == (5, 6, 2)
    torch.testing.assert_close(rollouts.states[:, 1:], rollouts.actions.cumsum(1))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(rollouts.actions).sum((1, 2))
    torch.testing.assert_close(rollouts.log_density, expected)
    torch.testing.assert_close(log_density(Gauss(), rollouts.states, rollouts.actions), expected)
    assert rollouts.pairs()[2].all()

    ending = roll_out(Walk(edge=1.0), Gauss(), 200, seeded())
    assert len(ending.lengths.unique()) > 3
    for states, actions, length in zip(*ending[:2], ending.lengths.tolist(), strict=True):
        assert (states[:length, 0].abs() <= 1).all()
        assert length == 6 or states[length, 0].abs() > 1
        assert states[length:].eq(states[length]).all() and actions[length:].eq(0).all()
    assert ending.pairs()[2].sum(1).equal(ending.lengths)
    with pytest.raises(InvalidRewardError, match="pairs"):
        ending.returns(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("fault", "complaint", "cause"),
    [
        ("reset", "at reset: OSError: no such world$", OSError),
        ("flat", r"at reset: .*\(5,\); expected vectors, \[5, 1\] of one number$", ValueError),
        ("raise", "at step 3: RuntimeError: the world broke$", RuntimeError),
        ("nan", "at step 3: .*nan.*episode 1", ValueError),
        ("inf", "at step 3: .*inf.*episode 1", ValueError),
        ("fewer", r"at step 3: .*expected torch.float64 \(5, 2\)", ValueError),
        ("type", "at step 3: .*float32.*float64", ValueError),
        ("list", "at step 3: .*tensor, not list", TypeError),
    ],
)
def test_a_failing_simulator_is_named_with_the_step(fault: str, complaint: str, cause: type[Exception]) -> None:
    with pytest.raises(SimulatorError, match=complaint) as caught:
        roll_out(Walk(fault), Gauss(), 5, seeded())
    assert isinstance(caught.value.__cause__, cause)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["nan", "fewer", "impossible"])
def test_a_failing_policy_is_named_with_the_step(fault: str) -> None:
    with pytest.raises(InvalidPolicyError, match="at step 2"):
        roll_out(Walk(), Gauss(fault), 5, seeded())


def test_bad_policies_and_numbers_are_refused() -> None:
    mdp, _, _ = make("masked")
    simulator = TabularSimulator(mdp)
    uniform = TabularPolicy(torch.full((3, 2), 0.5, dtype=torch.float64).log())
    with pytest.raises(SimulatorError, match=r"action \d is not available in state \d") as caught:
        roll_out(simulator, uniform, 50, seeded())
    assert isinstance(caught.value.__cause__, UnavailableActionError)
    for number in (0, -1):
        with pytest.raises(OptionError, match="num is"):
            roll_out(simulator, base_policy(mdp), number)
    with pytest.raises(HorizonError, match="3 steps, but step 3"):
        roll_out(simulator, TabularPolicy(base_policy(mdp).log_policy.expand(3, 3, 2)), 2)
    with pytest.raises(InvalidPolicyError, match=r"\[1\] has probabilities that sum to 0.75"):
        TabularPolicy(torch.tensor([[0.5, 0.5], [0.5, 0.25]]).log())
    for wrong in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), torch.nan)):
        with pytest.raises(InvalidPolicyError, match="log_policy"):
            TabularPolicy(wrong)


# -------------------------------------------------------------------------------------------------------- Gymnasium


class Coin:
    """Left or right."""

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(2, (len(states),), generator=generator)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
        return torch.full((len(states),), -math.log(2), dtype=torch.float64)


class Torque(Gauss):
    """One number, often out of bounds."""

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        return 3 * torch.randn(len(states), 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("absorb", [True, False])
def test_cartpole_is_played_as_gymnasium_plays_it(absorb: bool) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    simulator = GymSimulator("CartPole-v1", horizon=30, absorb=absorb, copies=3)
    assert (simulator.state_size, simulator.num_actions, simulator.action_size) == (4, 2, None)
    rollouts = roll_out(simulator, Coin(), 10, seeded(5))
    assert rollouts.states.shape == (10, 31, 4) and rollouts.actions.shape == (10, 30)
    assert rollouts.rewards is not None
    torch.testing.assert_close(rollouts.log_density, -math.log(2) * rollouts.lengths.double())

    env, steps = gymnasium.make("CartPole-v1"), 0
    seeds = torch.randint(2**31 - 1, (10,), generator=seeded(5)).tolist()
    for i, seed in enumerate(seeds):
        state, _ = env.reset(seed=seed)
        terminated = False
        for t in range(30):
            np.testing.assert_array_equal(rollouts.states[i, t].numpy(), state)
            if not terminated:
                state, reward, terminated, _, _ = env.step(rollouts.actions[i, t].item())
                steps += 1
                assert rollouts.rewards[i, t] == reward
                if terminated and not absorb:
                    assert rollouts.lengths[i] == t + 1
            else:
                assert rollouts.rewards[i, t] == 0
        if not terminated or absorb:
            assert rollouts.lengths[i] == 30
    assert simulator.steps_taken == steps < 300
    again = roll_out(simulator, Coin(), 10, seeded(5))
    assert again.states.equal(rollouts.states) and again.rewards is not None and again.rewards.equal(rollouts.rewards)
    simulator.close()


def test_pendulum_is_given_clipped_actions_and_recorded_ones_keep_their_density() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    given = []

    class Listens(gymnasium.Wrapper):  # type: ignore[misc, name-defined]
        def step(self, action: Any) -> Any:
            given.append(action)
            return super().step(action)

    simulator = GymSimulator(lambda: Listens(gymnasium.make("Pendulum-v1")))
    assert simulator.horizon == 200 and simulator.action_size == 1
    rollouts = roll_out(simulator, Torque(), 2, seeded())
    assert rollouts.states.shape == (2, 201, 3) and rollouts.actions.shape == (2, 200, 1)
    assert rollouts.actions.abs().max() > 2
    expected = rollouts.actions.clamp(-2, 2).float().reshape(-1, 1).numpy()
    np.testing.assert_array_equal(np.stack(given), expected, strict=True)
    density = torch.distributions.Normal(0.0, 1.0).log_prob(rollouts.actions).sum((1, 2))
    torch.testing.assert_close(rollouts.log_density, density)


def test_gymnasium_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    with pytest.raises(OptionError, match="from_gymnasium"):
        GymSimulator("FrozenLake-v1")
    with pytest.raises(OptionError, match="copies"):
        GymSimulator(gymnasium.make("CartPole-v1"), copies=2)
    with pytest.raises(HorizonError, match="horizon"):
        GymSimulator(gymnasium.make("CartPole-v1").unwrapped, horizon=0)

    class Breaks(gymnasium.Wrapper):  # type: ignore[misc, name-defined]
        def step(self, action: Any) -> Any:
            if self.unwrapped.state[0] > 0.01:
                raise ValueError("off the rails")
            return super().step(action)

    class Right(Coin):
        def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
            return torch.ones(len(states)).long()

    broken = GymSimulator(Breaks(gymnasium.make("CartPole-v1", max_episode_steps=40)))
    assert broken.horizon == 40
    with pytest.raises(SimulatorError, match=r"at step \d+: ValueError: off the rails") as caught:
        roll_out(broken, Right(), 5, seeded())
    assert isinstance(caught.value.__cause__, ValueError)
    short = GymSimulator(gymnasium.make("Pendulum-v1", max_episode_steps=5), horizon=9)
    with pytest.raises(SimulatorError, match="time limit came after 5 decisions"):
        roll_out(short, Torque(), 1, seeded())
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pirl\[envs\]'"):
        GymSimulator("CartPole-v1")


def test_returns_take_rewards_of_states_too() -> None:
    mdp = pirl.envs.gridworld(3, 3, slip=0.2, horizon=4)
    rollouts = roll_out(TabularSimulator(mdp), base_policy(mdp), 20)
    by_state = torch.randn(9, 1, dtype=mdp.dtype, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rollouts.returns(by_state), rollouts.returns(by_state.expand(9, mdp.num_actions)))
    for wrong in (by_state[:, 0], by_state[:2]):
        with pytest.raises(InvalidRewardError, match=r"\[\*batch, S, 1\]"):
            rollouts.returns(wrong)


def test_what_is_printed_is_one_line() -> None:
    mdp = pirl.envs.gridworld(3, 3, horizon=4)
    policy = base_policy(mdp)
    rollouts = roll_out(TabularSimulator(mdp), policy, 5, seeded())
    assert repr(policy) == "TabularPolicy(9 states, 5 actions)"
    assert repr(rollouts) == "Rollouts(5 episodes of at most 4 decisions)"
    by_time = TabularPolicy(pirl.soft_policy(mdp, torch.zeros(9, 1).double()))
    assert repr(by_time) == "TabularPolicy(9 states, 5 actions, 4 steps)"
