"""The loop that plays a simulator with a policy, and what it makes of wrong answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pirl.errors import (
    InvalidPolicyError,
    InvalidTrajectoriesError,
    PirlError,
    SimulatorError,
    check_counts,
    check_generator,
    form,
    named_line,
)
from pirl.simulators.protocols import (
    EpisodeSimulator,
    Generator,
    Policy,
    Simulator,
    WholeLaw,
    check_policy,
    check_simulator,
)
from pirl.simulators.rollouts import Rollouts

Answer = TypeVar("Answer")


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

    size = number_of_states(simulator)

    def first() -> tuple[Tensor, Tensor]:
        states = checked_states(simulator.reset(num, generator), num, size=size)
        return states, checked_ends(simulator, states)

    def advance(episodes: Tensor, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        following = checked_states(simulator.step(states, actions, generator), len(states), like=states, size=size)
        return following, checked_ends(simulator, following)

    played = play(first, advance, policy, simulator.horizon, generator)
    return played._replace(
        terminal=known_ends(simulator, played.states), discount=getattr(simulator, "discount", played.discount)
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
        cause = named_line(error)
        if isinstance(error, TypeError) and "argument" in cause:
            cause += "; it is called as reset(num, generator), and step(states, actions, generator)"
        raise SimulatorError(f"the simulator failed at {when}: {cause}") from error


def number_of_states(simulator: object) -> int | None:
    """S, where the simulator has a table of it."""
    table = getattr(simulator, "log_prior", None)
    return table.shape[0] if isinstance(table, Tensor) and table.dim() == 2 else None


def checked_ends(simulator: Any, states: Tensor) -> Tensor:
    """Which states end an episode, looked at: none where the simulator does not tell."""
    known, table = getattr(simulator, "is_terminal", None), known_ends(simulator, states)
    if known is None:
        none = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        return none if table is None else table[states]
    ended = known(states)
    if not isinstance(ended, Tensor) or ended.dtype != torch.bool or ended.shape != states.shape[:1]:
        raise TypeError(f"is_terminal gave {form(ended)}; expected a bool tensor ({len(states)},)")
    if table is not None and not torch.equal(ended, table[states]):
        state = int(states[ended != table[states]][0])
        raise ValueError(
            f"is_terminal({state}) is {not bool(table[state])}, and terminal[{state}] {bool(table[state])}"
        )
    return ended


def checked_states(states: Any, num: int, like: Tensor | None = None, size: int | None = None) -> Tensor:
    """The simulator's answer, looked at; numbers are below ``size``."""
    if not isinstance(states, Tensor):
        raise TypeError(f"states must be a tensor, not {type(states).__name__}")
    event = states.shape[1:] if like is None else like.shape[1:]
    dtype = states.dtype if like is None else like.dtype
    if states.shape != (num, *event) or states.dtype != dtype:
        raise ValueError(f"states are {states.dtype} {tuple(states.shape)}; expected {dtype} {(num, *event)}")
    vectors = states.is_floating_point()
    if like is None and vectors and states.dim() < 2:
        raise ValueError(f"states are {states.dtype} {tuple(states.shape)}; expected vectors, [{num}, 1] of one number")
    bad = ~states.isfinite() if vectors else (states < 0) | (states >= (size or math.inf))
    if bool(bad.any()):
        episode = int(bad.nonzero()[0, 0])
        expected = "not finite" if vectors else f"out of range, of {size} states" if size else "below 0"
        raise ValueError(f"state {states[episode].tolist()} of episode {episode} is {expected}")
    return states


def _decides(call: Callable[[], Any], step: int, states: Tensor) -> Tensor:
    """What a policy answers, a tensor; whatever it raises becomes an InvalidPolicyError that says when."""
    given = f"at step {step}, given states {states.dtype} {tuple(states.shape)}"
    try:
        answer = call()
    except PirlError:
        raise
    except Exception as error:
        raise InvalidPolicyError(
            f"the policy failed {given}: {named_line(error)}: is it one for such states and actions?"
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
