"""Decision problems that can only be sampled: simulators, policies that act in them, and roll-outs.

A simulator is anything with ``horizon``, ``reset`` and ``step`` (stateless and vectorised over episodes), or, like a
Gymnasium environment, anything that plays whole episodes itself; :func:`roll_out` serves both. Roll-outs keep log q of
the decisions, sum_t log pi(a_t|s_t): with the true dynamics in both, p(tau) / q(tau) needs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
from pirl.trajectories import End, Trajectories

__all__ = [
    "BaseMeasure",
    "EpisodeSimulator",
    "GymSimulator",
    "Policy",
    "Rollouts",
    "Simulator",
    "TabularPolicy",
    "TabularSimulator",
    "WholeLaw",
    "base_policy",
    "log_base_measure",
    "log_density",
    "roll_out",
]

Generator = torch.Generator | None
Answer = TypeVar("Answer")


@runtime_checkable
class Simulator(Protocol):
    """What :func:`roll_out` needs. States are whole numbers ``[n]`` or vectors ``[n, ds]``.

    Episodes that can end early also need ``is_terminal(states) -> [n]`` (bool).

    Example:
        >>> class Walk:
        ...     horizon = 10
        ...     def reset(self, num, generator=None):
        ...         return torch.zeros(num, 1)
        ...     def step(self, states, actions, generator=None):
        ...         return states + actions
        >>> isinstance(Walk(), Simulator)
        True
    """

    horizon: int
    """T, decisions of an episode."""

    def reset(self, num: int, generator: Generator = None) -> Tensor:
        """First states of ``num`` episodes."""

    def step(self, states: Tensor, actions: Tensor, generator: Generator = None) -> Tensor:
        """The states that follow, one for each."""


@runtime_checkable
class EpisodeSimulator(Protocol):
    """A simulator without a stateless step, which plays episodes from beginning to end itself.

    Example:
        >>> isinstance(GymSimulator("CartPole-v1", horizon=20), EpisodeSimulator)
        True
    """

    horizon: int
    """T, decisions of an episode."""

    def roll_out(self, policy: Policy, num: int, generator: Generator = None) -> Rollouts:
        """See the function of this name."""


@runtime_checkable
class Policy(Protocol):
    """How actions are chosen; ``step`` is 0 for the first decision of an episode.

    Example:
        >>> class Coin:  # two actions, equally likely
        ...     def sample(self, states, step, generator=None):
        ...         return torch.randint(2, (len(states),), generator=generator)
        ...     def log_prob(self, states, actions, step):
        ...         return torch.full((len(states),), 0.5).log()
        >>> isinstance(Coin(), Policy)
        True
        >>> roll_out(GymSimulator("CartPole-v1", horizon=5), Coin(), 3).states.shape
        torch.Size([3, 6, 4])
    """

    def sample(self, states: Tensor, step: int, generator: Generator = None) -> Tensor:
        """Actions: whole numbers ``[n]`` or vectors ``[n, da]``."""

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Float[Tensor, " n"]:
        """log pi(a|s), normalised."""


@runtime_checkable
class WholeLaw(Protocol):
    """A law of trajectories that is no policy, such as that of particles (:mod:`pirl.particles`).

    Example:
        >>> from pirl.particles import TiltedProposal
        >>> isinstance(TiltedProposal(wanted, base_policy(world), 0.0, 0.0, 1.0), WholeLaw)
        True
    """

    def log_density(self, states: Tensor, actions: Tensor, lengths: Tensor) -> Float[Tensor, " n"]:
        """log q(tau), relative to the dynamics."""


class Rollouts(NamedTuple):
    """Episodes that a policy played, in the form of :class:`pirl.Trajectories`.

    Whole numbers are -1 after the end; of vectors, the last state is repeated there and actions are 0. A tabular
    episode shorter than the horizon ended in a terminal state, where it collects r(s, 0) once; that no-op is no
    decision: it has no entry in ``actions`` and is not counted in ``lengths``, but :meth:`pairs` and :meth:`returns`
    know of it.

    Example:
        >>> played = roll_out(TabularSimulator(world), base_policy(world), 5)
        >>> played.states.shape, played.actions.shape, played.returns(wanted.expand(16, 5)).shape
        (torch.Size([5, 9]), torch.Size([5, 8]), torch.Size([5]))
        >>> played.trajectories()
        Trajectories(5 episodes, 40 decisions)
    """

    states: Tensor
    """``[num, T + 1, *event]``."""
    actions: Tensor
    """``[num, T, *event]``."""
    log_density: Float[Tensor, " num"]
    """sum_t log pi(a_t|s_t) over the decisions."""
    lengths: Int[Tensor, " num"]
    """Number of decisions."""
    rewards: Float[Tensor, "num T"] | None = None
    """What a Gymnasium environment paid, which learning must not see; None elsewhere."""

    def pairs(self) -> tuple[Tensor, Tensor, Bool[Tensor, "num T"]]:
        """States and actions ``[num, T, *event]`` that a reward can be asked for, and which of them count.

        What does not count is state 0 and action 0 (or a repeated vector); what does includes the no-op.
        """
        time = torch.arange(self.actions.shape[1], device=self.lengths.device)
        states, length = self.states[:, :-1], self.lengths.unsqueeze(1)
        if self.states.is_floating_point():
            return states, self.actions, time < length
        return states.clamp_min(0), self.actions.clamp_min(0), time <= length

    def returns(self, reward: Tensor) -> Float[Tensor, "*batch num"]:
        """sum_t r(s_t, a_t) of each episode, the no-op of a terminal state included; differentiable in r.

        Args:
            reward: r(s, a), or r(s) as ``[*batch, S, 1]``.

        Raises:
            InvalidRewardError: states are vectors, of which a table knows nothing; or the table is too small.
        """
        if self.states.is_floating_point() or self.actions.is_floating_point():
            raise InvalidRewardError(
                "a table of rewards needs numbered states and actions: sum a function over pairs()"
            )
        states, actions, counted = self.pairs()
        if reward.dim() < 2 or reward.shape[-2] <= int(states.max()) or 1 < reward.shape[-1] <= int(actions.max()):
            raise InvalidRewardError(
                f"a reward {tuple(reward.shape)} has no entry for every state and action of these roll-outs: it must "
                "be [*batch, S, A], or [*batch, S, 1]"
            )
        reward = reward.expand(*reward.shape[:-1], max(reward.shape[-1], int(actions.max()) + 1))
        return (reward[..., states, actions] * counted).sum(-1)

    def trajectories(self) -> Trajectories:
        """The same episodes as demonstrations (of numbered states and actions)."""
        horizon = self.actions.shape[1]
        ends: list[End] = ["terminated" if length < horizon else "truncated" for length in self.lengths.tolist()]
        limits = torch.full_like(self.lengths, horizon)
        return Trajectories(self.states, self.actions, self.lengths, ends=ends, limits=limits)


@torch.no_grad()
def roll_out(
    simulator: Simulator | EpisodeSimulator, policy: Policy, num: int, generator: Generator = None
) -> Rollouts:
    """Play ``num`` episodes of a policy.

    Args:
        simulator: :class:`TabularSimulator`, :class:`GymSimulator`, or your own.
        generator: of all that is random; torch's own by default.

    Raises:
        SimulatorError: the simulator raised, or gave the wrong number of states or non-finite ones; names the step.
        InvalidPolicyError: the policy gave the wrong number of actions, non-finite ones, or ones of density 0.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> roll_out(TabularSimulator(mdp), base_policy(mdp), 5).log_density.exp()
        tensor([0.1250, 0.1250, 0.1250, 0.1250, 0.1250], dtype=torch.float64)
    """
    if num < 1:
        raise OptionError(f"num is {num}; at least 1 episode is played")
    if isinstance(simulator, EpisodeSimulator):
        return simulator.roll_out(policy, num, generator)

    def is_terminal(states: Tensor) -> Tensor:
        known = getattr(simulator, "is_terminal", None)
        return torch.zeros(len(states), dtype=torch.bool, device=states.device) if known is None else known(states)

    def first() -> tuple[Tensor, Tensor]:
        states = checked_states(simulator.reset(num, generator), num)
        return states, is_terminal(states)

    def advance(episodes: Tensor, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        following = checked_states(simulator.step(states, actions, generator), len(states), like=states)
        return following, is_terminal(following)

    return _play(first, advance, policy, simulator.horizon, generator)


def log_density(
    policy: Policy | WholeLaw, states: Tensor, actions: Tensor, lengths: Int[Tensor, " num"] | None = None
) -> Float[Tensor, " num"]:
    """sum_t log pi(a_t|s_t) of given episodes: of demonstrations, or of another policy's roll-outs.

    Args:
        states: ``[num, T + 1, *event]`` (or T).
        actions: ``[num, T, *event]``.
        lengths: number of decisions; by default all that are not padding (-1).

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> log_density(base_policy(mdp), torch.zeros(4, 4).long(), torch.zeros(4, 3).long()).exp()
        tensor([0.1250, 0.1250, 0.1250, 0.1250], dtype=torch.float64)
    """
    if lengths is None:
        everywhere = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device)
        acting = everywhere if actions.is_floating_point() else actions >= 0
        lengths = acting.long().cumprod(1).sum(1)
    if isinstance(policy, WholeLaw):
        return policy.log_density(states, actions, lengths)
    total = None
    for t in range(int(lengths.max()) if len(lengths) else 0):
        here = (lengths > t).nonzero().flatten()
        log_prob = policy.log_prob(states[here, t], actions[here, t], t)
        total = log_prob.new_zeros(len(actions)) if total is None else total
        total = total.index_add(0, here, log_prob)
    return torch.zeros(len(actions), device=actions.device) if total is None else total


# ---------------------------------------------------------------------------------------------------- finite spaces


class TabularPolicy:
    """A table of log pi(a|s) ``[S, A]``, or by time ``[T, S, A]``, as a :class:`Policy`.

    Raises:
        InvalidPolicyError: wrong shape, or a row that is not a distribution.

    Example:
        >>> policy = TabularPolicy(pirl.soft_policy(world, wanted))
        >>> policy.sample(torch.zeros(3).long(), step=0).shape
        torch.Size([3])
    """

    def __init__(self, log_policy: Tensor) -> None:
        if log_policy.dim() not in (2, 3) or not log_policy.is_floating_point():
            raise InvalidPolicyError(
                f"log_policy is {log_policy.dtype} {tuple(log_policy.shape)}; expected log pi [S, A] or [T, S, A]"
            )
        log_policy = log_policy.detach()
        weight = log_policy.exp().cumsum(-1)
        wrong = ~((weight[..., -1] - 1).abs() <= 10 * torch.finfo(weight.dtype).eps ** 0.5)  # NaN is wrong too
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            raise InvalidPolicyError(
                f"log_policy{place} has probabilities that sum to {float(weight[..., -1][wrong][0]):.9g}, not 1"
            )
        self.log_policy, self._cumulative = log_policy, weight

    def sample(self, states: Tensor, step: int, generator: Generator = None) -> Tensor:
        """Actions ``[n]``, never one of probability 0."""
        weight = self._at(self._cumulative, step)[states]
        total = weight[:, -1:]
        uniform = torch.rand(total.shape, generator=generator, dtype=weight.dtype, device=weight.device)
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(weight, target, right=True).squeeze(-1)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Float[Tensor, " n"]:
        """log pi(a|s)."""
        return self._at(self.log_policy, step)[states, actions]

    def _at(self, table: Tensor, step: int) -> Tensor:
        if table.dim() == 2:
            return table
        if step >= len(table):
            raise HorizonError(f"the policy has {len(table)} steps, but step {step} was asked for (they count from 0)")
        return table[step]


def base_policy(mdp: TabularMDP | TabularSimulator) -> TabularPolicy:
    """Actions from the base measure p(a|s), normalised: uniform for "uniform" and for "counting".

    A counting measure weighs trajectories by more than this policy's density: see :func:`log_base_measure`.

    Example:
        >>> base_policy(world).log_prob(torch.tensor([0]), torch.tensor([4]), step=0).exp()
        tensor([0.2000], dtype=torch.float64)
    """
    return TabularPolicy(torch.log_softmax(mdp.log_prior, -1))


def log_base_measure(
    mdp: TabularMDP | TabularSimulator, states: Int[Tensor, "num slots"], actions: Int[Tensor, "num T"]
) -> Float[Tensor, " num"]:
    """sum_t log p(a_t|s_t) of the base measure over the decisions, as given: 0 for the counting measure.

    log weights of the trajectory reading are ``rollouts.returns(reward) + log_base_measure(...) - log q``.

    Example:
        >>> log_base_measure(world, walks.states[:2], walks.actions[:2])  # 8 log 1/5
        tensor([-12.8755, -12.8755], dtype=torch.float64)
    """
    acting = actions >= 0
    chosen = mdp.log_prior[states[:, : actions.shape[1]].clamp_min(0), actions.clamp_min(0)]
    return torch.where(acting, chosen, 0.0).sum(1)


class BaseMeasure:
    """A base measure over actions that need not be normalised, such as the counting measure.

    Roll-outs that follow it are drawn from its normalised form, ``policy``; as the base of a
    :class:`pirl.Pool` it weighs trajectories by what it is.

    Example:
        >>> counting = BaseMeasure(torch.zeros(16, 5).double())
        >>> counting.log_prob(torch.tensor([0]), torch.tensor([4]), step=0)
        tensor([0.], dtype=torch.float64)
    """

    def __init__(self, log_prior: Float[Tensor, "S A"]) -> None:
        self.log_prior, self.policy = log_prior, TabularPolicy(torch.log_softmax(log_prior, -1))

    def sample(self, states: Tensor, step: int, generator: Generator = None) -> Tensor:
        """Actions ``[n]``."""
        return self.policy.sample(states, step, generator)

    def log_prob(self, states: Tensor, actions: Tensor, step: int) -> Float[Tensor, " n"]:
        """log p(a|s), as given."""
        return self.log_prior[states, actions]


class TabularSimulator:
    """A :class:`pirl.TabularMDP` that can only be sampled, and counts how often.

    Args:
        mdp: the decision problem.
        horizon: decisions of a roll-out; the MDP's by default.

    Raises:
        HorizonError: neither has a horizon.

    Attributes:
        steps_taken: environment steps so far; neither a reset nor a terminal state's no-op is one.
        log_prior: log p(a|s) ``[S, A]``, known to whoever acts, as are ``available``, ``terminal`` and ``discount``.

    Example:
        >>> simulator = TabularSimulator(pirl.TabularMDP(torch.eye(2).reshape(2, 1, 2).double(), initial=0, horizon=3))
        >>> simulator.step(simulator.reset(4), torch.zeros(4).long())
        tensor([0, 0, 0, 0])
    """

    def __init__(self, mdp: TabularMDP, horizon: int | None = None) -> None:
        horizon = mdp.horizon if horizon is None else horizon
        if horizon is None:
            raise HorizonError("the MDP has no horizon: say how long a roll-out is, TabularSimulator(mdp, horizon=...)")
        if horizon < 1:
            raise HorizonError(f"horizon is {horizon}; a roll-out has at least 1 decision")
        self.horizon, self.discount = horizon, mdp.discount
        self.log_prior, self.terminal, self.available = mdp.log_prior, mdp.terminal, mdp.available & mdp.acts
        self.steps_taken = 0
        self._base, self._start = base_policy(mdp), mdp.initial.double().cumsum(0)
        table = mdp.transitions
        self._following, self._last = table.column, table.row_count.cumsum(0) - 1
        # Row number plus the cumulative probability within the row increases over all entries: one search finds the
        # next states of any number of rows. Its rounding is that of the row number, 1e-16 of it.
        value = table.value.double()
        before = torch.cat([value.new_zeros(1), value.cumsum(0)])
        self._before = before[self._last + 1 - table.row_count]
        self._total = before[self._last + 1] - self._before
        self._key = table.row + (before[1:] - self._before[table.row]) / self._total[table.row]

    def reset(self, num: int, generator: Generator = None) -> Int[Tensor, " num"]:
        """First states from p(s_1)."""
        target = self._uniform(num, generator) * self._start[-1]
        # Never beyond the last state of positive probability, whatever is rounded.
        return torch.searchsorted(self._start, target, right=True).clamp_max(int((self._start < self._start[-1]).sum()))

    def step(
        self, states: Int[Tensor, " n"], actions: Int[Tensor, " n"], generator: Generator = None
    ) -> Int[Tensor, " n"]:
        """Next states from P(s'|s,a).

        Raises:
            UnavailableActionError: an action that is not available, or any in a terminal state.
        """
        refused = ~self.available[states, actions]
        if bool(refused.any()):
            state, action = int(states[refused][0]), int(actions[refused][0])
            raise UnavailableActionError(f"action {action} is not available in state {state}")
        row = states * self.log_prior.shape[1] + actions
        entry = torch.searchsorted(self._key, row + self._uniform(len(row), generator), right=True)
        self.steps_taken += len(row)
        return self._following[torch.minimum(entry, self._last[row])]

    def is_terminal(self, states: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Where episodes end."""
        return self.terminal[states]

    def sample_actions(self, states: Int[Tensor, " n"], generator: Generator = None) -> Int[Tensor, " n"]:
        """Actions from the base measure."""
        return self._base.sample(states, 0, generator)

    def _uniform(self, num: int, generator: Generator) -> Tensor:
        return torch.rand(num, generator=generator, dtype=torch.float64, device=self._start.device)


# -------------------------------------------------------------------------------------------------------- Gymnasium


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
        if copies < 1 or (copies > 1 and not (isinstance(env, str) or callable(env))):
            raise OptionError(f"copies is {copies}; it is at least 1, and more need an id or a function, not one env")
        if isinstance(env, str):
            self._envs = [gymnasium.make(env, max_episode_steps=horizon, **options) for _ in range(copies)]
        else:
            self._envs = [env() for _ in range(copies)] if callable(env) else [env]
        space: Any = self._envs[0].observation_space
        choice: Any = self._envs[0].action_space
        discrete, box = isinstance(choice, gymnasium.spaces.Discrete), isinstance(choice, gymnasium.spaces.Box)
        if not isinstance(space, gymnasium.spaces.Box) or not (discrete or box):
            raise OptionError(
                f"observations are {space} and actions {choice}: expected Box, and Discrete or Box (tables are read by "
                "pirl.envs.from_gymnasium)"
            )
        limit = getattr(self._envs[0].spec, "max_episode_steps", None) if horizon is None else horizon
        if limit is None or limit < 1:
            raise HorizonError(f"horizon is {limit}; the environment has none of its own: give at least 1")
        self.horizon, self.absorb, self.discrete, self.dtype = int(limit), absorb, discrete, dtype
        self.num_actions = int(choice.n) if discrete else None
        self.state_size = int(np.prod(space.shape))
        self.action_size = None if discrete else int(np.prod(choice.shape))
        self.steps_taken = 0

    @torch.no_grad()
    def roll_out(self, policy: Policy, num: int, generator: Generator = None) -> Rollouts:
        """As :func:`roll_out`. Each episode is seeded from ``generator``, whatever was played before."""
        seeds = torch.randint(2**31 - 1, (num,), generator=generator).tolist()
        copies = len(self._envs)
        parts = [self._side_by_side(policy, seeds[i : i + copies], generator) for i in range(0, num, copies)]
        return Rollouts(*(torch.cat(field) for field in zip(*parts, strict=True)))

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

        return _play(first, advance, policy, self.horizon, generator)._replace(rewards=rewards)

    def _vectors(self, observations: list[Any]) -> Float[Tensor, "n ds"]:
        return torch.as_tensor(np.stack([np.asarray(x, dtype=np.float64).reshape(-1) for x in observations])).to(
            self.dtype
        )

    def _action(self, action: Tensor) -> Any:
        space: Any = self._envs[0].action_space
        if self.discrete:
            return int(action) + int(space.start)
        return np.clip(action.cpu().numpy().reshape(space.shape), space.low, space.high).astype(space.dtype)


# ---------------------------------------------------------------------------------------------------------- the loop


def _play(
    first: Callable[[], tuple[Tensor, Tensor]],
    advance: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    policy: Policy,
    horizon: int,
    generator: Generator,
) -> Rollouts:
    """Episodes side by side; ``first`` and ``advance`` give states and which of them end an episode."""
    now, ended = asked("reset", first)
    num = len(now)
    states = now.unsqueeze(1).repeat(1, horizon + 1, *[1] * (now.dim() - 1))
    actions, density = None, None
    lengths = torch.zeros(num, dtype=torch.long, device=now.device)
    alive = (~ended).nonzero().flatten()
    for t in range(horizon):
        if not len(alive):
            break
        here = states[alive, t]
        chosen, log_prob = _decided(policy, here, t, generator)
        following, ended = asked(f"step {t}", lambda: advance(alive, here, chosen))  # noqa: B023
        if actions is None or density is None:
            fill = 0 if chosen.is_floating_point() else -1
            actions = chosen.new_full((num, horizon, *chosen.shape[1:]), fill)
            density = log_prob.new_zeros(num)
        states[alive, t + 1], actions[alive, t] = following, chosen
        density[alive] += log_prob
        lengths[alive] += 1
        alive = alive[~ended]
    if actions is None or density is None:  # every episode began at its end
        actions = torch.full((num, horizon), -1, device=now.device)
        density = torch.zeros(num, dtype=torch.get_default_dtype(), device=now.device)
    time = torch.arange(horizon + 1, device=now.device).expand(num, -1)
    after = time > lengths.unsqueeze(1)
    episode = torch.arange(num, device=now.device).unsqueeze(1)
    states = states[episode, torch.minimum(time, lengths.unsqueeze(1))]
    if not states.is_floating_point():
        states = states.masked_fill(after, -1)
    return Rollouts(states, actions, density, lengths)


def asked(when: str, call: Callable[[], Answer]) -> Answer:
    """What a simulator answers; whatever it raises becomes a :class:`pirl.errors.SimulatorError` that says when."""
    try:
        return call()
    except Exception as error:
        cause = (str(error).splitlines() or [""])[0]
        raise SimulatorError(f"the simulator failed at {when}: {type(error).__name__}: {cause}") from error


def checked_states(states: Any, num: int, like: Tensor | None = None) -> Tensor:
    """The simulator's answer, looked at."""
    if not isinstance(states, Tensor):
        raise TypeError(f"states must be a tensor, not {type(states).__name__}")
    event = states.shape[1:] if like is None else like.shape[1:]
    dtype = states.dtype if like is None else like.dtype
    if states.shape != (num, *event) or states.dtype != dtype:
        raise ValueError(f"states are {states.dtype} {tuple(states.shape)}; expected {dtype} {(num, *event)}")
    bad = ~states.isfinite() if states.is_floating_point() else states < 0
    if bool(bad.any()):
        episode = int(bad.nonzero()[0, 0])
        raise ValueError(f"state {states[episode].tolist()} of episode {episode} is not finite, or below 0")
    return states


def _decided(policy: Policy, states: Tensor, step: int, generator: Generator) -> tuple[Tensor, Tensor]:
    actions = policy.sample(states, step, generator)
    if actions.shape[:1] != states.shape[:1] or not bool(actions.isfinite().all()):
        raise InvalidPolicyError(
            f"the policy gave actions {tuple(actions.shape)} for {len(states)} states at step {step}, "
            "or non-finite ones: expected one finite action each"
        )
    log_prob = policy.log_prob(states, actions, step)
    if log_prob.shape != states.shape[:1] or not bool(log_prob.isfinite().all()):
        raise InvalidPolicyError(
            f"log_prob of the policy's own actions at step {step} is {tuple(log_prob.shape)} or not finite: expected "
            f"({len(states)},), finite"
        )
    return actions, log_prob
