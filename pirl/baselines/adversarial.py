"""Inverse reinforcement learning as a GAN (Finn, Christiano, Abbeel and Levine 2016b), with r and Z both learned.

The discriminator between demonstrations and roll-outs has the form of a density ratio,

    D(tau) = (1/Z) exp r(tau) / (q(tau) + (1/Z) exp r(tau)),

with the policy's density q known: dynamics cancel, and prod pi(a|s) remains. Its only unknowns are r and Z. Trained
against it, the policy maximises r plus entropy, so that q tends to the demonstrators' law. The result is a point
estimate and never a posterior.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pirl.baselines.estimate import PointEstimate
from pirl.baselines.guided_cost import Demonstrations, Step, _alternate
from pirl.baselines.worlds import Sums
from pirl.errors import OptionError
from pirl.pool import Features
from pirl.simulators import Policy


def adversarial(
    demos: Demonstrations,
    simulator: Any,
    features: Tensor | Features,
    *,
    odds: str = "counts",
    num_rounds: int = 20,
    num_rollouts: int = 1000,
    least_ess: float = 0.05,
    l2: float = 0.0,
    explore: float = 0.1,
    tolerance: float = 1e-3,
    seed: int = 0,
    particles: bool = False,
    base: Policy | None = None,
    learner: Any = None,
) -> PointEstimate:
    """GAN-IRL with a reward linear in features: weights and log Z from a discriminator.

    With a linear reward the discriminator is a logistic regression with known offset log q, concave in (weights,
    log Z), and is trained to its optimum each round; q is the mixture of all policies so far. This is noise-contrastive
    estimation: weights and log Z are consistent for any q.

    Args:
        odds: "counts": D knows that there are N demonstrations to J roll-outs, and tends to maximum likelihood as J
            grows; "even": the published form, both sides weighed as one, statistically less efficient unless q is the
            demonstrators' law.

    The other arguments and errors are those of :func:`pirl.baselines.guided_cost`.

    Returns:
        A :class:`PointEstimate` as of :func:`pirl.baselines.guided_cost`, with attrs "learned_log_partition": log Z
        as the discriminator's parameter, beside "log_partition", the estimate from weights.

    Example:
        >>> simulator = pirl.simulators.TabularSimulator(world)
        >>> estimate = adversarial(walks, simulator, marks, num_rounds=2, num_rollouts=200)
        >>> estimate.parameters["weights"].shape
        torch.Size([3])
    """
    if odds not in ("counts", "even"):
        raise OptionError(f"odds must be 'counts' or 'even', not {odds!r}")

    def discriminator(sums: Sums, parameters: Tensor) -> Step:
        return _discriminator(sums, parameters, odds, l2)

    attrs = {"l2": l2, "odds": odds}
    return _alternate("GAN-IRL", discriminator, demos, simulator, features, num_rounds, num_rollouts, least_ess,
                      explore, tolerance, seed, particles, base, learner, attrs, extra=1)  # fmt: skip


def _discriminator(sums: Sums, parameters: Tensor, odds: str, l2: float) -> Step:
    """Log-likelihood of the labels; parameters are the weights, then log Z.

    The log density ratio of a demonstration to a roll-out needs the demonstration's own q: both are made of actions'
    probabilities under the policies of the pool. Each sample of the pool has the weight of what it counts for.
    """
    weights, log_z = parameters[:-1], parameters[-1]
    worth = sums.log_worth.exp()
    ratio = len(sums.demos) / float(worth.sum())
    bias = math.log(ratio) if odds == "counts" else 0.0
    worth = worth if odds == "counts" else ratio * worth  # as much as demonstrations in all
    real = sums.demos @ weights - log_z + sums.demos_log_ratio + bias
    made = sums.pool @ weights - log_z + sums.log_ratio + bias
    value = logsigmoid(real).sum() + worth @ logsigmoid(-made)
    ones = torch.ones_like(real).unsqueeze(1), torch.ones_like(made).unsqueeze(1)
    design = torch.cat([sums.demos, -ones[0]], 1), torch.cat([sums.pool, -ones[1]], 1)
    p, q = real.sigmoid(), made.sigmoid()
    gradient = (1 - p) @ design[0] - (worth * q) @ design[1]
    curvature = (design[0] * (p * (1 - p)).unsqueeze(1)).mT @ design[0]
    curvature = curvature + (design[1] * (worth * q * (1 - q)).unsqueeze(1)).mT @ design[1]
    penalty = torch.cat([weights, weights.new_zeros(1)])
    ridge = torch.diag(torch.cat([torch.full_like(weights, l2), weights.new_zeros(1)]))
    return Step(value - 0.5 * l2 * weights @ weights, gradient - l2 * penalty, curvature + ridge)
