"""Exact tests of Markov kernels (Gandy and Scott 2020, "Unit testing for MCMC and other Monte Carlo methods").

A draw of the stationary law is put at a random place of a short chain, which is continued forwards by the kernel and
backwards by its reversal. If, and only if, the kernel keeps the law, the place of the draw cannot be told from the
chain: the rank of any statistic there is uniform, exactly, however badly the kernel mixes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import scipy.stats
import torch
from torch import Tensor

State = tuple[Tensor, ...]
"""Tensors whose first dim counts chains."""
Kernel = Callable[[State, int], State]
"""(states, edge of the chain) -> states: what happens at an edge may depend on it, but not on the direction's past."""


def ranks(
    start: Callable[[int], State],
    forwards: Kernel,
    backwards: Kernel,
    statistics: Callable[[State], Tensor],
    count: int,
    length: int = 5,
) -> Tensor:
    """Ranks ``[F, count]``, 0 to ``length - 1``, of the exact draws within their chains; ties are broken at random.

    Args:
        start: n -> exact draws of the stationary law.
        forwards, backwards: the kernel of edge e, from state e to e + 1, and its reversal; of a reversible kernel
            itself.
        statistics: states of n chains -> ``[F, n]``.
    """
    found = []
    for place, size in enumerate(torch.bincount(torch.randint(length, (count,)), minlength=length).tolist()):
        if size == 0:
            continue
        begin = start(size)
        chain = [statistics(begin)]
        for kernel, edges in ((forwards, range(place, length - 1)), (backwards, range(place - 1, -1, -1))):
            state = begin
            for edge in edges:
                state = kernel(state, edge)
                chain.append(statistics(state))
        own, others = chain[0], torch.stack([*chain[1:]])
        ties = torch.stack([own, *others]) == own
        broken = torch.where(ties, torch.rand(ties.shape), -1.0)
        found.append((others < own).sum(0) + (broken[1:] > broken[:1]).sum(0))
    return torch.cat(found, 1)


def p_value(found: Tensor, length: int) -> float:
    """Of all rows of ranks being uniform (chi-square tests, Bonferroni)."""
    counts = [torch.bincount(row, minlength=length).numpy() for row in found]
    return min(1.0, len(counts) * min(scipy.stats.chisquare(row).pvalue for row in counts))


def require_uniform(
    ranks_of: Callable[[int], Tensor], count: int, length: int = 5, false_alarm: float = 1e-4, stages: int = 3
) -> None:
    """Fail where ranks are not uniform; where that is not clear, look again at three times as many.

    The sequential test of Gandy and Scott (2020, algorithm 3): a right kernel fails with probability ``false_alarm`` at
    most, over all stages.
    """
    beta = false_alarm / stages
    gamma = beta ** (1 / stages)
    for _ in range(stages):
        p = p_value(ranks_of(count), length)
        assert p > beta, f"ranks of {count} exact draws are not uniform: p = {p:.1e}"
        if p > gamma + beta:
            return
        beta, count = beta / gamma, 3 * count


def check(start: Any, kernel: Kernel, statistics: Any, count: int) -> None:
    """:func:`require_uniform` for a reversible kernel."""
    require_uniform(lambda size: ranks(start, kernel, kernel, statistics, size), count)
