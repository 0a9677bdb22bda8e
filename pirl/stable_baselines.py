"""MaxEnt RL with deep networks: Stable-Baselines3's PPO and SAC behind :meth:`StableBaselines.improve`.

The objective is reward plus entropy, at temperature alpha,

    max_pi E sum_t g^t [r(s_t, a_t) - alpha log pi(a_t|s_t)],

whose optimum is pi(a|s) proportional to exp(Q(s,a) / alpha). SAC has it as its own (a fixed entropy coefficient). PPO
is given r - alpha log pi(a|s) as the reward, with pi the policy that acted: since E grad log pi = 0, the policy
gradient of that reward, held fixed, is the gradient of the objective. (PPO's own entropy bonus is another objective:
it counts the entropy of this decision and not that of those to come.)

This module needs the extra ``rl``; ``import pirl`` never imports it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from pirl.errors import (
    HorizonError,
    InvalidRewardError,
    MissingDependencyError,
    OptionError,
    SimulatorError,
    check_counts,
    check_numbers,
    form,
)
from pirl.simulators import Policy
from pirl.simulators.environments import made_environment
from pirl.simulators.playing import Generator

try:
    import gymnasium
    from stable_baselines3 import PPO, SAC
    from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper
    from stable_baselines3.sac.policies import Actor
except ImportError:
    raise MissingDependencyError("stable-baselines3 is not installed: pip install 'pirl[rl]'") from None

Reward = Callable[[Tensor, Tensor], Tensor]
"""(states [n, ds], actions [n] or [n, da]) -> r [n]."""
Potential = Callable[[Tensor], Tensor]
"""states [n, ds] -> h [n]."""

_WIDEST = 1e6
"""What a Gaussian is clipped to before it is squashed: never met."""
_EDGE = 1e-9
"""An action nearer to the end of its range than this share has the density of one just so near."""
_ONE_POLICY = 256
"""SAC's policy changes with every row of decisions; so many in a row count as one policy's."""


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


class DeepPolicy:
    """What a network decides, as a :class:`pirl.simulators.Policy`: a copy that later training leaves as it is.

    Numbered actions are categorical. Vectors are a Gaussian squashed by tanh into the range of the actions; densities
    are per unit of the environment's actions, and nothing needs to be clipped.

    Example:
        >>> policy = StableBaselines("CartPole-v1", n_steps=16).policy
        >>> policy.sample(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    def __init__(self, network: Any, actions: _Actions) -> None:
        self._network, self._actions = network, actions

    @torch.no_grad()
    def sample(self, states: Tensor, step: int = 0, generator: Generator = None) -> Tensor:
        """Actions: whole numbers ``[n]``, or vectors ``[n, da]``; the policy is the same at every step."""
        return self._actions.sample(_parameters(self._network, states), generator).to(states.device)

    @torch.no_grad()
    def log_prob(self, states: Tensor, actions: Tensor, step: int = 0) -> Float[Tensor, " n"]:
        """log pi(a|s) in float64; -inf outside the range."""
        return self._actions.log_prob(_parameters(self._network, states), actions).to(states.device)


class _Anywhere:
    """Any action in the range is as likely: what SAC does before it begins to learn."""

    def __init__(self, actions: _Actions) -> None:
        self._actions = actions

    def sample(self, states: Tensor, step: int = 0, generator: Generator = None) -> Tensor:
        share = torch.rand(len(states), len(self._actions.half), generator=generator, dtype=torch.float64)
        return self._actions.centre + self._actions.half * (2 * share - 1)

    def log_prob(self, states: Tensor, actions: Tensor, step: int = 0) -> Float[Tensor, " n"]:
        share = (actions.reshape(len(states), -1).double() - self._actions.centre) / self._actions.half
        height = -(2 * self._actions.half).log().sum()
        return height.expand(len(states)).masked_fill((share.abs() > 1 + _EDGE).any(-1), -torch.inf)


class StableBaselines:
    """A MaxEnt-RL learner that goes on from where it was, for reward after reward.

    Args:
        env: a Gymnasium environment's id, or a function that makes one. Observations are a Box (flattened), actions
            Discrete or a bounded Box.
        algorithm: "ppo", or "sac" (Box only).
        horizon: T, decisions of an episode; by default the environment's own time limit. It is no end of the problem:
            values go on beyond it.
        absorb: play T decisions whatever happens: a terminated environment's last state is repeated, so that length
            tells nothing of reward. Without it episodes end.
        num_envs: copies played side by side.
        discount: g; learning needs one below 1, also where the problem has none.
        temperature: alpha; the policy for (r, alpha) is that for (r / alpha, 1).
        learning_rate: of Adam.
        decay_steps: the learning rate falls linearly to 0 over so many decisions of all calls; None: constant.
        seed: of all that is random; the program's own generators are left alone.
        options: of ``stable_baselines3.PPO`` or ``SAC``, such as ``n_steps``, ``batch_size`` or ``policy_kwargs``.

    Raises:
        OptionError: unknown algorithm, spaces of another kind, SAC with numbered actions, options out of range.
        HorizonError: no horizon is known.
        SimulatorError: the environment failed at its first reset.

    Attributes:
        num_actions: of Discrete actions; None of vectors.

    Example:
        >>> learner = StableBaselines("CartPole-v1", n_steps=32)
        >>> policy = learner.improve(lambda states, actions: -states[:, 2].abs(), 1000)
        >>> policy.log_prob(torch.zeros(2, 4), torch.tensor([0, 1])).exp().sum().round(decimals=4)
        tensor(1., dtype=torch.float64)
    """

    def __init__(
        self,
        env: str | Callable[[], Any],
        algorithm: str = "ppo",
        horizon: int | None = None,
        *,
        absorb: bool = True,
        num_envs: int = 8,
        discount: float = 0.99,
        temperature: float = 1.0,
        learning_rate: float = 3e-4,
        decay_steps: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if algorithm not in ("ppo", "sac"):
            raise OptionError(f"algorithm must be 'ppo' or 'sac', not {algorithm!r}")
        check_counts(1, num_envs=num_envs)
        check_counts(0, seed=seed)
        check_numbers(0.0, within=True, temperature=temperature, learning_rate=learning_rate)
        check_numbers(0.0, 1.0, discount=discount)
        if discount == 1:
            raise OptionError("discount is 1, but must be below 1: learning sums rewards without end")
        taken = sorted({"gamma", "ent_coef", "use_sde"} & options.keys())
        if taken:
            raise OptionError(f"{taken[0]} is not an option: discount and temperature say what is learned")
        copies = DummyVecEnv([partial(_made, env, horizon, absorb)] * num_envs)
        first: Any = copies.envs[0]
        self.horizon, self.discount, self.temperature = first.horizon, discount, temperature
        self._actions = _Actions.of(first.action_space)
        self.num_actions = self._actions.number
        if algorithm == "sac" and self.num_actions is not None:
            raise OptionError("SAC has no numbered actions: use algorithm='ppo'")
        self._rewarded = _Rewarded(self._actions, discount)
        self._played = _Played(copies, self._rewarded, pays=algorithm == "ppo")
        self._played.seed(seed)

        def rate(_: Any) -> float:
            left = 1.0 if decay_steps is None else max(1 - self.steps_taken / decay_steps, 0.0)
            return learning_rate * left

        options = {"gamma": discount, "learning_rate": rate, "seed": seed, "device": "cpu", **options}
        theirs = _random_state()
        try:
            if algorithm == "ppo":
                # Values are then means of rewards, and not sums, which grow as 1 / (1 - g): far for a network to go.
                self._played.scale = 1 - discount
                soft: dict[str, Any] = {"temperature": temperature * (1 - discount), "actions": self._actions}
                self._model: Any = PPO(
                    "MlpPolicy", self._played, rollout_buffer_class=_SoftRollouts, rollout_buffer_kwargs=soft, **options
                )
            else:
                soft = {"temperature": temperature, "rewarded": self._rewarded}
                options = {"gradient_steps": -1, "ent_coef": temperature, **options}
                self._model = SAC(
                    "MlpPolicy", self._played, replay_buffer_class=_SoftReplay, replay_buffer_kwargs=soft, **options
                )
        except (TypeError, ValueError, AssertionError) as error:
            raise OptionError(f"stable-baselines3: {(str(error).splitlines() or [''])[0]}") from error
        finally:
            self._random = _random_state()
            _set_random_state(theirs)
        self._model.set_logger(Logger(folder=None, output_formats=[]))
        self._players: list[tuple[int, Policy]] = []
        """Rows of copies before one of them played, and who."""

    @property
    def steps_taken(self) -> int:
        """Decisions so far, repeated states included."""
        return self._played.steps_taken

    @property
    def steps_at_once(self) -> int:
        """Numbers of decisions are rounded up to whole multiples: a batch of PPO, or a row of copies."""
        return self._played.num_envs * (self._model.n_steps if self._played.pays else 1)

    def transitions(self) -> Transitions:
        """Those of the last :meth:`improve`.

        Raises:
            OptionError: there was none.
        """
        return self._played.transitions()

    def played(self) -> list[tuple[Policy, Transitions]]:
        """Those of the last :meth:`improve`, in order, each beside the policy that made them.

        PPO plays whole batches with one policy. SAC's changes with each row of decisions: 256 in a row count as made by
        the first of theirs, and what SAC does before it begins to learn (``learning_starts``) is uniform.

        Raises:
            OptionError: there was none.
        """
        step, copies = self._played.transitions(), self._played.num_envs
        starts = [copies * start for start, _ in self._players]
        ends = [*starts[1:], len(step.states)]
        return [
            (policy, Transitions(*(field[start:end] for field in step)))
            for (_, policy), start, end in zip(self._players, starts, ends, strict=True)
            if end > start
        ]

    @property
    def policy(self) -> DeepPolicy:
        """What is decided now."""
        network = self._model.policy if self._played.pays else self._model.actor
        # Neither Adam's moments, nor the distribution of the last call.
        last = [
            x for x in vars(network.action_dist).values() if isinstance(x, (Tensor, torch.distributions.Distribution))
        ]
        return DeepPolicy(deepcopy(network, {id(x): None for x in (network.optimizer, *last)}), self._actions)

    def improve(self, reward: Reward, num_steps: int, *, potential: Potential | None = None) -> DeepPolicy:
        """Train for another ``num_steps`` decisions with this reward in place of the environment's own.

        Args:
            reward: r(s, a), of float64 states ``[n, ds]`` and of actions ``[n]`` (numbers) or ``[n, da]``.
            num_steps: rounded up to whole batches of PPO (``n_steps * num_envs``), or to whole rows of copies.
            potential: h; g h(s') - h(s) is added to the reward, which leaves the optimum where it is (Ng et al. 1999).
                h is 0 after the end of an episode.

        Raises:
            InvalidRewardError: wrong shape, NaN or infinite.
            SimulatorError: the environment failed in mid-roll-out; names the step. Training can go on.
        """
        if num_steps < 1:
            raise OptionError(f"num_steps is {num_steps}; it must be at least 1")
        self._rewarded.reward, self._rewarded.potential = reward, potential
        self._played.seen.clear()
        self._players.clear()
        try:
            with self._own_randomness():
                self._model.learn(num_steps, _Turns(self._takes_over), reset_num_timesteps=False)
        except BaseException:
            self._model._last_obs = None  # every copy starts anew
            raise
        return self.policy

    def close(self) -> None:
        """Close every copy."""
        self._played.close()

    def _takes_over(self) -> None:
        """Note who plays from now on."""
        rows, model = len(self._played.seen), self._model
        if not self._played.pays and model.num_timesteps < model.learning_starts:
            if not self._players:
                self._players.append((rows, _Anywhere(self._actions)))
            return
        start, newest = self._players[-1] if self._players else (0, None)
        grown_old = (rows - start) * self._played.num_envs >= _ONE_POLICY
        if self._played.pays or grown_old or not isinstance(newest, DeepPolicy):
            self._players.append((rows, self.policy))

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        # SB3 draws from the program's generators.
        theirs = _random_state()
        _set_random_state(self._random)
        try:
            yield
        finally:
            self._random = _random_state()
            _set_random_state(theirs)


class _Turns(BaseCallback):
    """Tells when decisions begin to be made."""

    def __init__(self, begin: Callable[[], None]) -> None:
        super().__init__()
        self._begin = begin

    def _on_rollout_start(self) -> None:
        self._begin()

    def _on_step(self) -> bool:
        return True


# ---------------------------------------------------------------------------------------------------- actions


class _Actions(NamedTuple):
    """The law of actions, from a network's parameters; and the environment's units."""

    number: int | None
    centre: Tensor
    half: Tensor
    """Half the width of the range ``[da]``."""

    @staticmethod
    def of(space: Any) -> _Actions:
        if isinstance(space, gymnasium.spaces.Discrete):
            return _Actions(int(space.n), torch.zeros(0), torch.zeros(0))
        low, high = (torch.as_tensor(np.asarray(x, np.float64).reshape(-1)) for x in (space.low, space.high))
        return _Actions(None, (low + high) / 2, (high - low) / 2)

    def squash(self, u: Tensor) -> Tensor:
        """a = centre + half tanh u."""
        return self.centre + self.half * u.tanh()

    def log_slope(self, u: Tensor) -> Tensor:
        """log |da/du|, summed over coordinates: 1 - tanh^2 u = 4 / (e^u + e^-u)^2."""
        return (self.half.log() + 2 * (np.log(2) - u - softplus(-2 * u))).sum(-1)

    def sample(self, parameters: tuple[Tensor, ...], generator: Generator) -> Tensor:
        if self.number is not None:
            cumulative = parameters[0].double().softmax(-1).cumsum(-1)
            uniform = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64)
            return torch.searchsorted(cumulative, uniform, right=True).squeeze(-1).clamp_max(self.number - 1)
        mean, log_scale = (x.double() for x in parameters)
        return self.squash(mean + log_scale.exp() * torch.randn(mean.shape, generator=generator, dtype=torch.float64))

    def log_prob(self, parameters: tuple[Tensor, ...], actions: Tensor) -> Float[Tensor, " n"]:
        if self.number is not None:
            chosen = actions.reshape(-1, 1).long()
            return parameters[0].double().log_softmax(-1).gather(-1, chosen).squeeze(-1)
        mean, log_scale = (x.double() for x in parameters)
        share = (actions.reshape(mean.shape).double() - self.centre) / self.half
        u = share.clamp(_EDGE - 1, 1 - _EDGE).atanh()
        log_prob = torch.distributions.Normal(mean, log_scale.exp()).log_prob(u).sum(-1) - self.log_slope(u)
        return log_prob.masked_fill((share.abs() > 1 + _EDGE).any(-1), -torch.inf)


def _parameters(network: Any, states: Tensor) -> tuple[Tensor, ...]:
    """Logits ``[n, A]``, or (mean, log scale) of the Gaussian that is squashed, each ``[n, da]``."""
    seen = states.to("cpu", torch.float32)
    if isinstance(network, Actor):
        mean, log_scale, _ = network.get_action_dist_params(seen)
        return mean, log_scale
    law = network.get_distribution(seen).distribution
    return (law.logits,) if isinstance(law, torch.distributions.Categorical) else (law.mean, law.stddev.log())


# ---------------------------------------------------------------------------------------------------- reward


class _Rewarded:
    """What a transition pays: r(s, a) + g h(s') - h(s)."""

    def __init__(self, actions: _Actions, discount: float) -> None:
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


class _SoftRollouts(RolloutBuffer):
    """What PPO learns from: each reward, less alpha log pi of its decision."""

    def __init__(self, *arguments: Any, temperature: float, actions: _Actions, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.temperature, self.law = temperature, actions

    def add(self, obs: Any, action: Any, reward: Any, episode_start: Any, value: Any, log_prob: Any) -> None:
        density = log_prob.double()
        if self.law.number is None:
            density = density - self.law.log_slope(torch.as_tensor(action).double())
        super().add(obs, action, reward - self.temperature * density.numpy(), episode_start, value, log_prob)


class _SoftReplay(ReplayBuffer):
    """What SAC learns from, each transition with the reward of today."""

    def __init__(self, *arguments: Any, temperature: float, rewarded: _Rewarded, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # SAC's entropy is that of actions scaled to [-1, 1].
        self.rewarded, self.bonus = rewarded, temperature * float(rewarded.actions.half.log().sum())

    def _get_samples(self, batch_inds: Any, env: Any = None) -> ReplayBufferSamples:
        found = super()._get_samples(batch_inds, env)
        law = self.rewarded.actions
        actions = law.centre + law.half * found.actions.double()
        ended = found.dones.flatten() > 0
        paid = self.rewarded(Transitions(found.observations.double(), actions, found.next_observations.double(), ended))
        return found._replace(rewards=(paid + self.bonus).to(found.rewards).unsqueeze(-1))


# ---------------------------------------------------------------------------------------------------- environments


class _Episode(gymnasium.Wrapper[Any, Any, Any, Any]):
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
            cause = (str(error).splitlines() or [""])[0]
            raise SimulatorError(f"the simulator failed at {when}: {type(error).__name__}: {cause}") from error
        self.state = seen
        return answer


def _made(env: str | Callable[[], Any], horizon: int | None, absorb: bool) -> _Episode:
    if not isinstance(env, str) and not callable(env):
        raise OptionError(f"env is {form(env)}: give an id, or a function that makes an environment")
    made, limit = made_environment(env, horizon)
    return _Episode(made, limit, absorb)


class _Played(VecEnvWrapper):
    """All copies: they pay what the reward says, and what happens is remembered."""

    def __init__(self, copies: DummyVecEnv, rewarded: _Rewarded, pays: bool) -> None:
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


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])
