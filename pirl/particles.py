"""Draws of p(tau | O) by particles: a proposal for log Z that no causal policy can be under chance.

A policy that knows no better than its simulator leaves every trajectory's weight to luck. Particles that are resampled
as they go (:func:`pirl.partition.smc`, twisted by a learned log beta) follow p(tau | O) for one reward r0, luck
included, and give log Z(r0). For another reward the weights are exp(r - r0), whatever the dynamics; several such sets,
each of its own reward, make one mixture, by the balance heuristic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.errors import InvalidRewardError, OptionError, PartitionError, SimulatorError, check_counts, form
from pirl.partition import Particles, log_mean_exp, smc_trajectories
from pirl.partition.sequential import systematic
from pirl.simulators import EpisodeSimulator, Policy, Rollouts, Simulator, log_density
from pirl.simulators.playing import asked, checked_ends, checked_states, known_ends
from pirl.simulators.protocols import Generator, check_policy
from pirl.simulators.rollouts import paying

_STARTS = 16
"""So many starts are drawn for each particle, and chosen among by what they promise: first states are luck as well."""

Reward = Tensor | Callable[[Tensor, Tensor], Tensor]
"""A table ``[S, A]`` or ``[S, 1]`` of numbered states, or a function of states ``[n, ds]`` and actions ``[n, da]``."""


@runtime_checkable
class ValuedPolicy(Policy, Protocol):
    """A policy that knows what it expects, such as :class:`pirl.soft_q_learning.SoftPolicy`.

    Example:
        >>> simulator = pirl.simulators.TabularSimulator(world)
        >>> learned = pirl.soft_q_learning.soft_q_learning(simulator, wanted, num_rollouts=20)
        >>> isinstance(learned, ValuedPolicy), isinstance(pirl.simulators.base_policy(world), ValuedPolicy)
        (True, False)
    """

    def value(self, states: Tensor, step: int) -> Float[Tensor, " n"]:
        """An estimate of log beta_t(s)."""


class TiltedProposal:
    """p(tau) exp(r0(tau)) / Z-hat(r0): what draws of :func:`tilt` are of, in a :class:`pirl.Pool`.

    Attributes:
        reward: r0.
        log_partition: log Z-hat(r0).
        standard_error: of it.
        efficiency: how many independent draws one particle is worth, at most 1: particles share ancestors, and runs
            whose Z-hat is small hardly count.
        horizon: T of the simulator, before which a shorter episode ended; None: as many as there are columns.
        steps_taken: environment steps of all particles, those that left no draw included.

    Raises:
        OptionError: the efficiency is out of range.

    Example:
        >>> simulator = pirl.simulators.TabularSimulator(world)
        >>> learned = pirl.soft_q_learning.soft_q_learning(simulator, wanted, 100, reading="trajectory")
        >>> rollouts, proposal = tilt(simulator, learned, wanted, 1000, base=pirl.simulators.base_policy(world))
        >>> bool(abs(proposal.log_partition - pirl.log_partition(world, wanted)) < 5 * proposal.standard_error + 0.05)
        True
    """

    def __init__(
        self,
        reward: Reward,
        base: Policy,
        log_partition: float,
        standard_error: float,
        efficiency: float,
        horizon: int | None = None,
        steps_taken: int = 0,
    ) -> None:
        if not 0 < efficiency <= 1:
            raise OptionError(f"efficiency is {efficiency}: a particle counts for more than 0 draws, and 1 at most")
        self.reward, self.base, self.horizon, self.steps_taken = reward, base, horizon, steps_taken
        self.log_partition, self.standard_error, self.efficiency = log_partition, standard_error, efficiency

    def log_density(
        self, states: Tensor, actions: Tensor, lengths: Tensor, log_base: Tensor | None = None
    ) -> Float[Tensor, " n"]:
        """r0(tau) + sum_t log p(a_t|s_t) - log Z-hat, relative to the dynamics; the second term may be given."""
        base = log_density(self.base, states, actions, lengths) if log_base is None else log_base
        return returns(self.reward, states, actions, lengths, self.horizon) + base - self.log_partition


def returns(
    reward: Reward, states: Tensor, actions: Tensor, lengths: Tensor, horizon: int | None = None
) -> Float[Tensor, " n"]:
    """sum_t r(s_t, a_t) of trajectories ``[n, T + 1, *event]``, the no-op of a terminal state included.

    Args:
        horizon: T of the simulator, where the trajectories are narrower.

    Example:
        >>> returns(wanted, walks.states, walks.actions, walks.lengths).shape
        torch.Size([20])
    """
    return _gains(reward, states, actions, lengths, horizon).sum(-1)


def _gains(
    reward: Reward, states: Tensor, actions: Tensor, lengths: Tensor, horizon: int | None = None
) -> Float[Tensor, "n steps"]:
    visited, acted, counted = paying(states, actions, lengths, horizon)
    if isinstance(reward, Tensor):
        return reward.expand(-1, max(reward.shape[-1], int(acted.max()) + 1))[visited, acted] * counted
    return reward(visited.flatten(0, 1), acted.flatten(0, 1)).unflatten(0, counted.shape) * counted


@torch.no_grad()
def tilt(
    simulator: Simulator | EpisodeSimulator,
    policy: ValuedPolicy,
    reward: Reward,
    num: int,
    generator: Generator = None,
    *,
    base: Policy,
    num_runs: int | None = None,
    threshold: float = 0.5,
) -> tuple[Rollouts, TiltedProposal]:
    """Draw trajectories of p(tau | O) for a reward, approximately, by particles.

    Their starts are chosen among sixteen times as many of ``simulator.reset``, by the policy's ``value``.

    Args:
        simulator: with a stateless ``step``, so that a particle can go on where another one was.
        policy: for this reward; its ``value`` is the twist.
        reward: r0.
        num: how many; divided among the runs.
        base: the base measure over actions.
        num_runs: independent particle filters, whose spread tells how good they are; by default 5 to 20, of a hundred
            particles where there are as many. Small runs find less.
        threshold: resample where the effective share of particles falls below it.

    Returns:
        Equally weighted roll-outs, and what they count as: ``pool.add(*tilt(...))``.

    Raises:
        OptionError: fewer than two runs, or two particles a run.
        SimulatorError: the simulator plays whole episodes only, ends episodes of vectors early, or failed.
        PartitionError: a weight is not finite, or all are 0.

    Example:
        >>> from pirl.simulators import TabularSimulator, base_policy, roll_out
        >>> simulator, base = TabularSimulator(world), base_policy(world)
        >>> learned = pirl.soft_q_learning.soft_q_learning(simulator, wanted, 100, reading="trajectory")
        >>> pool = pirl.Pool.of(roll_out(simulator, base, 500), base, base)
        >>> pool.add(*tilt(simulator, learned, wanted, 1000, base=base))
        Pool(1500 samples of 2 policies)
    """
    check_counts(1, num=num, num_runs=2 if num_runs is None else num_runs)
    num_runs = max(min(max(num // 100, 5), 20, num // 2), 2) if num_runs is None else num_runs
    if num_runs < 2 or num < 2 * num_runs:
        raise OptionError(f"{num} particles in {num_runs} runs: at least 2 runs, of at least 2 particles")
    if not can_tilt(simulator) or not isinstance(simulator, Simulator):
        raise SimulatorError(
            "particles need a simulator with reset and step, without is_terminal where states are vectors: play all "
            "decisions, whatever happens, or add a policy's roll-outs"
        )
    if not isinstance(policy, ValuedPolicy):
        raise OptionError(f"policy is {form(policy)}: give one with value(states, step), such as a learner's")
    check_policy(base, "base")
    known = getattr(simulator, "log_prior", None)
    fits = (
        callable(reward)
        if known is None
        else isinstance(reward, Tensor) and tuple(reward.shape) in (tuple(known.shape), (len(known), 1))
    )
    if not fits:
        expected = "a function of vectors" if known is None else f"a table {list(known.shape)} or [{len(known)}, 1]"
        raise InvalidRewardError(f"the reward is {form(reward)}; expected {expected}")
    steps, starts = list[int](), list[Tensor]()
    laws = _laws(simulator, policy, reward, base, generator, steps, starts)
    runs = smc_trajectories(laws, simulator.horizon, -(-num // num_runs), num_runs, threshold, generator)
    # Equal weights: first runs are drawn by their Z-hat, then particles within each by their weights. Neighbours share
    # ancestors, and are shuffled, so that any part of the draws is as good as another.
    weight = (runs.log_partition[:, None] + runs.log_weights.log_softmax(-1)).flatten().softmax(0)
    drawn = systematic(weight[None], generator, num)[0]
    device = drawn.device if generator is None else generator.device
    drawn = drawn[torch.randperm(num, generator=generator, device=device).to(drawn.device)]
    states, actions = runs.states.flatten(0, 1), runs.actions.flatten(0, 1)
    gains = _gains(reward, states, actions, _lengths(actions)).unflatten(0, runs.returns.shape)
    early = -(-gains.shape[-1] // 3)
    # First steps share most ancestors; and what runs of small Z-hat drew is hardly there.
    worth = min(_efficiency(gains[..., :k].sum(-1), runs.log_weights) for k in (early, gains.shape[-1]))
    worth = min(1.0, worth / (num_runs * float(runs.log_partition.softmax(0).square().sum())))
    # A reward that pays late tells nothing of early steps, for which another one may pay: those are as many as the
    # starts that have descendants.
    first = starts[0].gather(1, runs.ancestors)
    worth = min(worth, _families(first, weight.unflatten(0, runs.returns.shape)) / weight.numel())
    spread = (runs.log_partition - log_mean_exp(runs.log_partition)).exp()
    # The relative spread of a few Z-hats is bounded; that of their logarithms is not.
    error = max(float(spread.std()), float(runs.log_partition.std())) / math.sqrt(num_runs)
    log_z = float(log_mean_exp(runs.log_partition))
    proposal = TiltedProposal(reward, base, log_z, error, worth, simulator.horizon, sum(steps))
    states, actions = states[drawn], actions[drawn]
    lengths = _lengths(actions)
    density, terminal = proposal.log_density(states, actions, lengths), known_ends(simulator, states)
    discount = getattr(simulator, "discount", 1.0)
    return Rollouts(states, actions, density, lengths, terminal=terminal, discount=discount), proposal


def can_tilt(simulator: object) -> bool:
    """Whether particles can go on from any state of a simulator: it steps, and episodes of vectors do not end early.

    Example:
        >>> can_tilt(pirl.simulators.TabularSimulator(world))
        True
    """
    finite = hasattr(simulator, "log_prior")
    return isinstance(simulator, Simulator) and (finite or not hasattr(simulator, "is_terminal"))


def _efficiency(values: Float[Tensor, "R n"], log_weights: Float[Tensor, "R n"]) -> float:
    """Independent draws that a particle is worth, by how much the runs' mean returns differ."""
    weight = log_weights.softmax(-1)
    means = (weight * values).sum(-1)
    within = float((weight * (values - means[:, None]).square()).sum(-1).mean())
    between = float(means.var())
    if between <= 1e-20 * max(1.0, within):
        return 1.0
    # The variance of all draws is that within runs and that between them.
    return min(1.0, (within + between) / between / values.shape[1])


