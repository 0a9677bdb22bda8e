"""AIRL: the discriminator finds log densities, rewards explain behaviour, and what cannot be is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import pirl
from pirl.baselines import airl
from pirl.baselines.airl import _check_kinds
from pirl.errors import HorizonError, InvalidTrajectoriesError, OptionError

CHANCES = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)
"""What demonstrators do in each of two contexts."""
SMALL: dict[str, Any] = {"hidden": (16,), "updates_per_round": 15}


class Played(NamedTuple):
    states: Tensor
    actions: Tensor
    following: Tensor
    ended: Tensor


class Table:
    """log pi of two contexts, -1 and 1."""

    def __init__(self, log_policy: Tensor) -> None:
        self.log_policy = log_policy

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        chances = self.log_policy[(states[:, 0] > 0).long()].exp()
        return torch.multinomial(chances, 1, generator=generator).squeeze(1)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
        return self.log_policy[(states[:, 0] > 0).long(), actions.long()]


class Exact:
    """A learner of one decision that knows the answer: pi proportional to exp r.

    Or one that never learns ("lazy"); or that learns, but plays as if it did not ("late": it acts before it learns).
    """

    def __init__(self, way: str = "exact", ended: bool = False, beyond: float = 0.0) -> None:
        self.horizon, self.discount, self.num_actions, self.way = 1, 0.9, 3, way
        self.ended, self.beyond = ended, beyond
        self.steps_taken, self.blocks = 0, list[tuple[Any, Played]]()
        self.generator = torch.Generator().manual_seed(1)

    def played(self) -> list[tuple[Any, Played]]:
        return self.blocks

    def improve(
        self,
        reward: Callable[[Tensor, Tensor], Tensor],
        num_steps: int,
        *,
        potential: Callable[[Tensor], Tensor] | None = None,
    ) -> Table:
        contexts = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        with torch.no_grad():
            worth = torch.stack([reward(contexts, torch.full((2,), a)) for a in range(3)], 1)
        policy = Table((0 * worth if self.way == "lazy" else worth).log_softmax(1))
        player = Table((0 * worth).log_softmax(1)) if self.way == "late" else policy
        states = contexts[torch.randint(2, (num_steps,), generator=self.generator)]
        actions = player.sample(states, 0, self.generator)
        ended = torch.full((num_steps,), self.ended)
        following = states + self.beyond
        half = num_steps // 2
        whole = Played(states, actions, following, ended)
        self.blocks = [(player, Played(*(x[part] for x in whole))) for part in (slice(half), slice(half, None))]
        self.steps_taken += num_steps
        return policy


def demonstrations(num: int = 4000) -> pirl.ContinuousTrajectories:
    """Both contexts as often, and actions as often as their chances say: there is no noise in them."""
    often = (CHANCES * num / 2).round().long()
    context, action = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    states = (2.0 * context.flatten() - 1).repeat_interleave(often.flatten())
    actions = action.flatten().repeat_interleave(often.flatten())
    return pirl.ContinuousTrajectories(states.reshape(-1, 1, 1).expand(-1, 2, 1), actions.reshape(-1, 1))


def log_odds(reward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    contexts = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    return torch.stack([reward(contexts, torch.full((2,), a)) for a in range(3)], 1).log_softmax(1)


@pytest.mark.parametrize("way", ["exact", "lazy", "late"])
def test_the_reward_is_the_log_density_of_the_demonstrators(way: str) -> None:
    # f - log pi is the log ratio of densities whatever pi is, so exp f is the demonstrators' policy also where the
    # learner never learns, or where it has learnt since it played: pi is who played. The policy's side has 8192
    # decisions: a log odds of 0.1 and 0.6 has the standard error sqrt(1/410 + 1/2460) = 0.05 (and the discriminator
    # follows the last few rounds, each with its own).
    found = airl(
        demonstrations(), Exact(way), 60 * 1024, steps_per_round=1024, batch_size=1024, learning_rate=3e-3, **SMALL
    )
    torch.testing.assert_close(log_odds(found.reward), CHANCES.log(), rtol=0, atol=4 * 0.05)
    # f itself is normalised: h takes up what r leaves over.
    contexts = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    values = torch.stack([found.reward(contexts, torch.full((2,), a)) for a in range(3)], 1)
    total = (values + (0.9 - 1) * found.potential(contexts).unsqueeze(1)).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(2).double(), rtol=0, atol=4 * 0.05)
    loss = found.history["loss"][-1]
    if way != "exact":
        # Nobody imitates: the loss is that of the best discriminator, 2 log 2 - 2 JS(demonstrators, uniform).
        middle = (CHANCES + 1 / 3) / 2
        best = -((CHANCES * (CHANCES / (2 * middle)).log()).sum(1) + ((1 / 3) * (1 / 3 / (2 * middle)).log()).sum(1))
        assert abs(loss - float(best.mean())) < 0.03
    else:
        assert abs(loss - math.log(4)) < 0.03 and abs(found.history["accuracy"][-1] - 0.5) < 0.05
        exact = -float((CHANCES * CHANCES.log()).sum(1).mean())
        assert abs(found.history["entropy"][-1] - exact) < 0.05
        torch.testing.assert_close(found.policy.log_policy, CHANCES.log(), rtol=0, atol=4 * 0.05)


def test_a_reward_of_states_knows_no_actions_and_penalties_flatten() -> None:
    few = {"num_steps": 20 * 500, "steps_per_round": 500, "batch_size": 256, "learning_rate": 3e-3, **SMALL}
    found = airl(demonstrations(), Exact(), state_only=True, **few)
    torch.testing.assert_close(log_odds(found.reward), torch.full((2, 3), 1 / 3).double().log())
    spread = [
        float(log_odds(airl(demonstrations(), Exact("lazy"), **few, **options).reward).std(1).mean())
        for options in ({}, {"gradient_penalty": 0.3}, {"gradient_penalty": 3.0}, {"weight_decay": 0.1})
    ]
    assert spread[0] > 1.2 * spread[1] > 1.2**2 * spread[2] and spread[0] > 1.2 * spread[3]


def test_what_follows_an_end_counts_for_nothing() -> None:
    few = {"num_steps": 3 * 500, "steps_per_round": 500, "batch_size": 256, "learning_rate": 1e-2, **SMALL}
    ends = [airl(demonstrations(100), Exact("lazy", True, beyond), **few) for beyond in (0.0, 0.7)]
    goes_on = [airl(demonstrations(100), Exact("lazy", False, beyond), **few) for beyond in (0.0, 0.7)]
    assert log_odds(ends[0].reward).equal(log_odds(ends[1].reward))
    assert not log_odds(goes_on[0].reward).equal(log_odds(goes_on[1].reward))


def test_a_seed_says_everything() -> None:
    state = torch.get_rng_state()
    found = [airl(demonstrations(100), Exact(), 3 * 500, steps_per_round=500, seed=seed) for seed in (0, 0, 1)]
    assert torch.get_rng_state().equal(state)
    a, b, c = (log_odds(x.reward) for x in found)
    assert a.equal(b) and not a.equal(c)
    assert found[0].history["environment_steps"] == [500, 1000, 1500] == [500 * i for i in (1, 2, 3)]
    assert found[0].attrs["num_rounds"] == 3 and found[0].attrs["environment_steps"] == 1500
    assert not any(x.requires_grad for x in found[0].reward.parameters())


def test_what_cannot_be_is_refused() -> None:
    demos = demonstrations(100)
    longer = Exact()
    longer.horizon = 2
    with pytest.raises(HorizonError, match="trajectory 0 has 1 decisions, and the learner's episodes 2"):
        airl(demos, longer, 100)
    fewer = Exact()
    fewer.num_actions = 2
    with pytest.raises(InvalidTrajectoriesError, match="whole numbers below 2"):
        airl(demos, fewer, 100)
    for options in ({"num_steps": 0}, {"num_steps": 9, "batch_size": 0}, {"num_steps": 9, "learning_rate": 0.0}):
        with pytest.raises(OptionError, match="at least 1|above 0"):
            airl(demos, Exact(), **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="gradient_penalty is -1.0, but must be a finite number from 0 on"):
        airl(demos, Exact(), 9, gradient_penalty=-1.0)
    with pytest.raises(OptionError, match="replay is 1.0, but must be a finite number from 0 to below 1"):
        airl(demos, Exact(), 9, replay=1.0)

    hot = Exact()
    hot.temperature = 2.0  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="the learner's temperature is 2.0"):
        airl(demos, hot, 100)

    ends = Exact()
    ends.absorb = False  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="absorb=False: where episodes may end, the length"):
        airl(demos, ends, 100)

    class Never(Exact):
        def improve(self, *arguments: Any, **options: Any) -> Table:
            policy = super().improve(*arguments, **options)
            policy.log_policy = torch.tensor([0.5, 0.5, 0.0]).double().log().expand(2, 3)
            return policy

    with pytest.raises(InvalidTrajectoriesError, match="can never take a demonstrated action, 2"):
        airl(demos, Never(), 100)


class Cells(Exact):
    """Numbers from -3 to 1: exp r, constant within each of 100 cells."""

    def __init__(self) -> None:
        super().__init__()
        self.num_actions: int | None = None
        self.worth = torch.zeros(100, dtype=torch.float64)

    def improve(
        self,
        reward: Callable[[Tensor, Tensor], Tensor],
        num_steps: int,
        *,
        potential: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        middle = -3 + 0.04 * (torch.arange(100, dtype=torch.float64) + 0.5)
        with torch.no_grad():
            self.worth = reward(torch.zeros(100, 1).double(), middle.unsqueeze(1)).log_softmax(0)
        cell = torch.multinomial(self.worth.exp(), num_steps, replacement=True, generator=self.generator)
        actions = middle[cell] + 0.04 * (torch.rand(num_steps, generator=self.generator, dtype=torch.float64) - 0.5)
        states = torch.zeros(num_steps, 1, dtype=torch.float64)
        policy = Density(self.worth - math.log(0.04))
        step = Played(states, actions.unsqueeze(1), states, torch.zeros(num_steps, dtype=torch.bool))
        self.blocks = [(policy, step)]
        self.steps_taken += num_steps
        return policy


class Density:
    def __init__(self, table: Tensor) -> None:
        self.table = table

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Tensor:
        return self.table[((actions[:, 0] + 3) / 0.04).long().clamp(0, 99)]

    def sample(self, states: Tensor, step: int, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError


def test_actions_may_be_numbers_in_a_range() -> None:
    # A squashed Gaussian's quantiles: the learner's law, proportional to exp r, comes to have their mean and spread.
    share = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    actions = -1 + 2 * (-0.5 + 0.4 * torch.special.ndtri(share)).tanh()
    demos = pirl.ContinuousTrajectories(torch.zeros(2000, 2, 1), actions.reshape(-1, 1, 1))
    learner = Cells()
    airl(demos, learner, 60 * 1024, steps_per_round=1024, batch_size=1024, learning_rate=3e-3, **SMALL)
    middle = -3 + 0.04 * (torch.arange(100, dtype=torch.float64) + 0.5)
    mean = (learner.worth.exp() * middle).sum()
    sd = (learner.worth.exp() * (middle - mean).square()).sum().sqrt()
    # Of a round's 1024 actions: standard errors 0.6 / sqrt(1024) = 0.02, and of the spread less.
    assert abs(float(mean - actions.mean())) < 4 * 0.02 and abs(float(sd - actions.std())) < 4 * 0.02


def test_ppo_and_the_discriminator_meet() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("stable_baselines3")
    from pirl.stable_baselines import StableBaselines

    class Contexts(gymnasium.Env):  # type: ignore[misc, name-defined]
        observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        action_space = gymnasium.spaces.Discrete(3)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.context = np.array([2 * self.np_random.integers(2) - 1], np.float32)
            return self.context, {}

        def step(self, action: Any) -> Any:
            return self.context, math.nan, False, False, {}

    quick = {"num_envs": 16, "n_steps": 32, "batch_size": 256, "n_epochs": 8, "policy_kwargs": {"net_arch": [8]}}
    learner = StableBaselines(Contexts, horizon=1, discount=0.0, learning_rate=1e-2, decay_steps=30_000, **quick)
    found = airl(demonstrations(1000), learner, 15_000, steps_per_round=512, learning_rate=1e-2, **SMALL)
    assert found.attrs["environment_steps"] == learner.steps_taken == 15_360
    contexts = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    policy = torch.stack([found.policy.log_prob(contexts, torch.full((2,), a), 0) for a in range(3)], 1)
    # The chances of one round's 512 decisions have standard errors of 0.5 / sqrt(256) = 0.03.
    torch.testing.assert_close(policy.exp(), CHANCES, rtol=0, atol=4 * 0.03)
    torch.testing.assert_close(log_odds(found.reward).exp(), CHANCES, rtol=0, atol=4 * 0.03)


def test_what_is_no_learner_or_too_few_steps_is_named() -> None:
    # Called directly, as the tests' own check of types would be first.
    with pytest.raises(OptionError, match="pirl.baselines.adversarial"):
        _check_kinds(pirl.Trajectories([[0, 1]], [[0]]), Exact())
    with pytest.raises(OptionError, match="StableBaselines"):
        _check_kinds(demonstrations(40), "CartPole-v1")
    batches = Exact()
    batches.steps_at_once = 512  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="takes 512 at once"):
        airl(demonstrations(40), batches, 400, **SMALL)
    assert batches.steps_taken == 0
