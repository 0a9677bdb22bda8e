"""MaxEnt RL with Stable-Baselines3's PPO and SAC: the learner, and the policies that it leaves behind."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from pirl.errors import OptionError, check_counts, check_numbers, first_line
from pirl.simulators import Policy
from pirl.simulators.protocols import Generator
from pirl.stable_baselines.actions import EDGE, Actions, parameters
from pirl.stable_baselines.copies import Played, Potential, Reward, Rewarded, Transitions, made

_ONE_POLICY = 256
"""SAC's policy changes with every row of decisions; so many in a row count as one policy's."""


class DeepPolicy:
    """What a network decides, as a :class:`pirl.simulators.Policy`: a copy that later training leaves as it is.

    Numbered actions are categorical. Vectors are a Gaussian squashed by tanh into the range of the actions; densities
    are per unit of the environment's actions, and nothing needs to be clipped.

    Example:
        >>> policy = StableBaselines("CartPole-v1", n_steps=16).policy
        >>> policy.sample(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    def __init__(self, network: Any, actions: Actions) -> None:
        self._network, self._actions = network, actions

    @torch.no_grad()
    def sample(self, states: Tensor, step: int = 0, generator: Generator = None) -> Tensor:
        """Actions: whole numbers ``[n]``, or vectors ``[n, da]``; the policy is the same at every step."""
        return self._actions.sample(parameters(self._network, states), generator).to(states.device)

    @torch.no_grad()
    def log_prob(self, states: Tensor, actions: Tensor, step: int = 0) -> Float[Tensor, " n"]:
        """log pi(a|s) in float64; -inf outside the range."""
        return self._actions.log_prob(parameters(self._network, states), actions).to(states.device)


class _Anywhere:
    """Any action in the range is as likely: what SAC does before it begins to learn."""

    def __init__(self, actions: Actions) -> None:
        self._actions = actions

    def sample(self, states: Tensor, step: int = 0, generator: Generator = None) -> Tensor:
        share = torch.rand(len(states), len(self._actions.half), generator=generator, dtype=torch.float64)
        return self._actions.centre + self._actions.half * (2 * share - 1)

    def log_prob(self, states: Tensor, actions: Tensor, step: int = 0) -> Float[Tensor, " n"]:
        share = (actions.reshape(len(states), -1).double() - self._actions.centre) / self._actions.half
        height = -(2 * self._actions.half).log().sum()
        return height.expand(len(states)).masked_fill((share.abs() > 1 + EDGE).any(-1), -torch.inf)


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
        check_counts(1, num_envs=num_envs, decay_steps=1 if decay_steps is None else decay_steps)
        check_counts(0, seed=seed)
        check_numbers(0.0, within=True, temperature=temperature, learning_rate=learning_rate)
        check_numbers(0.0, 1.0, below=True, discount=discount)  # it sums rewards without end
        taken = sorted({"gamma", "ent_coef", "use_sde"} & options.keys())
        if taken:
            raise OptionError(f"{taken[0]} is not an option: discount and temperature say what is learned")
        known = inspect.signature(PPO if algorithm == "ppo" else SAC).parameters.keys()
        for name in sorted(options.keys() - known):
            raise OptionError(f"stable-baselines3: {algorithm.upper()} has no option {name!r}")
        copies = DummyVecEnv([partial(made, env, horizon, absorb)] * num_envs)
        first: Any = copies.envs[0]
        self.horizon, self.absorb, self.discount, self.temperature = first.horizon, absorb, discount, temperature
        self._actions = Actions.of(first.action_space)
        self.num_actions = self._actions.number
        if algorithm == "sac" and self.num_actions is not None:
            raise OptionError("SAC has no numbered actions: use algorithm='ppo'")
        self._rewarded = Rewarded(self._actions, discount)
        self._played = Played(copies, self._rewarded, pays=algorithm == "ppo")
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
            raise OptionError(f"stable-baselines3: {first_line(error)}") from error
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
        check_counts(1, num_steps=num_steps)
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


class _SoftRollouts(RolloutBuffer):
    """What PPO learns from: each reward, less alpha log pi of its decision."""

    def __init__(self, *arguments: Any, temperature: float, actions: Actions, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.temperature, self.law = temperature, actions

    def add(self, obs: Any, action: Any, reward: Any, episode_start: Any, value: Any, log_prob: Any) -> None:
        density = log_prob.double()
        if self.law.number is None:
            density = density - self.law.log_slope(torch.as_tensor(action).double())
        super().add(obs, action, reward - self.temperature * density.numpy(), episode_start, value, log_prob)


class _SoftReplay(ReplayBuffer):
    """What SAC learns from, each transition with the reward of today."""

    def __init__(self, *arguments: Any, temperature: float, rewarded: Rewarded, **options: Any) -> None:
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


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])
