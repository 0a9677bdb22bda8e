"""Are ranks uniform? Simultaneous bands for their empirical distribution function, and an exact test.

Of R independent ranks that are uniform on 0, ..., L the number below i is Binomial(R, i/(L + 1)) for each i, but all of
them are one picture: a band that holds each of the L numbers with probability 95% holds them all far less often. The
band here holds all of them at once (Saeilynoja, Buerkner and Vehtari 2022, section 2.3): its level for single numbers
is found by simulation of uniform ranks, and the p-value is the share of such simulations that leave some number as far
out as the ranks at hand do. Both are exact for discrete ranks, up to the error of the simulation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_SIMULATIONS = 20_000
_AT_ONCE = 2**22


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
    tail, null = _tail_probabilities(len(ranks), num_draws), _null(len(ranks), num_draws)
    counts = np.rint(shares_below(ranks, num_draws) * len(ranks)).astype(int)
    least = np.min([tail[i, counts[i]] for i in range(num_draws)], axis=0)
    # Simulations that equal it count: the statistic is discrete.
    return np.asarray((1 + np.searchsorted(null, least * (1 + 1e-9), side="right")) / (1 + len(null)))


def band(num_ranks: int, num_draws: int, level: float = 0.95) -> Band:
    """The band that holds the whole picture of uniform ranks with probability ``level``.

    Args:
        num_ranks: R, the number of replicates.
        num_draws: L, the largest rank.
        level: probability that nothing leaves the band.
    """
    tail, null = _tail_probabilities(num_ranks, num_draws), _null(num_ranks, num_draws)
    # The statistic is discrete: where no band holds just so many pictures, this one holds more.
    allowed = tail >= null[int((1 - level) * len(null))] * (1 - 1e-9)
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


@lru_cache(maxsize=8)
def _null(num_ranks: int, num_draws: int) -> Float[np.ndarray, " simulations"]:
    """The least tail probability along the picture, of simulated uniform ranks, sorted."""
    tail = _tail_probabilities(num_ranks, num_draws)
    generator = np.random.default_rng(0)
    block = max(1, _AT_ONCE // num_draws)
    least = []
    for start in range(0, _SIMULATIONS, block):
        size = min(block, _SIMULATIONS - start)
        counts = generator.multinomial(num_ranks, np.full(num_draws + 1, 1 / (num_draws + 1)), size)
        below = counts.cumsum(1)[:, :-1]
        least.append(tail[np.arange(num_draws), below].min(1))
    return np.sort(np.concatenate(least))
