"""Stable-Baselines3 behind one method: densities, snapshots, the MaxEnt optimum, whose reward counts, and failures."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from pirl.errors import HorizonError, InvalidRewardError, MissingDependencyError, OptionError, SimulatorError
from pirl.simulators import GymSimulator, log_density, roll_out

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("stable_baselines3")

from pirl.stable_baselines import DeepPolicy, StableBaselines, Transitions  # noqa: E402
from pirl.stable_baselines.actions import Actions  # noqa: E402
from pirl.stable_baselines.copies import Rewarded  # noqa: E402

DISCRETE = gymnasium.spaces.Discrete(3)
BOX = gymnasium.spaces.Box(np.array([-3.0], np.float32), np.array([1.0], np.float32))


class Clock(gymnasium.Env):  # type: ignore[misc, name-defined]
    """Two numbers, noise and the time; what it pays is never to be used."""

    def __init__(self, actions: Any = DISCRETE, ends: int | None = None, breaks: int | None = None) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space, self.ends, self.breaks = actions, ends, breaks
        self.time, self.calls = 0, 0

    def look(self) -> Any:
        return np.array([self.np_random.normal(), self.time], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self.look(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action) or isinstance(action, int), action
        assert self.ends is None or self.time < self.ends, "stepped on after its end"
        self.calls += 1
        if self.calls == self.breaks:
            raise ValueError("out of order")
        self.time += 1
        return self.look(), math.nan, self.time == self.ends, False, {}


class Timeless(Clock):
    """Its states do not tell the time, so that the last is as the first."""

    def look(self) -> Any:
        return np.array([self.np_random.normal(), 0], np.float32)


def learner(actions: Any = DISCRETE, horizon: int = 4, ends: int | None = None, **options: Any) -> StableBaselines:
    if options.get("algorithm") != "sac":
        options = {"n_steps": 32, "batch_size": 128, "num_envs": 4, **options}
    return StableBaselines(lambda: Clock(actions, ends), horizon=horizon, **options)


def nothing(states: Tensor, actions: Tensor) -> Tensor:
    return torch.zeros(len(states), dtype=torch.float64)


def tilted(states: Tensor, actions: Tensor) -> Tensor:
    """Grows with the action."""
    return 1.5 * actions.double().reshape(len(states), -1).sum(-1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


KINDS = {"ppo discrete": ("ppo", DISCRETE), "ppo box": ("ppo", BOX), "sac": ("sac", BOX)}


def trained(kind: str) -> tuple[StableBaselines, DeepPolicy]:
    algorithm, actions = KINDS[kind]
    made = learner(actions, algorithm=algorithm, num_envs=4)
    return made, made.improve(tilted, 128)


# ---------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("kind", KINDS)
def test_densities_are_normalised_in_the_environments_units(kind: str) -> None:
    _, policy = trained(kind)
    for state in (torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])):
        if kind == "ppo discrete":
            total = policy.log_prob(state.repeat(3, 1), torch.arange(3)).exp().sum()
            assert abs(float(total) - 1) < 1e-12
            continue
        # The midpoint rule, whose error for a density of bounded slope is of order 1/n^2.
        grid = -3 + 4 * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        density = policy.log_prob(state.expand(len(grid), 2), grid.unsqueeze(1)).exp()
        assert abs(float(density.mean()) * 4 - 1) < 1e-5
        outside = policy.log_prob(state.expand(2, 2), torch.tensor([[-3.1], [1.1]]))
        assert (outside == -torch.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_density(kind: str) -> None:
    _, policy = trained(kind)
    state = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    drawn = policy.sample(state.expand(5000, 2), 0, seeded())
    assert policy.sample(state.expand(5000, 2), 0, seeded()).equal(drawn)
    if kind == "ppo discrete":
        expected = policy.log_prob(state.expand(3, 2), torch.arange(3)).exp() * 5000
        observed = torch.bincount(drawn, minlength=3)
        assert scipy.stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3
        return
    assert (
        drawn.shape == (5000, 1) and drawn.dtype == torch.float64 and float(drawn.min()) > -3 and float(drawn.max()) < 1
    )
    grid = -3 + 4 * torch.arange(20_001, dtype=torch.float64) / 20_000
    middle = (grid[1:] + grid[:-1]) / 2
    density = policy.log_prob(state.expand(20_000, 2), middle.unsqueeze(1)).exp()
    cumulative = np.append(0.0, (density * 4 / 20_000).cumsum(0).numpy())
    found = scipy.stats.kstest(drawn[:, 0].numpy(), lambda x: np.interp(x, grid.numpy(), cumulative))
    assert found.pvalue > 1e-3


def test_several_coordinates_multiply() -> None:
    law = Actions.of(gymnasium.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32)))
    mean, log_scale = torch.tensor([[0.2, -0.4]]).double(), torch.tensor([[0.1, -0.3]]).double()
    parts = [Actions(None, law.centre[i : i + 1], law.half[i : i + 1]) for i in (0, 1)]
    action = law.sample((mean, log_scale), seeded())
    split = [part.log_prob((mean[:, [i]], log_scale[:, [i]]), action[:, [i]]) for i, part in enumerate(parts)]
    torch.testing.assert_close(law.log_prob((mean, log_scale), action), split[0] + split[1])


@pytest.mark.parametrize("kind", KINDS)
def test_roll_outs_keep_the_density_and_old_policies_stay(kind: str) -> None:
    made, policy = trained(kind)
    simulator = GymSimulator(lambda: Clock(KINDS[kind][1]), 4, copies=5)
    rollouts = roll_out(simulator, policy, 20, seeded())
    before = log_density(policy, rollouts.states, rollouts.actions)
    # Single precision in the networks: rounding depends on how many states are seen at once.
    torch.testing.assert_close(before, rollouts.log_density, rtol=0, atol=1e-5)
    later = made.improve(lambda states, actions: -tilted(states, actions), 300)
    torch.testing.assert_close(log_density(policy, rollouts.states, rollouts.actions), before, rtol=0, atol=0)
    assert float((log_density(later, rollouts.states, rollouts.actions) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["ppo discrete", "sac"])
def test_a_seed_says_everything_and_the_programs_generators_are_left_alone(kind: str) -> None:
    states, actions = torch.randn(6, 2, generator=seeded()), torch.zeros(6, 1, dtype=torch.float64)
    numbers = []
    for draws in (0, 3):
        torch.rand(draws), np.random.rand(draws)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        made, _ = trained(kind)
        after = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
        assert before[0].equal(after[0]) and (before[1] == after[1]).all()
        torch.rand(draws), np.random.rand(draws)  # noqa: NPY002
        numbers.append(made.improve(nothing, 100).log_prob(states, actions))
    assert numbers[0].equal(numbers[1])


# ---------------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("actions", [DISCRETE, BOX])
def test_ppo_is_paid_reward_and_entropy_on_one_scale(actions: Any) -> None:
    """(1 - g) (r - alpha log pi) of each decision, pi the policy that played."""
    made = learner(actions, horizon=100, discount=0.9, temperature=0.7)
    made.improve(tilted, 128)
    ((policy, step),) = made.played()
    reward, density = tilted(step.states, step.actions), policy.log_prob(step.states, step.actions)
    expected = 0.1 * (reward - 0.7 * density)
    # The network is in single precision: some roundings of its numbers, and of what is kept.
    error = 32 * torch.finfo(torch.float32).eps * (1 + float(reward.abs().max() + density.abs().max()))
    found = torch.as_tensor(made._model.rollout_buffer.rewards).double().flatten()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * error)


def test_ppo_finds_the_maxent_policy_of_one_decision() -> None:
    # pi is proportional to exp r, at temperature 2 to exp(r/2), whatever the environment pays (NaN).
    values = torch.tensor([0.0, 1.0, -0.5], dtype=torch.float64)
    for temperature in (1.0, 2.0):
        quick = {"learning_rate": 1e-2, "decay_steps": 12_000, "n_epochs": 8, "policy_kwargs": {"net_arch": [8]}}
        made = learner(horizon=1, discount=0.0, temperature=temperature, num_envs=16, batch_size=256, **quick)
        policy = made.improve(lambda states, actions: values[actions], 12_000)
        states = torch.randn(200, 2, generator=seeded(), dtype=torch.float64)
        states[:, 1] = 0
        found = torch.stack([policy.log_prob(states, torch.full((200,), a)) for a in range(3)], 1).exp().mean(0)
        # Relative frequencies of the last thousand decisions have standard errors of 0.5 / sqrt(1000) = 0.016.
        torch.testing.assert_close(found, (values / temperature).softmax(0), rtol=0, atol=4 * 0.016)


@pytest.mark.parametrize("kind", ["ppo box", pytest.param("sac", marks=pytest.mark.slow)])
def test_the_maxent_policy_of_a_number_in_a_range(kind: str) -> None:
    # exp(1.5 a) on [-3, 1]: in units of the range b = (1 - a) / 4, an exponential law of rate 6 cut at 1.
    if kind == "ppo box":
        quick = {"learning_rate": 1e-2, "decay_steps": 10_000, "n_epochs": 4, "policy_kwargs": {"net_arch": [8]}}
        made = learner(BOX, horizon=1, discount=0.0, num_envs=16, batch_size=512, **quick)
        policy = made.improve(tilted, 10_000)
    else:
        made = learner(BOX, horizon=1, algorithm="sac", learning_rate=1e-2, discount=0.0, gradient_steps=1,
                       policy_kwargs={"net_arch": [16]})  # fmt: skip
        policy = made.improve(tilted, 8000)
    states = torch.zeros(20_000, 2, dtype=torch.float64)
    actions = policy.sample(states, 0, seeded())
    mean, entropy = float(actions.mean()), -float(policy.log_prob(states, actions).mean())
    law = scipy.stats.truncexpon(6, scale=1 / 6)
    exact_mean, exact_entropy = 1 - 4 * law.mean(), float(law.entropy()) + math.log(4)
    # A squashed Gaussian is not that law, but comes within 0.02 of its entropy; the rest is noise of learning.
    assert abs(mean - exact_mean) < 0.15 and abs(entropy - exact_entropy) < 0.15


def test_a_time_limit_is_no_end_and_an_end_is() -> None:
    # One action, and 1 a decision: the value of the first state is (1 - g) sum_t g^t, 1 for ever, and 0.49 of 3.
    options = {"discount": 0.8, "learning_rate": 1e-2, "num_envs": 16, "batch_size": 256, "n_epochs": 8}
    for horizon, ends, absorb, expected in ((3, None, True, 1.0), (6, 3, True, 1.0), (6, 3, False, 1 - 0.8**3)):
        one = gymnasium.spaces.Discrete(1)
        make = (lambda one=one: Timeless(one)) if ends is None else (lambda one=one: Clock(one, 3))  # type: ignore[misc]
        made = StableBaselines(make, horizon=horizon, absorb=absorb, n_steps=32, **options)
        made.improve(lambda states, actions: torch.ones(len(states)).double(), 12_000)
        with torch.no_grad():
            value = made._model.policy.predict_values(torch.zeros(1, 2))
        assert abs(float(value) - expected) < 0.05


def test_sac_learns_old_transitions_under_the_reward_of_today() -> None:
    made, _ = trained("sac")
    made.improve(lambda states, actions: 5 + actions[:, 0], 8)
    batch = made._model.replay_buffer.sample(200)
    actions = -1 + 2 * batch.actions[:, 0]  # from [-1, 1]
    torch.testing.assert_close(batch.rewards[:, 0], 5 + actions + math.log(2))  # and density is per unit of that


def test_potentials_telescope_and_end_with_the_episode() -> None:
    paid = Rewarded(Actions.of(DISCRETE), 0.5)
    paid.reward, paid.potential = (lambda states, actions: actions.double()), (lambda states: states[:, 0])
    step = Transitions(
        torch.tensor([[1.0], [2.0]]).double(), torch.tensor([0, 2]), torch.tensor([[3.0], [5.0]]).double(),
        torch.tensor([False, True]),
    )  # fmt: skip
    torch.testing.assert_close(paid(step), torch.tensor([0 + 1.5 - 1, 2 - 2.0]).double())


# ---------------------------------------------------------------------------------------------------- episodes


@pytest.mark.parametrize("absorb", [True, False])
def test_transitions_are_what_was_played(absorb: bool) -> None:
    made = learner(BOX, horizon=5, ends=3, absorb=absorb)
    made.improve(nothing, 100)
    assert made.steps_taken == made.steps_at_once == 128  # whole batches
    seen = made.transitions()
    assert seen.states.shape == (128, 2) and seen.actions.shape == (128, 1)
    assert float(seen.actions.min()) >= -3 and float(seen.actions.max()) <= 1
    clock, later = seen.states[:, 1], seen.following[:, 1]
    if absorb:
        assert clock.unique().tolist() == [0, 1, 2, 3] and not bool(seen.ended.any())
        still = clock == 3
        assert seen.following[still].equal(seen.states[still])  # the noise as well
        assert int(still.sum()) > int((clock == 0).sum())
    else:
        assert clock.unique().tolist() == [0, 1, 2] and seen.ended.equal(clock == 2)
    playing = clock < 3
    torch.testing.assert_close(later[playing], clock[playing] + 1)
    made.improve(nothing, 1)
    assert made.steps_taken == 256 and len(made.transitions().states) == 128


@pytest.mark.parametrize("kind", ["ppo discrete", "ppo box"])
def test_who_played_is_who_acted_then(kind: str) -> None:
    # Three batches in one call: what PPO wrote down as it acted in the last one is the density of the last player.
    made = learner(KINDS[kind][1])
    made.improve(tilted, 3 * 128)
    played = made.played()
    assert [len(step.states) for _, step in played] == [128] * 3
    together = Transitions(*(torch.cat(field) for field in zip(*(step for _, step in played), strict=True)))
    assert all(a.equal(b) for a, b in zip(together, made.transitions(), strict=True))
    buffer = made._model.rollout_buffer
    acted = torch.as_tensor(buffer.log_probs).flatten().double()  # copy after copy, once learnt from
    policy, step = played[-1]
    order = torch.arange(128).reshape(32, 4).T.flatten()
    if kind == "ppo box":
        acted = acted - made._actions.log_slope(torch.as_tensor(buffer.actions).reshape(128, 1).double())
    # Single precision in the networks.
    torch.testing.assert_close(policy.log_prob(step.states, step.actions)[order], acted, rtol=0, atol=1e-4)
    moved = made.policy.log_prob(step.states, step.actions) - policy.log_prob(step.states, step.actions)
    assert float(moved.abs().max()) > 1e-3


def test_sac_has_a_player_for_each_256_decisions_and_one_before_it_learns() -> None:
    made = learner(BOX, algorithm="sac", num_envs=4, learning_starts=100)
    made.improve(tilted, 100 + 600)
    played = made.played()
    assert [len(step.states) for _, step in played] == [100, 256, 256, 88]
    assert torch.cat([step.states for _, step in played]).equal(made.transitions().states)
    policy, step = played[0]
    assert policy.log_prob(step.states, step.actions, 0).equal(torch.full((100,), -math.log(4), dtype=torch.float64))
    assert policy.log_prob(step.states[:1], torch.tensor([[1.1]]), 0).item() == -math.inf
    drawn = policy.sample(torch.zeros(1000, 2), 0, seeded())
    assert scipy.stats.kstest(drawn[:, 0].numpy(), scipy.stats.uniform(-3, 4).cdf).pvalue > 1e-3
    made.improve(tilted, 8)
    assert [len(step.states) for _, step in made.played()] == [8]


def test_numbers_that_do_not_start_from_zero() -> None:
    made = learner(gymnasium.spaces.Discrete(2, start=5))  # Clock refuses other numbers only of vectors
    made.improve(nothing, 1)
    assert made.transitions().actions.unique().tolist() == [0, 1]
    env = made._played.venv.envs[0]
    assert env._given(1) == 6


# ---------------------------------------------------------------------------------------------------- failures


def test_an_environment_that_fails_is_named_by_its_step_and_learning_goes_on() -> None:
    made = StableBaselines(lambda: Clock(breaks=7), horizon=4, num_envs=1, n_steps=32, batch_size=32)
    with pytest.raises(SimulatorError, match="failed at step 2: ValueError: out of order") as caught:
        made.improve(nothing, 32)
    assert isinstance(caught.value.__cause__, ValueError)
    policy = made.improve(nothing, 32)  # it breaks but once
    assert float(policy.log_prob(torch.zeros(3, 2), torch.arange(3)).exp().sum()) == pytest.approx(1)
    assert made.transitions().states[0, 1] == 0 and len(made.transitions().states) == 32

    class Lost(Clock):
        def look(self) -> Any:
            return np.full(2, np.nan if self.time == 2 else 0, np.float32)

    with pytest.raises(SimulatorError, match=r"step 1: .*not finite"):
        StableBaselines(Lost, horizon=4, n_steps=32).improve(nothing, 32)


@pytest.mark.parametrize("kind", ["ppo discrete", "sac"])
def test_a_reward_that_is_none_is_refused(kind: str) -> None:
    made, _ = trained(kind)
    with pytest.raises(InvalidRewardError, match=r"the reward is nan in state \[.*finite"):
        made.improve(lambda states, actions: nothing(states, actions) / 0, 300)
    with pytest.raises(InvalidRewardError, match=r"expected a tensor \(4,\)|expected a tensor \(256,\)"):
        made.improve(lambda states, actions: states, 300)
    with pytest.raises(InvalidRewardError, match="the potential is inf"):
        made.improve(nothing, 300, potential=lambda states: nothing(states, states) + math.inf)
    assert bool(made.improve(nothing, 128).log_prob(torch.zeros(2, 2), torch.zeros(2, 1)).isfinite().all())


def test_options_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="SAC has no numbered actions"):
        learner(DISCRETE, algorithm="sac")
    with pytest.raises(OptionError, match="'ppo' or 'sac', not 'dqn'"):
        learner(algorithm="dqn")
    with pytest.raises(OptionError, match="bounded Box"):
        learner(gymnasium.spaces.Box(-np.inf, np.inf, (1,)))
    with pytest.raises(OptionError, match="temperature is 0.0"):
        learner(temperature=0.0)
    with pytest.raises(OptionError, match="n_step_s"):
        learner(n_step_s=3)
    with pytest.raises(OptionError, match="gamma is not an option"):
        learner(gamma=0.9)
    with pytest.raises(OptionError, match="num_steps"):
        learner().improve(nothing, 0)
    with pytest.raises(OptionError, match="nothing was played"):
        _ = learner().transitions()
    with pytest.raises(HorizonError, match="give at least 1"):
        StableBaselines(Clock)
    with pytest.raises(HorizonError, match="after 3 decisions, before the horizon 5"):
        limited = gymnasium.wrappers.TimeLimit
        StableBaselines(lambda: limited(Clock(), 3), horizon=5, n_steps=32).improve(nothing, 32)
    assert StableBaselines(lambda: gymnasium.make("CartPole-v1")).horizon == 500
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "pirl.stable_baselines")
    with pytest.raises(MissingDependencyError, match=r"pip install 'pirl\[rl\]'"):
        importlib.import_module("pirl.stable_baselines")
