"""Are ranks uniform? Simultaneous bands for their empirical distribution function, and an exact test.

Of R independent ranks that are uniform on 0, ..., L the number below i is Binomial(R, i/(L + 1)) for each i, but all of
them are one picture: a band that holds each of the L numbers with probability 95% holds them all far less often. The
band here holds all of them at once (Saeilynoja, Buerkner and Vehtari 2022). Given the number below i, the number below
i + 1 is binomial again, so that the probability that a picture stays within any limits is a recursion over i (their
section 2.2, for ranks that are discrete): no simulation, and p-values as small as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_SAME = 1e-9
"""Tail probabilities that differ by this share are one number and its rounding error."""


_TINY = 1e-10
"""What is rarer is told by its bound, the sum over i: rounding of the recursion would hide it."""


class Band(NamedTuple):
    """Within which share of ranks below i the picture of uniform ranks stays, for i = 1, ..., L at once."""

    grid: Float[np.ndarray, " L"]
    """i / (L + 1), the expected share."""
    lower: Float[np.ndarray, " L"]
    upper: Float[np.ndarray, " L"]


def shares_below(ranks: Int[np.ndarray, "R *shape"], num_draws: int) -> Float[np.ndarray, "L *shape"]:
    """Share of ranks below i = 1, ..., L: the empirical distribution function that the band is for."""
    return np.stack([(ranks < i).mean(0) for i in range(1, num_draws + 1)])


def p_values(ranks: Int[np.ndarray, "R *shape"], num_draws: int) -> Float[np.ndarray, "*shape"]:
    """Probability that uniform ranks leave the band of some level where these do, or further out.

    Args:
        ranks: number of draws below the truth, 0, ..., L, of R replicates.
        num_draws: L.
    """
    tail = _tail_probabilities(len(ranks), num_draws)
    counts = np.rint(shares_below(ranks, num_draws) * len(ranks)).astype(int)
    least = np.min([tail[i, counts[i]] for i in range(num_draws)], axis=0)
    return np.vectorize(lambda found: _leaving(len(ranks), num_draws, float(found)), otypes=[float])(least)


def band(num_ranks: int, num_draws: int, level: float = 0.95) -> Band:
    """The band that holds the whole picture of uniform ranks with probability ``level``.

    Args:
        num_ranks: R, the number of replicates.
        num_draws: L, the largest rank.
        level: probability that nothing leaves the band.
    """
    tail = _tail_probabilities(num_ranks, num_draws)
    # The statistic is discrete: where no band holds just so many pictures, this one holds more.
    values = np.unique(tail)
    first, last = 0, len(values) - 1
    while first < last:  # the largest value that may be left out with all that are less
        middle = (first + last + 1) // 2
        if _leaving(num_ranks, num_draws, float(values[middle])) <= 1 - level:
            first = middle
        else:
            last = middle - 1
    left_out = _leaving(num_ranks, num_draws, float(values[first])) <= 1 - level
    allowed = tail > values[first] * (1 + _SAME) if left_out else tail >= 0
    lower = allowed.argmax(1)
    upper = num_ranks - allowed[:, ::-1].argmax(1)
    grid = np.arange(1, num_draws + 1) / (num_draws + 1)
    return Band(grid, lower / num_ranks, upper / num_ranks)


def holm(p: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """p-values of K tests, adjusted so that the least is below 5% in 5% of cases (Holm 1979), however they depend."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


@lru_cache(maxsize=8)
def _tail_probabilities(num_ranks: int, num_draws: int) -> Float[np.ndarray, "L R1"]:
    """Two-sided tail probability of each number of ranks below i under the binomial distribution."""
    from scipy.stats import binom

    share = np.arange(1, num_draws + 1)[:, None] / (num_draws + 1)
    counts = np.arange(num_ranks + 1)
    below, above = binom.cdf(counts, num_ranks, share), binom.sf(counts - 1, num_ranks, share)
    return np.minimum(1.0, 2 * np.minimum(below, above))


@lru_cache(maxsize=4096)
def _leaving(num_ranks: int, num_draws: int, least: float) -> float:
    """Probability that for some i uniform ranks have a tail probability of at most ``least``."""
    from scipy.special import gammaln

    if least * num_draws < _TINY:
        return least * num_draws
    stays = _tail_probabilities(num_ranks, num_draws) > least * (1 + _SAME)
    if not stays.any(1).all():
        return 1.0
    factorial = gammaln(np.arange(num_ranks + 1) + 1.0)
    held, before = np.ones(1), np.zeros(1, dtype=int)  # probability of each number below i that stays, and that number
    for i in range(num_draws):
        now = np.flatnonzero(stays[i])
        share = 1 / (num_draws + 1 - i)  # of those not below i, how many have rank i
        more, rest = now[:, None] - before, num_ranks - now[:, None]
        log = factorial[num_ranks - before] - factorial[np.maximum(more, 0)] - factorial[rest]
        log = log + more * np.log(share) + rest * np.log1p(-share)
        held = np.where(more >= 0, np.exp(log), 0.0) @ held
        before = now
    return float(np.clip(1.0 - held.sum(), 0.0, 1.0))
