"""Do demonstrations' starts say the same of the reward as what follows? Starts count as chosen, and may not be."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pirl.pool import Pool

UNLIKELY = 0.001
"""Chance of such a conflict below which it is told."""
ADVICE = (
    "starts that the simulator draws count as chosen; if somebody set them, or nobody chose them, give a list of "
    "demonstrations and a simulator for each start, else costs come out several times too small; or the reward "
    "lacks what demonstrators wanted"
)
_SHARES = (0.01, 0.99)
"""Shares of what is known, between which what starts tell can be compared with the rest."""
_MOST_DIRECTIONS, _MOST_STATES, _MOST_CROSSED = 10, 20, 6
"""Of rewards, of numbered states that are told apart, and of coordinates whose products are looked at: what a hundred
draws and some thousand samples can tell."""
_SAMPLES_A_TERM = 20
"""Effective samples for each number that the regression learns."""
_LEAST_LEARNED = 0.1
"""Of the posterior's precision along a direction, the demonstrations' part that makes it worth looking at."""
_REPEATS = 8000
_CLOSE = 0.02
"""Chance by a normal law below which it is found by simulation: sums of a few rare things are not normal."""


class Conflict(NamedTuple):
    """By how many standard errors starts and what follows differ about the reward, and how likely as much is."""

    errors: float
    chance: float


def conflict(
    pool: Pool,
    starts: Tensor,
    returns: Float[Tensor, "D *batch J"],
    of_demos: Float[Tensor, "D *plate"],
) -> Conflict:
    """By how many standard errors demonstrations' starts, and what follows them, differ about the reward.

    In the trajectory reading a start has p(s_0 | O), the simulator's law times what follows is worth, and tells of the
    reward as what follows does. Both log-likelihoods, of starts and of the rest, have a slope at the posterior's mean;
    a slope over its variance is how far off that part of the data takes the mean to be. If both are of one reward the
    two differ by chance (the test of specification of Hausman 1978; a conflict of evidence, Marshall and Spiegelhalter
    2007). Along a direction of which all demonstrations together have information 1, and starts the share s, the
    difference is ((1 - s) slope of starts - s slope of the rest), of variance s (1 - s). The prior is no part of it.

    Directions are those in which returns vary over the posterior, as far as demonstrations and not the prior tell them.
    The slope of the starts' part is the sum of the derivative of the return over demonstrations, as far as a regression
    on samples' starts tells it, less its mean. What the regression misses counts to the rest.

    Args:
        starts: ``[*plate]`` numbers, or ``[*plate, ds]``.
        returns: of the samples at posterior draws; of a batch, one for each demonstration, or 1 along the plate.
        of_demos: of the demonstrations.

    Returns:
        The largest over directions, and the chance that any is as large, by the normal law where that is far from
        small, and else by drawing as many trajectories from the samples as there are demonstrations; 0 and 1 where
        starts tell nothing, or all.
    """
    first = pool.states[:, 0].cpu()
    if bool((first == first[0]).all()):
        return Conflict(0.0, 1.0)
    batch, draws = returns.shape[1:-1], len(returns)
    every = torch.broadcast_shapes(starts.shape if pool.tabular else starts.shape[:-1], batch, of_demos.shape[1:])
    row = torch.arange(math.prod(batch), device="cpu").reshape(batch).expand(every).flatten()
    event = starts.shape[starts.dim() - (first.dim() - 1) :]
    theirs = starts.cpu().expand((*every, *event)).reshape((len(row), *event))
    gained = of_demos.detach().cpu().double().expand((draws, *every)).reshape(draws, -1)
    offset, worth = (x.detach().cpu().double() for x in (pool.log_offset, pool.log_worth))
    found = []
    for at, each in enumerate(returns.detach().reshape(draws, -1, len(first)).unbind(1)):
        mine = row == at
        if bool(mine.any()):
            found.append(_compared(each.cpu().double(), gained[:, mine], offset, worth, first, theirs[mine]))
    best = min(found, key=lambda one: (one.chance, -one.errors), default=Conflict(0.0, 1.0))
    return best._replace(chance=min(best.chance * len(found), 1.0))


def _compared(
    returns: Float[Tensor, "D J"],
    of_demos: Float[Tensor, "D N"],
    offset: Tensor,
    worth: Tensor,
    ours: Tensor,
    theirs: Tensor,
) -> Conflict:
    """The conflict of demonstrations that share a reward."""
    nothing = Conflict(0.0, 1.0)
    counts = returns.isfinite().all(0) & offset.isfinite()  # of others the weight is 0
    returns, offset, worth, ours = returns[:, counts], offset[counts], worth[counts], ours[counts]
    if len(returns) < 2 or returns.shape[-1] < 2 or not bool(of_demos.isfinite().all()):
        return nothing
    log_weight = returns.mean(0) + offset
    weight = log_weight.softmax(-1)
    ess = float((-(2 * log_weight.log_softmax(-1) - worth).logsumexp(-1)).exp())
    slopes, total = _directions(returns, of_demos, weight)
    known, seen = _terms(ours, theirs, weight, int(ess / _SAMPLES_A_TERM))
    if not known.shape[-1] or not len(slopes):
        return nothing
    gram = (known.mT * weight) @ known
    fit = torch.linalg.pinv(gram, hermitian=True, rtol=1e-9) @ ((known.mT * weight) @ slopes.mT)
    return _scored((known @ fit).mT, slopes, (seen @ fit).mT, total, weight, ess)


def _directions(
    returns: Float[Tensor, "D J"], of_demos: Float[Tensor, "D N"], weight: Float[Tensor, " J"]
) -> tuple[Float[Tensor, "K J"], Float[Tensor, "K N"]]:
    """Slopes of the log-likelihood of each sample and demonstration, along directions that demonstrations tell of.

    Directions are those in which returns vary over the posterior, of which the demonstrations have information 1.
    """
    draws, number = len(returns), of_demos.shape[-1]
    # returns = middle + coordinates @ slopes, where coordinates have covariance I over the draws
    away, away_of_demos = returns - returns.mean(0), of_demos - of_demos.mean(0)
    size, turn = torch.linalg.eigh((away * weight) @ away.mT / (draws - 1))
    turn = turn[:, size > 1e-9 * size[-1].clamp_min(1e-12)][:, -_MOST_DIRECTIONS:] / math.sqrt(draws - 1)
    slopes, total = turn.mT @ away, turn.mT @ away_of_demos
    centre = (slopes @ weight).unsqueeze(-1)
    slopes, total = slopes - centre, total - centre
    size, turn = torch.linalg.eigh(number * (slopes * weight) @ slopes.mT)
    turn = (turn / size.clamp_min(1e-12).sqrt())[:, size > _LEAST_LEARNED]
    return turn.mT @ slopes, turn.mT @ total


def _scored(
    told: Float[Tensor, "K J"],
    slopes: Float[Tensor, "K J"],
    told_of_demos: Float[Tensor, "K N"],
    of_demos: Float[Tensor, "K N"],
    weight: Float[Tensor, " J"],
    ess: float,
) -> Conflict:
    """By how much the starts' part of demonstrations' slopes is not the share of them that it has of samples'."""
    number = of_demos.shape[-1]
    share, turn = torch.linalg.eigh(number * (told * weight) @ told.mT)
    usable = (share > _SHARES[0]) & (share < _SHARES[1])
    if not bool(usable.any()):
        return Conflict(0.0, 1.0)
    turn, share = turn[:, usable], share[usable].unsqueeze(-1)
    scale = (share * (1 - share) * (1 + number / ess)).sqrt()  # the means that slopes are from are of samples
    score, score_of_demos = (
        (turn.mT @ part - share * (turn.mT @ whole)) / scale
        for part, whole in ((told, slopes), (told_of_demos, of_demos))
    )
    errors = float(score_of_demos.sum(-1).abs().amax())
    chance = min(len(score) * math.erfc(errors / math.sqrt(2)), 1.0)
    return Conflict(errors, chance if chance > _CLOSE else _simulated(score, weight, number, errors))


