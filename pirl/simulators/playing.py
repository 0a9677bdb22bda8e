"""What a simulator and a policy are, and the loop that plays one with the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pirl.errors import (
    DiscountError,
    InvalidPolicyError,
    InvalidRewardError,
    InvalidTrajectoriesError,
    OptionError,
    PirlError,
    SimulatorError,
    check_counts,
    check_generator,
    form,
)
from pirl.trajectories import End, Trajectories

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
    horizon: int | None = None
    """T of the simulator, where these are fewer columns (all ended before); None: as many as there are columns."""
    terminal: Bool[Tensor, " S"] | None = None
    """Which numbered states end an episode, where the simulator tells it."""
    discount: float = 1.0
    """Of the simulator, where it tells it; :meth:`returns` are plain sums all the same."""

    def pairs(self) -> tuple[Tensor, Tensor, Bool[Tensor, "num T"]]:
        """States and actions ``[num, T, *event]`` that a reward can be asked for, and which of them count.

        What does not count is state 0 and action 0 (or a repeated vector); what does includes the no-op.
        """
        return paying(self.states, self.actions, self.lengths, self.horizon)

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


def paying(
    states: Tensor, actions: Tensor, lengths: Int[Tensor, " num"], horizon: int | None = None
) -> tuple[Tensor, Tensor, Bool[Tensor, "num steps"]]:
    """States and actions that a reward is paid for, and which of them count: whoever sums rewards asks here.

    Decisions count; so does the no-op of a numbered state that ended an episode before the horizon, even where it is
    in the last column, as of demonstrations that all ended early. What does not count is state 0 and action 0.

    Args:
        states: ``[num, T + 1, *event]`` (or T, where the last ones are not known).
        actions: ``[num, T, *event]``.
        horizon: T of the simulator; by default the number of actions' columns.

    Example:
        >>> ended = torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([1])  # a decision, then the end
        >>> [paying(*ended, horizon)[2].tolist() for horizon in (1, 8)]
        [[[True]], [[True, True]]]
    """
    steps, length = actions.shape[1], lengths.unsqueeze(1)
    horizon = steps if horizon is None else horizon
    if states.is_floating_point():
        return states[:, :steps], actions, torch.arange(steps, device=lengths.device) < length
    size = max(steps, min(states.shape[1], horizon))
    states, time = states[:, :size], torch.arange(size, device=lengths.device)
    actions = torch.cat([actions, actions.new_zeros(len(actions), size - steps, *actions.shape[2:])], 1)
    no_op = (time == length) & (states >= 0) & (length < horizon)
    actions = actions if actions.is_floating_point() else actions.clamp_min(0)
    return states.clamp_min(0), actions, (time < length) | no_op


@torch.no_grad()
def roll_out(
    simulator: Simulator | EpisodeSimulator, policy: Policy, num: int, generator: Generator = None
) -> Rollouts:
    """Play ``num`` episodes of a policy.

    Args:
        simulator: :class:`TabularSimulator`, :class:`GymSimulator`, or your own.
        generator: of all that is random; torch's own by default.

    Raises:
        OptionError: what was given is no simulator, no policy, or no number of episodes.
        SimulatorError: the simulator raised, or gave the wrong number of states or non-finite ones; names the step.
        InvalidPolicyError: the policy raised, or gave the wrong number of actions, non-finite ones, or ones of density
            0; names the step.

    Example:
        >>> mdp = pirl.TabularMDP(torch.ones(1, 2, 1).double(), initial=0, horizon=3)
        >>> roll_out(TabularSimulator(mdp), base_policy(mdp), 5).log_density.exp()
        tensor([0.1250, 0.1250, 0.1250, 0.1250, 0.1250], dtype=torch.float64)
    """
    check_simulator(simulator)
    check_policy(policy)
    check_counts(1, num=num)
    check_generator(generator)
    if isinstance(simulator, EpisodeSimulator):
        played = simulator.roll_out(policy, num, generator)
        return played._replace(discount=getattr(simulator, "discount", played.discount))

    def is_terminal(states: Tensor) -> Tensor:
        known = getattr(simulator, "is_terminal", None)
        return torch.zeros(len(states), dtype=torch.bool, device=states.device) if known is None else known(states)

    def first() -> tuple[Tensor, Tensor]:
        states = checked_states(simulator.reset(num, generator), num)
        return states, is_terminal(states)

    def advance(episodes: Tensor, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        following = checked_states(simulator.step(states, actions, generator), len(states), like=states)
        return following, is_terminal(following)

    played = play(first, advance, policy, simulator.horizon, generator)
    return played._replace(
        terminal=known_ends(simulator, played.states), discount=getattr(simulator, "discount", played.discount)
    )


def check_simulator(simulator: Any) -> None:
    """Refuse what cannot be played, and say what it lacks.

    Raises:
        OptionError: it is no simulator.
    """
    if not isinstance(simulator, type) and isinstance(simulator, (Simulator, EpisodeSimulator)):
        return
    lacks = [name for name in ("horizon", "reset", "step") if not hasattr(simulator, name)]
    raise OptionError(
        f"the simulator is {form(simulator)}, which cannot be played for want of {', '.join(lacks) or 'an instance'}: "
        "give one in this place (a TabularMDP is wrapped, pirl.simulators.TabularSimulator(mdp))"
    )


def check_policy(policy: Any, name: str = "policy") -> None:
    """Refuse what cannot decide.

    Raises:
        OptionError: it is no policy, nor a law of whole trajectories.
    """
    if isinstance(policy, type) or not isinstance(policy, (Policy, WholeLaw)):
        raise OptionError(
            f"{name} is {form(policy)}, and no policy with sample and log_prob: give one, such as "
            "pirl.simulators.TabularPolicy of a table, or pirl.local_control.gaussian_base(...)"
        )


def check_demonstrations(demos: Any) -> None:
    """Refuse what is no demonstrations.

    Raises:
        OptionError: says what belongs there.
    """
    if not hasattr(demos, "as_tensor"):
        raise OptionError(f"demos is {form(demos)}: give Trajectories or ContinuousTrajectories first")


def require_undiscounted(simulator: object) -> None:
    """Refuse a simulator with a discount, or its roll-outs, where returns are sums: the trajectory reading has none.

    Raises:
        DiscountError: its discount is not 1.
    """
    discount = getattr(simulator, "discount", 1)
    if discount != 1:
        raise DiscountError(
            f"the trajectory reading has no discount, and the simulator's is {discount:g}: make it of a problem with "
            "discount=1 and a horizon"
        )


def known_ends(simulator: object, states: Tensor) -> Bool[Tensor, " S"] | None:
    """The simulator's mask of terminal states, where states are numbers and it has one."""
    found = getattr(simulator, "terminal", None)
    return found if isinstance(found, Tensor) and not states.is_floating_point() else None


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
    check_policy(policy)
    if not isinstance(states, Tensor) or not isinstance(actions, Tensor):
        raise InvalidTrajectoriesError(
            f"states are {form(states)} and actions {form(actions)}: give a policy, then two tensors"
        )
    if lengths is None:
        everywhere = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device)
        acting = everywhere if actions.is_floating_point() else actions >= 0
        lengths = acting.long().cumprod(1).sum(1)
    if isinstance(policy, WholeLaw):
        return policy.log_density(states, actions, lengths)
    total = None
    for t in range(int(lengths.max()) if len(lengths) else 0):
        here = (lengths > t).nonzero().flatten()
        now, chosen = states[here, t], actions[here, t]
        log_prob = _decides(lambda: policy.log_prob(now, chosen, t), t, now)  # noqa: B023
        total = log_prob.new_zeros(len(actions)) if total is None else total
        total = total.index_add(0, here, log_prob)
    return torch.zeros(len(actions), device=actions.device) if total is None else total


