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

from pirl.errors import OptionError, SimulatorError
from pirl.partition import Particles, log_mean_exp, smc_trajectories, systematic
from pirl.simulators import EpisodeSimulator, Generator, Policy, Rollouts, Simulator, log_density

Reward = Tensor | Callable[[Tensor, Tensor], Tensor]
"""A table ``[S, A]`` or ``[S, 1]`` of numbered states, or a function of states ``[n, ds]`` and actions ``[n, da]``."""


@runtime_checkable
class ValuedPolicy(Policy, Protocol):
    """A policy that knows what it expects, such as :class:`pirl.soft_q_learning.SoftPolicy`."""

    def value(self, states: Tensor, step: int) -> Float[Tensor, " n"]:
        """An estimate of log beta_t(s)."""


class TiltedProposal:
    """p(tau) exp(r0(tau)) / Z-hat(r0): what draws of :func:`tilt` count as in a :class:`pirl.Pool`.

    Attributes:
        reward: r0.
        log_partition: log Z-hat(r0).
        standard_error: of it.
        efficiency: how many independent draws one particle is worth, at most 1: particles share ancestors.
    """

    def __init__(
        self, reward: Reward, base: Policy, log_partition: float, standard_error: float, efficiency: float
    ) -> None:
        self.reward, self.base = reward, base
        self.log_partition, self.standard_error, self.efficiency = log_partition, standard_error, efficiency

    def log_density(self, states: Tensor, actions: Tensor, lengths: Tensor) -> Float[Tensor, " n"]:
        """r0(tau) + sum_t log p(a_t|s_t) - log Z-hat, relative to the dynamics."""
        base = log_density(self.base, states, actions, lengths)
        return returns(self.reward, states, actions, lengths) + base - self.log_partition


def returns(reward: Reward, states: Tensor, actions: Tensor, lengths: Tensor) -> Float[Tensor, " n"]:
    """sum_t r(s_t, a_t) of trajectories ``[n, T + 1, *event]``, the no-op of a terminal state included."""
    filled = torch.zeros(len(lengths), device=lengths.device)
    pairs = Rollouts(states, actions, filled, lengths)
    if isinstance(reward, Tensor):
        return pairs.returns(reward.expand(-1, int(actions.max()) + 1) if reward.shape[-1] == 1 else reward)
    visited, acted, counted = pairs.pairs()
    return (reward(visited, acted) * counted).sum(-1)


@torch.no_grad()
def tilt(
    simulator: Simulator | EpisodeSimulator,
    policy: ValuedPolicy,
    reward: Reward,
    num: int,
    generator: Generator = None,
    *,
    base: Policy,
    num_runs: int = 20,
    threshold: float = 0.5,
) -> tuple[Rollouts, TiltedProposal]:
    """Draw trajectories of p(tau | O) for a reward, approximately, by particles.

    Args:
        simulator: with a stateless ``step``, so that a particle can go on where another one was.
        policy: for this reward; its ``value`` is the twist.
        reward: r0.
        num: how many; divided among the runs.
        base: the base measure over actions, normalised.
        num_runs: independent particle filters, whose spread tells how good they are.
        threshold: resample where the effective share of particles falls below it.

    Returns:
        Equally weighted roll-outs, and what they count as: ``pool.add(*tilt(...))``.

    Raises:
        OptionError: fewer than two runs, or two particles a run.
        SimulatorError: the simulator plays whole episodes only.
        PartitionError: a weight is not finite, or all are 0.

    Example:
        >>> learner = SoftQLearner(simulator, reading="trajectory")
        >>> pool = pool.add(*tilt(simulator, learner.update(reward, 500), reward, 1000, base=base_policy(mdp)))
    """
    if num_runs < 2 or num < 2 * num_runs:
        raise OptionError(f"{num} particles in {num_runs} runs: at least 2 runs, of at least 2 particles")
    if not isinstance(simulator, Simulator):
        raise SimulatorError("particles need a simulator with reset and step, and this one plays whole episodes")
    size = num // num_runs
    laws = _laws(simulator, policy, reward, base, generator)
    runs = smc_trajectories(laws, simulator.horizon, size, num_runs, threshold, generator)
    # Equal weights: first runs are drawn by their Z-hat, then particles within each by their weights.
    weight = (runs.log_partition[:, None] + runs.log_weights.log_softmax(-1)).flatten().softmax(0)
    drawn = systematic(weight[None], generator)[0]
    states, actions = runs.states.flatten(0, 1)[drawn], runs.actions.flatten(0, 1)[drawn]
    lengths = _lengths(actions)
    spread = (runs.log_partition - log_mean_exp(runs.log_partition)).exp()
    relative = float(spread.std()) / math.sqrt(num_runs)
    proposal = TiltedProposal(
        reward, base, float(log_mean_exp(runs.log_partition)), relative, _efficiency(runs.returns, runs.log_weights)
    )
    return Rollouts(states, actions, proposal.log_density(states, actions, lengths), lengths), proposal


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


def _lengths(actions: Tensor) -> Int[Tensor, " n"]:
    if actions.is_floating_point():
        return torch.full((len(actions),), actions.shape[1], device=actions.device)
    return (actions >= 0).sum(1)


def _laws(simulator: Simulator, policy: ValuedPolicy, reward: Reward, base: Policy, generator: Generator) -> Particles:
    """The simulator's laws with this policy; numbered states are -1 after a terminal state's no-op."""

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
        over = getattr(simulator, "is_terminal", None)
        at_end = (
            torch.zeros_like(states, dtype=torch.bool)
            if over is None
            else over(states.clamp_min(0).flatten()).reshape(states.shape)
        )
        return (states >= 0) & ~at_end

    def reset(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        states = simulator.reset(shape[0] * shape[1], generator).unflatten(0, shape)
        return states, policy.value(states.flatten(0, 1)[:1], 0).new_zeros(shape)

    def propose(t: int, states: Tensor) -> tuple[Tensor, Tensor]:
        living = acts(states)
        actions = each(lambda s: policy.sample(s, t, generator), -1.0, states, living=living)
        ratio = each(lambda s, a: base.log_prob(s, a, t) - policy.log_prob(s, a, t), 0.0, states, actions,
                     living=living)  # fmt: skip
        return actions, ratio

    def step(t: int, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        living = acts(states)
        following = each(lambda s, a: simulator.step(s, a, generator), -1.0, states, actions, living=living)
        return following, policy.value(states.flatten(0, 1)[:1].clamp_min(0), t).new_zeros(states.shape[:2])

    def gained(t: int, states: Tensor, actions: Tensor) -> Tensor:
        if not isinstance(reward, Tensor):
            return reward(states, actions)
        table = reward.expand(-1, int(actions.max().clamp_min(0)) + 1) if reward.shape[-1] == 1 else reward
        return torch.where(states >= 0, table[states.clamp_min(0), actions.clamp_min(0)], 0.0)

    def twist(t: int, states: Tensor) -> Tensor:
        living = acts(states) if states.is_floating_point() else states >= 0
        return each(lambda s: policy.value(s, t), 0.0, states, living=living)

    return Particles(reset, propose, step, gained, twist)
