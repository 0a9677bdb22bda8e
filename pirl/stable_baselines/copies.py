"""Copies of an environment that are played side by side, and pay what a learned reward says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from jaxtyping import Bool, Float
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper
from torch import Tensor

from pirl.errors import HorizonError, InvalidRewardError, OptionError, SimulatorError, form, named_line
from pirl.simulators.environments import made_environment
from pirl.stable_baselines.actions import Actions

Reward = Callable[[Tensor, Tensor], Tensor]
"""(states [n, ds], actions [n] or [n, da]) -> r [n]."""
Potential = Callable[[Tensor], Tensor]
"""states [n, ds] -> h [n]."""

_WIDEST = 1e6
"""What a Gaussian is clipped to before it is squashed: never met."""


class Transitions(NamedTuple):
    """Decisions, and what followed.

    Example:
        >>> learner = StableBaselines("CartPole-v1", n_steps=16)
        >>> policy = learner.improve(lambda states, actions: -states[:, 2].abs(), 128)
        >>> learner.transitions().states.shape
        torch.Size([128, 4])
    """

    states: Float[Tensor, "n ds"]
    actions: Tensor
    """``[n]`` whole numbers, or ``[n, da]``."""
    following: Float[Tensor, "n ds"]
    ended: Bool[Tensor, " n"]
    """Whether the episode terminated there; a time limit is no end."""


class Rewarded:
    """What a transition pays: r(s, a) + g h(s') - h(s)."""

    def __init__(self, actions: Actions, discount: float) -> None:
        self.actions, self.discount = actions, discount
        self.reward: Reward = lambda states, _: torch.zeros(len(states))
        self.potential: Potential | None = None

    @torch.no_grad()
    def __call__(self, step: Transitions) -> Float[Tensor, " n"]:
        value = self._asked("reward", self.reward(step.states, step.actions), step)
        if self.potential is not None:
            now = self._asked("potential", self.potential(step.states), step)
            later = self._asked("potential", self.potential(step.following), step)
            value = value + self.discount * torch.where(step.ended, 0.0, later) - now
        return value

    def _asked(self, name: str, value: Any, step: Transitions) -> Tensor:
        count = len(step.states)
        if not isinstance(value, Tensor) or value.shape != (count,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidRewardError(f"the {name} of {count} states is {shape}: expected a tensor ({count},)")
        wrong = ~value.isfinite()
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise InvalidRewardError(
                f"the {name} is {float(value[i])} in state {step.states[i].tolist()}, action {step.actions[i].tolist()}"
                ": give a finite one, such as one clamped, or with standardised inputs"
            )
        return value.detach().to("cpu", torch.float64)


class Episode(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One copy: vectors, numbers from 0, T decisions, and no reward of its own."""

    def __init__(self, env: Any, horizon: int, absorb: bool) -> None:
        super().__init__(env)
        space, choice = env.observation_space, env.action_space
        box, discrete = gymnasium.spaces.Box, gymnasium.spaces.Discrete
        bounded = isinstance(choice, box) and bool(np.isfinite([choice.low, choice.high]).all())
        if not isinstance(space, box) or not (isinstance(choice, discrete) or bounded):
            raise OptionError(
                f"observations are {space} and actions {choice}: expected a Box, and Discrete or a bounded Box"
            )
        self.horizon, self.absorb = horizon, absorb
        self.start = int(choice.start) if isinstance(choice, discrete) else None
        self.observation_space = box(-np.inf, np.inf, (int(np.prod(space.shape)),), np.float32)
        if isinstance(choice, discrete):
            self.action_space = discrete(int(choice.n))
        else:
            self.action_space = box(choice.low.reshape(-1), choice.high.reshape(-1), dtype=np.float32)
        self.clock, self.over, self.state = 0, False, np.zeros(0, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.clock, self.over = 0, False
        self._look("reset", lambda: self.env.reset(seed=seed, options=options)[0])
        return self.state, {}

    def step(self, action: Any) -> Any:
        stopped = False
        if not self.over:
            given = self._given(action)
            answer = self._look(f"step {self.clock}", lambda: self.env.step(given))
            self.over, stopped = bool(answer[2]), bool(answer[3])
        self.clock += 1
        if stopped and not self.over and self.clock < self.horizon:
            raise HorizonError(
                f"the environment's time limit came after {self.clock} decisions, before the horizon {self.horizon}: "
                f"give a shorter horizon, or make it with max_episode_steps={self.horizon}"
            )
        ended = self.over and not self.absorb
        return self.state, 0.0, ended, self.clock >= self.horizon and not ended, {}

    def _given(self, action: Any) -> Any:
        if self.start is not None:
            return int(action) + self.start
        space: Any = self.env.action_space
        return np.asarray(action).reshape(space.shape).astype(space.dtype).clip(space.low, space.high)

    def _look(self, when: str, call: Callable[[], Any]) -> Any:
        try:
            answer = call()
            seen = np.asarray(answer[0] if isinstance(answer, tuple) else answer, np.float32).reshape(-1)
            if seen.shape != self.observation_space.shape or not np.isfinite(seen).all():
                raise ValueError(f"state {seen.tolist()} is not finite, or not of {self.observation_space.shape}")
        except Exception as error:
            raise SimulatorError(f"the simulator failed at {when}: {named_line(error)}") from error
        self.state = seen
        return answer


def made(env: str | Callable[[], Any], horizon: int | None, absorb: bool) -> Episode:
    """One copy, of an id or of a function that makes one."""
    if not isinstance(env, str) and not callable(env):
        raise OptionError(f"env is {form(env)}: give an id, or a function that makes an environment")
    copy, limit = made_environment(env, horizon)
    return Episode(copy, limit, absorb)


class Played(VecEnvWrapper):
    """All copies: they pay what the reward says, and what happens is remembered."""

    def __init__(self, copies: DummyVecEnv, rewarded: Rewarded, pays: bool) -> None:
        space = copies.action_space
        squashed = pays and rewarded.actions.number is None
        if squashed:  # what PPO's Gaussian draws is squashed here
            space = gymnasium.spaces.Box(-_WIDEST, _WIDEST, space.shape, np.float32)
        super().__init__(copies, action_space=space)
        self.rewarded, self.pays, self.squashed = rewarded, pays, squashed
        self.scale, self.steps_taken = 1.0, 0
        self.seen: list[Transitions] = []
        self._states, self._chosen = torch.zeros(0), torch.zeros(0)

    def reset(self) -> Any:
        states = self.venv.reset()
        self._states = _doubles(states)
        return states

    def step_async(self, actions: Any) -> None:
        chosen = torch.as_tensor(actions)
        self._chosen = self.rewarded.actions.squash(chosen.double()) if self.squashed else chosen
        self.venv.step_async(self._chosen.numpy())

    def step_wait(self) -> Any:
        following, rewards, done, infos = self.venv.step_wait()
        self.steps_taken += self.num_envs
        last, ended = list(following), torch.zeros(self.num_envs, dtype=torch.bool)
        for i in np.flatnonzero(done):
            last[i], ended[i] = infos[i]["terminal_observation"], not infos[i]["TimeLimit.truncated"]
        chosen = self._chosen if self.rewarded.actions.number is not None else self._chosen.double()
        step = Transitions(self._states, chosen, _doubles(last), ended)
        self._states = _doubles(following)
        self.seen.append(step)
        if self.pays:
            rewards = self.scale * self.rewarded(step).numpy()
        return following, rewards, done, infos

    def transitions(self) -> Transitions:
        if not self.seen:
            raise OptionError("nothing was played yet: call improve(reward, num_steps) first")
        return Transitions(*(torch.cat(field) for field in zip(*self.seen, strict=True)))


def _doubles(states: Any) -> Float[Tensor, "n ds"]:
    return torch.as_tensor(np.stack(list(states))).double()
