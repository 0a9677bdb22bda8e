"""Do demonstrations' starts say the same of the reward as what follows? Starts count as chosen, and may not be."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.pool import Pool

_UNLIKELY = 0.001
"""Chance of such a conflict, of any direction, below which it is told."""
_SHARES = (0.01, 0.99)
"""Shares of what is known, between which what starts tell can be compared with the rest."""
_MOST_DIRECTIONS, _MOST_STATES, _MOST_CROSSED = 10, 20, 6
"""Of rewards, of numbered states that are told apart, and of coordinates whose products are looked at: what a hundred
draws and some thousand samples can tell."""


def told_of_starts(pool: Pool, starts: Tensor, returns: Float[Tensor, "D *batch J"]) -> str | None:
    """What :func:`conflict` finds, in words, with advice; None where it may be chance."""
    errors, chance = conflict(pool, starts, returns)
    if chance >= _UNLIKELY:
        return None
    return (
        f"demonstrations' starts and what follows them differ about the reward by {errors:.1f} standard errors: starts "
        "that the simulator draws count as chosen; if somebody set them, or nobody chose them, give a list of "
        "demonstrations and a simulator for each start, else costs come out several times too small"
    )


def conflict(pool: Pool, starts: Tensor, returns: Float[Tensor, "D *batch J"]) -> tuple[float, float]:
    """By how many standard errors demonstrations' starts, and what follows them, differ about the reward.

    In the trajectory reading a start has p(s_0 | O), the simulator's law times what follows is worth, and tells of the
    reward as what follows does. At the posterior's mean the slopes of the log density, by the starts and by the rest,
    nearly cancel, and if both are of one reward either is as small as both let it be. Along a direction in which the
    posterior has standard deviation 1, and starts have the share s of its precision, their slope has variance s - s^2
    (a conflict of evidence, as by Marshall and Spiegelhalter 2007, or a test of specification, Hausman 1978).

    Directions are those in which returns vary over the posterior; the slope of the starts' part is the sum of the
    derivative of the return over demonstrations, as far as a regression on samples' starts tells it, less its mean.
    What the regression misses counts to the rest.

    Args:
        starts: ``[*plate]`` numbers, or ``[*plate, ds]``.
        returns: of the samples at posterior draws; of a batch, one for each demonstration, or 1 along the plate.

    Returns:
        The largest over directions, and the chance that any is as large; 0 and 1 where starts tell nothing, or all.
    """
    first = pool.states[:, 0].cpu()
    if bool((first == first[0]).all()):
        return 0.0, 1.0
    plate = starts.shape if pool.tabular else starts.shape[:-1]
    batch = returns.shape[1:-1]
    every = torch.broadcast_shapes(plate, batch)
    row = torch.arange(math.prod(batch)).reshape(batch).expand(every).flatten()
    event = starts.shape[len(plate) :]
    theirs = starts.cpu().expand(*every, *event).reshape(len(row), *event)
    known = _terms(first, theirs)
    ours, theirs = known[: len(first)], known[len(first) :]
    offset = pool.log_offset.detach().cpu().double()
    rows = returns.detach().cpu().double().reshape(len(returns), -1, returns.shape[-1]).unbind(1)
    errors = torch.cat([_conflicts(each, offset, ours, theirs[row == at]) for at, each in enumerate(rows)])
    if not len(errors):
        return 0.0, 1.0
    largest = float(errors.amax())
    return largest, min(len(errors) * math.erfc(largest / math.sqrt(2)), 1.0)


def _conflicts(returns: Float[Tensor, "D J"], offset: Tensor, ours: Tensor, theirs: Tensor) -> Float[Tensor, " k"]:
    """The conflict along each direction of which starts tell something."""
    middle, draws, number = returns.mean(0), len(returns), len(theirs)
    if draws < 2 or number < 1:
        return torch.zeros(0, dtype=torch.float64)
    weight = (middle + offset).softmax(-1)
    away = returns - middle
    size, turn = torch.linalg.eigh((away * weight) @ away.mT / (draws - 1))
    kept = size > 1e-9 * size[-1].clamp_min(1e-12)
    turn = turn[:, kept][:, -_MOST_DIRECTIONS:]
    # returns = middle + coordinates @ slopes, where coordinates have covariance I over the draws
    slopes = turn.mT @ away / math.sqrt(draws - 1)
    mean = weight @ ours
    ours, slopes = ours - mean, slopes - (slopes @ weight).unsqueeze(-1)
    gram = (ours.mT * weight) @ ours
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()
    inverse = torch.linalg.pinv(gram * scale * scale.unsqueeze(-1), hermitian=True, rtol=1e-9)
    fit = (inverse * scale * scale.unsqueeze(-1)) @ ((ours.mT * weight) @ slopes.mT)
    told = ours @ fit
    share, turn = torch.linalg.eigh(number * (told.mT * weight) @ told)
    moved = ((theirs - mean) @ fit).sum(0) @ turn
    # The mean over starts is of samples, and the posterior's of draws: both have errors of their own.
    error = share * (1 - share) + share * number * weight.square().sum() + share.square() / draws
    usable = (share > _SHARES[0]) & (share < _SHARES[1])
    return moved[usable].abs() / error[usable].sqrt()


def _terms(ours: Tensor, theirs: Tensor) -> Float[Tensor, "n P"]:
    """What a regression knows of starts, of the samples and then of demonstrations."""
    both = torch.cat([ours, theirs])
    if not both.is_floating_point():
        states, place = both.unique(return_inverse=True)
        common = place[len(ours) :].bincount(minlength=len(states)).argsort(descending=True, stable=True)
        return (place.unsqueeze(-1) == common[:_MOST_STATES]).double()
    both = both.double() - ours.double().mean(0)
    size = both.shape[-1]
    pairs = [(i, j) for i in range(size) for j in range(i, size if size <= _MOST_CROSSED else i + 1)]
    return torch.cat([both, torch.stack([both[:, i] * both[:, j] for i, j in pairs], -1)], -1)
