"""Gymnasium's environments as simulators that play whole episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import HorizonError, MissingDependencyError, OptionError, check_counts, first_line, form, is_count
from pirl.simulators.playing import checked_states, play
from pirl.simulators.protocols import Generator, Policy
from pirl.simulators.rollouts import Rollouts


def made_environment(env: Any, horizon: int | None = None, **options: Any) -> tuple[Any, int]:
    """An environment by its id, from a function, or as it is; and its horizon.

    Raises:
        OptionError: there is no such environment, in Gymnasium's words, or it is none.
        HorizonError: the horizon is not a positive whole number, or none is known.
    """
    import gymnasium

    if horizon is not None and not is_count(horizon):
        raise HorizonError(f"horizon is {horizon!r}; it must be a whole number of decisions, at least 1")
    if isinstance(env, str):
        try:
            made: Any = gymnasium.make(env, max_episode_steps=horizon, **options)
        except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
            raise OptionError(f"gymnasium cannot make {env!r}: {first_line(error)}") from error
    else:
        made = env() if callable(env) else env
    if not isinstance(made, gymnasium.Env):
        raise OptionError(f"env is {form(made)}: give an environment's id, a function that makes one, or one")
    limit = getattr(made.spec, "max_episode_steps", None) if horizon is None else horizon
    if limit is None:
        raise HorizonError("horizon is None, and the environment has none of its own: give at least 1")
    return made, int(limit)


class GymSimulator:
    """A Gymnasium environment: states are its observations as vectors ``[ds]``, actions Discrete or Box.

    Args:
        env: an environment's id, a function that makes one, or one environment.
        horizon: T; by default the environment's own time limit.
        absorb: play T decisions whatever happens: after the environment has terminated, the state is repeated and the
            policy goes on deciding, so that length tells nothing of reward (as in seals). Without it, episodes differ
            in length.
        copies: environments played side by side, so that the policy decides for all at once; one where ``env`` is one.
        dtype: of states, vector actions and rewards.
        options: for ``gymnasium.make``.

    Actions outside a Box are clipped for the environment and recorded as the policy chose them, which keeps their
    density.

    Raises:
        MissingDependencyError: Gymnasium is not installed.
        OptionError: spaces of another kind, or options out of range.
        HorizonError: no horizon is known.

    Attributes:
        steps_taken: environment steps so far.

    Example:
        >>> GymSimulator("CartPole-v1", horizon=20).horizon
        20
    """

    def __init__(
        self,
        env: Any,
        horizon: int | None = None,
        *,
        absorb: bool = True,
        copies: int = 1,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        try:
            import gymnasium
        except ImportError:
            raise MissingDependencyError("gymnasium is not installed: pip install 'pirl[envs]'") from None
        check_counts(1, copies=copies)
        if copies > 1 and not (isinstance(env, str) or callable(env)):
            raise OptionError(f"copies is {copies}; more than 1 need an id or a function, not one env")
        made = [made_environment(env, horizon, **options) for _ in range(copies)]
        self._envs: list[Any] = [one for one, _ in made]
        self.horizon = made[0][1]
        space: Any = self._envs[0].observation_space
        choice: Any = self._envs[0].action_space
        discrete, box = isinstance(choice, gymnasium.spaces.Discrete), isinstance(choice, gymnasium.spaces.Box)
        if not isinstance(space, gymnasium.spaces.Box) or not (discrete or box):
            raise OptionError(
                f"observations are {space} and actions {choice}: expected Box, and Discrete or Box (tables are read by "
                "pirl.envs.from_gymnasium)"
            )
        self.absorb, self.discrete, self.dtype = absorb, discrete, dtype
        self.num_actions = int(choice.n) if discrete else None
        self.state_size = int(np.prod(space.shape))
        self.action_size = None if discrete else int(np.prod(choice.shape))
        self.steps_taken = 0

    @torch.no_grad()
    def roll_out(self, policy: Policy, num: int, generator: Generator = None) -> Rollouts:
        """As :func:`roll_out`. Each episode is seeded from ``generator``, whatever was played before."""
        check_counts(1, num=num)
        seeds = torch.randint(2**31 - 1, (num,), generator=generator).tolist()
        copies = len(self._envs)
        parts = [self._side_by_side(policy, seeds[i : i + copies], generator) for i in range(0, num, copies)]
        return Rollouts(*(torch.cat(field) for field in zip(*(part[:5] for part in parts), strict=True)))  # type: ignore[arg-type]

    def close(self) -> None:
        """Close every copy."""
        for env in self._envs:
            env.close()

    def _side_by_side(self, policy: Policy, seeds: list[int], generator: Generator) -> Rollouts:
        rewards = torch.zeros(len(seeds), self.horizon, dtype=self.dtype)
        over, clock = [False] * len(seeds), [0] * len(seeds)

        def first() -> tuple[Tensor, Tensor]:
            seen = [env.reset(seed=seed)[0] for env, seed in zip(self._envs, seeds, strict=False)]
            return checked_states(self._vectors(seen), len(seeds)), torch.zeros(len(seeds), dtype=torch.bool)

        def advance(episodes: Tensor, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
            following = states.clone()
            for row, i in enumerate(episodes.tolist()):
                if over[i]:
                    continue
                seen, reward, over[i], stopped, _ = self._envs[i].step(self._action(actions[row]))
                self.steps_taken += 1
                rewards[i, clock[i]], clock[i] = float(reward), clock[i] + 1
                following[row] = self._vectors([seen])[0]
                if stopped and not over[i] and clock[i] < self.horizon:
                    raise HorizonError(
                        f"the environment's time limit came after {clock[i]} decisions, before the horizon "
                        f"{self.horizon}: give a shorter horizon, or make it with max_episode_steps={self.horizon}"
                    )
            ended = [over[i] and not self.absorb for i in episodes.tolist()]
            return checked_states(following, len(states), like=states), torch.tensor(ended)

        return play(first, advance, policy, self.horizon, generator)._replace(rewards=rewards)

    def _vectors(self, observations: list[Any]) -> Float[Tensor, "n ds"]:
        return torch.as_tensor(np.stack([np.asarray(x, dtype=np.float64).reshape(-1) for x in observations])).to(
            self.dtype
        )

    def _action(self, action: Tensor) -> Any:
        space: Any = self._envs[0].action_space
        if self.discrete:
            return int(action) + int(space.start)
        return np.clip(action.cpu().numpy().reshape(space.shape), space.low, space.high).astype(space.dtype)
