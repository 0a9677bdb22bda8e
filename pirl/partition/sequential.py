"""Sequential Monte Carlo with a twist: particles that resample on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.errors import OptionError, PartitionError, check_counts, check_generator, check_numbers, form
from pirl.partition.estimators import log_mean_exp
from pirl.partition.gates import PartitionEstimate, check_log_weights, pareto_k, spread


class Particles(NamedTuple):
    """What :func:`smc` is run on; n particles a run, in ``[num_runs, n]``. Time t counts from 0 to T - 1.

    Each draw comes with log p - log q of the law it was made from (0 for the true one).

    Attributes:
        reset: shape -> first states, and their log ratio.
        propose: (t, states) -> actions, and log p(a|s) - log pi(a|s).
        step: (t, states, actions) -> next states, and log P(s'|s,a) - log q(s'|s,a).
        reward: (t, states, actions) -> reward, differentiable in its parameters.
        twist: (t, states) -> estimate of log beta_t, for t = 0 to T - 1; log beta_T is 0. None: no twist.

    Example:
        >>> walk = Particles(
        ...     reset=lambda shape: (torch.zeros(shape), torch.zeros(shape)),
        ...     propose=lambda t, states: (torch.randn_like(states), torch.zeros_like(states)),
        ...     step=lambda t, states, actions: (states + actions, torch.zeros_like(states)),
        ...     reward=lambda t, states, actions: -actions.square() / 2,
        ... )
        >>> smc(walk, num_steps=5, num_particles=1000).log_partition.round(decimals=1)  # -5/2 log 2
        tensor(-1.7000)
    """

    reset: Callable[[tuple[int, int]], tuple[Tensor, Tensor]]
    propose: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    step: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
    reward: Callable[[int, Tensor, Tensor], Tensor]
    twist: Callable[[int, Tensor], Tensor] | None = None


def smc(
    particles: Particles,
    *,
    num_steps: int,
    num_particles: int,
    num_runs: int = 16,
    threshold: float = 0.5,
    generator: torch.Generator | None = None,
) -> PartitionEstimate:
    """Twisted sequential Monte Carlo over time: Z-hat is unbiased for any twist.

    The soft value, estimated, as a twist moves the particles to where reward will be. With the exact log beta as twist
    and all draws from the tilted laws, or deterministic ones, the variance is zero. The estimate is the log mean of
    independent runs, whose spread gives the standard error. The gradient is that of the final particles' returns under
    their weights (Fisher's identity; through resampling nothing is differentiated), consistent as particles grow.

    Args:
        particles: the laws to draw from.
        num_steps: T.
        num_particles: n of each run.
        num_runs: independent runs; of one alone the standard error is NaN.
        threshold: resample (systematically) where the effective share of particles falls below it.
        generator: of the resampling.

    Raises:
        OptionError: an option out of range.
        PartitionError: a weight is NaN or +inf, or all weights of a run are 0; or a law answers in another shape.

    Example:
        >>> walk = Particles(
        ...     reset=lambda shape: (torch.zeros(shape), torch.zeros(shape)),
        ...     propose=lambda t, states: (torch.randn_like(states), torch.zeros_like(states)),
        ...     step=lambda t, states, actions: (states + actions, torch.zeros_like(states)),
        ...     reward=lambda t, states, actions: -actions.square() / 2,
        ... )
        >>> smc(walk, num_steps=5, num_particles=1000).log_partition.round(decimals=1)  # -5/2 log 2
        tensor(-1.7000)
    """
    runs = _filter(particles, num_steps, (num_runs, num_particles), threshold, generator, keep_paths=False)
    weight = runs.log_weights.softmax(-1) * runs.log_partition.softmax(-1)[:, None]
    through = (weight * runs.returns).sum()
    _, relative = spread(runs.log_partition)
    error = relative / math.sqrt(num_runs)
    # Particles that share ancestors are fewer than their weights say: not more than the spread of the runs shows, and
    # of a single run, without a spread, nobody knows how many (NaN).
    ess = torch.minimum(1 / weight.square().sum(), 1 / error.square())
    return PartitionEstimate(
        log_mean_exp(runs.log_partition) + (through - through.detach()),
        error,
        ess,
        pareto_k((runs.log_weights.log_softmax(-1) + runs.log_partition.detach()[:, None]).flatten()),
        num_runs * num_particles,
    )


class ParticleRuns(NamedTuple):
    """Independent runs of a particle filter, and the trajectories of their particles.

    Example:
        >>> still = Particles(
        ...     reset=lambda shape: (torch.zeros(shape), torch.zeros(shape)),
        ...     propose=lambda t, states: (torch.zeros_like(states), torch.zeros_like(states)),
        ...     step=lambda t, states, actions: (states, torch.zeros_like(states)),
        ...     reward=lambda t, states, actions: torch.ones_like(states),
        ... )
        >>> smc_trajectories(still, num_steps=3, num_particles=10, num_runs=4).log_partition
        tensor([3., 3., 3., 3.])
    """

    log_partition: Float[Tensor, " R"]
    """log Z-hat of each run; the mean of Z-hat is unbiased."""
    log_weights: Float[Tensor, "R n"]
    """Of the particles at the end, within a run."""
    returns: Float[Tensor, "R n"]
    """Of the particles' trajectories; differentiable in the reward."""
    states: Tensor
    """``[R, n, T + 1, *event]``."""
    actions: Tensor
    """``[R, n, T, *event]``."""
    ancestors: Int[Tensor, "R n"]
    """Which of the run's first particles each one descends from: few of them after much resampling."""


@torch.no_grad()
def smc_trajectories(
    particles: Particles,
    num_steps: int,
    num_particles: int,
    num_runs: int = 16,
    threshold: float = 0.5,
    generator: torch.Generator | None = None,
) -> ParticleRuns:
    """:func:`smc`, for the trajectories themselves: weighted draws of p(tau | O).

    Arguments and errors are those of :func:`smc`.

    Example:
        >>> still = Particles(
        ...     reset=lambda shape: (torch.zeros(shape), torch.zeros(shape)),
        ...     propose=lambda t, states: (torch.zeros_like(states), torch.zeros_like(states)),
        ...     step=lambda t, states, actions: (states, torch.zeros_like(states)),
        ...     reward=lambda t, states, actions: torch.ones_like(states),
        ... )
        >>> runs = smc_trajectories(still, num_steps=3, num_particles=10, num_runs=4)
        >>> runs.states.shape, runs.actions.shape, runs.log_weights.shape
        (torch.Size([4, 10, 4]), torch.Size([4, 10, 3]), torch.Size([4, 10]))
    """
    return _filter(particles, num_steps, (num_runs, num_particles), threshold, generator, keep_paths=True)


def _filter(
    particles: Particles,
    num_steps: int,
    shape: tuple[int, int],
    threshold: float,
    generator: torch.Generator | None,
    keep_paths: bool,
) -> ParticleRuns:
    check_generator(generator)
    if not isinstance(particles, Particles):
        raise OptionError(
            f"particles is {form(particles)}: give pirl.partition.Particles(reset, propose, step, reward)"
        )
    check_counts(1, num_steps=num_steps, num_runs=shape[0], num_particles=shape[1])
    check_numbers(0.0, 1.0, threshold=threshold)
    states, ratio = _pair("reset", particles.reset(shape), shape)
    own = particles.twist or (lambda t, s: ratio.new_zeros(shape))

    def twist(t: int, states: Tensor) -> Tensor:
        return _numbers("twist", own(t, states), shape).detach()

    ahead = twist(0, states)
    log_weight, log_partition = ratio.detach() + ahead, ratio.new_zeros(shape[0])
    returns: Tensor = ratio.new_zeros(shape)
    visited, chosen, parents = [states], list[Tensor](), list[Tensor]()
    same = torch.arange(shape[1], device=ratio.device).expand(shape)
    for t in range(num_steps):
        actions, preferred = _pair("propose", particles.propose(t, states), shape)
        gained = _numbers("reward", particles.reward(t, states, actions), shape)
        following, moved = _pair("step", particles.step(t, states, actions), shape)
        later = twist(t + 1, following) if t + 1 < num_steps else torch.zeros_like(ahead)
        log_weight = log_weight + (gained + preferred + moved + later - ahead).detach()
        check_log_weights(log_weight)
        returns, states, ahead, ancestor = returns + gained, following, later, same
        poor = spread(log_weight)[0] / shape[1] < threshold
        if t + 1 < num_steps and bool(poor.any()):
            ancestor = torch.where(poor[:, None], systematic(log_weight.softmax(-1), generator), same)
            log_partition = log_partition + torch.where(poor, log_mean_exp(log_weight), 0.0)
            log_weight = torch.where(poor[:, None], 0.0, log_weight)
            returns, ahead, states = (take(x, ancestor) for x in (returns, ahead, following))
        if keep_paths:
            visited.append(following)
            chosen.append(actions)
            parents.append(ancestor)
    if keep_paths:
        # Back along the line of ancestors: each step's particles are those before it was resampled.
        line = same
        for t in reversed(range(num_steps)):
            line = parents[t].gather(1, line)
            visited[t + 1], chosen[t] = take(visited[t + 1], line), take(chosen[t], line)
        visited[0] = take(visited[0], line)
    paths = (torch.stack(visited, 2), torch.stack(chosen, 2), line) if keep_paths else (states, states, same)
    return ParticleRuns(log_partition + log_mean_exp(log_weight), log_weight, returns, *paths)


def _numbers(name: str, answer: Any, shape: tuple[int, int]) -> Tensor:
    """What a law answered, one number a particle."""
    if not isinstance(answer, Tensor) or answer.shape != shape or not answer.is_floating_point():
        raise PartitionError(
            f"{name} of the particles gave {form(answer)}; expected floating numbers {shape}, one each"
        )
    return answer


def _pair(name: str, answer: Any, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What a law drew ``[num_runs, n, *event]``, and its log ratio."""
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], Tensor):
        raise PartitionError(f"{name} of the particles gave {form(answer)}; expected what it drew and its log ratio")
    if tuple(answer[0].shape[:2]) != shape:
        raise PartitionError(f"{name} of the particles drew {tuple(answer[0].shape)}; expected [*{shape}, *event]")
    return answer[0], _numbers(name, answer[1], shape)


def take(particles: Tensor, ancestor: Int[Tensor, "R n"]) -> Tensor:
    """Particles ``[R, n, *event]`` replaced by their ancestors."""
    index = ancestor.reshape(*ancestor.shape, *(1,) * (particles.dim() - 2)).expand_as(particles)
    return particles.gather(1, index)


def systematic(
    weights: Float[Tensor, "R n"], generator: torch.Generator | None, num: int | None = None
) -> Int[Tensor, "R m"]:
    """Ancestors of ``num`` particles (n by default) of each run, by one uniform number a run; in increasing order."""
    runs, count = weights.shape
    num = count if num is None else num
    device = weights.device if generator is None else generator.device
    offset = torch.rand(runs, 1, generator=generator, dtype=weights.dtype, device=device).to(weights.device)
    points = (torch.arange(num, device=weights.device) + offset) / num
    return torch.searchsorted(weights.cumsum(-1), points).clamp(max=count - 1)
