"""The partition function of unknown dynamics, estimated from samples: tensors of log weights in, log Z-hat out.

For trajectories tau_j from a proposal q, w_j = p(tau_j) exp(sum of rewards) / q(tau_j), whose mean is unbiased for
Z = E_p[exp sum of rewards]. Where q used the true dynamics these cancel, and

    log w_j = sum_t r(s_t, a_t) + sum_t [log p(a_t|s_t) - log pi(a_t|s_t)],

so that a simulator is enough. This is the trajectory reading of exp(r): under chance no causal policy makes the weights
constant. Every estimator takes leading batch dimensions (one for each reward) and is differentiable in the rewards;
its gradient is the average of the returns' gradients under the self-normalised weights. Sources: Finn, Levine and
Abbeel (2016); Veach and Guibas (1995) for the balance heuristic; Shi and Cornish (2021) for the multilevel estimator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pirl.errors import OptionError, PartitionError, check_counts

__all__ = [
    "ParticleRuns",
    "Particles",
    "PartitionEstimate",
    "Sandwich",
    "importance",
    "log_mean_exp",
    "mixture_log_density",
    "multilevel",
    "pareto_k",
    "reconcile",
    "require_trusted",
    "sandwich",
    "smc",
    "smc_trajectories",
    "trusted_k",
    "untrusted",
]

ESS_PER_DEMONSTRATION = 100
"""Effective samples a demonstration for a posterior mean within a tenth of a posterior standard deviation."""

MULTILEVEL_K = 0.4
"""Beyond this tail index the multilevel estimator's variance may be infinite."""

_SHARE_OF_LEVELS = 2.0**-1.5
_FEWEST_FOR_TAIL = 25


class PartitionEstimate(NamedTuple):
    """An estimate of log Z, and how far to trust it. All of shape ``[*batch]``; only ``log_partition`` has a gradient.

    Attributes:
        log_partition: log Z-hat, in nats.
        standard_error: its first-order standard error, CV / sqrt(N) (the bias is about minus half its square).
        ess: effective number of samples, (sum w)^2 / sum w^2.
        pareto_k: tail index of the weights (Vehtari et al. 2024); -inf for constant weights, NaN for too few of them.
        num_samples: N.

    Example:
        >>> estimate = importance(torch.zeros(2, 100))
        >>> estimate.log_partition, estimate.num_samples
        (tensor([0., 0.]), 100)
    """

    log_partition: Float[Tensor, "*batch"]
    standard_error: Float[Tensor, "*batch"]
    ess: Float[Tensor, "*batch"]
    pareto_k: Float[Tensor, "*batch"]
    num_samples: int


class Sandwich(NamedTuple):
    """Bounds that hold in expectation, with the standard errors of their averages: all ``[*batch]``.

    Example:
        >>> bounds = sandwich(torch.zeros(100), torch.zeros(10))
        >>> bounds.lower, bounds.upper
        (tensor(0.), tensor(0.))
    """

    lower: Float[Tensor, "*batch"]
    lower_error: Float[Tensor, "*batch"]
    upper: Float[Tensor, "*batch"]
    upper_error: Float[Tensor, "*batch"]