def play(
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


def _decides(call: Callable[[], Any], step: int, states: Tensor) -> Tensor:
    """What a policy answers, a tensor; whatever it raises becomes an InvalidPolicyError that says when."""
    given = f"at step {step}, given states {states.dtype} {tuple(states.shape)}"
    try:
        answer = call()
    except PirlError:
        raise
    except Exception as error:
        cause = (str(error).splitlines() or [""])[0]
        raise InvalidPolicyError(
            f"the policy failed {given}: {type(error).__name__}: {cause}: is it one for such states and actions?"
        ) from error
    if not isinstance(answer, Tensor):
        raise InvalidPolicyError(f"the policy gave {form(answer)} {given}: expected a tensor")
    return answer


def _decided(policy: Policy, states: Tensor, step: int, generator: Generator) -> tuple[Tensor, Tensor]:
    actions = _decides(lambda: policy.sample(states, step, generator), step, states)
    if actions.shape[:1] != states.shape[:1] or not bool(actions.isfinite().all()):
        raise InvalidPolicyError(
            f"the policy gave actions {tuple(actions.shape)} for {len(states)} states at step {step}, "
            "or non-finite ones: expected one finite action each"
        )
    log_prob = _decides(lambda: policy.log_prob(states, actions, step), step, states)
    if log_prob.shape != states.shape[:1] or not bool(log_prob.isfinite().all()):
        raise InvalidPolicyError(
            f"log_prob of the policy's own actions at step {step} is {tuple(log_prob.shape)} or not finite: expected "
            f"({len(states)},), finite"
        )
    return actions, log_prob
