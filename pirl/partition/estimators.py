"""log Z-hat from log weights of independent samples: means, mixtures, a sum without bias, and bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pirl.errors import OptionError, PartitionError, check_counts, check_generator, form
from pirl.partition.gates import PartitionEstimate, check_form, check_log_weights, pareto_k, spread

MULTILEVEL_K = 0.4
"""Beyond this tail index the multilevel estimator's variance may be infinite."""
_SHARE_OF_LEVELS = 2.0**-1.5


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


class Constants(NamedTuple):
    """What proposals' estimated log normalising constants are off by, and how well that is known.

    Example:
        >>> one = reconcile(torch.zeros(1, 6), torch.zeros(6, dtype=torch.long), torch.tensor([0.1]))
        >>> one.shift, one.covariance.sqrt()  # a single one has none to agree with
        (tensor([0.]), tensor([[0.1000]]))
    """

    shift: Float[Tensor, " K"]
    """To be added to each constant."""
    covariance: Float[Tensor, "K K"]
    """Of the errors that are left."""


def log_mean_exp(log_weights: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch"]:
    """log of the mean weight: the estimate of log Z alone, for use under ``torch.func`` transforms.

    Example:
        >>> log_mean_exp(torch.tensor([1.0, 3.0]).log()).exp()
        tensor(2.)
    """
    check_form(log_weights)
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


def mixture_log_density(log_densities: Float[Tensor, "K N"], counts: Tensor) -> Float[Tensor, " N"]:
    """log q of samples from several proposals, taken as one mixture (the balance heuristic): log sum_k (n_k/N) q_k.

    Args:
        log_densities: log q_k(tau_j) of every sample under every proposal, up to what is common to all (dynamics).
        counts: how many of the samples each proposal gave, or how many independent draws those count for ``[K]``.

    Raises:
        PartitionError: shapes disagree, a density is NaN or +inf, or a sample has no density under any proposal.

    Example:
        >>> mixture_log_density(torch.zeros(2, 5), torch.tensor([3, 2])).round(decimals=4).abs()
        tensor([0., 0., 0., 0., 0.])
    """
    check_form(log_densities, "log densities")
    if log_densities.dim() != 2 or not isinstance(counts, Tensor) or counts.shape != log_densities.shape[:1]:
        raise PartitionError(
            f"densities {tuple(log_densities.shape)} do not fit counts, {form(counts)}: expected tensors [K, N] and [K]"
        )
    if bool((counts < 0).any()) or not bool((counts > 0).any()):
        raise PartitionError(f"counts are {counts.tolist()}: expected numbers from 0 on, and not all of them 0")
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


_CONFLICT = 3.0
"""Standard errors by which an estimate is contradicted."""


def reconcile(
    log_densities: Float[Tensor, "K N"],
    origin: Int[Tensor, " N"],
    errors: Float[Tensor, " K"],
    worth: Float[Tensor, " K"] | None = None,
    known: Bool[Tensor, " K"] | None = None,
) -> Constants:
    """What to add to the proposals' estimated log normalising constants, so that all samples agree on them.

    Samples that several proposals could have made tell the ratios of their constants: by reverse logistic regression
    (Geyer 1994; the same as MBAR, Shirts and Chodera 2008), the maximum of the likelihood of which proposal each
    sample came from, p(k | tau) proportional to n_k q_k(tau) exp(-c_k). Its variance is H^- - diag(1/n) (Kong et al.
    2003): none where proposals are the same. Weighed against what is known of each constant beforehand, N(0, error^2).

    Constants that are known, as those of policies' roll-outs, stay, and hold the others. All of them together are one
    proposal, their mixture, with n_0 samples, and the variance is H^-1 - diag(1/n) - 1/n_0, H without them. A filter
    of few particles that all missed the same has a constant that is too small, and a small error of it: where an
    estimate is three standard errors off what roll-outs say, its error is as large as it is off.

    Args:
        log_densities: log q_k of every sample under every proposal, with the constants as estimated.
        origin: which proposal each sample came from.
        errors: standard errors of the log constants, as estimated; estimates without error move only where known
            constants contradict them.
        worth: independent draws that a sample counts for (particles share ancestors); 1 by default.
        known: whose constants are no estimates; none by default.

    Raises:
        PartitionError: shapes disagree, a density is NaN or +inf, a proposal that there is not or that gave no sample,
            errors that are negative or not finite, or samples that are worth nothing.

    Example:
        >>> reconcile(torch.zeros(2, 6), torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0.1, 0.1])).shift
        tensor([0., 0.])
    """
    known = torch.zeros_like(errors, dtype=torch.bool) if known is None else known
    _check_proposals(log_densities, origin, errors, worth, known)
    # In double precision: what proposals without overlap leave is far below that of floats.
    held = bool(known.any())
    constants, covariance = torch.zeros_like(errors), torch.diag(torch.where(known, 0.0, errors.square()))
    free = (~known if held else errors > 0).nonzero().flatten()
    if len(free) + held < 2:
        return Constants(constants, covariance)
    weight = (torch.ones_like(errors) if worth is None else worth).double()[origin]
    label = (origin.unsqueeze(0) == free.unsqueeze(1)).double()
    counts, density = (label * weight).sum(1), log_densities[free].double()
    log_counts = counts.log()
    if held:  # their mixture comes last, and stays
        of_known = torch.zeros(len(known)).to(weight).index_add(0, origin, weight)[known]
        mixture = (of_known.log().unsqueeze(1) + log_densities[known].double()).logsumexp(0)
        density, log_counts = torch.cat([density, mixture.unsqueeze(0)]), torch.cat([log_counts, weight.new_zeros(1)])
    eye = torch.diag(torch.ones_like(counts))
    # Without it, the sum is free, and fixed. Proposals without samples in common have no curvature; their agreement is
    # worth nothing below.
    ones = 0 * eye if held else torch.full_like(eye, 1 / len(free))
    floor = counts.sum() * ones + 1e-9 * torch.diag(counts)
    agreed = torch.zeros_like(counts)
    for _ in range(100):
        shift = torch.cat([agreed, agreed.new_zeros(1)]) if held else agreed
        share = (log_counts - shift).unsqueeze(1).add(density).softmax(0)[: len(free)]
        curvature = torch.diag((share * weight).sum(1)) - (share * weight) @ share.mT
        step = torch.linalg.solve(curvature + floor, ((share - label) * weight).sum(1))
        agreed = agreed + step.clamp(-1, 1)  # a longer one is a sign of samples that do not overlap
        if float(step.abs().max()) < 1e-10:
            break
    centre = eye - ones
    variance = torch.linalg.inv(curvature + floor) - torch.diag(1 / counts)
    if held:
        variance = variance - 1 / of_known.sum()
    size, axes = torch.linalg.eigh(centre @ variance @ centre)
    precision = centre @ (axes / size.clamp(min=1e-8)) @ axes.mT @ centre
    stated = errors[free].double().square()
    if held:
        by_samples = variance.diagonal().clamp_min(0)
        against = agreed.square() > _CONFLICT**2 * (stated + by_samples)
        stated = torch.where(against, agreed.square() - by_samples, stated)
    before = torch.diag(1 / stated.clamp_min(1e-16))
    after = torch.linalg.inv(precision + before)
    constants[free] = (after @ precision @ agreed).to(errors)
    covariance[free.unsqueeze(1), free] = after.to(errors)
    return Constants(constants, covariance)


def _check_proposals(log_densities: Any, origin: Any, errors: Any, worth: Any, known: Any) -> None:
    check_form(log_densities, "log densities")
    proposals, samples = log_densities.shape if log_densities.dim() == 2 else (-1, -1)
    given = {"origin": (origin, samples), "errors": (errors, proposals)}
    given |= {} if worth is None else {"worth": (worth, proposals)}
    for name, (x, size) in given.items():
        if not isinstance(x, Tensor) or x.shape != (size,) or x.is_floating_point() != (name != "origin"):
            kind = "whole" if name == "origin" else "floating"
            raise PartitionError(
                f"{name} is {form(x)}, and log densities {tuple(log_densities.shape)}: expected a tensor of {kind} "
                "numbers, with densities [K, N], origin [N], errors [K] and worth [K]"
            )
    if bool((log_densities.isnan() | (log_densities == torch.inf)).any()):
        raise PartitionError("log densities are NaN or +inf somewhere: give those of the policies that played")
    if set(origin.unique().tolist()) != set(range(proposals)):
        raise PartitionError(
            f"samples are of proposals {origin.unique().tolist()}: each of 0 to {proposals - 1} must have given some"
        )
    if not isinstance(known, Tensor) or known.shape != (proposals,) or known.dtype != torch.bool:
        raise PartitionError(f"known is {form(known)}: expected [{proposals}] truth values, one a proposal")
    for name, x in (("errors", errors), ("worth", worth)):
        if x is not None and not bool((x.isfinite() & (x >= 0)).all()):
            raise PartitionError(f"{name} are {x.tolist()}: expected finite numbers from 0 on")
    # Numbers of draws are summed, and differences of their inverses taken.
    if worth is not None and bool((worth < 1e-9).any()):
        raise PartitionError(f"worth is {worth.tolist()}: leave out proposals whose samples are worth nothing")


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
    check_log_weights(log_weights)
    with torch.no_grad():
        ess, relative = spread(log_weights)
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
        raise OptionError(f"draw is {form(draw)}: give a function of n that makes n log weights")
    check_generator(generator)
    check_counts(2, num_replicates=num_replicates)  # their spread is the standard error
    check_counts(1, base=base)
    uniform = torch.rand(num_replicates, generator=generator, dtype=torch.float64)
    level = (uniform.log() / math.log(_SHARE_OF_LEVELS)).floor().long()  # geometric
    values, weights = [], list[Tensor]()
    for k in range(int(level.max()) + 1):
        count = int((level == k).sum())
        if count == 0:
            continue
        size = base * 2 ** (k + 1)
        drawn = draw(count * size)
        check_log_weights(drawn)
        if drawn.shape[-1] != count * size or (weights and drawn.shape[:-1] != weights[0].shape[:-1]):
            raise PartitionError(
                f"draw({count * size}) gave log weights {tuple(drawn.shape)}: expected [*batch, {count * size}], "
                "of one batch each time"
            )
        weights.append(drawn.detach())
        parts = drawn.unflatten(-1, (count, size))
        halves = log_mean_exp(parts.unflatten(-1, (2, size // 2)))  # [*batch, count, 2]
        probability = (1 - _SHARE_OF_LEVELS) * _SHARE_OF_LEVELS**k
        if bool((halves == -torch.inf).any()):
            raise PartitionError(
                "all weights of one half of a replicate are 0, whose logarithm has no mean: use plain importance "
                "sampling, or a larger base"
            )
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
    ess = torch.minimum(spread(everything)[0], 1 / error.square())  # not more than replicates show that they are worth
    return PartitionEstimate(replicates.mean(-1), error, ess, khat, everything.shape[-1])


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
    check_log_weights(log_weights)
    check_log_weights(exact_log_weights)
    if log_weights.shape[:-1] != exact_log_weights.shape[:-1] or log_weights.dtype != exact_log_weights.dtype:
        raise PartitionError(
            f"log weights are {form(log_weights)}, and those of exact draws {form(exact_log_weights)}: expected one "
            "batch and dtype, [*batch, N] and [*batch, M]"
        )
    check_counts(1, block=1 if block is None else block)
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