def _families(starts: Int[Tensor, "R n"], weight: Float[Tensor, "R n"]) -> float:
    """Effective number of starts, by the weight of the particles that descend from each."""
    share = weight.new_zeros(len(weight), int(starts.max()) + 1).scatter_add(1, starts, weight)
    return 1 / float(share.square().sum())


def _lengths(actions: Tensor) -> Int[Tensor, " n"]:
    if actions.is_floating_point():
        return torch.full((len(actions),), actions.shape[1], device=actions.device)
    return (actions >= 0).sum(1)


def _laws(
    simulator: Simulator,
    policy: ValuedPolicy,
    reward: Reward,
    base: Policy,
    generator: Generator,
    steps: list[int],
    starts: list[Tensor],
) -> Particles:
    """The simulator's laws with this policy; numbered states are -1 after a terminal state's no-op.

    Args:
        steps: how many steps the simulator is asked for, each time, is noted here.
        starts: which start each first particle is, of those that were drawn, likewise ``[R, n]``.
    """

    def each(function: Callable[..., Tensor], fill: float, *particles: Tensor, living: Tensor) -> Tensor:
        """A function of flat particles, on those that live."""
        index = living.flatten().nonzero().flatten()
        found = function(*(x.flatten(0, 1)[index] for x in particles))
        result = torch.full((living.numel(), *found.shape[1:]), fill, dtype=found.dtype, device=found.device)
        result[index] = found
        return result.unflatten(0, living.shape)

    def acts(states: Tensor) -> Tensor:
        if states.is_floating_point():
            return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        at_end = checked_ends(simulator, states.clamp_min(0).flatten()).reshape(states.shape)
        return (states >= 0) & ~at_end

    def reset(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        runs, many = shape[0], _STARTS * shape[1]
        found = asked("reset", lambda: checked_states(simulator.reset(runs * many, generator), runs * many))
        states = found.unflatten(0, (runs, many))
        promise = twist(0, states)
        if promise.shape != (runs, many):
            raise PartitionError(
                f"policy.value gave {form(promise)} for {runs * many} states: expected one number each"
            )
        chosen = systematic(promise.softmax(-1), generator, shape[1])
        starts.append(chosen)
        # Mean exp(promise) of what was drawn, for exp(promise) of each that was chosen: unbiased for any twist.
        ratio = log_mean_exp(promise).unsqueeze(1) - promise.gather(1, chosen)
        return states[torch.arange(runs, device=states.device).unsqueeze(1), chosen], ratio

    def zeros(states: Tensor, t: int) -> Tensor:
        """In the precision of the policy's values."""
        return torch.zeros_like(policy.value(states.flatten(0, 1)[:1].clamp_min(0), t)).new_zeros(states.shape[:2])

    def propose(t: int, states: Tensor) -> tuple[Tensor, Tensor]:
        living = acts(states)
        actions = each(lambda s: policy.sample(s, t, generator), -1.0, states, living=living)
        ratio = each(lambda s, a: base.log_prob(s, a, t) - policy.log_prob(s, a, t), 0.0, states, actions,
                     living=living)  # fmt: skip
        return actions, ratio

    def step(t: int, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        def advance(s: Tensor, a: Tensor) -> Tensor:
            steps.append(len(s))
            return asked(f"step {t}", lambda: checked_states(simulator.step(s, a, generator), len(s), like=s))

        return each(advance, -1.0, states, actions, living=acts(states)), zeros(states, t)

    def gained(t: int, states: Tensor, actions: Tensor) -> Tensor:
        if not isinstance(reward, Tensor):
            return reward(states.flatten(0, 1), actions.flatten(0, 1)).unflatten(0, states.shape[:2])
        table = reward.expand(-1, max(reward.shape[-1], int(actions.max()) + 1))
        return torch.where(states >= 0, table[states.clamp_min(0), actions.clamp_min(0)], 0.0)

    def twist(t: int, states: Tensor) -> Tensor:
        living = acts(states) if states.is_floating_point() else states >= 0
        return each(lambda s: policy.value(s, t), 0.0, states, living=living)

    return Particles(reset, propose, step, gained, twist)