def _simulated(score: Float[Tensor, "K J"], weight: Tensor, number: int, errors: float) -> float:
    """Chance of a conflict as large where demonstrations are draws of the samples, by their weights."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    found = torch.zeros(len(score), _REPEATS, dtype=torch.float64, device="cpu")
    for _ in range(number):
        index = torch.multinomial(weight, _REPEATS, replacement=True, generator=generator)
        found += score[:, index]
    as_large = int((found.abs().amax(0) >= errors).sum())
    return (
        (1 + as_large) / (1 + _REPEATS) if as_large else min(1 / (1 + _REPEATS), _bound(score, weight, number, errors))
    )


def _bound(score: Float[Tensor, "K J"], weight: Tensor, number: int, errors: float) -> float:
    """Chernoff's bound of that chance, exp(-t x) E exp(t sum) for the best t, of both signs and all directions."""
    found = 0.0
    for one in torch.cat([score, -score]):
        tilts = errors * torch.linspace(0.05, 1.5, 30, dtype=torch.float64, device="cpu")
        of_sum = torch.stack([number * (weight.log() + tilt * one).logsumexp(0) for tilt in tilts])
        found += float((of_sum - tilts * errors).amin().exp())
    return found


def _terms(
    ours: Tensor, theirs: Tensor, weight: Tensor, most: int
) -> tuple[Float[Tensor, "J P"], Float[Tensor, "N P"]]:
    """What a regression knows of starts, of samples and of demonstrations: of mean 0 and variance 1 by the weights.

    Which terms there are does not depend on the demonstrations, by which they are judged.
    """
    if ours.is_floating_point():
        ours, theirs = ours.double(), theirs.double()
        varying = ours.amax(0) - ours.amin(0) > 1e-5 * ours.abs().amax(0)
        ours, theirs = ours[:, varying], theirs[:, varying]
        middle = weight @ ours
        ours, theirs = ours - middle, theirs - middle
        size = ours.shape[-1]
        pairs = [(i, i) for i in range(size)]
        if size <= _MOST_CROSSED:
            pairs += [(i, j) for i in range(size) for j in range(i + 1, size)]
        both = [torch.cat([x, *(x[:, i : i + 1] * x[:, j : j + 1] for i, j in pairs)], -1) for x in (ours, theirs)]
    else:
        states, place = ours.unique(return_inverse=True)
        often = torch.zeros(len(states), dtype=torch.float64, device="cpu").index_add(0, place, weight)
        common = states[often.argsort(descending=True, stable=True)[:_MOST_STATES]]
        both = [(x.unsqueeze(-1) == common).double() for x in (ours, theirs)]
    ours, theirs = (x[:, :most] for x in both)
    middle = weight @ ours
    variance = weight @ (ours - middle).square()
    varying = variance > 1e-18 * ours.square().amax(0)
    scale = variance.clamp_min(1e-300).rsqrt() * varying
    return ((ours - middle) * scale)[:, varying], ((theirs - middle) * scale)[:, varying]