def log_mean_exp(log_weights: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch"]:
    """log of the mean weight: the estimate of log Z alone, for use under ``torch.func`` transforms.

    Example:
        >>> log_mean_exp(torch.tensor([1.0, 3.0]).log()).exp()
        tensor(2.)
    """
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


def mixture_log_density(log_densities: Float[Tensor, "K N"], counts: Tensor) -> Float[Tensor, " N"]:
    """log q of samples from several proposals, taken as one mixture (the balance heuristic): log sum_k (n_k/N) q_k.

    Args:
        log_densities: log q_k(tau_j) of every sample under every proposal, up to what is common to all (dynamics).
        counts: how many of the samples each proposal gave ``[K]``.

    Raises:
        PartitionError: shapes disagree, a density is NaN or +inf, or a sample has no density under any proposal.

    Example:
        >>> mixture_log_density(torch.zeros(2, 5), torch.tensor([3, 2])).round(decimals=4).abs()
        tensor([0., 0., 0., 0., 0.])
    """
    if log_densities.dim() != 2 or counts.shape != log_densities.shape[:1] or not bool((counts > 0).any()):
        raise PartitionError(
            f"densities {tuple(log_densities.shape)} do not fit counts {tuple(counts.shape)}: expected [K, N] and [K]"
        )
    if bool((log_densities.isnan() | (log_densities == torch.inf)).any()):
        proposal, sample = (log_densities.isnan() | (log_densities == torch.inf)).nonzero()[0].tolist()
        raise PartitionError(f"log density of sample {sample} under proposal {proposal} is NaN or +inf")
    share = (counts / counts.sum()).to(log_densities).log().unsqueeze(1)
    log_density = (share + log_densities).logsumexp(0)
    if bool((log_density == -torch.inf).any()):
        sample = int((log_density == -torch.inf).nonzero()[0])
        raise PartitionError(
            f"sample {sample} has density 0 under every proposal: give the log densities of the policies it came from"
        )
    return log_density


def reconcile(
    log_densities: Float[Tensor, "K N"],
    origin: Int[Tensor, " N"],
    errors: Float[Tensor, " K"],
    worth: Float[Tensor, " K"] | None = None,
) -> Float[Tensor, " K"]:
    """What to add to the proposals' estimated log normalising constants, so that all samples agree on them.

    Samples that several proposals could have made tell the ratios of their constants: by reverse logistic regression
    (Geyer 1994; the same as MBAR, Shirts and Chodera 2008), the maximum of the likelihood of which proposal each
    sample came from, p(k | tau) proportional to n_k q_k(tau) exp(-c_k). Its variance is H^- - diag(1/n) (Kong et al.
    2003): none where proposals are the same. Weighed against what is known of each constant beforehand, N(0, error^2).

    Args:
        log_densities: log q_k of every sample under every proposal, with the constants as estimated.
        origin: which proposal each sample came from.
        errors: standard errors of the log constants; 0 where they are known.
        worth: independent draws that a sample counts for (particles share ancestors); 1 by default.

    Example:
        >>> reconcile(torch.zeros(2, 6), torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0.1, 0.1]))
        tensor([0., 0.])
    """
    # In double precision: what proposals without overlap leave is far below that of floats.
    constants, free = torch.zeros_like(errors), (errors > 0).nonzero().flatten()
    if len(free) < 2:
        return constants
    label = origin.unsqueeze(0) == free.unsqueeze(1)
    kept = label.any(0)
    label, density = label[:, kept].double(), log_densities[free][:, kept].double()
    weight = (torch.ones_like(errors) if worth is None else worth).double()[origin[kept]]
    counts = (label * weight).sum(1)
    ones = torch.full_like(label[:, :1] @ label[:, :1].mT, 1 / len(free))  # fixes the sum, which is free
    # Proposals without samples in common have no curvature; their agreement is worth nothing below.
    floor = counts.sum() * ones + 1e-9 * torch.diag(counts)
    agreed = torch.zeros_like(counts)
    for _ in range(100):
        share = (counts.log() - agreed).unsqueeze(1).add(density).softmax(0)
        curvature = torch.diag((share * weight).sum(1)) - (share * weight) @ share.mT
        step = torch.linalg.solve(curvature + floor, ((share - label) * weight).sum(1))
        agreed = agreed + step.clamp(-1, 1)  # a longer one is a sign of samples that do not overlap
        if float(step.abs().max()) < 1e-10:
            break
    centre = torch.diag(torch.ones_like(counts)) - ones
    variance = torch.linalg.inv(curvature + floor) - torch.diag(1 / counts)
    size, axes = torch.linalg.eigh(centre @ variance @ centre)
    precision = centre @ (axes / size.clamp(min=1e-8)) @ axes.mT @ centre
    before = torch.diag(errors[free].double() ** -2)
    constants[free] = torch.linalg.solve(precision + before, precision @ agreed).to(errors)
    return constants


def importance(log_weights: Float[Tensor, "*batch N"]) -> PartitionEstimate:
    """Importance sampling: log of the mean weight, with diagnostics.

    E log Z-hat is about log Z - CV^2 / 2N and its variance CV^2 / N, for a finite coefficient of variation CV.

    Args:
        log_weights: log w_j = return + log p - log q, for each reward of a batch.

    Raises:
        PartitionError: a weight is NaN or +inf, or all are 0.

    Example:
        >>> importance(torch.zeros(100)).ess.round()
        tensor(100.)
    """
    _check(log_weights)
    with torch.no_grad():
        ess, relative = _spread(log_weights)
        khat = pareto_k(log_weights)
    return PartitionEstimate(
        log_mean_exp(log_weights), relative / math.sqrt(log_weights.shape[-1]), ess, khat, log_weights.shape[-1]
    )


def multilevel(
    draw: Callable[[int], Float[Tensor, "*batch n"]],
    num_replicates: int,
    base: int = 2,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> PartitionEstimate:
    """Unbiased for log Z: the antithetic randomised multilevel estimator, averaged over replicates.

    A replicate draws a level K with P(K = k) proportional to 2^(-1.5 k), then ``base * 2^(K + 1)`` samples; it is the
    log mean of the first ``base`` plus (log mean of all - half the log means of the two halves) / P(K). Its variance is
    finite only for light tails: Pareto k-hat below 0.4.

    Args:
        draw: gives n fresh log weights, independent of those before.
        num_replicates: how many to average; the standard error is theirs.
        base: samples of level 0.
        generator: of the levels.
        check: refuse heavy tails.

    Raises:
        PartitionError: the weights' tail index is 0.4 or more, or a weight is not finite.

    Example:
        >>> multilevel(lambda n: torch.zeros(n), 10).log_partition
        tensor(0.)
    """
    if not callable(draw):
        raise OptionError(f"draw is a {type(draw).__name__}: give a function of n that makes n log weights")
    check_counts(1, num_replicates=num_replicates, base=base)
    uniform = torch.rand(num_replicates, generator=generator, dtype=torch.float64)
    level = (uniform.log() / math.log(_SHARE_OF_LEVELS)).floor().long()  # geometric
    values, weights = [], []
    for k in range(int(level.max()) + 1):
        count = int((level == k).sum())
        if count == 0:
            continue
        size = base * 2 ** (k + 1)
        drawn = draw(count * size)
        _check(drawn)
        weights.append(drawn.detach())
        parts = drawn.unflatten(-1, (count, size))
        halves = log_mean_exp(parts.unflatten(-1, (2, size // 2)))  # [*batch, count, 2]
        probability = (1 - _SHARE_OF_LEVELS) * _SHARE_OF_LEVELS**k
        correction = log_mean_exp(halves) - halves.mean(-1)
        values.append(log_mean_exp(parts[..., :base]) + correction / probability)
    replicates, everything = torch.cat(values, -1), torch.cat(weights, -1)
    khat = pareto_k(everything)
    if check and bool((khat >= MULTILEVEL_K).any()):
        raise PartitionError(
            f"weights have Pareto k-hat {float(khat.max()):.2f}, and the multilevel estimator has a finite variance "
            f"only below {MULTILEVEL_K}: improve the proposal, or use plain importance sampling"
        )
    error = replicates.detach().std(-1) / math.sqrt(num_replicates)
    return PartitionEstimate(replicates.mean(-1), error, _spread(everything)[0], khat, everything.shape[-1])


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
        num_runs: independent runs.
        threshold: resample (systematically) where the effective share of particles falls below it.
        generator: of the resampling.

    Raises:
        PartitionError: a weight is NaN or +inf, or all weights of a run are 0.

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
    _, relative = _spread(runs.log_partition)
    return PartitionEstimate(
        log_mean_exp(runs.log_partition) + (through - through.detach()),
        relative / math.sqrt(num_runs),
        1 / weight.square().sum(),
        pareto_k(runs.log_weights.log_softmax(-1).flatten()),
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
    states, ratio = particles.reset(shape)
    twist = particles.twist or (lambda t, s: ratio.new_zeros(shape))
    ahead = twist(0, states).detach()
    log_weight, log_partition = ratio.detach() + ahead, ratio.new_zeros(shape[0])
    returns: Tensor = ratio.new_zeros(shape)
    visited, chosen, parents = [states], list[Tensor](), list[Tensor]()
    same = torch.arange(shape[1], device=ratio.device).expand(shape)
    for t in range(num_steps):
        actions, preferred = particles.propose(t, states)
        gained = particles.reward(t, states, actions)
        following, moved = particles.step(t, states, actions)
        later = twist(t + 1, following).detach() if t + 1 < num_steps else torch.zeros_like(ahead)
        log_weight = log_weight + (gained + preferred + moved + later - ahead).detach()
        _check(log_weight)
        returns, states, ahead, ancestor = returns + gained, following, later, same
        poor = _spread(log_weight)[0] / shape[1] < threshold
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
    paths = (torch.stack(visited, 2), torch.stack(chosen, 2)) if keep_paths else (states, states)
    return ParticleRuns(log_partition + log_mean_exp(log_weight), log_weight, returns, *paths)


def take(particles: Tensor, ancestor: Int[Tensor, "R n"]) -> Tensor:
    """Particles ``[R, n, *event]`` replaced by their ancestors."""
    index = ancestor.reshape(*ancestor.shape, *(1,) * (particles.dim() - 2)).expand_as(particles)
    return particles.gather(1, index)


def sandwich(
    log_weights: Float[Tensor, "*batch N"], exact_log_weights: Float[Tensor, "*batch M"], block: int | None = None
) -> Sandwich:
    """A lower and an upper bound of log Z, in expectation.

    Lower: the average over blocks of log Z-hat (Jensen). Upper: the same with the last member of each block replaced
    by an exact draw of p(tau | O), which makes 1 / Z-hat unbiased for 1 / Z (Grosse, Ancha and Roy 2016).

    Args:
        log_weights: of samples of the proposal.
        exact_log_weights: of exact draws of the tilted law at the same rewards, by the same formula.
        block: samples a block; by default as many blocks as there are exact draws.

    Raises:
        PartitionError: too few samples for a block of each exact draw, or a weight is not finite.

    Example:
        >>> log_weights = 0.5 * torch.randn(10_000)  # log Z = 1/8; exact draws have weights N(1/4, 1/4)
        >>> bounds = sandwich(log_weights, 0.25 + 0.5 * torch.randn(100))
        >>> bool(bounds.lower < bounds.upper)
        True
    """
    _check(log_weights)
    _check(exact_log_weights)
    total, exact = log_weights.shape[-1], exact_log_weights.shape[-1]
    block = total // exact if block is None else block
    if block < 1 or block * 2 > total or exact < 2:
        raise PartitionError(f"{total} samples and {exact} exact draws make no two blocks: give more of them")
    count = total // block
    parts = log_weights[..., : count * block].unflatten(-1, (count, block))
    low = log_mean_exp(parts)
    pairs = min(count, exact)
    high = log_mean_exp(torch.cat([parts[..., :pairs, :-1], exact_log_weights[..., :pairs, None]], -1))
    errors = (low.detach().std(-1) / math.sqrt(count), high.detach().std(-1) / math.sqrt(pairs))
    return Sandwich(low.mean(-1), errors[0], high.mean(-1), errors[1])


def pareto_k(log_weights: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch"]:
    """Tail index of the weights (ArviZ's Pareto smoothing): -inf for constant ones, NaN for fewer than 25.

    Example:
        >>> pareto_k(torch.zeros(100))
        tensor(-inf)
    """
    if log_weights.shape[-1] < _FEWEST_FOR_TAIL:
        return log_weights.new_full(log_weights.shape[:-1], torch.nan)
    from arviz_stats.base import array_stats

    rows = log_weights.detach().reshape(-1, log_weights.shape[-1]).double()
    found = []
    for row in rows.cpu():
        # Equal returns, summed in another order, differ by rounding; the fit takes such a difference for a scale.
        row = row[row.isfinite()].round(decimals=9)
        if len(row) < _FEWEST_FOR_TAIL:
            found.append(math.nan)
            continue
        # The largest weights, of which Pareto smoothing makes the tail; equal ones are no tail, and are refused there.
        size = 3 * math.sqrt(len(row)) if len(row) > 225 else len(row) / 5
        tail = row.topk(math.floor(size)).values
        heavy = bool(tail[0] > tail[-1])
        with np.errstate(divide="ignore", invalid="ignore"):
            khat = float(array_stats.psislw(-row.numpy())[1]) if heavy else -math.inf  # it takes inverse weights
        found.append(-math.inf if math.isnan(khat) else khat)  # a tail of a few values, many times each
    return torch.tensor(found, dtype=log_weights.dtype, device=log_weights.device).reshape(log_weights.shape[:-1])


def trusted_k(num_samples: int) -> float:
    """Largest Pareto k-hat at which N weights can be averaged: min(1 - 1 / log10 N, 0.7) (Vehtari et al. 2024).

    Example:
        >>> trusted_k(100), trusted_k(10_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(max(num_samples, 2)), 0.7)


def untrusted(estimate: PartitionEstimate, num_demonstrations: int, share: float = 0.95) -> str | None:
    """Why a posterior that used these estimates should not be trusted, with figures and advice; None if it may be.

    With M demonstrations and a frozen proposal the posterior's mean moves by about sqrt(M / ESS) standard deviations.
    The gate therefore asks, over draws of the posterior and not at one point, for ESS of 100 M and a k-hat below
    :func:`trusted_k`.

    Args:
        estimate: at posterior draws, ``[draws]``.
        num_demonstrations: M.
        share: of the draws that must pass.

    Example:
        >>> untrusted(importance(torch.zeros(3, 1000)), num_demonstrations=5) is None
        True
        >>> untrusted(importance(torch.zeros(3, 1000)), num_demonstrations=50)
        'log Z is not known well enough: 1000 effective samples of 1000 for 50 demonstrations (needed: 5000)...'
    """
    ess, khat = estimate.ess.detach().flatten(), estimate.pareto_k.detach().flatten()
    need, most = ESS_PER_DEMONSTRATION * num_demonstrations, trusted_k(estimate.num_samples)
    low = float(ess.quantile(1 - share))
    high = float(khat.nan_to_num(nan=1.0, neginf=-10.0).quantile(share))
    found = []
    if low < need:
        moved = math.sqrt(num_demonstrations / max(low, 1e-9))
        many = f"{num_demonstrations} demonstration{'s' if num_demonstrations > 1 else ''}"
        found.append(
            f"{low:.0f} effective samples of {estimate.num_samples} for {many} (needed: {need}) may move posterior "
            f"means by {moved:.2g} standard deviations"
        )
    if high >= most:
        found.append(f"Pareto k-hat of the weights is {high:.2f} (at most {most:.2f})")
    if not found:
        return None
    return f"log Z is not known well enough: {'; '.join(found)}: add samples of policies nearer to the posterior"


def require_trusted(estimate: PartitionEstimate, num_demonstrations: int, share: float = 0.95) -> None:
    """Refuse estimates that :func:`untrusted` finds fault with.

    Raises:
        PartitionError: with figures and advice.

    Example:
        >>> require_trusted(importance(torch.zeros(3, 1000)), num_demonstrations=5)
    """
    reason = untrusted(estimate, num_demonstrations, share)
    if reason is not None:
        raise PartitionError(reason)


def _check(log_weights: Tensor) -> None:
    if not isinstance(log_weights, Tensor) or log_weights.dim() < 1 or log_weights.shape[-1] < 1:
        kind = tuple(log_weights.shape) if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise PartitionError(f"log weights are {kind}; expected a tensor [*batch, N] of at least one sample")
    wrong = log_weights.isnan() | (log_weights == torch.inf)
    if bool(wrong.any()):
        raise PartitionError(
            f"log weight of sample {int(wrong.nonzero()[0, -1])} is NaN or +inf: check rewards and densities"
        )
    if bool((log_weights == -torch.inf).all(-1).any()):
        raise PartitionError("all weights are 0: no sample of the proposal is possible under the model")


def _spread(log_weights: Float[Tensor, "*batch N"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Effective sample size, and the coefficient of variation."""
    log_weights = log_weights.detach()
    ess = 1 / log_weights.softmax(-1).square().sum(-1)
    count = log_weights.shape[-1]
    return ess, ((count / ess - 1).clamp(min=0) * count / max(count - 1, 1)).sqrt()


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
