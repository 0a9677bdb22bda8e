"""The exchange algorithm (Murray, Ghahramani and MacKay 2006): an exact posterior without log Z, as an oracle.

For rewards of at most 0, p(O = 1 | s, a) = exp r is a probability: a roll-out of p(tau) that is accepted with
probability exp(sum r) is a perfect draw of p(tau | O). In the ratio of a Metropolis step log Z then cancels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def perfect_returns(
    features: Callable[[int], Tensor], weights: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Feature sums ``[count, K]`` of perfect draws for weights (each with a reward of at most 0)."""
    kept: list[Tensor] = []
    found = 0
    while found < count:
        proposed = features(256)
        accepted = torch.rand(256, generator=generator, dtype=torch.float64).log() < proposed @ weights
        kept.append(proposed[accepted])
        found += int(accepted.sum())
    return torch.cat(kept)[:count]


def exchange(
    demo_sums: Tensor,
    features: Callable[[int], Tensor],
    log_prior: Callable[[Tensor], Tensor],
    start: Tensor,
    step: float,
    num_samples: int,
    generator: torch.Generator,
) -> Tensor:
    """Draws ``[num_samples, K]`` of the weights, whose rewards must be at most 0 wherever the prior is positive.

    Args:
        demo_sums: feature sums of the demonstrations ``[N, K]``.
        features: n -> feature sums of n fresh roll-outs of the base policy.
    """
    count, total, at = len(demo_sums), demo_sums.sum(0), start
    draws = []
    for _ in range(num_samples):
        proposal = at + step * torch.randn(len(at), generator=generator, dtype=torch.float64)
        if bool(log_prior(proposal).isfinite()):
            fresh = perfect_returns(features, proposal, count, generator).sum(0)
            # The demonstrations for the proposal, the fresh draws for the present weights, against the reverse.
            ratio = (total - fresh) @ (proposal - at) + log_prior(proposal) - log_prior(at)
            if bool(torch.rand((), generator=generator, dtype=torch.float64).log() < ratio):
                at = proposal
        draws.append(at)
    return torch.stack(draws)
