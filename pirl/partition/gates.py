"""When an estimate of log Z may be believed: effective samples, and the tail of the weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pirl.errors import OptionError, PartitionError, check_counts, check_numbers, counted, form

ESS_PER_DEMONSTRATION = 100
"""Effective samples a demonstration for a posterior mean within a tenth of a posterior standard deviation."""
_FEWEST_FOR_TAIL = 25
_FEWEST_FOR_HILL = 10


class PartitionEstimate(NamedTuple):
    """An estimate of log Z, and how far to trust it. All of shape ``[*batch]``; only ``log_partition`` has a gradient.

    Attributes:
        log_partition: log Z-hat, in nats.
        standard_error: its first-order standard error, CV / sqrt(N) (the bias is about minus half its square); NaN of a
            single sample or run.
        ess: effective number of samples, (sum w)^2 / sum w^2; of sequential Monte Carlo and of the multilevel
            estimator at most 1 / standard_error^2, and NaN where that is.
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


def pareto_k(log_weights: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch"]:
    """Tail index of the weights (ArviZ's Pareto smoothing): -inf for constant ones, NaN for fewer than 25.

    The Pareto fit takes the scale of a tail from its lower quarter. Where that lies in a lump of nearly equal weights,
    as of returns that are sums of a few numbers, it finds a heavy tail whose largest weight is twice its smallest. So
    it counts for no more than Hill's (1975) estimate, the mean log of the largest weights over the next one, which
    tends to the same index wherever there is a heavy tail: the largest such estimate, of the tail and of its halves,
    since a mixture's heavy part may be smaller than the tail.

    Where the largest weights are a few values, many times each, the fit sees no tail, and a small value tells nothing:
    there the effective sample size is the only guard.

    Example:
        >>> pareto_k(torch.zeros(100))
        tensor(-inf)
    """
    check_form(log_weights)
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
        tail = row.topk(math.floor(size) + 1).values
        heavy = bool(tail[0] > tail[-2])
        with np.errstate(divide="ignore", invalid="ignore"):
            khat = float(array_stats.psislw(-row.numpy())[1]) if heavy else -math.inf  # it takes inverse weights
        khat = -math.inf if math.isnan(khat) else khat  # a tail of a few values, many times each
        sizes = [len(tail) - 1]
        while sizes[-1] >= 2 * _FEWEST_FOR_HILL:
            sizes.append(sizes[-1] // 2)
        found.append(min(khat, max(float((tail[:m] - tail[m]).mean()) for m in sizes)))
    return torch.tensor(found, dtype=log_weights.dtype, device=log_weights.device).reshape(log_weights.shape[:-1])


def trusted_k(num_samples: int) -> float:
    """Largest Pareto k-hat at which N weights can be averaged: min(1 - 1 / log10 N, 0.7) (Vehtari et al. 2024).

    Example:
        >>> trusted_k(100), trusted_k(10_000)
        (0.5, 0.7)
    """
    check_counts(1, num_samples=num_samples)
    return min(1 - 1 / math.log10(max(num_samples, 2)), 0.7)


def untrusted(
    estimate: PartitionEstimate, num_demonstrations: int, share: float = 0.95, site: str | None = None
) -> str | None:
    """Why a posterior that used these estimates should not be trusted, with figures and advice; None if it may be.

    With M demonstrations and a frozen proposal the posterior's mean moves by about sqrt(M / ESS) standard deviations.
    The gate therefore asks, over draws of the posterior and not at one point, for ESS of 100 M and a k-hat below
    :func:`trusted_k`.

    Args:
        estimate: at posterior draws, ``[draws]``.
        num_demonstrations: M.
        share: of the draws that must pass.
        site: of a model with several pools, the one to name.

    Example:
        >>> untrusted(importance(torch.zeros(3, 1000)), num_demonstrations=5) is None
        True
        >>> untrusted(importance(torch.zeros(3, 1000)), num_demonstrations=50)
        'log Z is not known well enough: 1000 effective samples of 1000 for 50 demonstrations (needed: 5000)...'
    """
    if not isinstance(estimate, PartitionEstimate):
        raise OptionError(f"estimate is {form(estimate)}: give what pirl.partition.importance returned")
    check_counts(1, num_demonstrations=num_demonstrations)
    check_numbers(0.0, 1.0, share=share)
    ess, khat = estimate.ess.detach().flatten(), estimate.pareto_k.detach().flatten()
    need, most = ESS_PER_DEMONSTRATION * num_demonstrations, trusted_k(estimate.num_samples)
    low = float(ess.nan_to_num(nan=0.0).quantile(1 - share))  # what is not known counts as nothing
    high = float(khat.nan_to_num(nan=1.0, neginf=-10.0).quantile(share))
    found = []
    if low < need:
        moved = math.sqrt(num_demonstrations / max(low, 1e-9))
        many = counted(num_demonstrations, "demonstration")
        found.append(
            f"{low:.0f} effective samples of {estimate.num_samples} for {many} (needed: {need}) may move posterior "
            f"means by {moved:.2g} standard deviations"
        )
    if high >= most:
        found.append(
            f"Pareto k-hat of the weights is {high:.2f}, a heavy tail (at most {most:.2f} for {estimate.num_samples} "
            "samples)"
        )
    if not found:
        return None
    where = "" if site is None else f", least of all at site {site!r}"
    return f"log Z is not known well enough{where}: {'; '.join(found)}: add samples of policies nearer to the posterior"


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


def check_form(log_weights: Any, name: str = "log weights") -> None:
    """Refuse what are no log weights (or densities), whatever their values.

    Raises:
        PartitionError: no floating tensor, or no samples.
    """
    if (
        not isinstance(log_weights, Tensor)
        or not log_weights.is_floating_point()
        or log_weights.dim() < 1
        or log_weights.shape[-1] < 1
    ):
        raise PartitionError(
            f"{name} are {form(log_weights)}; expected a floating tensor [*batch, N] of at least one sample"
        )


def check_log_weights(log_weights: Any) -> None:
    """Refuse what no estimate can be made of.

    Raises:
        PartitionError: no samples, weights that are NaN or infinite, or all of them 0.
    """
    check_form(log_weights)
    wrong = log_weights.isnan() | (log_weights == torch.inf)
    if bool(wrong.any()):
        raise PartitionError(
            f"log weight of sample {int(wrong.nonzero()[0, -1])} is NaN or +inf: check rewards and densities"
        )
    if bool((log_weights == -torch.inf).all(-1).any()):
        raise PartitionError("all weights are 0: no sample of the proposal is possible under the model")


def spread(log_weights: Float[Tensor, "*batch N"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Effective sample size, and the coefficient of variation, NaN of a single one."""
    log_weights = log_weights.detach()
    ess = 1 / log_weights.softmax(-1).square().sum(-1)
    count = log_weights.shape[-1]
    if count == 1:
        return ess, torch.full_like(ess, torch.nan)
    return ess, ((count / ess - 1).clamp(min=0) * count / (count - 1)).sqrt()
